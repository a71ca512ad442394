"""Puzzles: answers are what dlm.py computes, solutions are one line, each mistake hears its own
sentence."""
import ast
import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dlm
import puzzles
from exact import HiddenMarkov

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
HOLES = NOTEBOOKS / "0_puzzles.ipynb"
SOLVED = NOTEBOOKS / "solutions" / "0_puzzles.ipynb"
NAMES = list(puzzles.PUZZLES)

each_puzzle = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def seed_and_close_pictures():
    torch.manual_seed(0)
    puzzles.plt.switch_backend("agg")
    yield
    puzzles.plt.close("all")


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def cells_with_puzzles(path):
    """{name: the cell that defines it}, in the notebook's order."""
    cells = [cell for cell in cells_of(path) if source(cell).startswith("def ")]
    return {source(cell)[4:].split("(")[0]: cell for cell in cells}


def define(cell, name):
    """The function of a cell, without the line that checks it."""
    space = {"torch": torch, "F": F}
    exec(source(cell).split("puzzles.check")[0], space)
    return space[name]


SOLUTIONS = {name: define(cell, name) for name, cell in cells_with_puzzles(SOLVED).items()}


def function(name, answer):
    """The puzzle's function if it returns this expression of its arguments."""
    arguments = ", ".join(inspect.signature(SOLUTIONS[name]).parameters)
    f = eval(f"lambda {arguments}: {answer}", {**globals(), **SOLUTIONS})
    f.__name__ = name
    return f


def answer_of(name):
    return puzzles.PUZZLES[name].answer


def told(name, answer):
    """What the check says of a wrong answer, without the name and the numbers."""
    with pytest.raises(AssertionError) as error:
        puzzles.check(function(name, answer))
    return str(error.value).removeprefix(f"{name}: ").split(" It should be [")[0]


# --------------------------------------------------------------------------------------------------
# Right answers

@each_puzzle
def test_the_written_out_answer_and_the_solution_pass(name, capsys):
    for f in (answer_of(name), SOLUTIONS[name]):
        puzzles.check(f)
        assert capsys.readouterr().out == f"{name}: right\n"


OTHERWISE = {  # right answers that are written in another way than in the solutions
    "shift": "torch.cat([torch.full((len(x), 1), MASK), x[:, :-1]], 1).tolist()",
    "weights": "F.normalize((z == MASK).double(), p=1, dim=-1)",
    "may_see": "torch.ones(-(-L // b), -(-L // b)).tril().bool()"
               ".repeat_interleave(b, 0).repeat_interleave(b, 1)[:L, :L]",
    "times": "1 - torch.arange(N + 1).double() / N",
    "chances": "[1 / n for n in range(N, 0, -1)]",
    "clock": "[max(t - n * dt, 0) for n in range(k)]",
    "kls": "torch.stack([F.kl_div(q.log(), p, reduction='none').sum(1),"
           " F.kl_div(p.log(), q, reduction='none').sum(1)])",
    "leave_one_out": "[(joint / joint.sum(0))[:, x[1]].tolist(), (joint[x[0]] /"
                     " joint[x[0]].sum()).tolist()]",
    "targets": "kept[:, None] * kept * c / (c * kept).sum() + torch.diag((~kept).float())",
    "by_noise": "torch.distributions.Normal(alpha * E, sigma).log_prob(z).sum(-1).softmax(-1)",
    "drawn": "(p.double().cumsum(0) <= u[:, None]).sum(-1)",
    "bounded": "(H.sort()[0].cumsum(0) - H.sort()[0] <= bound)[H.argsort().argsort()]",
    "leftmost": "dlm.first_of_each(-torch.arange(len(hidden)).float()[None], hidden[None],"
                " torch.tensor([[k]]))[0]",
}


@each_puzzle
def test_a_right_answer_may_be_written_in_another_way(name, capsys):
    puzzles.check(function(name, OTHERWISE[name]))
    assert capsys.readouterr().out == f"{name}: right\n"


@each_puzzle
def test_the_solution_is_one_expression_of_80_columns(name):
    text = source(cells_with_puzzles(SOLVED)[name])
    _, body = ast.parse(text).body[0].body                  # the docstring and the line
    assert isinstance(body, ast.Return)
    assert body.lineno == body.end_lineno
    assert body.end_col_offset <= 80
    assert not any(isinstance(node, (ast.Lambda, ast.comprehension, ast.NamedExpr))
                   for node in ast.walk(body))


# --------------------------------------------------------------------------------------------------
# The answers are what dlm.py computes

def test_shift_and_attention_are_the_transformers():
    model = dlm.Transformer(dlm.Config(V=5, L=6, n_layer=1, n_head=1, n_embd=8))
    x = torch.randint(5, (3, 6))
    assert torch.equal(answer_of("shift")(x, 5), model.shift(x))
    for L, b in ((6, 1), (6, 2), (6, 3), (7, 3), (6, 6)):
        position, clean = dlm.slots(L, b)
        mask = dlm.attends(position, clean, position, clean, b)
        asked = position[-L:] if b > 1 else position
        seen = torch.zeros(L, L).index_add(1, position, mask[-L:].float()) > 0
        assert torch.equal(asked, torch.arange(L))
        assert torch.equal(answer_of("may_see")(L, b), seen)


def test_weights_are_those_of_the_loss():
    b, n, MASK = 3, 4, 7
    z = dlm.hide(torch.randint(7, (1, b * n)), b, MASK)
    weights = answer_of("weights")(z.view(n, b), MASK) / n
    assert torch.allclose(weights.view(1, -1), dlm.token_weights(z == MASK, b))


@pytest.mark.parametrize("N", [1, 3, 8])
def test_times_and_chances_are_those_of_the_ancestral_sampler(N):
    moment = (torch.arange(24_000)[None] + 0.5) / 24_000        # as evenly as can be
    hidden = torch.ones_like(moment).bool()
    times, chances = answer_of("times")(N), answer_of("chances")(N)
    schedule = dlm.Schedule("ancestral", N, 0.0, moment)
    for step in range(N):
        assert hidden.float().mean() == pytest.approx(times[step].item(), abs=1e-4)
        new = schedule.may_come(step, hidden)
        assert new.sum() / hidden.sum() == pytest.approx(chances[step].item(), abs=1e-3)
        hidden &= ~new
    assert hidden.float().mean() == times[-1]


def test_the_clock_is_that_of_sdtt(monkeypatch):
    """Moments are uniform over the time left: with uniforms of 1 they are that time itself.

    After the last of the k calls nothing needs to be revealed: five have four steps between them.
    """
    seen = []

    def note(hidden, moment, elapsed):
        seen.append(moment[0, 0])
        return torch.zeros_like(hidden)

    monkeypatch.setattr(dlm, "ancestral", note)
    monkeypatch.setattr(torch, "rand", lambda shape, device: torch.ones(shape))
    source = HiddenMarkov.markov(2, 3)
    z = torch.full((1, 3), 2)
    dlm.sdtt(source, z, z, torch.full((1, 3), 0.5), 0.2, k=5)
    assert torch.allclose(torch.stack(seen), answer_of("clock")(0.5, 0.2, 4))


def test_the_kls_are_the_divergences():
    p, q = torch.rand(2, 9, 2).softmax(-1)
    kinds = [dlm.divergence(p, q.log(), kind) for kind in ("forward", "reverse")]
    assert torch.allclose(answer_of("kls")(p, q), torch.stack(kinds), atol=1e-6)


def test_the_scores_are_those_of_tcs():
    V, K = 4, 2
    source = HiddenMarkov.markov(V, 2, seed=3)
    texts = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    joint = source.log_prob(texts).exp().view(V, V)
    exact = dlm.concrete_score(source, texts, b=2, estimator="exact").exp()
    top = dlm.concrete_score(source, texts, b=2, estimator="topk", K=K).exp()
    kept = torch.zeros(V, dtype=torch.bool).scatter(0, joint.sum(1).topk(K).indices, True)
    for x, c, of_x in zip(texts, exact, top):
        assert torch.allclose(answer_of("leave_one_out")(joint, x).double(), c, atol=1e-6)
        row = answer_of("targets")(c[0].float(), kept)[x[0]]
        assert torch.allclose(row.double(), of_x[0], atol=1e-6)


def test_noise_says_what_the_continuous_student_hears():
    student = dlm.Continuous(dlm.Config(V=5, L=3, b=3, n_layer=1, n_head=1, n_embd=8, D=4))
    z = student.with_noise(torch.tensor([[0, 3, 4]]), torch.ones(1, 3).bool(), torch.ones(1, 3))
    alpha, sigma = (rate.item() for rate in dlm.rates(torch.tensor(1.0)))
    said = student.channel(z).softmax(-1)
    for i in range(3):
        p = answer_of("by_noise")(z.z[0, i], student.E, alpha, sigma)
        assert torch.allclose(p, said[0, i], atol=1e-5)


def test_tokens_are_drawn_as_the_sampler_draws_them():
    p = torch.rand(50).softmax(-1)
    u = torch.rand(300, dtype=torch.float64) * 0.999
    assert torch.equal(answer_of("drawn")(p, u), dlm.categorical(p.expand(300, -1), u))


def test_float32_loses_most_rare_tokens():
    """The picture's claim: of forty tokens that u aims at, float32 sums let only some come."""
    p, u = puzzles.tensors(puzzles.PUZZLES["drawn"].cases[0])
    assert answer_of("drawn")(p, u).tolist() == list(range(1, 41))
    assert len(torch.searchsorted(p.cumsum(0), u.float(), right=True).unique()) < 20
    largest = torch.tensor(1 - 2 ** -24)
    assert largest < 1
    assert -(-largest.log()).log() == pytest.approx(16.6, abs=0.05)


def test_bounded_takes_the_most_that_the_bound_allows():
    H = torch.rand(6)
    for bound in (0.0, 0.5, 1.5, 9.0):
        most = 0
        for taken in itertools.product((False, True), repeat=6):
            some = H[torch.tensor(taken)]
            if len(some) and some.sum() - some.amax() <= bound:
                most = max(most, len(some))
        taken = answer_of("bounded")(H, bound)
        assert taken.sum() == most
        assert taken[H.argsort()[:most]].all()


def test_leftmost_is_first_of_each():
    score = -torch.arange(7.0)[None]
    for row in itertools.product((False, True), repeat=7):
        hidden = torch.tensor(row)
        for k in range(1, int(hidden.sum()) + 1):
            expected = dlm.first_of_each(score, hidden[None], torch.tensor([[k]]))[0]
            assert torch.equal(answer_of("leftmost")(hidden, k), expected)
            assert torch.equal(SOLUTIONS["leftmost"](hidden, k), expected)


# --------------------------------------------------------------------------------------------------
# Wrong answers

WRONG = [
    ("shift", "x", "what it has to say"),
    ("shift", "F.pad(x[:, 1:], (0, 1), value=MASK)", "may not see"),
    ("shift", "x.roll(1, 1)", "slot 0 holds MASK"),
    ("shift", "F.pad(x, (1, 0), value=MASK)", "enters none of them"),
    ("weights", "(z == MASK) / (z == MASK).sum(-1, keepdim=True)", "0 by 0"),
    ("weights", "torch.ones_like(z) / z.size(-1)", "A visible token has a weight"),
    ("weights", "(z == MASK) / (z == MASK).sum()", "Each block has its own"),
    ("weights", "(z == MASK) / z.size(-1)", "add up to 1"),
    ("may_see", "may_see(L, b).T", "swapped"),
    ("may_see", "(torch.arange(L) - torch.arange(L)[:, None]).abs() <= b", "not written yet"),
    ("may_see", "torch.arange(L)[:, None] // b == torch.arange(L) // b", "all earlier blocks"),
    ("may_see", "torch.ones(L, L).tril().bool()", "to its right too"),
    ("times", "torch.linspace(1, 0, N)", "N + 1 times"),
    ("times", "torch.linspace(0, 1, N + 1)", "Time runs from 1"),
    ("times", "torch.linspace(1 - 1 / (N + 1), 0, N + 1)", "The first time should be 1"),
    ("times", "torch.linspace(1, 1e-3, N + 1)", "never revealed"),
    ("times", "torch.linspace(1, 0, N + 1) ** 2", "equally long"),
    ("chances", "torch.ones(N) / N", "share of all tokens"),
    ("chances", "1 / (N - 1 - torch.arange(N))", "at most 1"),
    ("chances", "1 / (1 + torch.arange(N))", "first step"),
    ("chances", "1 / (N + 1 - torch.arange(N))", "last step"),
    ("chances", "(1 + torch.arange(N)) / N", "1/N of all tokens on average"),
    ("clock", "(t - dt * (1 + torch.arange(k))).clamp(min=0)", "first call"),
    ("clock", "t + dt * torch.arange(k)", "down, not up"),
    ("clock", "t - dt * torch.arange(k)", "ends at 0"),
    ("clock", "t - dt / k * torch.arange(k)", "one step of length dt"),
    ("kls", "kls(q, p)", "swapped"),
    ("kls", "(torch.stack([p, -q]) * (p / q).log()).mean(-1)", "mean over both"),
    ("kls", "(torch.stack([p, -q]) * (p / q).log2()).sum(-1)", "in bits"),
    ("kls", "(torch.stack([p, q]) * (p / q).log()).sum(-1)", "never negative"),
    ("kls", "-torch.stack([p * q.log(), q * p.log()]).sum(-1)", "equals its target"),
    ("leave_one_out", "torch.stack([joint.sum(1), joint.sum(0)])", "do not look at the other"),
    ("leave_one_out", "torch.stack([joint[:, x[1]], joint[x[0]]]).softmax(-1)", "not softmax"),
    ("leave_one_out", "torch.stack([joint[:, x[1]], joint[x[0]]])", "add up to 1"),
    ("leave_one_out", "leave_one_out(joint, x).flip(0)", "swapped"),
    ("targets", "torch.eye(len(c)).where(~kept[:, None], c * kept)", "add up to 1"),
    ("targets", "torch.eye(len(c))", "does not come in"),
    ("targets", "(c * kept / c[kept].sum()).expand(len(c), -1)", "as one-hot target"),
    ("targets", "F.normalize(c * (kept | torch.eye(len(c)).bool()), p=1)", "biased"),
    ("by_noise", "alpha / sigma ** 2 * E @ z", "probabilities"),
    ("by_noise", "(alpha / sigma * E @ z).softmax(-1)", "variance"),
    ("by_noise", "(E @ z / sigma ** 2).softmax(-1)", "alpha is missing"),
    ("by_noise", "(2 * alpha / sigma ** 2 * E @ z).softmax(-1)", "a half in its exponent"),
    ("by_noise", "(-alpha / sigma ** 2 * E @ z).softmax(-1)", "nearest"),
    ("drawn", "p.argmax().expand(len(u))", "no draw"),
    ("drawn", "(p.double().cumsum(0) > u[:, None]).sum(-1)", "later token"),
    ("drawn", "torch.searchsorted(p.double().cumsum(0), u, right=True) + 1", "one too high"),
    ("drawn", "torch.searchsorted(p.double().cumsum(0), u)", "probability 0"),
    ("drawn", "torch.searchsorted(p.cumsum(0), u.float(), right=True)", "float32"),
    ("drawn", "torch.searchsorted(p.cumsum(0).double(), u, right=True)", "float32"),
    ("bounded", "H < 0", "the surest token"),
    ("bounded", "H.cumsum(0) - H <= bound", "come first"),
    ("bounded", "H <= bound", "Too many"),
    ("bounded", "(H * (H <= H[:, None])).sum(-1) <= bound", "largest entropy does not count"),
    ("leftmost", "torch.arange(len(hidden)) * k % len(hidden) < k", "cannot come"),
    ("leftmost", "hidden & (hidden.cumsum(0) <= k)", "side by side"),
    ("leftmost", "hidden & ((hidden.cumsum(0) - 1) % (hidden.sum() // k) == 0)", "Exactly k"),
    ("leftmost", "hidden & (hidden.cumsum(0) * k % hidden.sum() < k)", "first hidden token"),
    ("leftmost", "hidden & ((hidden.cumsum(0) == 1) | (hidden.cumsum(0) > hidden.sum() - k + 1))",
     "equally many"),
]


@pytest.mark.parametrize("name, answer, sentence", WRONG)
def test_a_mistake_hears_its_own_sentence(name, answer, sentence):
    assert sentence in told(name, answer)


@each_puzzle
def test_every_sentence_is_heard(name, monkeypatch):
    monkeypatch.setattr(puzzles, "show", lambda asked, got: None)       # pictures take time
    mistakes = [(answer, sentence) for of, answer, sentence in WRONG if of == name]
    heard = {told(name, answer) for answer, _ in mistakes}
    assert len({sentence for _, sentence in mistakes}) == len(heard) >= 3
    asked = puzzles.PUZZLES[name]
    case = puzzles.tensors(asked.cases[0])
    assert set(asked.wrong(torch.as_tensor(asked.answer(*case)), *case)) <= heard


@each_puzzle
def test_sentences_are_short_and_no_number_hides_them(name):
    asked = puzzles.PUZZLES[name]
    case = puzzles.tensors(asked.cases[0])
    for sentence in [*asked.wrong(torch.as_tensor(asked.answer(*case)), *case), asked.shape]:
        assert len(sentence) < 100
        assert sentence == "" or sentence.endswith(".")


@each_puzzle
def test_an_answer_that_is_right_in_the_first_case_only_is_refused(name):
    first = torch.as_tensor(SOLUTIONS[name](*puzzles.tensors(puzzles.PUZZLES[name].cases[0])))
    if len(puzzles.PUZZLES[name].cases) == 1:
        assert first.numel() > 30                           # many cases in one
        return

    def remembered(*case):
        return first

    remembered.__name__ = name
    with pytest.raises(AssertionError):
        puzzles.check(remembered)


@each_puzzle
def test_a_wrong_answer_that_nobody_named_is_refused(name):
    def off(*case):
        right = torch.as_tensor(SOLUTIONS[name](*case))
        return ~right if right.dtype == torch.bool else right * 1.01 + 0.01

    def twice(*case):
        return torch.stack([torch.as_tensor(SOLUTIONS[name](*case))] * 2)

    def text(*case):
        return "token"

    for f, message in ((off, name), (twice, "The shape should be "), (text, "cannot be read")):
        f.__name__ = name
        with pytest.raises(AssertionError, match=message):
            puzzles.check(f)


@pytest.mark.parametrize("name", ["may_see", "bounded", "leftmost"])
def test_a_mask_is_true_or_false(name):
    with pytest.raises(AssertionError, match="a mask of True and False"):
        arguments = ", ".join(inspect.signature(SOLUTIONS[name]).parameters)
        puzzles.check(function(name, f"{name}({arguments}).long()"))


def test_small_answers_are_shown():
    message = "It should be [0.25, 0.3333, 0.5, 1.0], but you return [0.25, 0.25, 0.25, 0.25]."
    with pytest.raises(AssertionError) as error:
        puzzles.check(function("chances", "torch.ones(N) / N"))
    assert str(error.value).endswith(message)


# --------------------------------------------------------------------------------------------------
# Pictures and notebooks

@each_puzzle
def test_a_picture_stands_beside_the_answer(name):
    asked = puzzles.PUZZLES[name]
    right = torch.as_tensor(SOLUTIONS[name](*puzzles.tensors(asked.cases[0])))
    texts = []
    for got in (right, None, torch.stack([right, right])):
        puzzles.show(asked, got)
        left, own = puzzles.plt.gcf().axes
        assert (left.get_title(), own.get_title()) == ("it should be", "yours")
        assert left.get_xlabel() and not left.get_legend()
        drawn = [len(ax.lines) + len(ax.patches) + len(ax.images) for ax in (left, own)]
        assert drawn[0] and drawn[1] == (drawn[0] if got is right else 0)
        texts.append([text.get_text() for text in own.texts])
    assert texts[0] == [text.get_text() for text in left.texts]
    assert texts[1:] == [["not done yet"], [f"another shape: {(2, *right.shape)}"]]


def test_both_notebooks_have_all_puzzles_in_order():
    holes, solved = cells_with_puzzles(HOLES), cells_with_puzzles(SOLVED)
    assert list(holes) == list(solved) == NAMES
    asked = [[source(cell) for cell in cells_of(path)[1:] if cell["cell_type"] == "markdown"]
             for path in (HOLES, SOLVED)]
    assert asked[0] == asked[1]
    assert [text.split(".")[0] for text in asked[0]] == [f"**{n + 1}" for n in range(len(NAMES))]
    for name in NAMES:
        line = source(solved[name]).split("\n")[2]
        assert source(holes[name]) == source(solved[name]).replace(line, "    return ...")
        assert source(holes[name]).endswith(f"\n\n\npuzzles.check({name})")


@pytest.mark.parametrize("path, said", [(HOLES, "not done yet"), (SOLVED, "right")])
def test_notebooks_are_committed_as_they_ran(path, said):
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert "/tmp" not in path.read_text(encoding="utf-8")
    for name, cell in cells_with_puzzles(path).items():
        text, picture = cell["outputs"]
        assert "".join(text["text"]) == f"{name}: {said}\n"
        assert "image/png" in picture["data"]


def test_the_solved_notebook_runs_by_itself(tmp_path):
    code = [source(cell) for cell in cells_of(SOLVED) if cell["cell_type"] == "code"]
    script = tmp_path / "solved.py"
    script.write_text("\n".join(code), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=SOLVED.parent, capture_output=True,
                          env={**os.environ, "MPLBACKEND": "agg"}, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{name}: right\n" for name in NAMES)


@each_puzzle
def test_a_hole_is_told_and_its_goal_drawn(name, capsys):
    for unfinished in (define(cells_with_puzzles(HOLES)[name], name), function(name, "None")):
        puzzles.check(unfinished)
        assert capsys.readouterr().out == f"{name}: not done yet\n"
        assert puzzles.plt.get_fignums()
