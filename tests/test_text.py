"""Corpora, their split, the tokenizers: nothing lost or leaked, and the same on every machine."""
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

import train_teacher
from dlm import UserError
from train_teacher import (CHUNK, WORDS, Tokenizer, consecutive, load_corpus, split_corpus,
                           train_bpe, windows)

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
    return split_corpus("docs")


@pytest.fixture
def text_file(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "text.txt"
        path.write_bytes(text.encode(encoding))
        return str(path)
    return write


# --- corpora and splits ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["docs", "stories"])
def test_split_is_90_5_5(name):
    size = {part: len(text) for part, text in split_corpus(name).items()}
    for part, share in zip(PARTS, (0.90, 0.05, 0.05)):
        assert size[part] / sum(size.values()) == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize("name", ["docs", "stories"])
def test_split_is_the_same_whatever_the_random_state(name):
    before = random.getstate()
    first = split_corpus(name)
    assert random.getstate() == before
    random.seed(1)
    assert split_corpus(name) == first


def test_split_and_vocabulary_are_the_same_in_another_process():
    code = ("import train_teacher; corpus = train_teacher.load_corpus('docs', 'bpe:280', 64); "
            "print(corpus.sha256, hash(tuple(corpus.parts['val'].tolist())))")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"})
    corpus = load_corpus("docs", "bpe:280", 64)
    ids = tuple(corpus.parts["val"].tolist())
    assert run.stdout.split() == [corpus.sha256, str(hash(ids))], run.stderr


@pytest.mark.parametrize("part", ["val", "test"])
def test_held_out_docs_do_not_stand_in_the_training_part(docs, part):
    assert overlap(docs["train"], docs[part]) < 0.02


def test_overlap_counts_windows():
    assert overlap("abcdef", "abcdef", 3) == 1
    assert overlap("abcdef", "abcxef", 3) == 1 / 4
    assert overlap("abcdef", "ab", 3) == 0


def test_no_line_of_docs_is_in_two_parts(docs):
    lines = [line for part in PARTS for line in docs[part].splitlines()]
    assert len(lines) == len(set(lines))


def test_docs_are_prose(docs):
    text = "".join(docs.values())
    assert 150_000 < len(text) < 1_000_000
    assert not re.search(r"[^\S\n]{2}|\n\n|\t|\r", text)
    assert min(map(len, text.splitlines())) >= 20


def test_docs_parts_are_whole_paragraphs(docs):
    lines = [line for text in docs.values() for line in text.splitlines(keepends=True)]
    assert Counter(lines) == Counter(train_teacher.docs())


def test_python_without_topics_is_told_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="--data docs.*text file"):
        split_corpus("docs")


def test_stories_are_right_and_told_once():
    lines = [line.rstrip("\n") for line in train_teacher.stories()]
    assert 7500 < len(lines) == len(set(lines))
    assert all(train_teacher.marked(line) == line for line in lines)
    for form in train_teacher.FORMS:                         # each form is a quarter of them
        start = form.format_map({"A": r"\w+", "m": r"\d+", "colour": r"\w+", "thing": r"\w+",
                                 "B": r"\w+", "n": r"\d+", "she": "(she|he)", "her": "(her|him)",
                                 "sum": r"\d+", "rest": r"\d+"})
        share = sum(bool(re.fullmatch(start, line)) for line in lines) / len(lines)
        assert share == pytest.approx(0.25, abs=0.03)


def test_wrong_words_of_whole_stories_are_marked():
    right = "Mia had 7 red cups. Leo gave her 5 more. Now she has 12 red cups."
    two_wrong = "Mia had 7 red cups. Leo gave him 5 more. Now she has 13 red cups."
    two_marked = "Mia had 7 red cups. Leo gave *him* 5 more. Now she has *13* red cups."
    no_story = "Mia had cups cups."
    text = "\n".join(["cut off", right, two_wrong, no_story, "Leo had 7"])
    marked = "\n".join(["cut off", right, two_marked, f"*{no_story}*", "Leo had 7"])
    assert train_teacher.with_marks(text) == marked
    assert train_teacher.with_marks("no line end") == "no line end"


@pytest.mark.parametrize("marked", [
    "Mia had 7 red cups. Leo gave her 5 more. Now she has 12 red cups.",
    "Mia had 7 red cups. Leo gave her 5 more. Now she has *13* red cups.",
    "Mia had 7 red cups. Leo gave *him* 5 more. Now *he* has 12 red cups.",
    "Mia had 7 *red* *cups*. Leo gave her 5 more. Now she has 12 *blue* *hats*.",
    "Mia had 7 red cups. *Mia* gave her 5 more. Now she has 12 red cups.",
    "*Lia* had 7 red cups. Leo gave her 5 more. Now she has 12 red cups.",
    "Mia had *many* red cups. Leo gave her 5 more. Now she has 12 red cups.",
    "Mia had 7 *rude* cups. Leo gave her 5 more. Now she has 12 *rude* cups.",
    "Tom had 9 red kites. Eve took 4 from him. Now he has 5 red kites.",
    "Tom had 9 red kites. Eve took 4 from him. Now he has *6* red kites.",
    "Zoe has 2 black pens. Sam has 2. Together they have 4 black pens.",
    "Zoe has 2 black *pens*. Sam has 2. Together they have 4 black *balls*.",
    "Zoe saw 2 black pens. Sam saw 3 more than she did. So Sam saw 5.",
    "Zoe saw 2 black pens. *Sam* saw 3 more than *he* did. So *Zoe* saw 5.",
    "*Zoe saw 2 black pens. Sam saw 3 more than she did. So Sam saw.*",
    "*Zoe saw 2 black pens. Sam saw 3 more than she did. So Sam saw 5. *",
    "**"])
def test_marks_of_a_story(marked):
    assert train_teacher.marked(marked.replace("*", "")) == marked


def test_marks_of_stories():
    right = "Zoe has 2 black pens. Sam has 2. Together they have 4 black pens."
    wrong = right.replace("4", "5")
    texts = [f"begin.\n{right}\n{wrong}\n{right}\nend", "no whole one", f"{right}\n\nend"]
    marks = train_teacher.mark_stories(texts, f"{wrong}\n")
    assert marks["stories"] == 4                             # an empty line is one, a wrong one
    assert marks["right"] == 2 / 4 and marks["right_se"] == 1 / 4
    assert marks["distinct"] == 3 / 4 and marks["known"] == 1 / 4
    assert train_teacher.mark_stories([], "")["right"] == 0


def test_no_story_of_the_training_part_is_in_the_others():
    texts = split_corpus("stories")
    found = {part: set(texts[part].splitlines()) for part in PARTS}
    assert found["train"].isdisjoint(found["val"] | found["test"])
    assert found["val"].isdisjoint(found["test"])


LINES = "".join(f"{i} is a line of {'many ' * (i % 40)}words ünd 🙂\n" for i in range(500))
LONG = "".join(f"{i:06d}," for i in range(3000))  # no newline at all


@pytest.mark.parametrize("text", [
    LINES, LINES[:-1], LINES + "no newline", LONG, LONG + "\n" + LINES, "\n\n" + LINES,
    LINES.replace("\n", "\x0b"), LONG[:6000]], ids=[
    "lines", "last line open", "a tail", "one line", "both", "blanks", "tabs", "least"])
def test_split_loses_and_repeats_no_character(text_file, text):
    parts = split_corpus(text_file(text))
    assert sorted(parts) == sorted(PARTS) and all(parts.values())
    assert Counter("".join(parts.values())) == Counter(text)


@pytest.mark.parametrize("text", [LINES, LONG], ids=["lines", "one line"])
def test_held_out_parts_of_a_short_text_are_one_chunk_each(text_file, text):
    parts = split_corpus(text_file(text))
    for part in ("val", "test"):
        assert parts[part] in text and parts[part] not in parts["train"]
        assert CHUNK <= len(parts[part]) < 2 * CHUNK


def test_chunks_end_at_line_ends(text_file):
    for part in split_corpus(text_file(LINES)).values():
        assert part.endswith("\n") and set(part.splitlines()) <= set(LINES.splitlines())


def test_one_long_line_is_cut_into_chunks(text_file):
    parts = split_corpus(text_file(LONG))
    assert len(parts["val"]) == len(parts["test"]) == CHUNK


def test_windows_line_ends_are_read_as_newlines(text_file):
    assert split_corpus(text_file(LINES.replace("\n", "\r\n"))) == split_corpus(text_file(LINES))


@pytest.mark.parametrize("width", [100, 1500, 1999, 2500, 3999, 10 ** 6])
def test_as_many_characters_as_the_message_asks_for_are_enough(text_file, width):
    with pytest.raises(UserError) as e:
        split_corpus(text_file("short"))
    size = int(re.search(r"(\d+) or more", str(e.value))[1])
    lines = (f"{i:06d}".ljust(width - 1, "x") + "\n" for i in range(size // width + 1))
    text = "".join(lines)[:size]
    assert sum(map(len, split_corpus(text_file(text)).values())) == size


@pytest.mark.parametrize("text", ["", "short", "x" * 3999], ids=len)
def test_too_short_a_file(text_file, text):
    with pytest.raises(UserError, match="--data .*text.txt: too short"):
        split_corpus(text_file(text))


@pytest.mark.parametrize("make, why", [
    (lambda p: None, "cannot be read"),
    (lambda p: p.mkdir(), "cannot be read"),
    (lambda p: p.write_bytes(bytes(range(256)) * 99), "not UTF-8"),
    (lambda p: p.write_bytes(LINES.encode("utf-16")), "not UTF-8")],
    ids=["missing", "folder", "binary", "utf-16"])
def test_file_that_is_no_text(tmp_path, make, why):
    make(tmp_path / "text")
    with pytest.raises(UserError, match=f"--data .*text: .*{why}.*docs"):
        split_corpus(str(tmp_path / "text"))


# --- tinyshakespeare, never downloaded here -------------------------------------------------------

@pytest.fixture
def cached(monkeypatch, tmp_path):
    """The place of the cached file; whoever reaches for the network fails the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen",
                        lambda *_, **__: pytest.fail("reached for the network"))
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
    url = train_teacher.SHAKESPEARE[0]
    monkeypatch.setattr(train_teacher, "SHAKESPEARE", (url, hashlib.sha256(data).hexdigest()))


def test_shakespeare_is_downloaded_once(monkeypatch, cached):
    play = LINES.encode()
    expect(monkeypatch, play)
    asked = serve(monkeypatch, play)
    assert "".join(train_teacher.shakespeare()) == "".join(train_teacher.shakespeare()) == LINES
    assert asked == [train_teacher.SHAKESPEARE[0]] and cached.read_bytes() == play
    assert [p.name for p in cached.parent.iterdir()] == [cached.name]


def test_shakespeare_with_a_wrong_checksum_says_what_to_delete(monkeypatch, cached):
    serve(monkeypatch, b"<html>please log in</html>")
    for _ in range(2):
        with pytest.raises(UserError, match="--data shakespeare.*checksum.*delete it") as e:
            train_teacher.shakespeare()
        assert str(cached) in str(e.value)
    cached.unlink(missing_ok=True)
    expect(monkeypatch, LINES.encode())
    serve(monkeypatch, LINES.encode())
    assert "".join(train_teacher.shakespeare()) == LINES


def test_cached_file_of_somebody_else_is_left_alone(cached):
    cached.parent.mkdir()
    cached.write_text("mine")
    with pytest.raises(UserError, match="checksum"):
        train_teacher.shakespeare()
    assert cached.read_text() == "mine"


class CutOff:
    def read(self):
        raise http.client.IncompleteRead(b"First Citizen:", 1115380)


@pytest.mark.parametrize("answer", [
    urllib.error.URLError("unreachable"), TimeoutError("timed out"),
    urllib.error.HTTPError("", 404, "Not Found", None, None), CutOff()],
    ids=["offline", "slow", "gone", "cut off"])
def test_shakespeare_without_the_network_names_the_way_out(monkeypatch, cached, answer):
    serve(monkeypatch, answer)
    with pytest.raises(UserError, match="--data shakespeare: no network.*--data docs") as e:
        train_teacher.shakespeare()
    assert str(cached) in str(e.value) and not cached.exists()


def test_shakespeare_itself(cached):
    if not (SHARED / "data" / "tinyshakespeare.txt").exists():
        pytest.skip("needs ../shared/data/tinyshakespeare.txt")
    cached.parent.mkdir()
    shutil.copyfile(SHARED / "data" / "tinyshakespeare.txt", cached)
    parts = split_corpus("shakespeare")
    assert sum(map(len, parts.values())) == 1_115_394
    assert max(overlap(parts["train"], parts[p]) for p in ("val", "test")) < 0.02


# --- tokenizers -----------------------------------------------------------------------------------

SMALL = ("the cat sat on the mat, the rat sat on the cat; "
         "aaaa aaa aa baaab bananas in cabanas 🙂🙂 ünd üb\n") * 3


def brute_force_bpe(text, V):
    """Recounts every pair before every merge; the most frequent first, of equals the greatest."""
    words = [[bytes([c]) for c in w.encode()] for w in re.findall(WORDS, text)]
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
    kept = torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    return [Tokenizer(**tokenizer.state()), Tokenizer(**kept)]


@pytest.mark.parametrize("text", [SMALL, UNICODE, "aaaaaaaaaaaaaaaa", "ababab bababa abba", ""],
                         ids=["words", "unicode", "a", "ab", "nothing"])
@pytest.mark.parametrize("V", [256, 261, 290, 400])
def test_bpe_merges_are_those_of_brute_force(text, V):
    assert train_bpe(text, V) == brute_force_bpe(text, V)


def test_bpe_tokens_are_all_different():
    tokens = train_bpe(SMALL + UNICODE, 2000)
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
    merged = [tokenizer.decode([i]) for i in range(256, 290)]
    assert not any(re.search(r"\S\s", token) for token in merged)  # none spans two words


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
        assert torch.equal(copy.encode(SMALL), tokenizer.encode(SMALL))
        assert copy.decode(copy.encode(SMALL)) == SMALL


@pytest.mark.parametrize("text", [UNICODE, SMALL, "x"])
def test_char_brings_its_text_back(text):
    tokenizer = Tokenizer.train("char", text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sorted(ids.unique().tolist()) == list(range(tokenizer.V))


def test_char_names_the_option_of_an_unknown_character():
    tokenizer = Tokenizer.train("char", "abc\n")
    with pytest.raises(UserError, match=r"--prompt: .*'\\t' '!' 'x'") as e:
        tokenizer.encode("ab\tx!", "--prompt")
    assert "\n" not in str(e.value)


def test_char_leaves_unknown_characters_out_if_asked():
    tokenizer = Tokenizer.train("char", "abc\n")
    assert tokenizer.decode(tokenizer.encode("abxc!", unknown="drop")) == "abc"


@pytest.mark.parametrize("spec", ["", "word", "Char", "char:5", "bpe:255", "bpe:-300", "bpe:1e3",
                                  "bpe:many", "bpe:²", "bpe 300", "gpt2:5", "gpt3"])
def test_bad_tokenizer_is_named(spec):
    with pytest.raises(UserError, match=f"^--tokenizer {re.escape(spec)}: "):
        Tokenizer.train(spec, SMALL)


def test_gpt2_without_the_network_names_the_way_out(monkeypatch):
    def get_encoding(name):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    for make in (lambda: Tokenizer.train("gpt2", SMALL), lambda: Tokenizer("gpt2")):
        way_out = "--tokenizer gpt2: .*TIKTOKEN_CACHE_DIR.*--tokenizer bpe"
        with pytest.raises(UserError, match=way_out):
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


# --- tokenised corpora and their windows ----------------------------------------------------------

def test_load_corpus_learns_from_the_training_part_only(text_file):
    name = text_file(LONG)
    texts = split_corpus(name)
    corpus = load_corpus(name, "char", 16)
    assert corpus.tokenizer.pieces == sorted(set(texts["train"]))
    assert {part: corpus.tokenizer.decode(corpus.parts[part]) for part in PARTS} == texts
    assert corpus.chars_per_token == 1


def test_sha256_tells_texts_apart(text_file):
    def sha256(text):
        return load_corpus(text_file(text), "char", 16).sha256
    assert sha256(LINES) == sha256(LINES) != sha256(LINES[:-2] + "!\n")
    assert re.fullmatch("[0-9a-f]{64}", sha256(LINES))


def test_sha256_is_that_of_the_shipped_models(text_file):
    """Or they would be refused as models of another text."""
    texts = split_corpus(text_file(LINES))
    joined = "\0".join(texts[part] for part in ("test", "train", "val"))
    expected = hashlib.sha256(joined.encode()).hexdigest()
    assert load_corpus(text_file(LINES), "char", 16).sha256 == expected


def test_characters_a_token_of_the_test_part(text_file):
    name = text_file(LINES)
    corpus = load_corpus(name, "bpe:300", 16)
    n = len(corpus.parts["test"])
    assert corpus.chars_per_token == len(split_corpus(name)["test"]) / n > 1


@pytest.mark.parametrize("L", [CHUNK, 10 ** 6])
def test_context_longer_than_a_part_names_both_options(text_file, L):
    with pytest.raises(UserError, match=rf"--data .*text.txt.*--context is {L}"):
        load_corpus(text_file(LONG), "char", L)


@pytest.mark.parametrize("n, L", [(10, 3), (10, 10), (5, 1)])
def test_windows_are_verbatim_and_reach_both_ends(n, L):
    ids = 100 + torch.arange(n)
    x = windows(ids, 500, L)
    assert x.shape == (500, L) and bool((x == x[:, :1] + torch.arange(L)).all())
    assert set(x[:, 0].tolist()) == set(range(100, 100 + n - L + 1))  # every start, even the last


@pytest.mark.parametrize("n, L, limit, rows", [
    (10, 3, None, 3), (10, 3, 2, 2), (9, 3, 7, 3), (2, 3, 5, 0), (5, 1, 4, 4)])
def test_consecutive_windows_follow_one_another(n, L, limit, rows):
    x = consecutive(torch.arange(n), L, limit)
    assert x.shape == (rows, L) and x.flatten().tolist() == list(range(rows * L))
