"""Every objective, target and sampler against brute force.

Most tests enumerate all texts of 4 tokens over 3 letters. What a model says of them gives exact
laws, by summing; what is drawn is then held against its law. Others use exact sources.
"""
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
from torch.testing import assert_close

import dlm
import sample
import train_teacher
from dlm import Config, Transformer
from exact import HiddenMarkov

V = 3
L = 4
MASK = V
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))               # (V^L, L)


def random_model(b, L=L, V=V, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = Transformer(Config(V, L, b, n_layer=2, n_head=2, n_embd=16)).to(dtype).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model


def source(b=1):
    """A Markov chain seen through noisy letters: no conditional looks back one letter only."""
    chain = HiddenMarkov.markov(V, L, seed=1)
    g = torch.Generator().manual_seed(2)
    emit = torch.randn(V, V, generator=g, dtype=torch.float64).mul(1.5).softmax(-1)
    return HiddenMarkov(chain.start, chain.trans, emit, L, b)


both_models = pytest.mark.parametrize("make", [source, random_model], ids=["source", "Transformer"])


def blocks(L, b):
    return [range(start, min(start + b, L)) for start in range(0, L, b)]


def subsets(tokens):
    """All subsets but the empty one."""
    sizes = range(1, len(tokens) + 1)
    return [set(s) for m in sizes for s in itertools.combinations(tokens, m)]


def hidden_sets(b):
    """Each block, with each set of its tokens that may be hidden."""
    return [(block, hidden) for block in blocks(L, b) for hidden in subsets(block)]


def with_hidden(x, hidden):
    z = x.clone()
    z[:, sorted(hidden)] = MASK
    return z


def picked(logp, x):
    """What is said (B, L, V) of a text's own tokens x (B, L): (B, L)."""
    return logp.gather(2, x[..., None])[..., 0]


def joint(teacher):
    """The probability that an AR model gives to each text: (V^L,)."""
    return picked(teacher(TEXTS, TEXTS), TEXTS).sum(1).exp().detach()


def posterior(p, row, seen):
    """p(text | its tokens at `seen` are those of `row`), from the joint p: (V^L,)."""
    alike = (TEXTS == row)[:, sorted(seen)].all(1)
    return p * alike / (p * alike).sum()


def true_conditional(p, i, seen, x):
    """p(x_i | x_seen), by summing the joint p, for each row of x (B, L): (B, V)."""
    letters = F.one_hot(TEXTS[:, i], V).to(p)
    return torch.stack([posterior(p, row, seen) @ letters for row in x])


def fits(counts, p):
    """Pearson's test: whether counts may come from probabilities p, up to one chance in a thousand.

    Cells where fewer than 5 are expected are pooled.
    """
    expected = p.detach().double() * counts.sum()
    assert expected.sum().item() == pytest.approx(counts.sum().item())
    counts = counts.double()
    big = expected >= 5
    if not big.all():
        expected = torch.cat([expected[big], expected[~big].sum()[None]])
        counts = torch.cat([counts[big], counts[~big].sum()[None]])
    k = len(expected) - 1
    limit = k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3          # Wilson-Hilferty
    return ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() < limit


def follow(x, law):
    """Whether texts x (n, L) may be drawn from this law (V^L,)."""
    number = x @ V ** torch.arange(L - 1, -1, -1)
    return fits(number.bincount(minlength=V ** L), law)


# --- the Transformer ------------------------------------------------------------------------------

def drawn(b, L=6):
    position, clean = dlm.slots(L, b)
    rows = dlm.attends(position, clean, position, clean, b)
    return ["".join("#" if seen else "." for seen in row) for row in rows]


def test_norm_is_rms_norm():
    h = torch.randn(3, 4, 8)
    assert_close(dlm.norm(h), F.rms_norm(h, (8,), eps=0.0))


def test_rotary_positions_keep_lengths_and_tell_distances():
    rope = random_model(1, L=9).rope                                            # (2, L, D)
    D = rope.size(-1)
    pair = torch.randn(2, 1, D, dtype=rope.dtype).expand(2, 9, D)   # a query and a key everywhere
    turned = dlm.rotate(pair, rope[:, None])
    assert_close(turned.norm(dim=-1), pair.norm(dim=-1))
    query, key = turned
    score = query @ key.T
    assert_close(score[1:, 1:], score[:-1, :-1])
    assert (score[0] - score[0, 0]).abs()[1:].min() > 1e-6


def test_large_queries_and_keys_change_nothing():
    model = random_model(2)
    before = model(TEXTS, TEXTS)
    with torch.no_grad():
        model.layers[0].qkv.weight[:32] *= 10                                   # q and k, 16 each
    assert_close(model(TEXTS, TEXTS), before)


def test_mask_causal():
    assert drawn(1) == ["#.....",
                        "##....",
                        "###...",
                        "####..",
                        "#####.",
                        "######"]


def test_mask_blocks_of_two():
    assert drawn(2) == ["#.........",    # the clean stream is the AR model's: it says x0,
                        "##........",    # x1,
                        "###.......",    # x2,
                        "####......",    # x3 (nobody looks back at what says x4 or x5)
                        "....##....",    # noisy, say x0 and x1
                        "....##....",
                        "##....##..",    # noisy, say x2 and x3; the first of them holds x1
                        "##....##..",
                        "####....##",    # noisy, say x4 and x5; the first of them holds x3
                        "####....##"]


def test_mask_with_a_short_last_block():
    assert drawn(4) == ["#.........",    # clean, say x0 .. x3
                        "##........",
                        "###.......",
                        "####......",
                        "....####..",    # noisy, say x0 .. x3
                        "....####..",
                        "....####..",
                        "....####..",
                        "####....##",    # noisy, say x4 and x5
                        "####....##"]


def test_mask_bidirectional():
    assert drawn(6) == ["######"] * 6


@pytest.mark.parametrize("b", [2, 4])
def test_a_student_reads_where_its_teacher_reads(b):
    """A last block of one token has no other slot to look at: there the teacher speaks itself."""
    teacher = random_model(1, L=5)
    student = Transformer(Config(V, 5, b, n_layer=2, n_head=2, n_embd=16)).double().eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    assert not student.own.weight.any()
    x = torch.randint(V, (20, 5))
    z = dlm.hide(x, b, MASK)
    assert_close(student(x, z)[:, 4], teacher(x, x)[:, 4])
    assert (student(x, z)[:, 1] - teacher(x, x)[:, 1]).abs().max() > 0.1


@pytest.mark.parametrize("b", [2, 4])
def test_the_first_slot_of_a_block_holds_the_text_not_the_state(b):
    """In OPDLM the blocks of z are rollouts behind real text x, and not behind each other."""
    model = random_model(b, L=8)
    x = torch.randint(V, (5, 8))
    z = dlm.hide(x, b, MASK)
    other = z.clone()
    other[:, :b] = (z[:, :b] + 1) % V                          # the first block, none of it hidden
    assert_close(model(x, other)[:, b:], model(x, z)[:, b:])


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_each_token_sees_exactly_what_it_may(b):
    """Another letter at j changes what is said of a hidden token i, if i sees j, and only then."""
    model = random_model(b)
    x = TEXTS[[5]]
    hidden = {0, 3}
    before = model(x, with_hidden(x, hidden))
    for j in range(L):
        other = x.clone()
        other[0, j] = (x[0, j] + 1) % V
        after = model(other, with_hidden(other, hidden))
        changed = (after - before).abs().amax(-1)[0] > 1e-9
        for i in hidden:
            in_earlier_block = j // b < i // b
            visible_in_own = j // b == i // b and j not in hidden
            assert changed[i] == (in_earlier_block or visible_in_own), (i, j)


@pytest.mark.parametrize("b, L", [(1, 4), (2, 4), (3, 4), (4, 4), (8, 24), (24, 24)])
def test_cached_decoding_equals_uncached(b, L):
    """From each block on, since a prompt may fill those before. Only wanted tokens reach the head.

    Each block is asked for twice, in two states: nothing of the first may stay in the cache. With
    b = 1 there is one state only.
    """
    model = random_model(b, L=L)
    x = torch.randint(V, (9, L))
    read = []
    log_probs = model.log_probs

    def counted(h):
        read.append(len(h))
        return log_probs(h)

    model.log_probs = counted
    for begin in range(0, L, b):
        cache = None
        for block in blocks(L, b)[begin // b:]:
            for _ in range(1 if b == 1 else 2):
                z = x.masked_fill(torch.rand(9, L) < 0.5, MASK)
                wanted = torch.rand(9, len(block)) < 0.5
                wanted[0] = True
                wanted[2] = False
                logp, cache = model.decode(x, z, block.start, block.stop, wanted, cache)
                assert read[-1] == wanted.sum()
                assert_close(logp, model(x, z)[:, block][wanted])


@pytest.mark.parametrize("b", [1, 2, 3, 6])
def test_several_blocks_decoded_at_once_equal_the_network(b):
    model = random_model(b, L=6)
    x = torch.randint(V, (5, 6))
    z = x.masked_fill(torch.rand(5, 6) < 0.5, MASK)
    for start in range(0, 6, b):
        wanted = torch.rand(5, 6 - start) < 0.7
        logp, _ = model.decode(x, z, start, 6, wanted, None)
        assert_close(logp, model(x, z)[:, start:][wanted])


has_compiler = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.mark.skipif(not has_compiler, reason="torch.compile wants a C++ compiler on a CPU")
def test_compiled_equals_uncompiled():
    """GPUs train a compiled model. Forward only, and one layer: compiling takes long."""
    model = random_model(2).float()
    del model.layers[1]
    z = with_hidden(TEXTS, {0, 1, 3})
    with torch.no_grad():
        compiled = torch.compile(model)(TEXTS, z)
        assert_close(compiled, model(TEXTS, z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_shorter_texts_than_the_context(b):
    """Nothing depends on the room that is left: the same weights with a context of 3 agree."""
    x = TEXTS[:, :3]
    z = with_hidden(x, {0, 2})
    short = random_model(min(b, 3), L=3)
    assert_close(random_model(b)(x, z), short(x, z))


# --- exact sources --------------------------------------------------------------------------------

def test_source_is_a_distribution_and_draws_from_it():
    p = source().log_prob(TEXTS).exp()
    assert abs(p.sum() - 1) < 1e-12
    assert follow(source().draw(20000, torch.Generator().manual_seed(0)), p)


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_source_conditionals(b):
    p = source().log_prob(TEXTS).exp()
    for block, hidden in hidden_sets(b):
        said = source(b)(TEXTS, with_hidden(TEXTS, hidden)).exp()
        seen = set(range(block.stop)) - hidden
        for i in hidden:
            assert_close(said[:, i], true_conditional(p, i, seen, TEXTS))


def test_branch():
    s = HiddenMarkov.branch(3)
    x = s.draw(200, torch.Generator().manual_seed(0))
    assert torch.equal(x[:, 1], x[:, 2])
    assert ((x[:, 1] - x[:, 0]) % 5 == 0).all()
    assert len(x.unique(dim=0)) == 20                       # all the texts that there can be

    def said(*z):
        return s(torch.tensor([[3, 0, 0]]), torch.tensor([z])).exp()[0]

    s.b = 3
    assert (said(3, 10, 10)[1:, [3, 8]] == 0.5).all()
    assert said(3, 8, 10)[2, 8] == 1
    assert not said(4, 8, 3).isnan().any()                  # a state that cannot be


# --- the bound ------------------------------------------------------------------------------------

def nll(model, hidden):
    """-log p(x_i | z) of all texts, where z hides these tokens: (V^L, L)."""
    return -picked(model(TEXTS, with_hidden(TEXTS, hidden)), TEXTS)


def bound_by_counts(model):
    """As the loss has it: m uniform on 1..n, a uniform m-subset, `token_weights`. (V^L,)"""
    total = 0
    for block, hidden in hidden_sets(model.b):
        n = len(block)
        chance = 1 / n / math.comb(n, len(hidden))
        weights = dlm.token_weights(with_hidden(TEXTS, hidden) == MASK, model.b)
        total = total + chance * (weights * nll(model, hidden)).sum(1)
    return total


def bound_by_time(model):
    """∫ 1/t E Σ_hidden -log p(x_i | z) dt, where each token is hidden with probability t. (V^L,)

    A subset of m of n tokens has ∫ t^(m-1) (1-t)^(n-m) dt = (m-1)! (n-m)! / n!
    """
    total = 0
    for block, hidden in hidden_sets(model.b):
        m = len(hidden)
        n = len(block)
        integral = math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n)
        total = total + integral * nll(model, hidden)[:, sorted(hidden)].sum(1)
    return total / L


def path_log_prob(model, block, moments):
    """log p of all texts' block, where its k-th token is revealed at moments[k]. (V^L,)"""
    total = 0
    for now in set(moments):
        hidden = {i for i, moment in zip(block, moments) if moment >= now}
        revealed = [i for i, moment in zip(block, moments) if moment == now]
        total = total - nll(model, hidden)[:, revealed].sum(1)
    return total


def random_orders(model):
    """Over all orders inside blocks: each text's mean NLL, and -log of its mean probability."""
    mean = 0
    log_p = 0
    for block in blocks(L, model.b):
        orders = itertools.permutations(range(len(block)))
        paths = torch.stack([path_log_prob(model, block, order) for order in orders])
        mean = mean - paths.mean(0)
        log_p = log_p + paths.logsumexp(0) - math.log(len(paths))
    return mean / L, -log_p / L


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_bound_three_ways(b):
    model = random_model(b)
    counts = bound_by_counts(model)
    mean, order_law = random_orders(model)
    assert_close(counts, bound_by_time(model), atol=1e-6, rtol=0)
    assert_close(counts, mean, atol=1e-6, rtol=0)
    assert (counts >= order_law - 1e-6).all()
    if b == 1:
        exact = -joint(model).log() / L
        assert_close(counts, exact, atol=1e-6, rtol=0)
        assert_close(order_law, exact, atol=1e-6, rtol=0)
    else:                            # a random network's conditionals are not those of one joint
        assert (counts > order_law + 1e-4).any()


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_loss_and_reported_bound_estimate_the_bound(b):
    model = random_model(b)
    exact = bound_by_counts(model)                          # of each text
    text_itself = dlm.one_hot(TEXTS, V).double()
    torch.manual_seed(0)
    with torch.no_grad():
        values = torch.stack([dlm.loss(model, TEXTS, dlm.hide(TEXTS, b, MASK), text_itself)
                              for _ in range(300)])
    assert abs(values.mean() - exact.mean()) < 4 * values.std() / 300 ** 0.5 + 1e-6
    mean, standard_error = dlm.bound(model, TEXTS, repeats=200)
    assert mean == pytest.approx(exact.mean().item(), abs=0.01)
    assert standard_error == pytest.approx(exact.std().item() / len(TEXTS) ** 0.5, rel=0.05)


def test_texts_that_are_alike_count_once_in_the_error_of_the_bound():
    model = random_model(1)
    thrice = TEXTS.repeat_interleave(3, dim=0)
    assert dlm.bound(model, thrice, neighbours=3) == pytest.approx(dlm.bound(model, TEXTS))


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_hidden_counts_are_uniform_and_subsets_too(b):
    torch.manual_seed(0)
    hidden = dlm.hide(torch.zeros(60000, L, dtype=torch.long), b, MASK) == MASK
    for block in blocks(L, b):
        n = len(block)
        subset = (hidden[:, block].long() * 2 ** torch.arange(n)).sum(1)        # in binary
        counts = subset.bincount(minlength=2 ** n)
        size = [c.bit_count() for c in range(1, 2 ** n)]
        p = torch.tensor([1 / n / math.comb(n, m) for m in size])
        assert counts[0] == 0
        assert n == 1 or fits(counts[1:], p)


def test_hidden_counts_are_stratified_over_the_batch():
    hidden = dlm.hide(torch.zeros(12, L, dtype=torch.long), L, MASK) == MASK
    assert hidden.sum(1).bincount().tolist() == [0, 3, 3, 3, 3]


# --- the sampler: its laws ------------------------------------------------------------------------

def n_step_law(model, N):
    """The law of N-step ancestral sampling: each token is revealed at a random step. (V^L,)"""
    law = 1
    for block in blocks(L, model.b):
        ways = list(itertools.product(range(N), repeat=len(block)))
        law = law * sum(path_log_prob(model, block, steps).exp() for steps in ways) / len(ways)
    return law


@pytest.mark.parametrize("b", [1, 2, 3, 4])
@pytest.mark.parametrize("N", [1, 2, 3])
def test_ancestral_sampler_follows_its_law(b, N):
    model = random_model(b)
    torch.manual_seed(N)
    assert follow(dlm.generate(model, 20000, N, order="ancestral"), n_step_law(model, N))


def test_ancestral_steps_fall_evenly():
    """After n of N steps a share 1 - n/N of the tokens is hidden, up to 5 standard errors."""
    z = torch.full((400, 64), MASK)
    torch.manual_seed(0)
    after = torch.stack(list(dlm.sample(random_model(64, L=64), z, 4, "ancestral")))
    share = (after == MASK).float().mean((1, 2))
    evenly = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    assert_close(share, evenly, atol=0.015, rtol=0)


def test_many_steps_are_the_random_order_sampler():
    model = random_model(4)
    _, order_law = random_orders(model)
    torch.manual_seed(0)
    x = dlm.generate(model, 3000, 200, order="ancestral")
    assert follow(x, (-L * order_law).exp())


def sureness(p, order):
    return (p * p.log()).sum().item() if order == "spread" else p.max().item()


def choices(p, z, block, step, order, N, threshold):
    """The sets of tokens of a block that step number `step` of N may reveal, all equally likely.

    p (L, V): what the network says in the state z.
    """
    hidden = [i for i in block if z[i] == MASK]
    k = math.ceil(len(hidden) / (N - step))
    in_order = hidden
    if order in ("confidence", "spread"):
        in_order = sorted(hidden, key=lambda i: sureness(p[i], order), reverse=True)
    sets = [in_order[:k]]
    if order == "random":
        sets = list(itertools.combinations(hidden, k))
    elif order in ("left", "spread"):
        stretches = [[i for place, i in enumerate(hidden) if place * k // len(hidden) == number]
                     for number in range(k)]
        sets = [[min(stretch, key=in_order.index) for stretch in stretches]]
    sure = {i for i in hidden if threshold and p[i].max() >= threshold}
    return [sorted({*these, *sure}) for these in sets]


def fillings(p, z, places):
    """Every way to draw tokens at these places of z, a tuple: (probability, next state)."""
    ways = []
    for letters in itertools.product(range(V), repeat=len(places)):
        new = dict(zip(places, letters))
        after = tuple(new.get(i, token) for i, token in enumerate(z))
        ways.append((math.prod(p[i, v].item() for i, v in new.items()), after))
    return ways


def writings(model, z, order, N=0, threshold=0.0):
    """Every way in which `sample` may fill z, a tuple: (probability, states).

    The states are tuples as well: those that each step began in, and last the text.
    """
    @functools.cache
    def says(z):
        text = torch.tensor([z])
        return model(text, text)[0].exp().detach()

    def next_states(z, block, step, steps):
        p = says(z)
        possible = choices(p, z, block, step, order, steps, threshold)
        return [(q / len(possible), after)
                for revealed in possible for q, after in fillings(p, z, revealed)]

    ways = [(1.0, [z])]
    for block in blocks(len(z), model.b):
        steps = N or len(block)
        for step in range(steps):
            ways = [(q * r, [*states, after]) for q, states in ways
                    for r, after in next_states(states[-1], block, step, steps)]
    return ways


@pytest.fixture
def only_true_ties(monkeypatch):
    """Chance decides among tokens of which the network is nearly as sure. Here it hardly may."""
    monkeypatch.setattr(dlm, "TIE", 1e-9)


GIVEN = (1, MASK, MASK, MASK)   # with nothing given, a Transformer is equally sure of all tokens


def law_of_order(model, order, N=0, threshold=0.0):
    """The law of what `sample` makes of GIVEN, by following every path. (V^L,)"""
    law = collections.Counter()
    for q, (*_, text) in writings(model, GIVEN, order, N, threshold):
        law[text] += q
    return torch.tensor([law[tuple(text)] for text in TEXTS.tolist()])


def test_tokens_come_from_the_left_unless_told():
    model = random_model(4)
    noise = torch.rand(50, L, 2, dtype=torch.float64)

    def written(**way):
        return dlm.generate(model, 50, uniforms=noise, **way)

    assert torch.equal(written(), written(order="left"))
    assert torch.equal(written(steps=2), written(steps=2, order="left"))
    assert not torch.equal(written(steps=2), written(steps=2, order="spread"))


@both_models
@pytest.mark.parametrize("order", dlm.ORDERS[1:])
def test_every_order_follows_its_law(make, order, only_true_ties):
    for b, N in [(4, 1), (4, 2), (4, 3), (4, 4), (2, 1), (2, 2), (3, 2)]:
        model = make(b)
        torch.manual_seed(N)
        x = dlm.generate(model, 5000, N, torch.tensor(GIVEN), order=order)
        assert follow(x, law_of_order(model, order, N)), (b, N)


@both_models
@pytest.mark.parametrize("order", dlm.ORDERS[1:])
@pytest.mark.parametrize("threshold", [0.3, 0.55, 0.7, 1.0])
def test_threshold_follows_its_law(make, order, threshold, only_true_ties):
    for b, N in [(2, 0), (4, 0), (4, 2), (4, 3)]:
        model = make(b)
        way = {"order": order, "N": N, "threshold": threshold}
        torch.manual_seed(0)
        x = dlm.generate(model, 5000, N, torch.tensor(GIVEN), order=order, threshold=threshold)
        assert follow(x, law_of_order(model, **way)), (b, N)


@both_models
@pytest.mark.parametrize("b, N", [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3), (3, 2)])
def test_a_text_costs_what_the_sampler_makes_it_likely(make, b, N):
    """Beside the law of the order `left`, by following every path; steps of 3 + 1 tokens too."""
    model = make(b)
    law = collections.Counter()
    for q, (*_, text) in writings(model, (MASK,) * L, "left", N):
        law[text] += q
    for text in TEXTS[::7]:
        mean, _ = dlm.nll_in_steps(model, text.repeat(2, 1), N)
        assert math.exp(-L * mean) == pytest.approx(law[tuple(text.tolist())], rel=1e-6)
    mean, error = dlm.nll_in_steps(model, TEXTS, N)
    each = torch.tensor([-math.log(law[tuple(text)]) / L for text in TEXTS.tolist()])
    assert mean == pytest.approx(each.mean().item(), rel=1e-6)
    assert error == pytest.approx(each.std().item() / len(each) ** 0.5, rel=1e-5)


def test_one_token_a_step_costs_a_perfect_student_what_it_costs_the_ar_model():
    """By the chain rule; and fewer steps cost more, since tokens of a step are not independent."""
    x = source().draw(500, torch.Generator().manual_seed(0))
    ar, _ = dlm.nll_in_steps(source(1), x)
    costs = [dlm.nll_in_steps(source(L), x, N)[0] for N in (L, 2, 1)]
    assert costs[0] == pytest.approx(ar, rel=1e-9) and ar < costs[1] < costs[2]


# --- the sampler: what holds for every text -------------------------------------------------------

@both_models
@pytest.mark.parametrize("order", dlm.ORDERS)
@pytest.mark.parametrize("b", [1, 2, 4])
def test_a_row_is_the_same_alone_and_among_others(make, order, b):
    """The same random numbers give the same text, whatever stands beside it in the batch."""
    torch.manual_seed(0)
    noise = torch.rand(9, L, 2, dtype=torch.float64)
    given = torch.where(torch.rand(9, L) < 0.3, torch.randint(V, (9, L)), MASK)
    model = make(b)
    for way in ({"steps": 2}, {"steps": 7}, {"threshold": 0.6},
                {"steps": 2, "temperature": 0.7, "top_k": 2, "top_p": 0.8}):
        *_, together = dlm.sample(model, given, order=order, uniforms=noise, **way)
        for row, its_noise, text in zip(given.split(1), noise.split(1), together):
            *_, alone = dlm.sample(model, row, order=order, uniforms=its_noise, **way)
            assert torch.equal(alone[0], text)
        assert (together < MASK).all()
        assert torch.equal(together.where(given < MASK, MASK), given)


@pytest.mark.parametrize("order", dlm.ORDERS)
@pytest.mark.parametrize("b", [1, 2, 5, 17])
def test_nothing_stays_hidden_and_written_tokens_stay(order, b):
    for L in (1, 2, 5, 16, 17):
        model = random_model(min(b, L), L=L, dtype=torch.float32)
        for N in (1, 2, 3, 7, 20):
            given = torch.where(torch.rand(3, L) < 0.4, torch.randint(V, (3, L)), MASK)
            after_each_step = list(dlm.sample(model, given, N, order))
            assert torch.equal(after_each_step[0], given)
            assert (after_each_step[-1] < V).all()
            for before, after in itertools.pairwise(after_each_step):
                assert ((before == after) | (before == MASK)).all()


class Clueless:
    """A denoiser that says nothing, at once."""
    V = V
    b = 17

    def decode(self, x, z, start, stop, wanted, cache):
        return torch.zeros(wanted.sum(), V), None


@pytest.mark.parametrize("order", dlm.ORDERS)
def test_nothing_stays_hidden_for_any_length_and_steps(order):
    model = Clueless()
    for model.L in range(1, 18):
        for N in range(1, 21):
            z = torch.full((2, model.L), MASK)
            z[0, 0] = 1
            *_, x = dlm.sample(model, z, N, order)
            assert (x < V).all()
            assert x[0, 0] == 1


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_long_texts_are_written_in_windows(b):
    """Each window of a context sees the last half of the one before, and nothing else."""
    model = random_model(b)
    noise = torch.rand(200, 9, 2, dtype=torch.float64)
    *_, x = dlm.sample(model, torch.full((200, 9), MASK), uniforms=noise)
    for start in (0, 2, 4, 6):
        window = slice(start, start + L)
        z = x[:, window].clone()
        z[:, 2 if start else 0:] = MASK
        *_, again = dlm.sample(model, z, uniforms=noise[:, window])
        assert torch.equal(again, x[:, window])


def test_calls_are_counted_and_none_is_wasted():
    """Of N ancestral steps over L tokens a text takes part in N (1 - (1 - 1/N)^L), on average."""
    model = random_model(64, L=64, dtype=torch.float32)

    def count(B, N, **way):
        with dlm.counting(model) as counted:
            dlm.generate(model, B, N, **way)
        return counted

    def expected(N):
        return N * (1 - (1 - 1 / N) ** 64)

    torch.manual_seed(0)
    for N in (64, 256):
        calls = torch.tensor([count(1, N, order="ancestral")["calls"] for _ in range(30)]).float()
        assert abs(calls.mean() - expected(N)) < 3 * calls.std() / 30 ** 0.5
    together = count(50, 64, order="ancestral")         # rows that reveal nothing are not run
    assert together["calls"] <= 64
    assert together["rows"] / 50 == pytest.approx(expected(64), abs=2)
    assert together["slots"] == 64 * together["rows"]
    more_steps_than_tokens = count(3, 200, order="confidence")
    assert more_steps_than_tokens == {"calls": 64, "rows": 3 * 64, "slots": 3 * 64 * 64}
    nothing_hidden = count(3, 64, given=torch.zeros(64, dtype=torch.long))
    assert nothing_hidden == {"calls": 0, "rows": 0, "slots": 0}


def test_calls_with_a_cache_run_all_rows():
    """All rows share one cache. The first call of a block runs the clean slots before it, once."""
    model = random_model(8, L=32, dtype=torch.float32)
    given = torch.full((6, 32), MASK)
    given[0] = 0                                        # a text that is finished already
    with dlm.counting(model) as counted:
        dlm.generate(model, 6, 4, given, order="ancestral")
    clean_slots_once = 24
    assert counted["rows"] == 6 * counted["calls"]
    assert counted["slots"] == 6 * (8 * counted["calls"] + clean_slots_once)


def test_confidence_takes_the_surest_position_first():
    """Up to differences that chance may outweigh."""
    model = random_model(4)
    z = torch.full((50, L), MASK)
    z[:, 1] = torch.arange(50) % V
    for before, after in itertools.pairwise(dlm.sample(model, z, 3, "confidence")):
        sure = model(before, before).amax(-1).exp().masked_fill(before != MASK, 0)
        revealed = before != after
        assert (revealed.sum(1) == 1).all()
        assert (sure[revealed] >= sure.amax(1) - dlm.TIE).all()


@pytest.mark.parametrize("order", ["confidence", "spread"])
def test_chance_decides_where_all_are_equally_sure(order):
    """Where all is hidden a Transformer's slots are alike, but for rounding."""
    torch.manual_seed(0)
    start, after_one, *_ = dlm.sample(random_model(4), torch.full((4000, L), MASK), 4, order)
    assert fits((start != after_one).sum(0), torch.full((L,), 1 / L))


def test_confidence_reveals_equally_many_a_step():
    z = torch.full((3, 16), MASK)
    after_each_step = dlm.sample(random_model(16, L=16), z, 5, "confidence")
    left = [(state == MASK).sum(1).tolist() for state in after_each_step]
    assert left == [[n] * 3 for n in (16, 12, 9, 6, 3, 0)]


def test_stretches_are_of_hidden_tokens_and_equally_long():
    given = torch.full((3, 16), MASK)
    given[:, 5:7] = 1
    stretches = [[0, 1, 2, 3], [4, 7, 8], [9, 10, 11, 12], [13, 14, 15]]
    model = random_model(16, L=16)
    for order in ("left", "spread"):
        before, after, *_ = dlm.sample(model, given, 4, order)
        for stretch in stretches:
            revealed = (before != after)[:, stretch]
            assert (revealed.sum(1) == 1).all()
            assert revealed[:, 0].all() or order == "spread"


def test_from_the_left_tokens_of_a_step_stand_as_far_apart_as_can_be():
    after_each_step = dlm.sample(random_model(16, L=16), torch.full((1, 16), MASK), 4)
    for step, (before, after) in enumerate(itertools.pairwise(after_each_step)):
        assert (before != after)[0].nonzero()[:, 0].tolist() == [step, step + 4, step + 8, step + 12]


def test_a_threshold_lets_a_step_reveal_more():
    model = random_model(16, L=16)
    noise = torch.rand(20, 16, 2, dtype=torch.float64)
    given = torch.where(torch.rand(20, 16) < 0.3, torch.randint(V, (20, 16)), MASK)

    def after_one(**way):
        _, state, *_ = dlm.sample(model, given, 4, uniforms=noise, **way)
        return state < MASK

    sure = model(given, given).amax(-1).exp() >= 0.9
    assert 0.1 < sure[given == MASK].float().mean() < 0.9
    for order in dlm.ORDERS[1:]:
        alone = after_one(order=order)
        assert torch.equal(after_one(order=order, threshold=0.9), alone | sure)


def test_top_k_and_top_p_keep_rows_apart():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])

    def warped_is(rows, **how):
        assert_close(dlm.warp(p.log(), **how), torch.as_tensor(rows))

    warped_is(p)
    warped_is(p ** 2 / (p ** 2).sum(-1, keepdim=True), temperature=0.5)
    warped_is([[0.625, 0.375, 0], [0, 2 / 9, 7 / 9]], top_k=2)
    warped_is([[0.625, 0.375, 0], [0, 0, 1]], top_p=0.6)
    for how in ({"top_k": 1}, {"temperature": 0}, {"top_p": 0.01}, {"top_p": 0.6, "top_k": 2}):
        warped_is([[1.0, 0, 0], [0, 0, 1]], **how)


def test_temperature():
    model = random_model(4)
    greedy = dlm.generate(model, 8, 4, order="left", temperature=0.0)
    assert (greedy == greedy[0]).all()
    hidden = torch.full((1, L), MASK)
    p = (model(hidden, hidden) / 0.5).softmax(-1)[0]
    torch.manual_seed(0)
    x = dlm.generate(model, 5000, 1, temperature=0.5)
    for i in range(L):
        assert fits(x[:, i].bincount(minlength=V), p[i])


def test_categorical_is_exact_at_the_edges():
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    u = torch.tensor([0.0, 0.49, 0.5, 0.999999])
    assert dlm.categorical(p.expand(4, 5), u).tolist() == [1, 1, 3, 3]
    sums_to_less_than_one = 0.999 * p
    assert dlm.categorical(sums_to_less_than_one, u[3]) == 3


def test_branch_disagrees_as_it_must():
    """k tokens in one step leave 2^-(k-1) of the rows whole; later steps cost nothing.

    The first step that reveals any of 8 tokens is step n of N, and it reveals k.
    """
    s = HiddenMarkov.branch(9)
    s.b = 9
    torch.manual_seed(0)
    first = torch.randint(10, (4000, 1))
    given = torch.cat([first, torch.full((4000, 8), 10)], dim=1)
    for N in (2, 4, 8, 16):
        whole = sum(math.comb(8, k) * (N - n) ** (8 - k) / N ** 8 / 2 ** (k - 1)
                    for n in range(1, N + 1) for k in range(1, 9))
        rest = dlm.generate(s, 4000, N, given, order="ancestral")[:, 1:]
        agree = (rest == rest[:, :1]).all(1)
        assert abs(agree.float().mean() - whole) < 0.03


# --- divergences ----------------------------------------------------------------------------------

each_divergence = pytest.mark.parametrize("kind", ["forward", "reverse", "tvd", "mse"])


def distributions(n=50):
    torch.manual_seed(0)
    return torch.randn(2, n, 7).softmax(-1)


@each_divergence
def test_divergence_is_zero_only_where_both_agree(kind):
    p, q = distributions()
    assert dlm.divergence(p, p.log(), kind).abs().max() < 1e-6
    assert (dlm.divergence(p, q.log(), kind) > 0).all()


def test_divergences_are_those_of_their_names():
    p, q = distributions()
    expected = {"forward": F.kl_div(q.log(), p, reduction="none").sum(-1),
                "reverse": F.kl_div(p.log(), q, reduction="none").sum(-1),
                "tvd": (p - q).abs().sum(-1) / 2,
                "mse": ((p - q) ** 2).sum(-1)}
    for kind, value in expected.items():
        assert_close(dlm.divergence(p, q.log(), kind), value)
    assert_close(dlm.divergence(p, q.log()), expected["forward"])
    with pytest.raises(dlm.UserError):
        dlm.divergence(p, q.log(), "jensen")


def test_divergence_from_a_one_hot_target():
    _, q = distributions(1)
    one = torch.eye(7)[[2]]
    assert_close(dlm.divergence(one, q.log()), -q[:, 2].log())                  # cross-entropy
    assert dlm.divergence(one, q.log(), "reverse").isinf().all()
    assert dlm.divergence(one, one.log()) == 0                                  # 0 log 0 is no NaN


@each_divergence
def test_divergence_worked_by_hand(kind):
    expected = {"forward": 0.1438410, "reverse": 0.1308120, "tvd": 0.25, "mse": 0.125}
    p = torch.tensor([0.5, 0.5])
    q = torch.tensor([0.25, 0.75])
    assert dlm.divergence(p, q.log(), kind).item() == pytest.approx(expected[kind], abs=1e-6)


@each_divergence
def test_loss_adds_up_weighted_divergences(kind):
    """By block: its length, times the mean over its hidden tokens; by text: the mean over L."""
    student = random_model(3)
    z = with_hidden(TEXTS, {1, 2})
    z[::2] = with_hidden(TEXTS, {0, 3})[::2]
    target = torch.rand(V ** L, L, V, dtype=torch.float64).softmax(-1)
    each = dlm.divergence(target, student(TEXTS, z).detach(), kind)
    odd = 3 * each[1::2, 1:3].mean(1)
    even = 3 * each[::2, 0] + each[::2, 3]
    expected = (odd.sum() + even.sum()) / L / V ** L
    assert_close(dlm.loss(student, TEXTS, z, target, kind).detach(), expected)


# --- TCS ------------------------------------------------------------------------------------------

def leave_one_out(p, b):
    """c_i(v) = p_T(v | x_<i, rest of i's block), by summing the joint p: (V^L, L, V)."""
    c = []
    for block in blocks(L, b):
        for i in block:
            seen = set(range(block.stop)) - {i}
            c.append(true_conditional(p, i, seen, TEXTS))
    return torch.stack(c, dim=1)


def by_substitution(log_prob, x, b, V):
    """The same by Bayes' rule: log_prob of x up to the end of i's block, for each x_i = v."""
    c = []
    for block in blocks(x.size(1), b):
        for i in block:
            other = x[:, :block.stop, None].repeat(1, 1, V)                     # (B, T, V)
            other[:, i] = torch.arange(V)
            said = log_prob(other.transpose(1, 2).flatten(0, 1))
            c.append(said.view(len(x), V).softmax(-1))
    return torch.stack(c, dim=1)


@both_models
@pytest.mark.parametrize("b", [2, 3, 4])
def test_exact_score_is_the_leave_one_out_conditional(make, b):
    teacher = make(1)
    c = dlm.concrete_score(teacher, TEXTS, b, "exact").exp()
    assert_close(c, leave_one_out(joint(teacher), b), atol=1e-5, rtol=0)


@pytest.mark.parametrize("b", [2, 3, 4])
def test_exact_score_where_most_texts_are_impossible(b):
    """On `branch` nearly every substitution has probability zero: no NaN, and still true."""
    teacher = HiddenMarkov.branch(L, 4)
    x = teacher.draw(30, torch.Generator().manual_seed(0))
    c = dlm.concrete_score(teacher, x, b, "exact").exp()
    assert_close(c, by_substitution(teacher.log_prob, x, b, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimator", ["exact", "topk"])
def test_targets_for_texts_that_cannot_be_are_distributions(estimator):
    teacher = HiddenMarkov.branch(L, 4)
    x = torch.tensor([[0, 1, 3, 2], [3, 3, 3, 0]])
    one = torch.ones(2, L, dtype=torch.float64)
    assert_close(dlm.concrete_score(teacher, x, 4, estimator, 2).exp().sum(-1), one)
    assert_close(dlm.prefix(teacher, x, x, 4).sum(-1), one)


@pytest.mark.parametrize("b", [3, 6])
def test_exact_score_of_more_letters_than_go_at_once(b):
    """A place's substitutions share one row of attention, up to 64 tokens of it at a time."""
    teacher = random_model(1, L=8, V=70)
    x = torch.randint(70, (2, 8))

    def log_prob(x):
        return picked(teacher(x, x), x).sum(1)

    c = dlm.concrete_score(teacher, x, b, "exact").exp()
    assert_close(c, by_substitution(log_prob, x, b, 70).detach())


@pytest.mark.parametrize("estimator", ["topk", "grad+topk"])
def test_top_k_of_everything_is_exact(estimator):
    teacher = random_model(1)
    exact = dlm.concrete_score(teacher, TEXTS, 4, "exact")
    assert_close(dlm.concrete_score(teacher, TEXTS, 4, estimator, V), exact)


@pytest.mark.parametrize("estimator", ["topk", "grad+topk"])
def test_top_k_scores_the_likeliest_exactly(estimator):
    """The K candidates in the exact proportions, all else zero; the text, if it is not of them."""
    teacher = random_model(1)
    by = {"topk": teacher(TEXTS, TEXTS),
          "grad+topk": dlm.concrete_score(teacher, TEXTS, 4, "grad")}
    candidates = by[estimator].topk(2).indices
    chosen = torch.zeros(V ** L, L, V).scatter(2, candidates, 1)
    c = dlm.concrete_score(teacher, TEXTS, 4, "exact").exp() * chosen
    c = c / c.sum(-1, keepdim=True)
    text_itself = F.one_hot(TEXTS, V).double()
    is_candidate = picked(chosen, TEXTS)[..., None] == 1
    assert is_candidate.any()
    assert not is_candidate.all()
    expected = torch.where(is_candidate, c, text_itself)
    assert_close(dlm.concrete_score(teacher, TEXTS, 4, estimator, 2).exp(), expected)


def test_one_candidate_leaves_the_text_itself():
    """With K = 1 the text is the only candidate, or it is none."""
    c = dlm.concrete_score(source(), TEXTS, 4, K=1).exp()
    assert_close(c, F.one_hot(TEXTS, V).double())


@pytest.mark.parametrize("b", [2, 4])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_top_k_averaged_over_the_posterior_is_the_marginal(b, K):
    """The mean of c_i over x ~ p_T(x | z) is p_T(x_i | z) for every K.

    This holds since the candidates depend on x_<i only.
    """
    p = joint(source())
    c = dlm.concrete_score(source(), TEXTS, b, K=K).exp()
    for block, hidden in hidden_sets(b):
        seen = set(range(block.stop)) - hidden
        marginal = source(b)(TEXTS, with_hidden(TEXTS, hidden)).exp()
        for row in range(0, V ** L, 7):
            mean = torch.einsum("x,xiv->iv", posterior(p, TEXTS[row], seen), c)
            for i in hidden:
                assert_close(mean[i], marginal[row, i], atol=1e-5, rtol=0)


def test_prefix_is_biased():
    """Its mean over the posterior is the marginal where nothing is seen to the right, only."""
    p = joint(source())
    c = dlm.prefix(source(), TEXTS, TEXTS, 4)
    assert_close(c[:, 1], true_conditional(p, 1, {0}, TEXTS))
    assert_close(p @ c[:, 0], true_conditional(p, 0, set(), TEXTS)[0])
    assert (c[:, 0] - true_conditional(p, 0, {1, 2, 3}, TEXTS)).abs().max() > 0.05


class AffineTeacher(nn.Module):
    """log p(x_j | x_<j) = base_j + Σ_{i<j} <e_i, A[i, j, x_j]>: affine in every embedding e_i.

    It is not normalised, which nothing here asks for.
    """

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.V = V
        self.A = torch.randn(L, L, V, 5, generator=g, dtype=torch.float64)
        self.base = torch.randn(L, V, generator=g, dtype=torch.float64)
        table = torch.randn(V + 1, 5, generator=g, dtype=torch.float64)
        self.embedding = nn.Embedding.from_pretrained(table)

    def terms(self, e):
        """e (.., T, d) -> what token i adds at place j: (.., T, L, V), only where j > i."""
        T = e.size(-2)
        later = torch.arange(L) > torch.arange(T)[:, None]
        return torch.einsum("...id,ijvd->...ijv", e, self.A[:T]) * later[..., None]

    def prefill(self, x):
        e = self.embedding(x)
        return self.base + self.terms(e).sum(1), e

    def score_behind(self, x, e, b):
        block = torch.arange(L) // b
        in_own = (block[:, None] == block)[..., None]
        own_or_old = torch.where(in_own, self.terms(e), self.terms(self.embedding(x)))
        return self.base + own_or_old.sum(1)

    def score_continuations(self, e, start, earlier):
        B, n, G, W, d = e.shape
        said = []
        for k, s in enumerate(start.tolist()):
            before = earlier[:, None, :s - 1].expand(B, G, s - 1, d)
            whole = torch.cat([before, e[:, k]], dim=2)[:, :, :L]
            logp = self.base + self.terms(whole).sum(2)                         # (B, G, L, V)
            said.append(F.pad(logp, (0, 0, 0, W))[:, :, s:s + W])
        return torch.stack(said, dim=1)


@pytest.mark.parametrize("b", [2, 3, 4])
def test_gradient_score_is_exact_where_the_suffix_is_affine(b):
    teacher = AffineTeacher()
    exact = dlm.concrete_score(teacher, TEXTS, b, "exact")
    assert_close(dlm.concrete_score(teacher, TEXTS, b, "grad"), exact)


@pytest.mark.parametrize("b", [2, 3, 4])
def test_gradient_by_finite_differences(b, nudge=1e-5, atol=1e-6, rtol=1e-4):
    """∇_{e_i} log p_T(rest of i's block): each e_i is nudged in turn, with all else as it is."""
    model = random_model(1)
    x = TEXTS[[7, 50]]
    g = dlm.suffix_gradient(model, x, b)

    def suffix_log_prob(block, i, d, change):
        e = model.embedding(model.shift(x)).detach()                            # slot i+1 holds e_i
        e[:, i + 1:i + 2, d] += change
        logp = picked(model.log_probs(model.run(e, torch.arange(L), "causal")), x)
        return logp[:, i + 1:block.stop].sum(1)

    with torch.no_grad():
        for block in blocks(L, b):
            for i, d in itertools.product(block, range(3)):
                up, down = (suffix_log_prob(block, i, d, change) for change in (nudge, -nudge))
                assert_close((up - down) / (2 * nudge), g[:, i, d], atol=atol, rtol=rtol)


@pytest.mark.parametrize("estimator", dlm.ESTIMATORS)
@pytest.mark.parametrize("K", [16, 2])
def test_targets_of_tcs_are_the_concrete_score(estimator, K):
    """Made dense they are the score. No more candidates are kept than were scored."""
    teacher = random_model(1)
    candidates, c = dlm.tcs(teacher, TEXTS, 4, estimator, K)
    target = dlm.dense(candidates, c, V)
    score = dlm.concrete_score(teacher, TEXTS, 4, estimator, K).exp()
    assert_close(target, score.float(), atol=1e-6, rtol=0)
    assert_close(target.sum(-1), torch.ones(V ** L, L))
    assert c.size(-1) == (min(K, V) if "topk" in estimator else V)
    assert not target.requires_grad


def test_no_gradient_reaches_the_teacher():
    teacher = random_model(1, dtype=torch.float32)
    student = random_model(4, seed=1, dtype=torch.float32)
    target = dlm.dense(*dlm.tcs(teacher, TEXTS, 4, "grad+topk", 2), V)
    dlm.loss(student, TEXTS, dlm.hide(TEXTS, 4, MASK), target).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_tcs_optimum_is_the_true_denoiser():
    """Over all that the teacher writes the loss is stationary at the source's own posterior.

    With the prefix as target it is not.
    """
    hidden = [1, 2]
    z = with_hidden(TEXTS, hidden)
    each_state, number = z.unique(dim=0, return_inverse=True)

    def gradient(target):
        logits = source(4)(each_state, each_state).requires_grad_()             # free in each state
        log_q = logits.log_softmax(-1)[number]
        each = dlm.divergence(target, log_q)[:, hidden].sum(1)
        return torch.autograd.grad(joint(source()) @ each, logits)[0].abs().max()

    assert gradient(dlm.concrete_score(source(), TEXTS, 4).exp()) < 1e-9
    assert gradient(dlm.prefix(source(), TEXTS, TEXTS, 4)) > 1e-3


def test_concrete_scores_vary_less_than_the_text():
    """Rao-Blackwell: over x ~ p_T(x | z), c_i has the text's own mean, and less variance."""
    p = joint(source())
    c = dlm.concrete_score(source(), TEXTS, 4).exp()
    text_itself = F.one_hot(TEXTS, V).double()
    for hidden in subsets(range(L)):
        w = posterior(p, TEXTS[50], set(range(L)) - hidden)

        def mean_and_variance(target):
            mean = w @ target
            return mean, (w @ (target - mean) ** 2).sum()

        for i in hidden:
            mean, variance = mean_and_variance(c[:, i])
            text_mean, text_variance = mean_and_variance(text_itself[:, i])
            assert_close(mean, text_mean, atol=1e-6, rtol=0)
            assert variance < text_variance - 1e-3
            if len(hidden) == 1:                                # then c_i is p_T(x_i | z) itself
                assert variance < 1e-9


# --- SDTT -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("b", [2, 4])
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_sdtt_of_one_step_changes_nothing(b, kind):
    """With k = 1 the target is the student's own prediction as it was, so the loss is 0."""
    earlier_self = random_model(b)
    student = random_model(b)
    z, t = dlm.hide_at_step_times(TEXTS, b, MASK, 8)
    target = dlm.sdtt(earlier_self, TEXTS, z, t, 1 / 8, k=1)
    value = dlm.loss(student, TEXTS, z, target, kind)
    assert abs(value) < 1e-6
    value.backward()
    assert all(p.grad is None for p in earlier_self.parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_states_hide_at_the_time_they_say():
    """Times are stratified and each block's own; given them, tokens are hidden independently."""
    torch.manual_seed(0)
    z, t = dlm.hide_at_step_times(torch.zeros(40000, 4, dtype=torch.long), 2, MASK, 4)
    hidden = (z == MASK).float()
    assert torch.equal(t[:, ::2], t[:, 1::2])
    assert (t[:, 0] == t[:, 2]).float().mean() == pytest.approx(0.25, abs=0.02)
    for value in (0.25, 0.5, 0.75, 1.0):
        rows = t[:, 0] == value
        assert rows.sum() == 10000
        assert hidden[rows, 0].mean() == pytest.approx(value, abs=0.02)
        assert hidden[rows, :2].prod(1).mean() == pytest.approx(value ** 2, abs=0.02)


def two_step_target(teacher, x, z, hidden, first):
    """The mean target of SDTT with k = 2, if a token is revealed first with this chance. (L, V)

    A sum over which tokens the first step reveals, and as what.
    """
    p = teacher(x, z)[0].exp()
    mean = 0
    for revealed in [set(), *subsets(hidden)]:
        chance = math.prod(first if i in revealed else 1 - first for i in hidden)
        kept = torch.tensor([[i in revealed] for i in range(L)])
        for q, after in fillings(p, z[0].tolist(), revealed):
            later = teacher(x, torch.tensor([after]))[0].exp()
            mean = mean + chance * q * torch.where(kept, p, later)
    return mean


@pytest.mark.parametrize("t, dt", [(1.0, 0.25), (0.5, 0.25), (0.25, 0.25), (0.25, 0.5)])
def test_sdtt_target_follows_the_two_step_law(t, dt):
    teacher = source(4)
    x = TEXTS[[5]]
    hidden = [0, 1, 3]
    z = with_hidden(x, hidden)
    n = 20000
    torch.manual_seed(0)
    target = dlm.sdtt(teacher, x.expand(n, -1), z.expand(n, -1), torch.full((n, L), t), dt)
    expected = two_step_target(teacher, x, z, hidden, min(1, dt / t))
    assert_close(target[:, hidden].mean(0), expected[hidden], atol=0.01, rtol=0)
    assert_close(target.sum(-1), torch.ones(n, L, dtype=torch.float64))
    finite = dlm.divergence(target, teacher(x, z), "reverse")   # also where nothing is hidden
    assert torch.isfinite(finite).all()


class MoodyTeacher(nn.Module):
    """It keeps what it is asked about, and says something else at each call."""
    V = V
    b = 4

    def __init__(self):
        super().__init__()
        self.asked = []

    def says(self, call):
        return torch.tensor([call, 5.0, 9.0]).softmax(0)

    def forward(self, x, z):
        self.asked.append(z == MASK)
        return self.says(len(self.asked)).log().expand(*z.shape, V)


def test_sdtt_target_is_the_one_a_token_was_drawn_from():
    """The target is what was said in the last call that found the token still hidden."""
    teacher = MoodyTeacher()
    z = torch.full((500, 4), MASK)
    target = dlm.sdtt(teacher, torch.zeros_like(z), z, torch.ones(500, 4), 0.25, k=3)
    last_call = torch.stack(teacher.asked).sum(0)                               # (500, 4)
    assert last_call.unique().tolist() == [1, 2, 3]
    for call in (1, 2, 3):
        rows = target[last_call == call]
        assert_close(rows, teacher.says(call).expand_as(rows))


@pytest.mark.parametrize("t, dt, left", [(1.0, 0.25, (1, 0.75, 0.5)), (0.5, 0.125, (1, 0.75, 0.5)),
                                         (0.25, 0.125, (1, 0.5, 0)), (0.125, 0.25, (1, 0, 0))])
def test_sdtt_steps_fall_at_t_and_t_minus_dt(t, dt, left):
    """Of k = 3 steps the teacher finds hidden: t, t - dt, t - 2 dt, over t."""
    teacher = MoodyTeacher()
    z = torch.full((20000, 4), MASK)
    torch.manual_seed(0)
    dlm.sdtt(teacher, torch.zeros_like(z), z, torch.full(z.shape, t), dt, k=3)
    share = [hidden.float().mean().item() for hidden in teacher.asked]
    assert share == pytest.approx(left, abs=0.01)


# --- OPDLM ----------------------------------------------------------------------------------------

@both_models
@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_on_policy_target_is_the_prefix_conditional_of_the_rollout(make, b):
    """For every x and another y: as if each block of y stood behind x, all by itself."""
    teacher = make(1)
    y = TEXTS[torch.randperm(V ** L, generator=torch.Generator().manual_seed(0))]
    target = dlm.prefix(teacher, TEXTS, y, b)
    assert not target.requires_grad
    for block in blocks(L, b):
        x = torch.cat([TEXTS[:, :block.start], y[:, block.start:]], dim=1)
        assert_close(target[:, block], teacher(x, x)[:, block].exp())
        for i in block:
            expected = true_conditional(joint(teacher), i, range(i), x)
            assert_close(target[:, i], expected)


def rollout_law(model, order, z):
    """{text + state: probability} of what is written into z, a tuple, one token a step.

    The state is, in each block, a uniform one of those that its steps began in.
    """
    b = model.b
    law = collections.Counter()
    for q, written in writings(model, z, order):
        begun = []
        for block in blocks(len(z), b):
            its_steps = sum(z[i] == MASK for i in block)
            moments = written[block.start:block.start + max(1, its_steps)]      # b steps a block
            begun.append([state[block.start:block.stop] for state in moments])
        for parts in itertools.product(*begun):
            law[written[-1] + sum(parts, ())] += q / math.prod(map(len, begun))
    return law


def rollouts_follow(y, z, law):
    counts = collections.Counter(map(tuple, torch.cat([y, z], dim=1).tolist()))
    assert counts.keys() <= law.keys()
    return fits(torch.tensor([counts[key] for key in law]), torch.tensor(list(law.values())))


REAL = (1, 0, 2, 0)


@pytest.mark.parametrize("order", ["confidence", "spread"])
@pytest.mark.parametrize("make, b", [(source, 2), (source, 4), (random_model, 2)],
                         ids=["2", "4", "Transformer"])
def test_rollouts_follow_the_samplers_law(make, order, b, only_true_ties):
    """What is written and the states on the way, jointly, in each block behind the real text."""
    model = make(b)
    torch.manual_seed(b)
    y, z = dlm.rollout(model, torch.tensor([REAL]).expand(20000, -1), order=order)
    for block in blocks(L, b):
        if make is random_model and block.start == 0:
            continue                                            # nothing is seen yet: ties
        real = REAL[:block.start]
        behind = torch.tensor([real]).expand(20000, -1).long()
        law = rollout_law(model, order, real + (MASK,) * b)
        its_y = torch.cat([behind, y[:, block]], dim=1)
        its_z = torch.cat([behind, z[:, block]], dim=1)
        assert rollouts_follow(its_y, its_z, law)


@pytest.mark.parametrize("order", dlm.ORDERS[1:])
@pytest.mark.parametrize("N", [1, 2, 4, 8])
def test_rollout_states_are_those_of_the_steps(order, N):
    """In N steps a block, z has 0, 1 .. N-1 steps' tokens in equal shares, and all are y's."""
    model = random_model(8, L=16, dtype=torch.float32).train()
    y, z = dlm.rollout(model, torch.randint(V, (400, 16)), N, order)
    assert (y < MASK).all()
    assert ((z == y) | (z == MASK)).all()
    revealed = (z < MASK).view(-1, 8).sum(1)
    number, times = revealed.unique(return_counts=True)
    assert number.tolist() == list(range(0, 8, 8 // N))
    assert (times == 800 // N).all()
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("order", dlm.ORDERS[1:])
def test_blocks_at_once_are_blocks_one_by_one(order):
    """With the same random numbers, in 2 steps a block."""
    model = random_model(4, L=16)
    x = torch.randint(V, (50, 16))
    noise = torch.rand(50, 16, 2, dtype=torch.float64)
    behind_x = dlm.BlocksAtOnce(model, x)
    hidden = torch.full((200, 4), MASK)
    at_once = list(dlm.sample(behind_x, hidden, 2, order, uniforms=noise.view(200, 4, 2)))
    at_once = torch.stack(at_once).view(3, 50, 16)
    for number, block in enumerate(blocks(16, 4)):
        z = torch.where(torch.arange(16) < block.start, x, MASK)
        alone = torch.stack(list(dlm.sample(model, z, 2, order, uniforms=noise)))
        its_steps = alone[2 * number:2 * number + 3]
        assert torch.equal(its_steps[:, :, block], at_once[:, :, block])


@pytest.mark.parametrize("b, order", [(3, "spread"), (4, "ancestral"), (4, "nonsense")])
def test_rollouts_refuse_what_they_cannot(b, order):
    with pytest.raises(dlm.UserError):
        dlm.rollout(random_model(b), TEXTS, order=order)


# --- the optimiser --------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(8, 8), (12, 8), (8, 20)])
def test_orthogonalise_against_svd_and_torch(shape):
    torch.manual_seed(0)
    G = torch.randn(3, *shape)
    ours = train_teacher.orthogonalise(G)
    s = torch.linalg.svdvals(ours)
    assert s.min() > 0.3                                        # the quintic oscillates around 1
    assert s.max() < 1.4
    U, _, Vt = torch.linalg.svd(G, full_matrices=False)
    assert F.cosine_similarity((U @ Vt).flatten(1), ours.flatten(1)).min() > 0.95
    quintic = (3.4445, -4.7750, 2.0315)
    theirs = torch.optim._muon._zeropower_via_newtonschulz(G[0], quintic, 5, 1e-7)
    assert_close(ours[0], theirs.float(), atol=0.03, rtol=0)


def test_muon_update_is_torchs():
    """Three updates beside torch.optim.Muon, which works in bfloat16."""
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(8, 16))
    c = nn.Parameter(a.detach().clone())
    ours = train_teacher.Muon([a], 0.1)
    theirs = torch.optim.Muon([c], 0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        a.grad = torch.randn(8, 16)
        c.grad = a.grad.clone()
        ours.step()
        theirs.step()
    assert_close(a.detach(), c.detach(), atol=0.02, rtol=0)


# --- the numbers we judge by ----------------------------------------------------------------------

def test_entropy():
    x = torch.tensor([[0, 1, 0, 1], [2, 3, 2, 3]])
    assert dlm.entropy(x) == pytest.approx(math.log(4))
    twice_and_once = 2 / 3 * math.log(3) + 1 / 3 * math.log(6)  # 01 and 23; 10 and 32
    assert dlm.entropy(x, 2) == pytest.approx(twice_and_once)


def test_distinct():
    x = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert dlm.distinct(x, 2) == 4 / 6
    assert dlm.distinct(x, 3) == 1.0


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("far_apart", [1, 50256])
def test_copied_is_the_share_of_brute_force(n, far_apart):
    """On a text of two letters, in which most orders of the same letters are missing."""
    torch.manual_seed(n)
    text = torch.randint(2, (100,)) * far_apart
    x = torch.randint(2, (20, 30)) * far_apart
    x[:, 0] = 7                                                 # a token that the text lacks
    grams = {tuple(text[i:i + n].tolist()) for i in range(100 - n + 1)}
    found = [tuple(row[i:i + n].tolist()) in grams for row in x for i in range(30 - n + 1)]
    assert dlm.copied(x, text, n) == pytest.approx(sum(found) / len(found))
    assert dlm.copied(text[None], text, n) == 1


def test_bound_leaves_random_numbers_alone():
    model = random_model(4)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert dlm.bound(model, TEXTS) == dlm.bound(model, TEXTS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("b", [1, 4, 8])
def test_last_words_are_found_by_who_knows(b):
    """A source that can only say "abc abc abc" finds those last words, and no others."""
    tokenizer = train_teacher.Tokenizer("char", "abc ")
    always_next = torch.eye(4).roll(1, 1)
    knows = HiddenMarkov(torch.ones(4) / 4, always_next, torch.eye(4), L=8, b=b)

    def found(*passages):
        return sample.last_word_accuracy(knows, passages, tokenizer)

    for passage in ("abc abc", "c abc abc abc", "abc abc abc abc."):
        assert found(passage) == 1, passage
    for passage in ("abc acb", "abc abca", "abc abc abc acb."):
        assert found(passage) == 0, passage
    assert found("abc abc", "bc abc abc", "abc cbc", "acb") == 0.5


def test_passages_end_in_words():
    corpus = train_teacher.load_corpus("stories", "char", 16)
    passages = sample.passages(corpus, 50)
    assert 40 < len(passages) <= 50
    assert len(set(passages)) == len(passages)
    assert all(re.search(r"\b\w+$", passage) for passage in passages)


# --- what an audit found --------------------------------------------------------------------------

def law_of_broken_ties(model, order):
    """The law of writing one token a step from nothing: any of the equally sure may be first."""
    law = collections.Counter()

    def write(z, p):
        hidden = [i for i in range(L) if z[i] == MASK]
        if not hidden:
            law[z] += p
            return
        logp = model(torch.tensor([z]), torch.tensor([z]))[0].detach()
        sure = [sureness(logp[i].exp(), order) for i in range(L)]
        best = max(sure[i] for i in hidden)
        firsts = [i for i in hidden if best - sure[i] < 1e-10]
        others = [best - sure[i] for i in hidden if i not in firsts]
        assert all(gap > dlm.TIE for gap in others)        # else chance would have a say there, too
        for i in firsts:
            for v in range(V):
                write(z[:i] + (v,) + z[i + 1:], p * logp[i, v].exp().item() / len(firsts))

    write((MASK,) * L, 1.0)
    return torch.tensor([law[tuple(x)] for x in TEXTS.tolist()])


@pytest.mark.parametrize("order", ["confidence", "spread"])
def test_ties_are_broken_by_chance(order, only_true_ties):
    """With everything hidden a network is equally sure everywhere: any may be first."""
    model = random_model(L)
    law = law_of_broken_ties(model, order)
    torch.manual_seed(0)
    assert follow(dlm.generate(model, 20000, order=order), law)


@pytest.mark.parametrize("order", ["confidence", "spread"])
def test_rounding_decides_nothing(order):
    """Another processor or batch rounds in another way. The same noise gives the same texts."""
    model = random_model(8, L=8)
    noise = torch.rand(200, 8, 2)
    start = torch.full((200, 8), MASK)
    *_, x = dlm.sample(model, start, 4, order, uniforms=noise)
    decode = model.decode

    def rounded(*asked):
        logp, cache = decode(*asked)
        return logp + 1e-7 * torch.randn_like(logp), cache

    model.decode = rounded
    *_, again = dlm.sample(model, start, 4, order, uniforms=noise)
    assert torch.equal(again, x)


@pytest.mark.parametrize("L, b", [(8, 5), (8, 6), (8, 8), (8, 4), (8, 3), (9, 5)])
def test_windows_beyond_the_context_see_half_of_it(L, b):
    """When a window begins, half the context of tokens stands in it already."""
    model = random_model(b, L=L)
    seen = []
    decode = model.decode
    def watched(x, z, start, stop, wanted, cache):   # noqa: E306
        seen.append((z < MASK).sum(1).min().item())
        return decode(x, z, start, stop, wanted, cache)
    model.decode = watched
    *_, x = dlm.sample(model, torch.full((2, 3 * L), MASK), order="left")
    assert (x < MASK).all()
    whole_blocks = L // 2 // b * b
    first_calls = [n for n, before in zip(seen[1:], seen) if n < before]
    assert first_calls and all(n == (whole_blocks or L // 2) for n in first_calls)


def contradictory():
    """A source with zeros: the letter of the first token is kept for ever."""
    return HiddenMarkov(torch.ones(V) / V, torch.eye(V), torch.eye(V), L)


@pytest.mark.parametrize("b", [2, 4])
def test_impossible_evidence_is_answered_uniformly(b):
    s = contradictory()
    s.b = b
    x = torch.tensor([[0, 1, 2, 0]])                       # cannot be
    z = with_hidden(x, {3})
    uniform = torch.full((V,), 1 / V, dtype=torch.float64)
    assert_close(s(x, z).exp()[0, 3], uniform)
    assert_close(s.prefill(x)[0].exp()[0, 3], uniform)
    assert_close(dlm.prefix(s, x, x, b)[0, 3], uniform)
    for estimator in dlm.ESTIMATORS[:3]:
        c = dlm.concrete_score(s, x, b, estimator).exp()
        assert not c.isnan().any()
        assert_close(c.sum(-1), torch.ones(1, L, dtype=torch.float64))


def test_weight_zero_never_multiplies_infinity():
    """Two visible tokens contradict each other. Each is impossible, and has weight 0."""
    s = contradictory()
    s.b = L
    x = torch.tensor([[0, 1, 2, 2]])
    z = with_hidden(x, {2, 3})
    assert s(x, z)[0, 0, 0] == -math.inf
    assert_close(dlm.text_bound(s, x, z), torch.tensor([math.log(V)], dtype=torch.float64))
    student = random_model(L)
    loss = dlm.loss(student, x, z, s(x, z).exp(), "reverse")
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_top_p_is_of_what_top_k_leaves():
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    assert_close(dlm.warp(p.log(), top_k=2, top_p=0.5), torch.tensor([[1.0, 0, 0, 0]]))
    assert_close(dlm.warp(p.log(), top_p=0.5), torch.tensor([[4 / 7, 3 / 7, 0, 0]]))


def test_calls_are_those_that_reveal_something():
    """A text costs the calls that it would need alone, whatever stands beside it in the batch."""
    model = random_model(4, L=16, dtype=torch.float32)
    for way in ({"threshold": 0.5}, {"steps": 8, "order": "ancestral"}, {"steps": 2}):
        noise = torch.rand(6, 16, 2)
        row, _ = dlm.write_at_cost(model, 6, uniforms=noise, **way)
        with dlm.counting(model) as count:
            for its_noise in noise.split(1):
                dlm.generate(model, 1, uniforms=its_noise, **way)
        assert row["calls"] == count["calls"] / 6
