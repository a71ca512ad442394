"""Every objective, target and sampler against brute force: all texts of V=3, L=4, or an exact source."""
import collections
import functools
import itertools
import math
import re
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dlm
from dlm import Config, HiddenMarkov, Transformer

V, L = 3, 4
MASK = V


def random_model(b, L=L, V=V, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = Transformer(Config(V, L, b, n_layer=2, n_head=2, n_embd=16)).to(dtype).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def source(b=1, L=L, V=V):
    """A Markov chain seen through noisy letters: hidden states, so that no conditional is only one letter long."""
    s = HiddenMarkov.markov(V, L, seed=1)
    g = torch.Generator().manual_seed(2)
    emit = torch.randn(V, V, generator=g, dtype=torch.float64).mul(1.5).softmax(-1)
    return HiddenMarkov(s.start, s.trans, emit, L, b)


def texts(L=L, V=V):
    return torch.tensor(list(itertools.product(range(V), repeat=L)))


def blocks(L, b):
    return [range(s, min(s + b, L)) for s in range(0, L, b)]


def subsets(block):
    return [set(s) for m in range(1, len(block) + 1) for s in itertools.combinations(block, m)]


def with_hidden(x, hidden):
    z = x.clone()
    z[:, sorted(hidden)] = MASK
    return z


def true_conditional(log_p, i, given, x):
    """p(x_i = v | x_given) by summing a whole joint distribution log_p (V^L,) over texts() -> (len(x), V)."""
    out = []
    for row in x:
        alike = (texts() == row)[:, sorted(given)].all(1)
        w = log_p.exp() * alike
        out.append(torch.stack([w[texts()[:, i] == v].sum() for v in range(V)]))
    out = torch.stack(out)
    return out / out.sum(1, keepdim=True)


# --- the model ---------------------------------------------------------------------------------------------

def drawn(b, L=6):
    pos, clean = dlm.slots(L, b)
    rows = dlm.attends(pos, clean, pos, clean, b)
    return ["".join("#" if a else "." for a in row) for row in rows]


def test_norm_is_rms_norm():
    h = torch.randn(3, 4, 8)
    torch.testing.assert_close(dlm.norm(h), F.rms_norm(h, (8,), eps=0.0))


def test_rotary_positions_keep_lengths_and_tell_distances():
    rope = random_model(1, L=9).rope
    D = rope.size(-1)
    q, k = torch.randn(2, D, dtype=rope.dtype)
    turned = dlm.rotate(torch.stack([q, k])[:, None].expand(2, 9, D), rope[:, None])
    torch.testing.assert_close(turned.norm(dim=-1), torch.stack([q.norm(), k.norm()])[:, None].expand(2, 9))
    score = turned[0] @ turned[1].T
    torch.testing.assert_close(score[1:, 1:], score[:-1, :-1])
    assert (score[0] - score[0, 0]).abs()[1:].min() > 1e-6


def test_mask_causal():
    assert drawn(1) == ["#.....",
                        "##....",
                        "###...",
                        "####..",
                        "#####.",
                        "######"]


def test_mask_blocks_of_two():
    assert drawn(2) == ["##........",    # clean x0 x1
                        "##........",
                        "####......",    # clean x2 x3 (x4 x5 are nobody's past)
                        "####......",
                        "....##....",    # noisy z0 z1
                        "....##....",
                        "##....##..",    # noisy z2 z3
                        "##....##..",
                        "####....##",    # noisy z4 z5
                        "####....##"]


def test_mask_bidirectional():
    assert drawn(6) == ["######"] * 6


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_each_token_sees_exactly_what_it_may(b):
    model, x = random_model(b), texts()[[5]]
    hidden = {0, 3}
    z = with_hidden(x, hidden)
    base = model(x, z)
    for j in range(L):
        x2 = x.clone()
        x2[0, j] = (x[0, j] + 1) % V
        moved = (model(x2, with_hidden(x2, hidden)) - base).abs().amax(-1)[0] > 1e-9
        for i in hidden:
            sees = j // b < i // b or (j // b == i // b and j not in hidden)
            assert moved[i] == sees, (i, j)


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_cached_decoding_equals_uncached(b):
    model, x = random_model(b), texts()
    z, past = with_hidden(x, {0, 1, 3}), None
    for block in blocks(L, b):
        for _ in range(1 if b == 1 else 2):   # twice: the noisy slots of the first call must not stay in the cache
            logp, past = model.decode(x, z, block[0], block[-1] + 1, past)
            torch.testing.assert_close(logp, model(x, z)[:, block[0]:block[-1] + 1])


@pytest.mark.skipif(not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
                    reason="torch.compile wants a C++ compiler on a CPU")
def test_compiled_equals_uncompiled():
    """GPUs train a compiled model. Forward only, and one layer: compiling takes long."""
    model, x = random_model(2).float(), texts()
    del model.layers[1]
    z = with_hidden(x, {0, 1, 3})
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(x, z), model(x, z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("b", [8, 24])
def test_only_hidden_tokens_are_read(b):
    """The last layer and the head run for hidden tokens alone, which changes nothing at them."""
    model, x = random_model(b, L=24), torch.randint(V, (9, 24))
    z, past, read = with_hidden(x, {0, 1, 3, 9, 12, 14, 20}), None, []
    z[1, 13], z[2] = MASK, x[2]                              # rows with more, and with nothing
    model.head.register_forward_hook(lambda _, inputs, output: read.append(output.size(1)))
    for start in range(0, 24, b):
        most = int((z[:, start:start + b] == MASK).sum(1).max())
        for _ in range(2):
            logp, past = model.decode(x, z, start, start + b, past, most)
            there = z[:, start:start + b] == MASK
            torch.testing.assert_close(logp[there], model(x, z)[:, start:start + b][there])
            assert read[-2] == most
            assert (logp == 0).all(-1).sum() == 9 * (b - most)


def test_cache_filled_late_equals_uncached():
    model, x = random_model(2, L=6), torch.randint(V, (5, 6))
    logp, _ = model.decode(x, x.masked_fill(torch.arange(6) >= 4, MASK), 4, 6, None)   # a prompt of two blocks at once
    torch.testing.assert_close(logp, model(x, x.masked_fill(torch.arange(6) >= 4, MASK))[:, 4:])


def test_shorter_texts_than_the_context():
    for b in (1, 2, 4):
        model, x = random_model(b), texts()[:, :3]
        z = with_hidden(x, {0, 2})
        long = torch.cat([x, x[:, :1]], 1), torch.cat([z, torch.full((len(x), 1), MASK)], 1)
        if b < 4:   # at b = L a fourth, hidden token is one more slot to attend to
            same = model(x, z)[:, :2 if b == 2 else 3]
            torch.testing.assert_close(same, model(*long)[:, :same.size(1)])
        assert model(x, z).shape == (len(x), 3, V)


# --- exact sources -----------------------------------------------------------------------------------------

def test_source_is_a_distribution_and_draws_from_it():
    s, x = source(), texts()
    p = s.log_prob(x).exp()
    assert abs(p.sum() - 1) < 1e-12
    n = 20000
    seen = (s.draw(n, torch.Generator().manual_seed(0)) @ V ** torch.arange(L - 1, -1, -1)).bincount(minlength=V ** L)
    assert chi_square(seen, p) < 1


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_source_conditionals(b):
    s, x = source(b), texts()
    log_p = s.log_prob(x)
    for block in blocks(L, b):
        for hidden in subsets(block):
            logp = s(x, with_hidden(x, hidden))
            for i in hidden:
                given = set(range(block[0])) | (set(block) - hidden)
                torch.testing.assert_close(logp[:, i].exp(), true_conditional(log_p, i, given, x))


def test_branch():
    s = HiddenMarkov.branch(3)
    x = s.draw(200, torch.Generator().manual_seed(0))
    assert ((x[:, 1] == x[:, 2]) & ((x[:, 1] - x[:, 0]) % 5 == 0)).all() and len(x.unique(dim=0)) == 20
    s.b = 3
    p = s(torch.tensor([[3, 0, 0]]), torch.tensor([[3, 10, 10]])).exp()[0]
    assert p[1, 3] == p[1, 8] == p[2, 3] == p[2, 8] == 0.5
    p = s(torch.tensor([[3, 0, 0]]), torch.tensor([[3, 8, 10]])).exp()[0]
    assert p[2, 8] == 1
    assert not s(torch.tensor([[3, 0, 0]]), torch.tensor([[4, 8, 3]])).isnan().any()   # a contradiction: no NaN


# --- the bound ---------------------------------------------------------------------------------------------

def chi_square(counts, p):
    """Pearson's statistic over (its 99.9% point): fails above 1. Cells expected under 5 are pooled."""
    e = p.double() * counts.sum()
    big = e >= 5
    if not big.all():
        counts, e = (torch.cat([a[big], a[~big].sum()[None]]) for a in (counts.double(), e))
    k = len(e) - 1
    limit = k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3   # Wilson-Hilferty
    return (((counts - e) ** 2 / e.clamp(min=1e-9)).sum() / limit).item()


def bound_by_counts(model, x):
    """m uniform on 1..|B|, a uniform m-subset, mean over the hidden: through `weights`, as the loss does. (n,)"""
    total = 0
    for block in blocks(L, model.b):
        for hidden in subsets(block):
            z = with_hidden(x, hidden)
            nll = -model(x, z).gather(2, x[..., None])[..., 0]
            chance = 1 / len(block) / math.comb(len(block), len(hidden))
            total = total + chance * (dlm.weights(z == MASK, model.b) * nll).sum(1)
    return total


def bound_by_time(model, x):
    """∫ 1/t E Σ_hidden -log p dt: a subset of size m of n has ∫ t^(m-1) (1-t)^(n-m) dt = (m-1)! (n-m)! / n!. (n,)"""
    total = 0
    for block in blocks(L, model.b):
        for hidden in subsets(block):
            m, n = len(hidden), len(block)
            integral = math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n)
            nll = -model(x, with_hidden(x, hidden)).gather(2, x[..., None])[..., 0]
            total = total + integral * nll[:, sorted(hidden)].sum(1)
    return total / L


def random_orders(model, x):
    """Each text's mean NLL over all generation orders inside blocks, and minus the log of its mean probability. (n,)"""
    mean, log_p = 0, 0
    for block in blocks(L, model.b):
        orders = list(itertools.permutations(block))
        paths = []
        for order in orders:
            path = 0
            for k, i in enumerate(order):
                path = path + model(x, with_hidden(x, set(order[k:])))[:, i].gather(1, x[:, i:i + 1])[:, 0]
            paths.append(path)
        paths = torch.stack(paths)
        mean, log_p = mean - paths.mean(0), log_p + paths.logsumexp(0) - math.log(len(orders))
    return mean / L, -log_p / L


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_bound_three_ways(b):
    model, x = random_model(b), texts()
    counts = bound_by_counts(model, x)
    mean, order_law = random_orders(model, x)
    torch.testing.assert_close(counts, bound_by_time(model, x), atol=1e-6, rtol=0)
    torch.testing.assert_close(counts, mean, atol=1e-6, rtol=0)
    assert (counts >= order_law - 1e-6).all()
    if b == 1:
        exact = -model(x, x).gather(2, x[..., None])[..., 0].mean(1)   # the AR NLL
        torch.testing.assert_close(counts, exact, atol=1e-6, rtol=0)
        torch.testing.assert_close(exact, order_law, atol=1e-6, rtol=0)
    else:
        assert (counts > order_law + 1e-4).any()   # random conditionals do not agree with one joint


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_loss_and_reported_bound_estimate_the_bound(b):
    model, x = random_model(b), texts()
    exact = bound_by_counts(model, x).mean().item()
    torch.manual_seed(0)
    values = []
    with torch.no_grad():
        for _ in range(300):
            z = dlm.hide(x, b, MASK)
            values.append(dlm.loss(model, x, z, dlm.one_hot(x, V).double()).item())
    values = torch.tensor(values)
    assert abs(values.mean() - exact) < 4 * values.std() / 300 ** 0.5 + 1e-6
    mean, se = dlm.bound(model, x, repeats=200)
    assert abs(mean - exact) < 0.01 and se > 0


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_hidden_counts_are_uniform_and_subsets_too(b):
    x = torch.zeros(60000, L, dtype=torch.long)
    torch.manual_seed(0)
    hidden = dlm.hide(x, b, MASK) == MASK
    for block in blocks(L, b):
        h = hidden[:, list(block)]
        n = len(block)
        code = (h.long() * 2 ** torch.arange(n)).sum(1).bincount(minlength=2 ** n)
        p = torch.tensor([0.0] + [1 / n / math.comb(n, bin(c).count("1")) for c in range(1, 2 ** n)])
        assert code[0] == 0
        assert n == 1 or chi_square(code[1:], p[1:]) < 1
    one = dlm.hide(torch.zeros(12, L, dtype=torch.long), 4, MASK) == MASK
    assert one.sum(1).bincount().tolist() == [0, 3, 3, 3, 3]   # stratified over the batch


# --- the sampler -------------------------------------------------------------------------------------------

def n_step_law(model, N):
    """The exact law of N-step ancestral sampling: each hidden token is revealed at a uniform one of N steps. (V^L,)"""
    x, law = texts(), torch.ones(V ** L, dtype=torch.float64)
    for block in blocks(L, model.b):
        p = 0
        for when in itertools.product(range(N), repeat=len(block)):
            path = 0
            for n in set(when):
                hidden = {i for i, w in zip(block, when) if w >= n}
                now = [i for i, w in zip(block, when) if w == n]
                path = path + model(x, with_hidden(x, hidden)).gather(2, x[..., None])[:, now, 0].sum(1)
            p = p + path.exp() / N ** len(block)
        law = law * p
    return law


@pytest.mark.parametrize("b", [1, 2, 3, 4])
@pytest.mark.parametrize("N", [1, 2, 3])
def test_ancestral_sampler_follows_its_law(b, N):
    model = random_model(b)
    law = n_step_law(model, N)
    assert abs(law.sum() - 1) < 1e-9
    torch.manual_seed(N)
    x = dlm.generate(model, 20000, N, order="ancestral")
    assert chi_square((x @ V ** torch.arange(L - 1, -1, -1)).bincount(minlength=V ** L), law) < 1


def test_ancestral_steps_fall_evenly():
    """METHODS 6: after n of N steps a share 1 - n/N of the tokens is hidden."""
    z = torch.full((400, 64), MASK)
    torch.manual_seed(0)
    states = torch.stack(list(dlm.sample(random_model(64, L=64), z, 4, "ancestral")))
    hidden = (states == MASK).float().mean((1, 2))
    torch.testing.assert_close(hidden, torch.tensor([1, 0.75, 0.5, 0.25, 0]), atol=0.015, rtol=0)    # 5 standard errors


def test_many_steps_are_the_random_order_sampler():
    model = random_model(4)
    random_order = (-L * random_orders(model, texts())[1]).exp()
    torch.manual_seed(0)
    x = dlm.generate(model, 3000, 200, order="ancestral")
    assert chi_square((x @ V ** torch.arange(L - 1, -1, -1)).bincount(minlength=V ** L), random_order) < 1


GIVEN = (1, MASK, MASK, MASK)   # with nothing given, a network without positions is equally sure everywhere: ties


def law_of_order(model, order, N, threshold=0.0, remask=0):
    """The exact law of `sample` from GIVEN, by following every path: which tokens each step reveals, and as what. (V^L,)"""
    x, L, b = texts(), model.L, model.b

    @functools.cache
    def outcomes(z, said, start, step):
        """{text: probability} from state z, whose tokens were drawn with probabilities `said`, when `step` steps of the
        block at `start` are done."""
        if start >= L:
            return {z: 1.0}
        block = range(start, min(start + b, L))
        steps = 1 if b == 1 else b if threshold else N
        if step == steps + remask:
            return outcomes(z, said, block[-1] + 1, 0)
        if step < steps:
            return reveal(z, said, start, step)
        free, law = [i for i in block if GIVEN[i] == MASK], collections.Counter()
        number = -(-len(free) // steps)
        least = [sorted(free, key=lambda i: said[i])[:number]] if order != "random" else list(
            itertools.combinations(free, number))
        for again in least:
            hidden = tuple(MASK if i in again else v for i, v in enumerate(z))
            for text, r in reveal(hidden, said, start, step).items():
                law[text] += r / len(least)
        return law

    def reveal(z, said, start, step):
        block = range(start, min(start + b, L))
        hidden = [i for i in block if z[i] == MASK]
        steps = 1 if b == 1 else b if threshold else N
        p = model(torch.tensor([z]), torch.tensor([z])).exp()[0].detach()
        sure = {i: {"confidence": p[i].max(), "margin": p[i].sort().values[-1] - p[i].sort().values[-2],
                    "entropy": (p[i] * p[i].log()).sum().exp(), "left": -i, "spread": (p[i] * p[i].log()).sum()}.get(order) for i in hidden}
        ranked = sorted(hidden, key=lambda i: -sure[i]) if order != "random" else hidden
        total = sum(GIVEN[i] == MASK for i in block)
        count = total // steps + (step < total % steps)
        count = count if step < steps else len(hidden)
        if order == "spread" and step < steps and not threshold:     # the surest of each stretch of `steps` hidden tokens
            free = [i for i in block if GIVEN[i] == MASK]
            stretches = [free[j:j + steps] for j in range(0, len(free), steps)]
            ranked = [min(set(s) & set(hidden), key=lambda i: (-sure[i], i)) for s in stretches if set(s) & set(hidden)]
            assert len(ranked) == count
        chosen = [ranked[:count]] if order != "random" else list(itertools.combinations(hidden, min(count, len(hidden))))
        if threshold and hidden:                                 # the first in order, and whatever is sure
            enough = {i for i in hidden if float(p[i].max() if order in ("left", "random") else sure[i]) >= threshold}
            chosen = [sorted(enough | {first}) for first in (hidden if order == "random" else ranked[:1])]
        law = collections.Counter()
        for now in chosen:
            for values in itertools.product(range(V), repeat=len(now)):
                after, drawn, q = list(z), list(said), 1 / len(chosen)
                for i, v in zip(now, values):
                    after[i], drawn[i], q = v, p[i, v].item(), q * p[i, v].item()
                for text, r in outcomes(tuple(after), tuple(drawn), start, step + 1).items():
                    law[text] += q * r
        return law

    law = outcomes(GIVEN, (0.0,) * L, 0, 0)
    return torch.tensor([law[tuple(t)] for t in x.tolist()])


@pytest.mark.parametrize("order", dlm.ORDERS[1:])
@pytest.mark.parametrize("make", [source, random_model], ids=["source", "Transformer"])
def test_every_order_follows_its_law(make, order):
    for b, N in [(4, 1), (4, 2), (4, 3), (4, 4), (2, 1), (2, 2), (3, 2)]:
        model = make(b)
        law = law_of_order(model, order, N)
        torch.manual_seed(N)
        x = dlm.generate(model, 5000, N, torch.tensor(GIVEN), order=order)
        assert chi_square((x @ V ** torch.arange(L - 1, -1, -1)).bincount(minlength=V ** L), law) < 1, (b, N)


@pytest.mark.parametrize("make", [source, random_model], ids=["source", "Transformer"])
@pytest.mark.parametrize("order", ["left", "random", "confidence", "entropy"])
@pytest.mark.parametrize("threshold", [0.3, 0.55, 0.7, 1.0])
def test_threshold_follows_its_law(make, order, threshold):
    for b in (2, 4):
        model = make(b)
        law = law_of_order(model, order, 0, threshold)
        torch.manual_seed(0)
        x = dlm.generate(model, 5000, given=torch.tensor(GIVEN), order=order, threshold=threshold)
        assert chi_square((x @ V ** torch.arange(L - 1, -1, -1)).bincount(minlength=V ** L), law) < 1, b


@pytest.mark.parametrize("order", dlm.ORDERS)
@pytest.mark.parametrize("make", [source, random_model], ids=["source", "Transformer"])
@pytest.mark.parametrize("b", [1, 2, 4])
def test_a_row_is_the_same_alone_and_among_others(make, order, b):
    noise = torch.rand(9, L, 6, dtype=torch.float64)
    given = torch.where(torch.rand(9, L) < 0.3, torch.randint(V, (9, L)), MASK)
    given[:, 0] = torch.randint(V, (9,))                   # with nothing to attend to but [MASK], all are equally sure
    for how in ({"steps": 2}, {"steps": 7}, {"threshold": 0.6}, {"steps": 2, "temperature": 0.7, "top_k": 2, "top_p": 0.8},
                {"steps": 2, "remask": 2}, {"threshold": 0.6, "remask": 2}):
        u = noise[..., :2 + 2 * how.get("remask", 0)]
        states = list(dlm.sample(make(b), given, order=order, noise=u, **how))
        alone = [list(dlm.sample(make(b), given[r:r + 1], order=order, noise=u[r:r + 1], **how)) for r in range(9)]
        assert torch.equal(states[-1], torch.cat([a[-1] for a in alone]))
        assert torch.equal(states[-1].where(given < MASK, MASK), given) and (states[-1] < MASK).all()   # kept, and full


@pytest.mark.parametrize("order", ["random", "confidence"])
@pytest.mark.parametrize("make", [source, random_model], ids=["source", "Transformer"])
def test_remasking_follows_its_law(make, order):
    for b, N, remask in [(4, 2, 1), (2, 2, 2)]:
        model = make(b)
        law = law_of_order(model, order, N, remask=remask)
        torch.manual_seed(N)
        x = dlm.generate(model, 5000, N, torch.tensor(GIVEN), order=order, remask=remask)
        assert chi_square((x @ V ** torch.arange(L - 1, -1, -1)).bincount(minlength=V ** L), law) < 1, (b, N, remask)


def test_remasking_random_tokens_one_by_one_keeps_a_true_law():
    """Hiding one random token and drawing it from its true conditional is Gibbs sampling."""
    model = source(L)
    true = law_of_order(model, "random", L)
    assert (law_of_order(model, "random", L, remask=2) - true).abs().max() < 1e-9
    far = [(law_of_order(model, "random", 1, remask=r) - true).abs().sum() for r in (0, 1)]
    assert far[0] > 0.05 and far[0] == pytest.approx(far[1])     # all at once, again: no better


def test_calls_are_counted_and_none_is_wasted():
    """METHODS 6: ancestral with N steps over L tokens needs N(1 - (1 - 1/N)^L) calls for a row, on average."""
    model = random_model(64, L=64, dtype=torch.float32)
    for N, mean in [(64, 40.6), (256, 56.7)]:
        calls = []
        for seed in range(30):
            torch.manual_seed(seed)
            with dlm.counting(model) as count:
                dlm.generate(model, 1, N, order="ancestral")
            calls.append(count["calls"])
        calls = torch.tensor(calls).float()
        assert abs(calls.mean() - mean) < 3 * calls.std() / 30 ** 0.5
    with dlm.counting(model) as count:                      # in a batch a row is run only when it reveals something
        dlm.generate(model, 50, 64, order="ancestral")
    assert abs(count["slots"] / 64 / 50 - 40.6) < 2 and count["calls"] <= 64
    with dlm.counting(model) as count:
        dlm.generate(model, 3, 200, order="confidence")     # more steps than tokens: one call a token
    assert count["calls"] == 64
    with dlm.counting(model) as count:
        dlm.generate(model, 3, 64, torch.zeros(64, dtype=torch.long))
    assert count["calls"] == 0                              # nothing is hidden


def test_top_k_and_top_p_keep_rows_apart():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    warp = lambda **how: dlm.warp(p.log(), **how)   # noqa: E731
    torch.testing.assert_close(warp(), p)
    torch.testing.assert_close(warp(top_k=2), torch.tensor([[0.625, 0.375, 0], [0, 2 / 9, 7 / 9]]))
    torch.testing.assert_close(warp(top_k=1), torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    torch.testing.assert_close(warp(temperature=0), warp(top_k=1))
    torch.testing.assert_close(warp(top_p=0.6), torch.tensor([[0.625, 0.375, 0], [0, 0, 1]]))
    torch.testing.assert_close(warp(top_p=0.01), warp(top_k=1))
    torch.testing.assert_close(warp(temperature=0.5), p ** 2 / (p ** 2).sum(-1, keepdim=True))


def test_confidence_takes_the_surest_position_first():
    model, z = random_model(4), torch.full((50, L), MASK)
    z[:, 1] = torch.arange(50) % V                          # from all-mask every place is as sure
    states = list(dlm.sample(model, z, 3, "confidence"))
    for before, after in zip(states, states[1:]):
        sure = model(before, before).amax(-1).masked_fill(before != MASK, -math.inf)
        changed = before != after
        assert (changed.sum(1) == 1).all() and (changed.float().argmax(1) == sure.argmax(1)).all()


@pytest.mark.parametrize("order", dlm.ORDERS)
@pytest.mark.parametrize("b", [1, 2, 5, 17])
def test_nothing_stays_hidden_and_given_tokens_stay(order, b):
    for L in (1, 2, 5, 16, 17):
        model = random_model(min(b, L), L=L, dtype=torch.float32)
        for N in (1, 2, 3, 7, 20):
            torch.manual_seed(N)
            given = torch.where(torch.rand(3, L) < 0.4, torch.randint(V, (3, L)), MASK)
            states = list(dlm.sample(model, given, N, order))
            assert (states[-1] < V).all()
            for a, c in zip(states, states[1:]):
                assert ((a == c) | (a == MASK)).all()   # what is written stays


class Clueless:
    """A denoiser that says nothing, at once."""
    V, b, embedding = V, 17, torch.nn.Embedding(1, 1)

    def decode(self, x, z, start, stop, past, most):
        return torch.zeros(len(z), stop - start, V), None


@pytest.mark.parametrize("order", dlm.ORDERS)
def test_nothing_stays_hidden_for_any_length_and_steps(order):
    model = Clueless()
    for model.L in range(1, 18):
        for N in range(1, 21):
            z = torch.full((2, model.L), MASK)
            z[0, 0] = 1
            *_, x = dlm.sample(model, z, N, order, remask=N % 3)
            assert (x < V).all() and x[0, 0] == 1


def test_spread_takes_one_token_of_each_stretch():
    model = random_model(16, L=16)
    given = torch.full((3, 16), MASK)
    given[:, 5:7] = 1
    before, *states = dlm.sample(model, given, 4, "spread")
    stretches = [[0, 1, 2, 3], [4, 7, 8, 9], [10, 11, 12, 13], [14, 15]]
    for step, after in enumerate(states):
        for s in stretches:
            assert ((before[:, s] != after[:, s]).sum(1) == (step < len(s))).all()
        before = after


def test_confidence_reveals_equally_many_a_step():
    model = random_model(16, L=16)
    states = list(dlm.sample(model, torch.full((3, 16), MASK), 5, "confidence"))
    assert [(s == MASK).sum(1).tolist() for s in states] == [[n] * 3 for n in (16, 12, 9, 6, 3, 0)]


def test_temperature():
    model = random_model(4)
    greedy = [dlm.generate(model, 4, 4, order="confidence", temperature=0.0) for _ in range(2)]
    assert (greedy[0] == greedy[0][0]).all() and (greedy[0] == greedy[1]).all()
    hidden = torch.full((1, L), MASK)
    p = (model(hidden, hidden) / 0.5).softmax(-1)[0]
    torch.manual_seed(0)
    x = dlm.generate(model, 5000, 1, temperature=0.5)
    for i in range(L):
        assert chi_square(x[:, i].bincount(minlength=V), p[i]) < 1


def test_draw_is_exact_at_the_edges():
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    u = torch.tensor([0.0, 0.49, 0.5, 0.999999])
    assert dlm.draw(p.expand(4, 5), u).tolist() == [1, 1, 3, 3]


def test_branch_disagrees_as_it_must():
    """k tokens in one step leave 2^-(k-1) of the rows whole, later steps cost nothing: METHODS 6."""
    s = HiddenMarkov.branch(9)
    s.b = 9
    x0 = torch.randint(10, (4000, 1))
    given = torch.cat([x0, torch.full((4000, 8), 10)], 1)
    for N, whole in [(2, 0.19), (4, 0.53), (8, 0.75), (16, 0.88)]:
        y = dlm.generate(s, 4000, N, given, order="ancestral")[:, 1:]
        assert abs((y == y[:, :1]).all(1).float().mean() - whole) < 0.03


def test_correct_finds_a_planted_error():
    """On a source where a row repeats its first letter: one wrong letter is doubted without end, and mended."""
    s = HiddenMarkov(torch.ones(5) / 5, torch.eye(5), 0.99 * torch.eye(5) + 0.002 * torch.ones(5, 5), 8, b=8)
    x = torch.full((8,), 3)
    assert list(dlm.correct(s, x)) == []
    wrong = x.clone()
    wrong[[2, 6]] = torch.tensor([1, 4])
    found = list(dlm.correct(s, wrong))
    assert sorted(i for i, _, _ in found) == [2, 6] and torch.equal(found[-1][2], x)
    z = wrong.clone()
    z[2] = 5
    p = s(wrong[None], z[None])[0, 2]
    assert {i: d for i, d, _ in found}[2] == pytest.approx(float(p.max() - p[1]), rel=0.5)   # 6 may have been mended first
    assert wrong[2] == 1                                                                # the caller's text stays
    model = random_model(4)
    tries = [i for i, _, _ in dlm.correct(model, torch.tensor([0, 1, 2, 0]), doubt=0)]
    assert len(set(tries)) == len(tries)                                                # it ends


def test_distinct():
    x = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert dlm.distinct(x, 2) == 4 / 6 and dlm.distinct(x, 3) == 1.0


def test_unseen_tokens_are_noticed():
    z = torch.tensor([[0, MASK, 1, MASK]])
    assert dlm.unseen(z, random_model(2)) and dlm.unseen(z, random_model(1)) and not dlm.unseen(z, random_model(4))
    assert not dlm.unseen(torch.tensor([[0, MASK, MASK, MASK]]), random_model(1))


# --- divergences and targets -------------------------------------------------------------------------------

def test_divergences():
    torch.manual_seed(0)
    p, q = torch.randn(50, 7).softmax(-1), torch.randn(50, 7).softmax(-1)
    for kind in ("forward", "reverse", "tvd", "mse"):
        assert dlm.divergence(p, p.log(), kind).abs().max() < 1e-6
        assert (dlm.divergence(p, q.log(), kind) > 0).all()
    torch.testing.assert_close(dlm.divergence(p, q.log()), F.kl_div(q.log(), p, reduction="none").sum(-1))
    torch.testing.assert_close(dlm.divergence(p, q.log(), "reverse"), F.kl_div(p.log(), q, reduction="none").sum(-1))
    torch.testing.assert_close(dlm.divergence(p, q.log(), "tvd"), (p - q).abs().sum(-1) / 2)
    torch.testing.assert_close(dlm.divergence(p, q.log(), "mse"), ((p - q) ** 2).sum(-1))
    sure = torch.eye(7)[[2]]
    torch.testing.assert_close(dlm.divergence(sure, q[:1].log()), -q[:1, 2].log())   # cross-entropy
    assert dlm.divergence(sure, q[:1].log(), "reverse").isinf().all()
    assert dlm.divergence(sure, sure.log()) == 0   # no NaN from 0 log 0
    with pytest.raises(dlm.UserError):
        dlm.divergence(p, q.log(), "jensen")


@pytest.mark.parametrize("kind", ["forward", "reverse", "tvd", "mse"])
def test_divergence_of_a_thousand_to_one(kind):
    """Worked by hand: p = (1/2, 1/2), q = (1/4, 3/4)."""
    value = {"forward": 0.1438410, "reverse": 0.1308120, "tvd": 0.25, "mse": 0.125}[kind]
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    assert abs(dlm.divergence(p, q.log(), kind) - value) < 1e-6


# --- TCS ---------------------------------------------------------------------------------------------------

everywhere = torch.arange(L).expand(V ** L, L)


def leave_one_out(teacher, b):
    """c_i(v) = p_T(v | prefix, rest of i's block), by summing the teacher's joint distribution. (V^L, L, V)"""
    x = texts()
    log_p = teacher(x, x).gather(2, x[..., None]).sum((1, 2)).double()
    return torch.stack([true_conditional(log_p, i, set(range(min((i // b + 1) * b, L))) - {i}, x) for i in range(L)], 1)


@pytest.mark.parametrize("teacher", [source(), random_model(1)], ids=["source", "Transformer"])
@pytest.mark.parametrize("b", [2, 3, 4])
@pytest.mark.parametrize("budget", [16384, 5])
def test_exact_score_is_the_leave_one_out_conditional(teacher, b, budget, monkeypatch):
    score = dlm.suffix_log_prob
    monkeypatch.setattr(dlm, "suffix_log_prob", lambda *a: score(*a, budget=budget))
    c = dlm.concrete_score(teacher, texts(), everywhere, b, **dlm.ESTIMATORS["exact"]).exp().double()
    torch.testing.assert_close(c, leave_one_out(teacher, b), atol=1e-5, rtol=0)


@pytest.mark.parametrize("b", [2, 3, 4])
def test_exact_score_where_most_texts_are_impossible(b):
    """On `branch` nearly every substitution has probability zero: no NaN, and still the leave-one-out conditional."""
    teacher = HiddenMarkov.branch(L, 4)
    x = teacher.draw(30)
    c = dlm.concrete_score(teacher, x, torch.arange(L).expand(30, L), b).exp()
    for i in range(L):
        each = []
        for v in range(4):
            other = x[:, :(i // b + 1) * b].clone()
            other[:, i] = v
            each.append(teacher.log_prob(other).exp())
        each = torch.stack(each, 1)
        torch.testing.assert_close(c[:, i], each / each.sum(1, keepdim=True), atol=1e-6, rtol=0)


def test_top_k_of_everything_is_exact():
    for by in ("prefix", "grad"):
        a = dlm.concrete_score(random_model(1), texts(), everywhere, 4, by, V)
        torch.testing.assert_close(a, dlm.concrete_score(random_model(1), texts(), everywhere, 4))


@pytest.mark.parametrize("b", [2, 4])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_top_k_averaged_over_the_posterior_is_the_marginal(b, K):
    """E over x ~ p_T(x | z) of the target is p_T(x_i | z) for every K, because candidates depend on x_<i only."""
    teacher, x = source(), texts()
    log_p = teacher.log_prob(x)
    c = dlm.concrete_score(teacher, x, everywhere, b, K=K).exp()
    denoiser = source(b)
    for block in blocks(L, b):
        for hidden in subsets(block):
            true = denoiser(x, with_hidden(x, hidden)).exp()
            seen = sorted(set(range(block[-1] + 1)) - hidden)
            for r in range(0, V ** L, 7):
                w = log_p.exp() * (x == x[r])[:, seen].all(1)
                for i in hidden:
                    torch.testing.assert_close((w[:, None] * c[:, i]).sum(0) / w.sum(), true[r, i], atol=1e-5, rtol=0)


def test_prefix_is_biased():
    """The control really is another target: its average over the posterior is not the marginal."""
    x = texts()
    log_p = source().log_prob(x)
    c = dlm.concrete_score(source(), x, everywhere, 4, **dlm.ESTIMATORS["prefix"]).exp()
    torch.testing.assert_close(c[:, 1], true_conditional(log_p, 1, {0}, x))
    assert ((log_p.exp()[:, None] * c[:, 0]).sum(0) - true_conditional(log_p, 0, set(), x)[0]).abs().max() < 1e-9
    assert (c[:, 0] - true_conditional(log_p, 0, {1, 2, 3}, x)).abs().max() > 0.05


class AffineTeacher(nn.Module):
    """log p(x_j | x_<j) = base_j + Σ_{i<j} <e_i, A[i, j, x_j]>: affine in every embedding (and not normalised)."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.V, self.L, self.b = V, L, 1
        self.embedding = nn.Embedding.from_pretrained(torch.randn(V + 1, 5, generator=g, dtype=torch.float64))
        self.A = torch.randn(L, L, V, 5, generator=g, dtype=torch.float64)
        self.base = torch.randn(L, V, generator=g, dtype=torch.float64)

    def terms(self, e):
        """e (B, T, d) -> what token i adds to position j: (B, T, L, V), only for j > i."""
        later = torch.arange(L) > torch.arange(e.size(1))[:, None]
        return torch.einsum("bid,ijvd->bijv", e, self.A[:e.size(1)]) * later[None, :, :, None]

    def prefill(self, x):
        e = self.embedding(x)
        return self.base + self.terms(e).sum(1), e

    def restart(self, x, e, b):
        i, j = torch.arange(L)[:, None], torch.arange(L)
        own = (i // b == j // b)[None, :, :, None]
        return self.base + torch.where(own, self.terms(e), self.terms(self.embedding(x))).sum(1)

    def extend(self, e, start, past, rows):
        out = []
        for r, s in enumerate(start.tolist()):   # a test's oracle may loop
            for tokens in e[r]:
                whole = torch.cat([past[rows[r], :s - 1], tokens])[:L]
                logits = self.base + self.terms(whole[None]).sum(1)[0]
                out.append(torch.cat([logits, logits])[s:s + e.size(2)])
        return torch.stack(out).view(*e.shape[:3], V)


@pytest.mark.parametrize("b", [2, 3, 4])
def test_gradient_score_is_exact_where_the_suffix_is_affine(b):
    teacher, x = AffineTeacher(), texts()
    exact = dlm.concrete_score(teacher, x, everywhere, b, **dlm.ESTIMATORS["exact"])
    grad = dlm.concrete_score(teacher, x, everywhere, b, **dlm.ESTIMATORS["grad"])
    torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("b", [2, 3, 4])
def test_gradient_by_finite_differences(b):
    """∇_{e_i} log p_T(rest of i's block), each token's embedding nudged in turn, with all else as it is."""
    model, x = random_model(1), texts()[[7, 50]]
    g = dlm.suffix_gradient(model, x, b)
    for i in range(L):
        for d in range(3):
            change = []
            for eps in (1e-5, -1e-5):
                e = model.embedding(model.shift(x)).detach().clone()
                if i + 1 < L:
                    e[:, i + 1, d] += eps
                logp = model.run(e, torch.arange(L), "causal").gather(2, x[..., None])[..., 0]
                change.append(logp[:, i + 1:min((i // b + 1) * b, L)].sum(1))
            torch.testing.assert_close((change[0] - change[1]) / 2e-5, g[:, i, d], atol=1e-6, rtol=1e-4)


def test_one_hot_where_the_text_is_no_candidate():
    teacher, x = source(), texts()
    c = dlm.concrete_score(teacher, x, everywhere, 4, K=1).exp()
    first = teacher(x, x).argmax(-1) == x
    torch.testing.assert_close(c, dlm.one_hot(x, V).double())   # K=1: the only candidate, or not a candidate
    c = dlm.concrete_score(teacher, x, everywhere, 4, K=2).exp()
    assert (c.gather(2, x[..., None]) > 0).all() and first.any() and not first.all()


@pytest.mark.parametrize("estimator", dlm.ESTIMATORS)
@pytest.mark.parametrize("K", [None, 2])
def test_the_table_of_targets_is_the_concrete_score(estimator, K):
    """Every row of the table, made dense, in any order; rows sum to 1; at most K candidates, or the text alone."""
    teacher, x = random_model(1), texts()
    how = {**dlm.ESTIMATORS[estimator]}
    how["K"] = how["K"] and (K or how["K"])
    rows = torch.randperm(V ** L)[:50]
    p = dlm.dense(*(a[rows] for a in dlm.tcs(teacher, x, 4, estimator, K)), V)
    direct = dlm.concrete_score(teacher, x, everywhere, 4, **how).exp()[rows]
    torch.testing.assert_close(p, direct.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(p.sum(-1), torch.ones(50, L))
    assert (p > 0).sum(-1).max() == min(how["K"] or V, V)
    assert not p.requires_grad


def test_no_gradient_reaches_the_teacher():
    teacher, student, x = random_model(1, dtype=torch.float32), random_model(4, seed=1, dtype=torch.float32), texts()
    z = dlm.hide(x, 4, MASK)
    dlm.loss(student, x, z, dlm.dense(*dlm.tcs(teacher, x, 4, "grad+topk", 2), V)).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_tcs_optimum_is_the_true_denoiser():
    """Texts from the teacher, TCS targets: the loss over all texts is stationary at the source's own posterior."""
    teacher, x = source(), texts()
    weight = teacher.log_prob(x).exp()
    c = dlm.concrete_score(teacher, x, everywhere, 4).exp()
    hidden = {1, 2}
    z = with_hidden(x, hidden)
    logits = source(4)(x, z).clone().requires_grad_()
    key = z @ (V + 1) ** torch.arange(L)
    total = 0
    for k in key.unique():   # one row of free logits for each state
        rows = (key == k).nonzero()[:, 0]
        log_q = logits[rows[0]].log_softmax(-1)
        total = total + (weight[rows, None] * dlm.divergence(c[rows], log_q[None]))[:, sorted(hidden)].sum()
    g = torch.autograd.grad(total, logits)[0]
    assert g.abs().max() < 1e-9


def test_concrete_scores_vary_less_than_the_text():
    """Rao-Blackwell, position by position: over x ~ p_T(x | z), c_i has the one-hot target's mean and less variance."""
    teacher, x = source(), texts()
    p = teacher.log_prob(x).exp()
    c, text = dlm.concrete_score(teacher, x, everywhere, 4).exp(), dlm.one_hot(x, V).double()
    for hidden in subsets(range(L)):
        seen = sorted(set(range(L)) - hidden)
        w = p * (x == x[50])[:, seen].all(1)
        w = (w / w.sum())[:, None]
        for i in hidden:
            torch.testing.assert_close((w * c[:, i]).sum(0), (w * text[:, i]).sum(0), atol=1e-6, rtol=0)
            variance = [(w * (t[:, i] - (w * t[:, i]).sum(0)) ** 2).sum() for t in (c, text)]
            assert variance[0] < variance[1] - 1e-3
            if len(hidden) == 1:
                assert variance[0] < 1e-9      # nothing else is hidden, so c_i is p_T(x_i | z) itself


# --- SDTT --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("b", [2, 4])
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_sdtt_of_one_step_changes_nothing(b, kind):
    """k = 1 and an untouched copy: the target is the student's own prediction, so the loss is 0."""
    teacher, student, x = random_model(b), random_model(b), texts()
    z, t = dlm.hide_at(x, b, MASK, 8)
    p = dlm.sdtt(teacher, x, z, t, 1 / 8, k=1)
    value = dlm.loss(student, x, z, p, kind)
    assert abs(value) < 1e-6
    value.backward()
    assert all(p.grad is None for p in teacher.parameters()) and any(p.grad is not None for p in student.parameters())


def test_states_hide_at_the_time_they_say():
    x = torch.zeros(40000, 4, dtype=torch.long)
    torch.manual_seed(0)
    z, t = dlm.hide_at(x, 2, MASK, 4)
    assert sorted(t.unique().tolist()) == [0.25, 0.5, 0.75, 1.0] and (t[:, 0] == t[:, 1]).all()
    for value in t.unique():
        rows = t[:, 0] == value
        assert rows.sum() == 10000                                             # stratified
        assert abs((z[rows, 0] == MASK).float().mean() - value) < 0.02
        both = ((z[rows][:, :2] == MASK).sum(1) == 2).float().mean()
        assert abs(both - value ** 2) < 0.02                                   # each by itself
    assert abs(torch.corrcoef(torch.stack([t[:, 0], t[:, 2]]))[0, 1]) < 0.03   # blocks have times of their own


@pytest.mark.parametrize("t, dt", [(1.0, 0.25), (0.5, 0.25), (0.25, 0.25), (0.25, 0.5)])
def test_sdtt_target_follows_the_two_step_law(t, dt):
    """Its mean over the teacher's draws, against the sum over what the first step may reveal, and as what."""
    teacher, x = source(4), texts()[[5]]
    hidden = {0, 1, 3}
    z = with_hidden(x, hidden)
    first = min(1, dt / t)
    p = teacher(x, z).exp()[0]
    expected = torch.zeros(L, V, dtype=torch.float64)
    for revealed in [set()] + subsets(sorted(hidden)):
        chance = math.prod(first if i in revealed else 1 - first for i in hidden)
        for values in itertools.product(range(V), repeat=len(revealed)):
            after, q = z.clone(), chance
            for i, v in zip(sorted(revealed), values):
                after[0, i], q = v, q * p[i, v].item()
            if q:
                later = teacher(x, after).exp()[0]
                for i in hidden:
                    expected[i] += q * (p[i] if i in revealed else later[i])
    torch.manual_seed(0)
    many = 20000
    target = dlm.sdtt(teacher, x.expand(many, -1), z.expand(many, -1), torch.full((many, L), t), dt)
    torch.testing.assert_close(target.sum(-1), torch.ones(many, L, dtype=torch.float64))
    for i in hidden:
        torch.testing.assert_close(target[:, i].double().mean(0), expected[i], atol=0.01, rtol=0)
    assert torch.isfinite(dlm.divergence(target, p.log(), "reverse")).all()    # also where nothing was hidden


def test_sdtt_target_is_the_one_a_token_was_drawn_from():
    """A teacher that says something else at each call: the target is what it said while the token was last hidden."""
    asked = []

    class Moody(nn.Module):
        V, b = MASK, 4

        def forward(self, x, z):
            asked.append(z)
            return torch.tensor([len(asked), 5.0, 9.0]).log_softmax(0).expand(*z.shape, V)

    x = torch.zeros(500, 4, dtype=torch.long)
    target = dlm.sdtt(Moody(), x, torch.full_like(x, MASK), torch.full(x.shape, 1.0), 0.25, k=3)
    last = sum((z == MASK).long() for z in asked)                # calls that found the token still hidden
    assert sorted(last.unique().tolist()) == [1, 2, 3]
    for n in (1, 2, 3):
        said = torch.tensor([n, 5.0, 9.0]).softmax(0)
        torch.testing.assert_close(target[last == n], said.expand(int((last == n).sum()), V))


def test_sdtt_steps_fall_at_t_and_t_minus_dt():
    """What the teacher is asked about: the share still hidden at each of k = 3 steps is t, t - dt, t - 2 dt over t."""
    asked = []

    class Watched(nn.Module):
        V, b = MASK, 4

        def forward(self, x, z):
            asked.append((z == MASK).float().mean().item())
            return torch.full((*z.shape, V), 1 / V).log()

    x = torch.zeros(20000, 4, dtype=torch.long)
    for t, dt, left in [(1.0, 0.25, (1, 0.75, 0.5)), (0.5, 0.125, (1, 0.75, 0.5)), (0.25, 0.125, (1, 0.5, 0)),
                        (0.125, 0.25, (1, 0, 0))]:
        asked.clear()
        dlm.sdtt(Watched(), x, torch.full_like(x, MASK), torch.full(x.shape, t), dt, k=3)
        assert asked == pytest.approx(left, abs=0.01)


# --- OPDLM -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("b", [1, 2, 3, 4])
@pytest.mark.parametrize("make", [source, random_model], ids=["source", "Transformer"])
def test_on_policy_target_is_the_prefix_conditional_of_the_rollout(make, b):
    """For every x and another y: as if each block of y alone stood behind x, scored by itself; and summed from the joint."""
    teacher, x = make(1), texts()
    y = x[torch.randperm(V ** L, generator=torch.Generator().manual_seed(0))]
    p = dlm.opdlm(teacher, x, y, b)
    log_p = teacher(x, x).gather(2, x[..., None]).sum((1, 2)).detach()
    assert not p.requires_grad
    for block in blocks(L, b):
        whole = torch.cat([x[:, :block[0]], y[:, block[0]:]], dim=1)
        torch.testing.assert_close(p[:, block], teacher(whole, whole).exp()[:, block])
        for i in block:
            torch.testing.assert_close(p[:, i], true_conditional(log_p, i, range(i), whole).detach())


def writings(model, order, z, start, stop):
    """Every way to fill z (a tuple) from start to stop, one token a step: (text, states at each step, probability)."""
    if start == stop:
        return [(z, [], 1.0)]
    block = range(start, start + model.b)
    hidden = [i for i in block if z[i] == MASK]
    if not hidden:
        return [(y, [{z[start:block[-1] + 1]}] + states, q) for y, states, q in writings(model, order, z, block[-1] + 1, stop)]
    p = model(torch.tensor([z]), torch.tensor([z])).exp()[0].detach()
    sure = {"confidence": lambda i: p[i].max(), "spread": lambda i: (p[i] * p[i].log()).sum()}[order]
    i, out = max(hidden, key=sure), []
    for v in range(V):
        after = z[:i] + (v,) + z[i + 1:]
        rest = writings(model, order, after, start if len(hidden) > 1 else block[-1] + 1, stop)
        for y, states, q in rest:
            here = [{z[start:block[-1] + 1]} | states[0], *states[1:]] if len(hidden) > 1 else [{z[start:block[-1] + 1]}, *states]
            out.append((y, here, q * p[i, v].item()))
    return out


def by_cells(ways):
    """-> {(text, a state of each block): probability}, each block's state uniform among its own."""
    law = collections.Counter()
    for y, states, q in ways:
        for z in itertools.product(*states):
            law[y + sum(z, ())] += q / math.prod(map(len, states))
    return law


def agree(cells, law):
    counts = collections.Counter(map(tuple, cells.tolist()))
    assert counts.keys() <= law.keys() and sum(law.values()) == pytest.approx(1)
    return chi_square(torch.tensor([counts[c] for c in law]), torch.tensor(list(law.values()))) < 1


@pytest.mark.parametrize("order", ["confidence", "spread"])
@pytest.mark.parametrize("make, b", [(source, 2), (source, 4), (random_model, 2)], ids=["2", "4", "Transformer"])
def test_rollouts_follow_the_samplers_law(make, order, b):
    """What is written and the states on the way, jointly: every block behind the real text; and whole texts after prompts of
    0 to L-1 tokens."""
    model, many, real = make(b), 20000, (1, 0, 2, 0)
    x = torch.tensor([real]).expand(many, -1)
    torch.manual_seed(b)
    y, z = dlm.rollout(model, x, order=order)
    for block in blocks(L, b)[make is random_model:]:   # its first block has ties: [MASK] beside [MASK], and no positions
        given = real[:block[0]] + (MASK,) * b
        law = by_cells((t[block[0]:], states, q) for t, states, q in
                      writings(model, order, given, block[0], block[-1] + 1))
        assert agree(torch.cat([y[:, block], z[:, block]], dim=1), law)
    if make is random_model:
        return
    y, z = dlm.rollout(model, x[:5000], order=order, whole=True)
    law = collections.Counter()
    for n in range(L):
        for cell, q in by_cells(writings(model, order, real[:n] + (MASK,) * (L - n), 0, L)).items():
            law[cell] += q / L
    assert agree(torch.cat([y, z], dim=1), law)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("order", dlm.ORDERS[1:])
def test_rollout_states_are_those_of_the_steps(order, whole):
    """In N steps a block, z has 0, 1 .. N-1 steps' tokens in equal shares, and all of them are y's."""
    model = random_model(8, L=16, dtype=torch.float32).train()
    x = torch.randint(V, (400, 16))
    for N in (1, 2, 4, 8):
        y, z = dlm.rollout(model, x, N, order, whole)
        assert (y < MASK).all() and ((z == y) | (z == MASK)).all()
        if not whole:
            seen = (z < MASK).view(-1, 8).sum(1)
            assert seen.bincount().nonzero()[:, 0].tolist() == list(range(0, 8, 8 // N))
            assert (seen.bincount()[::8 // N] == 800 // N).all()
        else:                                  # a block of which something was hidden is not finished
            touched = (y != x).view(-1, 8).any(1)
            assert (z == MASK).view(-1, 8).any(1)[touched].all()
            assert torch.equal((z < MASK).all(1), torch.zeros(400, dtype=torch.bool))
    assert model.training and all(p.grad is None for p in model.parameters())


def test_blocks_at_once_are_blocks_one_by_one():
    model, x = random_model(4, L=16), torch.randint(V, (5, 16))
    noise = torch.rand(5, 16, 2, dtype=torch.float64)
    for order in dlm.ORDERS[1:]:
        at_once = list(dlm.sample(dlm.Blocks(model, x), torch.full((20, 4), MASK), 2, order, noise=noise.view(20, 4, 2)))
        for start in range(4, 16, 4):          # in the first block all are equally sure
            z = torch.where(torch.arange(16) < start, x, MASK)
            alone = [t[:, start:start + 4] for t in dlm.sample(model, z, 2, order, noise=noise)]
            alone = alone[1 + start // 2:][:2]
            assert all(torch.equal(a.view(5, 16)[:, start:start + 4], b) for a, b in zip(at_once[1:], alone))


def test_rollouts_refuse_what_they_cannot():
    x = texts()
    for model, order in [(random_model(3), "spread"), (random_model(4), "ancestral"), (random_model(4), "nonsense")]:
        with pytest.raises(dlm.UserError):
            dlm.rollout(model, x, order=order)


# --- optimiser ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(8, 8), (12, 8), (8, 20)])
def test_orthogonalise_against_svd_and_torch(shape):
    torch.manual_seed(0)
    G = torch.randn(3, *shape)
    ours = dlm.orthogonalise(G)
    s = torch.linalg.svdvals(ours)
    assert (s > 0.3).all() and (s < 1.4).all()   # Muon's quintic oscillates around 1
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    assert F.cosine_similarity((U @ Vt).flatten(1), ours.flatten(1)).min() > 0.95
    if hasattr(torch.optim, "Muon"):
        theirs = torch.optim._muon._zeropower_via_newtonschulz(G[0], (3.4445, -4.7750, 2.0315), 5, 1e-7)
        torch.testing.assert_close(ours[0], theirs.float(), atol=0.03, rtol=0)


def test_muon_step_is_torchs():
    """Three steps beside torch.optim.Muon, which works in bfloat16."""
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(8, 16))
    c = nn.Parameter(a.detach().clone())
    ours, theirs = dlm.Muon([a], 0.1), torch.optim.Muon([c], 0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        a.grad = torch.randn(8, 16)
        c.grad = a.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(a.detach(), c.detach(), atol=0.02, rtol=0)


# --- judging -----------------------------------------------------------------------------------------------

def test_entropy_and_words():
    x = torch.tensor([[0, 1, 0, 1], [2, 3, 2, 3]])
    assert abs(dlm.entropy(x) - math.log(4)) < 1e-9
    assert abs(dlm.entropy(x, 2) - (-(2 / 3) * math.log(1 / 3) - (1 / 3) * math.log(1 / 6))) < 1e-9
    assert dlm.known_words(["xx the cat yy", "zz dog the"], {"the"}) == 1 / 3


def test_bound_leaves_random_numbers_alone():
    model, x = random_model(4), texts()
    torch.manual_seed(0)
    a = torch.rand(3)
    torch.manual_seed(0)
    assert dlm.bound(model, x) == dlm.bound(model, x) and torch.equal(torch.rand(3), a)


@pytest.mark.parametrize("b", [1, 4, 8])
def test_last_words_are_found_by_who_knows(b):
    """A source that can only say "abc abc abc": it finds those last words, and no others."""
    tokenizer = dlm.Tokenizer("char", "abc ")
    knows = dlm.HiddenMarkov(torch.ones(4) / 4, torch.eye(4).roll(1, 1), torch.eye(4), L=8, b=b)
    found = [dlm.last_word_accuracy(knows, [p], tokenizer) for p in
             ["abc abc", "c abc abc abc", "abc abc abc abc.", "b", "abc acb", "abc abca", "abc abc abc acb."]]
    assert found[:3] == [1, 1, 1] and found[4:] == [0, 0, 0]
    assert dlm.last_word_accuracy(knows, ["abc abc", "bc abc abc", "abc cbc", "acb"], tokenizer) == 0.5


def test_passages_end_in_words():
    text = dlm.load_text("arithmetic", "char", 16)
    ends = dlm.passages(text, 50)
    assert 40 < len(ends) <= 50 and all(re.search(r"\d\d\+\d\d=\d{3}$", p) for p in ends) and len(set(ends)) == len(ends)
