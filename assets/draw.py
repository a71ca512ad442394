"""What the pages and the notebooks show, from the metrics beside this file:  python assets/draw.py

Each function takes what its JSON file holds and returns a figure, or a table as Markdown. The
command draws the PICTURES and writes the TABLES into the PAGES.
"""
import json
import math
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


def spread(steps):
    """Judge NLL of the texts that a run's student writes in so many steps a block."""
    return lambda run: judged(run["rows"][f"spread {steps}"])


def number(key):
    """What stands under a key, without a known sampling error."""
    return lambda run: (run[key], 0)


def gap_on(states):
    """KL from the AR teacher on the states it visits (0), or on random masks (1)."""
    return lambda run: (run["gap"][states], 0)


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

def main_job(kept):
    """What the main job's students write."""
    rows = []
    for r in kept["table"]:
        name = r["what"]
        if "order" in r:
            method = name.split(",")[0]
            name = f"**{method}**, {r['steps']} step{'s' * (r['steps'] > 1)} a block"
        written = "calls" in r
        calls = f"{r['calls']:.0f}" if written else ""
        seconds = [f"{r[key][1]:.3f}" if written else "" for key in ("seconds_1", "seconds_32")]
        numbers = [f"{r['judge_nll']:.2f}", f"{r['entropy']:.2f}", f"{r['copied']:.1%}"]
        rows.append([name, calls, *numbers, *seconds])
    head = ["256 texts", "calls a text", "judge NLL", "entropy", "8-grams copied",
            "seconds: one text", "32 texts"]
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


def equal_quality(kept):
    """Sums: what texts cost an AR model with its cache, and a student in blocks of 8."""
    rows = {}
    for r in kept["rows"]:
        same = {key: r.get(key) for key in ("length", "who", "order", "threshold")}
        alike = chosen(kept["rows"], **same)
        who = r["who"]
        if "threshold" in r:
            who += f", `{r['order']}`, threshold {r['threshold']:g}"
        nll, error = mean_of(alike, judged)
        calls = mean_of(alike, number("calls"))[0]
        entropy = mean_of(alike, number("entropy"))[0]
        seconds = [""] * 2
        if "seconds_1" in alike[0]:
            seconds = [f"{alike[0]['seconds_1'][0]:.3f}", f"{alike[0]['seconds_32'][0]:.2f}"]
        rows[r["length"], who] = [str(r["length"]), f"{who} [{len(alike)}]", f"{calls:.0f}",
                                  f"{nll:.3f} ± {error:.3f}", f"{entropy:.3f}", *seconds]
    head = ["letters", "[seeds]", "calls", "judge NLL", "entropy", "seconds: one text", "32 texts"]
    return markdown(head, rows.values())


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
# OPDLM

WAYS = {  # students of the AR weights
    "OPDLM": ("ko-", dict(states="rollout", target="prefix", student="ar")),
    "prefix (causal, random masks)": ("ks:", dict(states="data", target="prefix", student="ar")),
    "plain": ("k^--", dict(states="data", target="onehot", student="ar")),
}
TOKENS = 512 / 1e6                  # of text, that an update takes; in millions
AR_TOKENS = 500 * 32 * 64 / 1e6     # of text, that the AR model itself took


def on_docs(kept):
    """Runs of the comparison: blocks of four, one rate for all that start from the AR weights."""
    runs = chosen(kept["runs"], data="docs", block=4, order="spread", whole=0, first=0)
    return chosen(runs, student="random") + chosen(runs, student="ar", lr=0.006)


def ar_level(ax, runs, style="--"):
    level(ax, runs[0]["rows"]["ar 1"]["judge_nll"], "AR teacher", style)


def quality_against_text(ax, kept):
    """OPDLM: judge NLL against tokens of text, beside its controls."""
    runs = chosen(on_docs(kept), fraction=1)
    ways = {**WAYS, "TCS, random masks": ("kD-.", dict(states="data", target="topk")),
            "plain from random weights": ("kv", dict(student="random"))}
    for label, (style, way) in ways.items():
        same = chosen(runs, **way)
        budgets = sorted({r["steps"] for r in same})
        points = [mean_of(same, spread(4), steps=n) for n in budgets]
        errorbars(ax, [n * TOKENS for n in budgets], points, style, label)
    ar_level(ax, runs)
    ax.set(xscale="log", xlabel="tokens of text, millions", ylabel="judge NLL, nats per token",
           title="OPDLM beside its controls, blocks of 4", ylim=(None, 4.7))  # room for the legend
    ticks(ax, [0.125, 0.25, 0.5, 1, 2])
    ax.legend(fontsize=7, loc="upper right")


def gap(kept):
    """OPDLM: what a share of the text does, and how far students are from the teacher."""
    runs = chosen(on_docs(kept), steps=1000)
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    quality_against_share(axes[0], runs)
    gap_bars(axes[1], runs, kept["before"]["docs-b4"])
    for ax in axes:
        ax.legend(fontsize=7)
    fig.tight_layout()
    return fig


def quality_against_share(ax, runs):
    for label, (style, way) in WAYS.items():
        points = [mean_of(runs, spread(4), fraction=f, **way) for f in (0.1, 1)]
        errorbars(ax, [0.1, 1], points, style, label)
    for label, grey, target in (("causal", "0.4", "prefix"), ("one-hot", "0.7", "onehot")):
        mean = mean_of(runs, spread(4), states="teacher", target=target)[0]
        ax.axhline(mean, color=grey, label=f"{label}, the teacher's texts")
    ar_level(ax, runs)
    ax.set(xscale="log", xlabel="share of the text that the student sees",
           ylabel="judge NLL, nats per token", title="1000 updates",
           ylim=(None, 5.4))  # room for the legend
    ticks(ax, [0.1, 1], ["10%", "100%"])


def gap_bars(ax, runs, before):
    gaps = {"before": before}
    for label, (_, way) in WAYS.items():
        same = chosen(runs, fraction=1, **way)
        gaps[label.replace(", ", ",\n")] = [mean_of(same, gap_on(j))[0] for j in (0, 1)]
    for j, label, grey, hatch in ((0, "states it visits", "0.35", ""),
                                  (1, "random masks", "0.8", "//")):
        x = [place + 0.4 * j for place in range(len(gaps))]
        heights = [both[j] for both in gaps.values()]
        ax.bar(x, heights, 0.4, color=grey, hatch=hatch, edgecolor="k", label=label)
    ax.set_xticks([place + 0.2 for place in range(len(gaps))], gaps, fontsize=8)
    ax.set(ylabel="KL from the AR teacher,\nnats per token", title="1000 updates, all the text")


def blocks(kept):
    """What the causal target costs as blocks grow: judge NLL at one token a step, one seed."""
    runs = chosen(kept["runs"], data="docs", order="spread", fraction=1, seed=0)
    runs = [r for r in runs if r["lr"] < 0.01]
    start = dict(steps=1000, student="ar")
    causal = "ks:", dict(method="prefix", states="data", lr=0.006, **start)
    ways = {"OPDLM, the better rate": ("ko-", dict(method="opdlm", whole=0, **start)),
            "causal, random masks": causal,
            "plain": ("k^--", dict(method="plain", lr=0.006, **start))}
    after = {"OPDLM on whole rollouts": ("ko-", dict(target="prefix", whole=1)),
             "TCS on whole rollouts": ("kD-.", dict(target="topk", whole=1)), "before": causal}
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    axes[0].set(title="1000 updates from the AR weights")
    axes[1].set(title="200 (64: 100) more, from the causal student")
    for ax, series in zip(axes, (ways, after)):
        for label, (style, want) in series.items():
            best = best_by_block(chosen(runs, **want))
            ax.plot(best.keys(), best.values(), style, markerfacecolor="none", label=label)
        ar_level(ax, runs, ":")
        ax.set(xscale="log", xlabel="block length, tokens", ylabel="judge NLL, nats per token")
        ticks(ax, [4, 16, 64])
        ax.legend(fontsize=8)
    fig.tight_layout()
    return fig


def best_by_block(runs):
    """{block length: the least judge NLL of the runs}, at one token a step."""
    best = {}
    for r in sorted(runs, key=lambda r: r["block"] or 64):  # --block 0 is the context
        b = r["block"] or 64
        if f"spread {b}" in r["rows"]:
            best[b] = min(best.get(b, math.inf), spread(b)(r)[0])
    return best


def needs(kept):
    """OPDLM and its controls: what they need, and what their students write."""
    states = {"data": "random masks", "rollout": "rollouts",
              "teacher": "random masks, the teacher's texts"}
    weights = {"ar": "AR weights", "random": "random weights"}
    runs = on_docs(kept)
    keys = ("student", "fraction", "states", "target", "steps")
    ways = {tuple(r[key] for key in keys) for r in runs}
    rows = []
    for way in sorted(ways, key=lambda way: (way[0], -way[1], *way[2:])):
        same = chosen(runs, **dict(zip(keys, way)))
        r = same[0]
        share = ", a tenth" if r["fraction"] < 1 else ""
        tokens = [f"{r[key] / 1e6:.2f}" for key in ("text_tokens", "student_tokens")]
        gaps = [f"{mean_of(same, gap_on(j))[0]:.2f}" for j in (0, 1)]
        rows.append([weights[r["student"]], states[r["states"]] + share, TARGETS[r["target"]],
                     str(r["steps"]), *tokens, stated(same, spread(4)), stated(same, spread(2)),
                     *gaps, str(len(same))])
    return markdown(["from", "states", "target", "updates", "text tokens, M", "student tokens, M",
                     "judge NLL, 4 steps", "2 steps", "KL on its own states",
                     "KL on random masks", "seeds"], rows)


def text_needed(kept):
    """Text that a student of the AR weights needs to write as well as one from random weights."""
    runs = chosen(on_docs(kept), fraction=1)
    goal = mean_of(runs, spread(4), student="random", steps=4000)[0]
    rows = []
    for label, (_, way) in WAYS.items():
        same = chosen(runs, **way)
        budgets = sorted({r["steps"] for r in same})
        curve = [(n, mean_of(same, spread(4), steps=n)[0]) for n in budgets]
        updates = updates_until(goal, curve)
        text = updates * TOKENS
        less = 4000 * TOKENS / (text + AR_TOKENS)
        rows.append([label, f"{text:.2f}", f"{4000 / updates:.1f}", f"{less:.1f}"])
    head = [f"for judge NLL {goal:.2f}", "millions of tokens of text", "times less",
            "the AR model's text counted"]
    return markdown(head, rows)


def updates_until(goal, curve):
    """Updates after which a curve [(updates, NLL)] falls to the goal: a line in their logarithm."""
    for (m, high), (n, low) in zip(curve, curve[1:]):
        if low <= goal:
            share = max(0, high - goal) / (high - low)
            return m * (n / m) ** share
    raise ValueError("the curve does not reach the goal")


# --------------------------------------------------------------------------------------------------
# The three methods, each beside its controls at equal updates

def beside(question, measure, *writers):
    """A row: the method, then its controls. writers: (name, runs)."""
    cells = [f"{name} {stated(runs, measure, 3 if measure is bound else 2)} [{len(runs)}]"
             for name, runs in writers]
    return [question, cells[0], "; ".join(cells[1:])]


def found_with_denoiser(few, sdtt):
    """Orders, and SDTT, on the denoiser of the whole context."""
    def teacher(order, steps):
        return chosen(few, who="denoiser", order=order, steps=steps)

    def students(order, steps):
        return chosen(sdtt, order=order, steps=steps, **TVD)

    yield beside("order; `plain`, one block of 64", judged,
                 ("`spread`, 8 calls", teacher("spread", 8)),
                 ("ancestral, 64 steps, 41 calls", teacher("ancestral", 64)))
    yield beside("64 steps made 8, ancestral", judged, ("`sdtt`", students("ancestral", 8)),
                 ("its teacher in 8", teacher("ancestral", 8)))
    yield beside("64 steps made 4, `spread`", judged, ("`sdtt`", students("spread", 4)),
                 ("its teacher in 4", teacher("spread", 4)))


def found_with_tcs(runs):
    free = chosen(runs, states="teacher")
    data = chosen(runs, states="data")
    yield beside("no text but the teacher's: bound", bound,
                 ("`tcs --states teacher`", chosen(free, target="topk")),
                 ("`sequence`", chosen(free, target="onehot")),
                 ("`plain` on 40% of the text", chosen(data, fraction=0.4, target="onehot")))
    yield beside("all the text: bound", bound,
                 ("`tcs`", chosen(data, fraction=1, target="topk")),
                 ("`plain`", chosen(data, fraction=1, target="onehot")))


def found_with_opdlm(kept):
    whole = chosen(kept["runs"], data="docs", block=0, student="ar", fraction=1, seed=0)

    def writers(runs, **want):
        return [(name, chosen(runs, **want, **way))
                for name, (_, way) in zip(("`opdlm`", "`prefix`", "`plain`"), WAYS.values())]

    runs = on_docs(kept)
    tcs = "`tcs`", chosen(runs, steps=4000, states="data", target="topk")
    yield beside("1000 updates", spread(4), *writers(runs, steps=1000, fraction=1))
    yield beside("4000 updates", spread(4), *writers(runs, steps=4000), tcs)
    yield beside("1000 updates, a tenth of the text", spread(4),
                 *writers(runs, steps=1000, fraction=0.1))
    yield beside("1000 updates, one block of 64", spread(64), *writers(whole, steps=1000))


def found():
    """The table of results."""
    by_denoiser = found_with_denoiser(read("few-steps")["rows"], read("sdtt")["rows"])
    orders_row, *sdtt_rows = by_denoiser
    tcs_rows = found_with_tcs(chosen(read("tcs"), group="share"))
    rows = [orders_row, *tcs_rows, *sdtt_rows, *found_with_opdlm(read("opdlm"))]
    return markdown(["", "method [seeds]", "controls"], rows)


def results():
    """The three methods beside their controls."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    bound_against_share(axes[0], read("tcs"))
    quality_against_steps(axes[1], read("few-steps"), read("sdtt"))
    quality_against_text(axes[2], read("opdlm"))
    fig.tight_layout()
    return fig


# --------------------------------------------------------------------------------------------------
# The command

PICTURES = {"results": results}
TABLES = {"main-job": lambda: main_job(read("main-job")),
          "results": found,
          "equal-quality": lambda: equal_quality(read("equal-quality"))}


def with_tables(text):
    """A page's text with its tables as the metrics say: each is behind <!-- table NAME -->."""
    return re.sub(r"(<!-- table (\S+) -->\n)(?:\|.*\n)*", lambda m: m[1] + TABLES[m[2]](), text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from train_teacher import save_figure
    for name, draw in PICTURES.items():
        save_figure(draw(), HERE / f"{name}.png")
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    print("the pictures and tables of the pages are drawn from assets/*.json")
