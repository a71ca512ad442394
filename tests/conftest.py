import signal
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
torch.set_num_threads(1)  # tiny tensors: a second thread only costs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would have it ignored
