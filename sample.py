"""Write text with a trained model, AR or diffusion: from nothing, after a prompt, or into gaps.

    python sample.py                                       # the newest model in runs/
    python sample.py --prompt "The statement "             # goes on from a prompt
    python sample.py --prompt "The ________ of an object"  # fills a gap, one token an underscore
    python sample.py --watch                               # shows the text as it resolves
    python sample.py --correct "The statment is exectued"  # rewrites what is unlikely; needs b = L
    python sample.py --bench runs/A,runs/B --judge runs/C  # compares models, orders and steps
"""
import os
import signal
if __name__ == "__main__":  # torch takes a second to import: until run_script, Ctrl-C just ends it
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import itertools
import math
import re
import shutil
import sys
import time
import timeit
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import dlm  # before torch, for the setting that torch must find when it starts
import torch
from dlm import UserError
from train_teacher import (Pretrained, consecutive, load, load_corpus, mark_stories, option, parse,
                           pick_device, replace_file, run_script, same_vocabulary, versions,
                           write_json)

SHIPPED = Path(__file__).parent / "assets" / "dlm-docs-whole.pt"  # to see something at once
HIDDEN = "░"
COLOURS = {"given": "\033[36m{}\033[0m", "hidden": "\033[2m{}\033[0m", "new": "\033[1;32m{}\033[0m"}
INKS = {"given": "#0a7d8c", "hidden": "#bbbbbb", "new": "#1a9641", "old": "#222222"}
PROSE = {"judge": "{judge_nll:.3f}", "bigrams": "{bigram_entropy:.2f}", "copied": "{copied:.1%}",
         "last word": "{last_word:.0%}"}
STORIES = {"right": "{right:.1%}", "distinct": "{distinct:.1%}", "known": "{known:.1%}"}
ALL = {"text": "{nll:.3f}", "entropy": "{entropy:.2f}", "calls": "{calls:.1f}",
       "1 text": "{seconds_1[1]:.3f} s", "32 texts": "{seconds_32[1]:.3f} s"}       # medians


@dataclass
class Options:
    checkpoint: str = option("", "a run; empty: the newest in runs/, or the shipped model")
    prompt: str = option("", "text to keep; three or more underscores are a gap of as many tokens")
    length: int = option(0, "tokens in all; 0: the context, or a prompt with gaps")
    stop: str = option("", "end texts before this string")
    number: int = option(4, "texts", at_least=1)
    steps: int = option(0, "steps a block; 0: one a token")
    order: str = option("", "which tokens come together; empty: left; together is for "
                       "continuous students", ("", *dlm.ORDERS, "together"))
    threshold: float = option(0.0, "all at least so sure come too", at_most=1)
    temperature: float = option(1.0, "below 1 sharper, 0 the likeliest")
    top_k: int = option(0, "draw from the K likeliest tokens; 0: from all")
    top_p: float = option(1.0, "draw from the likeliest, up to this sum", at_most=1)
    correct: str = option("", "rewrite the unlikely tokens of this text")
    doubt: float = option(6.0, "--correct: how much likelier the other is, in nats")
    bench: str = option("", "runs to compare, with commas; --order, --steps, --threshold narrow it")
    judge: str = option("", "--bench: the AR run that judges, best of another seed; not of stories")
    texts: int = option(128, "--bench: texts a row", at_least=2)
    out: str = option("runs/bench", "--bench: folder of its bench.json")
    watch: bool = option(False, "show texts as they resolve: hidden tokens dim, new ones bright")
    gif: str = option("", "draw the first text, resolving, into this file")
    seed: int = option(0, "the same seed and options give the same texts")
    device: str = option("auto", "auto, cuda, mps or cpu")


def read_prompt(o, model, tokenizer):
    """-> the state to start from (T,): tokens to keep, [MASK] in the gaps and after the prompt."""
    mask = model.V
    z = []
    for part in re.split("(_{3,})", o.prompt):
        if part.startswith("___"):
            z += [mask] * len(part)
        else:
            z += tokenizer.encode(part, "--prompt").tolist()
    length = o.length or (len(z) if mask in z else model.L)
    z += [mask] * (length - len(z))
    if len(z) > length or mask not in z:
        raise UserError(f"--prompt: {len(z)} tokens leave no room in {length}; shorten it, "
                        "ask for more with --length, or leave a ___ gap")
    return torch.tensor(z)


def unseen(z, model):
    """Whether in z (T,) a block with gaps has tokens to its right, which it sees only if b = L."""
    first_gap = z.tolist().index(model.V)
    next_block = (first_gap // model.b + 1) * model.b
    return bool((z[next_block:] < model.V).any())


@torch.no_grad()
def correct(model, x, doubt=6.0):
    """Rewrites unlikely tokens of a text x (L,), the worst first; yields (place, excess, new text).
    Excess: by how many nats the network's favourite, given all that it may see, is likelier."""
    alone = torch.eye(len(x), dtype=torch.bool, device=x.device)    # row i hides token i, no other
    tried = torch.zeros_like(x, dtype=torch.bool)                   # once each, so that this ends
    while True:
        rows = x.expand(len(x), -1)
        logp = model(rows, rows.masked_fill(alone, model.V))[alone]                         # (L, V)
        excess, favourite = (logp - logp.gather(1, x[:, None])).max(-1)
        worst, i = excess.masked_fill(tried, -1).max(0)
        if worst <= doubt:
            return
        x = torch.where(alone[i], favourite, x)
        tried |= alone[i]
        yield int(i), float(worst), x


def show_corrections(o, model, tokenizer):
    if model.b == 1 or dlm.is_continuous(model):
        raise UserError("--correct: needs masks, and a model that sees what follows a token; name "
                        "a diffusion model with --checkpoint, best of b = L (distill.py --block 0)")
    x = tokenizer.encode(o.correct, "--correct").to(o.device)
    if not 2 <= len(x) <= model.L:
        raise UserError(f"--correct: {len(x)} tokens; give 2 to {model.L}, the model's context")
    if model.b < model.L:
        print(f"note: the model sees nothing to the right of blocks of {model.b}", file=sys.stderr)
    for i, excess, corrected in correct(model, x, o.doubt):
        old, new = tokenizer.decode([x[i]]), tokenizer.decode([corrected[i]])
        print(f"{i:>4} {excess:>6.1f} nats  {old!r} -> {new!r}")
        x = corrected
    print(tokenizer.decode(x))


def cells(tokens, before, given, tokenizer, V):
    """The state `tokens` (T,), which followed `before`, as (character, kind) pairs."""
    def kind_of(i):
        if given[i]:
            return "given"
        if tokens[i] == V:
            return "hidden"
        return "new" if before[i] == V else "old"

    text = []
    read = []           # decoded together: how a token is written may depend on those before it
    written = ""
    for kind, run in itertools.groupby(range(len(tokens)), kind_of):
        ids = [tokens[i] for i in run]
        if kind == "hidden":
            text += [(HIDDEN, kind)] * len(ids)
            continue
        read += ids
        so_far = tokenizer.decode(read)
        text += [(c, kind) for c in so_far[len(written):]]
        written = so_far
    return text


def cut(text, stop):
    """Cells up to where `stop` is written. It does not count in a prompt, nor behind gaps."""
    if not stop:
        return text
    written = "".join("\0" if kind == "given" else c for c, kind in text)
    before = text[:len(written.split(stop)[0])]
    return text if (HIDDEN, "hidden") in before else before


def wrap(text, width):
    """Cells -> lines of at most `width` of them; -1: of any length."""
    lines = [[]]
    for c, kind in text:
        if c == "\n" or len(lines[-1]) == width:
            lines.append([])
        if c != "\n":
            lines[-1].append((c, kind))
    return lines


def show(texts, height=0):
    """Prints texts, given as cells, over the last `height` lines -> how many lines they take."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else -1
    colours = COLOURS if terminal and "NO_COLOR" not in os.environ else {}
    lines = []
    for number, text in enumerate(texts, 1):
        lines.append(f"--- {number}")
        for line in wrap(text, width):
            lines.append("".join(colours.get(kind, "{}").format(c) for c, kind in line))
    if height:
        print(f"\033[{height}A\033[J", end="")
    print("\n".join(lines))
    return len(lines)


def draw_gif(frames, path):
    """frames: texts as cells. Pillow, and the font, come with matplotlib."""
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.truetype(findfont("DejaVu Sans Mono"), 15)
    frames = [wrap(text, 72) for text in frames]
    size = (9 * 72 + 20, 20 * max(map(len, frames)) + 20)
    pictures = []
    for lines in frames:
        pictures.append(Image.new("RGB", size, "white"))
        draw = ImageDraw.Draw(pictures[-1])
        for row, line in enumerate(lines):
            for column, (c, kind) in enumerate(line):
                if c.isprintable():
                    draw.text((10 + 9 * column, 10 + 20 * row), c, INKS[kind], font)
    first, *others = pictures + pictures[-1:] * 20           # the last one stays
    replace_file(path, lambda f: first.save(f, "GIF", save_all=True, append_images=others,
                                            duration=120, loop=0), "--gif")


def warping(o):
    return {"temperature": o.temperature, "top_k": o.top_k, "top_p": o.top_p}


def show_writing(o, model, tokenizer, before, states):
    """Shows how the states (B, T) after `before` end, with --watch and --gif how they get there."""
    given = (before < model.V).tolist()

    def texts_of(now, earlier):
        rows = zip(now.tolist(), earlier.tolist(), given)
        return [cut(cells(*row, tokenizer, model.V), o.stop) for row in rows]

    height = 0
    frames = []
    for now in states:
        if (o.watch or o.gif or o.stop) and not torch.equal(now, before):
            texts = texts_of(now, before)
            frames.append(texts[0])
            if o.watch and sys.stdout.isatty():
                height = show(texts, height)
                time.sleep(0.08)
            finished = (HIDDEN, "hidden") not in itertools.chain(*texts)
            if finished and not dlm.is_continuous(model):    # whose first guesses change
                break
        before = now
    texts = texts_of(now, now)
    show(texts, height)
    if o.gif:
        draw_gif([*frames, texts[0]], o.gif)


def passages(corpus, n=256):
    """Held-out text, cut behind at most n of its words: list of strings."""
    held_out = corpus.tokenizer.decode(corpus.parts["test"])
    ends = [match.end() for match in re.finditer(r"\w+", held_out)]
    ends = ends[len(ends) // 10:]           # each has something before it
    every = math.ceil(len(ends) / n) or 1
    return [held_out[:end] for end in ends[::every]]


def last_word_accuracy(model, passages, tokenizer, temperature=0, **way):
    """Share of passages whose last word the model finds behind the others, greedily.

    It is told how many tokens the word has. After LAMBADA (1606.06031).
    """
    by_length = defaultdict(list)
    for passage in passages:
        word = re.search(r" ?\w+(?=\W*$)", passage)
        before = passage[:word.start()][-20 * model.L:]      # more than the model can read
        known = tokenizer.encode(before, unknown="drop")
        wanted = tokenizer.encode(word[0], unknown="drop")
        x = torch.cat([known, wanted])
        z = torch.cat([known, torch.full_like(wanted, model.V)])
        pair = torch.stack([x, z])[:, -model.L:]
        by_length[pair.size(1)].append(pair)
    found = 0
    for pairs in by_length.values():
        x, z = torch.stack(pairs, 1).to(model.embedding.weight.device)              # (B, T) each
        written = dlm.generate(model, len(z), given=z, temperature=0, **way)
        found += int((written == x).all(1).sum())
    return found / max(1, len(passages))


def ways_to_write(model, order="", steps=0, threshold=0.0, most=0):
    """What tables compare: names, and arguments of `dlm.sample`, in a dict.

    Every order in 1, 2, 4 .. steps a block (at most `most`), and some thresholds or, of a
    continuous student, more steps; unless one is given.
    """
    if model.b == 1:
        ways = [{}]
    elif threshold:
        ways = [{"order": order or "left", "steps": steps, "threshold": threshold}]
    else:
        orders = [order] if order else dlm.orders_of(model)
        numbers = [steps] if steps else [2 ** k for k in range((most or model.b).bit_length())]
        ways = [{"order": name, "steps": N} for name in orders for N in numbers]
        if not steps and dlm.is_continuous(model):
            ways = [{"order": "together", "steps": N} for N in (16, 64)] + ways
        elif not steps:
            ways += [{"order": "left", "threshold": sure} for sure in (0.9, 0.99)]
    return {" ".join(f"{key} {value}" for key, value in way.items()): way for way in ways}


def compare(entrants, judge, corpus, B, seed=0):
    """Lets each (name, model, way) write B texts, and prints a table row by row -> its rows.

    Rows say what the texts are like, what they cost, and hold the first four of them. The first row
    is held-out text, and `nll` is what 128 texts of it cost a model that writes in this way. judge:
    a model with its tokenizer, as `load` gives them; None for stories, since each of them is right
    or wrong.
    """
    model = entrants[0][1]
    held_out = consecutive(corpus.parts["test"], model.L, B).to(model.embedding.weight.device)
    begin, given = beginnings(model, held_out, B)
    rows = [{"what": "held-out text", **marks(held_out[:, begin:], judge, corpus)}]
    print_rows(rows, header=f"{B} texts")
    for what, model, way in entrants:
        with dlm.seeded(seed):
            row, x = dlm.write_at_cost(model, B, given, **way)
            row |= cost_of_text(model, held_out[:128], **way)
            if judge:
                row["last_word"] = last_word_accuracy(model, passages(corpus, min(B, 256)),
                                                      corpus.tokenizer, **way)
        for size in (1,) if begin else (1, 32):              # 32 would take a minute
            seconds = timeit.repeat(lambda: dlm.generate(model, size, **way).cpu(),
                                    number=1, repeat=4)
            row[f"seconds_{size}"] = sorted(seconds[1:])     # without the first, which warms up
        rows.append({"what": what, **row, **marks(x[:, begin:], judge, corpus)})
        print_rows(rows[-1:])
    return rows


def cost_of_text(model, x, steps=0, order="left", threshold=0, temperature=1, top_k=0, top_p=1):
    """What texts x (n, L) cost a sampler, in nats a token, where that is known exactly."""
    way = order, threshold, temperature, top_k, top_p
    if dlm.is_continuous(model) or way != ("left", 0, 1, 0, 1):
        return {}
    nll, error = dlm.nll_in_steps(model, x, steps)
    return {"nll": nll, "nll_se": error}


def marks(x, judge, corpus):
    """What is said of texts x (B, L): by the judge, in its own tokens, and by the corpus."""
    decode = corpus.tokenizer.decode
    train_ids = corpus.parts["train"]
    texts = [decode(text) for text in x]
    row = {"entropy": dlm.entropy(x), "bigram_entropy": dlm.entropy(x, 2),
           "distinct_2": dlm.distinct(x, 2), "copied": dlm.copied(x, train_ids)}
    if judge:
        model, tokenizer, _ = judge
        read = x
        if tokenizer.state() != corpus.tokenizer.state():    # whole windows of each text
            windows = [consecutive(tokenizer.encode(text, unknown="drop"), model.L)
                       for text in texts]
            read = torch.cat(windows).to(x.device)
        if len(read) > 1:                                    # it knew the characters
            row["judge_nll"], row["judge_se"] = dlm.bound(model, read)
    if corpus.name == "stories":
        row |= mark_stories(texts, decode(train_ids))
    return {**row, "samples": texts[:4]}


def beginnings(model, x, B):
    """Where a model begins to write, and B states (B, L) of which all from there on is hidden.

    A pre-trained model has read of everything, so the first quarter of texts x (n, L) tells it what
    to write about. Other models begin with nothing.
    """
    begin = model.L // 4 if isinstance(model, Pretrained) else 0
    z = x.repeat(B, 1)[:B]
    z[:, begin:] = model.V
    return begin, z


def print_rows(rows, header=None):
    columns = (STORIES if "right" in rows[0] else PROSE) | ALL
    if header:
        print(f"\n{header:<42}" + "".join(name.rjust(10) for name in columns))
    for row in rows:
        line = row["what"].ljust(42)
        for form in columns.values():
            try:
                line += form.format(**row).rjust(10)
            except KeyError:                                 # was not measured
                line += " " * 10
        print(line)


def bench(o):
    """Each model by each order and number of steps: a table, and bench.json."""
    loaded = {path: load(path, "--bench", o.device) for path in o.bench.split(",")}
    first_path, (first, tokenizer, ckpt) = next(iter(loaded.items()))
    learned = [ckpt for _, _, ckpt in loaded.values() if ckpt["corpus"]]
    ckpt = learned[0] if learned else ckpt                  # an imported one learned from none
    corpus = load_corpus(ckpt["options"]["data"], tokenizer, first.L)
    judge = None
    if o.judge:
        judge = load_judge(o.judge, "--judge", o.device, f"--bench {o.bench}", tokenizer, first)
    elif corpus.name != "stories":
        raise UserError("--bench: wants a judge; name an AR run with --judge")
    entrants = []
    for path, (model, its_tokenizer, _) in loaded.items():
        same_vocabulary(f"--bench {path}", its_tokenizer, model, first_path, tokenizer, first)
        for name, way in ways_to_write(model, o.order, o.steps, o.threshold).items():
            name = f"{Path(path).stem} {name}".strip()
            entrants.append((name, model, way | warping(o)))
    rows = compare(entrants, judge, corpus, o.texts, o.seed)
    write_json(f"{o.out}/bench.json", {"options": vars(o), "versions": versions(), "rows": rows})


def load_judge(path, option, device, whose, tokenizer, model):
    """The judge of a model, as `load` gives it: it reads the same tokens, or any model's text."""
    judge, its_tokenizer, ckpt = load(path, option, device)
    if judge.b != 1:
        raise UserError(f"{option} {path}: a diffusion model; name an AR one")
    if tokenizer.kind != "pretrained":
        same_vocabulary(whose, tokenizer, model, f"{option} {path}", its_tokenizer, judge)
    return judge, its_tokenizer, ckpt


def main(argv):
    o = parse(Options, argv, __doc__)
    if o.threshold and o.order == "ancestral":
        raise UserError("--order ancestral: goes by chance alone; with --threshold use another")
    o.device = pick_device(o.device)
    if o.bench:
        return bench(o)
    runs = Path("runs").glob("*/checkpoint.pt")
    path = Path(o.checkpoint or max(runs, key=os.path.getmtime, default=SHIPPED))
    model, tokenizer, _ = load(path, "--checkpoint", o.device)
    if dlm.is_continuous(model) and o.threshold:
        raise UserError(f"--threshold: means nothing where tokens come out of noise, as in {path}; "
                        "use --steps")
    if o.correct:
        return show_corrections(o, model, tokenizer)
    z = read_prompt(o, model, tokenizer).to(o.device)
    torch.manual_seed(o.seed)
    states = dlm.sample(model, z.expand(o.number, -1), o.steps, o.order, o.threshold, **warping(o))
    begin = next(states)                    # refuses an order that the model does not know
    print(f"{path} (b = {model.b}), {o.device}, seed {o.seed}", file=sys.stderr)
    if unseen(z, model):
        print("note: tokens right of a gap's block are kept but not seen while it is written "
              f"(b = {model.b}); a model trained with --block 0 sees them", file=sys.stderr)
    show_writing(o, model, tokenizer, begin, states)


if __name__ == "__main__":
    run_script(main)
