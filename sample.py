"""Write text with a trained model, AR or diffusion: from nothing, after a prompt, or into gaps.

    python sample.py                                        # the newest model in runs/
    python sample.py --prompt "The statement "              # goes on from a prompt
    python sample.py --prompt "The ________ of an object"   # fills gaps: three or more underscores, one token each
"""
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import dlm
from dlm import UserError, option

SHIPPED = Path(__file__).parent / "assets" / "dlm-docs.pt"  # a small trained model, so that something shows at once


@dataclass
class Options:
    checkpoint: str = option("", "a run's folder or checkpoint; empty: the newest in runs/, else the one in assets/")
    prompt: str = option("", "text to keep; each run of three or more underscores is a gap of as many tokens")
    length: int = option(0, "tokens in all; 0: the model's context, or the prompt's length if it has gaps", at_least=0)
    number: int = option(4, "texts", at_least=1)
    steps: int = option(0, "steps a block; 0: one token a step", at_least=0)
    order: str = option("", "which tokens come first: random ones (ancestral: at random times too), or the surest by "
                        "their confidence, margin or entropy; empty: confidence inside blocks, ancestral over a whole "
                        "text", choices=("", *dlm.ORDERS))
    threshold: float = option(0.0, "reveal all that are at least so sure (0 to 1) at once, instead of --steps",
                              at_least=0, at_most=1)
    temperature: float = option(1.0, "below 1 sharper, 0 the likeliest token", at_least=0)
    top_k: int = option(0, "draw from the K likeliest tokens only; 0: from all", at_least=0)
    top_p: float = option(1.0, "draw from the likeliest tokens that together reach this probability", at_least=0, at_most=1)
    seed: int = option(0, "seed: the same seed and options give the same texts", at_least=0)
    device: str = option("auto", "auto, cuda, mps or cpu")


def newest():
    runs = sorted(Path("runs").glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not runs and not SHIPPED.exists():
        raise UserError("--checkpoint: no model in runs/ yet; train one with python distill.py")
    return runs[-1] if runs else SHIPPED


def read_prompt(o, model, tokenizer):
    """-> the state to start from (length,): given tokens, and [MASK] in the gaps and after the prompt."""
    parts = [torch.full((len(p),), model.V) if p.startswith("___") else tokenizer.encode(p, "--prompt")
             for p in re.split(r"(_{3,})", o.prompt) if p]
    z = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
    length = o.length or (len(z) if (z == model.V).any() else model.L)
    if length > model.L:
        raise UserError(f"{f'--length {length}' if o.length else '--prompt'}: {length} tokens, more than the model's context "
                        f"of {model.L}; ask for less")
    if len(z) > length or (len(z) == length and not (z == model.V).any()):
        raise UserError(f"--prompt: {len(z)} tokens leave no room in {length}; shorten it, or leave a ___ gap")
    return torch.cat([z, torch.full((length - len(z),), model.V)])


def show(tokens, given, tokenizer, colour):
    """The text; given tokens stand out in cyan on a terminal."""
    out, start = "", 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or given[i] != given[start]:
            piece = tokenizer.decode(tokens[start:i])
            out += f"\033[36m{piece}\033[0m" if colour and given[start] else piece
            start = i
    return out


def main(argv=None):
    o = dlm.parse(Options, argv, __doc__)
    device = dlm.pick_device(o.device)
    path = Path(o.checkpoint) if o.checkpoint else newest()
    model, tokenizer, _ = dlm.load(path, "--checkpoint", device)
    z = read_prompt(o, model, tokenizer).to(device).expand(o.number, -1)
    kind = "AR" if model.b == 1 else f"diffusion, blocks of {model.b}"
    print(f"{path} ({kind}), {device}, seed {o.seed}", file=sys.stderr)
    if dlm.unseen(z, model):
        print(f"note: tokens right of a gap's block are kept but not seen while it is written (b = {model.b}); a model "
              "trained with --block 0 sees them", file=sys.stderr)
    torch.manual_seed(o.seed)
    x = dlm.generate(model, o.number, o.steps, z, order=o.order, threshold=o.threshold, temperature=o.temperature,
                     top_k=o.top_k, top_p=o.top_p)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for i in range(o.number):
        print(f"--- {i + 1}\n{show(x[i].tolist(), (z[i] < model.V).tolist(), tokenizer, colour)}")


if __name__ == "__main__":
    dlm.run_script(main)
