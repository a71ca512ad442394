"""The three scripts as a user meets them: what they write, what survives a kill, and what they say to bad input."""
import dataclasses
import errno
import io
import json
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

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train": train_teacher, "distill": distill, "sample": sample}
TEXT = "--data tiny.txt --tokenizer char"
ONE = f"{TEXT} --method tcs"
SIZE = "--context 16 --n_layer 1 --n_head 2 --n_embd 16 --batch_size 8"
AR, JUDGE, TCS, MDLM = "runs/ar-tiny-char-s0", "runs/ar-tiny-char-s1", "runs/tcs-tiny-char-b4-s0", "runs/mdlm"
UNIX = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
distill.JUDGED = 32            # texts a row of the tables: enough to see that they are made
SKIP_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def write_text(path, words, n=20_000):
    draw, text = random.Random(0), ""
    while len(text) < n:
        text += " ".join(draw.choices(words, k=draw.randint(3, 12))).capitalize() + ".\n"
    Path(path).write_text(text)


class Code:
    """A pickle that would run a command when loaded."""
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder as a user has it after an hour: texts, teacher, judge, a student, a denoiser; and things gone wrong."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(root)
        write_text("tiny.txt", "the of an object end statement value is not called with name expression".split())
        write_text("other.txt", "12 345 6789 0".split())
        for argv in (f"{TEXT} --steps 10", f"{TEXT} --steps 10 --seed 1",
                     f"{TEXT} --steps 10 --objective mdlm --out {MDLM}",
                     f"{TEXT} --steps 2 --context 8 --out runs/short", f"{TEXT} --steps 2 --n_embd 8 --out runs/thin",
                     "--data other.txt --tokenizer char --steps 2 --out runs/other"):
            train_teacher.main([*SIZE.split(), *argv.split()])
        distill.main([*ONE.split(), *"--block 4 --steps 10 --batch_size 8".split()])
        for run in ("short", "thin", "other"):
            Path("runs", run, "loss.png").unlink()
        ckpt = Path(AR, "checkpoint.pt").read_bytes()
        for name, data in {"empty": b"", "binary": bytes(range(256)) * 99, "few": b"a few words\n", "cut": ckpt[:-1000],
                           "half": ckpt[:len(ckpt) // 2], "noise": random.Random(0).randbytes(5000)}.items():
            Path(name).write_bytes(data)
        for name, data in {"dict": {"model": {}}, "list": [1], "tensor": torch.ones(3), "code": Code()}.items():
            torch.save(data, name)
        model, tokenizer, _ = dlm.load(AR, "")
        dlm.save("bare", model, tokenizer, {})
        Path("folder").mkdir()
    return root


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
    """call("train", "--steps 3 ...", "one more argument") -> exit code, stdout, stderr."""
    def call(script, argv="", *more):
        capsys.readouterr()
        code = 0
        try:
            dlm.run_script(SCRIPTS[script].main, [*argv.split(), *more])
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()
    return call


@pytest.fixture
def refused(call, home):
    """The same for what must be refused: exit code 2, one line, and every file as it was. -> the line."""
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
    t = ckpt["trainer"]
    t["history"] = [[step, loss, val] for step, _, loss, val in t["history"]]
    del t["seconds"]
    for name in ("out", "resume", "device"):
        del ckpt["options"][name]
    return ckpt


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
    monkeypatch.setattr(train_teacher, "save_figure", lambda fig, path: train_teacher.plt.close(fig))


def start(script, argv, **how):
    return subprocess.Popen([sys.executable, str(ROOT / script), *argv.split()], text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


# --- what a run leaves -------------------------------------------------------------------------------------

def test_from_nothing_to_samples_in_a_shell(tmp_path, world):
    shutil.copy(world / "tiny.txt", tmp_path)
    shutil.copytree(world / JUDGE, tmp_path / JUDGE)

    def shell(script, argv):
        p = start(script, argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = p.communicate(timeout=120)
        return p.returncode, out, err

    code, out, err = shell("train_teacher.py", f"{TEXT} {SIZE} --steps 10")
    assert (code, err) == (0, "") and f"python sample.py --checkpoint {AR}" in out
    code, out, err = shell("distill.py", f"{ONE} --block 4 --steps 10 --batch_size 8")
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


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
def test_metrics(world, monkeypatch, run):
    monkeypatch.chdir(world)
    m, (model, tokenizer, ckpt) = metrics(run), dlm.load(run, "")
    text = dlm.load_text("tiny.txt", tokenizer, model.L)
    assert m["options"] == ckpt["options"] and m["block"] == model.b == {AR: 1, TCS: 4, MDLM: 16}[run]
    assert m["corpus"] == {"name": "tiny.txt", "sha256": text.sha256, "chars_per_token": 1}
    assert {"python", "torch", "threads", "machine"} <= m["versions"].keys() and m["device"]
    assert m["parameters"] == sum(p.numel() for p in model.parameters())
    assert m["train_tokens"] == 10 * 8 * 16 and m["train_seconds"] > 0
    assert [h[0] for h in m["history"]] == list(range(1, 11))
    assert m["test_nats_per_char"] == m["test_nats_per_token"] < torch.tensor(tokenizer.V).log()
    assert 0 < m["test_se"] < 1


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
def test_the_weights_in_a_checkpoint_are_those_that_were_measured(world, monkeypatch, run):
    monkeypatch.chdir(world)
    m, (model, tokenizer, ckpt) = metrics(run), dlm.load(run, "")
    parts = dlm.load_text("tiny.txt", tokenizer, model.L).parts
    test = dlm.bound(model, dlm.consecutive(parts["test"], model.L), 1 if run == AR else train_teacher.TEST_REPEATS)
    assert test == pytest.approx((m["test_nats_per_token"], m["test_se"]), rel=1e-5)
    best = dlm.bound(model, dlm.consecutive(parts["val"], model.L, 256))[0]
    assert best == pytest.approx(min(h[3] for h in ckpt["trainer"]["history"]), rel=1e-5)


def test_table_of_a_student(world):
    m = metrics(world / TCS)
    held, teacher, *student = m["table"]
    assert (held["what"], teacher["what"], teacher["calls"]) == ("held-out text", "AR teacher", 16)
    assert held["known_words"] > 0.9
    spread = [r for r in student if r.get("order") == "spread"]
    assert [r["steps"] for r in spread] == [1, 2, 4] and [r["calls"] for r in spread] == [4, 8, 16]
    assert sum("threshold" in r and 4 <= r["calls"] <= 16 for r in student) == 1
    for r in m["table"]:
        assert r["judge_nll"] > 0 and 0 < r["entropy"] < r["bigram_entropy"] and 0 <= r["known_words"] <= 1
    assert m["teacher"] == AR and (m["states"], m["target"]) == ("data", "topk")
    assert m["samples"].keys() == {r["what"] for r in m["table"][1:]}
    assert all(len(t) == 16 for four in m["samples"].values() for t in four)


@pytest.mark.parametrize("picture", [f"{AR}/loss.png", f"{MDLM}/loss.png", f"{TCS}/loss.png", f"{TCS}/quality.png"])
def test_figures_are_pictures(world, picture):
    data = (world / picture).read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82") and len(data) > 5000


def test_a_run_is_these_four_files(world):
    assert {p.name for p in (world / TCS).iterdir()} == {"checkpoint.pt", "metrics.json", "loss.png", "quality.png"}


def test_seed_decides_the_weights(world, call):
    for seed in (0, 1):
        assert call("train", f"{TEXT} {SIZE} --steps 10 --seed {seed} --out again{seed}")[0] == 0
    assert same(end("again0"), end(world / AR))
    assert not same(end("again1")["weights"], end("again0")["weights"])


@pytest.mark.parametrize("argv", [
    "--method plain", "--method sequence", "--method prefix --divergence reverse", "--method tcs --divergence tvd",
    "--states teacher --target grad", "--target exact --fraction 0.5 --texts 99", "--target grad+topk --divergence mse",
    "--method opdlm", "--method opdlm --block 16 --whole 0.5 --order confidence", "--method opdlm --block 0 --first 2",
    "--states rollout --target topk --whole 1 --divergence tvd", "--block 5", "--block 16", "--block 0 --student random", f"--block 0 --student {MDLM}",
    f"--student {TCS}/checkpoint.pt", f"--teacher {AR}/checkpoint.pt", "--student runs/thin-mdlm"])
def test_every_kind_of_student_trains_and_writes(call, monkeypatch, argv):
    no_pictures(monkeypatch)
    if "thin" in argv:
        assert call("train", f"{TEXT} {SIZE} --n_embd 8 --objective mdlm --steps 2 --out runs/thin-mdlm")[0] == 0
    code, _, err = call("distill", f"{ONE} --steps 2 --batch_size 4 --block 4 --texts 64 --out run {argv}")
    assert (code, err) == (0, "")
    assert torch.tensor([r["judge_nll"] for r in metrics("run")["table"]]).isfinite().all()
    gap = metrics("run")["gap"]
    assert gap is None if "--block 5" in argv else len(gap) == 2 and torch.tensor(gap).isfinite().all()
    code, out, _ = call("sample", "--checkpoint run --number 3")
    assert code == 0 and [len(t) for t in texts(out)] == [16] * 3


@pytest.mark.parametrize("argv", ["", "--divergence reverse", "--divergence mse"])
def test_sdtt_goes_round_by_round(call, monkeypatch, argv):
    no_pictures(monkeypatch)
    argv = f"{TEXT} --method sdtt --student {TCS} --steps 2 --batch_size 4 --out few {argv}"
    code, out, err = call("distill", argv)
    assert (code, err) == (0, "") and "4 steps a block become 2" in out and "2 steps a block become 1" in out
    two, one = (metrics(f"few-{n}steps") for n in (2, 1))
    assert (two["options"]["first"], two["options"]["last"], two["options"]["student"]) == (4, 2, TCS)
    assert (one["options"]["first"], one["options"]["last"], one["options"]["student"]) == (2, 1, "few-2steps")
    assert torch.tensor([h[3] for m in (one, two) for h in m["history"]]).isfinite().all()
    before = files("few-2steps"), files("few-1steps")
    assert call("distill", argv)[0] == 0 and (files("few-2steps"), files("few-1steps")) == before   # done is done


def test_sdtt_goes_on_where_it_was_interrupted(call, monkeypatch):
    no_pictures(monkeypatch)
    argv = f"{TEXT} --method sdtt --student {TCS} --steps 20 --batch_size 4 --out"
    assert call("distill", f"{argv} whole")[0] == 0
    update, seen = dlm.Trainer.update, []

    def interrupted(self, batch_loss):
        seen.append(1)
        if len(seen) == 27:
            signal.raise_signal(signal.SIGINT)
        return update(self, batch_loss)

    monkeypatch.setattr(dlm.Trainer, "update", interrupted)
    assert call("distill", f"{argv} cut")[0] == 130 and not Path("cut-1steps/metrics.json").exists()
    assert call("distill", f"{argv} cut")[0] == 0 and len(seen) == 40
    for n in (2, 1):
        assert same(end(f"cut-{n}steps")["weights"], end(f"whole-{n}steps")["weights"])


@pytest.mark.parametrize("argv, named", [
    ("--student ar", "--student"), (f"--student {AR}", "--student"), ("--student runs/other", "--student"),
    (f"--student {TCS} --last 4", "--first"), (f"--student {TCS} --first 2 --last 2", "--first"),
    (f"--target onehot --student {TCS}", "--target"), (f"--student {TCS} --k 8", "--first"), (f"--student {TCS} --k 1", "--k"),
    (f"--student {TCS} --states rollout --whole 1", "--states")])
def test_sdtt_refuses(refused, argv, named):
    assert refused("distill", f"{TEXT} --method sdtt {argv}").startswith(f"error: {named} ")


def test_sdtt_says_what_it_does_with_other_numbers(call, monkeypatch):
    no_pictures(monkeypatch)
    out = call("distill", f"{TEXT} --method sdtt --student {TCS} --first 3 --steps 1 --batch_size 4 --out few")[1]
    assert "2 steps a block become 1 (3 is no multiple of 2)" in out


def test_all_methods_in_one_command(call, home):
    argv, base = f"{TEXT} --steps 20 --batch_size 4 --texts 64", "runs/all-tiny-char-b4-s0"
    code, out, err = call("distill", argv)
    assert (code, err) == (0, "") and "of them all" in out
    runs = {"all": metrics(base), **{n: metrics(f"{base}-{n}") for n in ("tcs", "opdlm")},
            2: metrics(f"{base}-sdtt-2steps")}
    assert [(runs[n]["options"]["steps"], runs[n]["options"]["lr"]) for n in ("tcs", 2, "opdlm")] == [
        (8, 0.02), (2, 0.01), (3, 0.006)]
    assert [runs[n]["options"]["student"] for n in ("tcs", 2, "opdlm")] == ["ar", f"{base}-tcs", "ar"]
    table = {r["what"]: r for r in runs["all"]["table"]}
    assert list(table) == ["held-out text", "AR teacher", *(f"{who}, {n} steps, spread" for who, steps in
                           (("TCS", (1, 2, 4)), ("SDTT", (2,)), ("OPDLM", (1, 2, 4))) for n in steps)]
    own = next(r for r in runs[2]["table"] if r["what"] == "student, 2 steps, spread")
    assert table["SDTT, 2 steps, spread"]["judge_nll"] == own["judge_nll"]
    before = files(home)
    code, out, _ = call("distill", argv)
    assert code == 0 and out.count("finished before") == 3 and files(home) == before
    for other in ("--steps 40", "--order left", "--lr 0.1"):                               # would mix two settings in one table
        code, _, err = call("distill", f"{argv} {other}")
        assert code == 2 and f"--out {base}-tcs" in err and files(home) == before
    assert call("distill", f"{TEXT} --method opdlm --steps 1 --batch_size 4")[0] == 0     # has a folder of its own


def test_block_need_not_divide_the_context_from_scratch(call):
    assert call("train", f"{TEXT} {SIZE} --objective mdlm --block 5 --steps 2 --out run")[0] == 0
    assert metrics("run")["block"] == 5


def test_what_is_missing_is_trained_first(home, call, monkeypatch):
    shutil.move("runs", "kept")
    asked = []

    def train(o, ckpt=None):
        asked.append(o)
        folder = Path(f"runs/ar-tiny-char-s{o.seed}")
        shutil.copytree(Path("kept") / folder.name, folder)
        return folder

    monkeypatch.setattr(train_teacher, "train", train)
    assert call("distill", f"{ONE} --block 4 --steps 2")[0] == 0
    assert sorted((o.objective, o.data, o.tokenizer, o.seed) for o in asked) == [
        ("ar", "tiny.txt", "char", 0), ("ar", "tiny.txt", "char", 1)]
    assert Path(TCS, "metrics.json").exists()


def test_output_that_cannot_show_every_character(call, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # a redirected stdout on Windows
    monkeypatch.setattr(sys, "stdout", narrow)
    assert call("distill", f"{ONE} --block 4 --steps 2 --out run")[0] == 0


# --- sample.py ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("run", [AR, TCS, MDLM])
def test_same_seed_same_texts(call, run):
    one, same_seed, other = (texts(call("sample", f"--checkpoint {run} --seed {s}")[1]) for s in (0, 0, 1))
    assert one == same_seed != other and len(set(one)) == len(one) == 4


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
@pytest.mark.parametrize("prompt", ["T", "The value ", "The value is ca", "The\nof", "___ of"])
def test_prompt_stands_verbatim(call, run, prompt):
    code, out, _ = call("sample", f"--checkpoint {run} --number 5 --prompt", prompt)
    pattern = re.sub("_{3,}", lambda gap: f".{{{len(gap[0])}}}", prompt)
    assert code == 0 and len(texts(out)) == 5
    assert all(re.match(pattern, t, re.DOTALL) for t in texts(out))


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
@pytest.mark.parametrize("prompt", ["The ____ of", "___", "T____e", "____ end", "The ___ is ___ e", "________________"])
def test_gaps_are_filled_and_the_rest_is_kept(call, run, prompt):
    code, out, _ = call("sample", f"--checkpoint {run} --number 5 --prompt", prompt)
    pattern = re.sub("_+", lambda gap: f"[^_]{{{len(gap[0])}}}", prompt)
    assert code == 0 and len(texts(out)) == 5
    assert all(re.fullmatch(pattern, t) for t in texts(out))


@pytest.mark.parametrize("run, prompt, noted", [(AR, "The ___ of", True), (TCS, "The ______ of", True),
                                                (TCS, "T___", False), (MDLM, "The ___ of", False), (AR, "The ", False)])
def test_a_note_where_the_right_side_is_not_seen(call, run, prompt, noted):
    assert ("note:" in call("sample", f"--checkpoint {run} --prompt", prompt)[2]) == noted


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
@pytest.mark.parametrize("argv, lengths", [
    ("", [16] * 4), ("--number 1", [16]), ("--length 5", [5] * 4), ("--length 1", [1] * 4), ("--steps 1", [16] * 4),
    ("--length 9 --prompt The", [9] * 4), ("--length 9 --prompt T___", [9] * 4), ("--steps 50", [16] * 4),
    ("--order confidence", [16] * 4), ("--order ancestral --temperature 0.5", [16] * 4), ("--order random", [16] * 4),
    ("--order margin --steps 2", [16] * 4), ("--order entropy --top_k 2", [16] * 4), ("--threshold 0.1", [16] * 4),
    ("--threshold 0.5 --remask 1", [16] * 4), ("--threshold 0.5 --top_p 0.5", [16] * 4), ("--steps 2 --remask 3", [16] * 4), ("--length 17", [17] * 4), ("--length 50 --prompt The", [50] * 4)])
def test_number_and_length(call, run, argv, lengths):
    code, out, _ = call("sample", f"--checkpoint {run} {argv}")
    assert code == 0 and [len(t) for t in texts(out)] == lengths


@pytest.mark.parametrize("run", [AR, TCS])
def test_temperature_0_leaves_nothing_to_chance(call, run):
    argv = f"--checkpoint {run} --temperature 0 --order confidence --seed"
    drawn = texts(call("sample", f"{argv} 0")[1]) + texts(call("sample", f"{argv} 1")[1])
    assert len(drawn) == 8 and len(set(drawn)) == 1


@pytest.mark.parametrize("run", [AR, TCS])
def test_a_tiny_temperature_is_temperature_0(call, run):
    argv = f"--checkpoint {run} --order confidence --temperature"
    assert texts(call("sample", f"{argv} 0")[1]) == texts(call("sample", f"{argv} 1e-6")[1])


@pytest.mark.parametrize("run", [AR, TCS, MDLM])
def test_stop_ends_each_text_before_it(call, run):
    whole = texts(call("sample", f"--checkpoint {run} --number 8 --length 40 --prompt The")[1])
    ended = texts(call("sample", f"--checkpoint {run} --number 8 --length 40 --prompt The --stop e")[1])
    assert ended == [t[:at] if (at := t.find("e", 3)) >= 0 else t for t in whole] and ended != whole


def test_stop_ends_early(call, monkeypatch):
    calls, run = [], dlm.Transformer.run
    monkeypatch.setattr(dlm.Transformer, "run", lambda *a, **how: calls.append(1) or run(*a, **how))
    argv = f"--checkpoint {AR} --number 1 --length 200 --prompt The"
    whole = texts(call("sample", argv)[1])[0]
    stop, before = whole[20], len(calls)
    assert texts(call("sample", f"{argv} --stop", stop)[1]) == [whole[:whole.index(stop, 3)]]
    assert len(calls) - before < 20 < before


@pytest.mark.parametrize("no_color", [False, True])
def test_watch_shows_every_state_in_place(call, monkeypatch, no_color):
    monkeypatch.setattr(sample.time, "sleep", lambda s: None)
    quiet = texts(call("sample", f"--checkpoint {TCS} --number 1 --prompt The")[1])[0]
    assert call("sample", f"--checkpoint {TCS} --number 1 --prompt The --watch")[1].count("---") == 1   # a pipe: no animation
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    out = call("sample", f"--checkpoint {TCS} --number 1 --prompt The --watch")[1]
    pictures = re.split(r"\033\[\d+A\033\[J", out)
    assert len(pictures) == 16 - 3 + 1                                     # a token a step, and the finished text
    plain = [re.sub(r"\033\[[\d;]*m", "", p).split("\n", 1)[1].rstrip("\n") for p in pictures]
    assert [p.count(sample.HIDDEN) for p in plain] == [*range(12, -1, -1), 0] and plain[-1] == quiet
    assert ("\033[1;32m" in out and "\033[2m" in out) != no_color


def test_gif_is_a_moving_picture(call):
    from PIL import Image
    assert call("sample", f"--checkpoint {TCS} --number 2 --prompt The --gif a.gif")[0] == 0
    picture = Image.open("a.gif")
    assert picture.format == "GIF" and picture.n_frames == 16 - 3 + 1


def test_gif_that_cannot_be_written(call):
    code, out, err = call("sample", "--gif tiny.txt/a.gif")
    assert code == 2 and err.splitlines()[-1].startswith("error: --gif: cannot write") and len(texts(out)) == 4


def test_bench_compares_models_orders_and_steps(call):
    code, out, err = call("sample", f"--bench {AR},{TCS} --judge {JUDGE} --texts 8 --out bench")
    rows = json.loads(Path("bench/bench.json").read_text())["rows"]
    assert (code, err) == (0, "") and len(out.splitlines()) == 2 + len(rows) - 1
    assert [r["what"] for r in rows[:2]] == ["held-out text", Path(AR).name] and rows[1]["calls"] == 16
    assert len(rows) == 2 + len(dlm.ORDERS) * 3 + 3
    for r in rows[2:]:
        assert r["seconds_1"][1] <= r["seconds_1"][0] <= r["seconds_1"][2] and 0 < r["distinct_2"] <= 1
        assert r["calls"] == 4 * r["steps"] if "steps" in r and r["order"] != "ancestral" else 4 <= r["calls"] <= 16
    assert Path("bench/bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("narrower, ways", [("--steps 2 --order left", [("left", 2, None)]),
                                            ("--threshold 0.8", [("left", None, 0.8)]),
                                            ("--threshold 0.8 --order margin", [("margin", None, 0.8)])])
def test_bench_narrowed(call, narrower, ways):
    assert call("sample", f"--bench {AR},{TCS} --judge {JUDGE} --texts 8 --out bench {narrower}")[0] == 0
    held, ar, *rows = json.loads(Path("bench/bench.json").read_text())["rows"]
    assert ar["block"] == 1 and [(r["order"], r.get("steps"), r.get("threshold")) for r in rows] == ways


def test_bench_draws_as_it_is_told(call):
    assert call("sample", f"--bench {AR} --judge {JUDGE} --texts 8 --out bench --top_k 1")[0] == 0
    assert json.loads(Path("bench/bench.json").read_text())["rows"][1]["distinct_2"] <= 1 / 8     # eight times one text


@pytest.mark.parametrize("argv, named", [(f"--bench {TCS}", "--judge"), (f"--bench {TCS} --judge {TCS}", "--judge"),
                                         (f"--bench runs/other --judge {JUDGE}", "--bench runs/other"),
                                         (f"--bench {AR} --judge {JUDGE} --passages nowhere", "--passages nowhere"),
                                         (f"--bench {AR},nowhere --judge {JUDGE}", "--bench nowhere")])
def test_bench_refuses(refused, argv, named):
    assert named in refused("sample", argv)


def test_correct_rewrites_what_is_unlikely(call, refused):
    code, out, _ = call("sample", f"--checkpoint {MDLM} --doubt 0.01 --correct", "The valxe is")
    assert code == 0 and "->" in out and len(out.splitlines()[-1]) == len("The valxe is")
    assert call("sample", f"--checkpoint {MDLM} --doubt 99 --correct", "The valxe is")[1] == "The valxe is\n"
    assert "--correct" in refused("sample", f"--checkpoint {AR} --correct The")
    assert "--correct" in refused("sample", f"--checkpoint {MDLM} --correct T")
    assert "--correct" in refused("sample", f"--checkpoint {MDLM} --correct", "The" * 6)


def test_wrapping():
    text = [(c, "old") for c in "ab\ncdefg"]
    assert ["".join(c for c, _ in line) for line in sample.wrap(text, 3)] == ["ab", "cde", "fg"]


def test_newest_run_is_the_default(call):
    os.utime(Path(MDLM, "checkpoint.pt"), (2e9, 2e9))
    assert call("sample")[2].startswith(MDLM)


def test_shipped_model_is_taken_where_there_are_no_runs(call, monkeypatch):
    monkeypatch.setattr(sample, "SHIPPED", Path(shutil.move(AR, "shipped"), "checkpoint.pt"))
    shutil.rmtree("runs")
    assert call("sample")[2].startswith("shipped")


@pytest.mark.parametrize("no_color", [False, True])
def test_given_tokens_stand_out_on_a_terminal(call, monkeypatch, no_color):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    out = call("sample", "--prompt", "The ___ of")[1]
    assert ("\033[36mThe \033[0m" in out and "\033[36m of\033[0m" in out) != no_color


# --- interrupted and resumed -------------------------------------------------------------------------------

LONG = {"train": f"{TEXT} {SIZE} --steps 200", "distill": f"{ONE} --block 4 --steps 60 --batch_size 8 --texts 64"}
FILE = {"train": "train_teacher.py", "distill": "distill.py"}


def changed(path, since):
    return path.exists() and path.stat().st_mtime_ns != since


def run_until_saved(script, argv, path):
    """Starts it and returns at the first checkpoint it writes, or at its end."""
    since = path.stat().st_mtime_ns if path.exists() else None
    p = start(FILE[script], argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while p.poll() is None and not changed(path, since):
        time.sleep(0.002)
    return p


@UNIX
@pytest.mark.parametrize("script", ["train", "distill"])
def test_kills_change_nothing(call, script):
    assert call(script, f"{LONG[script]} --out whole")[0] == 0
    draw, argv, landed = random.Random(0), f"{LONG[script]} --out killed", 0
    for _ in range(3):
        p = run_until_saved(script, argv, Path("killed/checkpoint.pt"))
        time.sleep(draw.uniform(0, 0.05))
        p.kill()
        p.communicate()
        landed += p.returncode == -signal.SIGKILL
        argv = "--resume killed"
    assert landed
    assert call(script, argv)[0] == 0
    assert same(end("killed"), end("whole"))
    assert metrics("killed")["test_nats_per_token"] == metrics("whole")["test_nats_per_token"]


@UNIX
def test_ctrl_c_saves_and_says_so(call):
    argv = f"{TEXT} {SIZE} --steps 300 --out"
    p = run_until_saved("train", f"{argv} stopped", Path("stopped/checkpoint.pt"))
    p.send_signal(signal.SIGINT)
    assert p.communicate(timeout=60)[1] == "interrupted\n" and p.returncode == 130
    assert 30 <= end("stopped")["trainer"]["step"] < 300
    assert call("train", f"{argv} whole")[0] == call("train", "--resume stopped")[0] == 0
    assert same(end("stopped"), end("whole"))


def test_ctrl_c_while_distilling(world, call, monkeypatch):
    interrupt_at(monkeypatch, 4)
    assert call("distill", f"{ONE} --block 4 --steps 10 --batch_size 8 --out stopped")[::2] == (130, "interrupted\n")
    assert end("stopped")["trainer"]["step"] == 5
    assert call("distill", "--resume stopped")[0] == 0
    assert same(end("stopped"), end(world / TCS))


def test_a_seed_inside_leaves_the_accelerators_random_numbers_alone(monkeypatch):
    """As on Apple's GPUs, which torch.random.fork_rng forgets: batches would repeat after every validation."""
    state = [torch.tensor([7])]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: state.__setitem__(0, torch.tensor([seed])))
    kept = dlm.Trainer(dlm.Transformer(dlm.Config(5, n_layer=1)), 10, 0.1).state()
    with pytest.raises(KeyError), dlm.seeded(0):
        assert state[0].item() == 0
        raise KeyError
    assert state[0].item() == 7
    state[0] = torch.tensor([8])
    dlm.Trainer(dlm.Transformer(dlm.Config(5, n_layer=1)), 10, 0.1).load(kept)
    assert state[0].item() == 7


@pytest.mark.filterwarnings("ignore:for ")
def test_a_resumed_trainer_lies_where_its_model_does(home):
    """A checkpoint is read to the CPU; `meta` stands for another device."""
    with dlm.seeded(0):
        model, _, ckpt = dlm.load(TCS, "")
        trainer = dlm.Trainer(model.to("meta"), 10, 0.1)
        trainer.load(ckpt["trainer"])
    assert {v.device.type for v in trainer.ema.values()} == {"meta"}
    assert {v.device.type for o in trainer.optimizers for s in o.state.values() for v in s.values() if v.dim()} == {"meta"}


def test_opdlm_goes_on_where_it_was_interrupted(call, monkeypatch):
    """Also in the middle of the steps whose rollouts are whole texts."""
    no_pictures(monkeypatch)
    argv = f"{TEXT} --method opdlm --block 4 --steps 10 --batch_size 8 --whole 0.5 --out"
    assert call("distill", f"{argv} whole")[0] == 0
    interrupt_at(monkeypatch, 2, 7)
    assert call("distill", f"{argv} stopped")[0] == call("distill", "--resume stopped")[0] == 130
    assert call("distill", "--resume stopped")[0] == 0
    assert same(end("stopped"), end("whole"))


@pytest.mark.parametrize("whole", [0, 1])
def test_opdlm_aims_at_what_the_teacher_says_of_the_rollout(call, monkeypatch, whole):
    """Not of the text it was written behind: x and y must reach the target as the rollout gave them."""
    no_pictures(monkeypatch)
    wrote, aimed, rollout, opdlm = [], [], dlm.rollout, dlm.opdlm
    monkeypatch.setattr(dlm, "rollout", lambda m, x, *way: wrote.append((x, *rollout(m, x, *way))) or wrote[-1][1:])
    monkeypatch.setattr(dlm, "opdlm", lambda t, x, y, b: aimed.append((x, y)) or opdlm(t, x, y, b))
    assert call("distill", f"{TEXT} --method opdlm --block 4 --steps 3 --batch_size 4 --whole {whole} --out run")[0] == 0
    for (behind, y, _), (x, of) in list(zip(wrote, aimed))[:4]:
        assert not torch.equal(behind, y) and torch.equal(of, y) and torch.equal(x, y if whole else behind)


def test_rollouts_that_lose_their_entropy_are_reported(call, monkeypatch, capsys):
    no_pictures(monkeypatch)
    argv = f"{TEXT} --method opdlm --block 4 --steps 2 --batch_size 4"
    code, out, err = call("distill", f"{argv} --out lively")
    assert code == 0 and "warning" not in out + err
    monkeypatch.setattr(distill, "FLOOR", 1.5)
    code, out, err = call("distill", f"{argv} --out dull")
    assert code == 0 and "nats of entropy" in out + err and "--lr" in out + err


def test_the_order_a_student_was_trained_for_is_the_one_it_writes_in(call, monkeypatch):
    no_pictures(monkeypatch)
    assert call("distill", f"{TEXT} --method opdlm --block 4 --steps 2 --batch_size 4 --order confidence --out run")[0] == 0
    asked, sample_ = [], dlm.sample
    monkeypatch.setattr(dlm, "sample", lambda m, z, n, order, *a, **k: asked.append(order) or sample_(m, z, n, order, *a, **k))
    for argv, order in [("", "confidence"), ("--order random", "random"), ("--threshold 0.5", "left")]:
        assert call("sample", f"--checkpoint run {argv}")[0] == 0 and asked.pop() == order
    assert call("sample", f"--checkpoint {TCS}")[0] == 0 and asked.pop() == "spread"


def test_the_gap_between_a_model_and_itself_is_none(world):
    teacher, other = (dlm.load(world / run, "")[0] for run in (AR, JUDGE))
    x = torch.randint(teacher.V, (8, 16))
    assert dlm.inference_gap(teacher, teacher, x) == pytest.approx((0, 0), abs=1e-6)
    assert min(dlm.inference_gap(other, teacher, x)) > 1e-3


def test_the_gap_is_measured_on_the_states_of_the_students_own_sampler(world, monkeypatch):
    (teacher, _, _), (student, _, _) = dlm.load(world / AR, ""), dlm.load(world / TCS, "")
    ways, rollout = [], dlm.rollout
    monkeypatch.setattr(dlm, "rollout", lambda model, x, *way: ways.append(way) or rollout(model, x, *way))
    dlm.inference_gap(student, teacher, torch.randint(teacher.V, (8, 16)), 2, "left")
    assert ways == [(2, "left")]


def test_student_tokens_are_counted(call, monkeypatch):
    """Slots of the student's network in 3 steps of 8 texts of 16: plain, 16 noisy and 12 clean ones; rollouts have 4 calls
    more of the noisy ones, and the first of the clean ones too; whole ones as many as generation needs."""
    no_pictures(monkeypatch)
    for argv, slots in [("--method plain", 28), ("--method opdlm", 28 + 4 * 16 + 12)]:
        assert call("distill", f"{ONE} --block 4 --steps 3 --batch_size 8 --out run --overwrite {argv}")[0] == 0
        assert metrics("run")["student_tokens"] == 3 * 8 * slots
    assert call("distill", f"{TEXT} --block 4 --steps 3 --batch_size 8 --out run --overwrite --method opdlm --whole 1")[0] == 0
    assert 28 < metrics("run")["student_tokens"] / 24 < 28 + 4 * 16 + 12


def interrupt_at(monkeypatch, *steps):
    """Ctrl-C during the update that follows each of these steps, once."""
    update, left = dlm.Trainer.update, set(steps)

    def interrupted(self, batch_loss):
        if self.step in left:
            left.remove(self.step)
            signal.raise_signal(signal.SIGINT)
        return update(self, batch_loss)

    monkeypatch.setattr(dlm.Trainer, "update", interrupted)


@pytest.mark.parametrize("steps", [[0], [3], [4], [29], [0, 1, 2, 17, 29]], ids=str)
def test_ctrl_c_at_any_step_changes_nothing(call, monkeypatch, steps):
    no_pictures(monkeypatch)
    argv = f"{TEXT} {SIZE} --steps 30 --dropout 0.1 --out"
    assert call("train", f"{argv} whole")[0] == 0
    interrupt_at(monkeypatch, *steps)
    code, out, err = call("train", f"{argv} stopped")
    for step in steps[1:]:
        assert code == 130
        code, out, err = call("train", "--resume stopped")
    assert code == 130 and end("stopped")["trainer"]["step"] == steps[-1] + 1
    assert call("train", "--resume stopped")[0] == 0
    assert same(end("stopped"), end("whole"))


def test_ctrl_c_works_as_before_afterwards(call, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt_at(monkeypatch, 3)
    assert call("train", f"{TEXT} {SIZE} --steps 9 --out stopped")[0] == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("script, busy", [("train", "load_text"), ("distill", "load_text"), ("sample", "sample")])
def test_ctrl_c_outside_training(call, monkeypatch, script, busy):
    monkeypatch.setattr(dlm, busy, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, _, err = call(script, "" if script == "sample" else f"{TEXT} --out run")
    assert code == 130 and err.endswith("interrupted\n") and "Traceback" not in err


def test_distilling_goes_on_with_an_interrupted_teacher(world, call, monkeypatch):
    for run in (AR, JUDGE, TCS):
        shutil.rmtree(run)
    for seed, step in ((0, 3), (1, 6)):
        with monkeypatch.context() as m:
            interrupt_at(m, step)
            assert call("train", f"{TEXT} {SIZE} --steps 10 --seed {seed}")[0] == 130
    assert end(AR)["trainer"]["step"] == 4 and end(JUDGE)["trainer"]["step"] == 7
    assert call("distill", f"{ONE} --block 4 --steps 10 --batch_size 8")[0] == 0
    for run in (AR, JUDGE, TCS):
        assert same(end(run), end(world / run))


@pytest.mark.parametrize("where", [AR, f"{AR}/checkpoint.pt"])
def test_resuming_a_finished_run_reports_again(call, where):
    before = end(AR), metrics(AR)["test_nats_per_token"]
    os.remove(f"{AR}/metrics.json")
    assert call("train", f"--resume {where}")[0] == 0
    assert same(before, (end(AR), metrics(AR)["test_nats_per_token"]))


def test_a_run_is_replaced_only_if_asked(call, refused):
    assert "--out" in refused("train", f"{TEXT} {SIZE} --steps 3")
    assert "--out" in refused("distill", f"{ONE} --block 4 --steps 3")
    assert call("train", f"{TEXT} {SIZE} --steps 3 --overwrite")[0] == 0
    assert metrics(AR)["options"]["steps"] == end(AR)["trainer"]["step"] == 3


# --- a full disk -------------------------------------------------------------------------------------------

def fill_disk(monkeypatch, how, after=0):
    """From its call number `after` on, `how` finds no space left."""
    calls = [0]

    def full(*_):
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:100])
            full()
            return super().write(bytes(data)[100:])

    if how == "write":
        monkeypatch.setattr(dlm, "open", lambda path, mode: Full(path, mode), raising=False)
    else:
        monkeypatch.setattr(os, how, full)


@pytest.mark.parametrize("how", ["fsync", "write", "replace"])
@pytest.mark.parametrize("script, argv", [("train", f"{TEXT} {SIZE} --steps 3 --overwrite"),
                                          ("distill", f"{ONE} --block 4 --steps 3 --overwrite"),
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
        code, _, err = call("train", f"{TEXT} {SIZE} --steps 10 --out run")
    assert code == 2 and "--out" in err and end("run")["trainer"]["step"] == min(10, after)
    assert call("train", "--resume run")[0] == 0
    assert same(end("run"), end(world / AR)) and not list(Path("run").glob("*.tmp"))


# --- bad input ---------------------------------------------------------------------------------------------

NO_TEXT = ["nowhere.txt", "empty", "binary", "few", "folder", AR + "/checkpoint.pt", "x" * 300]
NO_CHECKPOINT = ["nowhere", "empty", "binary", "few", "cut", "half", "noise", "dict", "list", "tensor", "code",
                 "folder", "tiny.txt", "x" * 300]
OPTION = {"train": ["--resume"], "distill": ["--resume", "--teacher", "--student"], "sample": ["--checkpoint"]}

COMMON = ["--nonsense 1", "--see 1", "--seed x", "--seed -1", "--seed 1.5", "--seed 99999999999999999999999", "--seed",
          "--device foo", "--device CPU"]
TRAIN = ["--n_layer 0", "--n_head 0", "--n_head -2", "--n_embd 0", "--context 0", "--context 1", "--context -5",
         "--context 100000", "--steps 0", "--steps -1", "--steps 1e3", "--batch_size 0", "--batch_size -8", "--lr nan",
         "--lr -1", "--lr inf", "--lr fast", "--dropout 1", "--dropout 1.5", "--dropout nan", "--dropout -0.1",
         "--n_embd 10 --n_head 4", "--n_embd 6 --n_head 2", "--n_embd 2 --n_head 4", "--block -1",
         "--block 17 --objective mdlm", "--objective mlm", "--tokenizer word", "--tokenizer bpe:255",
         "--tokenizer bpe:x", "--tokenizer gpt2:4", "--tokenizer a/b", "--out tiny.txt",
         "--out tiny.txt/run", "--out " + "x" * 300]
DISTILL = ["--method tsc", "--states texts", "--target top", "--divergence kl", "--divergence reverse", "--block 17",
           "--states teacher --method all", "--target onehot --method all",
           "--block 1", "--block -4", "--candidates 0", "--texts 3", "--fraction nan", "--fraction -1", "--fraction 1.01", "--steps 0", "--batch_size 0", "--lr nan", "--tokenizer word",
           f"--teacher {TCS}", f"--teacher {MDLM}", "--teacher runs/other", "--teacher runs/short",
           "--student runs/other", "--student runs/short", "--student teacher", "--out tiny.txt", "--order ancestral",
           "--whole 1.1", "--whole nan", "--block 5 --method opdlm", "--target onehot --states rollout",
           "--target topk --method opdlm", "--target exact --states rollout --whole 0.9"]
SAMPLE = ["--threshold 1.5", "--threshold -1", "--threshold nan", "--top_k -1", "--top_p 1.1", "--top_p nan",
          "--length -1", "--number 0", "--number -1", "--steps -1", "--temperature nan",
          "--temperature -1", "--temperature inf", "--order backwards", "--order spread --threshold 0.5", "--remask -1",
          "--prompt TheTheTheTheTheThe",
          "--prompt Thethethethethet", "--prompt The_of",
          "--prompt Théorème", "--prompt 42", "--length 2 --prompt The", "--length 4 --prompt The____"]


RIGHT = {"train": f"{TEXT} {SIZE} --steps 2 --out run ", "sample": "",
         "distill": f"{ONE} --block 4 --steps 2 --batch_size 8 --out run "}


def short(argv):
    return str(argv)[:40]


def first(argv):
    """What the error must name: the first option, whose value is wrong."""
    return argv.split()[0]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("argv", COMMON)
def test_option_that_is_wrong_everywhere(refused, script, argv):
    assert first(argv) in refused(script, RIGHT[script] + argv)


@pytest.mark.parametrize("argv", TRAIN, ids=short)
def test_option_that_is_wrong_in_training(refused, argv):
    assert first(argv) in refused("train", RIGHT["train"] + argv)


@pytest.mark.parametrize("argv", DISTILL)
def test_option_that_is_wrong_in_distilling(refused, monkeypatch, argv):
    monkeypatch.setattr(dlm.Trainer, "fit", lambda *_: pytest.fail("trained before it looked"))
    assert first(argv) in refused("distill", RIGHT["distill"] + argv)


@pytest.mark.parametrize("argv", SAMPLE)
def test_option_that_is_wrong_in_sampling(refused, argv):
    assert argv.split()[-2] in refused("sample", argv) or first(argv) in refused("sample", argv)


@SKIP_CUDA
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_gpu(refused, script):
    assert re.search("--device cuda.*cpu", refused(script, "--device cuda"))


@pytest.mark.parametrize("script", ["train", "distill"])
@pytest.mark.parametrize("name", NO_TEXT, ids=short)
def test_no_text(refused, script, name):
    teacher = f"--teacher {AR}" if script == "distill" else SIZE
    assert f"--data {name}" in refused(script, f"--tokenizer char --data {name} {teacher}")


@pytest.mark.parametrize("script, option", [(s, o) for s in SCRIPTS for o in OPTION[s]])
@pytest.mark.parametrize("name", NO_CHECKPOINT, ids=short)
def test_no_checkpoint(refused, script, option, name):
    rest = f"{TEXT} --block 4 --out run" if option in ("--teacher", "--student") else ""
    assert f"{option} {name}" in refused(script, f"{option} {name} {rest}")
    assert not Path("owned").exists()


@pytest.mark.parametrize("script, argv, option", [
    ("train", f"--resume {TCS}", "--resume"), ("distill", f"--resume {AR}", "--resume"),
    ("train", "--resume bare", "--resume"), ("distill", "--resume bare", "--resume"),
    ("train", f"--resume {AR} --steps 20", "--steps"), ("distill", f"--lr=1 --resume={TCS}", "--lr"),
    ("train", f"--overwrite --resume {AR}", "--overwrite")])
def test_what_cannot_be_resumed(refused, script, argv, option):
    assert option in refused(script, argv)


def test_a_run_of_an_older_version_cannot_be_resumed(refused):
    ckpt = torch.load(f"{AR}/checkpoint.pt", weights_only=True)
    ckpt["trainer"]["rng"] = ckpt["trainer"].pop("random")
    torch.save(ckpt, "older.pt")
    assert "--resume older.pt" in refused("train", "--resume older.pt")


def test_teacher_of_another_vocabulary_is_refused_before_its_judge_is_trained(refused, monkeypatch):
    monkeypatch.setattr(dlm.Trainer, "fit", lambda *_: pytest.fail("trained before it looked"))
    write_text("fresh.txt", ["words", "without", "a", "judge", "yet"])
    assert "--teacher runs/other" in refused("distill", "--data fresh.txt --method plain --teacher runs/other")


@pytest.mark.parametrize("run, role", [(AR, "--teacher"), (JUDGE, JUDGE)])
def test_broken_teacher_or_judge_that_was_found_not_given(refused, monkeypatch, run, role):
    monkeypatch.setattr(dlm.Trainer, "fit", lambda *_: pytest.fail("trained before it looked"))
    shutil.copy("half", f"{run}/checkpoint.pt")
    error = refused("distill", f"{ONE} --block 4 --out run")
    assert role in error and run in error
    options = {"--" + f.name for f in dataclasses.fields(distill.Options)}
    assert set(re.findall(r"--\w+", error)) <= options


def test_teacher_of_another_text_with_the_same_name_is_not_taken_for_this_one(refused, monkeypatch):
    monkeypatch.setattr(dlm.Trainer, "fit", lambda *_: pytest.fail("trained before it looked"))
    write_text("folder/tiny.txt", "Another text of the same name".split())
    error = refused("distill", "--data folder/tiny.txt --tokenizer char --block 4 --out run")
    assert re.search("--data|--teacher", error)


@pytest.mark.parametrize("script, argv, anew, folder", [
    ("train", f"--resume {AR}", [], AR), ("distill", f"--resume {TCS}", [AR], TCS),
    ("distill", f"{ONE} --block 4 --out run", [], AR), ("distill", f"{ONE} --block 4 --out run", [AR], JUDGE)])
def test_a_text_that_changed_since(refused, monkeypatch, script, argv, anew, folder):
    """Its parts are others now: a model that goes on, teaches or judges may have seen what is held out."""
    monkeypatch.setattr(dlm.Trainer, "fit", lambda *_: pytest.fail("trained before it looked"))
    with open("tiny.txt", "a") as f:
        f.write("One more statement.\n")
    for name in anew:
        ckpt = torch.load(f"{name}/checkpoint.pt")
        torch.save({**ckpt, "corpus": dlm.load_text("tiny.txt", "char", 16).sha256}, f"{name}/checkpoint.pt")
    assert folder in refused(script, argv)


def test_a_text_without_words_has_no_last_ones(home):
    Path("dots.txt").write_text("... !? ... --\n" * 2000)
    text = dlm.load_text("dots.txt", "char", 16)
    model = dlm.Transformer(dlm.Config(text.tokenizer.V, 16, 4, 1, 2, 16))
    assert dlm.passages(text) == [] and dlm.last_word_accuracy(model, [], text.tokenizer) == 0


def test_characters_that_are_left_out_are_counted(home, capsys):
    with open("tiny.txt", "a") as f:
        f.write("éééé\n")
    dlm.load_text("tiny.txt", dlm.load(AR, "")[1], 16)
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
    assert re.search("--tokenizer gpt2.*TIKTOKEN_CACHE_DIR", refused(script, "--data tiny.txt --tokenizer gpt2"))


@pytest.mark.parametrize("script, argv", [
    ("train", "--data nowhere.txt"), ("train", f"{TEXT} --tokenizer a/b"), ("distill", f"{ONE} --block 99"),
    ("train", f"{TEXT} --n_embd 10 --n_head 4")])
def test_what_is_refused_leaves_no_folder_behind(refused, home, script, argv):
    before = sorted(home.rglob("*"))
    refused(script, argv)
    assert sorted(home.rglob("*")) == before
