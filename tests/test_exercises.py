"""Exercises: solutions pass, holes are told apart from errors, and each wrong answer hears what is wrong with it."""
import ast
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

import checks  # noqa: E402
import dlm  # noqa: E402

SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))


def code_cells(path):
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


def exercises(path):
    """{name: source} of the functions that the cells of a notebook with the same name as a check's define."""
    sources = ["".join(c["source"]) for c in code_cells(path)]
    found = {m[1]: s for s in sources if (m := re.match(r"def (\w+)\(", s)) and hasattr(checks, "check_" + m[1])}
    assert len(found) >= 4
    return found


def define(source):
    names = {"itertools": itertools, "math": math, "torch": torch}
    exec(source, names)
    return next(f for name, f in names.items() if hasattr(checks, "check_" + name))


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_solutions_pass_and_holes_are_told(path, capsys):
    holes, solved = exercises(NOTEBOOKS / path.name), exercises(path)
    assert holes.keys() == solved.keys()
    for name in solved:
        check = getattr(checks, "check_" + name)
        check(define(solved[name]))
        assert capsys.readouterr().out == f"{name}: right\n"
        assert isinstance(ast.parse(holes[name]).body[0].body[-1].value, ast.Constant)      # the hole is `...`
        with pytest.raises(checks.NotDone, match="not done yet"):
            check(define(holes[name]))
        with checks.attempt():
            check(define(holes[name]))
        assert capsys.readouterr().out == f"{name}: not done yet\n"


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_solutions_are_committed_as_they_ran(path):
    cells = code_cells(path)
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    said = ["".join(o["text"]) for c in cells for o in c["outputs"]]
    assert said == [f"{name}: right\n" for name in exercises(path)]
    assert "/tmp" not in path.read_text(encoding="utf-8")


def all_steps(L, N):
    """Every step may break the row: by all ways to deal L tokens to N steps, one token after the other."""
    share = {(0,) * N: 1.0}
    for _ in range(L):
        new = {}
        for sizes, p in share.items():
            for n in range(N):
                after = tuple(sorted(s + (i == n) for i, s in enumerate(sizes)))
                new[after] = new.get(after, 0) + p / N * (0.5 if sizes[n] else 1)
        share = new
    return sum(share.values())


def binomial(L, N, k):
    return math.comb(L, k) / N ** k * (1 - 1 / N) ** (L - k)


def cosine(L, N, rounded=math.floor):
    return [rounded(L * math.cos(math.pi * n / (2 * N))) for n in range(N)] + [0]


def revealed(hidden):
    return [a - b for a, b in zip(hidden, hidden[1:])]


def least(score, n):
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.argsort(-1)[..., :n], True)


def whole_batch(said, given, n):
    return least(torch.where(given, 2.0, said).flatten(), n).view(said.shape)


def among(p, hidden):
    return torch.where(hidden, torch.distributions.Categorical(p).entropy(), 9)


def scored(p, s, candidates):
    keep = torch.zeros(len(p)).scatter(0, torch.as_tensor(candidates), 1.0)
    return keep * (p + s).exp() / (keep * (p + s).exp()).sum()


def one_hot_unless(p, s, x_i, candidates):
    return scored(p, s, candidates) if x_i in candidates else torch.eye(len(p))[x_i]


def variances(j):
    c = j / j.sum(0)
    return 1 - (j.sum(1) ** 2).sum(), (j.sum(0) * c ** 2).sum() - (j.sum(1) ** 2).sum()


def drawn_mean(chance, weight, K):
    """Of K letters drawn with these chances, the mean of each letter's share of the weight."""
    places = torch.cartesian_prod(*[torch.arange(len(chance))] * K).view(-1, K)
    share = weight[places] / weight[places].sum(1, keepdim=True) * chance[places].prod(1, keepdim=True)
    return torch.zeros(len(chance)).index_add(0, places.flatten(), share.flatten())


def apart(chance, weight):
    """Two different letters."""
    mean = torch.zeros(len(chance))
    for v in range(len(chance)):
        for w in range(len(chance)):
            if v != w:
                p = chance[v] * chance[w] / (1 - chance[v]) / (weight[v] + weight[w])
                mean[v] += p * weight[v]
                mean[w] += p * weight[w]
    return mean


def after(model, z, first, drawn):
    later = torch.where(first, drawn, z)
    return model(later, later).exp()


def halved(first, last, k):
    steps = [first // k ** n for n in range(20) if first // k ** n >= max(1, last)]
    return [list(pair) for pair in zip(steps, steps[1:])]


def kl(p, q):
    return torch.xlogy(p, p).sum() - torch.xlogy(p, q).sum()


def moving(w, decay):
    powers = decay ** torch.arange(len(w) - 1, -1, -1)
    return (powers[:, None] * torch.cat([w[:1], (1 - decay) * w[1:]])).sum(0)


def product(j):
    return j.sum(1)[:, None] * j.sum(0)[None]


def behind(x, y, b, say):
    """say(text) (1, L, V) at each block of y behind x's earlier ones."""
    return torch.cat([say(torch.cat([x[:, :k], y[:, k:]], 1))[:, k:k + b] for k in range(0, x.size(1), b)], 1)


def masked_at(source, text, b):
    """p(x_i | x_<i, rest of the block), one hidden token after the other."""
    source.b = b
    out = [source(text, torch.where(torch.arange(text.size(1)) == i, source.V, text)).exp()[:, i] for i in range(text.size(1))]
    source.b = 1
    return torch.stack(out, 1)


def moment(states, when):
    return states[when.expand(states.size(1)), torch.arange(states.size(1))]


def grid(rule):
    """A mask (L, L), entry by entry: rule(i, j, b)."""
    return lambda L, b: torch.tensor([[bool(rule(i, j, b)) for j in range(L)] for i in range(L)])


def integral(f):
    """The integral of f from 0 to 1, by the midpoint rule."""
    return sum(f((k + 0.5) / 4000) for k in range(4000)) / 4000


def mean_over_m(f):
    return lambda n: sum(f(m, n) for m in range(1, n + 1)) / n


def slope(f, s, h=1e-5):
    return (f(s + h) - f(s - h)) / (2 * h)


def alpha(s):
    return math.cos(math.pi * s / 2)


WRONG = {
    "depends_on": [
        (grid(lambda i, j, b: j // b <= i // b), "its own prediction does not depend on it"),
        (grid(lambda i, j, b: j < i), "this is causal everywhere"),
        (grid(lambda i, j, b: j <= i), "causal, and token i sees itself"),
        (grid(lambda i, j, b: j != i), "that is b = L"),
        (grid(lambda i, j, b: j < i - i % b), "earlier blocks only"),
        (grid(lambda i, j, b: j // b == i // b and j != i), "its own block only"),
        (grid(lambda i, j, b: j >= i - i % b and j != i), "turned round"),
        (grid(lambda i, j, b: j < i + b and j != i), "does not slide"),
        (lambda L, b: torch.tril(torch.ones(L, L), -1), "a mask of True and False is wanted"),
        (lambda L, b: torch.ones(L, L, dtype=torch.bool), "for 5, 2 it should be ..False, True, False.*you return")],
    "set_weight": [
        (lambda n, m: 1 / (n * math.comb(n, m)), "this is the chance of the set;"),
        (lambda n, m: n / (m * math.comb(n, m)), "1/n is the chance of m"),
        (lambda n, m: 1 / (n * m * math.comb(n, m)), "the factor n is missing"),
        (lambda n, m: 1 / m, "take one"),
        (lambda n, m: 1 / math.comb(n, m), "among those of its size"),
        (lambda n, m: integral(lambda t: t ** m * (1 - t) ** (n - m)), "the factor 1/t is missing"),
        (lambda n, m: integral(lambda t: t ** (n - m - 1) * (1 - t) ** m), "exchanged"),
        (lambda n, m: m * math.comb(n, m), "the other way up"),
        (lambda n, m: 1 / (m + 1), "for 4, 2 it should be 0.08333, you return 0.3333")],
    "both_hidden": [
        (lambda n: mean_over_m(lambda m, n: m / n)(n) ** 2, "they are not independent"),
        (mean_over_m(lambda m, n: m / n), "one of them is hidden"),
        (lambda n: integral(lambda t: t ** 2), "m starts at 1"),
        (lambda n: 0.25, "not n/2 but uniform"),
        (mean_over_m(lambda m, n: (n - m) * (n - m - 1) / n / (n - 1)), "neither is hidden"),
        (mean_over_m(lambda m, n: (m / n) ** 2), "puts the first token back"),
        (lambda n: sum(m * (m - 1) / n / (n - 1) for m in range(1, n + 1)), "divide by n"),
        (lambda n: 0.51, "for 4 it should be 0.4167, you return 0.51")],
    "cosine_weight": [
        (lambda s: slope(alpha, s) / (1 - alpha(s)), "the sign is wrong"),
        (lambda s: 1 / (1 - alpha(s)), "dt/ds is missing"),
        (lambda s: -slope(alpha, s), "the 1/t is missing"),
        (lambda s: 1 / s, "the straight line"),
        (lambda s: math.sin(math.pi * s / 2) / (1 - alpha(s)), "the inner derivative"),
        (lambda s: -slope(alpha, s) / alpha(s), "not by alpha"),
        (lambda s: math.pi / 2 * alpha(s) / (1 - alpha(s)), "a cosine is a sine"),
        (lambda s: slope(lambda s: math.sin(math.pi * s / 2), s) / math.sin(math.pi * s / 2), "this is for sin"),
        (lambda s: -(1 - alpha(s)) / slope(alpha, s), "the other way up"),
        (lambda s: 0.85, "for 0.3 it should be 6.543, you return 0.85")],
    "perplexity_per_character": [
        (lambda nll, c: math.exp(nll), "the perplexity per token"),
        (lambda nll, c: nll / c, "these are nats per character"),
        (lambda nll, c: math.exp(nll) / c, "divide before the exponential"),
        (lambda nll, c: math.exp(nll * c), "fewer nats, not more"),
        (lambda nll, c: 2 ** (nll / c), "not of base 2"),
        (lambda nll, c: math.exp(-nll / c), "the sign is wrong"),
        (lambda nll, c: math.log2(math.exp(nll / c)), "these are bits per character"),
        (lambda nll, c: 3.0, "for 2.8, 2.5 it should be 3.065, you return 3")],
    "expected_calls": [
        (lambda L, N: N * (1 - 1 / N) ** L, "these are the empty steps"),
        (lambda L, N: 1 - (1 - 1 / N) ** L, "the chance that one step is not empty"),
        (lambda L, N: N, "some steps are empty"),
        (lambda L, N: L, "one call a token"),
        (lambda L, N: L * (1 - (1 - 1 / L) ** N), "L and N are exchanged"),
        (lambda L, N: N * binomial(L, N, 1), "exactly one token"),
        (lambda L, N: 3.5, "for 8, 4 it should be 3.6, you return 3.5")],
    "whole_rows": [
        (lambda k: 0.5 ** k, "one factor 1/2 too many"),
        (lambda k: 1 - 0.5 ** (k - 1), "share of broken rows"),
        (lambda k: 2 ** (k - 1), "upside down"),
        (lambda k: 0.1 ** (k - 1), "not 10 letters but 2"),
        (lambda k: 1 / k, "linear in k"),
        (lambda k: 0.3, "for 3 it should be 0.25, you return 0.3"),
        (lambda k: "a half", "a number, a list or a tensor is wanted")],
    "mean_whole_rows": [
        (lambda L, N: sum(binomial(L, N, k) * 2.0 ** (1 - k) for k in range(L + 1)), "a step of no tokens"),
        (lambda L, N: sum(binomial(L, N, k) * 2.0 ** (1 - k) for k in range(1, L + 1)), "sum over the first step only"),
        (lambda L, N: sum(binomial(L, N, k) * 2.0 ** (1 - k) for k in range(1, L + 1)) / (1 - binomial(L, N, 0)),
         "spreads the tokens over fewer steps"),
        (lambda L, N: 0.5 ** (L / N - 1), "share at the mean size"),
        (all_steps, "later ones cost nothing"),
        (lambda L, N: 0.5, "for 8, 4 it should be 0.5265, you return 0.5")],
    "entropy_of_each": [
        (lambda p: torch.xlogy(p, p).sum(-1), "sign swapped: .* should be .0.8018, 1.089., you return .-0.8018, -1.0"),
        (lambda p: -torch.xlogy(p, p).sum(-1) / math.log(2), "in bits"),
        (lambda p: -(p * p.log()).sum(-1), "0 log 0 counts as 0"),
        (lambda p: -torch.xlogy(p, p).sum(0), "the last axis, not over the tokens"),
        (lambda p: -torch.xlogy(p, p).sum(), "not over everything"),
        (lambda p: -torch.xlogy(p, p).mean(-1), "do not average"),
        (lambda p: (-torch.xlogy(p, p).sum(-1)).exp(), "is its logarithm"),
        (lambda p: p.amax(-1), "you return .0.7, 0.4."),
        (lambda p: p, "shape .2,. is wanted, not .2, 3.")],
    "surest_tokens": [
        (lambda p, hidden, k: least(torch.distributions.Categorical(p).entropy(), k), "not hidden can not be revealed"),
        (lambda p, hidden, k: least(torch.where(hidden, -among(p, hidden), 9), k) & hidden, "least sure"),
        (lambda p, hidden, k: least(torch.where(hidden, -p.amax(-1), 9), k) & hidden, "order by confidence"),
        (lambda p, hidden, k: least(among(p, hidden), k + 1) & hidden, "one token too many"),
        (lambda p, hidden, k: among(p, hidden).argsort()[:k], "the tokens' numbers"),
        (lambda p, hidden, k: least(among(p, hidden), k).long(), "True and False is wanted"),
        (lambda p, hidden, k: hidden, "you return .True, False, True, True, True.")],
    "cosine_counts": [
        (lambda L, N: revealed(cosine(L, N))[::-1], "turned round"),
        (lambda L, N: cosine(L, N)[1:], "still hidden, the numbers revealed are the differences"),
        (lambda L, N: [L - h for h in cosine(L, N)[1:]], "revealed in all"),
        (lambda L, N: revealed([int(L * (1 - math.sin(math.pi * n / (2 * N)))) for n in range(N + 1)]), "a sine"),
        (lambda L, N: [L // N] * N, "straight line"),
        (lambda L, N: revealed(cosine(L, N, math.ceil)), "rounded down, not up"),
        (lambda L, N: revealed(cosine(L, N, round)), "not to the nearest"),
        (lambda L, N: revealed(cosine(L, N)[:-1]), "last step must reveal all that is left"),
        (lambda L, N: [0] + revealed(cosine(L, N)), "no entry for step 0"),
        (lambda L, N: [1, 2, 3, 2], "should be .1, 2, 2, 3., you return .1, 2, 3, 2.")],
    "hide_again": [
        (lambda said, given, n: least(said, n), "given tokens never change"),
        (lambda said, given, n: least(torch.where(given, 2, -said), n), "these are the likeliest"),
        (lambda said, given, n: whole_batch(said, given, 2 * n), "each row for itself"),
        (lambda said, given, n: whole_batch(said, given, n), "n tokens of every row, not of the whole batch"),
        (lambda said, given, n: torch.where(given, 2, said).argsort(1) < n, "its argsort says which place"),
        (lambda said, given, n: ~given, "for .*you return")],
    "score_by_hand": [
        (lambda prefix, suffix: prefix.exp(), "the prefix alone"),
        (lambda prefix, suffix: suffix.exp() / suffix.exp().sum(), "the suffix alone"),
        (lambda prefix, suffix: prefix.exp() * suffix.exp(), "does not add up to 1.*should be .0.2874.*return .0.05"),
        (lambda prefix, suffix: (prefix + suffix).log_softmax(-1), "these are logarithms, probabilities are wanted"),
        (lambda prefix, suffix: prefix + suffix, "do not belong to probabilities"),
        (lambda prefix, suffix: (prefix.exp() + suffix.exp()) / (1 + suffix.exp().sum()), "you add probabilities"),
        (lambda prefix, suffix: (prefix - suffix).softmax(-1), "you divide by the suffix"),
        (lambda prefix, suffix: (prefix.exp() * suffix.exp()).softmax(-1), "softmax of probabilities"),
        (lambda prefix, suffix: torch.ones(3) / 3, "you return .0.3333, 0.3333, 0.3333.")],
    "score_of_candidates": [
        (lambda p, s, x_i, K: scored(p, s, p.topk(K).indices), "then the target is one-hot x_i"),
        (lambda p, s, x_i, K: scored(p, s, [*p.topk(K).indices, x_i]), "one more candidate; that biases"),
        (lambda p, s, x_i, K: scored(p, s, [*p.topk(K - 1 + (x_i in p.topk(K).indices)).indices, x_i]),
         "takes a candidate's place"),
        (lambda p, s, x_i, K: scored(p, s, p.topk(K).indices) * (x_i in p.topk(K).indices), "you return nothing"),
        (lambda p, s, x_i, K: torch.eye(5)[x_i], "always one-hot"),
        (lambda p, s, x_i, K: one_hot_unless(p, s, x_i, s.topk(K).indices), "not under the suffix"),
        (lambda p, s, x_i, K: one_hot_unless(p, s, x_i, (p + s).topk(K).indices), "not known before they are chosen"),
        (lambda p, s, x_i, K: (p + s).softmax(-1), "all letters are candidates"),
        (lambda p, s, x_i, K: torch.where(one_hot_unless(p, s, x_i, p.topk(K).indices) == 1, 1.0, torch.where(
            one_hot_unless(p, s, x_i, p.topk(K).indices) > 0, (p + s).softmax(-1), 0.0)), "not over all letters"),
        (lambda p, s, x_i, K: one_hot_unless(p, s, x_i, (-p).topk(K).indices), "the least likely letters"),
        (lambda p, s, x_i, K: p.topk(K).indices, "shape .5,. is wanted, not .3,.")],
    "two_variances": [
        (lambda j: torch.stack(variances(j)[::-1]), "the other way round"),
        (lambda j: torch.stack([torch.tensor(1.0), (j.sum(0) * (j / j.sum(0)) ** 2).sum()]), "these are second moments"),
        (lambda j: torch.stack([variances(j)[0], (j / j.sum(0)).var(1, unbiased=False).sum()]), "not all alike likely"),
        (lambda j: torch.stack([variances(j)[0], ((j / j.sum(0) - j.sum(1, keepdim=True)) ** 2).mean(1).sum()]),
         "not only in the mean"),
        (lambda j: torch.stack(variances(j)) / 3, "do not average"),
        (lambda j: torch.stack(variances(j)) ** 0.5, "standard deviations"),
        (lambda j: torch.stack([variances(j)[0], variances(j)[0] - variances(j)[1]]), "left when the rest is known"),
        (lambda j: torch.stack(variances(j.T)), "letters are the rows"),
        (lambda j: [0.5, 0.1], "you return .0.5, 0.1.")],
    "gradient_score": [
        (lambda p, g, E, x_i: (E @ g).softmax(-1), "forgot the prefix"),
        (lambda p, g, E, x_i: (p - E @ g).softmax(-1), "wrong sign"),
        (lambda p, g, E, x_i: (p + E[x_i] @ g).softmax(-1), "this is the prefix alone"),
        (lambda p, g, E, x_i: (p + E @ g).log_softmax(-1), "these are logarithms"),
        (lambda p, g, E, x_i: (p + (E - E[x_i]) @ g).exp(), "does not add up to 1"),
        (lambda p, g, E, x_i: (p.exp() + (E - E[x_i]) @ g).softmax(-1), "you added it to probabilities"),
        (lambda p, g, E, x_i: p + (E - E[x_i]) @ g, "not yet normalised"),
        (lambda p, g, E, x_i: g, "shape .3,. is wanted, not .2,.")],
    "mean_of_sampled": [
        (lambda p, s, K: (p + s).softmax(-1), "this is the score itself"),
        (lambda p, s, K: p.exp(), "this is the prefix"),
        (lambda p, s, K: drawn_mean(p.exp(), (p + s).exp(), K), "the prefix counts twice"),
        (lambda p, s, K: drawn_mean(torch.ones(3) / 3, s.exp(), K), "not uniformly"),
        (lambda p, s, K: drawn_mean(torch.ones(3) / 3, (p + s).exp(), K), "uniform draws weighed by the whole score"),
        (lambda p, s, K: apart(p.exp(), s.exp()), "may be drawn again"),
        (lambda p, s, K: K * (p + s).exp(), "divide by their sum:"),
        (lambda p, s, K: (p + s).exp(), "not by K"),
        (lambda p, s, K: drawn_mean(p.exp(), s, K), "not by its logarithm"),
        (lambda p, s, K: s, "it should be .* you return .-2.303")],
    "tokens_a_position": [
        (lambda b, K: K * (b - 1) / 2, "forgot the pass that scores the prefixes"),
        (lambda b, K: 1 + K * (b + 1) / 2, "predicted, never read"),
        (lambda b, K: 1 + K * sum(range(b - 1)) / b, "the candidate itself"),
        (lambda b, K: 1 + K * b, "only what follows the candidate changes, the prefix is kept:"),
        (lambda b, K: 1 + K * (b - 1), "the last token not run"),
        (lambda b, K: 1 + (b - 1) / 2, "a pass of its own"),
        (lambda b, K: b + K * b * (b - 1) / 2, "this is the whole block"),
        (lambda b, K: K + K * (b - 1) / 2, "count it once"),
        (lambda b, K: 20, "for 4, 16 it should be 25, you return 20")],
    "shares_revealed": [
        (lambda t, dt, k: [dt] * k, "of those still hidden it is dt / t"),
        (lambda t, dt, k: [min(1, dt / t)] * k, "time moves on"),
        (lambda t, dt, k: [max(0, 1 - dt / (t - j * dt)) if t - j * dt > dt else 0 for j in range(k)], "stays hidden"),
        (lambda t, dt, k: [min(1, (j + 1) * dt / t) for j in range(k)], "in all, up to each step"),
        (lambda t, dt, k: [dt / (t - j * dt) for j in range(k)], "1 at most.*for 0.3, 0.2, 2.*you return .0.6667, 2."),
        (lambda t, dt, k: [dt / (t - j * dt) if t - j * dt >= dt else 0 for j in range(k)], "not none"),
        (lambda t, dt, k: [min(1, dt / (t + j * dt)) for j in range(k)], "time runs down"),
        (lambda t, dt, k: [0.5] * k, "you return .0.5, 0.5.")],
    "two_step_target": [
        (lambda m, z, first, drawn: m(z, z).exp(), "this is the target for k = 1"),
        (lambda m, z, first, drawn: after(m, z, first, drawn), "keeps the distribution it was drawn from"),
        (lambda m, z, first, drawn: torch.where(first[..., None], after(m, z, first, drawn), m(z, z).exp()),
         "the other way round"),
        (lambda m, z, first, drawn: torch.where(first[..., None], torch.eye(3)[drawn], after(m, z, first, drawn)),
         "the letter itself is no target"),
        (lambda m, z, first, drawn: torch.where(first[..., None], m(z, z).exp(), after(m, z, z == 3, drawn)),
         "only the tokens of `first`"),
        (lambda m, z, first, drawn: torch.where(first[..., None], m(z, z), after(m, z, first, drawn).log()),
         "these are logarithms"),
        (lambda m, z, first, drawn: (m(z, z).exp() + after(m, z, first, drawn)) / 2, "a mean of both"),
        (lambda m, z, first, drawn: torch.where(first[..., None], m(z, z).exp(), after(m, z, first, drawn))[0],
         "keep the first axis"),
        (lambda m, z, first, drawn: torch.ones(1, 4, 3) / 3, "it should be .*you return")],
    "steps_of_each_round": [
        (lambda first, last, k: halved(first, last // k, k), "one round too many"),
        (lambda first, last, k: halved(first, last * k, k), "one round too few"),
        (lambda first, last, k: [r[::-1] for r in halved(first, last, k)], "the other way round"),
        (lambda first, last, k: [[first, r[1]] for r in halved(first, last, k)], "not always the first"),
        (lambda first, last, k: [[n, n - k] for n in range(first, last, -k)], "it does not take k away"),
        (lambda first, last, k: [r[1] for r in halved(first, last, k)], "students' steps only"),
        (lambda first, last, k: [r[0] for r in halved(first, last, k)], "teachers' steps only"),
        (lambda first, last, k: len(halved(first, last, k)), "the number of rounds"),
        (lambda first, last, k: halved(first, last, 2), "not always two.*for 64, 4, 4"),
        (lambda first, last, k: halved(first, last, k)[::-1], "from the many steps to the few"),
        (lambda first, last, k: [[first, last]], "you return ..16, 2..")],
    "two_divergences": [
        (lambda p, q: [(p * (p / q).log()).sum(), (p - q).abs().sum() / 2],
         "your KL has its arguments swapped, .*should be .0.6758, 0.5., you return .0.6349, 0.5."),
        (lambda p, q: [-(q * (q / p).log()).sum(), (p - q).abs().sum() / 2], "wrong sign"),
        (lambda p, q: [(q * (q / p).log2()).sum(), (p - q).abs().sum() / 2], "in bits"),
        (lambda p, q: [-(q * p.log()).sum(), (p - q).abs().sum() / 2], "cross-entropy"),
        (lambda p, q: [torch.xlogy(q, q / p).sum(), (p - q).abs().sum()], "lacks the factor 1/2"),
        (lambda p, q: [torch.xlogy(q, q / p).sum(), (p - q).square().sum()], "squares the differences:"),
        (lambda p, q: [torch.xlogy(q, q / p).sum(), (p - q).square().sum() / 2], "and halves them"),
        (lambda p, q: [torch.xlogy(q, q / p).sum(), (p / q).log().abs().sum() / 2], "not of their logarithms"),
        (lambda p, q: [torch.xlogy(q, q / p).sum(), (p - q).sum() / 2], "no absolute value"),
        (lambda p, q: [(p - q).abs().sum() / 2, torch.xlogy(q, q / p).sum()], "reverse KL comes first"),
        (lambda p, q: [(q * (q / p).log()).sum(), (p - q).abs().sum() / 2], "0 log 0"),
        (lambda p, q: [0.5, 0.5], "you return .0.5, 0.5.")],
    "jensen_shannon": [
        (lambda p, q: (kl((p + q) / 2, p) + kl((p + q) / 2, q)) / 2, "your KL has its arguments swapped"),
        (lambda p, q: (kl(p, q) + kl(q, p)) / 2, "mean of forward and reverse"),
        (lambda p, q: kl(p, (p + q) / 2) + kl(q, (p + q) / 2), "this is the sum"),
        (lambda p, q: kl(p, (p + q) / 2), "KL.q .. m. counts as well"),
        (lambda p, q: kl(q, (p + q) / 2), "KL.p .. m. counts as well"),
        (lambda p, q: kl(p, (p + q) / 2) / 2, "this one is halved"),
        (lambda p, q: (kl(p, p + q) + kl(q, p + q)) / 2, "not p . q:"),
        (lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2 / math.log(2), "in bits"),
        (lambda p, q: ((kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2) ** 0.5, "square root"),
        (lambda p, q: (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()).sum() / 2, "0 log 0"),
        (lambda p, q: 0.2, "it should be 0.1514, you return 0.2")],
    "average_of_weights": [
        (lambda w, decay: moving(w, 1 - decay), "turned round"),
        (lambda w, decay: w[-1], "nothing was averaged"),
        (lambda w, decay: w[0], "nothing moved"),
        (lambda w, decay: w.mean(0), "a plain mean"),
        (lambda w, decay: moving(torch.cat([w[:1] * 0, w[1:]]), decay), "not at zero"),
        (lambda w, decay: moving(torch.cat([w[:1] * 0, w]), decay), "counted row 0 again"),
        (lambda w, decay: moving(w[-2:], decay), "only the last step: the average runs over all rows:"),
        (lambda w, decay: decay * w[0] + (1 - decay) * w[-1], "not only the first and the last"),
        (lambda w, decay: moving(w, decay) / (1 - decay ** 3), "no correction is wanted"),
        (lambda w, decay: w, "shape .2,. is wanted")],
    "cost_of_one_step": [
        (lambda j: kl(product(j).flatten(), j.flatten()), "arguments swapped.*should be 0.1927, you return 0.2231"),
        (lambda j: -torch.xlogy(j, j).sum(), "the entropy of the pair; how much"),
        (lambda j: -torch.xlogy(product(j), product(j)).sum(), "the entropy of the product"),
        (lambda j: -torch.xlogy(j, j / j.sum(1, keepdim=True)).sum(), "one letter given the other"),
        (lambda j: -torch.xlogy(j, j / product(j)).sum(), "wrong sign"),
        (lambda j: torch.xlogy(j, j / product(j)).sum() / math.log(2), "in bits"),
        (lambda j: torch.xlogy(j, j * j.numel()).sum(), "letters' frequencies"),
        (lambda j: (j - product(j)).abs().sum() / 2, "total variation"),
        (lambda j: (j * (j / product(j)).log()).sum(), "0 log 0"),
        (lambda j: -j.max().log(), "the likeliest pair"),
        (lambda j: 0.1, "it should be 0.1927, you return 0.1")],
    "opdlm_target": [
        (lambda teacher, x, y, b: teacher(x, x).exp(), "grades the real text x"),
        (lambda teacher, x, y, b: teacher(y, y).exp(), "not behind y's own"),
        (lambda teacher, x, y, b: behind(x, y, b, lambda t: teacher(t, t)), "these are logarithms"),
        (lambda teacher, x, y, b: dlm.opdlm(teacher, x, y, b)[:, [1, 2, 3, 3]],
         "conditioned on y_<=i.*it should be .*0.51.*you return .*0.2672"),
        (lambda teacher, x, y, b: dlm.opdlm(teacher, x, y, b)[:, [0, 0, 1, 2]], "left out the token just before"),
        (lambda teacher, x, y, b: behind(x, y, b, lambda t: masked_at(teacher, t, b)), "target of TCS"),
        (lambda teacher, x, y, b: dlm.opdlm(teacher, x, y, b)[0], "keep the first axis"),
        (lambda teacher, x, y, b: torch.full((1, 4, 3), 1 / 3), "it should be .*you return")],
    "pick_states": [
        (lambda s: s[-1], "finished texts"),
        (lambda s: moment(s, torch.randint(len(s), s[0, :, 0].shape)), "the finished state is among them"),
        (lambda s: moment(s, torch.randint(1, len(s) - 1, s[0, :, 0].shape)), "the first state, .* is missing"),
        (lambda s: s[0], "always the first"),
        (lambda s: s[2], "the same step for every block, 2 seen"),
        (lambda s: moment(s, (torch.rand(s.size(1)) ** 2 * (len(s) - 1)).long()), "should be 0.25: 0 seen: 0.[45]"),
        (lambda s: s.gather(0, torch.randint(len(s) - 1, s[:1].shape))[0], "a moment for each token"),
        (lambda s: s[torch.randint(len(s) - 1, s[0, :, 0].shape), 0], "states of the first block"),
        (lambda s: s[:-1], "one state for each block is wanted"),
        (lambda s: s[0].flip(0) * 0, "not states of the blocks")],
    "target_and_truth": [
        (lambda start, trans, v: torch.stack([start * trans[:, v] / (start @ trans)[v], start]), "the other way round"),
        (lambda start, trans, v: (start * trans[:, v] / (start @ trans)[v]).expand(2, -1), "the same for every v"),
        (lambda start, trans, v: start.expand(2, -1), "the truth does know"),
        (lambda start, trans, v: torch.stack([start, start * trans[:, v]]), "does not add up to 1"),
        (lambda start, trans, v: torch.stack([start, trans[v]]), "stands in a column"),
        (lambda start, trans, v: torch.stack([start, start * trans[v] / (start @ trans[v])]), "stands in a column"),
        (lambda start, trans, v: torch.stack([start, trans[:, v] / trans[:, v].sum()]), "how likely each x_0 was"),
        (lambda start, trans, v: trans[:2], "you return")],
    "weight_after": [
        (lambda w, n: w, "that is TCS"),
        (lambda w, n: 0.5, "0.5 is where it ends"),
        (lambda w, n: 0.5 + (w - 0.5) / n, "turned round"),
        (lambda w, n: w + (0.5 - w) / (n + 1), "counted the given letter"),
        (lambda w, n: (w + 0.5) / 2, "half way"),
        (lambda w, n: (0.5 - w) / n, "this is the change"),
        (lambda w, n: 0.3, "for 0.9, 3 it should be 0.7667, you return 0.3")],
    "tokens_of_an_update": [
        (lambda L, b: [L, L + b * L], "forgot the clean tokens:"),
        (lambda L, b: [2 * L - b, 2 * L - b + b * L], "reads while it writes"),
        (lambda L, b: [2 * L, 3 * L + b * L], "nobody's earlier block"),
        (lambda L, b: [2 * L - b, (b + 1) * (2 * L - b)], "run once while writing"),
        (lambda L, b: [2 * L - b, L - b + b * L], "the update itself comes on top"),
        (lambda L, b: [2 * L - b, 3 * L - 2 * b + L * L], "in b steps, not in L"),
        (lambda L, b: [2 * L - b, 2 * L - b], "writing costs nothing"),
        (lambda L, b: [1, 2], "for 32, 4 it should be .60, 216., you return .1, 2.")],
}


@pytest.mark.parametrize("name, k", [(name, k) for name, wrong in WRONG.items() for k in range(len(wrong))])
def test_a_wrong_answer_hears_what_is_wrong(name, k):
    f, message = WRONG[name][k]
    with pytest.raises(AssertionError, match=message) as e:
        getattr(checks, "check_" + name)(f)
    assert not isinstance(e.value, checks.NotDone)


def test_every_exercise_has_wrong_answers_that_are_told_apart():
    assert {"check_" + name for name in WRONG} == {name for name in dir(checks) if name.startswith("check_")}
    for name, wrong in WRONG.items():
        said = set()
        for f, _ in wrong:
            with pytest.raises(AssertionError) as e:
                getattr(checks, "check_" + name)(f)
            said.add(str(e.value).split(", you return")[0])
        assert len(said) >= len(wrong) - 1 >= 3                       # the last two may differ in what is returned only
