"""Distil an autoregressive teacher into a diffusion language model.

    python distill.py                              # teacher, judge, a student of each method: the whole way, from nothing
    python distill.py --method tcs                 # one method, at full length
    python distill.py --method plain               # the same student without a teacher's targets: the control

A method is a pair: which states the student trains on, and which target it aims at. --states and --target replace
either half, so every control is one word away.
"""
import copy
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import dlm
import train_teacher
from dlm import UserError, option
from train_teacher import plt, save_figure

METHODS = {  # name: (states, target, learning rate)
    "plain": ("data", "onehot", 0.02),        # masked diffusion without a teacher: the baseline
    "sequence": ("teacher", "onehot", 0.02),  # sequence-level distillation: the teacher is only a writer
    "prefix": ("data", "prefix", 0.02),       # the causal head as target: a biased shortcut
    "tcs": ("data", "topk", 0.02),            # target concrete score
    "sdtt": ("data", "sdtt", 0.01),           # self-distillation through time: the teacher is the student's earlier self
    "opdlm": ("rollout", "prefix", 0.006),    # on-policy: the student's own text and states, judged by the AR model
}
ALL = {"tcs": 0.4, "sdtt": 0.08, "opdlm": 0.15}   # --method all: shares of --steps
STATES = ("data", "teacher", "rollout")
TARGETS = ("onehot", *dlm.ESTIMATORS)
JUDGED = 256        # generated texts a row of the table; their NLL has a standard error of about 0.02 nats per token
STEPS = (1, 2, 4, 8, 16, 32, 64)
FLOOR = 0.9         # of held-out text's entropy: what a student writes should not fall below it


@dataclass
class Options:
    method: str = option("all", "a pair of states and target; all: tcs, a round of sdtt from its student, and opdlm, with "
                         "{}, {} and {} of --steps and a quarter of --texts".format(*ALL.values()),
                         choices=("all", *METHODS))
    states: str = option("", "data: masked training text; teacher: masked texts by the teacher; rollout: what "
                         "the student writes and the states on the way; empty: the method's",
                         choices=("", *STATES))
    target: str = option("", "onehot: the text itself; prefix: p_T(x_i|x_<i); exact, topk, grad+topk, grad: TCS "
                         "estimators; empty: the method's", choices=("", *TARGETS))
    teacher: str = option("", "an AR checkpoint; empty: the one in runs/ for this data and tokenizer, trained if missing")
    student: str = option("ar", "where the weights start: ar (the teacher's), random, or a diffusion checkpoint")
    data: str = option("docs", "docs, shakespeare, arithmetic, or the path of a text file")
    tokenizer: str = option("bpe:512", "char, bpe (1024 tokens), bpe:SIZE or gpt2; a given --teacher brings its own")
    block: int = option(4, "block length b of the student; 0 is the whole context", at_least=0)
    steps: int = option(1000, "optimiser steps", at_least=1)
    batch_size: int = option(8, "texts a step", at_least=1)
    lr: float = option(0.0, "learning rate of Muon; AdamW's, for embedding and head, is 0.15 of it; 0: the method's, 0.02 "
                       "(sdtt 0.01, opdlm 0.006)", at_least=0)
    divergence: str = option("forward", "between target and student", choices=("forward", "reverse", "tvd", "mse"))
    fraction: float = option(1.0, "share of the training text that the student sees, from a place the seed chooses",
                             at_least=0, at_most=1)
    texts: int = option(2048, "texts the teacher writes or scores, before training and once; --states data with "
                        "--target onehot needs no teacher and uses every window", at_least=16)
    candidates: int = option(16, "K, tokens whose concrete score topk and grad+topk compute", at_least=1)
    order: str = option("spread", "order in which the student will write: rollouts, the table, and sample.py's default",
                        choices=dlm.ORDERS[1:])
    whole: float = option(0.0, "share of the steps, the last ones, whose rollouts are whole texts and not single blocks",
                          at_least=0, at_most=1)
    first: int = option(0, "steps a block of rollouts, or of sdtt's first teacher; 0: one a token", at_least=0)
    last: int = option(1, "sdtt: steps a block that the last student takes; each round divides them by --k", at_least=1)
    k: int = option(2, "sdtt: steps of the teacher that become one of the student", at_least=2)
    seed: int = option(0, "seed of batches, masks and random weights", at_least=0)
    out: str = option("", "folder of the run; empty: runs/ and a name made of the options")
    device: str = option("auto", "auto, cuda, mps or cpu")
    resume: str = option("", "folder of an interrupted run to go on with, with the options it was started with")
    overwrite: bool = option(False, "replace the run that is in the folder")


def load_models(o, device):
    """-> the teacher's path, the teacher, its tokenizer and checkpoint; the student with the weights it starts from."""
    path = Path(o.teacher or train_teacher.ar_model(o, 0, "teacher", train_teacher.Options(tokenizer=o.tokenizer)))
    teacher, tokenizer, ckpt = dlm.load(path, "--teacher", device)
    if teacher.b != 1:
        raise UserError(f"--teacher {path}: a diffusion model (b = {teacher.b}), where an AR one is needed; train one "
                        "with train_teacher.py, or start from this one with --student")
    b = o.block or teacher.L
    if b == 1:
        raise UserError("--block 1: that is the AR model itself; use 2 or more, or 0 for the whole context")
    torch.manual_seed(o.seed)
    student = dlm.Transformer(dataclasses.replace(teacher.c, b=b)).to(device)
    if o.student == "ar":
        student.load_state_dict(teacher.state_dict())
    elif o.student != "random":
        start, its_tokenizer, _ = dlm.load(o.student, "--student", device)
        dlm.same_vocabulary(f"--student {o.student}", its_tokenizer, start, "the teacher", tokenizer, teacher)
        student = dlm.Transformer(start.c if o.method == "sdtt" else dataclasses.replace(start.c, b=b)).to(device)
        student.load_state_dict(start.state_dict())
    return path, teacher, tokenizer, ckpt, student


def texts_for(o, states, all_windows, teacher, ids):
    """The student's texts (n, L): windows of its share of the training text, or written by the AR teacher."""
    L = teacher.L
    with dlm.seeded(o.seed):
        if states == "teacher":
            return torch.cat([dlm.generate(teacher, len(rows)) for rows in torch.arange(o.texts).split(512)])
        n = max(L, int(o.fraction * len(ids)))
        start = torch.randint(len(ids) - n + 1, ())
    x = ids[start:start + n].unfold(0, L, 1)                                    # every window, as a view
    return x if all_windows else x[torch.linspace(0, len(x) - 1, o.texts).long().unique()]


def make_batch_loss(o, states, target, teacher, itself, ids, val):
    """The method: a function that draws texts, and for them states and targets, and returns the one loss; and what chooses
    the weights to keep, None for the bound. `itself` is the student before training."""
    b, V, on_policy = itself.b, teacher.V, states == "rollout"
    x_all = texts_for(o, states, on_policy or target not in dlm.ESTIMATORS, teacher, ids)
    if target in dlm.ESTIMATORS and not on_policy:
        print(f"the teacher scores {len(x_all)} texts, once", flush=True)
        aims = dlm.tcs(teacher, x_all, b, target, o.candidates)

    def states_and_targets(student, x, rows=None, whole=False):
        """-> texts x, states z (B, L), targets (B, L, V), and the texts y that targets are of: on rollouts what the student
        wrote, block by block behind x, else x."""
        y = x
        if on_policy:
            y, z = dlm.rollout(student, x, o.first, o.order, whole)
            x = y if whole else x
        elif target == "sdtt":
            z, t = dlm.hide_at(x, b, V, o.last)
        else:
            z = dlm.hide(x, b, V)

        if target == "onehot":
            return x, z, dlm.one_hot(x, V), y
        if target == "sdtt":
            return x, z, dlm.sdtt(itself, x, z, t, 1 / o.first, o.k), y
        if on_policy and target == "prefix":
            return x, z, dlm.opdlm(teacher, x, y, b), y
        aim = dlm.tcs(teacher, x, b, target, o.candidates, quiet=True) if on_policy else (a[rows] for a in aims)
        return x, z, dlm.dense(*aim, V), y

    def batch_loss(student, done):
        rows = torch.randint(len(x_all), (o.batch_size,), device=ids.device)
        x, z, p = states_and_targets(student, x_all[rows], rows, done >= 1 - o.whole)[:3]
        return dlm.loss(student, x, z, p, o.divergence)

    val = val[:64] if on_policy else val

    @torch.no_grad()
    def validate(student):
        with dlm.seeded(0):
            x, z, p, y = states_and_targets(student, val, whole=o.whole == 1)
        if on_policy and dlm.entropy(y) < FLOOR * dlm.entropy(val):
            tqdm.write(f"warning: what the student writes has {dlm.entropy(y):.2f} nats of entropy, held-out text "
                       f"{dlm.entropy(val):.2f}; try a lower --lr, or --student from --method prefix")
        return dlm.loss(student, x, z, p, o.divergence).item()

    return batch_loss, validate if on_policy or target == "sdtt" else None


def evaluate(model, teacher, judge, text, device, most, order):
    """One row for held-out text, one for the AR teacher, the others for the student by order and steps a block, up to
    `most`. Last word: of how many held-out passages it is found, greedily and in as many steps."""
    held = dlm.consecutive(text.parts["test"], model.L, JUDGED).to(device)
    ways = [("AR teacher", teacher, {"steps": 1}),
            (f"student, {most} steps, ancestral", model, {"steps": most, "order": "ancestral"}),
            ("student, threshold 0.9", model, {"threshold": 0.9})]
    ways += [(f"student, {n} steps, {order}", model, {"steps": n, "order": order}) for n in STEPS if n <= most]
    rows, samples = [{"what": "held-out text", **dlm.judge_samples(judge, held, text)}], {}
    passages = dlm.passages(text, 256)
    for what, who, way in ways:
        with dlm.seeded(0):
            row, x = dlm.judge_sampling(who, JUDGED, judge, text, **way)
        rows.append({"what": what, **row, "last_word": dlm.last_word_accuracy(who, passages, text.tokenizer, **way)})
        samples[what] = [text.tokenizer.decode(t) for t in x[:4]]
    show(rows, model.b)
    return rows, samples


def in_order(rows, order):
    """The rows of a student that writes in this order."""
    return [r for r in rows if r.get("order") == order]


def show(rows, b):
    """Prints the table."""
    print(f"\n{JUDGED} texts; steps are per block of {b:<5} calls seconds  judge NLL  entropy  bigrams  known words  "
          "last word")
    for r in rows:
        print(f"{r['what']:<35} {r.get('calls', 0):>8.1f} {r.get('seconds', 0):>7.1f} {r['judge_nll']:>10.3f} "
              f"{r['entropy']:>8.3f} {r['bigram_entropy']:>8.3f} {r['known_words']:>12.1%}"
              + (f" {r['last_word']:>10.1%}" if "last_word" in r else ""))


def draw_quality(known, students):
    """Judge NLL and entropy against network calls: held-out text and AR teacher as lines, {name: rows} of students."""
    calls = sorted({r["calls"] for rows in students.values() for r in rows})
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for ax, key, label in zip(axes, ("judge_nll", "entropy"), ("judge NLL, nats per token", "unigram entropy, nats")):
        for (name, rows), style in zip(students.items(), ("ko-", "ks--", "k^:")):
            ax.plot([r["calls"] for r in rows], [r[key] for r in rows], style, markerfacecolor="none", label=name)
        for r, style in zip(known, (":", "--")):
            ax.axhline(r[key], color="0.5", linestyle=style, label=r["what"])
        ax.set(xlabel="network calls for a text", ylabel=label, xscale="log")
        ax.set_xticks(calls, [f"{c:.0f}" for c in calls])
        ax.minorticks_off()
    axes[1].legend(fontsize=8)
    return fig


def finish(o, folder):
    """Runs into the folder, or goes on there if a run was interrupted; a finished one stays as it is -> the folder."""
    o, ckpt = dataclasses.replace(o, out=folder), None
    if Path(folder, "checkpoint.pt").exists() and not o.overwrite:
        kept, ckpt = train_teacher.resumed(dataclasses.replace(o, resume=folder), [])
        if dataclasses.replace(o, lr=o.lr or kept.lr, resume=folder) != dataclasses.replace(kept, overwrite=False):
            raise UserError(f"--out {folder}: holds a run with other options; --overwrite replaces it, or name another")
        o = kept
    if ckpt is None or ckpt["trainer"]["step"] < o.steps or not Path(folder, "metrics.json").exists():
        run(o, ckpt)
    else:
        print(f"{folder}: finished before, in {o.steps} steps, and kept; --overwrite makes it anew")
    return folder


def rounds(o):
    """SDTT: each round a run of its own, whose student starts the next -> {steps a block: its folder}."""
    if o.target:
        raise UserError(f"--target {o.target}: sdtt has a target of its own; leave this option out")
    if o.student in ("ar", "random"):
        raise UserError(f"--student {o.student}: SDTT starts from a trained diffusion model; name its run")
    b = dlm.load(o.student, "--student")[0].b
    if b == 1:
        raise UserError(f"--student {o.student}: an AR model, where SDTT starts from a diffusion model")
    N, student, folders = o.first or b, o.student, {}
    base = o.out or f"runs/{train_teacher.run_name(o, o.method, f'-b{b}')}"
    if N // o.k < o.last:
        raise UserError(f"--first {N}: a round of k = {o.k} makes {N // o.k} steps of it, below --last {o.last}")
    while (M := N // o.k) >= o.last:
        print(f"\n{M * o.k} steps a block become {M}" + f" ({N} is no multiple of {o.k})" * (M * o.k < N), flush=True)
        part = dataclasses.replace(o, first=M * o.k, last=M, block=b, student=student)
        N, student = M, finish(part, f"{base}-{M}steps")
        folders[M] = student
    return folders


def main_job(o):
    """The main job: TCS, SDTT from its student, and OPDLM, each a run of its own; then one table and one figure of them."""
    for name in ("states", "target"):
        if getattr(o, name):
            raise UserError(f"--{name} {getattr(o, name)}: every method has its own; name one with --method")
    print("a teacher, a judge, then TCS, SDTT and OPDLM: 4 to 8 minutes on 2 cores with the defaults", flush=True)
    name = o.out or f"runs/{train_teacher.run_name(o, 'all', f'-b{o.block}')}"
    parts = {m: dataclasses.replace(o, method=m, out=f"{name}-{m}", steps=max(1, round(o.steps * share)),
                                    texts=max(16, o.texts // 4)) for m, share in ALL.items()}
    tcs = finish(parts["tcs"], parts["tcs"].out)
    half = (o.first or dlm.load(tcs, "--student")[0].b) // o.k                # one round is enough to see
    sdtt = rounds(dataclasses.replace(parts["sdtt"], student=tcs, last=max(o.last, half)))
    opdlm = finish(parts["opdlm"], parts["opdlm"].out)

    table = {f: json.loads(Path(f, "metrics.json").read_text())["table"] for f in (tcs, *sdtt.values(), opdlm)}
    rows = {f: in_order(table[f], o.order) for f in table}
    students = {"TCS": rows[tcs], "SDTT": [r for n, f in sorted(sdtt.items()) for r in rows[f] if r["steps"] == n],
                "OPDLM": rows[opdlm]}
    students = {who: [{**r, "what": r["what"].replace("student", who)} for r in its] for who, its in students.items()}
    known = table[tcs][:2]                                        # held-out text and the AR teacher
    lines = known + sum(students.values(), [])
    show(lines, o.block or "all")
    save_figure(draw_quality(known, students), Path(name, "quality.png"))
    dlm.write_json(Path(name, "metrics.json"), {"options": dataclasses.asdict(o), "table": lines})
    print(f"{name}: metrics.json and quality.png of them all")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    o, ckpt = train_teacher.resumed(dlm.parse(Options, argv, __doc__), argv)
    if ckpt or o.method not in ("all", "sdtt"):
        run(o, ckpt)
    else:
        main_job(o) if o.method == "all" else rounds(o)


def run(o, ckpt):
    start, device = time.time(), dlm.pick_device(o.device)
    own = METHODS[o.method]
    states, target, o.lr = o.states or own[0], o.target or own[1], o.lr or own[2]
    if o.divergence == "reverse" and target not in ("prefix", "sdtt"):
        raise UserError("--divergence reverse: infinite where the target is one-hot; use forward, tvd or mse")
    if states == "rollout" and target in ("onehot", "sdtt"):
        raise UserError("--states rollout: goes with --target prefix, or with a TCS estimator and --whole 1")
    if states == "rollout" and target != "prefix" and o.whole < 1:
        raise UserError(f"--target {target}: scored on rollouts of whole texts only; add --whole 1, or use prefix")
    what = o.method if (states, target) == own[:2] else f"{states}-{target}"
    folder = train_teacher.folder_of(o, train_teacher.run_name(o, what, f"-b{o.block}"))
    path, teacher, tokenizer, teacher_ckpt, student = load_models(o, device)
    like = train_teacher.Options(**teacher_ckpt["options"])
    text = dlm.load_text(o.data, like.tokenizer if o.teacher else tokenizer, teacher.L)
    if o.teacher:                                         # it may have learned from anything; its judge learns from this text
        dlm.same_vocabulary(f"--teacher {path}", tokenizer, teacher, f"--data {o.data}", text.tokenizer, teacher)
    else:
        dlm.same_text(path, teacher_ckpt, text)
    if ckpt:
        dlm.same_text(folder, ckpt, text)
    judge_path = train_teacher.ar_model(o, like.seed + 1, "judge", like)
    judge, judge_tokenizer, judge_ckpt = dlm.load(judge_path, "the judge,", device)
    dlm.same_text(judge_path, judge_ckpt, text)
    dlm.same_vocabulary(f"--teacher {path}", tokenizer, teacher, f"the judge, {judge_path}", judge_tokenizer, judge)
    ids = text.parts["train"].to(device)
    before = time.time()                                  # the teacher's part: writing and scoring
    val = dlm.consecutive(text.parts["val"], student.L, 256).to(device)
    batch_loss, validate = make_batch_loss(o, states, target, teacher, copy.deepcopy(student).eval(), ids, val)
    prepared = time.time() - before
    tokens = 0
    for done, share in ((0.0, 1 - o.whole), (1.0, o.whole)):             # single blocks first, then whole rollouts
        if share:
            with dlm.seeded(0), dlm.counting(student) as count:
                batch_loss(student, done)
            tokens += o.steps * share * count["slots"]
    trainer = train_teacher.fit(o, folder, student, text, batch_loss, o.lr, ckpt, folder.name, validate)
    model = trainer.averaged()
    most, held = min(model.b, o.first or model.b), dlm.consecutive(text.parts["test"], model.L, 64).to(device)
    rows, samples = evaluate(model, teacher, judge, text, device, most, o.order)
    gap = None if model.L % model.b else dlm.inference_gap(model, teacher, held, most, o.order)
    if gap:
        print(f"\nKL from the AR teacher: {gap[0]:.3f} nats per token on states that the student visits, {gap[1]:.3f} on "
              "random masks")
    train_teacher.report(o, folder, trainer, model, text, teacher=str(path), states=states, target=target, gap=gap,
                         teacher_seconds=prepared, student_tokens=tokens, table=rows, samples=samples)
    save_figure(draw_quality(rows[:2], {f"student, {o.order} order": in_order(rows, o.order)}), folder / "quality.png")
    for who in ("AR teacher", rows[-1]["what"]):
        print(f"\n{who}, the first four texts of seed 0:")
        for t in samples[who]:
            print("  " + t.replace("\n", "⏎"))
    print(f"\n{folder}: checkpoint.pt, metrics.json, loss.png, quality.png; {time.time() - start:.0f} s in all. "
          f"Next: python sample.py --checkpoint {folder}")


if __name__ == "__main__":
    dlm.run_script(main)
