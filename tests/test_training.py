"""The training loop and evaluation against what they say they do, computed by hand."""
import sys
import types

import pytest
import torch
from torch.testing import assert_close

import dlm
import sample
import train_teacher
from exact import HiddenMarkov
from train_teacher import Tokenizer, Trainer

V = 5
L = 8


def random_model(b=1, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    c = dlm.Config(V, L, b, n_layer=2, n_head=2, n_embd=16, dropout=dropout)
    model = dlm.Transformer(c)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def batch_loss_of(model, scale=1.0):
    x = torch.randint(V, (4, L))
    return lambda: scale * dlm.loss(model, x, dlm.hide(x, model.b, V), dlm.one_hot(x, V))


# --- the training loop ------------------------------------------------------------------------------

def test_weights_are_averaged_as_computed_by_hand():
    model = random_model()
    trainer = Trainer(model, updates=30, lr=0.02)
    trainer.EMA = 0.5                                      # reached within these updates
    mean = {name: w.clone() for name, w in model.state_dict().items()}
    for n in range(12):
        trainer.update(batch_loss_of(model))
        decay = min(0.5, (1 + n) / (10 + n))
        for name, w in model.state_dict().items():
            mean[name] = decay * mean[name] + (1 - decay) * w
        for name, w in trainer.ema.items():
            assert_close(w, mean[name])


def test_what_is_saved_lies_on_no_device():
    """A checkpoint is read to the CPU: a sum that stayed on the accelerator could not go on."""
    model = random_model()
    trainer = Trainer(model, updates=9, lr=0.02)
    trainer.update(batch_loss_of(model))
    assert isinstance(trainer.state()["loss_sum"], float)


@pytest.mark.parametrize("updates", [20, 3000])
def test_the_rate_rises_stays_and_falls(updates):
    """A tenth of the updates up, at most 100; the last 60% down to nothing."""
    model = random_model()
    trainer = Trainer(model, updates, lr=0.02)
    warmup = min(100, updates / 10)
    for done in (0, 1, updates // 20, int(0.39 * updates), int(0.7 * updates), updates - 1):
        trainer.done = done
        trainer.update(batch_loss_of(model))
        share = min((done + 1) / warmup, 1, (updates - done) / (0.6 * updates))
        muon, adam = (o.param_groups[0]["lr"] for o in trainer.optimizers)
        assert muon == pytest.approx(0.02 * share)
        assert adam == pytest.approx(0.02 * 0.15 * share)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_gradients_are_clipped_to_length_1(monkeypatch, scale):
    model = random_model()
    trainer = Trainer(model, 10, lr=0.02)
    seen = []
    step = trainer.optimizers[0].step

    def watched():
        seen.append([p.grad.clone() for p in model.parameters()])
        step()

    trainer.optimizers[0].step = watched
    batch_loss = batch_loss_of(model, scale)
    with dlm.seeded(0):
        batch_loss().backward()
    length = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    model.zero_grad()
    with dlm.seeded(0):
        trainer.update(batch_loss)
    clipped = torch.cat([g.flatten() for g in seen[0]]).norm()
    assert clipped.item() == pytest.approx(min(1, length.item()), rel=1e-4)
    assert (length > 1) == (scale > 1)


# --- evaluation -------------------------------------------------------------------------------------

def test_dropout_is_off_in_evaluation_and_in_rollouts():
    model = random_model(4, dropout=0.5)
    x = torch.randint(V, (6, L))
    plain = random_model(4)                                # the same weights
    model.train()
    assert dlm.bound(model, x) == dlm.bound(plain, x)
    torch.manual_seed(0)
    written = dlm.rollout(model, x)
    torch.manual_seed(0)
    expected = dlm.rollout(plain.eval(), x)
    assert all(map(torch.equal, written, expected))
    assert model.training
    z = dlm.hide(x, 4, V)
    assert not torch.equal(model(x, z), plain(x, z))       # it would have been seen


def test_a_seed_decides_the_random_numbers_inside():
    def numbers(seed):
        with dlm.seeded(seed):
            return torch.rand(3).tolist()

    assert numbers(0) == numbers(0) != numbers(1)


def test_the_error_of_a_bound_is_the_standard_error():
    model = random_model().eval()
    x = torch.randint(V, (7, L))
    each = torch.tensor([dlm.bound(model, text[None].repeat(2, 1))[0] for text in x])
    mean, error = dlm.bound(model, x)
    assert mean == pytest.approx(each.mean().item(), rel=1e-5)
    assert error == pytest.approx(each.std().item() / 7 ** 0.5, rel=1e-4)


def test_the_gap_is_to_what_the_teacher_says_of_the_rollout(monkeypatch):
    """Not of the text it stands behind."""
    teacher = random_model(1).eval()
    student = random_model(4, seed=1).eval()
    x = torch.randint(V, (5, L))
    y = torch.randint(V, (5, L))
    z = dlm.hide(y, 4, V)
    monkeypatch.setattr(dlm, "rollout", lambda *_: (y, z))
    visited, _ = dlm.inference_gap(student, teacher, x)
    expected = dlm.loss(student, x, z, dlm.prefix(teacher, x, y, 4)).item()
    other = dlm.loss(student, x, z, dlm.prefix(teacher, x, x, 4)).item()
    assert visited == pytest.approx(expected) != pytest.approx(other)


def test_last_words_are_the_likeliest_not_drawn():
    """A source whose words are a three times of four, else b: greedily a is always found."""
    trans = torch.tensor([[0, 0, 1], [0, 0, 1], [0.75, 0.25, 0]])
    source = HiddenMarkov(torch.tensor([0, 0, 1.0]), trans, torch.eye(3), L)
    tokenizer = Tokenizer("char", "ab ")
    ends = [" a b a"[-2 * n:] for n in (1, 2, 3)] * 20
    assert sample.last_word_accuracy(source, ends, tokenizer) == 1


def test_top_p_stops_at_the_token_that_reaches_it():
    p = torch.tensor([0.5, 0.25, 0.25])
    assert_close(dlm.warp(p.log(), top_p=0.5), torch.tensor([1.0, 0, 0]))
    assert_close(dlm.warp(p.log(), top_p=0.75), torch.tensor([2 / 3, 1 / 3, 0]))


# --- the corpus -------------------------------------------------------------------------------------

@pytest.mark.parametrize("place", ["at the start", "at the end"])
def test_docs_leave_out_paragraphs_that_share_64_characters(monkeypatch, place):
    shared = "".join(chr(97 + i % 23) for i in range(64))
    own = ["First comes this paragraph", "Then another that is longer by some words"]
    texts = [shared + o if place == "at the start" else o + shared for o in own]
    nearly = [t.replace(shared, shared[:-1]) for t in texts]
    for these, kept in ((texts, 1), (nearly, 2)):
        topics = types.SimpleNamespace(topics={"a": these[0], "b": these[1]})
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", topics)
        assert len(train_teacher.docs()) == kept
