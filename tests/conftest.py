import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)  # tiny tensors: a second thread only costs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would have it ignored
