"""What can go wrong around a training: full disks, broken pipes and files, too little memory, Ctrl-C.
Nothing is lost, and what is said about it is one line."""
import dataclasses
import io
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distill
import dlm
import sample
import train_teacher
from dlm import UserError
from train_teacher import replace_file

ROOT = Path(__file__).parent.parent
MAIN = {"train": train_teacher.main, "distill": distill.main, "sample": sample.main}
FILE = {"train": "train_teacher.py", "distill": "distill.py", "sample": "sample.py"}
TRAIN = ("--data tiny.txt --tokenizer char --context 8 --n_layer 1 --n_head 2 --n_embd 8 "
         "--batch_size 4 --updates 10 --device cpu")
SAMPLE = "--checkpoint run --number 2 --device cpu"
UNIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files and signals")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A text and a run of it."""
    root = tmp_path_factory.mktemp("world")
    draw = random.Random(0)
    lines = [" ".join(draw.choices("the of an object end value is not".split(), k=9))
             for _ in range(300)]
    (root / "tiny.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(root)
        train_teacher.main(f"{TRAIN} --out run".split())
    return root


@pytest.fixture
def home(world, tmp_path, monkeypatch):
    """One's own copy of it, to break."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(home, monkeypatch, capsys):
    """call("train", "--updates 3 ...", "one more argument") -> exit code, stdout, stderr."""
    def call(script, argv="", *more):
        capsys.readouterr()
        with monkeypatch.context() as m:
            m.setattr(sys, "stdout", sys.stdout)    # run_script replaces them
            m.setattr(sys, "stderr", sys.stderr)
            with pytest.raises(SystemExit) as e:
                train_teacher.run_script(MAIN[script], [*argv.split(), *more])
        return e.value.code, *capsys.readouterr()
    return call


@pytest.fixture
def refused(call):
    """The same for what must be refused: exit code 2 and one line, which is returned."""
    def refused(script, argv="", *more):
        code, _, err = call(script, argv, *more)
        assert code == 2 and re.fullmatch(r"error: [^\n]+\n", err), err
        return err
    return refused


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests that train much: drawing takes longer than their training."""
    monkeypatch.setattr(train_teacher, "save_figure", lambda fig, path: None)


def start(script, argv, **how):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    return subprocess.Popen([sys.executable, str(ROOT / FILE[script]), *argv.split()], env=env,
                            stderr=subprocess.PIPE, text=True, **how)


def weights(folder):
    return train_teacher.load(folder, "--checkpoint")[0].state_dict()


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- files ----------------------------------------------------------------------------------------

def test_two_runs_that_write_one_file_do_not_meet(tmp_path, monkeypatch):
    """The inner one, another process, finishes while the outer one writes."""
    path = tmp_path / "file"

    def write(f):
        f.write(b"outer")
        with monkeypatch.context() as m:
            m.setattr(os, "getpid", lambda: 7)
            replace_file(path, lambda f: f.write(b"inner"))
        assert path.read_bytes() == b"inner"

    replace_file(path, write)
    assert path.read_bytes() == b"outer" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError, OSError])
def test_a_file_that_was_not_finished_leaves_nothing(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def write(f):
        f.write(b"half")
        raise error

    with pytest.raises(UserError if error is OSError else error):
        replace_file(path, write)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@UNIX
@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_file_is_not_replaced(call, home, kind):
    path = Path("a.gif")
    if kind == "device":
        path.symlink_to("/dev/full")        # so that a failing test replaces no real device
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    before = os.stat(path).st_mode
    code, out, err = call("sample", f"{SAMPLE} --gif {path}")
    assert code == 2 and out.count("---") == 2
    assert re.match(r"error: --gif: .* no ordinary file", err.splitlines()[-1])
    assert os.stat(path).st_mode == before


@UNIX
@pytest.mark.parametrize("name", ["cost $5", "$x^$", "a_$\\frac$", os.fsdecode(b"run-\xff"), "%s{0}"])
def test_any_name_of_a_folder(call, name):
    code, out, err = call("train", TRAIN, "--out", name)
    assert (code, err) == (0, "") and "checkpoint.pt" in out
    assert Path(name, "loss.png").stat().st_size > 5000
    assert call("train", "--resume", name)[0] == 0 and same_weights(name, "run")
    assert call("sample", "--checkpoint", name)[0] == 0


def test_cached_corpus_that_is_a_folder(refused, home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    (home / "dlm" / "tinyshakespeare.txt").mkdir(parents=True)
    assert re.search("--data shakespeare.*delete", refused("train", "--data shakespeare"))


# --- repeated text --------------------------------------------------------------------------------

LONG_LINES = [f"{i} is a line of 64 characters or more, which stand{'s' * 40} once\n"
              for i in range(100)]


def test_long_paragraphs_count_once(home, capsys):
    """And all that stand before and behind them stay as they are, in their order."""
    short = ["the same\n", "\n"] * 50
    lines = [line for pair in zip(short, LONG_LINES) for line in pair]
    Path("text.txt").write_text("".join(lines + LONG_LINES[3:10] + short))
    assert list(train_teacher.read_lines("text.txt")) == lines + short
    assert "note: --data text.txt repeats 7 paragraphs" in capsys.readouterr().out
    Path("text.txt").write_text("".join(lines + short))
    assert list(train_teacher.read_lines("text.txt")) == lines + short
    assert capsys.readouterr().out == ""


def test_held_out_text_is_not_trained_on(home):
    Path("text.txt").write_text("".join(LONG_LINES * 5))
    parts = train_teacher.split_corpus("text.txt")
    found = [set(part.splitlines()) for part in parts.values()]
    assert sum(map(len, found)) == len(set.union(*found)) == len(LONG_LINES)


# --- output that nobody reads ---------------------------------------------------------------------

@UNIX
def test_training_into_a_closed_pipe_loses_nothing(call, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, monkeypatch.context() as m:
        m.setattr(sys, "stdout", pipe)
        assert call("train", f"{TRAIN} --out new")[0] == 1
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), writer)               # or closing it would fail
    assert same_weights("new", "run")
    assert {p.name for p in Path("new").iterdir()} == {"checkpoint.pt", "loss.png", "metrics.json"}


@UNIX
def test_a_full_disk_behind_a_shell(home):
    """Nor does Python complain at the end."""
    with open("/dev/full", "w") as full:
        p = start("sample", SAMPLE, stdout=full)
    assert re.fullmatch("run.*\n", p.communicate(timeout=60)[1]) and p.returncode == 1


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def isatty(self):
        return True


def test_progress_that_nobody_reads(call, home, monkeypatch, no_pictures):
    monkeypatch.setattr(sys, "stderr", Broken())
    assert call("train", f"{TRAIN} --out quiet")[0] == 0 and same_weights("quiet", "run")
    monkeypatch.setattr(sys, "stderr", None)
    assert call("train", f"{TRAIN} --out quiet --overwrite")[0] == 0
    monkeypatch.setattr(sys, "stdout", None)
    assert call("train", f"{TRAIN} --out quiet --overwrite")[0] == 1
    assert same_weights("quiet", "run")


def test_progress_shows_the_loss(call, monkeypatch, no_pictures):
    shown = []

    class Bar(train_teacher.tqdm):
        def set_postfix(self, **values):
            shown.append((self.n, values["loss"], values["validation"]))

    monkeypatch.setattr(train_teacher, "tqdm", Bar)
    assert call("train", f"{TRAIN} --updates 300 --out long")[0] == 0
    history = train_teacher.load("long", "")[2]["trainer"]["history"]
    assert len(shown) == 30 and all(0 < loss < 9 for _, loss, _ in shown)
    assert shown[0][2] == "-" and shown[-1][2] == history[-1][3]


# --- broken checkpoints ---------------------------------------------------------------------------

def without(ckpt, *names):
    *before, last = names
    for name in before:
        ckpt = ckpt[name]
    del ckpt[last]


def put(ckpt, value, *names):
    *before, last = names
    for name in before:
        ckpt = ckpt[name]
    ckpt[last] = value


HEAD = ("weights", "head.weight")
BREAK = {
    **{f"no {name}": lambda c, name=name: without(c, name)
       for name in ("config", "weights", "tokenizer", "options", "format")},
    **{f"{name} {value}": lambda c, name=name, value=value: put(c, value, "config", name)
       for name, value in [("V", 10 ** 9), ("V", 2), ("V", -1), ("V", "x"), ("V", None),
                           ("L", 10 ** 12), ("L", 0), ("L", 8.0), ("b", 0), ("b", 99),
                           ("n_layer", 10 ** 9), ("n_layer", 0), ("n_layer", 2),
                           ("n_head", 3), ("n_head", 0), ("n_embd", 10 ** 9), ("n_embd", 8.0),
                           ("n_embd", math.nan), ("new", 1)]},
    "config without V": lambda c: without(c, "config", "V"),
    "config of 3": lambda c: put(c, 3, "config"),
    "weights of None": lambda c: put(c, None, "weights"),
    "a weight less": lambda c: without(c, *HEAD),
    "a weight more": lambda c: put(c, torch.ones(3), "weights", "new"),
    "a weight too large": lambda c: put(c, torch.ones(99, 8), *HEAD),
    "a weight turned": lambda c: put(c, c["weights"]["head.weight"].T, *HEAD),
    "nan": lambda c: put(c, c["weights"]["head.weight"] * math.nan, *HEAD),
    "one inf": lambda c: c["weights"]["head.weight"][0, 0].fill_(math.inf),
    "tokenizer of another kind": lambda c: put(c, "word", "tokenizer", "kind"),
    "tokenizer with less": lambda c: put(c, ["a"], "tokenizer", "pieces"),
    "tokenizer of None": lambda c: put(c, None, "tokenizer"),
    "options of None": lambda c: put(c, None, "options"),
    "another format": lambda c: put(c, "dlm checkpoint 0", "format"),
}


@pytest.mark.parametrize("how", BREAK)
def test_checkpoint_with_wrong_contents(refused, monkeypatch, how):
    ckpt = torch.load("run/checkpoint.pt", weights_only=True)
    BREAK[how](ckpt)
    torch.save(ckpt, "broken.pt")
    assert refused("sample", "--checkpoint broken.pt").startswith("error: --checkpoint broken.pt: ")
    assert refused("distill", "--teacher broken.pt").startswith("error: ")


@pytest.mark.parametrize("how", ["L 1000000000000", "V 1000000000", "n_layer 1000000000"])
def test_sizes_are_looked_at_before_memory_is_taken(home, monkeypatch, how):
    ckpt = torch.load("run/checkpoint.pt", weights_only=True)
    BREAK[how](ckpt)
    torch.save(ckpt, "broken.pt")
    monkeypatch.setattr(dlm, "Transformer", lambda c: pytest.fail("made the model"))
    with pytest.raises(UserError, match="--teacher broken.pt: "):
        train_teacher.load("broken.pt", "--teacher")


def test_checkpoint_that_needs_the_network_says_so(refused, monkeypatch):
    ckpt = torch.load("run/checkpoint.pt", weights_only=True)
    put(ckpt, "gpt2", "tokenizer", "kind")
    torch.save(ckpt, "other.pt")

    def offline(name):
        raise OSError("unreachable")

    monkeypatch.setattr(train_teacher.tiktoken, "get_encoding", offline)
    message = refused("sample", "--checkpoint other.pt")
    assert re.match("error: --checkpoint other.pt: --tokenizer gpt2: .*TIKTOKEN_CACHE_DIR", message)


@pytest.mark.parametrize("part, value", [
    ("done", None), ("random", [torch.zeros(3)]), ("model", {}), ("optimizers", [{}, {}]),
    ("ema", {})])
def test_state_of_a_training_that_is_broken(refused, part, value):
    ckpt = torch.load("run/checkpoint.pt", weights_only=True)
    if value is None:
        del ckpt["trainer"][part]
    else:
        ckpt["trainer"][part] = value
    torch.save(ckpt, "broken.pt")
    assert "--resume broken.pt" in refused("train", "--resume broken.pt")


# --- too little memory ----------------------------------------------------------------------------

@pytest.mark.parametrize("script, argv, named", [
    ("train", f"{TRAIN} --out big --n_embd 1000000", "--n_embd.* GB .*smaller"),
    ("train", f"{TRAIN} --out big --n_embd 1000000000000", "--n_embd.* GB .*smaller"),
    ("train", f"{TRAIN} --out big --n_layer 1000000000000", "--n_layer"),
    ("train", f"{TRAIN} --out big --batch_size 1000000000000", "--batch_size"),
    ("sample", f"{SAMPLE} --length 1000000000000", "--length"),
    ("sample", f"{SAMPLE} --length 9000000000000000000", "--length")])
def test_sizes_beyond_memory(call, script, argv, named):
    code, _, err = call(script, argv)
    assert code == 2 and re.fullmatch(f"error: .*{named}.*\n", err)


@pytest.mark.parametrize("error, known", [
    (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
    (RuntimeError("MPS backend out of memory"), True),
    (RuntimeError("an illegal memory access"), False), (RuntimeError("shapes differ"), False)])
def test_only_a_lack_of_memory_is_taken_for_one(capsys, monkeypatch, error, known):
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit if known else RuntimeError):
        train_teacher.run_script(main, [])
    assert capsys.readouterr().err.startswith("error: out of memory") == known


# --- a training that fails ------------------------------------------------------------------------

def test_loss_that_is_no_number_keeps_what_was_there(refused, home, monkeypatch, no_pictures):
    loss = dlm.loss
    calls = []

    def breaks(*args):
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) > 7 else 1)

    with monkeypatch.context() as m:
        m.setattr(dlm, "loss", breaks)
        assert "--lr" in refused("train", f"{TRAIN} --out new")
    state = train_teacher.load("new", "")[2]["trainer"]
    assert 0 < state["done"] < 10 and all(w.isfinite().all() for w in weights("new").values())
    assert "--lr" in refused("train", f"{TRAIN} --out none --lr 1e30")
    assert list(home.glob("*/*.tmp")) == []


# --- command lines and Ctrl-C ---------------------------------------------------------------------

@pytest.mark.parametrize("script, option", [("sample", "--prompt"), ("sample", "--stop"),
                                            ("train", "--out"), ("distill", "--teacher")])
def test_two_dashes_are_no_value(refused, script, option):
    """Python 3.12 and before lose them, later ones do not."""
    assert f"{option}=--" in refused(script, f"{option}=--")


def test_a_prompt_with_two_dashes_inside(call):
    assert "vocabulary has no '-'" in call("sample", f"{SAMPLE} --prompt=a=--")[2]


@UNIX
@pytest.mark.parametrize("script", FILE)
def test_ctrl_c_while_torch_is_imported(tmp_path, script):
    """`torch` stands here for one that is being imported when the signal comes."""
    (tmp_path / "torch.py").write_text("import os, signal, time\n"
                                       "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    p = start(script, "", env={"PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE)
    assert p.communicate(timeout=60) == ("", "") and p.returncode == 130


@pytest.mark.parametrize("script", FILE)
def test_importing_a_script_leaves_signals_alone(tmp_path, script):
    """`torch` stands here for one that cannot be imported, which is quick."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')\n")
    module = FILE[script].removesuffix(".py")
    code = (f"import signal\nbefore = signal.getsignal(signal.SIGINT)\ntry:\n    import {module}\n"
            "except ImportError as e:\n    assert str(e) == 'no torch'\n"
            "assert signal.getsignal(signal.SIGINT) is before")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True,
                   env={**os.environ, "PYTHONPATH": str(tmp_path)})
