"""Sources that know all, and sums over everything that can happen, so that nothing is drawn.

`HiddenMarkov` is a source whose every conditional is exact: tests and notebooks draw from it and
ask it. `bound_by_counts` and its neighbours add up the loss and what it bounds (notebook 1). `Sums`
has all states of a small source. It adds up what `dlm.sample` writes in each order (notebook 2),
and the best student that each state can have (notebooks 4 and 5). `leave_one_out` and `averaged`
are targets that an exact source can give, and `TrueDenoiser` is what it says of noisy letters
(notebook 3).

Shapes: S states, T texts, L letters of a text, V letters to choose from.
"""
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import dlm


def every(V, L):
    """All texts of L letters, in alphabetical order: (V ** L, L)."""
    letters = torch.arange(V)
    return torch.cartesian_prod(*[letters] * L).view(-1, L)


# --------------------------------------------------------------------------------------------------
# Exact sources: hidden Markov chains that answer the same calls as a `dlm.Transformer`. The tests
# check everything with them.

class HiddenMarkov(nn.Module):
    """p(s_0) = start, p(s_{i+1} | s_i) = trans, p(x_i | s_i) = emit: every conditional is exact.

    source(x, z) -> log p(x_i | clean blocks left, visible tokens of the own block) (B, L, V), by
    forward-backward: the true AR model at b = 1, the true denoiser at b = L. So it stands in as
    teacher, student or judge, and tells what each should learn; set its attribute b.
    """

    def __init__(self, start, trans, emit, L, b=1):
        super().__init__()
        self.start = torch.as_tensor(start, dtype=torch.float64)                # (S,)
        self.trans = torch.as_tensor(trans, dtype=torch.float64)                # (S, S)
        self.emit = torch.as_tensor(emit, dtype=torch.float64)                  # (S, V)
        self.V = self.emit.size(1)
        self.L = L
        self.b = b
        one_hot_or_zero = torch.eye(self.V + 1).double()[:, :-1]  # [MASK] says nothing
        self.embedding = nn.Embedding.from_pretrained(one_hot_or_zero)

    @staticmethod
    def markov(V, L, seed=0, sharp=2.0):
        """An ordinary Markov chain; the larger `sharp`, the more neighbours share."""
        g = torch.Generator().manual_seed(seed)
        logits = sharp * torch.randn(V + 1, V, generator=g, dtype=torch.float64)
        rows = logits.softmax(-1)
        return HiddenMarkov(rows[0], rows[1:], torch.eye(V), L)

    @staticmethod
    def branch(L, n=10):
        """A uniform x_0; all the rest of the row is x_0, or all of it is x_0 + n/2 (mod n)."""
        trans = torch.zeros(2 * n, 2 * n)              # states: the first letter, then the kept one
        v = torch.arange(n)
        trans[v, n + v] = 0.5
        trans[v, n + (v + n // 2) % n] = 0.5
        trans[n + v, n + v] = 1
        start = torch.cat([torch.ones(n) / n, torch.zeros(n)])
        return HiddenMarkov(start, trans, torch.eye(n).repeat(2, 1), L)

    def forward(self, x, z):
        L = x.size(1)
        clean, _ = self.filter(self.embedding(x), self.before(x))               # p(s_i | x_<i)
        visible = (z < self.V)[..., None]
        seen = torch.where(visible, self.embedding(z) @ self.emit.T, 1.0)  # p(z_i | s_i)  (B, L, S)
        right = torch.ones_like(clean)  # p(visible tokens right of i in the block | s_i)
        for i in range(L - 2, -1, -1):
            if (i + 1) % self.b:
                after = right[:, i + 1] * seen[:, i + 1]
                right[:, i] = scaled(after @ self.trans.T)
        said = []
        for i in range(L):
            if i % self.b == 0:
                state = clean[:, i]
            else:
                state = scaled((state * seen[:, i - 1]) @ self.trans)
            said.append((state * right[:, i]) @ self.emit)
        return normalised(torch.stack(said, 1)).log()

    def before(self, x):
        return self.start.expand(len(x), -1)                                    # (B, S)

    def filter(self, e, state):
        """Tokens e (B, T, V) behind a state (B, S) -> p(s) before each (B, T, S), and last."""
        states = []
        for i in range(e.size(1)):
            states.append(state)
            state = scaled((state * (e[:, i] @ self.emit.T)) @ self.trans)
        return torch.stack(states, 1), state

    def decode(self, x, z, start, stop, wanted, cache):
        return self(x, z)[:, start:stop][wanted], None

    def score_behind(self, x, e, b):
        L = x.size(1)
        states, _ = self.filter(self.embedding(x), self.before(x))
        at_block_starts = states[:, ::b].flatten(0, 1)
        y = F.pad(e, (0, 0, 0, -L % b)).view(-1, b, self.V)
        states, _ = self.filter(y, at_block_starts)
        p = normalised(states @ self.emit).view(len(x), -1, self.V)
        return p[:, :L].log()

    def prefill(self, x):
        states, _ = self.filter(self.embedding(x), self.before(x))
        return normalised(states @ self.emit).log(), states

    def score_continuations(self, e, start, states):
        B, n, G, W, V = e.shape
        state = states[:, start - 1, None].expand(-1, -1, G, -1).flatten(0, 2)
        states, last = self.filter(e.flatten(0, 2), state)
        after = torch.cat([states[:, 1:], last[:, None]], 1)
        return normalised(after @ self.emit).log().view(e.shape)

    def log_prob(self, x):
        """Exact log-likelihood of whole texts x (B, L): (B,), nats."""
        logp, _ = self.prefill(x)
        return dlm.of_tokens(logp, x).sum(1)

    def draw(self, B, generator=None):
        """B texts from the source: (B, L)."""
        state = torch.multinomial(self.start.expand(B, -1), 1, generator=generator)[:, 0]
        x = []
        for _ in range(self.L):
            x.append(torch.multinomial(self.emit[state], 1, generator=generator)[:, 0])
            state = torch.multinomial(self.trans[state], 1, generator=generator)[:, 0]
        return torch.stack(x, 1)


def scaled(p):
    """Sums to 1; where all is 0 it stays 0."""
    return p / p.sum(-1, keepdim=True).clamp(min=1e-300)


def normalised(p):
    """Sums to 1. Impossible evidence (all 0) gives the uniform one."""
    possible = p.sum(-1, keepdim=True) > 0
    return torch.where(possible, scaled(p), 1 / p.size(-1))


# --------------------------------------------------------------------------------------------------
# Notebook 1: the bound in two forms, and what it bounds; of all texts (T, L), nats per token

def blocks(model, L):
    return [block.tolist() for block in torch.arange(L).split(model.b)]


def subsets(block):
    """All sets of tokens of a block but the empty one."""
    sizes = range(1, len(block) + 1)
    return [hidden for m in sizes for hidden in itertools.combinations(block, m)]


@torch.no_grad()
def surprise(model, texts, hidden):
    """-log p of each token of each text when the tokens `hidden` are hidden (T, L); the mask."""
    z = texts.index_fill(1, torch.tensor(hidden), model.V)
    return -of_text(model(texts, z), texts), z == model.V


def bound_by_counts(model, texts):
    """The form of the code: over all sets of m hidden tokens, m uniform. (T,)"""
    total = torch.zeros(len(texts))
    for block in blocks(model, texts.size(1)):
        n = len(block)
        for hidden in subsets(block):
            nll, is_hidden = surprise(model, texts, hidden)
            chance = 1 / n / math.comb(n, len(hidden))
            total = total + chance * (dlm.token_weights(is_hidden, model.b) * nll).sum(1)
    return total


def bound_by_time(model, texts):
    """The form of the papers: the integral over t of 1/t, as a sum of 2000 terms. (T,)"""
    t = (torch.arange(2000).double() + 0.5) / 2000
    total = torch.zeros(len(texts))
    for block in blocks(model, texts.size(1)):
        for hidden in subsets(block):
            nll, is_hidden = surprise(model, texts, hidden)
            m = len(hidden)
            weight = (t ** m * (1 - t) ** (len(block) - m) / t).mean() / texts.size(1)
            total = total + weight * (is_hidden * nll).sum(1)
    return total


def exact_nll(model, texts):
    """-log p of each text, where p is the mean over all orders of revealing it. (T,)"""
    log_p = torch.zeros(len(texts))
    for block in blocks(model, texts.size(1)):
        orders = list(itertools.permutations(block))
        nll = [sum(surprise(model, texts, order[k:])[0][:, i] for k, i in enumerate(order))
               for order in orders]
        log_p = log_p + torch.stack(nll).neg().logsumexp(0) - math.log(len(orders))
    return -log_p / texts.size(1)


# --------------------------------------------------------------------------------------------------
# Notebook 3: what an exact source can say of a hidden letter

def leave_one_out(source, x):
    """log c_i(v) for every i and v (B, L, V): the source as a denoiser, with one letter hidden."""
    L = x.size(1)
    alone = torch.eye(L, dtype=torch.bool)              # row i hides letter i
    rows = x[:, None].expand(-1, L, -1)                                         # (B, L, L)
    z = torch.where(alone, source.V, rows)
    source.b = L
    logp = source(rows.reshape(-1, L), z.view(-1, L))
    source.b = 1
    return logp.view(*rows.shape, -1)[:, alone]


def averaged(source, student, x, z, S=4):
    """c_i averaged over S completions of z: goes towards p_T(x_i | z) as S grows. (B, L, V)

    The student draws a completion with probability q. Its weight is p_T(x_{!=i}) / q(hidden but i).
    """
    x = x.repeat(S, 1)                                                          # (S B, L)
    z = z.repeat(S, 1)
    hidden = z == source.V
    with torch.no_grad():
        log_q = student(x, z).double()
    drawn = dlm.categorical(log_q.exp(), torch.rand(x.shape))
    y = torch.where(hidden, drawn, x)
    log_c = leave_one_out(source, y)
    log_p = source.log_prob(y)[:, None] - of_text(log_c, y)                     # p_T(x_{!=i})
    log_q = of_text(log_q, y) * hidden
    others = log_q.sum(1, keepdim=True) - log_q                                 # q(hidden but i)
    weighted = log_c + (log_p - others)[..., None]
    return weighted.view(S, -1, *weighted.shape[1:]).logsumexp(0).softmax(-1)


class TrueDenoiser(dlm.Continuous):
    """p(x_i | z) of noisy letters z, where only the texts (T, L) can be, with probabilities law (T,).

    points (V, D): where the letters are. It writes by `dlm.sample`, as a continuous student does.
    """

    def __init__(self, texts, law, points):
        V, D = points.shape
        L = texts.size(1)
        super().__init__(dlm.Config(V, L, b=L, n_layer=1, n_head=1, n_embd=2, D=D))
        self.double()
        self.set_points(points.double())
        self.texts = texts
        self.law = law

    def posterior(self, z):
        """p(x | z) of each text: (B, T)."""
        places = torch.arange(self.L)
        seen = self.channel(z)[:, places, self.texts].sum(-1)                   # (B, T)
        return (self.law.log() + seen).softmax(-1)

    def decode(self, x, z, start, stop, wanted, cache=None):
        letters = dlm.one_hot(self.texts, self.V).double()                      # (T, L, V)
        p = torch.einsum("bt,tlv->blv", self.posterior(z), letters)
        return p[wanted].log(), None


def of_text(table, x):
    """What a table (B, L, V) says of the letters of x (B, L): (B, L)."""
    return table.gather(2, x[..., None])[..., 0]


# --------------------------------------------------------------------------------------------------
# Notebooks 2, 4 and 5: all states, what is written, and the best student

class Sums:
    """All states that a sampler with blocks of b can meet in texts of L letters.

    In the last state all is hidden but the letters `given`, which are never hidden. log_prob(texts)
    is the source. A model is a table p (S, L, V): what it says of each letter in each state.
    """

    def __init__(self, log_prob, V, L, b=None, given=()):
        self.V = V
        free = L - len(given)
        self.texts = behind(given, every(V, free))                              # (T, L)
        z = behind(given, every(V + 1, free))
        hidden = z == V
        block = torch.arange(L) // (b or L)
        now = torch.where(hidden, block, L).amin(1, keepdim=True)  # the block that is being written
        met = (hidden | (block <= now)).all(1)                     # all that lies right is hidden
        self.z = z[met]                                                         # (S, L)
        self.hidden = hidden[met]
        self.open = self.hidden & (block == now[met])              # what may be revealed next
        self.done = ~self.hidden.any(1)                            # states that are whole texts
        self.pairs = self.may_become(self.z).nonzero().T           # state, later state  (2, P)

        self.law = log_prob(self.texts).softmax(0)                              # (T,)
        self.likely = self.may_become(self.texts) * self.law                    # (S, T)
        self.possible = self.likely.sum(1) > 0                     # in some text of the source
        one_hot = dlm.one_hot(self.texts, V).to(self.law)
        uniform = self.law.new_full((*self.z.shape, V), 1 / V)
        self.true = self.mean(self.likely, one_hot, uniform)       # the true denoiser

    def may_become(self, z):
        """Which of states or texts z (n, L) show all that each state shows: (S, n)."""
        same = self.z[:, None] == z
        return (same | self.hidden[:, None]).all(2)

    def mean(self, weight, target, p):
        """The best table by forward KL for targets (T, L, V) of texts, weight (S, T) in each state.

        That is their mean. Where no text has weight, or a letter is seen, it is p.
        """
        total = torch.einsum("st,tlv->slv", weight, target.nan_to_num(0))
        mass = total.sum(-1, keepdim=True)
        known = (mass > 0) & self.hidden[..., None]
        return torch.where(known, total / mass.clamp(min=1e-300), p)

    # Writing with a table.

    def drawn(self, p):
        """What p says of the letters of the later state of each pair: (P, L)."""
        before, after = self.pairs
        letters = self.z[after].clamp(max=self.V - 1)
        return of_text(p[before], letters)

    def matrix(self, chance):
        """The chances (P,) of pairs of states as a matrix (S, S)."""
        S = len(self.z)
        return chance.new_zeros(S, S).index_put(tuple(self.pairs), chance)

    def ancestral_step(self, p, share):
        """Probability (S, S) of each next state: a hidden letter is revealed with this share."""
        before, after = self.pairs
        revealed = share * self.drawn(p)
        each = torch.where(self.hidden[after], 1 - share, revealed)
        each = each.where(self.hidden[before], 1.0)
        return self.matrix(each.prod(1))

    def ancestral(self, p, N):
        """The law (T,) of what N ancestral steps write when all is hidden."""
        at = p.new_zeros(len(self.z))
        at[-1] = 1
        for n in range(N):
            at = at @ self.ancestral_step(p, 1 / (N - n))
        return at[self.done]

    # Every order of `dlm.sample` (notebook 2).

    def steps(self, p, order, N=0, threshold=0.0):
        """What `dlm.sample` does with the table p when all is hidden, step after step.

        Yields the probability (P,) that a step begins in the first state of a pair and ends in the
        second. `dlm.Schedule` says which letters come; of two that are equally sure, the left one.
        """
        before, after = self.pairs
        new = self.hidden[before] & ~self.hidden[after]                         # (P, L)
        drawn = self.drawn(p).where(new, 1.0).prod(1)
        shuffle = torch.zeros(self.z.shape)                        # ties go to the left
        schedule = dlm.Schedule(order, N, threshold, shuffle)
        at = p.new_zeros(len(self.z))
        at[-1] = 1
        for step in range(schedule.N):
            flow = at[before] * self.comes(new, schedule, step, p) * drawn
            yield flow
            at = torch.zeros_like(at).index_add(0, after, flow)

    def comes(self, new, schedule, step, p):
        """The chance (P,) that a step reveals just the letters `new` (P, L) of each pair."""
        before, _ = self.pairs
        hidden = self.hidden[before].sum(1)
        count = new.sum(1)
        steps_left = schedule.N - step
        if schedule.order == "ancestral":                          # each for itself
            share = 1 / steps_left
            return share ** count * (1 - share) ** (hidden - count)
        if schedule.order == "random":                             # all sets of k alike
            k = -(-hidden // steps_left)
            sets = torch.tensor([[math.comb(m, n) for n in range(m + 1)] + [0] * (p.size(1) - m)
                                 for m in range(p.size(1) + 1)])
            return (count == k) / sets[hidden, k].to(p)
        chosen = schedule.choose(step, self.hidden, p.log()[self.hidden])       # (S, L)
        return (new == chosen[before]).all(1).to(p)

    def law_of(self, flow):
        """The law (T,) of the finished texts, from the last of `steps`."""
        at = flow.new_zeros(len(self.z)).index_add(0, self.pairs[1], flow)
        return at[self.done]

    def one_by_one(self, p, order="random"):
        """The law of the finished text from each state (S, T), written one letter at a time."""
        before, after = self.pairs
        new = self.hidden[before] & ~self.hidden[after]
        chance = (new * self.turn(p, order)[before] * self.drawn(p)).sum(1)
        chance = chance.where(new.sum(1) == 1, 0.0)
        chance = chance.where(~self.done[before], 1.0)             # a whole text stays
        step = self.matrix(chance)
        return torch.linalg.matrix_power(step, self.z.size(1))[:, self.done]

    def turn(self, p, order):
        """The chance (S, L) that a letter comes next. Where two are equally early, it is either."""
        if order == "random":
            late = torch.zeros_like(p[..., 0])
        if order == "left":
            late = torch.arange(p.size(1)).expand(p.shape[:2])
        if order == "surest":
            late = torch.special.entr(p).sum(-1)
        late = late.double().masked_fill(~self.open, math.inf)
        first = self.open & (late < late.amin(1, keepdim=True) + 1e-6)
        number = first.sum(1, keepdim=True).clamp(min=1)
        return first / number.to(p)

    # SDTT: the best student of a table (notebook 5).

    def met(self, p, N, k):
        """Weight (S, S): how often a target in the first state is what p says in the second.

        The states are those of `dlm.hide_at_step_times`, and the steps those of `dlm.sdtt`.
        """
        hidden = self.hidden.sum(1)
        seen = hidden.max() - hidden
        total = 0
        for m in range(1, N // k + 1):
            t = m * k / N
            at = torch.diag(t ** hidden * (1 - t) ** seen * self.possible)
            for j in range(k):
                left = t - j / N
                share = min(1.0, 1 / N / left) if left > 0 else 1.0
                counted = 1.0 if j == k - 1 else share             # revealed now, or the last step
                total = total + counted * at
                at = at @ self.ancestral_step(p, share)
        return total

    def student(self, p, N, kind, k=2, start=None, updates=300):
        """The best student of N / k steps of the table p of N, by descent on `dlm.divergence`.

        It starts from p, or from another table. Where no state is met it stays p.
        """
        before, after = self.pairs
        weight = self.met(p, N, k)[before, after]
        weight = weight[:, None] * self.hidden[after]                           # (P, L)
        mass = weight.new_zeros(self.z.shape).index_add(0, before, weight)      # (S, L)
        weight = weight / mass[before].clamp(min=1e-300)

        def loss(log_q):
            far = dlm.divergence(p[after], log_q[before], kind)
            return (weight * far).sum()

        q = descend(loss, p if start is None else start, updates)
        return torch.where(mass[..., None] > 0, q, p)

    # OPDLM: a table that learns from what it writes (notebook 4).

    def on_policy(self, target, p, order="random", most=200):
        """Round after round of rollouts and targets (T, L, V), from p on; yields each table."""
        for _ in range(most):
            yield p
            old = p
            p = self.mean(self.one_by_one(p, order), target, p)
            if (p - old).abs().max() < 1e-9:
                break
        yield p


def behind(given, rows):
    """Rows of letters, each behind the letters `given`."""
    given = rows.new_tensor(given).expand(len(rows), -1)
    return torch.cat([given, rows], dim=1)


def descend(loss, p, updates, lr=0.3):
    """The table that minimises loss(log q), from p on, by Adam with a rate that falls to zero."""
    logits = p.log().requires_grad_()
    adam = torch.optim.Adam([logits], lr)
    for i in range(updates):
        adam.param_groups[0]["lr"] = lr * (1 - i / updates)
        adam.zero_grad()
        loss(logits.log_softmax(-1)).backward()
        adam.step()
    return logits.detach().softmax(-1)
