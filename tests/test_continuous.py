"""The continuous student by enumeration: 27 texts of three letters, noise on some of them."""
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import dlm
from dlm import CLEAN, Config, Continuous, Noisy, Transformer, rates
from exact import HiddenMarkov
from test_scripts import ONE, TCS, TEXT, TRAIN, call, home, metrics, refused, texts, world  # noqa: F401
from test_scripts import end, same, stop_at_7

V = L = 3
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))               # (27, L)
SOURCE = HiddenMarkov.markov(V, L, seed=1)
PRIOR = SOURCE.log_prob(TEXTS)                                                  # (27,)


def model(b=L, L=L, D=4, made=Continuous):
    torch.manual_seed(0)
    m = made(Config(V, L, b, n_layer=2, n_head=2, n_embd=16, D=D)).double().eval()
    for p in m.parameters():
        nn.init.normal_(p, std=0.4)
    m.set_points(torch.eye(V, 9).double())
    return m


def likelihood(m, z):
    """log N(z_i; alpha E[x_i], sigma²) + const. of each letter of each text: (B, 27, L)."""
    alpha, sigma = rates(z.gamma[:, None, :, None])                             # (B, 1, L, 1)
    distance = (z.z[:, None] - alpha * m.E[TEXTS]).square().sum(-1)
    return -distance / (2 * sigma[..., 0] ** 2)


def posterior(m, z):
    """p(x | z) of all texts (B, 27)."""
    return (PRIOR + likelihood(m, z).sum(-1)).softmax(-1)


def marginals(p):
    """p(x_i = v) (B, L, V) under laws p (B, 27) of texts."""
    return torch.einsum("bt,tiv->biv", p, F.one_hot(TEXTS, V).double())


def some_state(m, x, gamma=0.7):
    """The middle letter is visible."""
    hidden = torch.tensor([True, False, True]).expand(len(x), -1)
    return m.with_noise(x, hidden, torch.full(x.shape, gamma, dtype=torch.float64))


def repeated(z, n):
    return Noisy(*(a.expand(n, *a.shape[1:]) for a in (z.z, z.gamma, z.hidden)))


def test_all_points_are_equally_long():
    m = model(D=2)
    for W in (torch.randn(V, 2), torch.randn(V, 9)):
        m.set_points(W.double())
        assert_close(m.E.square().sum(1), torch.full((V,), 2.0).double())


def test_points_of_few_dimensions_keep_what_differs_most():
    m = Continuous(Config(5, 4, 4, n_layer=1, n_head=1, n_embd=8, D=2)).double()
    plane = torch.randn(5, 2).double()
    rotation = torch.linalg.qr(torch.randn(8, 8).double()).Q
    m.set_points(F.pad(plane, (0, 6)) @ rotation)
    centred = F.normalize(plane - plane.mean(0), dim=1) * 2 ** 0.5
    assert_close(m.E @ m.E.T, centred @ centred.T)


def test_signal_and_noise_share_the_variance():
    gamma = torch.tensor([-3.0, 0.0, 5.0]).double()
    alpha, sigma = rates(gamma)
    assert_close(alpha ** 2 + sigma ** 2, torch.ones(3).double())
    assert_close((sigma ** 2 / alpha ** 2).log(), gamma)


def test_endless_noise_says_nothing_and_none_says_all():
    m = model()
    nothing = m.with_noise(TEXTS, torch.ones_like(TEXTS).bool(), torch.full(TEXTS.shape, 30.0))
    said = m.channel(nothing).softmax(-1)
    assert_close(said, torch.full((27, L, V), 1 / V).double(), atol=1e-4, rtol=0)
    everything = m.with_noise(TEXTS, torch.zeros_like(TEXTS).bool(), torch.zeros(TEXTS.shape))
    assert_close(m.channel(everything).softmax(-1), F.one_hot(TEXTS, V).double())
    assert (everything.gamma == CLEAN).all()


@pytest.mark.parametrize("gamma", [-1.0, 0.7, 3.0])
def test_target_is_the_conditional_given_the_others_and_the_noisy_letter(gamma):
    """p(x_i | x_!=i, z_i): of all texts that agree elsewhere, weighed by how z_i came to be."""
    m = model()
    z = repeated(some_state(m, TEXTS[[5]], gamma), 27)
    score = dlm.concrete_score(SOURCE, TEXTS, L, "exact").exp()
    target = dlm.seen_through(m, z, score)
    noise = likelihood(m, z)                                                    # (27, 27, L)
    for i in (0, 2):
        others = [j for j in range(L) if j != i]
        agree = (TEXTS[:, None, others] == TEXTS[None, :, others]).all(-1)
        law = (PRIOR + noise[..., i]).masked_fill(~agree, -torch.inf).softmax(-1)
        assert_close(target[:, i], marginals(law)[:, i], atol=1e-6, rtol=0)


@pytest.mark.parametrize("gamma", [-1.0, 0.7, 3.0])
def test_the_mean_target_is_the_true_denoiser_and_varies_less_than_the_text(gamma):
    m = model()
    z = some_state(m, TEXTS[[5]], gamma)
    p = posterior(m, z)                                                         # (1, 27)
    truth = marginals(p)[0]
    many = repeated(z, 27)
    score = dlm.concrete_score(SOURCE, TEXTS, L, "exact").exp()
    variances = []
    for target in (dlm.one_hot(TEXTS, V).double(), score):
        seen = dlm.seen_through(m, many, target)                                # (27, L, V)
        assert_close(torch.einsum("t,tiv->iv", p[0], seen), truth, atol=1e-6, rtol=0)
        far = (seen - truth).square().sum(-1)                                   # (27, L)
        variances.append((p @ far)[0, [0, 2]])
    assert (variances[1] < 0.9 * variances[0]).all()


def test_causal_targets_are_biased_here_too():
    m = model()
    z = some_state(m, TEXTS[[5]])
    p = posterior(m, z)
    causal = dlm.prefix(SOURCE, TEXTS, TEXTS, L)
    seen = dlm.seen_through(m, repeated(z, 27), causal)
    wrong = torch.einsum("t,tiv->iv", p[0], seen) - marginals(p)[0]
    assert wrong[0].abs().max() > 0.02


class Exact(Continuous):
    """The true denoiser of the source."""

    def decode(self, x, z, start, stop, wanted, cache=None):
        return marginals(posterior(self, z))[wanted].log(), None


def far(x, law):
    """Total variation between the shares of texts x (B, L) and a law (27,) of TEXTS."""
    digit = V ** torch.arange(L)
    share = (x @ digit).bincount(minlength=27) / len(x)
    return 0.5 * (share - law[(TEXTS @ digit).argsort()]).abs().sum()


def test_with_many_steps_together_the_sampler_writes_as_the_source():
    exact = model(made=Exact)
    law = PRIOR.exp()
    with dlm.seeded(0):
        floor = far(SOURCE.draw(20_000), law)
        one, some, many = (far(dlm.generate(exact, 20_000, N, order="together"), law)
                           for N in (1, 8, 64))
    assert one > 0.4 and some < 0.1 and many < 2 * floor


@pytest.mark.parametrize("N", [1, 2, 3, 9])
def test_in_turns_the_sampler_writes_as_the_masked_one_and_one_by_one_as_the_source(N):
    reveals = dlm.left_steps(L, L, N)
    log_law = torch.zeros(27).double()
    source = HiddenMarkov(SOURCE.start, SOURCE.trans, SOURCE.emit, L, b=L)
    for step in range(N):
        z = torch.where(reveals >= step, V, TEXTS)
        said = dlm.of_tokens(source(TEXTS, z), TEXTS)
        log_law += said[:, reveals == step].sum(1)
    with dlm.seeded(0):
        floor = far(SOURCE.draw(20_000), PRIOR.exp())
        x = dlm.generate(model(made=Exact), 20_000, N)
    assert far(x, log_law.exp()) < 2 * floor
    assert (far(x, PRIOR.exp()) < 2 * floor) == (N >= L)


@pytest.mark.parametrize("n", [1, 4, 5])
@pytest.mark.parametrize("N", [1, 2, 5, 9])
def test_a_token_leaves_the_noise_when_its_turn_has_come(n, N):
    way = dlm.ways_out_of_noise(n, N, "left")                                   # (steps + 1, n)
    assert len(way) == min(n, N) + 1
    assert set(way.unique().tolist()) == {0, 1} and (way[0] == 0).all() and (way[-1] == 1).all()
    assert torch.equal((way < 1).sum(0) - 1, dlm.left_steps(n, n, N))           # its last step
    way = dlm.ways_out_of_noise(n, N, "together")                               # (N + 1, n)
    assert_close(way, torch.linspace(0, 1, N + 1)[:, None].expand(N + 1, n))


@pytest.mark.parametrize("b", [2, 3, 6])
def test_each_token_sees_exactly_what_it_may(b):
    """Noise of its own block, whatever its level, and the text of earlier blocks."""
    m = model(b, L=6)
    x = torch.randint(V, (1, 6))
    hidden = torch.ones_like(x).bool()
    z = m.with_noise(x, hidden, torch.full((1, 6), 0.5).double())
    before = m(x, z)
    for j in range(6):
        text = x.clone()
        text[0, j] = (x[0, j] + 1) % V
        by_text = (m(text, z) - before).abs().amax(-1)[0] > 1e-9
        noise = z.z.clone()
        noise[0, j] += 0.1 * m.E[0]
        by_noise = (m(x, Noisy(noise, z.gamma, hidden)) - before).abs().amax(-1)[0] > 1e-9
        for i in range(6):
            assert by_text[i] == (j // b < i // b) and by_noise[i] == (j // b == i // b), (i, j)


@pytest.mark.parametrize("b", [2, 3, 6])
def test_cached_decoding_equals_the_network(b):
    m = model(b, L=6)
    x = torch.randint(V, (5, 6))
    z = m.with_noise(x, torch.rand(5, 6) < 0.6, torch.randn(5, 6).double())
    whole = m(x, z)
    cache = None
    for start in range(0, 6, b):
        window = slice(start, start + b)
        block = Noisy(z.z[:, window], z.gamma[:, window], z.hidden[:, window])
        for wanted in (torch.rand(5, b) < 0.5, torch.ones(5, b).bool()):
            wanted[0] = True
            if b == 6:
                wanted[:] = True           # without a cache, rows that want nothing are left out
            logp, cache = m.decode(x, block, start, start + b, wanted, cache)
            assert_close(logp, whole[:, window][wanted])


def test_a_student_starts_as_its_teacher():
    """In a last block of one token, which has nothing but noise of its own to look at."""
    torch.manual_seed(0)
    shape = dict(V=V, L=5, n_layer=2, n_head=2, n_embd=16)
    teacher = Transformer(Config(**shape)).double()
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.4)
    student = Continuous(Config(**shape, b=4, D=4)).double()
    student.load_state_dict(teacher.state_dict(), strict=False)
    x = torch.randint(V, (9, 5))
    z = student.with_noise(x, torch.ones_like(x).bool(), torch.full((9, 5), 30.0))
    assert_close(student(x, z)[:, 4], teacher(x, x)[:, 4], atol=1e-4, rtol=0)


def test_noise_levels_are_gumbel_quantiles():
    m = model()
    mu, beta = m.gumbel
    u = torch.tensor([0.1, 0.5, 0.9]).double()
    assert_close((-(-(m.levels(u) - mu) / beta).exp()).exp(), u)


def test_states_of_training():
    m = model(b=2, L=6)
    x = torch.randint(V, (400, 6))
    z = dlm.noisy_states(m, x)
    assert z.hidden[::2].all() and 0.5 < z.hidden[1::2].double().mean() < 0.95
    assert (z.gamma[~z.hidden] == CLEAN).all()
    pairs = z.gamma[::2].view(200, 3, 2)
    assert torch.equal(pairs[..., 0], pairs[..., 1])              # one level a block
    assert len(pairs[:, 0, 0].unique()) > 190


@pytest.mark.parametrize("b", [2, 6])
@pytest.mark.parametrize("N", [1, 3])
def test_given_tokens_stay_and_nothing_stays_hidden(b, N):
    m = model(b, L=6)
    z = torch.randint(V + 1, (20, 15))                            # longer than the context
    states = list(dlm.sample(m, z, N))
    last = states[-1]
    assert (last < V).all() and torch.equal(last[z < V], z[z < V])


def test_what_was_drawn_stays_and_is_seen():
    m = model(b=6, L=6)
    seen = []

    def decode(x, z, start, stop, wanted, cache=None):
        seen.append((z.z, z.hidden, z.gamma))
        return Continuous.decode(m, x, z, start, stop, wanted, cache)

    m.decode = decode
    states = torch.stack(list(dlm.sample(m, torch.full((20, 6), V), 6)))
    text = states[-1]
    for step, (z, hidden, gamma) in enumerate(seen):
        assert torch.equal(hidden, (torch.arange(6) >= step).expand(20, 6))
        assert (gamma[:, :step] == CLEAN).all() and (gamma[:, step:] > 5).all()
        assert torch.equal(z[:, :step], m.E[text][:, :step])
    for step in range(1, 7):
        assert torch.equal(states[step][:, :step], text[:, :step])


def test_calls_are_steps_in_each_block():
    for order, calls in (("together", 20), ("left", 8)):
        row, _ = dlm.write_at_cost(model(b=2, L=8), 4, steps=5, order=order)
        assert row["calls"] == calls


# --- the scripts ----------------------------------------------------------------------------------

GAUSS = "--noise gaussian"


@pytest.mark.parametrize("method", ["plain", "prefix", "tcs", "sequence"])
def test_every_target_trains_and_writes(call, method):
    argv = f"{TEXT} --method {method} --block 4 --updates 5 --batch_size 8 {GAUSS} --texts 16"
    assert call("distill", f"{argv} --out run")[0] == 0
    ways = [row["what"].split(", ")[-1] for row in metrics("run")["table"]]
    assert "order left steps 4" in ways and "order together steps 16" in ways
    for order in ("", "--order together"):
        argv = (f"--checkpoint run --number 2 --steps 4 {order}", "--prompt", "the ____ of")
        code, out, _ = call("sample", *argv)
        assert call("sample", *argv, "--watch")[1] == out           # not its first guesses
        assert code == 0 and all(t.startswith("the ") and t.endswith(" of") for t in texts(out))


def test_a_denoiser_of_its_own_is_trained_and_distilled_further(call):
    assert call("train", f"{TRAIN} --objective mdlm {GAUSS} --updates 5 --out noisy")[0] == 0
    argv = f"{TEXT} --method tcs --block 0 --student noisy {GAUSS} --updates 5 --texts 16"
    assert call("distill", f"{argv} --out run")[0] == 0
    assert torch.equal(*(torch.load(f"{name}/checkpoint.pt", weights_only=True)["weights"]["E"]
                         for name in ("noisy", "run")))


def test_a_resumed_run_equals_an_uninterrupted_one(call, monkeypatch):
    argv = f"{TEXT} --method tcs --block 4 --updates 10 --batch_size 8 {GAUSS} --texts 16"
    assert call("distill", f"{argv} --out whole")[0] == 0
    with monkeypatch.context() as m:
        stop_at_7(m)
        assert call("distill", f"{argv} --out part")[0] == 130
    assert call("distill", "--resume part")[0] == 0
    assert same(end("whole"), end("part"))


@pytest.mark.parametrize("script, argv", [
    ("train", f"{TRAIN} {GAUSS} --out run"),
    ("distill", f"{ONE} {GAUSS} --student {TCS} --out run"),
    ("distill", f"{TEXT} --method opdlm --block 4 {GAUSS} --out run"),
    ("distill", f"{TEXT} --method sdtt --student {TCS} {GAUSS} --out run")])
def test_noise_where_masks_are_needed(refused, script, argv):
    assert "--noise" in refused(script, argv) or "--student" in refused(script, argv)


def test_masks_where_noise_is_needed(call, refused):
    assert call("train", f"{TRAIN} --objective mdlm {GAUSS} --updates 2 --out noisy")[0] == 0
    for argv in (f"{TEXT} --method tcs --student noisy --out run",
                 f"{TEXT} --method sdtt --student noisy --out run"):
        assert "--student" in refused("distill", argv)
    for argv in ("--threshold .9", "--order spread", "--steps -1"):
        assert argv.split()[0] in refused("sample", f"--checkpoint noisy {argv}")
    assert "--correct" in refused("sample", "--checkpoint noisy", "--correct", "the of")
    assert "--order" in refused("sample", f"--checkpoint {TCS} --order together")
