"""What the README and the notebooks show, from the metrics beside this file:  python assets/draw.py

Each function takes what its JSON file holds and returns a figure, or a table as text in Markdown; the command draws the
README's pictures and writes its tables.
"""
import json
import math
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).parent


def read(name):
    """What assets/NAME.json holds."""
    return json.loads((HERE / f"{name}.json").read_text())


def ticks(ax, places, labels=None):
    """These ticks on a logarithmic axis, and no others."""
    ax.set_xticks(places, labels or [f"{p:g}" for p in places])
    ax.minorticks_off()


def chosen(runs, **want):
    """The runs, or rows, that were made so."""
    return [r for r in runs if all(r.get(k) == v for k, v in want.items())]


def mean_of(runs, value, **want):
    """Mean and standard error of what value(run) says, over the runs that were made so (their seeds)."""
    found = torch.tensor([value(r) for r in chosen(runs, **want)])
    return found.mean().item(), (found.std() / len(found) ** 0.5).item() if len(found) > 1 else 0.0


def stated(runs, value, digits=2, **want):
    """The same as text: `3.27 ± 0.05`, and of one run `3.27`."""
    mean, error = mean_of(runs, value, **want)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(chosen(runs, **want)) > 1 else "")


class Table(str):
    """Markdown, which a notebook shows as the table that it is."""

    def _repr_markdown_(self):
        return str(self)


def markdown(head, rows):
    """A table; a row is a list of strings."""
    return Table("\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n")


def parallel(kept):
    """What drawing several tokens at once costs, by order, with exact denoisers."""
    fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.2))
    style = {"ancestral": ("x:", "0.0", 8), "random": ("o-", "0.0", 11), "confidence": ("s--", "0.0", 9),
             "margin": ("^--", "0.0", 6), "entropy": (".--", "0.0", 4), "spread": ("d-", "0.0", 5),
             "threshold": ("*-.", "0.4", 10), "random, half of the calls remask": ("P-", "0.6", 9),
             "confidence, half of the calls remask": ("D--", "0.6", 5)}
    titles = {"branch": "branch: 8 letters after a given one",
              "markov 2.0": f"markov, sharp 2.0: 6 letters, {kept['chains']} chains"}
    for ax, name, top in zip(axes, ("branch", "markov 2.0"), (1.04, 0.42)):
        L = 8 if name == "branch" else 6
        for way, (marker, grey, size) in style.items():
            points = sorted((L / f["calls"], f["tv"]) for f in kept["measured"] if (f["source"], f["way"]) == (name, way))
            ax.plot(*zip(*points), marker, color=grey, markersize=size, linewidth=1,
                    markerfacecolor="0.0" if way in ("entropy", "spread") else "none",
                    label="confidence, thresholds" if way == "threshold" else way)
        ax.axhline(kept["floor"][name], color="0.85", linewidth=4, zorder=0, label="texts of the source itself")
        ax.set(xscale="log", xlabel="tokens written per network call", title=titles[name], ylim=(-0.04 * top, top),
               ylabel="total variation distance\nfrom the true law (0 to 1)")
        ticks(ax, [1, 2, 4, 8] if L == 8 else [1, 2, 3, 6])
    axes[0].annotate("random, confidence,\nmargin, entropy and\nspread coincide", (2.05, 0.5), (3.3, 0.3), fontsize=8,
                     arrowprops={"arrowstyle": "->"})
    axes[1].annotate("confidence, margin,\nentropy", (1.97, 0.2), (1.12, 0.25), fontsize=8,
                     arrowprops={"arrowstyle": "->"})
    axes[1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    fig.tight_layout()
    return fig


def estimators(kept):
    """Estimators of the concrete score: distance and gradient variance against teacher tokens."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    points = {r["estimator"]: r for r in kept["rows"]}
    labels = "total variation from exact (0 to 1)", "gradient variance, one-hot = 1"
    for ax, key, label in zip(axes, ("tv", "variance"), labels):
        for name, style, shift in (("topk", "ko-", (-8, -11)), ("grad+topk", "ks--", (8, 4))):
            line = [r for r in kept["rows"] if r["estimator"].startswith(name + ", ")]
            ax.plot([r["tokens"] for r in line], [r[key] for r in line], style, markerfacecolor="w", label=name)
            for r in line:
                ax.annotate(r["estimator"].split(", ")[1], (r["tokens"], r[key]), shift, textcoords="offset points",
                            fontsize=8, ha="right" if shift[0] < 0 else "left")
        for name, style in (("prefix", "k^"), ("grad", "kv"), ("exact", "kD")):
            ax.plot(points[name]["tokens"], points[name][key], style, markersize=7, label=name)
        ax.axhline(points["one-hot"][key], color="0.5", linestyle=":", zorder=0, label="one-hot (no tokens)")
        ax.set(xlabel="teacher tokens a position", ylabel=label, xscale="log", xlim=(0.6, 1500), ylim=(-0.02, None))
        ticks(ax, [1, 10, 100, 1000])
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    fig.suptitle(f"estimators of the concrete score, docs, blocks of {kept['block']}", fontsize=11)
    fig.tight_layout()
    return fig


def bound_against_share(ax, kept):
    """TCS: the students' bound against the share of the text that they see, by target."""
    runs = chosen(kept, group="share")
    bound = lambda r: r["test_nats_per_char"]
    for target, style, label in (("onehot", "ko-", "plain: one-hot"), ("prefix", "k^", "prefix: causal"), ("topk", "ks", "TCS")):
        shares = sorted({r["fraction"] for r in chosen(runs, states="data", target=target)})
        at = [mean_of(runs, bound, states="data", target=target, fraction=f) for f in shares]
        ax.errorbar(shares, [m for m, _ in at], [e for _, e in at], fmt=style, capsize=3, markerfacecolor="none",
                    label=label)
    for target, style, label in (("onehot", "0.6", "teacher's texts, one-hot"), ("topk", "0.0", "teacher's texts, TCS")):
        level = mean_of(runs, bound, states="teacher", target=target, fraction=1)[0]
        ax.axhline(level, color=style, linewidth=1, label=f"{label} (no data)")
    ax.set(xscale="log", xlabel="share of the text that the student sees", ylabel="test bound, nats per character",
           title="TCS: equal updates, blocks of 4")
    ticks(ax, [0.1, 0.2, 0.4, 1], ["10%", "20%", "40%", "100%"])
    ax.legend(fontsize=7)


TVD = dict(divergence="tvd", k=2, updates=300, lr=0.01, ema=0.99)       # SDTT, as most of its students were made


def quality_against_steps(ax, few, kept):
    """SDTT: judge NLL against sampling steps, of a denoiser and of its students at TVD."""
    judged = lambda r: r["judge_nll"]
    steps = (2, 4, 8, 16, 32, 64)
    for order, style in (("ancestral", "k^--"), ("spread", "ko-")):
        ax.plot(steps, [mean_of(few["rows"], judged, who="denoiser", order=order, steps=n)[0] for n in steps], style,
                markerfacecolor="none", label=f"denoiser, {order}")
        at = [mean_of(kept["rows"], judged, order=order, **TVD, steps=n) for n in steps[:-1]]
        ax.errorbar(steps[:-1], [m for m, _ in at], [e for _, e in at], fmt=style[1] + ":", color="0.5", capsize=3,
                    label=f"SDTT students, {order}")
    for who, style in (("AR teacher", "--"), ("held-out text", ":")):
        ax.axhline(mean_of(few["rows"], judged, who=who)[0], color="0.5", linewidth=1, linestyle=style, label=who)
    ax.set(xscale="log", xlabel="sampling steps for 64 tokens", ylabel="judge NLL, nats per token",
           title="SDTT: each student at its own steps")
    ticks(ax, steps)
    ax.legend(fontsize=7)


WAYS = {"OPDLM": ("ko-", dict(states="rollout", target="prefix")),       # students of the AR weights
        "prefix (causal, random masks)": ("ks:", dict(states="data", target="prefix")),
        "plain": ("k^--", dict(states="data", target="onehot", student="ar"))}


def on_docs(kept):
    """Runs of the comparison: docs, blocks of four, rollouts of single blocks, learning rate 0.006 or from random weights."""
    runs = chosen(kept["runs"], data="docs", block=4, order="spread", whole=0, first=0)
    return [r for r in runs if r["student"] == "random" or r["student"] == "ar" and r["lr"] == 0.006]


def spread(steps, what="judge_nll"):
    """What is said of the texts that a run's student writes in so many steps a block."""
    return lambda r: r["rows"][f"spread {steps}"][what]


def quality_against_text(ax, kept):
    """OPDLM: judge NLL against tokens of text, beside its controls."""
    runs = chosen(on_docs(kept), fraction=1)
    for label, (style, way) in {**WAYS, "TCS, random masks": ("kD-.", dict(states="data", target="topk")),
                                "plain from random weights": ("kv", dict(student="random"))}.items():
        budgets = sorted({r["steps"] for r in chosen(runs, **way)})
        at = [mean_of(runs, spread(4), steps=n, **way) for n in budgets]
        ax.errorbar([n * 512 / 1e6 for n in budgets], [m for m, _ in at], [e for _, e in at], fmt=style, capsize=3,
                    markerfacecolor="none", label=label)
    ax.axhline(runs[0]["rows"]["ar 1"]["judge_nll"], color="k", linestyle="--", linewidth=1, label="AR teacher")
    ax.set(xscale="log", xlabel="tokens of text, millions", ylabel="judge NLL, nats per token",
           title="OPDLM beside its controls, blocks of 4", ylim=(None, 4.7))                 # room for the legend
    ticks(ax, [0.125, 0.25, 0.5, 1, 2])
    ax.legend(fontsize=7, loc="upper right")


def results():
    """The three methods beside their controls."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    bound_against_share(axes[0], read("tcs"))
    quality_against_steps(axes[1], read("few-steps"), read("sdtt"))
    quality_against_text(axes[2], read("opdlm"))
    fig.tight_layout()
    return fig


def gap(kept):
    """OPDLM: what a share of the text does, and how far students are from the teacher where they go."""
    runs = chosen(on_docs(kept), steps=1000)
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for label, (style, way) in WAYS.items():
        at = [mean_of(runs, spread(4), fraction=f, **way) for f in (0.1, 1)]
        axes[0].errorbar([0.1, 1], [m for m, _ in at], [e for _, e in at], fmt=style, capsize=3, markerfacecolor="none",
                         label=label)
    for label, style, target in (("causal, the teacher's texts", "0.4", "prefix"),
                                 ("one-hot, the teacher's texts", "0.7", "onehot")):
        axes[0].axhline(mean_of(runs, spread(4), states="teacher", target=target)[0], color=style, label=label)
    axes[0].axhline(runs[0]["rows"]["ar 1"]["judge_nll"], color="k", linestyle="--", linewidth=1, label="AR teacher")
    axes[0].set(xscale="log", xlabel="share of the text that the student sees", ylabel="judge NLL, nats per token",
                title="1000 updates", ylim=(None, 5.4))                # room for the legend
    ticks(axes[0], [0.1, 1], ["10%", "100%"])
    gaps = {"before": kept["before"]["docs-b4"],
            **{label: [mean_of(runs, lambda r: r["gap"][j], fraction=1, **way)[0] for j in (0, 1)]
               for label, (_, way) in WAYS.items()}}
    for j, (label, colour, hatch) in enumerate((("states it visits", "0.35", ""), ("random masks", "0.8", "//"))):
        axes[1].bar([k + 0.4 * j for k in range(len(gaps))], [g[j] for g in gaps.values()], 0.4, color=colour, hatch=hatch,
                    edgecolor="k", label=label)
    axes[1].set_xticks([k + 0.2 for k in range(len(gaps))], [label.replace(", ", ",\n") for label in gaps], fontsize=8)
    axes[1].set(ylabel="KL from the AR teacher,\nnats per token", title="1000 updates, all the text")
    for ax in axes:
        ax.legend(fontsize=7)
    fig.tight_layout()
    return fig


def blocks(kept):
    """What the causal target costs as blocks grow: judge NLL at one token a step, one seed."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    runs = [r for r in chosen(kept["runs"], data="docs", order="spread", fraction=1, seed=0) if r["lr"] < 0.01]
    ways = (("OPDLM, the better rate", "ko-", dict(method="opdlm", whole=0, steps=1000, student="ar")),
            ("causal, random masks", "ks:", dict(method="prefix", states="data", steps=1000, student="ar", lr=0.006)),
            ("plain", "k^--", dict(method="plain", steps=1000, student="ar", lr=0.006)))
    after = (("OPDLM on whole rollouts", "ko-", dict(target="prefix", whole=1)),
             ("TCS on whole rollouts", "kD-.", dict(target="topk", whole=1)), ("before", *ways[1][1:]))
    for ax, series, title in ((axes[0], ways, "1000 updates from the AR weights"),
                              (axes[1], after, "200 (64: 100) more, from the causal student")):
        for label, style, want in series:
            nll = {}
            for r in chosen(runs, **want):
                b = r["block"] or 64                                   # --block 0 is the context
                if f"spread {b}" in r["rows"]:
                    nll.setdefault(b, []).append(spread(b)(r))
            ax.plot(sorted(nll), [min(nll[b]) for b in sorted(nll)], style, markerfacecolor="none", label=label)
        ax.axhline(runs[0]["rows"]["ar 1"]["judge_nll"], color="k", linestyle=":", linewidth=1, label="AR teacher")
        ax.set(xscale="log", xlabel="block length, tokens", ylabel="judge NLL, nats per token", title=title)
        ticks(ax, [4, 16, 64])
        ax.legend(fontsize=8)
    fig.tight_layout()
    return fig


def main_job(kept):
    """What the main job's students write."""
    names = [f"**{r['what'].split(',')[0]}**, {r['steps']} step{'s' * (r['steps'] > 1)} a block" if "order" in r else
             r["what"] for r in kept["table"]]
    return markdown(["256 texts", "network calls a text", "judge NLL", "entropy", "bigram entropy", "known words"], [
        [name, f"{r['calls']:.0f}" if "calls" in r else "", f"{r['judge_nll']:.2f}", f"{r['entropy']:.2f}",
         f"{r['bigram_entropy']:.2f}", f"{r['known_words']:.0%}"] for name, r in zip(names, kept["table"])])


def shares(kept):
    """TCS and its controls by what the student sees."""
    rows, runs = [], chosen(kept, group="share")
    names = {"onehot": "one-hot", "prefix": "causal", "topk": "TCS"}
    for fraction, states in ((0.1, "data"), (1, "teacher"), (0.4, "data"), (1, "data")):
        for target, name in names.items():
            same = chosen(runs, fraction=fraction, states=states, target=target)
            if same:
                first = chosen(same, seed=0)[0]
                rows.append(["none, the teacher writes" if states == "teacher" else f"{fraction:.0%} of the text", name,
                             *(stated(same, lambda r: r[k], digits) for k, digits in (
                                 ("test_nats_per_char", 3), ("judge_nll", 2), ("entropy", 2), ("known_words", 3))),
                             f"{first['teacher_seconds']:.0f} + {first['train_seconds']:.0f}", str(len(same))])
    return markdown(["the student sees", "target", "test bound, nats a character", "judge NLL", "entropy", "known words",
                     "seconds: teacher + student", "seeds"], rows)


def orders(few):
    """A denoiser of the whole context: quality by order and steps."""
    row = lambda **want: chosen(few["rows"], **want)[0]
    names = ("ancestral", "confidence", "spread")
    rows = [[str(n), f"{row(order='ancestral', steps=n)['calls']:.1f}",
             *(f"{row(who='denoiser', order=o, steps=n)['judge_nll']:.2f}" for o in names),
             *(", ".join(f"{row(who='denoiser', order=o, steps=n)[k]:.2f}" for o in names) for k in ("entropy", "distinct_2"))]
            for n in (1, 2, 4, 8, 16, 32, 64)]
    for who in ("AR teacher", "held-out text"):
        r = row(who=who)
        rows.append([who, f"{r['calls']:.0f}" if "calls" in r else "", f"{r['judge_nll']:.2f}", "", "",
                     f"{r['entropy']:.2f}", f"{r['distinct_2']:.2f}"])
    return markdown(["steps", "calls, ancestral", *names, "entropy, in this order", "distinct bigrams"], rows)


def rounds(few, kept):
    """SDTT on text: students at their own number of steps, beside the denoiser that they come from."""
    def cell(rows, **want):
        found = chosen(rows, **want)
        return found and (stated(found, lambda r: r["judge_nll"]) + " (" + ", ".join(
            f"{mean_of(found, lambda r: r[k])[0]:.2f}" for k in ("entropy", "distinct_2")) + ")") or ""

    usual = {**TVD, "divergence": ""}
    made = lambda r: {k: r[k] for k in usual}
    ways = {", ".join([r["divergence"], *(f"{k} {r[k]:g}" for k in usual if r[k] != usual[k] and k != "divergence")]): made(r)
            for r in sorted(kept["rows"], key=lambda r: (len(made(r).items() - usual.items()), str(made(r))))}
    students = {"denoiser": (few, {"who": "denoiser"}), "denoiser at temperature 0.9": (few, {"who": "denoiser, temperature 0.9"}),
                **{name: (kept, way) for name, way in ways.items()}}
    steps = (32, 16, 8, 4, 2)
    return markdown(["order", "steps:", *map(str, steps)], [
        [order, name, *(cell(rows["rows"], steps=n, order=order, **way) for n in steps)]
        for order in ("ancestral", "spread") for name, (rows, way) in students.items()])


def needs(kept):
    """OPDLM and its controls: what they need, and what their students write."""
    states = {"data": "random masks", "rollout": "rollouts", "teacher": "random masks, the teacher's texts"}
    targets = {"onehot": "one-hot", "prefix": "causal", "topk": "TCS"}
    runs, rows = on_docs(kept), []
    for r in runs:
        way = {k: r[k] for k in ("student", "states", "target", "fraction", "steps")}
        if way not in rows:
            rows.append(way)
    rows.sort(key=lambda w: (w["student"], -w["fraction"], w["states"], w["target"], w["steps"]))
    gap = lambda j: lambda r: r["gap"][j]
    return markdown(["from", "states", "target", "updates", "text tokens, M", "student tokens, M", "judge NLL, 4 steps",
                     "2 steps", "known words", "KL on its own states", "KL on random masks", "seeds"], [
        [{"ar": "AR weights", "random": "random weights"}[w["student"]],
         states[w["states"]] + ", a tenth" * (w["fraction"] < 1), targets[w["target"]], str(w["steps"]),
         f"{same[0]['text_tokens'] / 1e6:.2f}", f"{same[0]['student_tokens'] / 1e6:.2f}", stated(same, spread(4)),
         stated(same, spread(2)), stated(same, spread(4, "known_words")), stated(same, gap(0)), stated(same, gap(1)),
         str(len(same))] for w in rows for same in [chosen(runs, **w)]])


def text_needed(kept):
    """Text that a student of the AR weights needs to write as well as 4000 updates from random weights make one."""
    runs, rows = chosen(on_docs(kept), fraction=1), []
    level, start = mean_of(runs, spread(4), student="random", steps=4000)[0], 500 * 32 * 64 / 1e6          # the AR model's own
    for label, (_, way) in WAYS.items():
        points = [(math.log(n), mean_of(runs, spread(4), steps=n, **way)[0]) for n in
                  sorted({r["steps"] for r in chosen(runs, **way)})]
        (m, high), (n, low) = next((pair for pair in zip(points, points[1:]) if pair[1][1] <= level))
        updates = math.exp(m + (n - m) * max(0, high - level) / (high - low))                # between two points of the figure
        text = updates * 512 / 1e6
        rows.append([label, f"{text:.2f}", f"{4000 / updates:.1f}", f"{4000 * 512 / 1e6 / (text + start):.1f}"])
    return markdown([f"for judge NLL {level:.2f}", "millions of tokens of text", "times less", "the AR model's text counted"], rows)


def sums(kept):
    """Which share of sums is right, by tokens a step."""
    runs = chosen(kept["runs"], data="arithmetic", lr=0.02)
    ways = {"plain": dict(target="onehot"), "causal, random masks": dict(states="data", target="prefix"),
            "OPDLM": dict(states="rollout", target="prefix"), "TCS on rollouts": dict(states="rollout", target="topk")}
    right = lambda way: lambda r: 100 * r["rows"][way]["last_word"]
    return markdown(["", "updates", "1", "2", "4", "threshold 0.9", "seeds"], [
        [name, str(n), *(stated(same, right(w), 1) + "%" for w in ("spread 4", "spread 2", "spread 1", "threshold 0")),
         str(len(same))] for name, way in ways.items() for n in sorted({r["steps"] for r in chosen(runs, **way)})
        for same in [chosen(runs, steps=n, **way)]])


def equal_quality(kept):
    """Sums: what texts cost an AR model with its cache, and a student that writes in blocks of 8; means over seeds."""
    lines = {}
    for r in kept["rows"]:
        alike = chosen(kept["rows"], **{k: r.get(k) for k in ("length", "who", "order", "threshold")})
        mean = lambda key, form: format(mean_of(alike, lambda r: r[key])[0], form)
        who = r["who"] + (f", `{r['order']}`, threshold {r['threshold']:g}" if "threshold" in r else "")
        nll = stated(alike, lambda r: r["judge_nll"], 3) if len(alike) > 1 else f"{r['judge_nll']:.3f} ± {r['judge_se']:.3f}"
        seconds = [format(r[key][0], form) if key in r else "" for key, form in (("seconds_1", ".3f"), ("seconds_32", ".2f"))]
        lines.setdefault((r["length"], who), [str(r["length"]), f"{who} [{len(alike)}]", mean("calls", ".0f"),
                                              mean("right", ".1%"), nll, mean("entropy", ".3f"), *seconds])
    return markdown(["letters", "[seeds]", "calls", "sums right", "judge NLL", "entropy", "seconds: one text", "32 texts"],
                    lines.values())


def found():
    """The three methods, each beside its controls at equal updates: the README's one table."""
    few, sdtt, tcs, kept = read("few-steps")["rows"], read("sdtt")["rows"], chosen(read("tcs"), group="share"), read("opdlm")
    nll, bound = lambda r: r["judge_nll"], lambda r: r["test_nats_per_char"]
    runs, long, one = chosen(on_docs(kept), steps=1000), chosen(on_docs(kept), steps=4000), dict(fraction=1)
    plain, causal, opdlm = (way for _, way in (WAYS["plain"], WAYS["prefix (causal, random masks)"], WAYS["OPDLM"]))
    whole = chosen(kept["runs"], data="docs", block=0, steps=1000)
    free = chosen(tcs, states="teacher")
    lines = [                                                   # question; value; the method; its controls
        ("order; `plain`, one block of 64", nll, ("`spread`, 8 calls", chosen(few, who="denoiser", order="spread", steps=8)),
         [("ancestral, 64 steps, 41 calls", chosen(few, order="ancestral", steps=64))]),
        ("no text but the teacher's: bound", bound, ("`tcs --states teacher`", chosen(free, target="topk")),
         [("`sequence`", chosen(free, target="onehot")), ("`plain` on 40% of the text", chosen(tcs, fraction=0.4, target="onehot"))]),
        ("all the text: bound", bound, ("`tcs`", chosen(tcs, states="data", target="topk", **one)),
         [("`plain`", chosen(tcs, states="data", target="onehot", **one))]),
        ("64 steps made 8, ancestral", nll, ("`sdtt`", chosen(sdtt, order="ancestral", steps=8, **TVD)),
         [("its teacher in 8", chosen(few, who="denoiser", order="ancestral", steps=8))]),
        ("64 steps made 4, `spread`", nll, ("`sdtt`", chosen(sdtt, order="spread", steps=4, **TVD)),
         [("its teacher in 4", chosen(few, who="denoiser", order="spread", steps=4))]),
        ("1000 updates", spread(4), ("`opdlm`", chosen(runs, **opdlm, **one)),
         [("`prefix`", chosen(runs, **causal, **one)), ("`plain`", chosen(runs, **plain, **one))]),
        ("4000 updates", spread(4), ("`opdlm`", chosen(long, **opdlm)),
         [("`prefix`", chosen(long, **causal)), ("`plain`", chosen(long, **plain)),
          ("`tcs`", chosen(long, states="data", target="topk"))]),
        ("1000 updates, a tenth of the text", spread(4), ("`opdlm`", chosen(runs, **opdlm, fraction=0.1)),
         [("`prefix`", chosen(runs, **causal, fraction=0.1)), ("`plain`", chosen(runs, **plain, fraction=0.1))]),
        ("1000 updates, one block of 64", spread(64), ("`opdlm`", chosen(whole, states="rollout")),
         [("`prefix`", chosen(whole, target="prefix", states="data")), ("`plain`", chosen(whole, target="onehot"))])]
    say = lambda name, rows, value: f"{name} {stated(rows, value, 3 if value is bound else 2)} [{len(rows)}]"
    return markdown(["", "method [seeds]", "controls"], [
        [what, say(*method, value), "; ".join(say(*control, value) for control in controls)]
        for what, value, method, controls in lines])


PICTURES = {"results": results}                                                          # of the README
TABLES = {"main-job": lambda: main_job(read("main-job")), "results": found,
          "equal-quality": lambda: equal_quality(read("equal-quality"))}


def with_tables(text):
    """The README's text with its tables as the metrics say: each stands behind a line <!-- table NAME -->."""
    return re.sub(r"(<!-- table (\S+) -->\n)(?:\|.*\n)*", lambda m: m[1] + TABLES[m[2]](), text)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    from train_teacher import save_figure
    for name, draw in PICTURES.items():
        save_figure(draw(), HERE / f"{name}.png")
    readme = HERE.parent / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
    print("assets/*.png and the README's tables are drawn from assets/*.json")
