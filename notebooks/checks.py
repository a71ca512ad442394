"""Checks of the notebooks' exercises: each says what is wrong and where to look. A check_NAME below
gives, for one case, what NAME should return and {a likely mistake: what one returns then}. The
decorator turns it into what a notebook calls: check_NAME(the student's function)."""
import contextlib
import math

import torch

import dlm
import exact


class NotDone(AssertionError):
    """The exercise's function still has its hole."""


@contextlib.contextmanager
def attempt():
    """Around a check in a notebook: a hole is only reported, a wrong answer stops the notebook."""
    try:
        yield
    except NotDone as hole:
        print(hole)


def exercise(*cases):
    """Turns a function of a case into the check of a student's function in these cases."""
    def make_check(answers):
        def check(f):
            for case in cases:
                inputs = [torch.tensor(a) if isinstance(a, list) else a for a in case]
                compare(f, inputs, *answers(*inputs))
            print(f"{f.__name__}: right")
        return check
    return make_check


def compare(f, inputs, right, mistakes, counted=...):
    """Raises an AssertionError unless f(*inputs) is right. Only the entries [counted] matter."""
    right = torch.as_tensor(right)
    got = returned(f, inputs)
    message = complaint(got, right, mistakes, counted)
    if message:
        shown = ", ".join(show(a) for a in inputs if not isinstance(a, torch.nn.Module))
        where = f"For {shown} it should be {show(right)}, but you return {show(got)}."
        raise AssertionError(f"{f.__name__}: {message} {where}")


def returned(f, inputs):
    """What f(*inputs) returns, as a tensor. Raises NotDone while f has its hole."""
    value = f(*inputs)
    if value is None or value is ...:
        raise NotDone(f"{f.__name__}: not done yet")
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"{f.__name__}: {value!r} cannot be read as a tensor.") from None


def complaint(got, right, mistakes, counted):
    """What is wrong with the answer `got`, or None if it is right."""
    def got_is(answer):
        answer = torch.as_tensor(answer).double()
        return torch.allclose(got.double()[counted], answer[counted], rtol=0, atol=1e-4)
    if got.shape != right.shape:
        return f"The shape should be {tuple(right.shape)}, not {tuple(got.shape)}."
    if right.dtype == torch.bool and got.dtype != torch.bool:
        return "It should be a mask of True and False."
    if got.isnan().any():
        return "You return nan, but 0 log 0 counts as 0."
    if not got_is(right):
        return next((what for what, wrong in mistakes.items() if got_is(wrong)), "This is wrong.")


def show(value):
    """A number, a list or a tensor with at most 4 digits behind the point."""
    value = torch.as_tensor(value)
    return str((value.double().round(decimals=4) if value.is_floating_point() else value).tolist())


# What students' functions are called with
PROBS = [[0.6, 0.2, 0.2], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3], [0.55, 0.45, 0.0]]
PREFIX = [math.log(p) for p in (0.35, 0.1, 0.3, 0.05, 0.2)]
SUFFIX = [math.log(p) for p in (0.07, 0.5, 0.08, 0.6, 0.06)]
MEANS = [[math.log(p) for p in row] for row in ((0.7, 0.2, 0.1), (0.1, 0.6, 0.3), (0.2, 0.2, 0.6))]
JOINT = [[0.3, 0.1, 0.1], [0.05, 0.2, 0.0], [0.1, 0.05, 0.1]]
CORNERS = [[1.4142, 0.0], [-0.7071, 1.2247], [-0.7071, -1.2247]]        # all √2 long
AR = exact.HiddenMarkov.markov(3, 4, seed=1, sharp=1.5)
DENOISER = exact.HiddenMarkov(AR.start, AR.trans, AR.emit, L=4, b=4)


# ---- 1_one_flag
@exercise((8, 3), (4, 1))
def check_number_of_slots(L, b):  # of one pass, clean and noisy
    clean = (L - 1) // b * b
    return L if b == 1 else clean + L, {
        "The last block is nobody's past. It needs no clean slots.": 2 * L,
        "These are the noisy slots. Where b > 1, earlier blocks are there clean, too.": L,
        "The last block may be shorter than b.": L if b == 1 else L - b + L}


@exercise((5, 2), (4, 1))
def check_depends_on(L, b):  # the mask (L, L) of what each token's prediction may depend on
    i = torch.arange(L)[:, None]
    j = torch.arange(L)
    visible = j // b <= i // b
    return visible & (i != j), {
        "Token i is hidden, so its own prediction cannot depend on it.": visible,
        "This is causal. Inside its block a token also sees what is to its right.": j < i,
        "Rows and columns are swapped. A row is a prediction.": visible.T & (i != j)}


@exercise((4, 2), (5, 4))
def check_set_weight(n, m):  # the weight of one set of m hidden tokens, in a block of n
    sets = math.comb(n, m)
    return 1 / (m * sets), {
        "This is the chance of the set. Its weight has one more factor, n / m.": 1 / (n * sets),
        "The chance that m tokens are hidden, 1/n, is missing.": n / (m * sets),
        "This is a mean over the block. Multiply it by its n tokens.": 1 / (n * m * sets)}


@exercise((4,), (16,))
def check_both_hidden(n):  # the chance that two given tokens are both hidden, m uniform on 1..n
    return (n + 1) / (3 * n), {
        "The two share m, so they are not independent.": ((n + 1) / (2 * n)) ** 2,
        "At least one token is hidden, so m starts at 1 and not at 0.": 1 / 3,
        "The second token is one of n - 1, not n.": (n + 1) * (2 * n + 1) / (6 * n * n)}


@exercise((0.3,), (0.9,))
def check_cosine_weight(s):  # the weight if each token is hidden with probability 1 - cos(pi/2 s)
    hidden = 1 - math.cos(math.pi / 2 * s)
    weight = math.pi / 2 * math.sin(math.pi / 2 * s) / hidden
    return weight, {
        "The sign is wrong. More tokens are hidden as s grows.": -weight,
        "This is 1 / t(s). A change of the clock also brings the factor dt/ds.": 1 / hidden,
        "The inner derivative, pi/2, is missing.": weight / math.pi * 2}


@exercise((2.8, 2.5), (4.0, 4.2))
def check_perplexity_per_character(nll, chars_per_token):  # from nats per token
    return math.exp(nll / chars_per_token), {
        "This is the perplexity per token. Its characters share the nats.": math.exp(nll),
        "These are nats. The perplexity is their exponential.": nll / chars_per_token,
        "Nats add up, perplexities multiply. Divide the nats.": math.exp(nll) / chars_per_token}


@exercise((8, 4), (5, 20))
def check_expected_calls(L, N):  # the mean number of N steps that reveal at least one of L tokens
    empty = (1 - 1 / N) ** L
    return N * (1 - empty), {
        "Some steps reveal nothing. The network is not run in them.": N,
        "These are the steps that reveal nothing. Count the others.": N * empty,
        "This is the chance that one step reveals something. There are N.": 1 - empty}


# ---- 2_parallel
@exercise((3,), (1,))
def check_whole_rows(k):  # the share of rows that k tokens, drawn at once, leave whole
    return 2.0 ** (1 - k), {
        "One factor 1/2 is too many. The first token has nobody to agree with.": 2.0 ** -k,
        "This is the share of broken rows. Subtract it from 1.": 1 - 2.0 ** (1 - k),
        "Once x_0 is given, 2 letters are possible and not 10.": 10.0 ** (1 - k)}


@exercise(([True, True, True, False, False, True], 2), ([True, False, True, True, True, True], 3))
def check_leftmost_of_each(hidden, k):  # the mask of the leftmost of each of k equal stretches
    number = hidden.cumsum(0) - 1
    stretch = number * k // hidden.sum()
    def one_of_each(stretch, which):
        places = [(hidden & (stretch == s)).nonzero()[which] for s in stretch[hidden].unique()]
        return torch.zeros_like(hidden).index_fill(0, torch.cat(places), True)
    everywhere = torch.arange(len(hidden)) * k // len(hidden)
    return one_of_each(stretch, 0), {
        "These are stretches of all tokens. Cut the hidden ones only.": one_of_each(everywhere, 0),
        "These are the k leftmost. Take one of each stretch.": hidden & (number < k),
        "This is the last of each stretch. Take its first.": one_of_each(stretch, -1)}


def mean_whole(L, N):
    """The mean share of whole rows of `branch`, in N ancestral steps over L tokens."""
    return 2 * sum((1 - (n - 0.5) / N) ** L - (1 - n / N) ** L for n in range(1, N + 1))


@exercise((8, 4), (5, 7))
def check_mean_whole_rows(L, N):  # after N ancestral steps over L tokens
    first = 2 * (1 - 0.5 / N) ** L
    empty = 2 * (1 - 1 / N) ** L
    return mean_whole(L, N), {
        "You count an empty step as 2^-(0-1) = 2, but then the next step decides.": first,
        "You sum over the first step only. If it is empty, the next one decides.": first - empty,
        "This is the share at the mean size, not the mean of the shares.": 2.0 ** (1 - L / N)}


@exercise((8, 4), (3, 6))
def check_cosine_counts(L, N):  # how many of L tokens each of N steps reveals
    hidden = [math.floor(L * math.cos(math.pi / 2 * n / N)) for n in range(N + 1)]
    counts = [before - after for before, after in zip(hidden, hidden[1:])]
    return counts, {
        "These tokens are still hidden. Take the differences.": hidden[1:],
        "These are all tokens revealed so far. Take the differences.": [L - h for h in hidden[1:]],
        "This is turned round. Few tokens come first and many last.": counts[::-1]}


@exercise((PROBS,))
def check_entropy_of_each(p):  # the entropies in nats of the rows of p (L, V): (L,)
    nats = torch.special.entr(p).sum(-1)
    return nats, {
        "The sign is wrong. An entropy is never negative.": -nats,
        "This is in bits. Take the natural logarithm.": nats / math.log(2)}


def highest(score, k):
    """The mask of the k highest scores of each row."""
    return torch.zeros_like(score).scatter(-1, score.topk(k).indices, 1) > 0


@exercise(([[0.9, 0.2, 0.1, 0.7, 0.4], [0.1, 0.28, 0.15, 0.05, 0.18]],
           [[False, False, True, False, False], [True, False, False, False, False]], 2))
def check_hide_again(said, given, n):  # the mask of the n least likely tokens of each row
    free = said.where(~given, 2)
    return highest(-free, n), {
        "Given tokens never change.": highest(-said, n),
        "These are the likeliest tokens, not the least likely.": highest(said.where(~given, -2), n),
        "argsort says which token is n-th. Its argsort says a token's place.": free.argsort(1) < n}


# ---- 3_tcs
@exercise((PREFIX, SUFFIX))
def check_score_by_hand(prefix, suffix):  # the concrete score (V,)
    score = (prefix + suffix).softmax(-1)
    total = prefix.exp() + suffix.exp()
    return score, {
        "It does not add up to 1. Divide by the sum over all letters.": (prefix + suffix).exp(),
        "These are logarithms. Return probabilities.": score.log(),
        "Do not add probabilities. Both must happen, so multiply.": total / total.sum()}


@exercise((JOINT,), ([[0.12, 0.28], [0.18, 0.42]],))
def check_two_variances(joint):  # of the one-hot text and of c_i, each summed over letters
    c = joint / joint.sum(0)
    squares = (joint * c).sum()
    square_of_mean = joint.sum(1).square().sum()
    one_hot = 1 - square_of_mean
    return [one_hot, squares - square_of_mean], {
        "These are means of squares. Subtract the square of the mean.": [1, squares],
        "Weigh the rests by their probability.": [one_hot, c.var(1, correction=0).sum()],
        "The second is the variance left when the rest is known.": [one_hot, 1 - squares]}


@exercise((PREFIX, SUFFIX, 1, 3), (PREFIX, SUFFIX, 4, 3))
def check_score_of_candidates(prefix, suffix, x_i, K):  # the target (V,) with K candidates
    score = (prefix + suffix).softmax(-1)
    kept = score * highest(prefix, K)
    one_hot = torch.eye(5)[x_i]
    wider = torch.maximum(kept, score * one_hot)
    return kept / kept.sum() if kept[x_i] else one_hot, {
        "x_i is not a candidate here. Then the target is one-hot x_i.": kept / kept.sum(),
        "You made x_i a candidate. That biases the mean.": wider / wider.sum(),
        "Divide by the sum over the candidates, not over all letters.": kept}


@exercise((PREFIX, SUFFIX, 2), (PREFIX, SUFFIX, 1))
def check_mean_of_sampled(prefix, suffix, K):  # the mean target (V,) of K letters from the prefix
    def mean(chance, weight):
        drawn = torch.cartesian_prod(*[torch.arange(5)] * K).view(-1, K)  # all draws (5^K, K)
        weights = weight[drawn]
        shares = chance[drawn].prod(1, keepdim=True) * weights / weights.sum(1, keepdim=True)
        return drawn.flatten().bincount(shares.flatten())
    p = prefix.exp()
    q = suffix.exp()
    return mean(p, q), {
        "This is the score. Each draw is divided by its own sum.": p * q / (p @ q),
        "The prefix counts twice, as the letters are drawn from it.": mean(p, p * q),
        "The draws are not equally likely. Weigh them by the prefix.": mean(torch.ones(5) / 5, q)}


@exercise((MEANS, SUFFIX[:3], PREFIX[:3]))
def check_mean_over_completions(log_c, log_p, log_q):  # the weighted mean (V,) of S rows of c_i
    def weighted(log_w):
        return log_w.softmax(0) @ log_c.exp()
    return weighted(log_p - log_q), {
        "This is a plain mean. Weigh each completion.": log_c.exp().mean(0),
        "The student drew them. Divide by the chance that it did.": weighted(log_p),
        "The weights are turned round.": weighted(log_q - log_p)}


@exercise((PREFIX[:3], [1.0, -0.5], [[0.2, 0.4], [1.0, -0.6], [-0.8, 0.1]], 2))
def check_gradient_score(prefix, gradient, E, x_i):  # the first-order score (V,)
    change = (E - E[x_i]) @ gradient
    return (prefix + change).softmax(-1), {
        "You forgot the prefix. Add it before the softmax.": change.softmax(-1),
        "The sign of the change is wrong.": (prefix - change).softmax(-1),
        "It does not add up to 1. Divide by the sum.": (prefix + change).exp()}


@exercise((4, 16), (1, 16))
def check_tokens_a_position(b, K):  # run by the teacher, on average over a block of b
    return 1 + K * (b - 1) / 2, {
        "You forgot the pass that scores the prefixes.": K * (b - 1) / 2,
        "The last token of a block is never read, so it is not run.": 1 + K * (b + 1) / 2,
        "This is the cost of the block. Divide it by b.": b + K * b * (b - 1) / 2}


@exercise(([-0.2, -1.9, -3.5], [-0.9, 0.4], CORNERS, 0.8),
          ([-0.7, -0.9, -2.4], [0.3, -1.1], CORNERS, -0.4))
def check_seen_through_noise(log_c, z, E, gamma):  # the target for a noisy letter (V,)
    alpha = (1 + math.exp(gamma)) ** -0.5
    sigma = (1 + math.exp(-gamma)) ** -0.5
    near = E @ z                                                                # (V,)
    noise = alpha / sigma ** 2 * near
    return (log_c + noise).softmax(-1), {
        "The exponent of a normal law has sigma² below, not sigma.":
            (log_c + alpha / sigma * near).softmax(-1),
        "The noise lies around alpha E_v, and not around E_v.":
            (log_c + near / sigma ** 2).softmax(-1),
        "You forgot the score: this is what the noise alone says.": noise.softmax(-1)}


# ---- 4_opdlm
def check_pick_states(f):
    """f(states): of each of R blocks a random one of the states (N+1, R, b) before the last."""
    states = torch.arange(20000).view(5, 4000, 1).expand(5, 4000, 3)
    z = returned(f, [states])
    shares = (z.flatten() // 4000).bincount(minlength=5) / z.numel()
    mistakes = {
        "Row r should be one of states[:, r].": not torch.equal(z % 4000, states[0]),
        "All tokens of a block have the same moment.": (z != z[..., :1]).any(),
        "No step begins in the last state.": shares[4] > 0,
        "All states before the last are equally likely.": (shares[:4] - 0.25).abs().max() > 0.04}
    for what, is_made in mistakes.items():
        if is_made:
            raise AssertionError(f"{f.__name__}: {what} You pick them with shares {show(shares)}.")
    print(f"{f.__name__}: right")


@exercise((AR, [[0, 1, 2, 0, 2, 1]], [[2, 2, 1, 1, 0, 2]], 2))
def check_opdlm_target(teacher, x, y, b):  # (1, L, V), each block of y behind earlier ones of x
    target = dlm.prefix(teacher, x, y, b)
    return target, {
        "This grades the real text x. The student wrote y.": teacher(x, x).exp(),
        "A block of y stands behind the earlier blocks of x, not of y.": teacher(y, y).exp(),
        "These are logarithms. Return probabilities.": target.log()}


@exercise(([0.5, 0.3, 0.2], [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], 2))
def check_target_and_truth(start, trans, v):  # OPDLM's target for x_0 when x_1 = v, and the truth
    truth = start * trans[:, v] / (start @ trans[:, v])
    return torch.stack([start, truth]), {
        "The target does not know x_1. It is the same for every v.": torch.stack([truth, truth]),
        "Row 1 does not add up to 1. Divide by its sum.": torch.stack([start, start * trans[:, v]]),
        "trans[v] is what follows v, not what precedes it.": torch.stack([start, trans[v]])}


@exercise((0.9, 3), (0.2, 7))
def check_weight_after(w, n):  # the chance that the first letter is the first mode's
    return 0.5 / n + w * (n - 1) / n, {
        "Nothing moved, but the leftmost hidden letter is told 0.5.": w,
        "Only the leftmost hidden letter is told 0.5. The others are not.": 0.5,
        "This is turned round. One of n letters is told 0.5.": w / n + 0.5 * (n - 1) / n}


@exercise((32, 4), (12, 2))
def check_tokens_of_an_update(L, b):  # [in a plain update, in one of OPDLM], for one text
    plain = L - b + L
    return [plain, plain + L - b + b * L], {
        "You forgot the clean tokens of the earlier blocks.": [L, L + b * L],
        "You count only the writing. The update comes on top.": [plain, L - b + b * L],
        "While writing, clean tokens are run once and kept.": [plain, plain + b * plain]}


# ---- 5_sdtt
@exercise((0.3, 0.2, 2), (0.5, 0.25, 3))
def check_shares_revealed(t, dt, k):  # the chance that a step reveals a hidden token, for k steps
    ratios = [dt / max(t - step * dt, 1e-9) for step in range(k)]
    return [min(ratio, 1) for ratio in ratios], {
        "dt is the share of all tokens. Of those still hidden it is dt / t.": [dt] * k,
        "Time moves on. The second step begins at t - dt.": [dt / t] * k,
        "A probability is at most 1. If less time than dt is left, all are revealed.": ratios}


@exercise((DENOISER, [[1, 3, 3, 3]], [[False, True, False, True]], [[1, 2, 0, 0]]))
def check_two_step_target(teacher, z, first, drawn):  # SDTT's target (1, L, V) at hidden tokens
    later = torch.where(first, drawn, z)
    before = teacher(z, z).exp()
    after = teacher(later, later).exp()
    return torch.where(first[..., None], before, after), {
        "This is the target for k = 1. The second step begins in another state.": before,
        "A token of `first` keeps the distribution that it was drawn from.": after,
        "Both answers are swapped.": torch.where(first[..., None], after, before)}, z == teacher.V


def kl(p, q):
    """The sum of p log(p/q), in nats. 0 log 0 is 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()


@exercise(([0.7, 0.2, 0.1], [0.4, 0.6, 0.0]))
def check_two_divergences(p, q):  # [reverse KL, total variation] of target p and student q
    variation = (p - q).abs().sum() / 2
    return [kl(q, p), variation], {
        "This is forward KL. Swap its arguments.": [kl(p, q), variation],
        "The total variation lacks the factor 1/2.": [kl(q, p), 2 * variation]}


@exercise(([0.7, 0.3, 0.0], [0.0, 0.4, 0.6]))
def check_jensen_shannon(p, q):  # the mean of KL(p || m) and KL(q || m), m the middle
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2, {
        "The KLs have their arguments swapped. m comes second.": (kl(m, p) + kl(m, q)) / 2,
        "This is the sum of both divergences. Take their mean.": kl(p, m) + kl(q, m)}


@exercise(([0.5, 0.3, 0.2], [0.5, 0.4, 0.1], [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.2, 0.5]]))
def check_contradiction(now, chance, later):  # TV of now (V,) from the mean of later (n, V)
    far = (chance @ later - now).abs().sum() / 2
    return far, {
        "The draws are not equally likely. Weigh them.": (later.mean(0) - now).abs().sum() / 2,
        "The total variation lacks the factor 1/2.": 2 * far,
        "This is the mean of the distances. Take the distance of the mean.":
            chance @ (later - now).abs().sum(1) / 2}


@exercise((JOINT,))
def check_cost_of_one_step(joint):  # KL(joint || the best that one step can write), (V, V)
    product = joint.sum(1, keepdim=True) * joint.sum(0)
    return kl(joint, product), {
        "The KL has its arguments swapped. The joint comes first.": kl(product, joint),
        "One step can get each letter's frequency right.": kl(joint, torch.ones(1) / joint.numel())}


@exercise((16, 2, 2), (256, 4, 4))
def check_steps_of_each_round(first, last, k):  # [steps of the teacher, steps of its student], ..
    students = [first // k, last * k, last]
    return [[k * n, n] for n in students], {
        "The student of a round is the next teacher.": [[first, n] for n in students],
        "The teacher takes more steps than its student.": [[n, k * n] for n in students],
        "The round with the most steps comes first.": [[k * n, n] for n in reversed(students)]}


@exercise(([[1.0, 0.0], [2.0, -1.0], [4.0, 3.0], [3.0, 5.0]], 0.9))
def check_average_of_weights(weights, decay):  # the moving average (d,) from row 0 on
    def moving(average, rows, decay):
        for row in rows:
            average = decay * average + (1 - decay) * row
        return average
    first, *later = weights
    return moving(first, later, decay), {
        "`decay` is the share of the old average that stays.": moving(first, later, 1 - decay),
        "The average begins at row 0, not at zero.": moving(0, weights, decay),
        "This is a plain mean. Later weights count more.": weights.mean(0)}
