"""Corpora, their split and the tokenizers: nothing lost, nothing leaked, the same on every machine."""
import hashlib
import http.client
import io
import os
import random
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import tiktoken
import torch

import dlm
from dlm import Tokenizer, UserError

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
PARTS = ("train", "val", "test")
UNICODE = "naïve Ünïcödé, 中文字符 and العربية;\n\t 🙂👩‍👩‍👧 e\u0301 \u2028\x1c\x00 ___ don't  stop\r\n"


def overlap(train, held, n=64):
    """Share of the n-character windows of `held` that stand verbatim in `train`."""
    seen = {train[i:i + n] for i in range(len(train) - n + 1)}
    return sum(held[i:i + n] in seen for i in range(len(held) - n + 1)) / max(1, len(held) - n + 1)


@pytest.fixture(scope="module")
def docs():
    return dlm.split_corpus("docs")


@pytest.fixture
def text_file(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "text.txt"
        path.write_bytes(text.encode(encoding))
        return str(path)
    return write


# --- corpora and splits ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["docs", "arithmetic"])
def test_split_is_90_5_5(name):
    size = {part: len(text) for part, text in dlm.split_corpus(name).items()}
    for part, share in zip(PARTS, (0.90, 0.05, 0.05)):
        assert size[part] / sum(size.values()) == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize("name", ["docs", "arithmetic"])
def test_split_is_the_same_whatever_the_random_state(name):
    before = random.getstate()
    first = dlm.split_corpus(name)
    assert random.getstate() == before
    random.seed(1)
    assert dlm.split_corpus(name) == first


def test_split_and_vocabulary_are_the_same_in_another_process():
    say = "import dlm; t = dlm.load_text('docs', 'bpe:280', 64); print(t.sha256, hash(tuple(t.parts['val'].tolist())))"
    run = subprocess.run([sys.executable, "-c", say], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"})
    text = dlm.load_text("docs", "bpe:280", 64)
    assert run.stdout.split() == [text.sha256, str(hash(tuple(text.parts["val"].tolist())))], run.stderr


@pytest.mark.parametrize("part", ["val", "test"])
def test_held_out_docs_do_not_stand_in_the_training_part(docs, part):
    assert overlap(docs["train"], docs[part]) < 0.02


def test_overlap_counts_windows():
    assert overlap("abcdef", "abcdef", 3) == 1
    assert overlap("abcdef", "abcxef", 3) == 1 / 4
    assert overlap("abcdef", "ab", 3) == 0


def test_no_line_of_docs_is_in_two_parts(docs):
    lines = [set(docs[part].splitlines()) for part in PARTS]
    assert sum(map(len, lines)) == len(set.union(*lines)) == len(docs["train"].splitlines() + docs["val"].splitlines()
                                                                 + docs["test"].splitlines())


def test_docs_are_prose(docs):
    text = "".join(docs.values())
    assert 150_000 < len(text) < 1_000_000
    assert not re.search(r"[^\S\n]{2}|\n\n|\t|\r", text)
    assert min(map(len, text.splitlines())) >= 20


def test_docs_parts_are_whole_paragraphs(docs):
    assert Counter(line for text in docs.values() for line in text.splitlines(True)) == Counter(dlm.docs())


def test_python_without_topics_is_told_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="--data docs.*text file"):
        dlm.split_corpus("docs")


def test_arithmetic_lines_are_right_sums_of_fixed_width():
    lines = "".join(dlm.arithmetic()).splitlines()
    found = [re.fullmatch(r"(\d\d)\+(\d\d)=(\d\d\d)", line).groups() for line in lines]
    assert all(int(a) + int(b) == int(c) for a, b, c in found)
    assert len(lines) == len({(a, b) for a, b, _ in found}) == 10_000


def test_arithmetic_keeps_a_pair_and_its_twin_in_one_part():
    part_of = {line[:5]: part for part, text in dlm.split_corpus("arithmetic").items() for line in text.splitlines()}
    assert len(part_of) == 10_000
    assert all(part_of[pair[3:] + "+" + pair[:2]] == part for pair, part in part_of.items())


LINES = "".join(f"{i} is a line of {'many ' * (i % 40)}words ünd 🙂\n" for i in range(500))
LONG = "".join(f"{i:06d}," for i in range(3000))  # no newline at all


@pytest.mark.parametrize("text", [LINES, LINES[:-1], LINES + "no newline", LONG, LONG + "\n" + LINES, "\n\n" + LINES,
                                  LINES.replace("\n", "\x0b"), LONG[:6000]],
                         ids=["lines", "last line open", "a tail", "one line", "both", "blanks", "tabs", "least"])
def test_split_loses_and_repeats_no_character(text_file, text):
    parts = dlm.split_corpus(text_file(text))
    assert sorted(parts) == sorted(PARTS) and all(parts.values())
    assert Counter("".join(parts.values())) == Counter(text)


@pytest.mark.parametrize("text", [LINES, LONG], ids=["lines", "one line"])
def test_held_out_parts_of_a_short_text_are_one_chunk_each(text_file, text):
    parts = dlm.split_corpus(text_file(text))
    for part in ("val", "test"):
        assert parts[part] in text and parts[part] not in parts["train"]
        assert dlm.CHUNK <= len(parts[part]) < 2 * dlm.CHUNK


def test_chunks_end_at_line_ends(text_file):
    for part in dlm.split_corpus(text_file(LINES)).values():
        assert part.endswith("\n") and set(part.splitlines()) <= set(LINES.splitlines())


def test_one_long_line_is_cut_into_chunks(text_file):
    parts = dlm.split_corpus(text_file(LONG))
    assert len(parts["val"]) == len(parts["test"]) == dlm.CHUNK


def test_windows_line_ends_are_read_as_newlines(text_file):
    assert dlm.split_corpus(text_file(LINES.replace("\n", "\r\n"))) == dlm.split_corpus(text_file(LINES))


@pytest.mark.parametrize("width", [100, 1500, 1999, 2500, 3999, 10 ** 6])
def test_as_many_characters_as_the_message_asks_for_are_enough(text_file, width):
    with pytest.raises(UserError) as e:
        dlm.split_corpus(text_file("short"))
    size = int(re.search(r"(\d+) or more", str(e.value))[1])
    text = "".join("x" * (width - 1) + "\n" for _ in range(size // width + 1))[:size]
    assert sum(map(len, dlm.split_corpus(text_file(text)).values())) == size


@pytest.mark.parametrize("text, why", [("", "too short"), ("short", "too short"), ("x" * 3999, "too short")])
def test_too_short_a_file(text_file, text, why):
    with pytest.raises(UserError, match=f"--data .*text.txt: {why}"):
        dlm.split_corpus(text_file(text))


@pytest.mark.parametrize("make, why", [(lambda p: None, "cannot be read"), (lambda p: p.mkdir(), "cannot be read"),
                                       (lambda p: p.write_bytes(bytes(range(256)) * 99), "not UTF-8"),
                                       (lambda p: p.write_bytes(LINES.encode("utf-16")), "not UTF-8")],
                         ids=["missing", "folder", "binary", "utf-16"])
def test_file_that_is_no_text(tmp_path, make, why):
    make(tmp_path / "text")
    with pytest.raises(UserError, match=f"--data .*text: .*{why}.*docs"):
        dlm.split_corpus(str(tmp_path / "text"))


# --- tinyshakespeare, never downloaded here ----------------------------------------------------------------

@pytest.fixture
def cached(monkeypatch, tmp_path):
    """The place of the cached file; whoever reaches for the network fails the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("reached for the network"))
    return tmp_path / "dlm" / "tinyshakespeare.txt"


def serve(monkeypatch, answer):
    asked = []

    def urlopen(url, *_, **__):
        asked.append(url)
        if isinstance(answer, Exception):
            raise answer
        return answer if hasattr(answer, "read") else io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def expect(monkeypatch, data):
    monkeypatch.setattr(dlm, "SHAKESPEARE", (dlm.SHAKESPEARE[0], hashlib.sha256(data).hexdigest()))


def test_shakespeare_is_downloaded_once(monkeypatch, cached):
    play = LINES.encode()
    expect(monkeypatch, play)
    asked = serve(monkeypatch, play)
    assert "".join(dlm.shakespeare()) == "".join(dlm.shakespeare()) == LINES
    assert asked == [dlm.SHAKESPEARE[0]] and cached.read_bytes() == play
    assert [p.name for p in cached.parent.iterdir()] == [cached.name]


def test_shakespeare_with_a_wrong_checksum_says_what_to_delete(monkeypatch, cached):
    serve(monkeypatch, b"<html>please log in</html>")
    for _ in range(2):
        with pytest.raises(UserError, match="--data shakespeare.*checksum.*delete it") as e:
            dlm.shakespeare()
        assert str(cached) in str(e.value)
    cached.unlink(missing_ok=True)
    expect(monkeypatch, LINES.encode())
    serve(monkeypatch, LINES.encode())
    assert "".join(dlm.shakespeare()) == LINES


def test_cached_file_of_somebody_else_is_left_alone(cached):
    cached.parent.mkdir()
    cached.write_text("mine")
    with pytest.raises(UserError, match="checksum"):
        dlm.shakespeare()
    assert cached.read_text() == "mine"


class CutOff:
    def read(self):
        raise http.client.IncompleteRead(b"First Citizen:", 1115380)


@pytest.mark.parametrize("answer", [urllib.error.URLError("unreachable"), TimeoutError("timed out"),
                                    urllib.error.HTTPError("", 404, "Not Found", None, None), CutOff()],
                         ids=["offline", "slow", "gone", "cut off"])
def test_shakespeare_without_the_network_names_the_way_out(monkeypatch, cached, answer):
    serve(monkeypatch, answer)
    with pytest.raises(UserError, match="--data shakespeare: no network.*--data docs") as e:
        dlm.shakespeare()
    assert str(cached) in str(e.value) and not cached.exists()


def test_shakespeare_itself(cached):
    if not (SHARED / "data" / "tinyshakespeare.txt").exists():
        pytest.skip("needs ../shared/data/tinyshakespeare.txt")
    cached.parent.mkdir()
    shutil.copyfile(SHARED / "data" / "tinyshakespeare.txt", cached)
    parts = dlm.split_corpus("shakespeare")
    assert sum(map(len, parts.values())) == 1_115_394
    assert max(overlap(parts["train"], parts[p]) for p in ("val", "test")) < 0.02


# --- tokenizers --------------------------------------------------------------------------------------------

SMALL = "the cat sat on the mat, the rat sat on the cat; aaaa aaa aa baaab bananas in cabanas 🙂🙂 ünd üb\n" * 3


def brute_force_bpe(text, V):
    """Recounts every pair before every merge; the most frequent first, of equals the greatest."""
    words = [[bytes([c]) for c in w.encode()] for w in re.findall(dlm.WORDS, text)]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < V:
        pairs = Counter(pair for w in words for pair in zip(w, w[1:]))
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(b"".join(best))
        for w in words:
            i = 0
            while i < len(w) - 1:
                if (w[i], w[i + 1]) == best:
                    w[i:i + 2] = [b"".join(best)]
                i += 1
    return tokens


def copies(tokenizer, tmp_path):
    torch.save(tokenizer.state(), tmp_path / "tokenizer.pt")
    return [Tokenizer(**tokenizer.state()), Tokenizer(**torch.load(tmp_path / "tokenizer.pt", weights_only=True))]


@pytest.mark.parametrize("text", [SMALL, UNICODE, "aaaaaaaaaaaaaaaa", "ababab bababa abba", ""],
                         ids=["words", "unicode", "a", "ab", "nothing"])
@pytest.mark.parametrize("V", [256, 261, 290, 400])
def test_bpe_merges_are_those_of_brute_force(text, V):
    assert dlm.train_bpe(text, V) == brute_force_bpe(text, V)


def test_bpe_tokens_are_all_different():
    tokens = dlm.train_bpe(SMALL + UNICODE, 2000)
    assert len(set(tokens)) == len(tokens) < 2000  # stops when every word is one token


@pytest.mark.parametrize("text", [UNICODE, SMALL, "🙂", "", "words never seen: Ωμέγα", "\U0010ffff"])
def test_bpe_brings_any_text_back(text):
    tokenizer = Tokenizer.train("bpe:300", SMALL)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bpe_encodes_with_tiktoken():
    tokenizer = Tokenizer.train("bpe:290", SMALL)
    assert isinstance(tokenizer.bpe, tiktoken.Encoding)
    ids = tokenizer.encode(SMALL)
    assert ids.dtype == torch.long and 0 <= ids.min() and ids.max() < tokenizer.V == 290
    assert len(ids) < 0.6 * len(SMALL.encode())
    assert not any(re.search(r"\S\s", tokenizer.decode([i])) for i in range(256, 290))  # no token spans two words


def test_half_a_character_decodes_without_failing():
    tokenizer = Tokenizer.train("bpe:256", SMALL)
    assert tokenizer.decode(tokenizer.encode("🙂")[:2]) == "\ufffd"


@pytest.mark.parametrize("spec, V", [("char", len(set(SMALL))), ("bpe:256", 256), ("bpe:270", 270)])
def test_size_of_the_vocabulary(spec, V):
    assert Tokenizer.train(spec, SMALL).V == V


def test_bpe_has_1024_tokens_unless_told():
    varied = " ".join(hashlib.sha256(bytes([i])).hexdigest() for i in range(50))
    assert Tokenizer.train("bpe", varied).V == 1024


@pytest.mark.parametrize("spec", ["char", "bpe:280"])
def test_tokenizer_survives_its_state(spec, tmp_path):
    tokenizer = Tokenizer.train(spec, SMALL)
    for copy in copies(tokenizer, tmp_path):
        assert copy.state() == tokenizer.state() and copy.V == tokenizer.V
        assert torch.equal(copy.encode(SMALL), tokenizer.encode(SMALL)) and copy.decode(copy.encode(SMALL)) == SMALL


@pytest.mark.parametrize("text", [UNICODE, SMALL, "x"])
def test_char_brings_its_text_back(text):
    tokenizer = Tokenizer.train("char", text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and sorted(ids.unique().tolist()) == list(range(tokenizer.V))


def test_char_names_the_option_of_an_unknown_character():
    tokenizer = Tokenizer.train("char", "abc\n")
    with pytest.raises(UserError, match=r"--prompt: .*'!' 'x' '\\t'|--prompt: .*'\\t' '!' 'x'") as e:
        tokenizer.encode("ab\tx!", "--prompt")
    assert "\n" not in str(e.value)


def test_char_leaves_unknown_characters_out_if_asked():
    tokenizer = Tokenizer.train("char", "abc\n")
    assert tokenizer.decode(tokenizer.encode("abxc!", unknown="drop")) == "abc"


@pytest.mark.parametrize("spec", ["", "word", "Char", "char:5", "bpe:255", "bpe:-300", "bpe:1e3", "bpe:many", "bpe:²",
                                  "bpe 300", "gpt2:5", "gpt3"])
def test_bad_tokenizer_is_named(spec):
    with pytest.raises(UserError, match=f"^--tokenizer {re.escape(spec)}: "):
        Tokenizer.train(spec, SMALL)


def test_gpt2_without_the_network_names_the_way_out(monkeypatch):
    def get_encoding(name):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    for make in (lambda: Tokenizer.train("gpt2", SMALL), lambda: Tokenizer("gpt2")):
        with pytest.raises(UserError, match="--tokenizer gpt2: .*TIKTOKEN_CACHE_DIR.*--tokenizer bpe"):
            make()


def test_gpt2_itself(monkeypatch, tmp_path):
    if not (SHARED / "tiktoken_cache").is_dir():
        pytest.skip("needs ../shared/tiktoken_cache")
    shutil.copytree(SHARED / "tiktoken_cache", tmp_path / "cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    tokenizer = Tokenizer.train("gpt2", "")
    assert tokenizer.V == 50257 and tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert tokenizer.decode(tokenizer.encode(UNICODE)) == UNICODE
    assert tokenizer.encode("<|endoftext|>").tolist() != [50256]  # in a text it is only text
    for copy in copies(tokenizer, tmp_path):
        assert torch.equal(copy.encode(SMALL), tokenizer.encode(SMALL))


# --- tokenised corpora and their windows -------------------------------------------------------------------

def test_load_text_learns_from_the_training_part_only(text_file):
    name = text_file(LONG)
    texts, text = dlm.split_corpus(name), dlm.load_text(name, "char", 16)
    assert text.tokenizer.pieces == sorted(set(texts["train"]))
    assert text.words == set(re.findall(r"\w+", texts["train"]))
    assert {p: text.tokenizer.decode(text.parts[p]) for p in PARTS} == texts and text.chars_per_token == 1


def test_sha256_tells_texts_apart(text_file):
    one, same, other = (dlm.load_text(text_file(t), "char", 16).sha256 for t in (LINES, LINES, LINES[:-2] + "!\n"))
    assert one == same != other and re.fullmatch("[0-9a-f]{64}", one)


def test_characters_a_token_of_the_test_part(text_file):
    name = text_file(LINES)
    text = dlm.load_text(name, "bpe:300", 16)
    assert text.chars_per_token == len(dlm.split_corpus(name)["test"]) / len(text.parts["test"]) > 1


@pytest.mark.parametrize("L", [dlm.CHUNK, 10 ** 6])
def test_context_longer_than_a_part_names_both_options(text_file, L):
    with pytest.raises(UserError, match=rf"--data .*text.txt.*--context is {L}"):
        dlm.load_text(text_file(LONG), "char", L)


@pytest.mark.parametrize("n, L", [(10, 3), (10, 10), (5, 1)])
def test_windows_are_verbatim_and_reach_both_ends(n, L):
    ids = 100 + torch.arange(n)
    x = dlm.windows(ids, 500, L)
    assert x.shape == (500, L) and bool((x == x[:, :1] + torch.arange(L)).all())
    assert set(x[:, 0].tolist()) == set(range(100, 100 + n - L + 1))  # every start, the last one too


@pytest.mark.parametrize("n, L, limit, rows", [(10, 3, None, 3), (10, 3, 2, 2), (9, 3, 7, 3), (2, 3, 5, 0), (5, 1, 4, 4)])
def test_consecutive_windows_follow_one_another(n, L, limit, rows):
    x = dlm.consecutive(torch.arange(n), L, limit)
    assert x.shape == (rows, L) and x.flatten().tolist() == list(range(rows * L))
