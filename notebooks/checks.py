"""Checks of the notebooks' exercises. Each says what is wrong, not only that something is; an open hole is no error."""
import contextlib
import functools
import itertools
import math

import torch

import dlm


class NotDone(AssertionError):
    """The exercise's function still has its hole."""


@contextlib.contextmanager
def attempt():
    """Around a check in a notebook: an unfilled hole is told and does not stop it, a wrong answer does."""
    try:
        yield
    except NotDone as e:
        print(e)


def compare(f, cases, right, suspects):
    """Prints "right" if f(*case) equals right(*case) in all cases; else says what is wrong in the first that differs.

    suspects: {what one did wrong: a function that does it}. right and they give numbers, lists or tensors."""
    for case in cases:
        got = f(*case)
        if got is None or got is ...:
            raise NotDone(f"{f.__name__}: not done yet")
        try:
            got = torch.as_tensor(got)
        except (TypeError, ValueError, RuntimeError):
            raise AssertionError(f"{f.__name__}: a number, a list or a tensor is wanted, not {got!r}") from None
        want = torch.as_tensor(right(*case))
        if same(got, want):
            continue
        where = f"for {', '.join(map(show, case))} it should be {show(want)}, you return {show(got)}"
        for what, wrong in suspects.items():
            if same(got, torch.as_tensor(wrong(*case))):
                raise AssertionError(f"{f.__name__}: {what}: {where}")
        if got.shape != want.shape:
            raise AssertionError(f"{f.__name__}: shape {tuple(want.shape)} is wanted, not {tuple(got.shape)}: {where}")
        if want.dtype == torch.bool and got.dtype != torch.bool:
            raise AssertionError(f"{f.__name__}: a mask of True and False is wanted: {where}")
        raise AssertionError(f"{f.__name__}: {where}")
    print(f"{f.__name__}: right")


def same(a, b):
    return (a.shape == b.shape and (a.dtype == torch.bool) == (b.dtype == torch.bool)
            and torch.allclose(a.double(), b.double(), rtol=0, atol=1e-4, equal_nan=True))


def show(a):
    a = a.tolist() if isinstance(a, torch.Tensor) else a
    if isinstance(a, list):
        return "[" + ", ".join(map(show, a)) + "]"
    return f"{a:.4g}" if isinstance(a, float) else str(a)


# ----------------------------------------------------------------------------------------------------------
# 1_one_flag

def check_depends_on(f):
    """f(L, b): mask of what the prediction of a hidden token i (row) may depend on, with blocks of b: (L, L)."""
    def grid(rule):
        return lambda L, b: rule(torch.arange(L)[:, None], torch.arange(L), b)

    compare(f, [(5, 2), (4, 1), (4, 4), (6, 3)], grid(lambda i, j, b: (j // b <= i // b) & (i != j)), {
        "token i is hidden, its own prediction does not depend on it": grid(lambda i, j, b: j // b <= i // b),
        "this is causal everywhere, whatever b; inside its block a token sees to its right too":
            grid(lambda i, j, b: (j < i) | (j < 0)),
        "causal, and token i sees itself; inside its block it sees to its right too, and not itself":
            grid(lambda i, j, b: j <= i),
        "everything sees everything, that is b = L; what stands right of the block is not seen":
            grid(lambda i, j, b: i != j),
        "earlier blocks only, a token sees the others of its own block too": grid(lambda i, j, b: j // b < i // b),
        "its own block only, earlier blocks are seen too": grid(lambda i, j, b: (j // b == i // b) & (i != j)),
        "turned round, rows are predictions and columns what they depend on":
            grid(lambda i, j, b: (i // b <= j // b) & (i != j)),
        "a block is tokens kb to kb + b - 1, it does not slide along with i":
            grid(lambda i, j, b: (j < i + b) & (i != j))})


def check_set_weight(f):
    """f(n, m): the weight in the bound of one set of m hidden tokens, in a block of n."""
    compare(f, [(4, 2), (4, 1), (5, 4), (3, 3)], lambda n, m: 1 / (m * math.comb(n, m)), {
        "this is the chance of the set; the mean over its m tokens, times n, is still to come":
            lambda n, m: 1 / n / math.comb(n, m),
        "divide by n once more, 1/n is the chance of m": lambda n, m: n / m / math.comb(n, m),
        "you have the mean over the tokens, the factor n is missing": lambda n, m: 1 / (m * n * math.comb(n, m)),
        "all sets of m tokens share this, take one": lambda n, m: 1 / m,
        "this is the chance of one set among those of its size, not its weight": lambda n, m: 1 / math.comb(n, m),
        "you integrate t^m (1-t)^(n-m), the factor 1/t is missing":
            lambda n, m: math.factorial(m) * math.factorial(n - m) / math.factorial(n + 1),
        "m and n - m are exchanged, m are hidden":
            lambda n, m: math.factorial(n - m) * math.factorial(m) / math.factorial(n) / max(1, n - m),
        "the other way up": lambda n, m: m * math.comb(n, m)})


def check_both_hidden(f):
    """f(n): the chance that two given tokens of a block of n are both hidden, m uniform on 1..n."""
    compare(f, [(4,), (2,), (3,), (16,)], lambda n: (n + 1) / (3 * n), {
        "this is the square of one token's chance; they share m, so they are not independent":
            lambda n: ((n + 1) / (2 * n)) ** 2,
        "this is the chance that one of them is hidden": lambda n: (n + 1) / (2 * n),
        "m starts at 1, at least one token is hidden; this is with m from 0, or a uniform time": lambda n: 1 / 3,
        "half hidden, m is not n/2 but uniform": lambda n: 1 / 4,
        "this is the chance that neither is hidden": lambda n: (n - 2) / (3 * n),
        "this puts the first token back before the second is hidden, m/n times m/n; it is m/n times (m-1)/(n-1)":
            lambda n: (n + 1) * (2 * n + 1) / (6 * n * n),
        "a mean over m = 1..n, divide by n": lambda n: (n + 1) / 3})


def check_cosine_weight(f):
    """f(s): the weight at time s when each token is hidden with probability 1 - cos(pi/2 s)."""
    def parts(s):
        a = math.pi / 2
        return a, math.sin(a * s), math.cos(a * s)

    def right(s):
        a, sin, cos = parts(s)
        return a * sin / (1 - cos)

    compare(f, [(0.3,), (0.1,), (0.9,)], right, {
        "the sign is wrong, hidden tokens become more with s": lambda s: -right(s),
        "this is 1/t(s), dt/ds is missing": lambda s: right(s) / parts(s)[0] / parts(s)[1],
        "this is dt/ds, the 1/t is missing": lambda s: parts(s)[0] * parts(s)[1],
        "this is 1/s, the weight of the straight line": lambda s: 1 / s,
        "the inner derivative, pi/2, is missing": lambda s: right(s) / parts(s)[0],
        "divide by what is hidden, 1 - alpha, not by alpha": lambda s: parts(s)[0] * parts(s)[1] / parts(s)[2],
        "the derivative of a cosine is a sine": lambda s: parts(s)[0] * parts(s)[2] / (1 - parts(s)[2]),
        "this is for sin(pi/2 s) hidden; here 1 - cos(pi/2 s) are": lambda s: parts(s)[0] * parts(s)[2] / parts(s)[1],
        "the other way up": lambda s: 1 / right(s)})


def check_perplexity_per_character(f):
    """f(nll, chars_per_token): perplexity per character from nats per token."""
    compare(f, [(2.8, 2.5), (1.2, 1.0), (4.0, 4.2)], lambda nll, c: math.exp(nll / c), {
        "this is the perplexity per token": lambda nll, c: math.exp(nll),
        "these are nats per character, perplexity is their exponential": lambda nll, c: nll / c,
        "divide before the exponential; a token's perplexity is the product of its characters', not the sum":
            lambda nll, c: math.exp(nll) / c,
        "a token has several characters, each of them has fewer nats, not more": lambda nll, c: math.exp(nll * c),
        "the nats are of a natural logarithm, not of base 2": lambda nll, c: 2 ** (nll / c),
        "perplexity is above 1, the sign is wrong": lambda nll, c: math.exp(-nll / c),
        "these are bits per character": lambda nll, c: nll / c / math.log(2)})


def check_expected_calls(f):
    """f(L, N): the mean number of N ancestral steps that reveal at least one of L tokens."""
    def busy(L, N):
        return N * (1 - (1 - 1 / N) ** L)

    compare(f, [(8, 4), (64, 64), (3, 1), (5, 20)], busy, {
        "these are the empty steps, the others call the network": lambda L, N: N - busy(L, N),
        "this is the chance that one step is not empty, there are N": lambda L, N: busy(L, N) / N,
        "some steps are empty, and the network is not run in them": lambda L, N: N,
        "one call a token; here several tokens may share a step": lambda L, N: L,
        "L and N are exchanged": lambda L, N: busy(N, L),
        "this is the chance that a step reveals exactly one token, times N":
            lambda L, N: L * (1 - 1 / N) ** (L - 1)})


# ----------------------------------------------------------------------------------------------------------
# 2_parallel

def mean_whole(L, N):
    """The answer of exercise 1: the mean share of whole rows on `branch` in N ancestral steps over L tokens."""
    return 2 * sum((1 - (n - 0.5) / N) ** L - (1 - n / N) ** L for n in range(1, N + 1))


def check_whole_rows(f):
    """f(k): the share of rows of `branch` that k tokens, drawn at once, leave whole."""
    compare(f, [(3,), (2,), (1,), (8,)], lambda k: 2.0 ** (1 - k), {
        "one factor 1/2 too many, the first of the k tokens has nobody to disagree with": lambda k: 2.0 ** -k,
        "this is the share of broken rows, take it from 1": lambda k: 1 - 2.0 ** (1 - k),
        "upside down, a share is at most 1": lambda k: 2.0 ** (k - 1),
        "not 10 letters but 2 are possible once the first letter is given": lambda k: 10.0 ** (1 - k),
        "this is linear in k, but every token more halves the share": lambda k: 1 / k})


def check_mean_whole_rows(f):
    """f(L, N): the mean of 2^-(k-1) over the size k of the first step, of N ancestral ones, that is not empty."""
    def any_first(L, N):                                              # the sum over k > 0 in the first step alone
        return 2 * (1 - 0.5 / N) ** L - 2 * (1 - 1 / N) ** L

    def all_steps(L, N):
        return sum(math.comb(N, j) * 2 ** j * (-1) ** (N - j) * (j / 2 / N) ** L for j in range(N + 1))

    compare(f, [(8, 4), (8, 2), (8, 1), (5, 7)], mean_whole, {
        "the first step may be empty, and then the next one decides; a step of no tokens is not worth 2^-(0-1) = 2":
            lambda L, N: 2 * (1 - 0.5 / N) ** L,
        "you sum over the first step only; where it is empty, the next one decides": any_first,
        "where the first step is empty, the next one decides, and that one spreads the tokens over fewer steps":
            lambda L, N: any_first(L, N) / (1 - (1 - 1 / N) ** L),
        "this is the share at the mean size L/N, not the mean of the shares": lambda L, N: 2.0 ** (1 - L / N),
        "you let every step break the row; later ones cost nothing": all_steps})


def entropy_of(p):
    return torch.special.entr(p).sum(-1)


def check_entropy_of_each(f):
    """f(p): entropies in nats, p (L, V) -> (L,)."""
    cases = [(torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.3, 0.3]]),), (torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]),)]
    compare(f, cases, entropy_of, {
        "your entropy has its sign swapped": lambda p: -entropy_of(p),
        "this is in bits, take the natural logarithm": lambda p: entropy_of(p) / math.log(2),
        "0 log 0 counts as 0 here, not as nan": lambda p: -(p * p.log()).sum(-1),
        "sum over the letters, the last axis, not over the tokens": lambda p: torch.special.entr(p).sum(0),
        "sum over the letters of each token, not over everything": lambda p: torch.special.entr(p).sum(),
        "sum over the letters, do not average": lambda p: torch.special.entr(p).mean(-1),
        "this is the number of letters it hesitates between, the entropy is its logarithm":
            lambda p: entropy_of(p).exp()})


def surest(score, hidden, k):
    """Mask of the k hidden tokens with the largest score, or of all hidden ones if there are fewer."""
    return (score.masked_fill(~hidden, -math.inf).argsort(descending=True).argsort() < k) & hidden


def check_surest_tokens(f):
    """f(p, hidden, k): mask of the k hidden tokens of least entropy; p (L, V), hidden (L,)."""
    p = torch.tensor([[0.6, 0.2, 0.2], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.55, 0.45, 0.0]])
    hidden = torch.tensor([True, False, True, True, True])
    everywhere = torch.ones(5, dtype=torch.bool)
    compare(f, [(p, hidden, 2), (p, hidden, 1), (p, everywhere, 3), (p, hidden, 5)],
            lambda p, hidden, k: surest(-entropy_of(p), hidden, k), {
        "a token that is not hidden can not be revealed": lambda p, hidden, k: surest(-entropy_of(p), everywhere, k),
        "these are the least sure tokens, the surest have the least entropy":
            lambda p, hidden, k: surest(entropy_of(p), hidden, k),
        "this is the order by confidence, the likeliest letter's probability":
            lambda p, hidden, k: surest(p.amax(-1), hidden, k),
        "one token too many, k is how many": lambda p, hidden, k: surest(-entropy_of(p), hidden, k + 1),
        "these are the tokens' numbers, a mask is wanted":
            lambda p, hidden, k: (-entropy_of(p)).masked_fill(~hidden, -math.inf).topk(k).indices})


def check_cosine_counts(f):
    """f(L, N): how many tokens to reveal at each of N steps, when floor(L cos(pi/2 n/N)) are hidden after step n."""
    def reveal(L, hidden):
        return [a - b for a, b in zip([L, *hidden], hidden)]

    def cosine(L, N, rounded=math.floor):
        return [rounded(L * math.cos(math.pi / 2 * n / N)) for n in range(1, N)] + [0]

    compare(f, [(8, 4), (64, 5), (6, 1), (3, 6)], lambda L, N: reveal(L, cosine(L, N)), {
        "turned round, few tokens come first and many last": lambda L, N: reveal(L, cosine(L, N))[::-1],
        "these are the tokens still hidden, the numbers revealed are the differences": cosine,
        "this is how many are revealed in all, the numbers of each step are the differences":
            lambda L, N: [L - h for h in cosine(L, N)],
        "this is a sine, many first; the cosine says what is still hidden":
            lambda L, N: reveal(L, [math.floor(L * (1 - math.sin(math.pi / 2 * n / N))) for n in range(1, N + 1)]),
        "equally many at each step, this is the straight line":
            lambda L, N: reveal(L, [L * (N - n) // N for n in range(1, N + 1)]),
        "the hidden ones are rounded down, not up": lambda L, N: reveal(L, cosine(L, N, math.ceil)),
        "the hidden ones are rounded down, not to the nearest": lambda L, N: reveal(L, cosine(L, N, round)),
        "the last step must reveal all that is left": lambda L, N: reveal(L, cosine(L, N)[:-1]),
        "N steps from the start, no entry for step 0": lambda L, N: [0, *reveal(L, cosine(L, N))]})


def check_hide_again(f):
    """f(said, given, n): mask of the n tokens of each row drawn with the least probability, but not given ones."""
    def least(said, n):
        return said.argsort(dim=1).argsort(dim=1) < n

    said = torch.tensor([[0.9, 0.2, 0.1, 0.7, 0.4], [0.1, 0.28, 0.15, 0.05, 0.18]])
    given = torch.tensor([[False, False, True, False, False], [True, False, False, False, False]])
    nothing = torch.zeros_like(given)
    compare(f, [(said, given, 2), (said, nothing, 2), (said, given, 1)],
            lambda said, given, n: least(said.masked_fill(given, 2), n), {
        "given tokens never change": lambda said, given, n: least(said, n),
        "these are the likeliest, hide what was drawn with the least probability":
            lambda said, given, n: least((-said).masked_fill(given, 2), n),
        "n tokens of every row, each row for itself, not n times the rows of the whole batch": lambda said, given, n:
            least(said.masked_fill(given, 2).view(1, -1), n * len(said)).view(said.shape),
        "n tokens of every row, not of the whole batch": lambda said, given, n:
            least(said.masked_fill(given, 2).view(1, -1), n).view(said.shape),
        "argsort says which token is the k-th, its argsort says which place a token has": lambda said, given, n:
            said.masked_fill(given, 2).argsort(dim=1) < n})


# ----------------------------------------------------------------------------------------------------------
# 3_tcs

def check_score_by_hand(f):
    """f(prefix, suffix): the concrete score from log p(v | x_<i) and log p(x_>i | x_<i, v), both (V,) -> (V,)."""
    first = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.4, 0.02]).log()
    second = torch.tensor([0.1, 0.6, 0.2, 0.1]).log(), torch.tensor([0.2, 0.001, 0.3, 0.0]).log()
    compare(f, [first, second], lambda prefix, suffix: (prefix + suffix).softmax(-1), {
        "this is the prefix alone, but what follows has a say too": lambda prefix, suffix: prefix.exp(),
        "this is the suffix alone, the prefix counts as well": lambda prefix, suffix: suffix.softmax(-1),
        "it does not add up to 1, divide by the sum over all letters": lambda prefix, suffix: (prefix + suffix).exp(),
        "these are logarithms, probabilities are wanted": lambda prefix, suffix: (prefix + suffix).log_softmax(-1),
        "these are logarithms that do not belong to probabilities yet": lambda prefix, suffix: prefix + suffix,
        "you add probabilities, but both must happen: multiply them, or add their logarithms":
            lambda prefix, suffix: (prefix.exp() + suffix.exp()) / (prefix.exp() + suffix.exp()).sum(),
        "you divide by the suffix's probability, multiply by it": lambda prefix, suffix: (prefix - suffix).softmax(-1),
        "a softmax of probabilities, take it of their logarithms":
            lambda prefix, suffix: (prefix + suffix).exp().softmax(-1)})


def check_score_of_candidates(f):
    """f(prefix, suffix, x_i, K): the target with the K likeliest letters under the prefix as candidates: (V,)."""
    prefix = torch.tensor([0.35, 0.1, 0.3, 0.05, 0.2]).log()
    suffix = torch.tensor([0.07, 0.5, 0.08, 0.6, 0.06]).log()

    def among(candidates, prefix=prefix, suffix=suffix):
        return (prefix + suffix).masked_fill(~candidates, -math.inf).softmax(-1)

    def best(score, K):
        return torch.zeros(len(score), dtype=torch.bool).scatter(0, score.topk(K).indices, True)

    def own(score, x_i):
        return torch.arange(len(score)) == x_i

    def missed(by, otherwise=None, where=best):
        """One-hot where x_i is no candidate by this score, or what `otherwise` says."""
        def answer(prefix, suffix, x_i, K):
            candidates = where(by(prefix, suffix), K)
            if candidates[x_i]:
                return among(candidates)
            return own(prefix, x_i).float() if otherwise is None else otherwise(candidates, x_i)
        return answer

    def by_prefix(prefix, suffix):
        return prefix

    compare(f, [(prefix, suffix, 1, 3), (prefix, suffix, 4, 3), (prefix, suffix, 0, 1), (prefix, suffix, 3, 5)],
            missed(by_prefix), {
        "x_i is not among the candidates: then the target is one-hot x_i": missed(by_prefix, lambda c, x_i: among(c)),
        "you took x_i in as one more candidate; that biases the mean, the set must not depend on x_i":
            missed(by_prefix, lambda c, x_i: among(c | own(c, x_i))),
        "x_i takes a candidate's place; that biases the mean, the set must not depend on x_i": lambda p, s, x_i, K:
            among(best(p, K) if best(p, K)[x_i] else best(p, K - 1) | own(p, x_i)),
        "you return nothing where x_i is no candidate, but the target is one-hot then":
            missed(by_prefix, lambda c, x_i: torch.zeros(len(c))),
        "always one-hot, but x_i is among the candidates here": lambda p, s, x_i, K: own(p, x_i).float(),
        "candidates are the likeliest under the prefix, not under the suffix": missed(lambda p, s: s),
        "candidates are the likeliest under the prefix; their scores are not known before they are chosen":
            missed(lambda p, s: p + s),
        "all letters are candidates in your target, K are wanted": lambda p, s, x_i, K: (p + s).softmax(-1),
        "divide by the sum over the candidates, not over all letters": lambda p, s, x_i, K:
            torch.where(best(p, K), (p + s).softmax(-1), 0.0) if best(p, K)[x_i] else own(p, x_i).float(),
        "these are the least likely letters": missed(by_prefix, None, lambda score, K: best(-score, K))})


def check_two_variances(f):
    """f(joint): variances, summed over letters, of the one-hot text and of c_i; joint (V, R) is p(x_i = v, rest = r | z)."""
    def score(joint):
        return joint / joint.sum(0)

    def both(one, other):
        return lambda joint: torch.stack([one(joint), other(joint)])

    def hot(joint):
        return 1 - joint.sum(1).square().sum()

    def soft(joint):
        return (joint.sum(0) * (score(joint) - joint.sum(1, keepdim=True)).square()).sum()

    def plainly(joint):
        return (score(joint) - score(joint).mean(1, keepdim=True)).square().sum(0).mean()

    def against_mean(joint):
        return (score(joint) - joint.sum(1, keepdim=True)).square().sum(0).mean()

    cases = [(torch.tensor([[0.3, 0.1, 0.1], [0.05, 0.2, 0.05], [0.05, 0.0, 0.15]]),),
             (torch.tensor([[0.12, 0.28], [0.18, 0.42]]),)]
    compare(f, cases, both(hot, soft), {
        "the other way round, the one-hot's variance comes first": both(soft, hot),
        "subtract the square of the mean, these are second moments":
            both(lambda j: torch.tensor(1.0), lambda j: (j.sum(0) * score(j).square()).sum()),
        "the rests are not all alike likely, weigh each by its probability": both(hot, plainly),
        "the rests are not all alike likely, weigh each by its probability, not only in the mean":
            both(hot, against_mean),
        "sum over the letters, do not average": lambda j: both(hot, soft)(j) / len(j),
        "these are standard deviations, their squares are wanted": lambda j: both(hot, soft)(j).sqrt(),
        "the second is what is left when the rest is known; the score's variance is the other part":
            both(hot, lambda j: hot(j) - soft(j)),
        "letters are the rows, rests the columns": lambda j: both(hot, soft)(j.T)})


def check_gradient_score(f):
    """f(prefix, gradient, E, x_i): the first-order score: softmax of prefix + <gradient, E_v - E_{x_i}>, (V,)."""
    prefix, gradient = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([1.0, -0.5])
    E = torch.tensor([[0.2, 0.4], [1.0, -0.6], [-0.8, 0.1]])

    def change(gradient, E, x_i):
        return (E - E[x_i]) @ gradient

    compare(f, [(prefix, gradient, E, 0), (prefix, gradient, E, 2), (prefix, 0 * gradient, E, 1)],
            lambda prefix, g, E, x_i: (prefix + change(g, E, x_i)).softmax(-1), {
        "you forgot the prefix": lambda prefix, g, E, x_i: change(g, E, x_i).softmax(-1),
        "wrong sign, the suffix gains where E_v lies along the gradient":
            lambda prefix, g, E, x_i: (prefix - change(g, E, x_i)).softmax(-1),
        "this is the prefix alone, the gradient has to be multiplied with every letter's embedding":
            lambda prefix, g, E, x_i: prefix.exp(),
        "these are logarithms, probabilities are wanted":
            lambda prefix, g, E, x_i: (prefix + change(g, E, x_i)).log_softmax(-1),
        "it does not add up to 1, divide by the sum": lambda prefix, g, E, x_i: (prefix + change(g, E, x_i)).exp(),
        "the change is one of log-probabilities, you added it to probabilities":
            lambda prefix, g, E, x_i: (prefix.exp() + change(g, E, x_i)).softmax(-1),
        "these are log-probabilities changed, not yet normalised": lambda prefix, g, E, x_i: prefix + change(g, E, x_i)})


def check_mean_of_sampled(f):
    """f(prefix, suffix, K): mean, over K letters drawn from the prefix, of the target that weighs each by its suffix: (V,)."""
    def mean(prefix, draw_from, weight, K, distinct=False):
        total, V = torch.zeros(len(prefix)), len(prefix)
        for drawn in itertools.product(range(V), repeat=K):
            drawn = list(drawn)
            if distinct and len(set(drawn)) < K:
                continue
            chance = draw_from[drawn].prod()
            if distinct:
                left = torch.tensor([1 - float(draw_from[drawn[:k]].sum()) for k in range(K)])
                chance = chance / left.prod()
            w = weight[drawn]
            total += chance * torch.zeros(V).index_add(0, torch.tensor(drawn), w / w.sum())
        return total

    prefix, suffix = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.4, 0.02]).log()
    compare(f, [(prefix, suffix, 2), (prefix, suffix, 3), (prefix, suffix, 1)],
            lambda p, s, K: mean(p, p.exp(), s.exp(), K), {
        "this is the score itself; the weights are divided by their own sum, which biases the mean":
            lambda p, s, K: (p + s).softmax(-1),
        "this is the prefix, so every letter drawn counted alike: weigh each by its suffix": lambda p, s, K: p.exp(),
        "the prefix counts twice, the letters are drawn from it already": lambda p, s, K:
            mean(p, p.exp(), (p + s).exp(), K),
        "letters are drawn from the prefix, not uniformly": lambda p, s, K:
            mean(p, torch.full((len(p),), 1 / len(p)), s.exp(), K),
        "uniform draws weighed by the whole score; here the prefix draws and the suffix weighs": lambda p, s, K:
            mean(p, torch.full((len(p),), 1 / len(p)), (p + s).exp(), K),
        "the same letter may be drawn again": lambda p, s, K: mean(p, p.exp(), s.exp(), K, distinct=True),
        "in each draw the weights add up to 1, divide by their sum": lambda p, s, K: K * (p + s).exp(),
        "in each draw the weights add up to 1, divide by their sum, not by K": lambda p, s, K: (p + s).exp(),
        "the suffix weighs by its probability, not by its logarithm": lambda p, s, K: mean(p, p.exp(), s, K)})


def check_tokens_a_position(f):
    """f(b, K): teacher tokens that K candidates cost a position, on average over a block of b."""
    def mean(tokens, before=1):
        return lambda b, K: before + sum(tokens(b - 1 - i, K) for i in range(b)) / b

    compare(f, [(4, 16), (8, 4), (1, 16), (64, 2)], mean(lambda follow, K: K * follow), {
        "you forgot the pass that scores the prefixes": mean(lambda follow, K: K * follow, 0),
        "the last token of the block is predicted, never read, so it is not run": mean(lambda follow, K: K * (follow + 1)),
        "the candidate itself is run too": mean(lambda follow, K: K * max(0, follow - 1)),
        "only what follows the candidate changes, the prefix is kept": lambda b, K: 1 + K * b,
        "only what follows the candidate changes, the prefix is kept and the last token not run":
            lambda b, K: 1 + K * (b - 1),
        "each of the K candidates has a pass of its own": mean(lambda follow, K: follow),
        "this is the whole block, a position is wanted": lambda b, K: b + K * b * (b - 1) / 2,
        "the prefix pass serves all candidates, count it once": mean(lambda follow, K: K * follow + K - 1)})


# ----------------------------------------------------------------------------------------------------------
# 4_sdtt

def check_shares_revealed(f):
    """f(t, dt, k): the probability that a token still hidden is revealed, in each of k teacher steps of size dt from t."""
    def at(t, dt, k, share):
        return [share(t - j * dt, dt) for j in range(k)]

    def clamped(now, dt):
        return min(1.0, dt / now) if now > 1e-9 else 1.0

    def or_none(now, dt):                                             # where no time is left: nothing
        return dt / now if now >= dt else 0.0

    compare(f, [(0.75, 0.25, 2), (0.3, 0.2, 2), (0.5, 0.25, 3), (1.0, 1.0, 1)],
            lambda t, dt, k: at(t, dt, k, clamped), {
        "dt is the share of all tokens; of those still hidden it is dt / t": lambda t, dt, k: [dt] * k,
        "time moves on: the second step begins at t - dt, with fewer tokens hidden": lambda t, dt, k: [min(1.0, dt / t)] * k,
        "this is the probability that a token stays hidden": lambda t, dt, k: at(t, dt, k, lambda n, d: 1 - clamped(n, d)),
        "this is how many are revealed in all, up to each step": lambda t, dt, k:
            [min(1.0, (j + 1) * dt / t) for j in range(k)],
        "a probability is 1 at most: less time is left than dt": lambda t, dt, k:
            [dt / (t - j * dt) if abs(t - j * dt) > 1e-9 else 1.0 for j in range(k)],
        "where less time is left than dt all are revealed, not none": lambda t, dt, k: at(t, dt, k, or_none),
        "time runs down, not up": lambda t, dt, k: [min(1.0, dt / (t + j * dt)) for j in range(k)]})


def check_two_step_target(f):
    """f(teacher, z, first, drawn): SDTT's target for k = 2, given what the first step reveals: (1, L, V)."""
    teacher = dlm.HiddenMarkov.markov(3, 4, seed=1, sharp=1.5)
    teacher.b = 4

    def say(z):
        return teacher(z, z).exp().float()

    def later(z, first, drawn):
        return say(torch.where(first, drawn, z))

    def answer(of_first, of_rest):
        return lambda z, first, drawn: hidden_rows(z, torch.where(first[..., None], of_first(z, first, drawn),
                                                                  of_rest(z, first, drawn)))

    def now(z, first, drawn):
        return say(z)

    def hidden_rows(z, p):
        same_length = isinstance(p, torch.Tensor) and p.dim() > 1 and p.size(-2) == z.size(1)
        return p[..., (z == 3)[0], :] if same_length else p

    z, drawn = torch.tensor([[1, 3, 3, 3]]), torch.tensor([[1, 2, 0, 0]])
    first, second = torch.tensor([[False, True, False, True]]), torch.tensor([[False, False, True, False]])
    compare(functools.wraps(f)(lambda z, *case: hidden_rows(z, f(teacher, z, *case))),
            [(z, first, drawn), (z, second, drawn), (z, first & False, drawn)], answer(now, later), {
        "this is the target for k = 1, what the teacher says now; the second step begins in another state": answer(now, now),
        "a token that the first step reveals keeps the distribution it was drawn from": answer(later, later),
        "the other way round: revealed tokens have the first answer, the others the second": answer(later, now),
        "the letter itself is no target, the distribution it was drawn from is":
            answer(lambda z, first, drawn: torch.nn.functional.one_hot(drawn, 3).float(), later),
        "only the tokens of `first` are revealed in the first step":
            answer(now, lambda z, first, drawn: later(z, z == 3, drawn)),
        "these are logarithms, probabilities are wanted": lambda *case: answer(now, later)(*case).log(),
        "a mean of both answers; SDTT takes one draw of each token's target, the mean comes from many":
            lambda z, first, drawn: hidden_rows(z, (say(z) + later(z, first, drawn)) / 2),
        "keep the first axis, (1, L, V)": lambda *case: answer(now, later)(*case)[0]})


def kl(p, q):
    """Sum of p log(p/q); 0 log 0 is 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def check_two_divergences(f):
    """f(p, q): [reverse KL, total variation] of target p (V,) and student q (V,)."""
    def tv(p, q):
        return (p - q).abs().sum() / 2

    def pair(one, other):
        return lambda p, q: torch.stack([one(p, q), other(p, q)])

    def reverse(p, q):
        return kl(q, p)

    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    compare(f, [(p, q), (torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, 0.5, 0.0]))], pair(reverse, tv), {
        "your KL has its arguments swapped, this is forward KL": pair(kl, tv),
        "your KL has the wrong sign": pair(lambda p, q: -reverse(p, q), tv),
        "your KL is in bits, take the natural logarithm": pair(lambda p, q: reverse(p, q) / math.log(2), tv),
        "this is a cross-entropy, the student's own entropy is missing": pair(lambda p, q: -torch.xlogy(q, p).sum(), tv),
        "your total variation lacks the factor 1/2": pair(reverse, lambda p, q: 2 * tv(p, q)),
        "your total variation squares the differences": pair(reverse, lambda p, q: (p - q).square().sum()),
        "your total variation squares the differences, and halves them":
            pair(reverse, lambda p, q: (p - q).square().sum() / 2),
        "total variation is of probabilities, not of their logarithms":
            pair(reverse, lambda p, q: (p.log() - q.log()).abs().sum() / 2),
        "your total variation takes no absolute value, and differences add up to 0":
            pair(reverse, lambda p, q: (p - q).sum() / 2),
        "the other way round, reverse KL comes first": pair(tv, reverse),
        "0 log 0 counts as 0 here, not as nan": pair(lambda p, q: (q * (q / p).log()).sum(), tv)})


def check_jensen_shannon(f):
    """f(p, q): the mean of KL(p || m) and KL(q || m), m the middle of p and q (V,), in nats."""
    def right(p, q):
        m = (p + q) / 2
        return (kl(p, m) + kl(q, m)) / 2

    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    compare(f, [(p, q), (torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.3, 0.7]))], right, {
        "your KL has its arguments swapped, m is the second one":
            lambda p, q: (kl((p + q) / 2, p) + kl((p + q) / 2, q)) / 2,
        "this is the mean of forward and reverse KL; both go to the middle m": lambda p, q: (kl(p, q) + kl(q, p)) / 2,
        "this is the sum, take the mean": lambda p, q: 2 * right(p, q),
        "one half of it, KL(q || m) counts as well": lambda p, q: kl(p, (p + q) / 2),
        "one half of it, KL(p || m) counts as well": lambda p, q: kl(q, (p + q) / 2),
        "one half of it, the other divergence is missing and this one is halved": lambda p, q: kl(p, (p + q) / 2) / 2,
        "m is (p + q) / 2, not p + q": lambda p, q: (kl(p, p + q) + kl(q, p + q)) / 2,
        "this is in bits, take the natural logarithm": lambda p, q: right(p, q) / math.log(2),
        "this is its square root": lambda p, q: right(p, q).sqrt(),
        "0 log 0 counts as 0 here, not as nan": lambda p, q:
            ((p * (2 * p / (p + q)).log()).sum() + (q * (2 * q / (p + q)).log()).sum()) / 2})


def check_average_of_weights(f):
    """f(weights, decay): the exponential moving average, from row 0 on, after rows 1..n; weights (n+1, d) -> (d,)."""
    def moving(weights, decay, start=None):
        a = weights[0] if start is None else start
        for w in weights[1:]:
            a = decay * a + (1 - decay) * w
        return a

    weights = torch.tensor([[1.0, 0.0], [2.0, -1.0], [4.0, 3.0], [3.0, 5.0]])
    compare(f, [(weights, 0.9), (weights[:2], 0.75), (weights, 0.0)], moving, {
        "turned round, `decay` is the share of the old average that stays": lambda w, decay: moving(w, 1 - decay),
        "these are the last weights, nothing was averaged": lambda w, decay: w[-1],
        "these are the first weights, nothing moved": lambda w, decay: w[0],
        "a plain mean; later weights count more": lambda w, decay: w.mean(0),
        "the average begins at row 0, not at zero": lambda w, decay: moving(w, decay, 0 * w[0]),
        "you counted row 0 again, it is where the average begins": lambda w, decay:
            moving(torch.cat([0 * w[:1], w]), decay),
        "only the last step: the average runs over all rows": lambda w, decay: decay * w[-2] + (1 - decay) * w[-1],
        "only the last step: the average runs over all rows, not only the first and the last":
            lambda w, decay: decay * w[0] + (1 - decay) * w[-1],
        "no correction is wanted, the average begins at real weights": lambda w, decay:
            moving(w, decay) / (1 - decay ** (len(w) - 1))})


def check_cost_of_one_step(f):
    """f(joint): KL(joint || the best that one step can write), nats, for two letters; joint (V, V)."""
    def entropy(p):
        return torch.special.entr(p).sum()

    def product(joint):
        return joint.sum(1, keepdim=True) * joint.sum(0)

    def right(joint):
        return kl(joint.flatten(), product(joint).flatten())

    three = torch.tensor([[0.3, 0.1, 0.1], [0.05, 0.2, 0.0], [0.1, 0.05, 0.1]])
    cases = [torch.tensor([[0.4, 0.1], [0.1, 0.4]]), three, torch.eye(3) / 3, torch.tensor([[0.12, 0.28], [0.18, 0.42]])]
    compare(f, [(joint,) for joint in cases], right, {
        "your KL has its arguments swapped, the joint is the target": lambda j: kl(product(j).flatten(), j.flatten()),
        "this is the entropy of the pair; how much of it does the product miss?": entropy,
        "this is the entropy of the product, subtract the entropy of the pair": lambda j: entropy(product(j)),
        "this is the entropy of one letter given the other": lambda j: entropy(j) - entropy(j.sum(1)),
        "wrong sign, a cost is not negative": lambda j: -right(j),
        "this is in bits, take the natural logarithm": lambda j: right(j) / math.log(2),
        "one step knows the letters' frequencies, not only how many letters there are":
            lambda j: kl(j.flatten(), torch.full((j.numel(),), 1 / j.numel())),
        "this is total variation, KL is wanted": lambda j: (j - product(j)).abs().sum() / 2,
        "0 log 0 counts as 0 here, not as nan": lambda j: (j * (j / product(j)).log()).sum(),
        "one step can write something of it, its cost is not the likeliest pair's": lambda j: -j.max().log()})


def check_steps_of_each_round(f):
    """f(first, last, k): [[steps of the teacher, steps of its student], ..] of every round, as lists."""
    def rounds(first, last, k):
        steps = [first]
        while steps[-1] > last:
            steps.append(steps[-1] // k)
        return [[a, b] for a, b in zip(steps, steps[1:])]

    compare(f, [(16, 2, 2), (64, 4, 4), (1024, 8, 2)], rounds, {
        "one round too many, the last student takes `last` steps": lambda first, last, k: rounds(first, last // k, k),
        "one round too few, the last student takes `last` steps": lambda first, last, k: rounds(first, last * k, k),
        "the other way round, the teacher takes more steps": lambda first, last, k:
            [[b, a] for a, b in rounds(first, last, k)],
        "the teacher is the student of the round before, not always the first":
            lambda first, last, k: [[first, b] for _, b in rounds(first, last, k)],
        "a round makes k steps into one, it does not take k away": lambda first, last, k:
            [[n, n - k] for n in range(first, last, -k)],
        "these are the students' steps only": lambda first, last, k: [b for _, b in rounds(first, last, k)],
        "these are the teachers' steps only": lambda first, last, k: [a for a, _ in rounds(first, last, k)],
        "this is the number of rounds, the steps of each are wanted": lambda first, last, k: len(rounds(first, last, k)),
        "k steps become one, not always two": lambda first, last, k: rounds(first, last, 2),
        "from the many steps to the few": lambda first, last, k: rounds(first, last, k)[::-1]})


# ----------------------------------------------------------------------------------------------------------
# 5_opdlm

def check_opdlm_target(f):
    """f(teacher, x, y, b): OPDLM's target at the tokens of y, each block of which stands behind x's: (1, L, V)."""
    teacher = dlm.HiddenMarkov.markov(3, 4, seed=1, sharp=1.5)

    def right(x, y, b, say=lambda text: teacher(text, text)):
        rows = []
        for i in range(x.size(1)):
            text = torch.cat([x[:, :i // b * b], y[:, i // b * b:]], 1)
            rows.append(say(text).exp()[:, i])
        return torch.stack(rows, 1)

    def late(x, y, b):                                                # p(next | y_<=i)
        return torch.cat([right(x, y, b)[:, 1:], right(x, y, b)[:, -1:]], 1)

    def early(x, y, b):
        return torch.cat([right(x, y, b)[:, :1], right(x, y, b)[:, :-1]], 1)

    x, y = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[2, 2, 1, 1]])
    compare(functools.wraps(f)(lambda *case: f(teacher, *case)), [(x, y, 2), (x, y, 4), (y, x, 2), (x, y, 1)], right, {
        "this grades the real text x, the student wrote y": lambda x, y, b: teacher(x, x).exp(),
        "each block of y stands behind the earlier blocks of x, not behind y's own": lambda x, y, b: teacher(y, y).exp(),
        "these are logarithms, the target is probabilities": lambda x, y, b: right(x, y, b).log(),
        "off by one, you conditioned on y_<=i: row i is about y_i, given what is left of it": late,
        "off by one, you left out the token just before i": early,
        "this is the target of TCS, which knows what stands right of i; OPDLM's does not": lambda x, y, b:
            right(x, y, b, lambda text: dlm.concrete_score(teacher, text, torch.arange(4)[None], b)),
        "keep the first axis, (1, L, V)": lambda x, y, b: right(x, y, b)[0]})


def check_pick_states(f):
    """f(states): of each of R blocks a uniform one of the N states before the last. states (N+1, R, b) -> (R, b)."""
    N, R, V = 4, 4000, 3
    g = torch.Generator().manual_seed(0)
    y, when = torch.randint(V, (R, N), generator=g), torch.rand(R, N, generator=g).argsort(1)
    states = torch.stack([torch.where(when < n, y, V) for n in range(N + 1)])
    z = f(states)
    if z is None or z is ...:
        raise NotDone(f"{f.__name__}: not done yet")

    def wrong(what):
        raise AssertionError(f"{f.__name__}: {what}")

    if not isinstance(z, torch.Tensor) or z.shape != (R, N):
        shape = tuple(z.shape) if isinstance(z, torch.Tensor) else type(z).__name__
        wrong(f"one state for each block is wanted, a tensor {(R, N)}, not {shape}")
    n = (z < V).sum(1)
    each = n.bincount(minlength=N + 1)
    share = ", ".join(f"{k} seen: {c / R:.2f}" for k, c in enumerate(each.tolist()))
    if not torch.equal(z, states[n, torch.arange(R)]):
        if all(bool((z[r] == states[:, r]).any(0).all()) for r in range(R)):
            wrong("you picked a moment for each token; one for the whole block, or the state is none the sampler was in")
        if bool((z.view(-1, N)[:, None] == states[:, :1].transpose(0, 1)).all(2).any(1).all()):
            wrong("these are all states of the first block; block r's state is one of states[:, r]")
        wrong("these are not states of the blocks they stand for: row r is one of states[:, r]")
    if each[N] == R:
        wrong("you return the finished texts, nothing is left to learn there")
    if each.max() == R:
        first = each[0] == R
        wrong("always the first state, where nothing is seen; any step alike" if first else
              f"the same step for every block, {int(each.argmax())} seen; a step for each block")
    if each[N]:
        wrong(f"the finished state is among them, no step begins in it: {share}")
    if each[0] == 0:
        wrong(f"the first state, where all is hidden, is missing: a step began there too: {share}")
    if (each[:N] - R / N).abs().max() > 0.03 * R:
        wrong(f"every step alike, each share should be {1 / N:.2f}: {share}")
    print(f"{f.__name__}: right")


def check_target_and_truth(f):
    """f(start, trans, v): what OPDLM's target says of x_0 when x_1 = v is seen, and the truth: (2, V)."""
    start = torch.tensor([0.5, 0.3, 0.2])
    trans = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])

    def rows(target, truth):
        return lambda start, trans, v: torch.stack([target(start, trans, v), truth(start, trans, v)])

    def prior(s, t, v):
        return s

    def posterior(s, t, v):
        return s * t[:, v] / (s * t[:, v]).sum()

    compare(f, [(start, trans, 0), (start, trans, 2)], rows(prior, posterior), {
        "the other way round, row 0 is the target": rows(posterior, prior),
        "the target does not know x_1, it is the same for every v": rows(posterior, posterior),
        "the truth does know x_1": rows(prior, prior),
        "row 1 does not add up to 1, divide by p(x_1 = v)": rows(prior, lambda s, t, v: s * t[:, v]),
        "trans[v] is what comes after v; what can come before it stands in a column": rows(prior, lambda s, t, v: t[v]),
        "trans[v] is what comes after v, what can come before it stands in a column":
            rows(prior, lambda s, t, v: s * t[v] / (s * t[v]).sum()),
        "you forgot how likely each x_0 was before x_1 was seen":
            rows(prior, lambda s, t, v: t[:, v] / t[:, v].sum())})


def check_weight_after(f):
    """f(w, n): chance that the first letter written is the first mode's, after one round of OPDLM on `branch`."""
    compare(f, [(0.9, 3), (0.9, 1), (0.2, 7), (0.5, 2)], lambda w, n: 0.5 / n + w * (n - 1) / n, {
        "nothing moved, that is TCS; the leftmost hidden letter is told 0.5": lambda w, n: w,
        "0.5 is where it ends; after one round only the leftmost hidden letter is told 0.5": lambda w, n: 0.5,
        "turned round, one letter of n is told 0.5 and n - 1 are told w": lambda w, n: w / n + 0.5 * (n - 1) / n,
        "you counted the given letter too, n are hidden": lambda w, n: 0.5 / (n + 1) + w * n / (n + 1),
        "half way, whatever n; the leftmost letter comes first in one order of n": lambda w, n: (w + 0.5) / 2,
        "this is the change, add it to w": lambda w, n: (0.5 - w) / n})


def check_tokens_of_an_update(f):
    """f(L, b): tokens that the student's network runs for one text, [in a plain update, in one of OPDLM]."""
    def answer(clean, writing):
        return lambda L, b: [clean(L, b) + L, clean(L, b) + L + writing(L, b)]

    def earlier(L, b):
        return L - b

    def none(L, b):
        return 0

    compare(f, [(32, 4), (16, 16), (12, 2)], answer(earlier, lambda L, b: L - b + b * L), {
        "you forgot the clean tokens": answer(none, lambda L, b: b * L),
        "you forgot the clean tokens that the student reads while it writes": answer(earlier, lambda L, b: b * L),
        "the last block is nobody's earlier block": answer(lambda L, b: L, lambda L, b: L + b * L),
        "clean tokens are run once while writing, then kept": answer(earlier, lambda L, b: b * (L - b + L)),
        "you counted the writing, the update itself comes on top":
            lambda L, b: [L - b + L, L - b + b * L],
        "all blocks are written at once, in b steps, not in L": answer(earlier, lambda L, b: L - b + L * L),
        "writing costs nothing in your count": answer(earlier, none)})
