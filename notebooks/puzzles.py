"""The puzzles of 0_puzzles.ipynb: what each answer should be, and what a wrong one is told.

A puzzle is two functions. The first is its answer, written out in plain steps, so that it gives no
one-line answer away. The second looks at another answer `got` of the same shape, and returns
{what may be wrong, in one sentence: whether it is}. It is asked only if `got` is not right, and the
first sentence that holds is told. In the notebook, check(the reader's function) tells and draws.

Letters: B texts or blocks, L tokens, V tokens in the vocabulary, N steps, K candidates.
"""
import math
from dataclasses import dataclass
from typing import Callable

import matplotlib.pyplot as plt
import torch

import checks


@dataclass
class Puzzle:
    answer: Callable        # the right one
    wrong: Callable         # what may be wrong with another one
    cases: list             # what it is called with; the first case is drawn
    draw: Callable          # draws an answer to the first case: draw(ax, answer, *case)
    shape: str              # told where the answer has another shape


PUZZLES = {}


def puzzle(answer, cases, draw, shape=""):
    """Keeps a puzzle; stands before its function of what may be wrong."""
    def keep(wrong):
        PUZZLES[answer.__name__] = Puzzle(answer, wrong, cases, draw, shape)
        return wrong
    return keep


def check(f):
    """Draws what f(the first case) is beside what it should be, and says what is wrong with f."""
    asked = PUZZLES[f.__name__]
    try:
        got = checks.returned(f, tensors(asked.cases[0]))
    except checks.NotDone as hole:
        show(asked, None)
        print(hole)
        return
    show(asked, got)
    for case in asked.cases:
        told = complaint(asked, f, case)
        if told:
            raise AssertionError(f"{f.__name__}: {told}")
    print(f"{f.__name__}: right")


def complaint(asked, f, case):
    """What is wrong with f in this case, or None."""
    right = torch.as_tensor(asked.answer(*tensors(case)))
    got = checks.returned(f, tensors(case))
    if got.shape != right.shape:
        return f"The shape should be {tuple(right.shape)}, not {tuple(got.shape)}. {asked.shape}"
    if right.dtype == torch.bool and got.dtype != torch.bool:
        return "It should be a mask of True and False."
    if close(got, right):
        return None
    problems = asked.wrong(got, *tensors(case))
    told = next((what for what, is_so in problems.items() if is_so), "This is wrong.")
    if right.numel() > 30:
        return told
    return f"{told} It should be {checks.show(right)}, but you return {checks.show(got)}."


def tensors(case):
    """The arguments of a case, new ones, so that nobody changes what the next call gets."""
    return [torch.tensor(a) if isinstance(a, list) else a for a in case]


def close(a, b):
    """Whether all numbers of a are those of b. b may be one number."""
    a = torch.as_tensor(a).double()
    b = torch.as_tensor(b).double().expand_as(a)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Pictures, in black and grey: what it should be on the left, the reader's answer on the right

def show(asked, got):
    """Both answers to the first case, side by side. got None: the hole is still there."""
    case = tensors(asked.cases[0])
    right = torch.as_tensor(asked.answer(*case))
    fig, axes = plt.subplots(1, 2, figsize=(7, 2.1), dpi=70, sharex=True, sharey=True)
    for ax, title, answer in zip(axes, ("it should be", "yours"), (right, got)):
        ax.set_title(title, fontsize=10)
        ax.tick_params(labelsize=8)
        if answer is not None and answer.shape == right.shape:
            answer = answer.where(answer.isfinite(), 0).to(right.dtype)
            asked.draw(ax, answer, *case)
        else:
            text = "not done yet" if answer is None else f"another shape: {tuple(answer.shape)}"
            ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.4")
    fig.tight_layout()


def boxes(ax, rows, words, y="", x=""):
    """Rows of numbers as shades, 0 white and 1 black; words[i][j] stands in each box."""
    rows = rows.double()
    ax.imshow(rows.tolist(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(rows.tolist()):
        for j, shade in enumerate(row):
            colour = "white" if shade > 0.65 else "black"
            ax.text(j, i, words[i][j], ha="center", va="center", fontsize=8, color=colour)
    ax.set_xticks(range(rows.size(1)))
    ax.set_yticks(range(rows.size(0)))
    ax.set_ylabel(y, fontsize=8)
    ax.set_xlabel(x, fontsize=8)


def numbers(y, x):
    """Draws a table of numbers from 0 to 1."""
    def draw(ax, answer, *case):
        boxes(ax, answer, [[f"{v:.2f}" for v in row] for row in answer.tolist()], y, x)
    return draw


def tokens(y, x):
    """Draws rows of tokens, MASK as a black box."""
    def draw(ax, answer, z, MASK):
        words = [["M" if v == MASK else v for v in row] for row in answer.tolist()]
        boxes(ax, answer == MASK, words, y, x)
    return draw


def yes_or_no(y, x):
    """Draws a mask: black is True."""
    def draw(ax, answer, *case):
        boxes(ax, answer, [[""] * answer.size(-1)] * len(answer), y, x)
    return draw


def bars(y, x):
    """Draws a row of numbers as bars."""
    def draw(ax, answer, *case):
        ax.bar(range(len(answer)), answer.tolist(), color="0.5", edgecolor="black")
        ax.set_ylabel(y, fontsize=8)
        ax.set_xlabel(x, fontsize=8)
        ax.set_xticks(range(len(answer)))
    return draw


def points(y, x):
    """Draws a row of numbers from 0 to 1 as points."""
    def draw(ax, answer, *case):
        ax.plot(range(len(answer)), answer.tolist(), "ko-", markersize=4, linewidth=0.8)
        ax.set_xticks(range(len(answer)))
        ax.set_ylim(-0.05, 1.05)
        ax.set_ylabel(y, fontsize=8)
        ax.set_xlabel(x, fontsize=8)
    return draw


# --------------------------------------------------------------------------------------------------
# 1. What the slots hold

def shift(x, MASK):
    rows = [[MASK, *row[:-1]] for row in x.tolist()]
    return torch.tensor(rows)


@puzzle(shift, draw=tokens("text", "slot"),
        cases=[([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]], 9), ([[0, 1, 2]], 3)],
        shape="A text of L tokens has L slots, and its last token enters none of them.")
def shift_is_wrong(got, x, MASK):
    return {
        "Slot i holds token i, but that is what it has to say.": close(got, x),
        "Slot i holds token i + 1, which it may not see.": close(got[:, :-1], x[:, 1:]),
        "Nothing stands before the first token, so slot 0 holds MASK.": not close(got[:, 0], MASK)}


# --------------------------------------------------------------------------------------------------
# 2. The mean over hidden tokens

def weights(z, MASK):
    rows = torch.zeros(z.shape)
    for row, block in zip(rows, z):
        hidden = block == MASK
        if hidden.any():
            row[hidden] = 1 / hidden.sum()
    return rows


@puzzle(weights, draw=numbers("block", "token"),
        cases=[([[9, 1, 9, 9], [9, 7, 9, 8], [1, 8, 2, 8]], 9), ([[5, 5], [5, 0]], 5)])
def weights_is_wrong(got, z, MASK):
    hidden = z == MASK
    sums = got.sum(-1)
    return {
        "A block with nothing hidden divides 0 by 0. Its weights are 0.": got.isnan().any(),
        "A visible token has a weight, but the loss looks at hidden ones.": got[~hidden].any(),
        "You take one mean over all hidden tokens. Each block has its own.": close(sums.sum(), 1),
        "The weights of a block should add up to 1.": not close(sums[hidden.any(-1)], 1)}


# --------------------------------------------------------------------------------------------------
# 3. The block attention mask

def may_see(L, b):
    mask = torch.zeros(L, L, dtype=torch.bool)
    for i in range(L):
        end_of_block = (i // b + 1) * b
        mask[i, :end_of_block] = True
    return mask


@puzzle(may_see, draw=yes_or_no("slot i looks", "at slot j"),
        cases=[(8, 2), (5, 1), (5, 5), (7, 3)])
def may_see_is_wrong(got, L, b):
    block = torch.arange(L) // b
    earlier = block < block[:, None]
    own = block == block[:, None]
    return {
        "Rows and columns are swapped. Row i is the slot that looks.": close(got, may_see(L, b).T),
        "A slot sees a later block, which is not written yet.": (got & ~earlier & ~own).any(),
        "A slot does not see all earlier blocks.": (earlier & ~got).any(),
        "A slot does not see all of its own block, to its right too.": (own & ~got).any()}


# --------------------------------------------------------------------------------------------------
# 4. A bug hunt: the times of N steps

def times(N):
    return torch.tensor([(N - n) / N for n in range(N + 1)])


@puzzle(times, draw=points("time", "after step"), cases=[(4,), (1,), (10,)],
        shape="N steps lie between N + 1 times.")
def times_is_wrong(got, N):
    steps = got[:-1] - got[1:]
    return {
        "Time runs from 1, where all is hidden, down to 0.": got[0] < got[-1],
        "The first time should be 1, where all is hidden.": not close(got[0], 1),
        "The last time is above 0, so some tokens are never revealed.": got[-1] > 1e-6,
        "The steps should be equally long.": not close(steps, 1 / N)}


# --------------------------------------------------------------------------------------------------
# 5. The ancestral step

def chances(N):
    now = [(N - n) / N for n in range(N)]
    return torch.tensor([1 / N / t for t in now])


@puzzle(chances, draw=bars("chance", "step"), cases=[(4,), (2,), (9,)])
def chances_is_wrong(got, N):
    still_hidden = torch.cat([torch.ones(1), (1 - got).cumprod(0)[:-1]])
    return {
        "This is the share of all tokens. Divide by the share still hidden.": close(got, 1 / N),
        "A probability is at most 1.": (got > 1 + 1e-6).any(),
        "The first step may not reveal everything.": close(got[0], 1),
        "The last step should reveal all that is left.": not close(got[-1], 1),
        "Each step should reveal 1/N of all tokens on average.":
            not close(got * still_hidden, 1 / N)}


# --------------------------------------------------------------------------------------------------
# 6. The clock of SDTT

def clock(t, dt, k):
    calls = []
    for _ in range(k):
        calls.append(t)
        t = max(0.0, t - dt)
    return torch.tensor(calls)


@puzzle(clock, draw=points("time", "call"), cases=[(0.5, 0.2, 4), (0.5, 0.125, 1), (0.75, 0.25, 3)])
def clock_is_wrong(got, t, dt, k):
    gaps = got[:-1] - got[1:]
    return {
        "The first call is made at t, before any step.": not close(got[0], t),
        "Time runs down, not up.": (gaps < -1e-6).any(),
        "Time ends at 0.": (got < -1e-6).any(),
        "Between two calls lies one step of length dt.": not close(gaps[got[1:] > 1e-6], dt)}


# --------------------------------------------------------------------------------------------------
# 7. Forward and reverse KL

PERCENT = [1, *range(5, 100, 5), 99]
STUDENT = [[n / 100, 1 - n / 100] for n in PERCENT]
TARGET = [[0.7, 0.3]] * len(STUDENT)


def draw_kls(ax, answer, p, q):
    for row, style, name in zip(answer, ("k-", "k--"), ("row 0", "row 1")):
        ax.plot(q[:, 0].tolist(), row.tolist(), style)
        ax.text(1.02, float(row[-1]), name, fontsize=8, va="center")     # right of the data
    ax.set_xlim(0, 1.2)
    ax.set_ylabel("nats", fontsize=8)
    ax.set_xlabel("q of the first token (p is 0.7)", fontsize=8)


def kls(p, q):
    both = torch.zeros(2, len(p))
    for i in range(len(p)):
        for v in range(2):
            both[0, i] += p[i, v] * math.log(p[i, v] / q[i, v])
            both[1, i] += q[i, v] * math.log(q[i, v] / p[i, v])
    return both


@puzzle(kls, draw=draw_kls, cases=[(TARGET, STUDENT)],
        shape="Row 0 is forward KL, row 1 is reverse KL, and each has one number a student.")
def kls_is_wrong(got, p, q):
    right = kls(p, q)
    same = (p - q).abs().sum(-1) < 1e-6
    return {
        "The rows are swapped. Forward KL is weighed by the target p.": close(got, right.flip(0)),
        "This is a mean over both tokens. KL is their sum.": close(got, right / 2),
        "This is in bits. Take the natural logarithm.": close(got, right / math.log(2)),
        "A KL is never negative.": (got < -1e-6).any(),
        "A student that equals its target has KL 0.": (got[:, same].abs() > 1e-6).any()}


# --------------------------------------------------------------------------------------------------
# 8. The leave-one-out conditional

def leave_one_out(joint, x):
    first = [joint[v, x[1]] for v in range(len(joint))]
    second = [joint[x[0], v] for v in range(len(joint))]
    rows = torch.tensor([first, second])
    return rows / rows.sum(-1, keepdim=True)


@puzzle(leave_one_out, draw=numbers("token", "what it may be"),
        cases=[([[0.3, 0.1, 0.1], [0.05, 0.2, 0.0], [0.1, 0.05, 0.1]], [0, 1]),
               ([[0.1, 0.2], [0.3, 0.4]], [1, 0])])
def leave_one_out_is_wrong(got, joint, x):
    unseen = torch.stack([joint.sum(1), joint.sum(0)])
    rows = torch.stack([joint[:, x[1]], joint[x[0]]])
    return {
        "You do not look at the other token, whose value is known.": close(got, unseen),
        "These are probabilities already. Divide by the sum, not softmax.":
            close(got, rows.softmax(-1)),
        "Each row should add up to 1.": not close(got.sum(-1), 1),
        "The rows are swapped. Row 0 says token 0, and x[1] is given.":
            close(got, leave_one_out(joint, x).flip(0))}


# --------------------------------------------------------------------------------------------------
# 9. The top-K concrete score

def targets(c, kept):
    rows = torch.zeros(len(c), len(c))
    for own in range(len(c)):
        if kept[own]:
            rows[own, kept] = c[kept] / c[kept].sum()
        else:
            rows[own, own] = 1
    return rows


@puzzle(targets, draw=numbers("text's token", "target"),
        cases=[([0.4, 0.05, 0.3, 0.25], [True, False, True, False]),
               ([0.2, 0.5, 0.3], [False, True, False])])
def targets_is_wrong(got, c, kept):
    return {
        "Each row is a target, so it should add up to 1.": not close(got.sum(-1), 1),
        "The teacher's c does not come in. Candidates share what they have.":
            close(got, torch.eye(len(c))),
        "A text whose token is no candidate should get it as one-hot target.":
            close(got.diagonal()[~kept], 0),
        "The mean target, c @ targets, should be c. Yours is biased.": not close(c @ got, c)}


# --------------------------------------------------------------------------------------------------
# 10. What noise leaves of a token

def by_noise(z, E, alpha, sigma):
    squares = torch.tensor([(z - alpha * e).square().sum() for e in E])
    density = (-squares / (2 * sigma ** 2)).exp()
    return density / density.sum()


@puzzle(by_noise, draw=bars("probability", "token"),
        cases=[([0.5, 0.3], [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]], 0.6, 0.8),
               ([0.2, -0.1], [[0.0, 2.0], [2.0, 0.0], [0.0, -2.0]], 0.8, 0.6)])
def by_noise_is_wrong(got, z, E, alpha, sigma):
    score = E @ z
    return {
        "These are no probabilities, as they do not add up to 1.": not close(got.sum(), 1),
        "Divide by the variance sigma², not by sigma.":
            close(got, (alpha / sigma * score).softmax(-1)),
        "z lies about alpha E_x and not about E_x, so alpha is missing.":
            close(got, (score / sigma ** 2).softmax(-1)),
        "A factor is wrong. The density has a half in its exponent.":
            close(got, (2 * alpha / sigma ** 2 * score).softmax(-1)),
        "The token nearest to z should be the likeliest.": got.argmax() != score.argmax()}


# --------------------------------------------------------------------------------------------------
# 11. Drawing without float32's bias

RARE = [0.6, *[1e-8] * 40, 0.4]          # and where to aim to hit each of the rare ones
AT_RARE = torch.tensor(RARE).double().cumsum(0)[:40] + 0.5e-8


def draw_tokens(ax, answer, p, u):
    ax.plot(range(1, 41), answer.tolist(), "k.", markersize=4)
    ax.set_ylabel("drawn", fontsize=8)
    ax.set_xlabel("token that u aims at", fontsize=8)


def drawn(p, u):
    found = []
    for level in u.tolist():
        token = 0
        summed = p[0].item()             # Python's numbers are float64
        while summed <= level:
            token += 1
            summed += p[token].item()
        found.append(token)
    return torch.tensor(found)


@puzzle(drawn, draw=draw_tokens,
        cases=[(RARE, AT_RARE),
               ([0.5, 0.125, 0.25, 0.125], torch.tensor([0.1, 0.55, 0.7, 0.9]).double()),
               ([0.0, 0.5, 0.0, 0.5], torch.tensor([0.0, 0.25, 0.5, 0.75]).double())],
        shape="There is one token for each u.")
def drawn_is_wrong(got, p, u):
    right = drawn(p, u)
    return {
        "The token should depend on u. The arg max is no draw.": close(got, p.argmax()),
        "A larger u should give a later token.": (got[1:] < got[:-1]).any(),
        "Each token is one too high. The first one is 0.": close(got, right + 1),
        "A token of probability 0 came. Take the first sum that is above u.":
            (p[got.long().clamp(0, len(p) - 1)] == 0).any(),
        "Rare tokens never come, as float32 rounds the sums. Sum in float64.":
            len(got.unique()) < len(right.unique())}


# --------------------------------------------------------------------------------------------------
# 12. The entropy-bounded rule

def draw_taken(ax, answer, H, bound):
    colours = ["black" if taken else "white" for taken in answer]
    ax.bar(range(len(H)), H.tolist(), color=colours, edgecolor="black")
    ax.set_ylabel("entropy", fontsize=8)
    ax.set_xlabel(f"hidden token; black ones are taken (bound {bound})", fontsize=8)
    ax.set_xticks(range(len(H)))


def bounded(H, bound):
    taken = torch.zeros(len(H), dtype=torch.bool)
    for token in H.argsort():
        if H[taken].sum() > bound:       # so the sum of all but the largest would be too much
            break
        taken[token] = True
    return taken


@puzzle(bounded, draw=draw_taken,
        cases=[([0.5, 0.1, 0.9, 0.3, 0.7, 0.2], 0.7), ([0.4, 0.3, 2.0], 0.0), ([1.0, 0.2], 5.0)])
def bounded_is_wrong(got, H, bound):
    surest_left_out = H[~got].amin() if (~got).any() else math.inf
    return {
        "At least the surest token should come, or the text is never done.": not got.any(),
        "The surest tokens come first.": got.any() and H[got].amax() > surest_left_out,
        "Too many come. Their sum without the largest is above the bound.":
            got.any() and H[got].sum() - H[got].amax() > bound,
        "One more token may come, as the largest entropy does not count.":
            (~got).any() and H[got].sum() <= bound}


# --------------------------------------------------------------------------------------------------
# 13. One of each stretch

def draw_stretches(ax, answer, hidden, k):
    rows = torch.stack([hidden * 0.3, answer.double()])
    boxes(ax, rows, [[""] * len(hidden)] * 2, x=f"token (k = {k})")
    ax.set_yticks([0, 1], ["hidden", "come"])


def leftmost(hidden, k):
    places = hidden.nonzero()[:, 0]
    mask = torch.zeros_like(hidden)
    for stretch in range(k):
        of_it = [j for j in range(len(places)) if j * k // len(places) == stretch]
        mask[places[of_it[0]]] = True
    return mask


@puzzle(leftmost, draw=draw_stretches,
        cases=[([True, True, False, True, True, True, False, True, False, True], 3),
               ([False, True, True, False, True, True, True, False], 2),
               ([False, True, True], 2), ([True] * 6, 3)])
def leftmost_is_wrong(got, hidden, k):
    places = hidden.nonzero()[:, 0]
    return {
        "A token that is not hidden cannot come.": (got & ~hidden).any(),
        "These are the k leftmost, side by side. Take one of each stretch.":
            close(got, hidden & (hidden.cumsum(0) <= k)),
        "Exactly k tokens should come, one of each stretch.": got.sum() != k,
        "The first hidden token is the leftmost of its stretch.": not got[places[0]],
        "The stretches should have equally many hidden tokens.": True}
