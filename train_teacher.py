"""Train a model from text: an autoregressive teacher (the default) or a plain masked-diffusion model.

    python train_teacher.py                        # 4 layers x 128, the Python docs in 512 byte pairs
    python train_teacher.py --objective mdlm       # a denoiser from scratch, the baseline of every distillation

Every run gets a folder under runs/ with checkpoint.pt, metrics.json and loss.png.
"""
import dataclasses
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch

import dlm
from dlm import UserError, option

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TEST_REPEATS = 8  # states per held-out text when a bound is reported; the training curve uses one


@dataclass
class Options:
    objective: str = option("ar", "ar: causal, p(x_i|x_<i); mdlm: masked diffusion", choices=("ar", "mdlm"))
    data: str = option("docs", "docs, shakespeare, arithmetic, or the path of a text file")
    tokenizer: str = option("bpe:512", "char, bpe (1024 tokens), bpe:SIZE or gpt2")
    context: int = option(64, "context length in tokens", at_least=2)
    block: int = option(0, "block length of mdlm; 0 is the whole context", at_least=0)
    n_layer: int = option(4, "layers", at_least=1)
    n_head: int = option(4, "attention heads", at_least=1)
    n_embd: int = option(128, "width", at_least=2)
    dropout: float = option(0.0, "dropout", at_least=0)
    steps: int = option(500, "optimiser steps", at_least=1)
    batch_size: int = option(32, "texts a step", at_least=1)
    lr: float = option(0.02, "learning rate of Muon; AdamW's, for embedding and head, is 0.15 of it", at_least=0)
    seed: int = option(0, "seed of weights, batches and masks", at_least=0)
    out: str = option("", "folder of the run; empty: runs/ and a name made of the options")
    device: str = option("auto", "auto, cuda, mps or cpu")
    resume: str = option("", "folder of an interrupted run to go on with, with the options it was started with")
    overwrite: bool = option(False, "replace the run that is in the folder")


def run_name(o, what, block=""):
    """Such as ar-docs-bpe512-s0 or tcs-docs-bpe512-b4-s0."""
    return f"{what}-{Path(o.data).stem[:40]}-{o.tokenizer.replace(':', '')}{block}-s{o.seed}"


def folder_of(o, name):
    """The run's folder; refuses one that holds a run already, unless asked."""
    folder = Path(o.out or f"runs/{name}")
    try:
        taken = (folder / "checkpoint.pt").exists()
    except OSError as e:
        raise UserError(f"--out {folder}: cannot be used ({e.strerror}); name another folder") from None
    if taken and not (o.overwrite or o.resume):
        raise UserError(f"--out {folder}: holds a run already; --resume {folder} goes on with it, --overwrite replaces "
                        "it, or name another folder")
    return folder


def resumed(o, argv):
    """With --resume: the options the run was started with, its folder as `out`, and its checkpoint. Else o, None."""
    if not o.resume:
        return o, None
    given = [a for a in argv if a.startswith("--") and a.split("=")[0] not in ("--resume", "--device")]
    if given:
        raise UserError(f"{given[0]}: with --resume a run keeps the options it was started with; leave this one out")
    ckpt = dlm.load(o.resume, "--resume")[2]
    folder = o.resume if Path(o.resume).is_dir() else str(Path(o.resume).parent)
    if "random" not in (ckpt["trainer"] or ()) or set(ckpt["options"]) != {f.name for f in dataclasses.fields(o)}:
        raise UserError(f"--resume {o.resume}: not a training run of this script")
    return type(o)(**{**ckpt["options"], "out": folder, "resume": folder, "device": o.device}), ckpt


def fit(o, folder, model, text, batch_loss, lr, ckpt, name, validate=None):
    """Trains `model` into `folder` -> the Trainer. batch_loss(student, share of the steps done) draws a batch and returns
    its loss; validate(model) chooses the weights to keep: by the bound on validation text, unless another is given."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {folder}: cannot be made ({e.strerror}); name another folder") from None
    device = model.embedding.weight.device
    student = torch.compile(model) if device.type == "cuda" else model
    trainer = dlm.Trainer(model, o.steps, lr)
    torch.manual_seed(o.seed)   # here too: what was trained before in this process must not matter
    if ckpt:
        trainer.load(ckpt["trainer"])
    val = dlm.consecutive(text.parts["val"], model.L, 256).to(device)
    validate = validate or (lambda model: dlm.bound(model, val)[0])

    def save():
        dlm.save(folder / "checkpoint.pt", model, text.tokenizer, dataclasses.asdict(o), trainer,
                 trainer.best or trainer.ema, text.sha256)

    n = sum(p.numel() for p in model.parameters())
    kind = "AR, b = 1" if model.b == 1 else f"diffusion, b = {model.b}"
    print(f"{name}: {n / 1e6:.2f} M parameters ({kind}), {o.steps - trainer.step} steps of {o.batch_size} x {model.L} "
          f"tokens of {o.data} on {device.type}, into {folder}", flush=True)
    trainer.fit(lambda: batch_loss(student, trainer.step / trainer.steps), validate, save, name)
    return trainer


def report(o, folder, trainer, model, text, **more):
    """Test bound, metrics.json and loss.png; `more` goes into the metrics."""
    device = model.embedding.weight.device
    held = dlm.consecutive(text.parts["test"], model.L).to(device)
    test, se = dlm.bound(model, held, 1 if model.b == 1 else TEST_REPEATS)
    metrics = {"options": dataclasses.asdict(o), "block": model.b, "parameters": sum(p.numel() for p in model.parameters()),
               "corpus": {"name": text.name, "sha256": text.sha256, "chars_per_token": text.chars_per_token},
               "versions": {**dlm.versions(), "machine": platform.machine()}, "device": device.type,
               "train_seconds": trainer.seconds, "train_tokens": trainer.step * o.batch_size * model.L,
               "history": trainer.history, "test_nats_per_token": test, "test_se": se,
               "test_nats_per_char": test / text.chars_per_token, **more}
    dlm.write_json(folder / "metrics.json", metrics)
    step, seconds, train, val = zip(*trainer.history)
    fig, ax = plt.subplots(figsize=(5, 3.2))
    ax.plot(step, train, "k--", label="training loss")
    ax.plot(step, val, "k-", label="validation " + ("NLL" if model.b == 1 else "bound"))
    ax.set(xlabel="step", ylabel="nats per token", title=folder.name)
    ax.legend()
    save_figure(fig, folder / "loss.png")
    what = "negative log-likelihood" if model.b == 1 else "bound on the negative log-likelihood"
    print(f"test {what}: {test:.3f} ± {se:.3f} nats per token, {test / text.chars_per_token:.3f} per character; "
          f"trained in {trainer.seconds:.0f} s", flush=True)
    return metrics


def save_figure(fig, path):
    fig.tight_layout()
    dlm.replace_file(path, lambda f: fig.savefig(f, format="png", dpi=150))
    plt.close(fig)


def train(o, ckpt=None):
    """Trains by the options -> the run's folder."""
    folder = folder_of(o, run_name(o, o.objective))
    device = dlm.pick_device(o.device)
    text = dlm.load_text(o.data, dlm.Tokenizer(**ckpt["tokenizer"]) if ckpt else o.tokenizer, o.context)
    if ckpt:
        dlm.same_text(folder, ckpt, text)
    b = 1 if o.objective == "ar" else o.block or o.context
    if (o.objective == "ar") != (b == 1) or (o.objective == "ar" and o.block > 1):
        raise UserError(f"--block {o.block}: an AR model has no blocks, and mdlm wants 2 or more, or 0 for all the context")
    torch.manual_seed(o.seed)
    model = dlm.Transformer(dlm.Config(text.tokenizer.V, o.context, b, o.n_layer, o.n_head, o.n_embd, o.dropout)).to(device)
    ids = text.parts["train"].to(device)

    def batch_loss(student, _):
        x = dlm.windows(ids, o.batch_size, o.context)
        z = dlm.hide(x, b, model.V)
        return dlm.loss(student, x, z, dlm.one_hot(x, model.V))

    trainer = fit(o, folder, model, text, batch_loss, o.lr, ckpt, folder.name)
    report(o, folder, trainer, trainer.averaged(), text)
    return folder


def ar_model(o, seed, role, like):
    """The folder of the AR model with this seed: found in runs/, gone on with if it was interrupted, or trained like
    `like`."""
    t = dataclasses.replace(like, data=o.data, seed=seed, device=o.device, out="", resume="", overwrite=False)
    folder = Path("runs") / run_name(t, "ar")
    if not (folder / "checkpoint.pt").exists():
        print(f"no {role} in {folder} yet, so it is trained first", flush=True)
        return train(t)
    ckpt = dlm.load(folder, "--teacher" if role == "teacher" else f"the {role},")[2]
    if ckpt["trainer"] and ckpt["trainer"]["step"] < ckpt["options"]["steps"]:
        print(f"the {role} in {folder} was interrupted and goes on first", flush=True)
        options = {**ckpt["options"], "out": str(folder), "resume": str(folder), "device": o.device}
        return train(Options(**options), ckpt)
    return folder


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    o, ckpt = resumed(dlm.parse(Options, argv, __doc__), argv)
    start = time.time()
    folder = train(o, ckpt)
    print(f"{folder}: checkpoint.pt, metrics.json, loss.png; {time.time() - start:.0f} s in all. "
          f"Next: python sample.py --checkpoint {folder}")


if __name__ == "__main__":
    dlm.run_script(main)
