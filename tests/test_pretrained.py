"""Pre-trained models of five families, tiny and with random weights, held to the laws of our own.

The laws are the tests of test_math.py, run once more with another network in the place of ours.
"""
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import dlm
import test_math as laws
import train_teacher
from train_teacher import Pretrained, PretrainedConfig

pytest.importorskip("transformers")
V, L = laws.V, laws.L
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16,
         "intermediate_size": 24, "max_position_embeddings": 64, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": None}
FAMILIES = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, "bos_token_id": 0,
             "eos_token_id": 0},
    "llama": {**SHAPE, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2": {**SHAPE, "num_key_value_heads": 1},
    "qwen3": {**SHAPE, "num_key_value_heads": 1, "head_dim": 8},
    "gpt_neox": SHAPE}


def configuration(family, V):
    return {"model_type": family, "vocab_size": V, **FAMILIES[family]}


def random_weights(model, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model.double().eval()


def tiny(family, b, L=L, V=V, seed=0):
    return random_weights(Pretrained(PretrainedConfig(V, L, b, hf=configuration(family, V))), seed)


@pytest.fixture(params=FAMILIES)
def make(request, monkeypatch):
    """A family in the place of `random_model`."""
    def its_model(b, L=L, V=V, seed=0, dtype=torch.float64):
        return tiny(request.param, b, L, V, seed)

    monkeypatch.setattr(laws, "random_model", its_model)
    return its_model


def test_greedy_tokens_and_logits_are_those_of_transformers(make, request):
    model = make(1, L=12, V=9)
    family = request.node.callspec.params["make"]
    theirs = train_teacher.untrained(configuration(family, 9)).double().eval()
    weights = model.body.state_dict()
    embedding = next(name for name, w in weights.items() if len(w) == 10)
    weights[embedding] = weights[embedding][:9]                # without [MASK]
    theirs.base_model.load_state_dict(weights)
    if model.head:
        theirs.get_output_embeddings().load_state_dict(model.head.state_dict())
    x = torch.randint(9, (5, 12))
    start = x.new_full((5, 1), model.bos)
    logits = theirs(torch.cat([start, x[:, :-1]], 1)).logits
    assert_close(model(x, x), logits.log_softmax(-1), atol=1e-9, rtol=0)
    greedy = theirs.generate(start, attention_mask=torch.ones_like(start), do_sample=False,
                             max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert torch.equal(dlm.generate(model, 5, temperature=0), greedy[:, 1:])


def test_slots_and_attention(make):
    for b in (1, 2, 3, 4):
        laws.test_each_token_sees_exactly_what_it_may(b)
        laws.test_shorter_texts_than_the_context(b)
    laws.test_the_first_slot_of_a_block_holds_the_text_not_the_state(4)


def test_caches(make):
    for b in (1, 2, 3, 6):
        laws.test_several_blocks_decoded_at_once_equal_the_network(b)
    if not make(1).head:                    # tied to the embedding, so there is nothing to count at
        pytest.skip("the law counts rows of a head of its own")
    for b, L in [(1, 4), (2, 4), (3, 4), (4, 4), (8, 24), (24, 24)]:
        laws.test_cached_decoding_equals_uncached(b, L)


@pytest.mark.parametrize("b", [1, 2, 4])
def test_bound(make, b):
    laws.test_bound_three_ways(b)
    laws.test_loss_and_reported_bound_estimate_the_bound(b)


@pytest.mark.parametrize("b", [2, 4])
def test_concrete_scores_and_prefix(make, b):
    laws.test_exact_score_is_the_leave_one_out_conditional(make, b)
    laws.test_on_policy_target_is_the_prefix_conditional_of_the_rollout(make, b)


@pytest.mark.parametrize("b, N", [(1, 1), (2, 2), (4, 3)])
def test_ancestral_sampler(make, b, N):
    laws.test_ancestral_sampler_follows_its_law(b, N)


def test_rollouts(make):
    laws.test_blocks_at_once_are_blocks_one_by_one("spread")


def test_a_student_starts_as_its_teacher(make):
    """But for [MASK], whose row nobody reads in an AR model, and for what it sees on the right."""
    teacher = make(1, L=5)
    student = Pretrained(dataclasses.replace(teacher.c, b=4)).double().eval()
    student.load_state_dict(teacher.state_dict(), strict=False)
    x = torch.randint(V, (20, 5))
    z = dlm.hide(x, 4, V)
    assert_close(student(x, z)[:, 4], teacher(x, x)[:, 4])


def test_mask_begins_as_the_mean_of_the_embedding():
    model = Pretrained(PretrainedConfig(9, 8, 4, hf=configuration("llama", 9)))
    E = model.embedding.weight
    assert E.shape == (10, 16)
    assert_close(E[9], E[:9].mean(0))
    assert not model.own.weight.any()


def test_weights_are_counted_without_making_them():
    for family in FAMILIES:
        model = tiny(family, 4)
        count = sum(p.numel() for p in model.parameters())
        assert train_teacher.count_weights(model.c) == count


def test_the_small_models_need_none_of_it():
    code = "import sys, distill, sample, train_teacher; print('transformers' in sys.modules)"
    root = train_teacher.__file__.rsplit("/", 1)[0]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout == "False\n"
