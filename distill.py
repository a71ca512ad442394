"""Distil an autoregressive teacher into a diffusion language model.

    python distill.py                 # a teacher, and a student of each method: the whole way
    python distill.py --method tcs    # one method, at full length
    python distill.py --method plain  # the same student without a teacher: the control
    python distill.py --preset laptop-smollm2 --method opdlm    # a pre-trained teacher

A method is two words: which states the student trains on, and which target it aims at. --states and
--target replace either, so every control is one word away.
"""
import os
import signal
if __name__ == "__main__":  # torch takes a second to import: until run_script, Ctrl-C just ends it
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import copy
import itertools
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import dlm  # before torch, for a setting that torch must find when it starts
import sample
import train_teacher
import torch
from tqdm import tqdm

from dlm import UserError
from train_teacher import (Pretrained, ar_model, consecutive, is_pretrained, load, option, parse,
                           pick_device, resumed, run_name, same_text, same_vocabulary, write_json)

METHODS = {  # name: states, target
    "plain": ("data", "onehot"),        # masked diffusion without a teacher: the baseline
    "sequence": ("teacher", "onehot"),  # sequence-level distillation: the teacher only writes
    "prefix": ("data", "prefix"),       # the causal head as target: a biased shortcut
    "tcs": ("data", "topk"),            # target concrete score
    "sdtt": ("on_the_way", "later"),    # the teacher is the student's earlier self
    "opdlm": ("rollout", "prefix"),     # on-policy: the student's own text, the AR model's word
}
JUDGE_OF_TEXT = train_teacher.Options(tokenizer="char", context=128, updates=500)
SHARES = {"tcs": 0.6, "sdtt": 0.08, "opdlm": 0.3}    # of --updates, with --method all
ON_A_GPU = {"data": "docs", "context": 256, "updates": 2000, "batch_size": 32, "parts": 4,
            "texts": 4096, "block": 16, "candidates": 4, "judged": 64}
PRESETS = {  # other defaults, for pre-trained teachers
    "": {},
    "laptop-smollm2": {"data": "docs", "teacher": "smollm2", "block": 16, "updates": 120,
                       "batch_size": 4, "texts": 160, "candidates": 4, "judged": 16},
    "gpu-smollm2": {"teacher": "smollm2", **ON_A_GPU},
    "gpu-gpt2": {"teacher": "hf:openai-community/gpt2", **ON_A_GPU}}
FLOOR = 0.9         # of held-out text's entropy: what a student writes should not fall below it
COLLAPSED = 20      # nats, added to the validation of a student below that floor


@dataclass
class Options(train_teacher.RunOptions):
    method: str = option("all", "states and target; all: tcs, sdtt from its student, opdlm, with "
                         ".6, .08, .3 of --updates and half of --texts", ("all", *METHODS))
    states: str = option("", "data: masked text; teacher: masked texts of its own; rollout: the "
                         "student's; empty: the method's", ("", "data", "teacher", "rollout"))
    target: str = option("", "onehot: the text; prefix: p_T(x_i|x_<i); others: estimators of TCS; "
                         "empty: the method's", ("", "onehot", "prefix", *dlm.ESTIMATORS))
    preset: str = option("", "other defaults, for a pre-trained teacher", PRESETS)
    teacher: str = option("", "an AR checkpoint; smollm2, hf:NAME of the hub, or a folder that "
                          "transformers saved; empty: the one in runs/, trained if missing")
    context: int = option(64, "tokens of a text, if the teacher is a pre-trained one", at_least=2)
    student: str = option("ar", "start from: ar (the teacher's weights), random, or a checkpoint")
    block: int = option(4, "block length b of the student; 0: the whole context; 1, with plain: "
                       "the AR model itself, trained on")
    updates: int = option(1000, "updates of the weights", at_least=1)
    batch_size: int = option(8, "texts an update", at_least=1)
    lr: float = option(0.0, "Muon's learning rate; AdamW's is 0.15 of it; 0: .002, for stories "
                       ".006, from random weights .02; of pre-trained models AdamW's: 5e-5, "
                       "from random weights 1e-3")
    divergence: str = option("forward", "of target and student",
                             ("forward", "reverse", "tvd", "mse"))
    fraction: float = option(1.0, "share of the training text: a stretch that the seed chooses",
                             at_most=1)
    texts: int = option(2048, "texts that the teacher writes or scores, once", at_least=16)
    candidates: int = option(16, "K, candidates that topk and grad+topk score", at_least=1)
    judged: int = option(256, "texts a row of the table, and to choose the weights by", at_least=4)
    unseen: str = option("", "other text files, with commas: their bound is reported, too")
    order: str = option("spread", "order in which rollouts are written", dlm.ORDERS[1:])
    steps: int = option(0, "steps a block of rollouts and of sdtt's first teacher; 0: one a token")
    fewest: int = option(1, "sdtt: steps a block of the last student", at_least=1)
    k: int = option(2, "sdtt: steps of the teacher that become one of the student", at_least=2)


# --------------------------------------------------------------------------------------------------
# The methods

@dataclass
class State:
    """One batch, (B, L) each: the student sees z behind x, and aims at what is said of y."""
    x: torch.Tensor             # the finished text left of each block
    y: torch.Tensor             # the text that the target is of
    z: torch.Tensor             # y with tokens hidden, or a dlm.Noisy
    t: torch.Tensor = None      # time of each token's block
    rows: torch.Tensor = None   # which of the kept texts these are


def halves(o, b, teacher, earlier_self, kept):
    """The two halves of every method: {name: states(student, x, rows)} and {name: target(state)}.

    kept: the concrete scores of all texts by row, which were asked before training.
    """
    V = teacher.V

    # States: what the student looks at.
    def data(student, x, rows):
        return State(x, x, dlm.states_of(student, x), rows=rows)

    def on_the_way(student, x, rows):
        # In a round of sdtt o.fewest are the student's steps a block, o.steps its earlier self's.
        z, t = dlm.hide_at_step_times(x, b, V, o.fewest)
        return State(x, x, z, t)

    def rollout(student, x, rows):
        y, z = dlm.rollout(student, x, o.steps, o.order)
        return State(x, y, z)

    # Targets: what it aims at, (B, L, V).
    def onehot(s):
        return dlm.one_hot(s.y, V)

    def prefix(s):
        return dlm.prefix(teacher, s.x, s.y, b)

    def score(s):
        return dlm.dense(*(a[s.rows] for a in kept), V)

    def later(s):
        return dlm.sdtt(earlier_self, s.x, s.z, s.t, 1 / o.steps, o.k)

    # `teacher` is `data`, but that `texts_for` lets the teacher write the texts.
    states = {"data": data, "teacher": data, "on_the_way": on_the_way, "rollout": rollout}
    targets = {"onehot": onehot, "prefix": prefix, "later": later}
    return states, {**targets, **dict.fromkeys(dlm.ESTIMATORS, score)}


def choose_method(o):
    """Fills in what the method says and the user did not, and refuses pairs that make no sense."""
    train_teacher.part_of_batch(o)
    states, target = METHODS[o.method]
    o = replace(o, states=o.states or states, target=o.target or target)
    if o.block == 1 and (o.states, o.target) != ("data", "onehot"):
        raise UserError("--block 1: that is the AR model itself, and goes with --method plain; "
                        "use 2 or more, or 0 for all")
    if o.divergence == "reverse" and o.target not in ("prefix", "later"):
        raise UserError("--divergence reverse: infinite where the target is one-hot; "
                        "use forward, tvd or mse")
    if o.noise == "gaussian" and o.states not in ("data", "teacher"):
        raise UserError(f"--noise gaussian: {o.method} works with masks; "
                        "use plain, prefix, tcs or sequence")
    of_a_text = ("onehot", "prefix", *dlm.ESTIMATORS)
    goes_with = {"data": of_a_text, "teacher": of_a_text, "on_the_way": ("later",),
                 "rollout": ("prefix",)}
    if o.target not in goes_with[o.states]:
        raise UserError(f"--states {o.states} --target {o.target}: do not go together; rollout "
                        "wants prefix; sdtt, and so all, want neither option")
    return o


def usual_rate(o, student):
    """The learning rate where none is given: AdamW's of a pre-trained model, else Muon's."""
    if isinstance(student, Pretrained):
        return 1e-3 if o.student == "random" else 5e-5
    if o.student == "random":
        return 0.02
    if o.data == "stories":
        return 0.006        # stories are soon learned again
    return 0.002            # a higher one makes students forget what they know


def texts_for(o, teacher, ids):
    """The student's texts (n, L): windows of its share of the training text, or the teacher's."""
    L = teacher.L
    with dlm.seeded(o.seed):
        if o.states == "teacher":
            batches = torch.arange(o.texts).split(512)
            return torch.cat([dlm.generate(teacher, len(rows)) for rows in batches])
        n = max(L, int(o.fraction * len(ids)))
        start = torch.randint(len(ids) - n + 1, ())
    windows = ids[start:start + n].unfold(0, L, 1)              # every one of them, as a view
    if o.target in dlm.ESTIMATORS:                              # as many as the teacher will score
        places = torch.arange(o.texts) * (len(windows) - 1) // (o.texts - 1)
        return windows[places.unique()]
    return windows


def score_texts(o, teacher, texts, b):
    """The concrete scores of all texts, once: candidates and probabilities (n, L, K)."""
    print(f"the teacher scores {len(texts)} texts, once")
    at_once = 4 if texts.device.type == "cpu" else 64           # a CPU's cache is small
    at_once = at_once * 64 // texts.size(1)                     # and memory is, for long texts
    at_once = max(1, at_once * 8192 // max(8192, teacher.V))    # and many words
    batches = tqdm(texts.split(at_once), "scoring", leave=False, disable=None)
    v, c = zip(*(dlm.tcs(teacher, x, b, o.target, o.candidates) for x in batches))
    return torch.cat(v), torch.cat(c)


class Distillation:
    """What the training loop asks for: a batch's loss, and the number that chooses the weights."""

    def __init__(self, o, teacher, student, corpus):
        device = student.embedding.weight.device
        self.o = o
        self.teacher = teacher
        self.texts = texts_for(o, teacher, corpus.parts["train"].to(device))
        self.held = consecutive(corpus.parts["val"], student.L, o.judged).to(device)
        if dlm.is_continuous(student):          # a first guess of the middle level, by LangFlow
            nats = dlm.bound(teacher, self.held)[0]
            student.gumbel[0] = math.log(student.c.D / 2 / nats)
        if o.states == "teacher":       # no text but the teacher's: it chooses the weights, too
            with dlm.seeded(o.seed + 1):
                self.held = dlm.generate(teacher, o.judged)
        kept = None
        if o.target in dlm.ESTIMATORS:
            kept = score_texts(o, teacher, self.texts, student.b)
        earlier_self = copy.deepcopy(student).eval() if o.states == "on_the_way" else None
        states, targets = halves(o, student.b, teacher, earlier_self, kept)
        self.states = states[o.states]
        self.target = targets[o.target]

    def batch_loss(self, student):
        number = train_teacher.part_of_batch(self.o)
        rows = torch.randint(len(self.texts), (number,), device=self.held.device)
        s = self.states(student, self.texts[rows], rows)
        target = self.target(s)
        if dlm.is_continuous(student):
            target = dlm.seen_through(student, s.z, target)
        return dlm.loss(student, s.x, s.z, target, self.o.divergence)

    @torch.no_grad()
    def validate(self, student):
        """How surprised the student is by text, and the teacher by the student's: nats per token.

        The bound asks about every state, but hardly notices when texts fall apart. The teacher's
        NLL of what the student writes does notice, but likes what is dull. So this is their sum,
        and more where the texts are duller than FLOOR allows.
        """
        o = self.o
        steps = o.fewest if o.states == "on_the_way" else o.steps or student.b
        order = "left" if dlm.is_continuous(student) else o.order
        with dlm.seeded(0):
            number = max(1, o.judged // 4)
            _, given = sample.beginnings(student, self.held, number)
            written = dlm.generate(student, number, min(steps, 16), given, order=order)
        value = dlm.bound(student, self.held)[0] + dlm.bound(self.teacher, written)[0]
        real = dlm.entropy(self.held[:number])             # as many: it grows with their number
        its_own = dlm.entropy(written)
        if its_own < FLOOR * real:
            tqdm.write(f"warning: what the student writes has {its_own:.2f} nats of entropy, "
                       f"held-out text {real:.2f}; try a lower --lr, or a better --student")
            value += COLLAPSED          # dull text pleases any teacher: keep no such weights
        return value


# --------------------------------------------------------------------------------------------------
# The script: one run, the rounds of SDTT, or all methods

def plot_quality(rows):
    """Quality and entropy against calls; the first two rows, text and AR teacher, as lines."""
    def line_of(r):
        how = "threshold" if "threshold" in r else r.get("order", "left")
        return r["what"].split(",")[0] + ", " + how

    fig, axes = train_teacher.subplots(2, (8, 3.2))
    quality = ("judge_nll", "judge NLL, nats per token")
    if "right" in rows[0]:
        quality = ("right", "share of stories that are right")
    for ax, (key, label) in zip(axes, [quality, ("entropy", "unigram entropy, nats")]):
        for r, style in zip(rows[:2], (":", "--")):
            ax.axhline(r.get(key, math.nan), color="0.5", linestyle=style, label=r["what"])
        for (name, of_line), marker in zip(itertools.groupby(rows[2:], line_of), "os^vD<>ph*"):
            points = [(r["calls"], r.get(key, math.nan)) for r in of_line]
            ax.plot(*zip(*points), "k-" + marker, markerfacecolor="none", label=name)
        ax.set(xlabel="network calls for a text", ylabel=label)
    axes[1].legend(fontsize=6)
    return fig


def teacher_path(o):
    """The folder of the AR model to learn from: given, found in runs/, or trained first."""
    if is_pretrained(o.teacher):
        return train_teacher.import_pretrained(o.teacher, o.context)
    if o.teacher:
        return Path(o.teacher)
    return ar_model(o, 0, "teacher", train_teacher.Options(tokenizer=o.tokenizer))


def load_models(o, ckpt=None):
    """-> the teacher's path, teacher, student, judge, corpus. ckpt: of the run that goes on."""
    device = pick_device(o.device)
    path = teacher_path(o)
    teacher, tokenizer, teacher_ckpt = load(path, "--teacher", device)
    if teacher.b != 1:
        raise UserError(f"--teacher {path}: a diffusion model (b = {teacher.b}), where an AR one "
                        "is needed; train one with train_teacher.py, or use this as --student")
    student = make_student(o, teacher, tokenizer, device)

    like = train_teacher.options_of(teacher_ckpt)
    spec = tokenizer
    if tokenizer.kind == "pretrained":  # its tokens suit any text; the judge reads characters
        like = JUDGE_OF_TEXT
    elif o.teacher:                     # it may have learned from any text, in the same tokens
        spec = like.tokenizer
    corpus = train_teacher.load_corpus(o.data, spec, teacher.L)
    whose = f"--teacher {path}"
    same_vocabulary(whose, tokenizer, teacher, f"--data {o.data}", corpus.tokenizer, teacher)
    if not o.teacher:
        same_text(path, teacher_ckpt, corpus)
    if ckpt:
        same_text(o.resume, ckpt, corpus)

    judge = None
    if corpus.name != "stories":        # where each story is right or wrong
        folder = ar_model(o, like.seed + 1, "judge", like)
        judge = sample.load_judge(folder, "the judge,", device, whose, tokenizer, teacher)
        same_text(folder, judge[2], corpus)
    return path, teacher, student, judge, corpus


def make_student(o, teacher, tokenizer, device):
    """The student with the weights that it starts from."""
    b = o.block or teacher.L
    start = teacher
    if o.student not in ("ar", "random"):
        start, its_tokenizer, _ = load(o.student, "--student", device)
        same_vocabulary(f"--student {o.student}", its_tokenizer, start,
                        "the teacher", tokenizer, teacher)
    torch.manual_seed(o.seed)
    D = train_teacher.DIMENSIONS if o.noise == "gaussian" else 0
    c = replace(start.c, b=b, D=D)
    if D and isinstance(start, Pretrained):
        raise UserError("--noise gaussian: with a pre-trained teacher only --noise mask works")
    if start.b > 1 and start.c.D != D:
        raise UserError(f"--student {o.student}: was trained with another --noise; use the same")
    student = train_teacher.new_model(c).to(device)
    if o.student != "random":
        student.load_state_dict(start.state_dict(), strict=False)
        if D and not start.c.D:
            student.set_points(teacher.embedding.weight[:teacher.V].detach())
    return student


def run(o, ckpt=None):
    """One method: trains into its folder, and reports."""
    o = choose_method(o)
    what = o.method if METHODS[o.method] == (o.states, o.target) else f"{o.states}-{o.target}"
    folder = train_teacher.folder_of(o, run_name(o, what, f"-b{o.block}"))
    for unseen in texts_unseen(o):
        train_teacher.read_lines(unseen, "--unseen")        # refuses now what it would later
    path, teacher, student, judge, corpus = load_models(o, ckpt)
    o = replace(o, lr=o.lr or usual_rate(o, student))
    start = time.time()
    method = Distillation(o, teacher, student, corpus)
    more = {"teacher": str(path), "teacher_seconds": time.time() - start}   # writing, scoring
    with dlm.seeded(0), dlm.counting(student) as count:         # what one batch costs
        method.batch_loss(student)
    more["student_tokens"] = o.updates * o.parts * count["slots"]
    trainer = train_teacher.fit(o, folder, student, corpus, method.batch_loss, ckpt,
                                method.validate)
    report(o, folder, trainer, teacher, judge, corpus, more)


def let_write(name, model, teacher, judge, corpus, o, most):
    """The rows of a table: held-out text, the AR teacher, and a model by steps and thresholds."""
    ways = sample.ways_to_write(model, "left", most=most)
    if isinstance(model, Pretrained):                        # each takes a minute
        ways = {f"{k} a step": {"order": "left", "steps": model.b // k}
                for k in (1, 2, 4) if model.b % k == 0}
    entrants = [("AR teacher", teacher, {})]
    for how, way in ways.items():
        entrants.append((f"{name}, {how}".strip(", "), model, way))
    return sample.compare(entrants, judge, corpus, o.judged if judge else 4 * o.judged)


def report(o, folder, trainer, teacher, judge, corpus, more):
    """The table, the figure, samples, and what train_teacher.py reports of any model."""
    model = trainer.averaged()
    most = min(model.b, o.steps or model.b)
    rows = let_write("student", model, teacher, judge, corpus, o, most)
    if model.L % model.b == 0 and not dlm.is_continuous(model):
        held = consecutive(corpus.parts["test"], model.L, max(1, o.judged // 4))
        held = held.to(model.embedding.weight.device)
        more["gap"] = dlm.inference_gap(model, teacher, held, most, o.order)
        print("\nKL from the AR teacher: {:.3f} nats per token on states that the student visits, "
              "{:.3f} on random masks".format(*more["gap"]))
    more["teacher_nats_per_char"] = train_teacher.test_bound(teacher, corpus)[2]
    if o.unseen:
        more["unseen"] = {path: cost_of_file(path, model, teacher, corpus.tokenizer)
                          for path in texts_unseen(o)}
    train_teacher.report(o, folder, trainer, model, corpus, table=rows,
                         validated="bound, and teacher's NLL of samples", **more)
    train_teacher.save_figure(plot_quality(rows), folder / "quality.png")
    for row in (rows[1], rows[-1]):
        print(f"\n{row['what']}, the first four texts of seed 0:")
        for text in row["samples"]:
            if corpus.name == "stories":
                text = train_teacher.with_marks(text)       # *wrong words*
            print("  " + text.replace("\n", "⏎"))
    print(f"\n{folder}: checkpoint.pt, metrics.json, loss.png, quality.png. "
          f"Next: python sample.py --checkpoint {folder}")


def texts_unseen(o):
    return [path for path in o.unseen.split(",") if path]


def cost_of_file(path, model, teacher, tokenizer):
    """The bounds of the student and of the teacher on a text file: nats per character."""
    text = "".join(train_teacher.read_lines(path, "--unseen"))
    ids = tokenizer.encode(text, unknown="drop")
    bound, nll = (train_teacher.bound_of(m, ids, len(ids) / len(text))[2] for m in (model, teacher))
    print(f"{path}: {bound:.3f} nats per character, the AR teacher {nll:.3f}")
    return {"nats_per_char": bound, "teacher": nll}


def finish(o, folder):
    """Runs into the folder, or goes on there; a finished run stays as it is -> the folder."""
    folder = str(Path(folder))                                  # as a run keeps it
    o = replace(o, out=folder)
    if o.overwrite or not Path(folder, "checkpoint.pt").exists():
        run(o)
        return folder
    ckpt = load(folder, "--out")[2]
    wanted = vars(choose_method(o))
    kept = ckpt["options"]
    may_differ = {"out", "resume", "device", "overwrite"}
    if not o.lr:
        may_differ.add("lr")                                    # the run chose its own
    if any(kept.get(name) != wanted[name] for name in wanted.keys() - may_differ):
        raise UserError(f"--out {folder}: holds a run with other options; "
                        "--overwrite replaces it, or name another")
    if ckpt["trainer"]["done"] < o.updates or not Path(folder, "metrics.json").exists():
        run(*resumed(replace(o, resume=folder), []))
    else:
        print(f"{folder}: finished before, and kept; --overwrite makes it anew")
    return folder


def most_steps(o, b):
    """Steps a block of the teacher of sdtt's first round."""
    N = o.steps or b
    if N // o.k < o.fewest:
        raise UserError(f"--steps {N}: divided by --k {o.k} this is below --fewest {o.fewest}")
    return N


def rounds(o):
    """SDTT: each round is a run, whose student starts the next -> the last one's folder."""
    untrained = o.student in ("ar", "random")
    b = 1 if untrained else load(o.student, "--student")[0].b
    if b == 1:
        raise UserError(f"--student {o.student}: sdtt starts from a trained diffusion model; "
                        "name its run")
    N = most_steps(o, b)
    base = o.out or "runs/" + run_name(o, o.method, f"-b{b}")
    student = o.student
    while N // o.k >= o.fewest:
        N //= o.k
        print(f"\n{N * o.k} steps a block become {N}")
        part = replace(o, steps=N * o.k, fewest=N, block=b, student=student)
        student = finish(part, f"{base}-{N}steps")
    return student


def before_training(o, folder):
    """The first rows of the main job's table, and b: text, the AR teacher, its weights opened."""
    _, teacher, student, judge, corpus = load_models(o)
    b = student.b
    if teacher.L % b:
        raise UserError(f"--block {b}: does not divide the context of {teacher.L}, as opdlm needs")
    path = folder / "untrained.json"
    if o.overwrite or not path.exists():
        rows = let_write("untrained", student.eval(), teacher, judge, corpus, o, b)
        write_json(path, {"table": rows})
    return table_in(path), b


def table_in(path):
    return json.loads(Path(path).read_text())["table"]


def main_job(o):
    """TCS, SDTT from its student, and OPDLM, each a run; then one table and one figure of all."""
    parts = {}
    for method, share in SHARES.items():
        updates = max(1, round(o.updates * share))
        parts[method] = replace(o, method=method, updates=updates, texts=max(16, o.texts // 2))
        choose_method(parts[method])                    # refuses now what it would later
    if o.block:
        most_steps(o, o.block)
    print("a teacher (and a judge, but for stories), then TCS, SDTT and OPDLM: with the defaults "
          "5 to 8 minutes on 2 cores")
    folder = Path(o.out or "runs/" + run_name(o, "all", f"-b{o.block}"))
    table, b = before_training(o, folder)
    tcs = finish(parts["tcs"], f"{folder}-tcs")
    fewest = most_steps(o, b) // o.k                    # of a single round
    sdtt = rounds(replace(parts["sdtt"], student=tcs, out=f"{folder}-sdtt", fewest=fewest))
    opdlm = finish(parts["opdlm"], f"{folder}-opdlm")

    for name, its_folder in {"TCS": tcs, "SDTT": sdtt, "OPDLM": opdlm}.items():
        for r in table_in(f"{its_folder}/metrics.json")[2:]:
            table.append({**r, "what": r["what"].replace("student", name)})
    sample.print_rows(table, header=f"blocks of {b}")
    train_teacher.save_figure(plot_quality(table), folder / "quality.png")
    write_json(folder / "metrics.json", {"options": vars(o), "table": table})
    print(f"{folder}: metrics.json and quality.png of them all")


def main(argv):
    preset = parse(Options, argv, __doc__).preset
    o, ckpt = resumed(parse(Options, argv, __doc__, PRESETS[preset]), argv)
    if ckpt or o.method not in ("all", "sdtt"):
        run(o, ckpt)
    elif o.method == "sdtt":
        rounds(o)
    else:
        main_job(o)


if __name__ == "__main__":
    train_teacher.run_script(main)
