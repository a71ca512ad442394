"""The three scripts as a user meets them: what they write, what survives a kill, and what they say
to bad input."""
import dataclasses
import errno
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tiktoken
import torch

import distill
import dlm
import sample
import train_teacher
from exact import HiddenMarkov

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train": train_teacher, "distill": distill, "sample": sample}
TEXT = "--data tiny.txt --tokenizer char"
SIZE = "--context 16 --n_layer 1 --n_head 2 --n_embd 16 --batch_size 8"
TRAIN = f"{TEXT} {SIZE}"
ONE = f"{TEXT} --method tcs --block 4"
SDTT = f"{TEXT} --method sdtt --batch_size 4"
OPDLM = f"{TEXT} --method opdlm --block 4 --batch_size 4"
AR = "runs/ar-tiny-char-s0"
JUDGE = "runs/ar-tiny-char-s1"
TCS = "runs/tcs-tiny-char-b4-s0"
MDLM = "runs/mdlm"
UNIX = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
SKIP_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")



def write_text(path, words, n=20_000):
    draw = random.Random(0)
    text = ""
    while len(text) < n:
        text += " ".join(draw.choices(words, k=draw.randint(3, 12))).capitalize() + ".\n"
    Path(path).write_text(text)


class Code:
    """A pickle that would run a command when loaded."""
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder as a user has it after an hour: texts, a teacher, a judge, a student, a denoiser.
    And things gone wrong."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(root)
        make_runs()
        make_broken_files()
    return root


def make_runs():
    words = "the of an object end statement value is not called with name expression"
    write_text("tiny.txt", words.split())
    write_text("other.txt", "12 345 6789 0".split())
    for argv in (f"{TEXT} --updates 10", f"{TEXT} --updates 10 --seed 1",
                 f"{TEXT} --updates 10 --objective mdlm --out {MDLM}",
                 f"{TEXT} --updates 2 --context 8 --out runs/short",
                 f"{TEXT} --updates 2 --n_embd 8 --out runs/thin",
                 "--data other.txt --tokenizer char --updates 2 --out runs/other"):
        train_teacher.main([*SIZE.split(), *argv.split()])
    distill.main(f"{ONE} --updates 10 --batch_size 8".split())
    for run in ("short", "thin", "other"):
        Path("runs", run, "loss.png").unlink()


def make_broken_files():
    ckpt = Path(AR, "checkpoint.pt").read_bytes()
    Path("empty").write_bytes(b"")
    Path("binary").write_bytes(bytes(range(256)) * 99)
    Path("few").write_bytes(b"a few words\n")
    Path("cut").write_bytes(ckpt[:-1000])
    Path("half").write_bytes(ckpt[:len(ckpt) // 2])
    Path("noise").write_bytes(random.Random(0).randbytes(5000))
    Path("folder").mkdir()
    torch.save({"model": {}}, "dict")
    torch.save([1], "list")
    torch.save(torch.ones(3), "tensor")
    torch.save(Code(), "code")
    model, tokenizer, _ = train_teacher.load(AR, "")
    train_teacher.save("bare", model, tokenizer, {})


@pytest.fixture
def home(world, tmp_path, monkeypatch):
    """One's own copy of it, to break."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    monkeypatch.chdir(ROOT)
    shutil.rmtree(tmp_path)  # or pytest keeps a few hundred


@pytest.fixture
def call(home, capsys):
    """call("train", "--updates 3 ...", "one more argument") -> exit code, stdout, stderr."""
    def call(script, argv="", *more):
        capsys.readouterr()
        code = 0
        try:
            train_teacher.run_script(SCRIPTS[script].main, [*argv.split(), *more])
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def refused(call, home):
    """The same for what must be refused: exit code 2, one line, and every file as it was.
    -> the line."""
    def refused(script, argv="", *more):
        before = files(home)
        code, _, err = call(script, argv, *more)
        assert code == 2 and re.fullmatch(r"error: [^\n]+\n", err), err
        assert before.items() <= files(home).items()
        return err
    return refused


def files(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def metrics(folder):
    return json.loads(Path(folder, "metrics.json").read_text(), parse_constant=pytest.fail)


def end(folder):
    """All that a run left behind, without times and names: to be compared."""
    ckpt = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
    trainer = ckpt["trainer"]
    trainer["history"] = [[done, loss, val] for done, _, loss, val in trainer["history"]]
    del trainer["seconds"]
    for name in ("out", "resume", "device"):
        del ckpt["options"][name]
    return ckpt


def updates_done(folder):
    return end(folder)["trainer"]["done"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def texts(out):
    """The texts in what sample.py printed; each ends with the newline of its print."""
    return [t[:-1] for t in re.split(r"--- \d+\n", out)[1:]]


def no_pictures(monkeypatch):
    """For tests that train much: drawing takes longer than their training."""
    monkeypatch.setattr(train_teacher, "save_figure", lambda fig, path: None)


def no_training(monkeypatch):
    """For what must be refused before the first update."""
    monkeypatch.setattr(train_teacher.Trainer, "fit",
                        lambda *_: pytest.fail("trained before it looked"))


def stop_at_7(monkeypatch):
    """Ctrl-C in a training, before its eighth update."""
    update = train_teacher.Trainer.update

    def stopping(trainer, batch_loss):
        if trainer.done == 7:
            raise KeyboardInterrupt
        return update(trainer, batch_loss)

    monkeypatch.setattr(train_teacher.Trainer, "update", stopping)


def start(script, argv, **how):
    return subprocess.Popen([sys.executable, str(ROOT / script), *argv.split()], text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


# --- what a run leaves ----------------------------------------------------------------------------

def test_from_nothing_to_samples_in_a_shell(tmp_path, world):
    shutil.copy(world / "tiny.txt", tmp_path)
    shutil.copytree(world / JUDGE, tmp_path / JUDGE)

    def shell(script, argv):
        p = start(script, argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = p.communicate(timeout=120)
        return p.returncode, out, err

    code, out, err = shell("train_teacher.py", f"{TRAIN} --updates 10")
    assert (code, err) == (0, "") and f"python sample.py --checkpoint {AR}" in out
    code, out, err = shell("distill.py", f"{ONE} --updates 10 --batch_size 8")
    assert (code, err) == (0, "") and f"python sample.py --checkpoint {TCS}" in out
    code, out, err = shell("sample.py", "--number 2")
    assert code == 0 and err.startswith(TCS) and len(texts(out)) == 2
    assert shell("sample.py", "--number 0") == (2, "", "error: --number 0: must be 1 or more\n")
    for run in (AR, TCS):
        assert same(end(tmp_path / run), end(world / run))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_every_option_with_its_default(call, script):
    code, out, err = call(script, "--help")
    assert (code, err) == (0, "")
    for f in dataclasses.fields(SCRIPTS[script].Options):
        assert re.search(rf"^  --{f.name}\b", out, re.MULTILINE)
        assert f"(default: {f.default})" in " ".join(out.split())


@pytest.mark.parametrize("run, block", [(AR, 1), (TCS, 4), (MDLM, 16)])
def test_metrics(world, monkeypatch, run, block):
    monkeypatch.chdir(world)
    m = metrics(run)
    model, tokenizer, ckpt = train_teacher.load(run, "")
    corpus = train_teacher.load_corpus("tiny.txt", tokenizer, model.L)
    assert m["options"] == ckpt["options"] and m["block"] == model.b == block
    assert m["corpus"] == {"name": "tiny.txt", "sha256": corpus.sha256, "chars_per_token": 1}
    assert {"python", "torch", "threads", "machine"} <= m["versions"].keys() and m["device"]
    assert m["parameters"] == sum(p.numel() for p in model.parameters())
    assert m["train_tokens"] == 10 * 8 * 16 and m["train_seconds"] > 0
    assert [line[0] for line in m["history"]] == list(range(1, 11))
    assert m["test_nats_per_char"] == m["test_nats_per_token"] < torch.tensor(tokenizer.V).log()
    assert 0 < m["test_se"] < 1


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
def test_the_weights_in_a_checkpoint_are_those_that_were_measured(world, monkeypatch, run):
    monkeypatch.chdir(world)
    m = metrics(run)
    model, tokenizer, ckpt = train_teacher.load(run, "")
    parts = train_teacher.load_corpus("tiny.txt", tokenizer, model.L).parts
    held_out = train_teacher.consecutive(parts["test"], model.L)
    repeats = 1 if run == AR else train_teacher.TEST_REPEATS
    test = dlm.bound(model, held_out, repeats, neighbours=train_teacher.CHUNK // model.L)
    assert test == pytest.approx((m["test_nats_per_token"], m["test_se"]), rel=1e-5)
    least = min(line[3] for line in ckpt["trainer"]["history"])
    if run == TCS:
        o = distill.Options(**ckpt["options"])
        teacher = train_teacher.load(AR, "")[0]
        corpus = train_teacher.load_corpus("tiny.txt", tokenizer, model.L)
        validate = distill.Distillation(o, teacher, model, corpus).validate
        assert validate(model) == pytest.approx(least, rel=1e-5)
    else:
        best = dlm.bound(model, train_teacher.consecutive(parts["val"], model.L, 256))[0]
        assert best == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("run", ["runs/short", "runs/other"])
def test_numbers_of_a_short_text_are_finite(world, run):
    """Its test part may be one chunk: too few to say how much chunks differ."""
    m = metrics(world / run)
    assert 0 < m["test_se"] < 1


def test_table_of_a_student(world):
    m = metrics(world / TCS)
    held_out, teacher, *student = m["table"]
    assert held_out["what"] == "held-out text" and held_out["copied"] > 0.9
    assert teacher["what"] == "AR teacher" and teacher["calls"] == 16
    in_steps = [(r["order"], r["steps"], r["calls"]) for r in student if "steps" in r]
    assert in_steps == [("left", 1, 4), ("left", 2, 8), ("left", 4, 16)]
    assert sum("threshold" in r and 4 <= r["calls"] <= 16 for r in student) == 2
    for r in m["table"]:
        assert r["judge_nll"] > 0 and 0 < r["entropy"] < r["bigram_entropy"]
        assert 0 <= r["copied"] <= 1
    assert m["teacher"] == AR
    assert (m["options"]["states"], m["options"]["target"]) == ("data", "topk")
    for r in (teacher, *student):
        assert [len(t) for t in r["samples"]] == [16] * 4
        assert 0 <= r["last_word"] <= 1


def test_stories_are_marked_and_need_no_judge(call):
    teacher = f"--data stories --tokenizer char {SIZE} --context 160 --updates 2"
    assert call("train", teacher)[0] == 0
    student = "--data stories --tokenizer char --method prefix --block 4 --batch_size 2 --updates 2"
    assert call("distill", student)[0] == 0
    assert not Path("runs/ar-stories-char-s1").exists()
    held_out, *written = metrics("runs/prefix-stories-char-b4-s0")["table"]
    assert held_out["right"] == held_out["distinct"] == 1
    assert held_out["stories"] > 100 and held_out["known"] == 0
    assert all(r["right"] == 0 and "judge_nll" not in r for r in written)
    code, out, err = call("sample", "--bench runs/ar-stories-char-s0 --texts 8")
    assert code == 0 and "right" in out


@pytest.mark.parametrize("picture", [f"{AR}/loss.png", f"{MDLM}/loss.png", f"{TCS}/loss.png",
                                     f"{TCS}/quality.png"])
def test_figures_are_pictures(world, picture):
    data = (world / picture).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    assert len(data) > 5000


def test_a_run_is_these_four_files(world):
    names = {p.name for p in (world / TCS).iterdir()}
    assert names == {"checkpoint.pt", "metrics.json", "loss.png", "quality.png"}


def test_seed_decides_the_weights(world, call):
    for seed in (0, 1):
        assert call("train", f"{TRAIN} --updates 10 --seed {seed} --out again{seed}")[0] == 0
    assert same(end("again0"), end(world / AR))
    assert not same(end("again1")["weights"], end("again0")["weights"])


@pytest.mark.parametrize("argv", [
    "--method plain", "--method sequence", "--method prefix --divergence reverse",
    "--method tcs --divergence tvd", "--states teacher --target grad",
    "--target exact --fraction 0.5 --texts 99", "--target grad+topk --divergence mse",
    "--method opdlm", "--method opdlm --block 16 --order confidence",
    "--method opdlm --block 0 --steps 2", "--states rollout --target prefix --divergence tvd",
    "--block 5", "--block 16", "--block 0 --student random", f"--block 0 --student {MDLM}",
    f"--student {TCS}/checkpoint.pt", f"--teacher {AR}/checkpoint.pt",
    "--student runs/thin-mdlm"])
def test_every_kind_of_student_trains_and_writes(call, monkeypatch, argv):
    no_pictures(monkeypatch)
    if "thin" in argv:
        thin = f"{TRAIN} --n_embd 8 --objective mdlm --updates 2 --out runs/thin-mdlm"
        assert call("train", thin)[0] == 0
    code, _, err = call("distill", f"{ONE} --updates 2 --batch_size 4 --texts 64 --out run {argv}")
    assert (code, err) == (0, "")
    m = metrics("run")
    assert torch.tensor([r["judge_nll"] for r in m["table"]]).isfinite().all()
    if "--block 5" in argv:
        assert "gap" not in m                     # rollouts need blocks that divide the context
    else:
        assert len(m["gap"]) == 2 and torch.tensor(m["gap"]).isfinite().all()
    code, out, _ = call("sample", "--checkpoint run --number 3")
    assert code == 0 and [len(t) for t in texts(out)] == [16] * 3


@pytest.mark.parametrize("argv", ["", "--divergence reverse", "--divergence mse"])
def test_sdtt_goes_round_by_round(call, monkeypatch, argv):
    no_pictures(monkeypatch)
    argv = f"{SDTT} --student {TCS} --updates 2 --out few {argv}"
    code, out, err = call("distill", argv)
    assert (code, err) == (0, "")
    assert "4 steps a block become 2" in out and "2 steps a block become 1" in out
    for N, student in ((2, TCS), (1, "few-2steps")):
        m = metrics(f"few-{N}steps")
        o = m["options"]
        assert (o["steps"], o["fewest"], o["student"]) == (2 * N, N, student)
        assert torch.tensor([line[3] for line in m["history"]]).isfinite().all()
    before = files("few-2steps"), files("few-1steps")
    assert call("distill", argv)[0] == 0
    assert (files("few-2steps"), files("few-1steps")) == before             # done is done


def test_all_methods_ask_the_teacher_at_hand_for_its_context(refused, monkeypatch):
    """It is 16 here, not the default. What does not divide it is refused before any training."""
    monkeypatch.setattr(train_teacher.Trainer, "fit", lambda *_: pytest.fail("trained first"))
    for block in (6, 32):
        assert "context of 16" in refused("distill", f"{TEXT} --block {block}")


def test_a_finished_run_is_kept_however_its_folder_is_written(call, monkeypatch):
    no_pictures(monkeypatch)
    argv = f"{TEXT} --method sdtt --student {TCS} --updates 2 --batch_size 4 --out"
    assert call("distill", f"{argv} ./few")[0] == 0
    before = files("few-1steps")
    code, out, _ = call("distill", f"{argv} few")
    assert code == 0
    assert out.count("finished before") == 2
    assert files("few-1steps") == before


def test_sdtt_goes_on_where_it_was_interrupted(call, monkeypatch):
    no_pictures(monkeypatch)
    argv = f"{SDTT} --student {TCS} --updates 20 --out"
    assert call("distill", f"{argv} whole")[0] == 0
    seen = interrupt_at(monkeypatch, 26)
    assert call("distill", f"{argv} cut")[0] == 130
    assert not Path("cut-1steps/metrics.json").exists()
    assert call("distill", f"{argv} cut")[0] == 0 and len(seen) == 40
    for N in (2, 1):
        assert same(end(f"cut-{N}steps")["weights"], end(f"whole-{N}steps")["weights"])


@pytest.mark.parametrize("argv, named", [
    ("--student ar", "--student"), (f"--student {AR}", "--student"),
    ("--student runs/other", "--student"), (f"--student {TCS} --fewest 4", "--steps"),
    (f"--student {TCS} --steps 2 --fewest 2", "--steps"),
    (f"--student {TCS} --k 8", "--steps"), (f"--student {TCS} --k 1", "--k"),
    (f"--target onehot --student {TCS}", "--states on_the_way --target"),
    (f"--student {TCS} --states data", "--states"),
    (f"--student {TCS} --states teacher", "--states"),
    (f"--student {TCS} --states rollout", "--states")])
def test_sdtt_refuses(refused, argv, named):
    assert refused("distill", f"{SDTT} {argv}").startswith(f"error: {named} ")


def test_sdtt_says_what_it_does_with_other_numbers(call, monkeypatch):
    """Three steps are no multiple of two: it begins with two."""
    no_pictures(monkeypatch)
    out = call("distill", f"{SDTT} --student {TCS} --steps 3 --updates 1 --out few")[1]
    assert "2 steps a block become 1" in out and metrics("few-1steps")["options"]["steps"] == 2


def test_a_student_of_blocks_of_one_is_the_ar_model_trained_on(call, monkeypatch):
    """The control of a student: it begins as the teacher, and what comes of it can teach."""
    no_pictures(monkeypatch)
    one = f"{TEXT} --method plain --block 1"
    assert call("distill", f"{one} --updates 1 --lr 1e-12 --out same")[0] == 0
    metrics_of_teacher, metrics_of_student = metrics(AR), metrics("same")
    assert metrics_of_student["block"] == 1 and metrics_of_student["parameters"] == \
        metrics_of_teacher["parameters"]
    assert metrics_of_student["test_nats_per_token"] == pytest.approx(
        metrics_of_teacher["test_nats_per_token"], abs=1e-4)
    assert call("distill", f"{one} --updates 40 --lr 0.002 --out better")[0] == 0
    assert metrics("better")["history"][-1][2] < metrics("better")["history"][0][2]
    assert call("distill", f"{TEXT} --method plain --block 4 --updates 1 --teacher better "
                "--out student")[0] == 0


@pytest.mark.parametrize("argv, named", [
    ("--fewest 4", "--steps"), ("--k 8", "--steps"), ("--steps 1", "--steps"),
    ("--divergence reverse", "--divergence")])
def test_all_methods_refuse_before_a_teacher_is_trained(refused, argv, named):
    message = refused("distill", f"--data other.txt --tokenizer char {argv}")
    assert message.startswith(f"error: {named} ")
    assert not Path("runs/ar-other-char-s0").exists()


def test_all_methods_in_one_command(call, home):
    argv = f"{TEXT} --updates 20 --batch_size 4 --texts 64"
    base = "runs/all-tiny-char-b4-s0"
    code, out, err = call("distill", argv)
    assert (code, err) == (0, "") and "of them all" in out
    for part, *expected in (("tcs", 12, 0.002, "ar"), ("opdlm", 6, 0.002, "ar"),
                            ("sdtt-2steps", 2, 0.002, f"{base}-tcs")):
        o = metrics(f"{base}-{part}")["options"]
        assert [o["updates"], o["lr"], o["student"]] == expected
    table = nll_of_rows(base)
    student = train_teacher.load(f"{base}-tcs", "")[0]
    assert list(table) == ["held-out text", "AR teacher",
                           *(f"{who}, {way}" for who in ("untrained", "TCS", "SDTT", "OPDLM")
                             for way in sample.ways_to_write(student, "left"))]
    assert "TCS, order left steps 2" in table and "OPDLM, order left threshold 0.99" in table
    own = nll_of_rows(f"{base}-sdtt-2steps")
    assert table["SDTT, order left steps 2"] == own["student, order left steps 2"]

    before = files(home)
    code, out, _ = call("distill", argv)
    assert code == 0 and out.count("finished before") == 3 and files(home) == before
    for other in ("--updates 40", "--order left", "--lr 0.1"):  # would mix settings in one table
        code, out, err = call("distill", f"{argv} {other}")
        assert code == 2 and f"--out {base}-tcs" in err and files(home) == before
    assert call("distill", f"{OPDLM} --updates 1")[0] == 0      # has a folder of its own


def nll_of_rows(folder):
    return {r["what"]: r["judge_nll"] for r in metrics(folder)["table"]}


def test_block_need_not_divide_the_context_from_scratch(call):
    assert call("train", f"{TRAIN} --objective mdlm --block 5 --updates 2 --out run")[0] == 0
    assert metrics("run")["block"] == 5


def test_what_is_missing_is_trained_first(home, call, monkeypatch):
    shutil.move("runs", "kept")
    asked = []

    def train(o, ckpt=None):
        asked.append((o.objective, o.data, o.tokenizer, o.seed))
        folder = Path(f"runs/ar-tiny-char-s{o.seed}")
        shutil.copytree(Path("kept") / folder.name, folder)
        return folder

    monkeypatch.setattr(train_teacher, "train", train)
    assert call("distill", f"{ONE} --updates 2")[0] == 0
    assert sorted(asked) == [("ar", "tiny.txt", "char", 0), ("ar", "tiny.txt", "char", 1)]
    assert Path(TCS, "metrics.json").exists()


def test_output_that_cannot_show_every_character(call, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # a redirected stdout on Windows
    monkeypatch.setattr(sys, "stdout", narrow)
    assert call("distill", f"{ONE} --updates 2 --out run")[0] == 0


@pytest.mark.parametrize("path", sorted((ROOT / "assets").glob("*.pt")), ids=lambda path: path.name)
def test_shipped_checkpoints_are_read(path):
    model, tokenizer, ckpt = train_teacher.load(path, "")
    assert tokenizer.V == model.V and not model.training
    assert train_teacher.options_of(ckpt).updates >= 500


# --- sample.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize("run", [AR, TCS, MDLM])
def test_same_seed_same_texts(call, run):
    def written(seed):
        return texts(call("sample", f"--checkpoint {run} --seed {seed}")[1])

    assert written(0) == written(0) != written(1)
    assert len(set(written(0))) == len(written(0)) == 4


def test_pictures_leave_out_what_cannot_be_drawn(home):
    sample.draw_gif([[(c, "old") for c in "a\rb\x00"]], "text.gif")
    assert Path("text.gif").read_bytes().startswith(b"GIF")


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
@pytest.mark.parametrize("prompt", ["T", "The value ", "The value is ca", "The\nof", "___ of"])
def test_prompt_stands_verbatim(call, run, prompt):
    code, out, _ = call("sample", f"--checkpoint {run} --number 5 --prompt", prompt)
    pattern = re.sub("_{3,}", lambda gap: f".{{{len(gap[0])}}}", prompt)
    assert code == 0 and len(texts(out)) == 5
    assert all(re.match(pattern, t, re.DOTALL) for t in texts(out))


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
@pytest.mark.parametrize("prompt", ["The ____ of", "___", "T____e", "____ end", "The ___ is ___ e",
                                    "________________"])
def test_gaps_are_filled_and_the_rest_is_kept(call, run, prompt):
    code, out, _ = call("sample", f"--checkpoint {run} --number 5 --prompt", prompt)
    pattern = re.sub("_+", lambda gap: f"[^_]{{{len(gap[0])}}}", prompt)
    assert code == 0 and len(texts(out)) == 5
    assert all(re.fullmatch(pattern, t) for t in texts(out))


@pytest.mark.parametrize("run, prompt, noted", [
    (AR, "The ___ of", True), (TCS, "The ______ of", True), (TCS, "T___", False),
    (MDLM, "The ___ of", False), (AR, "The ", False)])
def test_a_note_where_the_right_side_is_not_seen(call, run, prompt, noted):
    assert ("note:" in call("sample", f"--checkpoint {run} --prompt", prompt)[2]) == noted


def test_unseen_tokens_are_noticed():
    def blocks_of(b):
        return dlm.Transformer(dlm.Config(V=3, L=4, b=b, n_layer=1, n_head=2, n_embd=16))

    mask = 3
    gap = torch.tensor([0, mask, 1, mask])
    assert sample.unseen(gap, blocks_of(2))
    assert sample.unseen(gap, blocks_of(1))
    assert not sample.unseen(gap, blocks_of(4))
    prompt = torch.tensor([0, mask, mask, mask])
    assert not sample.unseen(prompt, blocks_of(1))


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
@pytest.mark.parametrize("argv, length", [
    ("", 16), ("--length 5", 5), ("--length 1", 1), ("--length 9 --prompt The", 9),
    ("--length 9 --prompt T___", 9), ("--length 17", 17), ("--length 50 --prompt The", 50),
    ("--steps 1", 16), ("--steps 50", 16), ("--order confidence", 16), ("--order random", 16),
    ("--order ancestral --temperature 0.5", 16), ("--order left --steps 2", 16),
    ("--order confidence --top_k 2", 16), ("--threshold 0.1", 16),
    ("--threshold 0.5 --order random", 16), ("--threshold 0.5 --top_p 0.5", 16)])
def test_number_and_length(call, run, argv, length):
    code, out, _ = call("sample", f"--checkpoint {run} {argv}")
    assert code == 0 and [len(t) for t in texts(out)] == [length] * 4
    out = call("sample", f"--checkpoint {run} --number 1 {argv}")[1]
    assert [len(t) for t in texts(out)] == [length]


@pytest.mark.parametrize("run", [AR, TCS])
def test_temperature_0_leaves_nothing_to_chance(call, run):
    argv = f"--checkpoint {run} --temperature 0 --order left --seed"
    written = texts(call("sample", f"{argv} 0")[1]) + texts(call("sample", f"{argv} 1")[1])
    assert len(written) == 8 and len(set(written)) == 1


@pytest.mark.parametrize("run", [AR, TCS])
def test_a_tiny_temperature_is_temperature_0(call, run):
    argv = f"--checkpoint {run} --order confidence --temperature"
    assert texts(call("sample", f"{argv} 0")[1]) == texts(call("sample", f"{argv} 1e-6")[1])


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
def test_stop_ends_each_text_before_it(call, run):
    argv = f"--checkpoint {run} --number 8 --length 40 --prompt The"
    whole = texts(call("sample", argv)[1])
    stopped = texts(call("sample", f"{argv} --stop e")[1])
    places = [t.find("e", len("The")) for t in whole]
    assert stopped == [t if at < 0 else t[:at] for t, at in zip(whole, places)]
    assert stopped != whole


def test_stop_ends_early(call, monkeypatch):
    calls = []
    run = dlm.Transformer.run
    monkeypatch.setattr(dlm.Transformer, "run", lambda *a, **how: calls.append(1) or run(*a, **how))
    argv = f"--checkpoint {AR} --number 1 --length 200 --prompt The"
    whole = texts(call("sample", argv)[1])[0]
    stop = whole[20]
    before = len(calls)
    stopped = texts(call("sample", f"{argv} --stop", stop)[1])
    assert stopped == [whole[:whole.index(stop, 3)]]
    assert len(calls) - before < 20 < before


class Letters:
    """A tokenizer of the letters a, b, c .."""
    def decode(self, ids):
        return "".join("abcdefgh"[i] for i in ids)


@pytest.mark.parametrize("stop, shown", [("", "abc░d"), ("a", "abc░d"), ("b", "a"), ("c", "ab"),
                                         ("d", "abc░d")])
def test_a_text_is_cut_where_stop_is_written(stop, shown):
    """The stop does not count in the prompt `a`, nor behind what is hidden."""
    mask = 8
    given = [True, False, False, False, False]
    whole = sample.cells([0, 1, 2, mask, 3], [0, 1, mask, mask, mask], given, Letters(), mask)
    text = sample.cut(whole, stop)
    assert "".join(c for c, _ in text) == shown
    kinds = ["given", "old", "new", "hidden", "new"]
    assert [kind for _, kind in text] == kinds[:len(text)]


def plain(picture):
    return re.sub(r"\033\[[\d;]*m", "", picture)


@pytest.mark.parametrize("no_color", [False, True])
def test_watch_shows_every_state_in_place(call, monkeypatch, no_color):
    monkeypatch.setattr(sample.time, "sleep", lambda s: None)
    argv = f"--checkpoint {TCS} --number 1 --prompt The"
    quiet = texts(call("sample", argv)[1])[0]
    assert call("sample", f"{argv} --watch")[1].count("---") == 1          # a pipe: no animation
    on_a_terminal(monkeypatch, no_color)
    out = call("sample", f"{argv} --watch")[1]
    pictures = re.split(r"\033\[\d+A\033\[J", out)
    assert len(pictures) == 16 - 3 + 1                # a token a step, and the finished text
    shown = [plain(picture).split("\n", 1)[1].rstrip("\n") for picture in pictures]
    assert [text.count(sample.HIDDEN) for text in shown] == [*range(12, -1, -1), 0]
    assert shown[-1] == quiet
    assert ("\033[1;32m" in out and "\033[2m" in out) != no_color


@pytest.mark.parametrize("no_color", [False, True])
def test_given_tokens_stand_out_on_a_terminal(call, monkeypatch, no_color):
    on_a_terminal(monkeypatch, no_color)
    out = call("sample", "--prompt", "The ___ of")[1]
    coloured = re.findall(r"\033\[36m(.)\033\[0m", out)
    assert "".join(coloured) == ("" if no_color else "The  of" * 4)


def on_a_terminal(monkeypatch, no_color):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")


def test_wrapping():
    text = [(c, "old") for c in "ab\ncdefg"]
    lines = sample.wrap(text, 3)
    assert ["".join(c for c, _ in line) for line in lines] == ["ab", "cde", "fg"]


def test_gif_is_a_moving_picture(call):
    from PIL import Image
    assert call("sample", f"--checkpoint {TCS} --number 2 --prompt The --gif a.gif")[0] == 0
    picture = Image.open("a.gif")
    assert picture.format == "GIF" and picture.n_frames == 16 - 3 + 1


def test_gif_that_cannot_be_written(call):
    code, out, err = call("sample", "--gif tiny.txt/a.gif")
    assert code == 2 and err.splitlines()[-1].startswith("error: --gif: cannot write")
    assert len(texts(out)) == 4


def test_writing_needs_no_matplotlib():
    program = "import sys, sample; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def rows_of_bench(call, argv):
    """-> the rows in bench.json and what was printed."""
    code, out, err = call("sample", f"--judge {JUDGE} --texts 8 --out bench {argv}")
    assert (code, err) == (0, "")
    return json.loads(Path("bench/bench.json").read_text())["rows"], out


def test_bench_compares_models_orders_and_steps(call):
    (held_out, ar, *rows), out = rows_of_bench(call, f"--bench {AR},{TCS}")
    assert held_out["what"] == "held-out text"
    assert ar["what"] == Path(AR).name and ar["calls"] == 16
    assert len(rows) == len(dlm.ORDERS) * 3 + 2                 # 1, 2 and 4 steps; two thresholds
    assert len(out.strip().splitlines()) == 1 + 2 + len(rows)
    for r in rows:
        assert 0 < r["distinct_2"] <= 1 and 0 <= r["copied"] <= 1 and 0 <= r["last_word"] <= 1
        for seconds in (r["seconds_1"], r["seconds_32"]):
            assert len(seconds) == 3 and seconds == sorted(seconds)
        if "steps" in r and r["order"] != "ancestral":
            assert r["calls"] == 4 * r["steps"]
        else:
            assert 4 <= r["calls"] <= 16


@pytest.mark.parametrize("narrower, ways", [
    ("--steps 2 --order left", [("left", 2, None)]), ("--threshold 0.8", [("left", 0, 0.8)]),
    ("--steps 2 --order spread", [("spread", 2, None)]),
    ("--threshold 0.8 --order confidence --steps 2", [("confidence", 2, 0.8)])])
def test_bench_narrowed(call, narrower, ways):
    (_, ar, *rows), _ = rows_of_bench(call, f"--bench {AR},{TCS} {narrower}")
    assert "order" not in ar
    assert [(r["order"], r.get("steps"), r.get("threshold")) for r in rows] == ways


def test_what_text_costs_is_said_where_it_is_known_exactly(call):
    """By the AR model, and by students from the left; fewer steps leave more to chance."""
    (held_out, ar, *rows), _ = rows_of_bench(call, f"--bench {AR},{TCS}")
    assert "nll" not in held_out
    assert ar["nll"] == pytest.approx(metrics(AR)["test_nats_per_token"], abs=0.2)
    known = {r["steps"]: r["nll"] for r in rows if "nll" in r}
    assert [r["order"] for r in rows if "nll" in r] == ["left"] * 3 and known[4] < known[1]
    assert not any("nll" in r for r in rows_of_bench(call, f"--bench {AR} --temperature 0.9")[0])


def test_bench_draws_as_it_is_told(call):
    (_, ar), _ = rows_of_bench(call, f"--bench {AR} --top_k 1")
    assert ar["distinct_2"] <= 1 / 8                                # eight times one text


def test_a_text_without_words_has_no_last_ones(home):
    Path("dots.txt").write_text("... !? ... --\n" * 2000)
    corpus = train_teacher.load_corpus("dots.txt", "char", 16)
    model = dlm.Transformer(dlm.Config(corpus.tokenizer.V, 16, 4, 1, 2, 16))
    assert sample.passages(corpus) == []
    assert sample.last_word_accuracy(model, [], corpus.tokenizer) == 0


@pytest.mark.parametrize("argv, named", [
    (f"--bench {TCS}", "--judge"), (f"--bench {TCS} --judge {TCS}", "--judge"),
    (f"--bench runs/other --judge {JUDGE}", "--bench runs/other"),
    (f"--bench {AR},nowhere --judge {JUDGE}", "--bench nowhere")])
def test_bench_refuses(refused, argv, named):
    assert named in refused("sample", argv)


def test_correct_rewrites_what_is_unlikely(call, refused):
    text = "The valxe is"
    code, out, _ = call("sample", f"--checkpoint {MDLM} --doubt 0.01 --correct", text)
    assert code == 0 and "->" in out and len(out.splitlines()[-1]) == len(text)
    assert call("sample", f"--checkpoint {MDLM} --doubt 99 --correct", text)[1] == text + "\n"
    assert "--correct" in refused("sample", f"--checkpoint {AR} --correct The")
    assert "--correct" in refused("sample", f"--checkpoint {MDLM} --correct T")
    assert "--correct" in refused("sample", f"--checkpoint {MDLM} --correct", "The" * 6)


def test_correct_finds_a_planted_error():
    """A row repeats its first letter, so one wrong letter is doubted without end, and mended."""
    keep = torch.eye(5)
    emit = 0.99 * torch.eye(5) + 0.002 * torch.ones(5, 5)
    source = HiddenMarkov(torch.ones(5) / 5, keep, emit, 8, b=8)
    x = torch.full((8,), 3)
    assert list(sample.correct(source, x)) == []
    wrong = x.clone()
    wrong[2] = 1
    wrong[6] = 4
    found = list(sample.correct(source, wrong))
    assert sorted(i for i, _, _ in found) == [2, 6]
    assert torch.equal(found[-1][2], x)
    assert wrong[2] == 1 and wrong[6] == 4                          # the caller's text stays
    z = wrong.clone()
    z[2] = 5
    p = source(wrong[None], z[None])[0, 2]
    excess = {i: excess for i, excess, _ in found}[2]
    assert excess == pytest.approx(float(p.max() - p[1]), rel=0.5)  # 6 may have been mended first


def test_correct_ends():
    torch.manual_seed(0)
    model = dlm.Transformer(dlm.Config(V=3, L=4, b=4, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    tried = [i for i, _, _ in sample.correct(model, torch.tensor([0, 1, 2, 0]), doubt=0)]
    assert 0 < len(set(tried)) == len(tried)


def test_newest_run_is_the_default(call):
    os.utime(Path(MDLM, "checkpoint.pt"), (2e9, 2e9))
    assert call("sample")[2].startswith(MDLM)


def test_shipped_model_is_taken_where_there_are_no_runs(call, monkeypatch):
    monkeypatch.setattr(sample, "SHIPPED", Path(shutil.move(AR, "shipped"), "checkpoint.pt"))
    shutil.rmtree("runs")
    assert call("sample")[2].startswith("shipped")


# --- interrupted and resumed ----------------------------------------------------------------------

LONG = {"train": f"{TRAIN} --updates 200", "distill": f"{ONE} --updates 60 --texts 64"}
FILE = {"train": "train_teacher.py", "distill": "distill.py"}


def run_until_saved(script, argv, path):
    """Starts it and returns at the first checkpoint it writes, or at its end."""
    def written():
        return path.stat().st_mtime_ns if path.exists() else None

    before = written()
    p = start(FILE[script], argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while p.poll() is None and written() in (None, before):
        time.sleep(0.002)
    return p


@UNIX
@pytest.mark.parametrize("script", ["train", "distill"])
def test_kills_change_nothing(call, script):
    assert call(script, f"{LONG[script]} --out whole")[0] == 0
    draw = random.Random(0)
    argv = f"{LONG[script]} --out killed"
    killed = 0
    for _ in range(3):
        p = run_until_saved(script, argv, Path("killed/checkpoint.pt"))
        time.sleep(draw.uniform(0, 0.05))
        p.kill()
        p.communicate()
        killed += p.returncode == -signal.SIGKILL
        argv = "--resume killed"
    assert killed
    assert call(script, argv)[0] == 0
    assert same(end("killed"), end("whole"))
    assert metrics("killed")["test_nats_per_token"] == metrics("whole")["test_nats_per_token"]


@UNIX
def test_ctrl_c_saves_and_says_so(call):
    argv = f"{TRAIN} --updates 300 --out"
    p = run_until_saved("train", f"{argv} stopped", Path("stopped/checkpoint.pt"))
    p.send_signal(signal.SIGINT)
    assert p.communicate(timeout=60)[1] == "interrupted\n" and p.returncode == 130
    assert 30 <= updates_done("stopped") < 300
    assert call("train", f"{argv} whole")[0] == call("train", "--resume stopped")[0] == 0
    assert same(end("stopped"), end("whole"))


def interrupt_at(monkeypatch, *numbers):
    """Ctrl-C during these of the updates to come, counted from 0 -> a list with a place for each
    update so far."""
    update = train_teacher.Trainer.update
    seen = []

    def interrupted(self, batch_loss):
        if len(seen) in numbers:
            signal.raise_signal(signal.SIGINT)
        seen.append(self.done)
        return update(self, batch_loss)

    monkeypatch.setattr(train_teacher.Trainer, "update", interrupted)
    return seen


@pytest.mark.parametrize("updates", [[0], [3], [4], [29], [0, 1, 2, 17, 29]], ids=str)
def test_ctrl_c_at_any_update_changes_nothing(call, monkeypatch, updates):
    no_pictures(monkeypatch)
    argv = f"{TRAIN} --updates 30 --dropout 0.1 --out"
    assert call("train", f"{argv} whole")[0] == 0
    interrupt_at(monkeypatch, *updates)
    argv = f"{argv} stopped"
    for number in updates:
        assert call("train", argv)[0] == 130 and updates_done("stopped") == number + 1
        argv = "--resume stopped"
    assert call("train", argv)[0] == 0
    assert same(end("stopped"), end("whole"))


def test_ctrl_c_works_as_before_afterwards(call, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 3)
    assert call("train", f"{TRAIN} --updates 9 --out stopped")[0] == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("script, argv, module, busy", [
    ("train", f"{TEXT} --out run", train_teacher, "load_corpus"),
    ("distill", f"{TEXT} --out run", train_teacher, "load_corpus"), ("sample", "", dlm, "sample")])
def test_ctrl_c_outside_training(call, monkeypatch, script, argv, module, busy):
    monkeypatch.setattr(module, busy, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, _, err = call(script, argv)
    assert code == 130 and err.endswith("interrupted\n") and "Traceback" not in err


def test_ctrl_c_while_distilling(world, call, monkeypatch):
    interrupt_at(monkeypatch, 4)
    code, _, err = call("distill", f"{ONE} --updates 10 --batch_size 8 --out stopped")
    assert (code, err) == (130, "interrupted\n")
    assert updates_done("stopped") == 5
    assert call("distill", "--resume stopped")[0] == 0
    assert same(end("stopped"), end(world / TCS))


def test_opdlm_goes_on_where_it_was_interrupted(call, monkeypatch):
    no_pictures(monkeypatch)
    argv = f"{OPDLM} --updates 10 --out"
    assert call("distill", f"{argv} whole")[0] == 0
    interrupt_at(monkeypatch, 2, 7)
    assert call("distill", f"{argv} stopped")[0] == 130
    assert call("distill", "--resume stopped")[0] == 130
    assert call("distill", "--resume stopped")[0] == 0
    assert same(end("stopped"), end("whole"))


def test_distilling_goes_on_with_an_interrupted_teacher(world, call, monkeypatch):
    for run in (AR, JUDGE, TCS):
        shutil.rmtree(run)
    for seed, number in ((0, 3), (1, 6)):
        with monkeypatch.context() as m:
            interrupt_at(m, number)
            assert call("train", f"{TRAIN} --updates 10 --seed {seed}")[0] == 130
    assert updates_done(AR) == 4 and updates_done(JUDGE) == 7
    assert call("distill", f"{ONE} --updates 10 --batch_size 8")[0] == 0
    for run in (AR, JUDGE, TCS):
        assert same(end(run), end(world / run))


@pytest.mark.parametrize("where", [AR, f"{AR}/checkpoint.pt"])
def test_resuming_a_finished_run_reports_again(call, where):
    before = end(AR)
    reported = metrics(AR)
    os.remove(f"{AR}/metrics.json")
    assert call("train", f"--resume {where}")[0] == 0
    assert same(before, end(AR))
    for name in ("test_nats_per_token", "test_se", "history"):
        assert metrics(AR)[name] == reported[name]


def test_a_run_is_replaced_only_if_asked(call, refused):
    assert "--out" in refused("train", f"{TRAIN} --updates 3")
    assert "--out" in refused("distill", f"{ONE} --updates 3")
    assert call("train", f"{TRAIN} --updates 3 --overwrite")[0] == 0
    assert metrics(AR)["options"]["updates"] == updates_done(AR) == 3


def test_a_loss_that_is_no_number_ends_the_run(call, monkeypatch):
    update = train_teacher.Trainer.update

    def breaks(self, batch_loss):
        broken = self.done == 5
        return update(self, lambda: batch_loss() * (math.nan if broken else 1))

    monkeypatch.setattr(train_teacher.Trainer, "update", breaks)
    code, _, err = call("train", f"{TRAIN} --updates 10 --out run")
    assert code == 2 and err.startswith("error: --lr")
    assert updates_done("run") == 5                                    # the last good weights


def new_trainer():
    return train_teacher.Trainer(dlm.Transformer(dlm.Config(5, n_layer=1)), 10, 0.1)


def test_a_seed_inside_leaves_the_accelerators_random_numbers_alone(monkeypatch):
    """As on Apple's GPUs, which torch.random.fork_rng forgets: batches would repeat after every
    validation."""
    state = [torch.tensor([7])]

    def become(new):
        state[0] = new

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", become)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: become(torch.tensor([seed])))
    kept = new_trainer().state()
    with pytest.raises(KeyError), dlm.seeded(0):
        assert state[0].item() == 0
        raise KeyError
    assert state[0].item() == 7
    become(torch.tensor([8]))
    new_trainer().load(kept)
    assert state[0].item() == 7


@pytest.mark.filterwarnings("ignore:for ")
def test_a_resumed_trainer_lies_where_its_model_does(home):
    """A checkpoint is read to the CPU; `meta` stands for another device."""
    with dlm.seeded(0):
        model, _, ckpt = train_teacher.load(TCS, "")
        trainer = train_teacher.Trainer(model.to("meta"), 10, 0.1)
        trainer.load(ckpt["trainer"])
    assert {w.device.type for w in trainer.ema.values()} == {"meta"}
    kept = [v for o in trainer.optimizers for state in o.state.values() for v in state.values()]
    assert {v.device.type for v in kept if v.dim()} == {"meta"}


# --- the student's own states ---------------------------------------------------------------------

def test_opdlm_aims_at_what_the_teacher_says_of_the_rollout(call, monkeypatch):
    """Not of the text it was written behind: x and y must reach the target as the rollout gave
    them."""
    no_pictures(monkeypatch)
    wrote = []
    aimed = []
    rollout = dlm.rollout
    prefix = dlm.prefix

    def watched_rollout(model, x, *way, **more):
        y, z = rollout(model, x, *way, **more)
        wrote.append((x, y))
        return y, z

    def watched_prefix(teacher, x, y, b):
        aimed.append((x, y))
        return prefix(teacher, x, y, b)

    monkeypatch.setattr(dlm, "rollout", watched_rollout)
    monkeypatch.setattr(dlm, "prefix", watched_prefix)
    assert call("distill", f"{OPDLM} --updates 3 --out run")[0] == 0
    assert len(wrote) >= 4 and len(aimed) >= 4
    for (behind, y), (x, of) in list(zip(wrote, aimed))[:4]:
        assert not torch.equal(behind, y)
        assert torch.equal(of, y) and torch.equal(x, behind)


def test_rollouts_that_lose_their_entropy_are_reported(call, monkeypatch):
    no_pictures(monkeypatch)
    argv = f"{OPDLM} --updates 2"
    code, out, err = call("distill", f"{argv} --out lively")
    assert code == 0 and "warning" not in out + err
    monkeypatch.setattr(distill, "FLOOR", 1.5)
    code, out, err = call("distill", f"{argv} --out dull")
    assert code == 0 and "nats of entropy" in out + err and "--lr" in out + err
    lively, dull = ([line[3] for line in metrics(run)["history"]] for run in ("lively", "dull"))
    assert max(lively) < distill.COLLAPSED <= min(dull)         # such weights are not kept


def test_the_gap_between_a_model_and_itself_is_none(world):
    teacher, other = (train_teacher.load(world / run, "")[0] for run in (AR, JUDGE))
    x = torch.randint(teacher.V, (8, 16))
    assert dlm.inference_gap(teacher, teacher, x) == pytest.approx((0, 0), abs=1e-6)
    assert min(dlm.inference_gap(other, teacher, x)) > 1e-3


def test_the_gap_is_measured_on_the_states_of_the_students_own_sampler(world, monkeypatch):
    teacher, student = (train_teacher.load(world / run, "")[0] for run in (AR, TCS))
    rollout = dlm.rollout
    ways = []

    def watched(model, x, *way):
        ways.append(way)
        return rollout(model, x, *way)

    monkeypatch.setattr(dlm, "rollout", watched)
    dlm.inference_gap(student, teacher, torch.randint(teacher.V, (8, 16)), 2, "left")
    assert ways == [(2, "left")]


def test_student_tokens_are_counted(call, monkeypatch):
    """Slots of the student's network in 3 updates of 8 texts of 16 tokens.

    plain has 16 noisy and 12 clean ones. Rollouts have 4 calls more of the noisy ones, and the
    first of the clean ones too.
    """
    no_pictures(monkeypatch)

    def slots_of_a_text(argv):
        argv = f"{ONE} --updates 3 --batch_size 8 --out run --overwrite {argv}"
        assert call("distill", argv)[0] == 0
        return metrics("run")["student_tokens"] / (3 * 8)

    assert slots_of_a_text("--method plain") == 28
    assert slots_of_a_text("--method opdlm") == 28 + 4 * 16 + 12


# --- a full disk ----------------------------------------------------------------------------------

def fill_disk(monkeypatch, how, after=0):
    """From its call number `after` on, `how` finds no space left."""
    calls = []

    def full(*_):
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:100])
            full()
            return super().write(bytes(data)[100:])

    if how == "write":
        monkeypatch.setattr(train_teacher, "open", Full, raising=False)
    else:
        monkeypatch.setattr(os, how, full)


@pytest.mark.parametrize("how", ["fsync", "write", "replace"])
@pytest.mark.parametrize("script, argv", [("train", f"{TRAIN} --updates 3 --overwrite"),
                                          ("distill", f"{ONE} --updates 3 --overwrite"),
                                          ("distill", f"--resume {TCS}")])
def test_no_space_left(refused, home, monkeypatch, script, argv, how):
    fill_disk(monkeypatch, how)
    before = files(home)
    assert re.search(r"--out.*No space left", refused(script, argv))
    assert files(home) == before


@pytest.mark.parametrize("after", [1, 4, 9, 10, 11])
def test_disk_that_fills_up_during_a_run_costs_nothing_saved(world, call, monkeypatch, after):
    with monkeypatch.context() as m:
        fill_disk(m, "fsync", after)
        code, _, err = call("train", f"{TRAIN} --updates 10 --out run")
    assert code == 2 and "--out" in err and updates_done("run") == min(10, after)
    assert call("train", "--resume run")[0] == 0
    assert same(end("run"), end(world / AR)) and not list(Path("run").glob("*.tmp"))


# --- bad input ------------------------------------------------------------------------------------

NO_TEXT = ["nowhere.txt", "empty", "binary", "few", "folder", AR + "/checkpoint.pt", "x" * 300]
NO_CHECKPOINT = ["nowhere", "empty", "binary", "few", "cut", "half", "noise", "dict", "list",
                 "tensor", "code", "folder", "tiny.txt", "x" * 300]

WRONG_EVERYWHERE = [
    "--nonsense 1", "--see 1", "--seed x", "--seed -1", "--seed 1.5",
    "--seed 99999999999999999999999", "--seed", "--device foo", "--device CPU"]
WRONG_IN_TRAINING = [
    "--n_layer 0", "--n_head 0", "--n_head -2", "--n_embd 0", "--context 0", "--context 1",
    "--context -5", "--context 100000", "--updates -1", "--updates 1e3",
    "--batch_size 0", "--batch_size -8", "--lr nan", "--lr -1", "--lr inf", "--lr fast",
    "--dropout 1", "--dropout 1.5", "--dropout nan", "--dropout -0.1", "--n_embd 10 --n_head 4",
    "--n_embd 6 --n_head 2", "--n_embd 2 --n_head 4", "--block -1", "--block 17 --objective mdlm",
    "--objective mlm", "--tokenizer word", "--tokenizer bpe:255", "--tokenizer bpe:x",
    "--tokenizer gpt2:4", "--tokenizer a/b", "--out tiny.txt", "--out tiny.txt/run",
    "--out " + "x" * 300]
WRONG_IN_DISTILLING = [
    "--method tsc", "--states texts", "--states teacher --method all",
    "--states rollout --method tcs", "--states whole", "--target top",
    "--target onehot --method all", "--target onehot --states rollout",
    "--target topk --method opdlm", "--target exact --states rollout", "--divergence kl",
    "--divergence reverse", "--block 17", "--block 1 --method tcs", "--block 1 --method all",
    "--block -4", "--block 5 --method opdlm",
    "--candidates 0", "--texts 3", "--fraction nan", "--fraction -1", "--fraction 1.01",
    "--updates 0", "--batch_size 0", "--lr nan", "--tokenizer word", "--order ancestral",
    f"--teacher {TCS}", f"--teacher {MDLM}", "--teacher runs/other", "--teacher runs/short",
    "--student runs/other", "--student runs/short", "--student teacher", "--out tiny.txt"]
WRONG_IN_SAMPLING = [
    "--threshold 1.5", "--threshold -1", "--threshold nan", "--top_k -1", "--top_p 1.1",
    "--top_p nan", "--length -1", "--number 0", "--number -1", "--steps -1", "--temperature nan",
    "--temperature -1", "--temperature inf", "--order backwards",
    "--order ancestral --threshold 0.5", "--prompt TheTheTheTheTheThe", "--prompt Thethethethethet",
    "--prompt The_of", "--prompt Théorème", "--prompt 42", "--prompt The --length 2",
    "--prompt The____ --length 4"]

RIGHT = {"train": f"{TRAIN} --updates 2 --out run", "sample": "",
         "distill": f"{ONE} --updates 2 --out run"}


def short(argv):
    return str(argv)[:40]


def refused_by_name(refused, script, argv):
    """The error must name the first option, whose value is wrong."""
    assert argv.split()[0] in refused(script, f"{RIGHT[script]} {argv}")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("argv", WRONG_EVERYWHERE)
def test_option_that_is_wrong_everywhere(refused, script, argv):
    refused_by_name(refused, script, argv)


@pytest.mark.parametrize("argv", WRONG_IN_TRAINING, ids=short)
def test_option_that_is_wrong_in_training(refused, argv):
    refused_by_name(refused, "train", argv)


@pytest.mark.parametrize("argv", WRONG_IN_DISTILLING)
def test_option_that_is_wrong_in_distilling(refused, monkeypatch, argv):
    no_training(monkeypatch)
    refused_by_name(refused, "distill", argv)


@pytest.mark.parametrize("argv", WRONG_IN_SAMPLING)
def test_option_that_is_wrong_in_sampling(refused, argv):
    refused_by_name(refused, "sample", argv)


@SKIP_CUDA
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_gpu(refused, script):
    assert re.search("--device cuda.*cpu", refused(script, "--device cuda"))


@pytest.mark.parametrize("script, argv", [("train", SIZE), ("distill", f"--teacher {AR}")])
@pytest.mark.parametrize("name", NO_TEXT, ids=short)
def test_no_text(refused, script, argv, name):
    assert f"--data {name}" in refused(script, f"--tokenizer char --data {name} {argv}")


@pytest.mark.parametrize("script, option, argv", [
    ("train", "--resume", ""), ("distill", "--resume", ""), ("sample", "--checkpoint", ""),
    ("distill", "--teacher", RIGHT["distill"]), ("distill", "--student", RIGHT["distill"])])
@pytest.mark.parametrize("name", NO_CHECKPOINT, ids=short)
def test_no_checkpoint(refused, script, option, argv, name):
    assert f"{option} {name}" in refused(script, f"{option} {name} {argv}")
    assert not Path("owned").exists()


@pytest.mark.parametrize("script, argv, option", [
    ("train", f"--resume {TCS}", "--resume"), ("distill", f"--resume {AR}", "--resume"),
    ("train", "--resume bare", "--resume"), ("distill", "--resume bare", "--resume"),
    ("train", f"--resume {AR} --updates 20", "--updates"),
    ("distill", f"--lr=1 --resume={TCS}", "--lr"),
    ("train", f"--overwrite --resume {AR}", "--overwrite")])
def test_what_cannot_be_resumed(refused, script, argv, option):
    assert option in refused(script, argv)


@pytest.mark.parametrize("part, now, once", [("trainer", "random", "rng"),
                                             ("options", "updates", "steps")])
def test_a_run_of_an_older_version_cannot_be_resumed(refused, part, now, once):
    ckpt = torch.load(f"{AR}/checkpoint.pt", weights_only=True)
    ckpt[part][once] = ckpt[part].pop(now)
    torch.save(ckpt, "older.pt")
    assert "--resume older.pt" in refused("train", "--resume older.pt")


def test_teacher_of_another_vocabulary_is_refused_before_its_judge_is_trained(refused, monkeypatch):
    no_training(monkeypatch)
    write_text("fresh.txt", ["words", "without", "a", "judge", "yet"])
    argv = "--data fresh.txt --method plain --teacher runs/other"
    assert "--teacher runs/other" in refused("distill", argv)


@pytest.mark.parametrize("run, role", [(AR, "--teacher"), (JUDGE, JUDGE)])
def test_broken_teacher_or_judge_that_was_found_not_given(refused, monkeypatch, run, role):
    no_training(monkeypatch)
    shutil.copy("half", f"{run}/checkpoint.pt")
    error = refused("distill", RIGHT["distill"])
    assert role in error and run in error
    options = {"--" + f.name for f in dataclasses.fields(distill.Options)}
    assert set(re.findall(r"--\w+", error)) <= options


def test_teacher_of_another_text_with_the_same_name_is_not_taken_for_this_one(refused, monkeypatch):
    no_training(monkeypatch)
    write_text("folder/tiny.txt", "Another text of the same name".split())
    error = refused("distill", "--data folder/tiny.txt --tokenizer char --block 4 --out run")
    assert re.search("--data|--teacher", error)


@pytest.mark.parametrize("script, argv, anew, folder", [
    ("train", f"--resume {AR}", "", AR), ("distill", f"--resume {TCS}", AR, TCS),
    ("distill", RIGHT["distill"], "", AR), ("distill", RIGHT["distill"], AR, JUDGE)])
def test_a_text_that_changed_since(refused, monkeypatch, script, argv, anew, folder):
    """Its parts are others now: a model that goes on, teaches or judges may have seen what is held
    out. The run `anew` knows the new text."""
    no_training(monkeypatch)
    with open("tiny.txt", "a") as f:
        f.write("One more statement.\n")
    if anew:
        ckpt = torch.load(f"{anew}/checkpoint.pt")
        ckpt["corpus"] = train_teacher.load_corpus("tiny.txt", "char", 16).sha256
        torch.save(ckpt, f"{anew}/checkpoint.pt")
    assert folder in refused(script, argv)


def test_characters_that_are_left_out_are_counted(home, capsys):
    with open("tiny.txt", "a") as f:
        f.write("éééé\n")
    train_teacher.load_corpus("tiny.txt", train_teacher.load(AR, "")[1], 16)
    assert "4 characters" in capsys.readouterr().out


def test_nothing_to_sample_from(refused, monkeypatch):
    monkeypatch.setattr(sample, "SHIPPED", Path("nowhere.pt"))
    shutil.rmtree("runs")
    assert "--checkpoint" in refused("sample")


@pytest.mark.parametrize("script", ["train", "distill"])
def test_no_network(refused, monkeypatch, tmp_path, script):
    def offline(*_, **__):
        raise urllib.error.URLError("unreachable")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert re.search("--data shakespeare.*no network", refused(script, "--data shakespeare"))
    error = refused(script, "--data tiny.txt --tokenizer gpt2")
    assert re.search("--tokenizer gpt2.*TIKTOKEN_CACHE_DIR", error)


@pytest.mark.parametrize("script, argv", [
    ("train", "--data nowhere.txt"), ("train", f"{TEXT} --tokenizer a/b"),
    ("train", f"{TEXT} --n_embd 10 --n_head 4"), ("distill", f"{ONE} --block 99")])
def test_what_is_refused_leaves_no_folder_behind(refused, home, script, argv):
    before = sorted(home.rglob("*"))
    refused(script, argv)
    assert sorted(home.rglob("*")) == before
