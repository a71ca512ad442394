"""Exercises: solutions pass, holes are told apart from errors, each named mistake is heard."""
import ast
import inspect
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

import checks
import dlm

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
PATHS = sorted((NOTEBOOKS / "solutions").glob("[1-9]*.ipynb"))
CHECKS = {name: check for name, check in vars(checks).items() if name.startswith("check_")}


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def exercises(path):
    """{name: source} of the cells of a notebook that define a function with a check."""
    sources = ["".join(cell["source"]) for cell in code_cells(path)]
    defined = {re.match(r"(def (\w+))?", source)[2]: source for source in sources}
    return {name: source for name, source in defined.items() if f"check_{name}" in CHECKS}


def define(name, source):
    """The function that a cell defines."""
    cell = {"itertools": itertools, "math": math, "torch": torch}
    exec(source, cell)
    return cell[name]


SOURCES = {name: source for path in PATHS for name, source in exercises(path).items()}
SOLUTIONS = {name: define(name, source) for name, source in SOURCES.items()}


def function(name, answer):
    """The exercise's function if it returns this expression of its arguments.

    The expression may call the solutions of all exercises."""
    arguments = ", ".join(inspect.signature(SOLUTIONS[name]).parameters)
    f = eval(f"lambda {arguments}: {answer}", {**globals(), **SOLUTIONS})
    f.__name__ = name
    return f


def check(f):
    CHECKS[f"check_{f.__name__}"](f)


def complaint(f):
    """What the check says of a wrong answer. It stops the notebook, `attempt` or not."""
    with pytest.raises(AssertionError) as error, checks.attempt():
        check(f)
    assert not isinstance(error.value, checks.NotDone)
    return str(error.value).removeprefix(f"{f.__name__}: ")


# --------------------------------------------------------------------------------------------------
# Right and wrong answers

def least(score, k):
    """The mask of the k least scores of each row."""
    return score.argsort(-1).argsort(-1) < k


def one_of_each(hidden, stretch, pick):
    """The mask of one hidden token of each stretch: the first (min) or the last (max)."""
    places = [i for i in range(len(hidden)) if hidden[i]]
    chosen = {pick(i for i in places if stretch[i] == stretch[j]) for j in places}
    return torch.tensor([i in chosen for i in range(len(hidden))])


def among(prefix, suffix, candidates):
    """The score of the candidates, and 0 for all other letters."""
    score = (prefix + suffix).exp() * torch.eye(5)[torch.tensor(candidates)].amax(0)
    return score / score.sum()


def said(teacher, z):
    return teacher(z, z).exp()


def entropy(p):
    return torch.special.entr(p).sum()


def kl(p, q):
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()


def product(joint):
    return joint.sum(1, keepdim=True) * joint.sum(0)


def states_at(states, moment):
    """Of each of R blocks the state at its own moment (R,)."""
    return states[moment, torch.arange(states.size(1))]


OTHERWISE = {  # right answers that are written in another way than in the solutions
    "number_of_slots": "len(dlm.slots(L, b)[0])",
    "depends_on": "torch.tensor([[j < i or i // b == j // b and i != j for j in range(L)]"
                  " for i in range(L)])",
    "set_weight": "math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n)",
    "both_hidden": "sum(math.comb(n - 2, m - 2) / math.comb(n, m) for m in range(2, n + 1)) / n",
    "cosine_weight": "math.pi / 2 / math.tan(math.pi / 4 * s)",
    "whole_rows": "torch.tensor(2 / 2 ** k)",
    "leftmost_of_each": "one_of_each(hidden, (hidden.cumsum(0) - 1) * k // hidden.sum(), min)",
    "mean_whole_rows": "sum(2 / 2 ** steps.count(min(steps))"
                       " for steps in itertools.product(range(N), repeat=L)) / N ** L",
    "entropy_of_each": "[entropy(row) for row in p]",
    "two_variances": "[(joint.sum(1) * (1 - joint.sum(1))).sum(),"
                     " (joint * (joint / joint.sum(0) - joint.sum(1, keepdim=True))).sum()]",
    "score_of_candidates": "among(prefix, suffix, prefix.argsort()[-K:].tolist())"
                           " if x_i in prefix.argsort()[-K:] else torch.eye(5)[x_i]",
    "mean_over_completions": "(log_c.exp() * (log_p - log_q).exp()[:, None]).sum(0)"
                             " / (log_p - log_q).exp().sum()",
    "gradient_score": "(prefix + E @ gradient).softmax(-1)",
    "seen_through_noise": "(log_c - (z - E / (1 + math.exp(gamma)) ** .5).square().sum(1)"
                          " * (1 + math.exp(-gamma)) / 2).softmax(-1)",
    "pick_states": "states_at(states, (4 * torch.rand(states.size(1))).long())",
    "opdlm_target": "dlm.prefix(teacher, x, y, b).tolist()",
    "weight_after": "w + (0.5 - w) / n",
    "two_step_target": "two_step_target(teacher, z, first, drawn) * (z == 3)[..., None]",
    "two_divergences": "[(q * (q / p).log()).nansum(), (p - q).clamp(min=0).sum()]",
    "jensen_shannon": "entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2",
    "contradiction": "(now - chance @ later).clamp(min=0).sum()",
    "cost_of_one_step": "entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)",
}

MISTAKES = [
    ("number_of_slots", "2 * L", "nobody's past"),
    ("number_of_slots", "L", "noisy slots"),
    ("number_of_slots", "L if b == 1 else 2 * L - b", "shorter than b"),
    ("depends_on", "depends_on(L, b) | torch.eye(L).bool()", "its own prediction"),
    ("depends_on", "torch.ones(L, L).tril(-1).bool()", "This is causal"),
    ("depends_on", "depends_on(L, b).T", "are swapped"),
    ("set_weight", "1 / (n * math.comb(n, m))", "chance of the set"),
    ("set_weight", "n / (m * math.comb(n, m))", "1/n, is missing"),
    ("set_weight", "1 / (m * n * math.comb(n, m))", "a mean over the block"),
    ("both_hidden", "(sum(m / n for m in range(1, n + 1)) / n) ** 2", "not independent"),
    ("both_hidden", "1 / 3", "m starts at 1"),
    ("both_hidden", "sum((m / n) ** 2 for m in range(1, n + 1)) / n", "one of n - 1"),
    ("cosine_weight", "-cosine_weight(s)", "sign is wrong"),
    ("cosine_weight", "1 / (1 - math.cos(math.pi / 2 * s))", "dt/ds"),
    ("cosine_weight", "1 / math.tan(math.pi / 4 * s)", "inner derivative"),
    ("perplexity_per_character", "math.exp(nll)", "perplexity per token"),
    ("perplexity_per_character", "nll / chars_per_token", "These are nats"),
    ("perplexity_per_character", "math.exp(nll) / chars_per_token", "Divide the nats"),
    ("expected_calls", "N", "Some steps reveal nothing"),
    ("expected_calls", "N - expected_calls(L, N)", "Count the others"),
    ("expected_calls", "expected_calls(L, N) / N", "one step"),
    ("whole_rows", "0.5 ** k", "One factor 1/2 is too many"),
    ("whole_rows", "1 - whole_rows(k)", "broken rows"),
    ("whole_rows", "10 / 10 ** k", "not 10"),
    ("leftmost_of_each", "one_of_each(hidden, torch.arange(len(hidden)) * k // len(hidden), min)",
     "hidden ones only"),
    ("leftmost_of_each", "hidden & (hidden.cumsum(0) <= k)", "the k leftmost"),
    ("leftmost_of_each", "one_of_each(hidden, (hidden.cumsum(0) - 1) * k // hidden.sum(), max)",
     "last of each stretch"),
    ("mean_whole_rows", "2 * (1 - 1 / (2 * N)) ** L", "an empty step"),
    ("mean_whole_rows", "2 * (1 - 1 / (2 * N)) ** L - 2 * (1 - 1 / N) ** L", "first step only"),
    ("mean_whole_rows", "2 / 2 ** (L / N)", "mean size"),
    ("cosine_counts", "L - torch.tensor(cosine_counts(L, N)).cumsum(0)", "still hidden"),
    ("cosine_counts", "torch.tensor(cosine_counts(L, N)).cumsum(0)", "revealed so far"),
    ("cosine_counts", "cosine_counts(L, N)[::-1]", "turned round"),
    ("entropy_of_each", "-entropy_of_each(p)", "sign is wrong"),
    ("entropy_of_each", "-(p * p.log2()).nansum(-1)", "in bits"),
    ("entropy_of_each", "-(p * p.log()).sum(-1)", "You return nan"),
    ("hide_again", "least(said, n)", "Given tokens never change"),
    ("hide_again", "least(9 * given - said, n)", "likeliest tokens"),
    ("hide_again", "(said + 9 * given).argsort(1) < n", "argsort"),
    ("score_by_hand", "prefix.exp() * suffix.exp()", "not add up to 1"),
    ("score_by_hand", "score_by_hand(prefix, suffix).log()", "logarithms"),
    ("score_by_hand", "(prefix.exp() + suffix.exp()) / (1 + suffix.exp().sum())", "Do not add"),
    ("two_variances", "[1, (joint ** 2 / joint.sum(0)).sum()]", "means of squares"),
    ("two_variances", "[1 - joint.sum(1) @ joint.sum(1),"
                      " (joint / joint.sum(0)).var(1, correction=0).sum()]", "Weigh the rests"),
    ("two_variances", "two_variances(joint) @ torch.tensor([[1.0, 1], [0, -1]])", "is known"),
    ("score_of_candidates", "among(prefix, suffix, [*prefix.topk(K).indices])", "one-hot x_i"),
    ("score_of_candidates", "among(prefix, suffix, [*prefix.topk(K).indices, x_i])", "biases"),
    ("score_of_candidates", "(prefix + suffix).softmax(-1) * least(-prefix, K)", "all letters"),
    ("mean_of_sampled", "score_by_hand(prefix, suffix)", "This is the score"),
    ("mean_of_sampled", "mean_of_sampled(prefix, prefix + suffix, K)", "counts twice"),
    ("mean_of_sampled", "mean_of_sampled(torch.zeros(5) - math.log(5), suffix, K)", "not equally"),
    ("mean_over_completions", "log_c.exp().mean(0)", "plain mean"),
    ("mean_over_completions", "log_p.softmax(0) @ log_c.exp()", "student drew"),
    ("mean_over_completions", "mean_over_completions(log_c, log_q, log_p)", "turned round"),
    ("gradient_score", "(E @ gradient).softmax(-1)", "forgot the prefix"),
    ("gradient_score", "(prefix - E @ gradient).softmax(-1)", "sign of the change"),
    ("gradient_score", "(prefix + (E - E[x_i]) @ gradient).exp()", "not add up to 1"),
    ("tokens_a_position", "K * (b - 1) / 2", "forgot the pass"),
    ("tokens_a_position", "1 + sum(K * (b - i) for i in range(b)) / b", "never read"),
    ("tokens_a_position", "b * tokens_a_position(b, K)", "Divide it by b"),
    ("seen_through_noise", "seen_through_noise(log_c, z / (1 + math.exp(-gamma)) ** .5, E, gamma)",
     "sigma² below"),
    ("seen_through_noise", "(log_c + E @ z * (1 + math.exp(-gamma))).softmax(-1)", "around alpha"),
    ("seen_through_noise", "seen_through_noise(0 * log_c, z, E, gamma)", "forgot the score"),
    ("pick_states", "states.gather(0, torch.randint(4, states[:1].shape))[0]", "same moment"),
    ("pick_states", "states_at(states, torch.randint(5, (states.size(1),)))", "last state"),
    ("pick_states", "states[2]", "equally likely.*0.0, 0.0, 1.0"),
    ("opdlm_target", "said(teacher, x)", "real text x"),
    ("opdlm_target", "said(teacher, y)", "not of y"),
    ("opdlm_target", "opdlm_target(teacher, x, y, b).log()", "logarithms"),
    ("target_and_truth", "target_and_truth(start, trans, v)[[1, 1]]", "every v"),
    ("target_and_truth", "torch.stack([start, start * trans[:, v]])", "add up to 1"),
    ("target_and_truth", "torch.stack([start, trans[v]])", "not what precedes it"),
    ("weight_after", "w", "Nothing moved"),
    ("weight_after", "0.5", "Only the leftmost"),
    ("weight_after", "0.5 + (w - 0.5) / n", "turned round"),
    ("tokens_of_an_update", "[L, L + b * L]", "forgot the clean tokens"),
    ("tokens_of_an_update", "[2 * L - b, L - b + b * L]", "comes on top"),
    ("tokens_of_an_update", "[2 * L - b, (b + 1) * (2 * L - b)]", "run once and kept"),
    ("shares_revealed", "[dt] * k", "dt / t"),
    ("shares_revealed", "[dt / t] * k", "Time moves on"),
    ("shares_revealed", "[dt / (t - n * dt) for n in range(k)]", "at most 1"),
    ("two_step_target", "said(teacher, z)", "k = 1"),
    ("two_step_target", "said(teacher, drawn.where(first, z))", "keeps the distribution"),
    ("two_step_target", "torch.where(first[..., None], said(teacher, drawn.where(first, z)),"
                        " said(teacher, z))", "swapped"),
    ("two_divergences", "[kl(p, q), (p - q).abs().sum() / 2]", "forward KL"),
    ("two_divergences", "[kl(q, p), (p - q).abs().sum()]", "factor 1/2"),
    ("two_divergences", "[(q * (q / p).log()).sum(), (p - q).abs().sum() / 2]", "You return nan"),
    ("jensen_shannon", "(kl((p + q) / 2, p) + kl((p + q) / 2, q)) / 2", "arguments swapped"),
    ("jensen_shannon", "2 * jensen_shannon(p, q)", "the sum"),
    ("jensen_shannon", "(p * (2 * p / (p + q)).log()).sum()", "You return nan"),
    ("contradiction", "(later.mean(0) - now).abs().sum() / 2", "not equally likely"),
    ("contradiction", "(chance @ later - now).abs().sum()", "factor 1/2"),
    ("contradiction", "chance @ (later - now).abs().sum(1) / 2", "mean of the distances"),
    ("cost_of_one_step", "kl(product(joint), joint)", "arguments swapped"),
    ("cost_of_one_step", "kl(joint, torch.ones(3, 3) / 9)", "frequency"),
    ("cost_of_one_step", "(joint * (joint / product(joint)).log()).sum()", "You return nan"),
    ("steps_of_each_round", "[[first, n] for _, n in steps_of_each_round(first, last, k)]", "next"),
    ("steps_of_each_round", "[pair[::-1] for pair in steps_of_each_round(first, last, k)]", "more"),
    ("steps_of_each_round", "steps_of_each_round(first, last, k)[::-1]", "comes first"),
    ("average_of_weights", "average_of_weights(weights, 1 - decay)", "old average"),
    ("average_of_weights", "average_of_weights(torch.cat([weights[:1] * 0, weights]), decay)",
     "not at zero"),
    ("average_of_weights", "weights.mean(0)", "plain mean"),
]


# --------------------------------------------------------------------------------------------------
# What the checks say of them

@pytest.fixture(params=[torch.float32, torch.float64])
def precision(request):
    """2_parallel and 5_sdtt work in float64, the other notebooks in float32."""
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_solutions_pass_and_holes_are_told(path, precision, capsys):
    holes = exercises(NOTEBOOKS / path.name)
    assert holes.keys() == exercises(path).keys()
    for name, hole in holes.items():
        check(SOLUTIONS[name])
        assert capsys.readouterr().out == f"{name}: right\n"
        assert ast.unparse(ast.parse(hole).body[0].body[-1]) == "..."
        for unfinished in define(name, hole), function(name, "..."):
            with checks.attempt():
                check(unfinished)
            assert capsys.readouterr().out == f"{name}: not done yet\n"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_solutions_are_committed_as_they_ran(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    told = ["".join(output["text"]) for cell in cells for output in cell["outputs"]]
    assert told == [f"{name}: right\n" for name in exercises(path)]
    assert "/tmp" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_right_answer_may_be_written_in_another_way(name, capsys):
    check(function(name, OTHERWISE[name]))
    assert capsys.readouterr().out == f"{name}: right\n"


@pytest.mark.parametrize("name, answer, message", MISTAKES)
def test_a_mistake_hears_its_own_message(name, answer, message):
    assert re.search(message, complaint(function(name, answer)))


@pytest.mark.parametrize("name", SOLUTIONS)
def test_all_mistakes_that_a_check_names_are_heard(name, monkeypatch):
    answers = [answer for exercise, answer, _ in MISTAKES if exercise == name]
    heard = {complaint(function(name, answer)).split(" For ")[0] for answer in answers}
    named = set()

    def note(f, inputs, right, mistakes, counted=...):
        named.update(mistakes)

    monkeypatch.setattr(checks, "compare", note)
    check(SOLUTIONS[name])
    assert named <= heard and len(heard) == 3


@pytest.mark.parametrize("name", SOLUTIONS)
def test_a_wrong_answer_that_nobody_named_is_refused(name):
    def off(*case):
        right = torch.as_tensor(SOLUTIONS[name](*case))
        return ~right if right.dtype == torch.bool else right + 1

    def twice(*case):
        return torch.stack([torch.as_tensor(SOLUTIONS[name](*case))] * 2)

    off.__name__ = twice.__name__ = name
    foreign = "Row r should be one of states" if name == "pick_states" else None
    assert complaint(off).startswith(foreign or "This is wrong. For ")
    assert complaint(twice).startswith(foreign or "The shape should be ")


ONE_CASE = ["entropy_of_each", "hide_again", "score_by_hand", "gradient_score", "two_step_target",
            "two_divergences", "jensen_shannon", "average_of_weights", "cost_of_one_step",
            "mean_over_completions", "contradiction",
            "opdlm_target", "pick_states", "target_and_truth"]


@pytest.mark.parametrize("name", sorted(SOLUTIONS.keys() - ONE_CASE))
def test_an_answer_that_is_right_in_the_first_case_only_is_refused(name):
    answers = []

    def remembered(*case):
        answers.append(SOLUTIONS[name](*case))
        return answers[0]

    remembered.__name__ = name
    assert complaint(remembered)
    assert len(answers) == 2


@pytest.mark.parametrize("name, answer, message", [
    ("set_weight", "1 / m", "This is wrong. For 4, 2 it should be 0.0833, but you return 0.5."),
    ("leftmost_of_each", "leftmost_of_each(hidden, k).long()", "a mask of True and False. For "),
    ("opdlm_target", "y", "The shape should be (1, 6, 3), not (1, 6). For "),
    ("target_and_truth", "[start, start]", " cannot be read as a tensor."),
])
def test_the_message_says_what_is_wrong(name, answer, message):
    assert message in complaint(function(name, answer))


def test_each_check_belongs_to_an_exercise():
    assert CHECKS.keys() == {f"check_{name}" for name in SOLUTIONS}
    assert len(CHECKS) == 34
