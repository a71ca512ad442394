"""What the pages and the notebooks show, from the metrics beside this file:  python assets/draw.py

Each function takes what its JSON file holds and returns a figure, or a table as Markdown. The
command draws the PICTURES and writes the TABLES into the PAGES.
"""
import functools
import itertools
import json
import re
import sys
from pathlib import Path
from statistics import fmean, stdev

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = [ROOT / "README.md", HERE / "RESULTS.md", ROOT / "tests" / "README.md"]


def read(name):
    """What assets/NAME.json holds."""
    return json.loads((HERE / f"{name}.json").read_text())


# --------------------------------------------------------------------------------------------------
# Numbers. A measure takes a run, or a row, and returns a value and its sampling error.

def judged(row):
    return row["judge_nll"], row["judge_se"]


def bound(run):
    """The test bound in nats a character. Its sampling error was kept in nats a token."""
    per_char = run["test_nats_per_char"]
    return per_char, run["test_se"] * per_char / run["test_nats_per_token"]


def number(key):
    """What stands under a key, without a known sampling error."""
    return lambda run: (run[key], 0)


def chosen(runs, **want):
    """The runs, or rows, that were made so."""
    return [r for r in runs if all(r.get(k) == v for k, v in want.items())]


def mean_of(runs, measure, **want):
    """Mean over the runs that were made so (their seeds), and its error.

    The error is the standard error over seeds or, where it is larger, the sampling error: two
    seeds may agree by chance.
    """
    values, sampling = zip(*map(measure, chosen(runs, **want)))
    over_seeds = stdev(values) if len(values) > 1 else 0
    return fmean(values), max(over_seeds, fmean(sampling)) / len(values) ** 0.5


def stated(runs, measure, digits=2, **want):
    """The same as text: `3.27 ± 0.05`, and of one run `3.27`."""
    mean, error = mean_of(runs, measure, **want)
    several = len(chosen(runs, **want)) > 1
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if several else "")


# --------------------------------------------------------------------------------------------------
# Marks on paper

class Table(str):
    """Markdown, which a notebook shows as the table that it is."""

    def _repr_markdown_(self):
        return str(self)


def markdown(head, rows):
    """A table; a row is a list of strings."""
    lines = [head, ["---"] * len(head), *rows]
    return Table("\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n")


def ticks(ax, places, labels=None):
    """These ticks on a logarithmic axis, and no others."""
    ax.set_xticks(places, labels or [f"{p:g}" for p in places])
    ax.minorticks_off()


def errorbars(ax, x, points, style, label, **more):
    """A line through points, which are (mean, error)."""
    means, errors = zip(*points)
    ax.errorbar(x, means, errors, fmt=style, capsize=3, markerfacecolor="none", label=label, **more)


def level(ax, y, label, style="--", color="k"):
    ax.axhline(y, color=color, linewidth=1, linestyle=style, label=label)


# --------------------------------------------------------------------------------------------------
# The main job, and the orders of the sampler

def shown(row, stories):
    """Whether the main job's table shows a row of its metrics."""
    if "one block" in row["what"]:
        return row.get("steps") in (8, 16, 32)
    if "threshold" in row:
        return row["threshold"] == 0.99
    if stories and "steps" in row:
        return row["what"].startswith("untrained") and row["steps"] == 4
    return row.get("steps") != 1


def main_job(kept):
    """What the main job's students write: how many stories are right, or the judge NLL of text."""
    stories = "right" in kept["table"][0]
    rows = []
    for r in kept["table"] + kept.get("one block", []):
        if not shown(r, stories):
            continue
        name = r["what"]
        if "order" in r:
            method = name.split(", order")[0]
            how = f"{r['steps']} steps a block" if "steps" in r else f"threshold {r['threshold']}"
            if stories:
                how = "one token a step" if "steps" in r else f"{r['threshold']:.0%} sure"
            name = f"**{method}**, {how}"
        calls, seconds, right = "", ["", ""], "100%"               # of held-out text
        if "calls" in r:
            calls = f"{r['calls']:.0f}"
            seconds = [f"{r[key][1]:.3f}" for key in ("seconds_1", "seconds_32")]
        if stories and calls:
            right = f"{r['right']:.1%} ± {r['right_se']:.1%}"
        entropy = f"{r['entropy']:.2f}"
        text = f"{r['nll']:.2f}" if "nll" in r else ""
        quality = [right, entropy]
        if not stories:
            quality = [text, f"{r['judge_nll']:.2f}", entropy, f"{r['copied']:.1%}"]
        rows.append([name, calls, *quality, *seconds])
    columns = ["text costs", "judge NLL", "entropy", "8-grams copied"]
    if stories:
        columns = ["stories right", "entropy"]
    return markdown(["who writes", "calls a text", *columns, "seconds, 1 text", "32 texts"], rows)


ON_PROSE = {"untrained": "untrained, blocks of four", "TCS": "TCS, blocks of four",
            "OPDLM": "OPDLM, blocks of four", "plain, one block": "`plain`, one block of 64",
            "prefix, one block": "`prefix`, one block of 64"}


def prose(kept):
    """The main job on prose by tokens a step: what text costs a model, and its texts the judge."""
    ar = chosen(kept["table"], what="AR teacher")[0]
    rows = [["AR teacher", f"{ar['nll']:.2f}", "", "", f"{ar['judge_nll']:.2f}", "", ""]]
    for name, label in ON_PROSE.items():
        by_calls = {r["calls"]: r for r in kept["table"] + kept["one block"]
                    if r["what"].startswith(f"{name}, order left steps")}
        rows.append([label, *(f"{by_calls[calls][key]:.2f}"
                              for key in ("nll", "judge_nll") for calls in (64, 32, 16))])
    head = ["tokens a step:", "text costs it: 1", "2", "4", "its texts cost a judge: 1", "2", "4"]
    return markdown(head, rows)


def orders(few):
    """A denoiser of the whole context: quality by order and steps."""
    names = ("ancestral", "confidence", "spread")
    rows = []
    for n in (1, 2, 4, 8, 16, 32, 64):
        by_order = [chosen(few["rows"], who="denoiser", order=o, steps=n)[0] for o in names]
        rows.append([str(n), f"{by_order[0]['calls']:.1f}",
                     *(f"{r['judge_nll']:.2f}" for r in by_order),
                     *(", ".join(f"{r[key]:.2f}" for r in by_order)
                       for key in ("entropy", "distinct_2"))])
    for who in ("AR teacher", "held-out text"):
        r = chosen(few["rows"], who=who)[0]
        calls = f"{r['calls']:.0f}" if "calls" in r else ""
        rows.append([who, calls, f"{r['judge_nll']:.2f}", "", "",
                     f"{r['entropy']:.2f}", f"{r['distinct_2']:.2f}"])
    head = ["steps", "calls, ancestral", *names, "entropy, in this order", "distinct bigrams"]
    return markdown(head, rows)


# --------------------------------------------------------------------------------------------------
# TCS

def estimators(kept):
    """Estimators of the concrete score: distance and gradient variance against teacher tokens."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    compare_estimators(axes[0], kept["rows"], "tv")
    axes[0].set(ylabel="total variation from exact (0 to 1)")
    compare_estimators(axes[1], kept["rows"], "variance")
    axes[1].set(ylabel="gradient variance, one-hot = 1")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    fig.suptitle(f"estimators of the concrete score, docs, blocks of {kept['block']}", fontsize=11)
    fig.tight_layout()
    return fig


def compare_estimators(ax, rows, key):
    for name, style, shift in (("topk", "ko-", (-8, -11)), ("grad+topk", "ks--", (8, 4))):
        by_K = [r for r in rows if r["estimator"].startswith(name + ", ")]
        tokens = [r["tokens"] for r in by_K]
        ax.plot(tokens, [r[key] for r in by_K], style, markerfacecolor="w", label=name)
        for r in by_K:
            ax.annotate(r["estimator"].split(", ")[1], (r["tokens"], r[key]), shift, fontsize=8,
                        textcoords="offset points", ha="right" if shift[0] < 0 else "left")
    for name, style in (("prefix", "k^"), ("grad", "kv"), ("exact", "kD")):
        r = chosen(rows, estimator=name)[0]
        ax.plot(r["tokens"], r[key], style, markersize=7, label=name)
    one_hot = chosen(rows, estimator="one-hot")[0]
    ax.axhline(one_hot[key], color="0.5", linestyle=":", zorder=0, label="one-hot (no tokens)")
    ax.set(xlabel="teacher tokens a position", xscale="log", xlim=(0.6, 1500), ylim=(-0.02, None))
    ticks(ax, [1, 10, 100, 1000])


TARGETS = {"onehot": "one-hot", "prefix": "causal", "topk": "TCS"}


def bound_against_share(ax, kept):
    """TCS: the students' bound against the share of the text that they see, by target."""
    runs = chosen(kept, group="share")
    styles = {"onehot": ("ko-", "plain: one-hot"), "prefix": ("k^", "prefix: causal"),
              "topk": ("ks", "TCS")}
    for target, (style, label) in styles.items():
        on_data = chosen(runs, states="data", target=target)
        shares = sorted({r["fraction"] for r in on_data})
        points = [mean_of(on_data, bound, fraction=f) for f in shares]
        errorbars(ax, shares, points, style, label)
    for target, grey, name in (("onehot", "0.6", "one-hot"), ("topk", "0.0", "TCS")):
        mean = mean_of(runs, bound, states="teacher", target=target, fraction=1)[0]
        level(ax, mean, f"teacher's texts, {name} (no data)", "-", grey)
    ax.set(xscale="log", xlabel="share of the text that the student sees",
           ylabel="test bound, nats per character", title="TCS: equal updates, blocks of 4")
    ticks(ax, [0.1, 0.2, 0.4, 1], ["10%", "20%", "40%", "100%"])
    ax.legend(fontsize=7)


def shares(kept):
    """TCS and its controls by what the student sees."""
    runs = chosen(kept, group="share")
    rows = []
    for fraction, states in ((0.1, "data"), (1, "teacher"), (0.4, "data"), (1, "data")):
        sees = f"{fraction:.0%} of the text"
        if states == "teacher":
            sees = "none, the teacher writes"
        for target, name in TARGETS.items():
            same = chosen(runs, fraction=fraction, states=states, target=target)
            if same:
                r = chosen(same, seed=0)[0]
                seconds = f"{r['teacher_seconds']:.0f} + {r['train_seconds']:.0f}"
                entropy = mean_of(same, number("entropy"))[0]
                rows.append([sees, name, stated(same, bound, 3), stated(same, judged),
                             f"{entropy:.2f}", seconds, str(len(same))])
    return markdown(["the student sees", "target", "test bound, nats a character", "judge NLL",
                     "entropy", "seconds: teacher + student", "seeds"], rows)


# --------------------------------------------------------------------------------------------------
# SDTT

# As most of its students were made.
TVD = dict(divergence="tvd", k=2, updates=300, lr=0.01, ema=0.99)


def quality_against_steps(ax, few, kept):
    """SDTT: judge NLL against sampling steps, of a denoiser and of its students at TVD."""
    steps = (2, 4, 8, 16, 32, 64)
    for order, style in (("ancestral", "k^--"), ("spread", "ko-")):
        teacher = chosen(few["rows"], who="denoiser", order=order)
        ax.plot(steps, [mean_of(teacher, judged, steps=n)[0] for n in steps], style,
                markerfacecolor="none", label=f"denoiser, {order}")
        students = chosen(kept["rows"], order=order, **TVD)
        points = [mean_of(students, judged, steps=n) for n in steps[:-1]]
        errorbars(ax, steps[:-1], points, style[1] + ":", f"SDTT students, {order}", color="0.5")
    for who, style in (("AR teacher", "--"), ("held-out text", ":")):
        level(ax, mean_of(few["rows"], judged, who=who)[0], who, style, "0.5")
    ax.set(xscale="log", xlabel="sampling steps for 64 tokens",
           ylabel="judge NLL, nats per token", title="SDTT: each student at its own steps")
    ticks(ax, steps)
    ax.legend(fontsize=7)


def rounds(few, kept):
    """SDTT on text: students at their own number of steps, beside the denoiser they come from."""
    def unusual(way):
        return [f"{key} {way[key]:g}" for key in ("k", "updates", "lr", "ema")
                if way[key] != TVD[key]]

    ways = []
    for r in kept["rows"]:
        way = {key: r[key] for key in TVD}
        if way not in ways:
            ways.append(way)
    ways.sort(key=lambda way: (len(unusual(way)), str(way)))
    cold = "denoiser, temperature 0.9"
    writers = {"denoiser": chosen(few["rows"], who="denoiser"),
               "denoiser at temperature 0.9": chosen(few["rows"], who=cold)}
    for way in ways:
        writers[", ".join([way["divergence"], *unusual(way)])] = chosen(kept["rows"], **way)
    steps = (32, 16, 8, 4, 2)
    return markdown(["order", "steps:", *map(str, steps)], [
        [order, name, *(quality(chosen(rows, order=order, steps=n)) for n in steps)]
        for order in ("ancestral", "spread") for name, rows in writers.items()])


def quality(rows):
    """`judge NLL (entropy, distinct bigrams)`, or nothing if there are no rows."""
    if not rows:
        return ""
    entropy = mean_of(rows, number("entropy"))[0]
    distinct = mean_of(rows, number("distinct_2"))[0]
    return f"{stated(rows, judged)} ({entropy:.2f}, {distinct:.2f})"


# --------------------------------------------------------------------------------------------------
# Students that read where their teacher reads

STUDENTS = {"opdlm": ("OPDLM", "o-"), "tcs": ("TCS", "D-."), "prefix": ("prefix", "s:"),
            "plain": ("plain", "^--"), "own": ("own slot, rate .02", "v-"),
            "own-low": ("own slot, rate .006", "v:")}
# From dark to light, so that they differ in grey, too.
INKS = {"opdlm": "#440154", "tcs": "#31688e", "prefix": "#2a9d6f", "plain": "#e08214",
        "own": "0.4", "own-low": "0.65"}
UPDATES = (50, 200, 1000)
ONE, SURE, TWO, FOUR = "one", "surest", "two", "four"      # tokens a step: left first, surest first


def students(kept, data, name, **want):
    """The runs of a method on `docs` or `stories`, in blocks of four, from the AR weights."""
    usual = dict(block=4, start="ar", total=1000, states="")
    usual |= {"name": name} if name else {}                    # None: every method
    return chosen(kept["runs"], data=data, **{**usual, **want})


def marked(row):
    """Judge NLL or, of stories, the share right."""
    return (row["right"], row["right_se"]) if "right" in row else judged(row)


def written(way, updates=1000):
    """What the students of so many updates write."""
    return lambda run: marked(run["at"][str(updates)][way])


def at(key, updates=1000):
    """Another number of students of so many updates: their bound, nats a token, or seconds."""
    return lambda run: (run["at"][str(updates)][key], 0)


def percent(runs, measure):
    mean, error = mean_of(runs, measure)
    return f"{100 * mean:.1f}%" + (f" ± {100 * error:.1f}" if error else "")


def said(data, runs, measure):
    return (percent if data == "stories" else stated)(runs, measure)


def by_updates(ax, kept, data, way, title):
    """Quality against updates, method by method; the AR teacher as a line."""
    for name, (label, style) in STUDENTS.items():
        runs = students(kept, data, name)
        points = [mean_of(runs, written(way, n)) for n in UPDATES]
        errorbars(ax, UPDATES, points, style, label, color=INKS[name])
    ar = kept["ar"][data]
    level(ax, ar.get("right", ar.get("judge_nll")), "AR teacher", ":")
    label = "judge NLL, nats per token" if data == "docs" else "share of stories that are right"
    ax.set(xscale="log", xlabel="updates of 8 texts", ylabel=label, title=title)
    ticks(ax, UPDATES)


def student_curves(kept):
    """What each method keeps of its teacher, and how well two tokens a step go."""
    fig, axes = plt.subplots(2, 2, figsize=(9.5, 7))
    for ax, (data, way) in zip(axes.flat, itertools.product(("docs", "stories"), (ONE, TWO))):
        number = "one token a step, from the left" if way == ONE else "two tokens a step"
        by_updates(ax, kept, data, way, f"{data}, {number}")
    axes[0, 0].set_ylim(2.65, 3.65)                          # above it one's own slot goes on
    axes[1, 1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.02, 0.93))
    return fig


def slot_table(kept):
    """Plain diffusion from the AR weights: the student's own slot against its teacher's."""
    rows = []
    for data in ("docs", "stories"):
        for name in ("own", "own-low", "plain"):
            for n in (0, *UPDATES):
                runs = [run for run in students(kept, data, name) if str(n) in run["at"]]
                if runs:
                    label = STUDENTS[name][0].replace("plain", "teacher's slot")
                    quality = [said(data, runs, written(way, n)) for way in (ONE, SURE, TWO)]
                    bound = f"{mean_of(runs, at('bound', n))[0]:.2f}"
                    rows.append([f"`{data}`", label, str(n), *quality, bound, str(len(runs))])
    head = ["", "reads in", "updates", "1 a step, left", "1, surest", "2", "bound", "seeds"]
    return markdown(head, rows)


def student_table(kept):
    """The methods after 1000 updates: quality by tokens a step, bound, gap, and seconds."""
    rows = []
    for data in ("docs", "stories"):
        ar = kept["ar"][data]
        quality = said(data, [ar], marked)
        rows.append([f"`{data}`", "AR teacher", quality, "", "", "", f"{ar['bound']:.2f}",
                     "", "", ""])
        for name, (label, _) in STUDENTS.items():
            runs = students(kept, data, name)
            quality = [said(data, runs, written(way)) for way in (ONE, SURE, TWO, FOUR)]
            gap = [f"{mean_of(runs, lambda r: (r['at']['1000']['gap'][i], 0))[0]:.3f}"
                   for i in (0, 1)]
            seconds = min(run["at"]["1000"]["seconds"] + run["asked"] for run in runs)
            rows.append([f"`{data}`", label, *quality, f"{mean_of(runs, at('bound'))[0]:.2f}",
                         " / ".join(gap), f"{seconds:.0f} s", str(len(runs))])
    head = ["1 a step, left", "1, surest", "2", "4", "bound", "KL from teacher: visited / random",
            "training", "seeds"]
    return markdown(["", "student", *head], rows)


def threshold_table(kept):
    """What a threshold saves: quality, and network calls for 64 tokens."""
    rows = []
    for data in ("docs", "stories"):
        for name, (label, _) in STUDENTS.items():
            row = [f"`{data}`", label]
            runs = students(kept, data, name)
            for t in ("t.99", "t.9", "t.7"):
                calls = mean_of(runs, lambda run: (run["at"]["1000"][t]["calls"], 0))[0]
                row.append(f"{said(data, runs, written(t))} in {calls:.1f}")
            rows.append(row)
    return markdown(["", "student", "threshold .99", ".9", ".7"], rows)


def one_seed(runs, updates):
    """Rows of a table: what one student of each method writes."""
    rows = []
    for name in ("opdlm", "tcs", "prefix", "plain"):
        for run in chosen(runs, name=name):
            quality = [f"{marked(run['at'][str(updates)][way])[0]:.2f}"
                       for way in (ONE, SURE, TWO, FOUR)]
            values = run["at"][str(updates)]
            rows.append([STUDENTS[name][0], *quality, f"{values['bound']:.2f}",
                         f"{values[TWO]['entropy']:.2f}"])
    return rows


ONE_SEED = ["1 a step, left", "1, surest", "2", "4", "bound", "entropy at 2"]


def block_table(kept):
    """Longer blocks, after 1000 updates on `docs`."""
    rows = [[str(block), *row] for block in (8, 16, 64)
            for row in one_seed(students(kept, "docs", None, block=block), 1000)]
    return markdown(["b", "student", *ONE_SEED], rows)


def long_table(kept):
    """Blocks of four, up to 4000 updates on `docs` at the usual rate."""
    rows = []
    for updates in (1000, 2000, 4000):
        runs = students(kept, "docs", None, total=4000, lr=0.002)
        runs = [run for run in runs if str(updates) in run["at"]]
        rows += [[str(updates), *row] for row in one_seed(runs, updates)]
    return markdown(["updates", "student", *ONE_SEED], rows)


# --------------------------------------------------------------------------------------------------
# A pre-trained teacher, and the continuous student

TEXTS = ("docs", "tinyshakespeare", "RESULTS")


def per_char(run):
    """The bound on each of TEXTS, in nats a character."""
    return [run["docs"], *(run["unseen"][text]["nats_per_char"] for text in TEXTS[1:])]


def pretrained_table(kept):
    """SmolLM2 opened to blocks of four: what its students say of texts, and how they go on."""
    first = kept["runs"][0]
    itself = chosen(kept["sixteen"]["models"], who="ar")[0]
    ar = [first["teacher_docs"], *(first["unseen"][text]["teacher"] for text in TEXTS[1:])]
    rows = [["SmolLM2 itself", *(f"{nats:.2f}" for nats in ar),
             f"{itself['text']['48']['per_char']:.2f}", f"{itself['last_word']:.0%}",
             f"{first['table'][1]['judge_nll']:.2f}", "", ""]]
    untrained = [kept["untrained"]["mean"][text] for text in TEXTS]
    rows.append(["opened, untrained", *(f"{nats:.2f}" for nats in untrained), *[""] * 5])
    labels = {"plain": "`plain`", "prefix": "`prefix`", "tcs": "`tcs`", "opdlm": "`opdlm`"}
    for name, label in labels.items():
        runs = chosen(kept["runs"], method=name)
        bounds = [stated(runs, lambda run: (per_char(run)[i], 0), 3) for i in range(3)]
        asked = [run for run in runs if "text" in run]
        costs = " / ".join(of_seeds(asked, "text", calls, "per_char") for calls in calls_of(4))
        words = f"{fmean(run['last_word'] for run in asked):.0%}"
        quality = [stated(runs, lambda run: judged(run["table"][row])) for row in (2, 3)]
        rows.append([label, *bounds, costs, words, *quality, str(len(runs))])
    head = ["", "bound: `docs`", "Shakespeare", "RESULTS.md", "`docs` in 48 / 24 / 12 calls",
            "last words", "judge: 48 calls", "24 calls", "seeds"]
    return markdown(head, rows)


def share_closed(kept, name):
    """Of the distance that `plain` leaves to SmolLM2 on unseen texts, what a student closes."""
    first = kept["runs"][0]
    shares = []
    for i, text in enumerate(TEXTS[1:], 1):
        plain, other = (fmean(per_char(run)[i] for run in chosen(kept["runs"], method=method))
                        for method in ("plain", name))
        shares.append((plain - other) / (plain - first["unseen"][text]["teacher"]))
    return shares


SMOLLM2 = {("ar, trained on", 1): "SmolLM2, trained on as much", ("ar", 1): "SmolLM2",
           **{(who, b): f"`{who}`, b = {b}" for b, names in
              ((16, ("plain", "prefix", "opdlm")), (8, ("plain", "prefix")), (4, ("plain",)))
              for who in names}}


def of_seeds(runs, *keys):
    """The mean over runs of what stands under these keys: `3.02`."""
    return f"{fmean(functools.reduce(dict.get, keys, run) for run in runs):.2f}"


def calls_of(block):
    return ("48", "24", "12") if block > 1 else ("48",)


def sixteen(kept):
    """SmolLM2 after 30 thousand tokens: what text costs it, and what it writes, by calls."""
    rows = []
    for (who, block), label in SMOLLM2.items():
        runs = chosen(kept["sixteen"]["models"], who=who, block=block)
        row = [label]
        for measure, value in (("text", "per_char"), ("written", "tuned_nll"),
                               ("written", "judge_nll")):
            costs = []
            for calls in calls_of(block):
                asked = [run for run in runs if calls in run[measure]]
                costs.append(of_seeds(asked, measure, calls, value) if asked else "–")
            row.append(" / ".join(costs))
        bounds = [of_seeds(runs, "bounds", text) for text in TEXTS]
        rows.append([*row, *bounds, str(len(runs))])
    head = ["48 / 24 / 12 calls", "`docs` costs it", "its texts cost SmolLM2, trained on",
            "a small judge", "bound: `docs`", "Shakespeare", "RESULTS.md", "seeds"]
    return markdown(head, rows)


def shown_by_preset(kept):
    """What the README's command for SmolLM2 prints at its end."""
    rows = []
    for r in kept["shown"]["table"][1:]:
        name = r["what"].replace("AR teacher", "SmolLM2 itself").replace("student, ", "")
        rows.append([name, f"{r['calls']:.0f}", f"{r['nll']:.2f}", f"{r['seconds_1'][1]:.1f}"])
    return markdown(["", "calls for 48 tokens", "text costs, nats a token", "seconds for 64 tokens"], rows)


def fit_levels(gamma, nats, A):
    """mu and beta of the curve A exp(-exp(-(gamma - mu) / beta)) through points (n,).

    A: what is lost where noise leaves nothing. Points where nearly that or nearly nothing is lost
    do not count.
    """
    steep = (nats > 0.02 * A) & (nats < 0.98 * A)
    gamma, nats = gamma[steep], nats[steep]
    y = (-(nats / A).log()).log()                              # = -(gamma - mu) / beta
    slope = ((gamma - gamma.mean()) * (y - y.mean())).sum() / (gamma - gamma.mean()).square().sum()
    beta = -1 / slope
    return gamma.mean() + beta * y.mean(), beta


def loss_by_noise(kept):
    """What noise of each level costs: the student, the noise alone, and the fitted curve."""
    import torch
    run = chosen(kept["runs"], data="docs", noise="gaussian", method="plain", block=4)[0]
    gamma, student, channel = torch.tensor(run["curve"]).unbind(1)
    A = student[-1]
    mu, beta = fit_levels(gamma, student, A)
    fine = torch.linspace(gamma[0], gamma[-1], 200)
    fig, ax = plt.subplots(figsize=(6, 3.6))
    ax.plot(gamma, channel, "k^:", markerfacecolor="none", label="what the noise leaves, alone")
    ax.plot(gamma, student, "ko", label="the student")
    for m, b, style, label in ((mu, beta, "k-", f"fitted: mu {mu:.2f}, beta {beta:.2f}"),
                               (run["mu"], 0.85, "k--", f"first guess: {run['mu']:.2f}, .85")):
        ax.plot(fine, A * (-(-(fine - m) / b).exp()).exp(), style, label=label)
    ax.set(xlabel="noise level gamma", ylabel="nats per token", xlim=(-2, 8))
    ax.legend(fontsize=8)
    fig.tight_layout()
    return fig


TOKENS_A_STEP = ("1", "2", "4")
LEFT_NAMES = {"plain": "plain", "plain2000": "plain, 2000 updates", "prefix": "prefix",
              "tcs": "TCS", "opdlm": "OPDLM"}
MORE_NAMES = {"more-plain": "plain, 500 updates more", "more-tcs": "TCS from it, 500 updates",
              "tenth-plain": "plain, a tenth of the text", "tenth-tcs": "TCS, a tenth of the text"}


def by_left(kept, data, names):
    """What students do by the default order, by tokens a step, and what text costs them then."""
    rows = []
    for name, label in names.items():
        runs = chosen(kept["by_left"], data=data, name=name)
        costs = [f"{fmean(run['rows'][k]['nll'] for run in runs):.2f}" for k in TOKENS_A_STEP]
        quality = [said(data, runs, lambda run: marked(run["rows"][k])) for k in TOKENS_A_STEP]
        rows.append([label, *costs, *quality, f"{fmean(run['bound'] for run in runs):.2f}",
                     str(len(runs))])
    judged_by = "right: 1" if data == "stories" else "judge NLL: 1"
    head = ["tokens a step:", "text costs it: 1", "2", "4", judged_by, "2", "4", "bound", "seeds"]
    return markdown(head, rows)


NOISY = {("mask", "plain", "data"): "masks, plain", ("mask", "tcs", "data"): "masks, TCS",
         ("gaussian", "plain", "data"): "noise, plain", ("gaussian", "tcs", "data"): "noise, TCS",
         ("gaussian", "sequence", "teacher"): "noise, plain, teacher's texts",
         ("gaussian", "tcs", "teacher"): "noise, TCS, teacher's texts"}
IN_TURNS = [("left", N) for N in (1, 2, 4)]
TOGETHER = [("together", N) for N in (4, 8, 16, 32, 64)]


def row_of(run, order, steps):
    return next(iter(chosen(run["rows"], order=order, steps=steps)), None)


def noise_table(kept, data):
    """What students write whose tokens are noisy, beside masked ones: in turns, and together."""
    rows = []
    for (noise, method, states), label in NOISY.items():
        runs = chosen(kept["runs"], data=data, noise=noise, method=method, states=states,
                      block=4, student="ar")
        rows.append([label, *qualities(data, runs, IN_TURNS + TOGETHER)])
    if data == "docs":
        runs = chosen(kept["runs"], data=data, student="random")
        rows.append(["noise, plain, random weights", *qualities(data, runs, IN_TURNS + TOGETHER)])
    head = ["in turns:", "1", "2", "4", "together: 4", "8", "16", "32", "64"]
    return markdown(head, rows)


def qualities(data, runs, ways):
    """Judge NLL, or the share of right stories, for each (order, steps); empty where none is."""
    return [said(data, runs, lambda run: marked(row_of(run, *way))) if row_of(runs[0], *way) else ""
            for way in ways]


def noise_tried(kept):
    """What was tried on the continuous student, one seed each: judge NLL, all together."""
    rows = []
    for run in kept["tried"]:
        quality = [f"{run['rows'][steps]['judge_nll']:.2f}" if steps in run["rows"] else ""
                   for steps in ("1", "4", "16", "64")]
        rows.append([run["what"], f"{run['lr']:g}", *quality])
    return markdown(["student", "rate", "1 step", "4", "16", "64"], rows)


def rules(kept):
    """Quality by rule and steps, or where a rule says itself how many calls it takes, by those."""
    rows = []
    for rule in dict.fromkeys(r["rule"] for r in kept["rows"] if "b = 4" not in r["rule"]):
        its_own = chosen(kept["rows"], rule=rule)
        by_steps = {r.get("steps"): f"{r['judge_nll']:.2f}" for r in its_own}
        at_own_pace = [f"{r['judge_nll']:.2f} in {r['calls']:.0f}" for r in its_own
                       if "steps" not in r]
        rows.append([rule, *(by_steps.get(n, "") for n in (8, 16, 32)), *(at_own_pace or [""])])
    return markdown(["each step reveals", "8 steps", "16", "32", "at its own pace"], rows)


def costs(kept):
    """What held-out text costs the shipped models, by calls, exactly; and in random order."""
    names = {"ar": "AR teacher", "opdlm": "OPDLM, blocks of four", "denoiser": "one block of 64"}
    calls = [str(2 ** k) for k in range(7)]
    rows = []
    for name, label in names.items():
        its = kept["text costs"][name]
        cells = [f"{its[n][0]:.2f}" if n in its else "" for n in calls]
        bound = f"{its['bound'][0]:.2f}" if name != "ar" else ""
        rows.append([label, *cells, bound])
    return markdown(["calls:", *calls, "64, in random order"], rows)


# --------------------------------------------------------------------------------------------------
# 1024 tokens

def long_texts(kept):
    """Quality by model, order and calls."""
    rows = []
    for r in kept["rows"]:
        calls = f"{r['calls']:.0f}" if "calls" in r else ""
        how = [r["order"]] if r.get("order") else []
        if "temperature" in r:
            how.append(f"temperature {r['temperature']}")
        rows.append([r["who"], ", ".join(how), calls, f"{r['judge_nll']:.2f} ± {r['judge_se']:.2f}",
                     f"{r['entropy']:.2f}", f"{r['bigram_entropy']:.2f}", f"{r['distinct_4']:.2f}",
                     f"{r['copied']:.0%}"])
    head = ["who writes", "order", "calls", "judge NLL", "entropy", "of bigrams",
            "distinct 4-grams", "8-grams copied"]
    return markdown(head, rows)


def frontier(kept):
    """What calls cost in quality, and what of it is only a lower entropy."""
    fig, (by_calls, by_entropy) = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    writers = [("plain", "left", "o-", "C0"), ("plain", "ancestral", "^--", "C1"),
               ("prefix", "left", "s-", "C2"), ("AR teacher", None, "D:", "0.3")]
    for who, order, style, color in writers:
        rows = [r for r in chosen(kept["rows"], who=who) if r.get("order") == order]
        look = {"color": color, "markersize": 4, "label": f"{who}, {order}" if order else who}
        plain = [r for r in rows if r.get("temperature", 1) == 1]
        by_calls.plot([r["calls"] for r in plain], [r["judge_nll"] for r in plain], style, **look)
        same_calls = [r for r in rows if r["steps"] in (0, 32)]
        same_calls.sort(key=lambda r: r["entropy"])
        by_entropy.plot([r["entropy"] for r in same_calls],
                        [r["judge_nll"] for r in same_calls], style, **look)
    seconds = {r["who"]: r["seconds"] for r in chosen(kept["seconds"], batch=1)}
    as_long = seconds["ar"] / (seconds["plain 32"] / 32)     # calls in the AR model's seconds
    by_calls.axvline(as_long, color="0.5", linestyle=":", label="the AR teacher's time")
    by_calls.set_xscale("log", base=2)
    by_calls.set(xlabel="calls for 1024 characters", ylabel="judge NLL, nats a character")
    by_entropy.legend(*by_calls.get_legend_handles_labels(), fontsize=7, loc="upper left")
    by_entropy.set(xlabel="entropy in 32 calls, by temperature, nats",
                   ylabel="judge NLL, nats a character")
    fig.tight_layout()
    return fig


WRITERS_OF_256 = {"plain": dict(who="plain"),
                  "plain, 500 updates more": dict(who="plain, 500 updates more"),
                  "SDTT, forward KL": dict(who="SDTT", kind="forward", steps=8),
                  "SDTT, reverse KL": dict(who="SDTT", kind="reverse", steps=8),
                  "SDTT, MSE": dict(who="SDTT", kind="mse", steps=8),
                  "SDTT, k = 4, to 16 steps": dict(who="SDTT", kind="k4", steps=16)}


def of_256(kept):
    """Texts of 256 tokens, by order and steps: judge NLL, and what text costs; bound, last words."""
    rows = []
    for label, want in WRITERS_OF_256.items():
        runs = chosen(kept["runs"], **want)
        row = [label]
        for order in ("ancestral", "left"):
            for N in (8, 16, 32, 64):
                row.append(stated(runs, lambda run: judged(row_of(run, order, N))))
        costs = [fmean(row_of(run, "left", N)["nll"] for run in runs) for N in (8, 32, 64)]
        row += [f"{nats:.2f}" for nats in costs]
        row.append(f"{fmean(run['bound'] for run in runs):.2f}")
        row.append(f"{fmean(run['last_words'] for run in runs):.1%}")
        rows.append([*row, str(len(runs))])
    ar = chosen(kept["runs"], who="AR teacher")[0]
    nll, error = judged(ar["rows"][0])
    rows.append(["AR teacher", *[""] * 7, f"{nll:.2f} ± {error:.2f}", "", "", "",
                 f"{ar['bound']:.2f}", f"{ar['last_words']:.1%}", "1"])
    head = ["ancestral 8", "16", "32", "64", "left 8", "16", "32", "64",
            "text costs it 8", "32", "64", "bound", "last words", "seeds"]
    return markdown(["steps:", *head], rows)


def last_words(kept):
    """Last words that students find, round after round of SDTT."""
    rows = []
    for kind, label in (("forward", "forward KL"), ("reverse", "reverse KL"), ("mse", "MSE")):
        row = [label, f"{chosen(kept['runs'], who='plain', seed=0)[0]['last_words']:.1%}"]
        for N in (128, 64, 32, 16, 8):
            run = chosen(kept["runs"], who="SDTT", kind=kind, steps=N, seed=0)[0]
            row.append(f"{run['last_words']:.1%}")
        rows.append(row)
    return markdown(["steps:", "256, before", "128", "64", "32", "16", "8"], rows)


def by_calls_of_256(kept):
    """Blocks of 64 beside one block of 256: judge NLL and what text costs, by calls."""
    rows = []
    for who in ("AR teacher", "plain", "plain, blocks of 64", "prefix, blocks of 64"):
        run = chosen(kept["runs"], who=who)[0]
        by_calls = {r["calls"]: r for r in run["rows"] if "nll" in r}       # by `left`
        for key, label in (("judge_nll", "judge NLL"), ("nll", "text costs")):
            cells = [f"{by_calls[calls][key]:.2f}" if calls in by_calls else ""
                     for calls in (256, 128, 64, 32, 16, 8)]
            name = "plain, one block" if who == "plain" else who
            rows.append([f"{name}: {label}", *cells])
    return markdown(["calls:", "256", "128", "64", "32", "16", "8"], rows)


def stories_of_256(kept):
    """Stories in texts of 256 tokens: the share right, calls, and seconds of 1 and 8 texts."""
    rows = []
    for run in kept["stories"]:
        for r in run["rows"]:
            how = [f"{r['steps']} steps a block"] if r.get("steps") else []
            how += [f"{r['threshold']:.0%} sure"] if r.get("threshold") else []
            times = [f"{r[key]:.2f}" if key in r else "" for key in ("seconds_1", "seconds_8")]
            rows.append([run["who"], ", ".join(how), f"{r['calls']:.0f}",
                         f"{r['right']:.1%} ± {r['right_se']:.1%}", f"{r['entropy']:.2f}", *times])
    return markdown(["who writes", "how", "calls", "right", "entropy", "seconds, 1 text", "8"], rows)


def sizes(kept):
    """SDTT for denoisers of three sizes, 64 tokens: judge NLL before and after, last words."""
    rows = []
    for size in ("small", "medium", "large"):
        for who, label in (("plain", "before"), ("sdtt", "after")):
            for run in chosen(kept["sizes"], who=who, size=size):
                quality = [f"{row_of(run, order, N)['judge_nll']:.2f}"
                           for order in ("ancestral", "left") for N in (8, 32, 64)]
                rows.append([f"{run['parameters'] / 1e6:.1f} M", label, *quality,
                             f"{run['last_words']:.1%}"])
    head = ["SDTT", "ancestral 8", "32", "64", "left 8", "32", "64", "last words"]
    return markdown(["parameters", *head], rows)


# --------------------------------------------------------------------------------------------------
# The moving picture

WRITERS = {"Autoregressive": ("ar-docs.pt", {}), "Diffusion": ("dlm-docs-whole.pt", {"steps": 16})}
LINES = 6           # that a text may take


def writing(title, path, way):
    """The states of one text that a shipped model writes, as cells of sample.py."""
    import torch

    import dlm
    import sample
    model, tokenizer, _ = sample.load(HERE / path, "", "cpu")
    given = [False] * model.L
    hidden = torch.full((1, model.L), model.V)
    with dlm.seeded(0):
        states = [z[0].tolist() for z in dlm.sample(model, hidden, **way)]
    frames = []
    for call, (before, now) in enumerate(zip([states[0], *states], states)):
        written = model.L - now.count(model.V)
        head = f"{title}: {call} of {len(states) - 1} calls, {written} of {model.L} tokens\n"
        text = [(c, "given") for c in head]
        text += sample.cells(now, before, given, tokenizer, model.V)
        lines = len(sample.wrap(text, 72))
        frames.append(text + [("\n", "old")] * (LINES + 2 - lines))
    return frames


def both_write(path):
    """An AR and a diffusion model write as many tokens, one above the other; a frame is a call."""
    import sample
    one, other = [writing(title, *how) for title, how in WRITERS.items()]
    other += other[-1:] * (len(one) - len(other))           # it is finished, and waits
    sample.draw_gif([above + below for above, below in zip(one, other)], path)


# --------------------------------------------------------------------------------------------------
# The command

PICTURES = {"students": lambda: student_curves(read("students")),
            "frontier": lambda: frontier(read("few-steps-1024")),
            "levels": lambda: loss_by_noise(read("continuous"))}
TABLES = {"main-job": lambda: main_job(read("main-job")),
          "prose": lambda: prose(read("main-job-docs")),
          "docs-job": lambda: main_job(read("main-job-docs")),
          "slots": lambda: slot_table(read("students")),
          "students": lambda: student_table(read("students")),
          "thresholds": lambda: threshold_table(read("students")),
          "blocks": lambda: block_table(read("students")),
          "long": lambda: long_table(read("students")),
          "pretrained": lambda: pretrained_table(read("pretrained")),
          "sixteen": lambda: sixteen(read("pretrained")),
          "preset": lambda: shown_by_preset(read("pretrained")),
          "by-left": lambda: by_left(read("students"), "docs", LEFT_NAMES),
          "by-left-stories": lambda: by_left(read("students"), "stories", LEFT_NAMES),
          "by-left-more": lambda: by_left(read("students"), "docs", MORE_NAMES),
          "noise-docs": lambda: noise_table(read("continuous"), "docs"),
          "noise-stories": lambda: noise_table(read("continuous"), "stories"),
          "noise-tried": lambda: noise_tried(read("continuous")),
          "shares": lambda: shares(read("tcs")),
          "rounds": lambda: rounds(read("few-steps"), read("sdtt")),
          "orders": lambda: orders(read("few-steps")),
          "rules": lambda: rules(read("rules")),
          "costs": lambda: costs(read("rules")),
          "1024": lambda: long_texts(read("few-steps-1024")),
          "256": lambda: of_256(read("few-steps-256")),
          "last-words": lambda: last_words(read("few-steps-256")),
          "256-blocks": lambda: by_calls_of_256(read("few-steps-256")),
          "256-stories": lambda: stories_of_256(read("few-steps-256")),
          "sizes": lambda: sizes(read("few-steps-256"))}


def with_tables(text):
    """A page's text with its tables as the metrics say: each is behind <!-- table NAME -->."""
    return re.sub(r"(<!-- table (\S+) -->\n)(?:\|.*\n)*", lambda m: m[1] + TABLES[m[2]](), text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from train_teacher import save_figure
    both_write(HERE / "resolving.gif")
    for name, draw in PICTURES.items():
        save_figure(draw(), HERE / f"{name}.png")
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    print("the pictures and tables of the pages are drawn from assets/*.json")
