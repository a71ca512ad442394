"""Write text with a trained model, AR or diffusion: from nothing, after a prompt, or into gaps.

    python sample.py                                        # the newest model in runs/
    python sample.py --prompt "The statement "              # goes on from a prompt
    python sample.py --prompt "The ________ of an object"   # fills gaps: three or more underscores, one token each
    python sample.py --watch                                # shows the text as it resolves
    python sample.py --bench runs/A,runs/B --judge runs/C   # compares models, orders and steps: quality and speed
    python sample.py --correct "The statment is exectued"   # rewrites what is unlikely: wants a model with b = L
"""
import itertools
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import dlm
from dlm import UserError, option

SHIPPED = Path(__file__).parent / "assets" / "dlm-docs-whole.pt"  # a small trained model, so that something shows at once

NO_THRESHOLD = ("ancestral", "spread")                       # orders that say themselves how many tokens a step reveals


@dataclass
class Options:
    checkpoint: str = option("", "a run's folder or checkpoint; empty: the newest in runs/, else the one in assets/")
    prompt: str = option("", "text to keep; each run of three or more underscores is a gap of as many tokens")
    length: int = option(0, "tokens in all, also more than the model's context; 0: the context, or the prompt's length if "
                         "it has gaps", at_least=0)
    stop: str = option("", "end each text before this string")
    number: int = option(4, "texts", at_least=1)
    steps: int = option(0, "steps a block; 0: one token a step", at_least=0)
    order: str = option("", "which tokens come first: random ones (ancestral: at random times too), from the left, the "
                        "surest by confidence, margin or entropy, or the surest of each stretch of --steps ones (spread); "
                        "empty: what the model was trained for, else spread, and with --threshold left",
                        choices=("", *dlm.ORDERS))
    threshold: float = option(0.0, "instead of --steps: a step reveals the first in order and all that are at least so "
                              "sure (0 to 1)", at_least=0, at_most=1)
    remask: int = option(0, "further steps a block: each hides as many tokens again as a step revealed, the least likely, "
                         "or with --order random and ancestral random ones, and draws them anew", at_least=0)
    temperature: float = option(1.0, "below 1 sharper, 0 the likeliest token", at_least=0)
    top_k: int = option(0, "draw from the K likeliest tokens only; 0: from all", at_least=0)
    top_p: float = option(1.0, "draw from the likeliest tokens that together reach this probability", at_least=0, at_most=1)
    correct: str = option("", "a text whose unlikely tokens are found and rewritten; writes nothing else")
    doubt: float = option(6.0, "with --correct: rewrite where another token is likelier by this many nats", at_least=0)
    bench: str = option("", "checkpoints to compare, AR or diffusion, separated by commas; --order and --steps, or "
                        "--threshold, narrow it")
    judge: str = option("", "with --bench: the AR checkpoint that judges the texts, best trained from another seed")
    texts: int = option(128, "with --bench: texts a row of the table", at_least=2)
    passages: str = option("", "with --bench: a text file such as LAMBADA's, one passage a line, whose last words are to "
                           "be found; empty: passages of the judge's held-out text")
    out: str = option("runs/bench", "with --bench: folder of its table and figure")
    watch: bool = option(False, "show the text as it resolves: hidden tokens dim, new ones bright")
    gif: str = option("", "draw that into this file, the first text only")
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
    if len(z) > length or (len(z) == length and not (z == model.V).any()):
        raise UserError(f"--prompt: {len(z)} tokens leave no room in {length}; shorten it, ask for more with --length, or "
                        "leave a ___ gap")
    return torch.cat([z, torch.full((length - len(z),), model.V)])


HIDDEN = "░"
COLOURS = {"given": "\033[36m", "hidden": "\033[2m", "new": "\033[1;32m", "old": ""}     # in a terminal
INKS = {"given": "#0a7d8c", "hidden": "#bbbbbb", "new": "#1a9641", "old": "#222222"}       # in a picture


def timed(f, repeats=5):
    """Median, minimum and maximum of the seconds f() takes, after one call to warm up."""
    def once():
        start = time.perf_counter()
        f().cpu()                                   # waits for the device
        return time.perf_counter() - start
    once()
    seconds = sorted(once() for _ in range(repeats))
    return seconds[repeats // 2], seconds[0], seconds[-1]


def read_passages(path):
    try:
        found = [p for p in Path(path).read_text(encoding="utf-8").splitlines() if re.search(r"\w\W*$", p)]
    except (OSError, UnicodeDecodeError):
        found = []
    if not found:
        raise UserError(f"--passages {path}: cannot be read, or has no words; give a text file, one passage a line")
    return found


def drawing(o):
    """How tokens are drawn from their marginals: the options of `dlm.warp`."""
    return {"temperature": o.temperature, "top_k": o.top_k, "top_p": o.top_p}


def bench(o, device):
    """Each checkpoint by each order and number of steps: quality under the judge, calls, seconds. Table, JSON, figure."""
    from train_teacher import plt, save_figure      # here: sampling need not wait for matplotlib
    judge, tokenizer, ckpt = dlm.load(o.judge, "--judge", device)
    if judge.b != 1:
        raise UserError(f"--judge {o.judge}: a diffusion model; name an AR one")
    models = []
    for path in o.bench.split(","):
        model, its_tokenizer, _ = dlm.load(path, "--bench", device)
        dlm.same_vocabulary(f"--bench {path}", its_tokenizer, model, f"--judge {o.judge}", tokenizer, judge)
        models.append((path, model))
    text = dlm.load_text(ckpt["options"]["data"], tokenizer, judge.L)
    passages = read_passages(o.passages) if o.passages else dlm.passages(text)
    rows = [{"what": "held-out text",
             **dlm.judge_samples(judge, dlm.consecutive(text.parts["test"], judge.L, o.texts).to(device), text)}]
    print(f"{o.texts} texts a row; last: of {len(passages)} passages, how many last words are found; seconds: median "
          "(minimum to maximum) of 5, batches of 1 and 32\n"
          f"{'what':<44} {'judge':>6} {'H1':>5} {'H2':>5} {'dist2':>5} {'words':>5} {'last':>5} {'calls':>6} "
          f"{'batch 1':>22} {'batch 32':>22}")
    for path, model in models:
        orders = [o.order] if o.order else dlm.ORDERS if model.b > 1 else [None]
        steps = [o.steps] if o.steps else [n for n in (2 ** k for k in range(11)) if n <= model.b]
        ways = [{"order": order, "steps": n, "remask": o.remask} for order in orders for n in steps]
        if model.b > 1:
            thresholds = [o.threshold] if o.threshold else [] if o.steps or o.order in NO_THRESHOLD else [0.5, 0.7, 0.9]
            ways = ([] if o.threshold else ways) + [{"order": o.order or "left", "threshold": t} for t in thresholds]
        for way in ways:
            with dlm.seeded(o.seed):
                row = dlm.judge_sampling(model, o.texts, judge, text, **way, **drawing(o))[0]
                found = dlm.last_word_accuracy(model, passages, tokenizer, **way)
                alone, many = (timed(lambda: dlm.generate(model, B, **way, **drawing(o))) for B in (1, 32))
            name = " ".join([Path(path).stem, *(f"{k} {v}" for k, v in way.items() if v and model.b > 1)])
            r = {"what": name, "checkpoint": path, "block": model.b, "last_word": found, **row, "seconds_1": alone,
                 "seconds_32": many}
            rows.append(r)
            print(f"{name:<44} {r['judge_nll']:>6.3f} {r['entropy']:>5.2f} {r['bigram_entropy']:>5.2f} "
                  f"{r['distinct_2']:>5.2f} {r['known_words']:>5.0%} {found:>5.0%} {r['calls']:>6.1f} " + " ".join(
                      f"{a:>7.3f} ({b:.3f} to {c:.3f})".rjust(22) for a, b, c in (alone, many)), flush=True)
    dlm.write_json(Path(o.out) / "bench.json",
                   {"options": vars(o), "device": device, "versions": dlm.versions(), "rows": rows})
    fig, ax = plt.subplots(figsize=(7, 4.5))
    lines = {}
    for r in rows[1:]:
        kind = "AR, cached" if r["block"] == 1 else r["order"] + (", by threshold" if "threshold" in r else "")
        lines.setdefault(f"{Path(r['checkpoint']).stem}: {kind}", []).append((r["seconds_32"][0] / 32, r["judge_nll"]))
    for marker, (label, points) in zip(itertools.cycle("*osv^DPX<>"), lines.items()):
        ax.plot(*zip(*sorted(points)), marker=marker, linewidth=0.8, label=label)
    ax.axhline(rows[0]["judge_nll"], color="0.6", linestyle=":", label="held-out text")
    ax.set(xscale="log", xlabel="seconds for a text, in batches of 32", ylabel="judge NLL, nats per token")
    ax.legend(fontsize=7)
    save_figure(fig, Path(o.out) / "bench.png")


def show_corrections(o, model, tokenizer, device):
    if model.b == 1:
        raise UserError("--correct: an AR model sees nothing of what follows a token; name a diffusion model with "
                        "--checkpoint, best one with b = L (distill.py --block 0)")
    x = tokenizer.encode(o.correct, "--correct").to(device)
    if not 2 <= len(x) <= model.L:
        raise UserError(f"--correct: {len(x)} tokens; give 2 to {model.L}, the model's context")
    if model.b < model.L:
        print(f"note: inside blocks of {model.b} the model sees nothing to the right of a block", file=sys.stderr)
    before = x
    for i, excess, after in dlm.correct(model, x, o.doubt):
        print(f"{i:>4} {excess:>6.1f} nats  {tokenizer.decode(before[i:i + 1])!r} -> {tokenizer.decode(after[i:i + 1])!r}")
        before = after
    print(tokenizer.decode(before))


def cells(tokens, before, given, tokenizer, V, stop=""):
    """A text as (character, kind): given, hidden, new since the state `before`, or old; cut at `stop`; whether it was."""
    kinds = ["given" if g else "hidden" if t == V else "new" if b == V else "old" for t, b, g in zip(tokens, before, given)]
    out = []
    for kind, run in itertools.groupby(zip(kinds, tokens), key=lambda pair: pair[0]):
        ids = [t for _, t in run]
        out += [(c, kind) for c in (HIDDEN * len(ids) if kind == "hidden" else tokenizer.decode(ids))]
    prompt = sum(1 for _ in itertools.takewhile(lambda cell: cell[1] == "given", out))
    end = "".join(c for c, _ in out).find(stop, prompt) if stop else -1
    ended = end >= 0 and all(kind != "hidden" for _, kind in out[:end])
    return (out[:end] if ended else out), ended


def wrap(text, width):
    """Cells -> lines of at most `width` of them."""
    lines = [[]]
    for c, kind in text:
        if c == "\n" or len(lines[-1]) == width:
            lines.append([])
        if c != "\n":
            lines[-1].append((c, kind))
    return lines


def coloured(line, colour):
    runs = [(kind, "".join(c for c, _ in run)) for kind, run in itertools.groupby(line, key=lambda cell: cell[1])]
    return "".join(f"{COLOURS[kind]}{text}\033[0m" if colour and COLOURS[kind] else text for kind, text in runs)


def draw_gif(frames, path):
    """frames: texts as cells. Pillow, and the font, come with matplotlib."""
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.truetype(findfont("DejaVu Sans Mono"), 15)
    frames = [wrap(text, 72) for text in frames]
    size = 9 * max(len(line) for f in frames for line in f) + 20, 20 * max(map(len, frames)) + 20
    pictures = []
    for frame in frames:
        pictures.append(Image.new("RGB", size, "white"))
        for y, line in enumerate(frame):
            for x, (c, kind) in enumerate(line):
                ImageDraw.Draw(pictures[-1]).text((10 + 9 * x, 10 + 20 * y), c, INKS[kind], font)
    milliseconds = [120] * (len(pictures) - 1) + [2500]
    dlm.replace_file(path, lambda f: pictures[0].save(f, "GIF", save_all=True, append_images=pictures[1:],
                                                      duration=milliseconds, loop=0), "--gif")


def main(argv=None):
    o = dlm.parse(Options, argv, __doc__)
    if o.threshold and o.order in NO_THRESHOLD:
        raise UserError(f"--order {o.order}: says itself how many tokens a step reveals; with --threshold use left, "
                        "random, confidence, margin or entropy")
    device = dlm.pick_device(o.device)
    if o.bench:
        return bench(o, device)
    path = Path(o.checkpoint) if o.checkpoint else newest()
    model, tokenizer, ckpt = dlm.load(path, "--checkpoint", device)
    o.order = o.order or ("left" if o.threshold else ckpt["options"].get("order", ""))
    if o.correct:
        return show_corrections(o, model, tokenizer, device)
    z = read_prompt(o, model, tokenizer).to(device).expand(o.number, -1)
    kind = "AR" if model.b == 1 else f"diffusion, blocks of {model.b}"
    print(f"{path} ({kind}), {device}, seed {o.seed}", file=sys.stderr)
    if dlm.unseen(z, model):
        print(f"note: tokens right of a gap's block are kept but not seen while it is written (b = {model.b}); a model "
              "trained with --block 0 sees them", file=sys.stderr)
    terminal, given, states, height = sys.stdout.isatty(), (z < model.V).tolist(), [z], 0
    width, colour = shutil.get_terminal_size().columns, terminal and "NO_COLOR" not in os.environ

    def texts(now, before):
        return [cells(*row, tokenizer, model.V, o.stop) for row in zip(now.tolist(), before.tolist(), given)]

    def lines(now, before):
        for i, (text, _) in enumerate(texts(now, before)):
            yield f"--- {i + 1}"
            yield from (coloured(line, colour) for line in wrap(text, width if terminal else -1))

    torch.manual_seed(o.seed)
    for state in dlm.sample(model, z, o.steps, o.order, o.threshold, o.remask, **drawing(o)):
        if torch.equal(state, states[-1]):
            continue
        if o.watch and terminal:
            picture = list(lines(state, states[-1]))
            print(f"\033[{height}A\033[J" * (height > 0) + "\n".join(picture), flush=True)
            height = len(picture)
            time.sleep(0.08)
        states.append(state)
        if o.stop and all(ended for _, ended in texts(state, state)):
            break
    print(f"\033[{height}A\033[J" * (height > 0) + "\n".join(lines(states[-1], states[-1])))
    if o.gif:
        draw_gif([texts(*both)[0][0] for both in zip(states[1:], states)] + [texts(states[-1], states[-1])[0][0]], o.gif)


if __name__ == "__main__":
    dlm.run_script(main)
