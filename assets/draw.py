"""The README's pictures, drawn from the metrics beside this file:  python assets/draw.py

Each function takes what its JSON file holds and returns the figure; the notebooks call them too.
"""
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).parent


def ticks(ax, places, labels=None):
    """These ticks on a logarithmic axis, and no others."""
    ax.set_xticks(places, labels or [f"{p:g}" for p in places])
    ax.minorticks_off()


def mean_of(runs, value, **want):
    """Mean and standard error of what value(run) says, over the runs that were made so (their seeds)."""
    found = torch.tensor([value(r) for r in runs if all(r[k] == v for k, v in want.items())])
    return found.mean().item(), (found.std() / len(found) ** 0.5).item() if len(found) > 1 else 0.0


def quality(kept):
    """The main job: judge NLL and entropy against network calls."""
    from distill import draw_quality           # as the main job does; not above, since it turns off a notebook's pictures
    known, lines = kept["table"][:2], kept["table"][2:]
    names = dict.fromkeys(r["what"].split(",")[0] for r in lines)
    return draw_quality(known, {n: [r for r in lines if r["what"].startswith(n)] for n in names})


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


def tcs(kept):
    """The students' bound against the share of the text that they see, by target."""
    runs = [r for r in kept if r["group"] == "share"]
    fig, ax = plt.subplots(figsize=(6.5, 4))
    bound = lambda r: r["test_nats_per_char"]
    for target, style, label in (("onehot", "ko-", "plain: one-hot"), ("prefix", "k^:", "prefix"), ("topk", "ks--", "TCS")):
        shares = sorted({r["fraction"] for r in runs if (r["states"], r["target"]) == ("data", target)})
        at = [mean_of(runs, bound, states="data", target=target, fraction=f) for f in shares]
        ax.errorbar(shares, [m for m, _ in at], [e for _, e in at], fmt=style, capsize=3, markerfacecolor="none", label=label)
    for target, style, label in (("onehot", "0.6", "teacher's texts, one-hot"), ("topk", "0.0", "teacher's texts, TCS")):
        level = mean_of(runs, bound, states="teacher", target=target, fraction=1)[0]
        ax.axhline(level, color=style, linewidth=1, label=f"{label} (no data)")
    ax.set(xscale="log", xlabel="share of the teacher's training text that the student sees",
           ylabel="test bound, nats per character", title="docs, blocks of 4, equal steps")
    ticks(ax, [0.1, 0.2, 0.4, 1], ["10%", "20%", "40%", "100%"])
    ax.legend(fontsize=8)
    fig.tight_layout()
    return fig


def opdlm(kept):
    """What OPDLM needs beside its controls, and how far students are from the teacher where they go."""
    runs = [r for r in kept["runs"] if (r["data"], r["block"], r["order"], r["whole"], r["first"]) == ("docs", 4, "spread", 0, 0)
            and (r["lr"] == 0.006 or r["student"] == "random") and r["student"] in ("ar", "random")]
    judged = lambda r: r["rows"]["spread 4"]["judge_nll"]
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    ways = (("OPDLM", "ko-", dict(states="rollout"), (250, 500, 1000)),
            ("causal, random masks", "ks:", dict(states="data", target="prefix"), (250, 500, 1000)),
            ("plain", "k^--", dict(states="data", target="onehot", student="ar"), (250, 500, 1000, 4000)),
            ("plain from random weights", "kv", dict(student="random"), (4000,)))
    for label, style, way, budgets in ways:
        at = [mean_of(runs, judged, steps=n, fraction=1, **way) for n in budgets]
        axes[0].errorbar([n * 512 / 1e6 for n in budgets], [m for m, _ in at], [e for _, e in at], fmt=style, capsize=3,
                         markerfacecolor="none", label=label)
    for label, style, way, _ in ways[:3]:
        at = [mean_of(runs, judged, steps=1000, fraction=f, **way) for f in (0.1, 1)]
        axes[1].errorbar([0.1, 1], [m for m, _ in at], [e for _, e in at], fmt=style, capsize=3, markerfacecolor="none",
                         label=label)
    for label, style, target in (("causal, the teacher's texts", "0.4", "prefix"), ("one-hot, the teacher's texts", "0.7", "onehot")):
        axes[1].axhline(mean_of(runs, judged, states="teacher", target=target)[0], color=style, label=label)
    for ax in axes[:2]:
        ax.axhline(runs[0]["rows"]["ar 1"]["judge_nll"], color="k", linestyle=":", linewidth=1, label="AR teacher")
        ax.set(xscale="log", ylabel="judge NLL, nats per token")
        ax.legend(fontsize=7)
    axes[0].set(xlabel="tokens of text, millions", title="all the text")
    ticks(axes[0], [0.125, 0.25, 0.5, 1, 2])
    axes[1].set(xlabel="share of the text that the student sees", title="1000 updates")
    ticks(axes[1], [0.1, 1], ["10%", "100%"])
    axes[1].set_ylim(top=5.4)                                          # room for the legend
    gaps = [("before", kept["before"]["docs-b4"])] + [
        (label, [mean_of(runs, lambda r: r["gap"][j], steps=1000, fraction=1, **way)[0] for j in (0, 1)])
        for label, _, way, _ in ways[:3]]
    for j, (label, colour, hatch) in enumerate((("states it visits", "0.35", ""), ("random masks", "0.8", "//"))):
        axes[2].bar([k + 0.4 * j for k in range(len(gaps))], [g[j] for _, g in gaps], 0.4, color=colour, hatch=hatch,
                    edgecolor="k", label=label)
    axes[2].set_xticks([k + 0.2 for k in range(len(gaps))], [label.replace(", ", ",\n") for label, _ in gaps], fontsize=8)
    axes[2].set(ylabel="KL from the AR teacher,\nnats per token", title="1000 updates, all the text")
    axes[2].legend(fontsize=7)
    fig.tight_layout()
    return fig


def blocks(kept):
    """What the causal target costs as blocks grow: judge NLL at one token a step, one seed."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    runs = [r for r in kept["runs"] if (r["data"], r["order"], r["fraction"], r["seed"]) == ("docs", "spread", 1, 0) and r["lr"] < 0.01]
    sizes = {0: 64}                                             # --block 0 is the context
    ways = (("OPDLM, the better rate", "ko-", dict(method="opdlm", whole=0, steps=1000, student="ar")),
            ("causal, random masks", "ks:", dict(method="prefix", states="data", steps=1000, student="ar", lr=0.006)),
            ("plain", "k^--", dict(method="plain", steps=1000, student="ar", lr=0.006)))
    after = (("OPDLM on whole rollouts", "ko-", dict(target="prefix", whole=1, steps=200)),
             ("TCS on whole rollouts", "kD-.", dict(target="topk", whole=1, steps=200)), ("before", *ways[1][1:]))
    for ax, series, title in ((axes[0], ways, "1000 updates from the AR weights"),
                              (axes[1], after, "200 more, from the causal student")):
        for label, style, want in series:
            found = [(sizes.get(r["block"], r["block"]), r) for r in runs if all(r[k] == v for k, v in want.items())]
            nll = {}
            for b, r in found:
                if f"spread {b}" in r["rows"]:
                    nll.setdefault(b, []).append(r["rows"][f"spread {b}"]["judge_nll"])
            ax.plot(sorted(nll), [min(nll[b]) for b in sorted(nll)], style, markerfacecolor="none", label=label)
        ax.axhline(runs[0]["rows"]["ar 1"]["judge_nll"], color="k", linestyle=":", linewidth=1, label="AR teacher")
        ax.set(xscale="log", xlabel="block length, tokens", ylabel="judge NLL, nats per token", title=title)
        ticks(ax, [4, 16, 64])
        ax.legend(fontsize=8)
    fig.tight_layout()
    return fig


def read(name):
    """What assets/NAME.json holds."""
    return json.loads((HERE / f"{name}.json").read_text())


PICTURES = {"quality": (quality, "main-job"), "parallel": (parallel, "parallel"), "estimators": (estimators, "estimators"),
            "tcs": (tcs, "tcs"), "opdlm": (opdlm, "opdlm"), "blocks": (blocks, "opdlm")}    # picture: what draws it, and from which file

if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    from train_teacher import save_figure
    for name, (draw, source) in PICTURES.items():
        save_figure(draw(read(source)), HERE / f"{name}.png")
        print(f"assets/{name}.png from assets/{source}.json")
