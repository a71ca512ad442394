"""dlm: diffusion language models distilled from autoregressive ones, small enough to read.

One Transformer is teacher and student; the flag is the block length b. Everything the package minimises is

    loss = mean over texts of  sum_i w_i * D( target_i || p_student(x_i | z) ),     z = x with some tokens hidden,

and the methods differ only in which states (x, z) they train on and which target they aim at. Sections: text,
model, exact sources, states and targets, TCS, SDTT, OPDLM, sampler, judging, training, files and command lines.
Notation is the README's: B texts, L tokens, V vocabulary, b block length; all likelihoods in nats per token.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")      # before torch: what Apple's GPUs cannot do, the CPU does
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. The message is one line that names the option and the way out."""


# ----------------------------------------------------------------------------------------------------------
# Text: corpora, tokenizers, splits

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
CHUNK = 2000  # characters; whole chunks go to train, validation or test, so that no sentence is in two of them


def docs():
    """The Python language reference that is inside every CPython: about 0.3 MB of English, one paragraph a line.

    Paragraphs are unwrapped; tables, grammars and sessions go, since their runs of blanks are what small models
    collapse to; so does any paragraph that shares 64 characters with an earlier one (`ljust` and `rjust` are described
    alike), *before* splitting, or held-out text would stand in the training part.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("--data docs: this Python has no pydoc_data.topics; give --data a text file") from None
    paragraphs = (p for topic in sorted(topics) for p in re.split(r"\n\s*\n", topics[topic]))
    not_prose = re.compile(r"::=|\+[-=]{3}|\|  |>>>|^\s*[*=\-~^]{4,}\s*$", re.MULTILINE)
    kept, seen = [], set()
    for p in dict.fromkeys(" ".join(p.split()) for p in paragraphs if not not_prose.search(p)):
        windows_of_p = {p[i:i + 64] for i in range(len(p) - 63)}
        if len(p) >= 20 and not windows_of_p & seen:
            kept.append(p + "\n")
        seen |= windows_of_p
    return kept


def shakespeare():
    """tinyshakespeare (1.1 MB): downloaded once, checked, kept in the cache folder."""
    url, sha256 = SHAKESPEARE
    path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dlm" / "tinyshakespeare.txt"
    if not path.exists():
        try:
            data = urllib.request.urlopen(url, timeout=30).read()
        except (OSError, http.client.HTTPException) as e:
            raise UserError(f"--data shakespeare: no network ({e!r}); put the file at {path}, or use --data docs") from None
        replace_file(path, lambda f: f.write(data), "--data shakespeare")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"--data shakespeare: {path} is not the expected file (checksum); delete it and run again")
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def arithmetic():
    """All sums of two numbers below 100 as `07+85=092`, one chunk for a pair of operands with its commuted twin."""
    line = "{:02d}+{:02d}={:03d}\n".format
    return [line(i, j, i + j) + (line(j, i, i + j) if i != j else "") for i in range(100) for j in range(i, 100)]


CORPORA = {"docs": docs, "shakespeare": shakespeare, "arithmetic": arithmetic}


def split_corpus(name):
    """name: a corpus or the path of a text file -> {"train", "val", "test": text}, 90 : 5 : 5, always the same split."""
    if name in CORPORA:
        pieces = CORPORA[name]()
    else:
        try:
            pieces = Path(name).read_text(encoding="utf-8").splitlines(keepends=True)
        except (OSError, UnicodeDecodeError) as e:
            why = "is not UTF-8 text" if isinstance(e, UnicodeDecodeError) else f"cannot be read ({e.strerror})"
            raise UserError(f"--data {name}: {why}; give a text file or one of {', '.join(CORPORA)}") from None
    if name == "arithmetic":
        chunks = pieces
    else:
        text = "".join(pieces)
        cuts, end = [0], 0
        for piece in pieces:  # cut at the first line end after each CHUNK characters, or where a line is longer, in it
            end += len(piece)
            while end - cuts[-1] >= CHUNK:
                cuts.append(end if end - cuts[-1] < 2 * CHUNK else cuts[-1] + CHUNK)
        chunks = [text[i:j] for i, j in zip(cuts, cuts[1:] + [len(text)]) if i < j]
    if len(chunks) < 3:
        raise UserError(f"--data {name}: too short ({sum(map(len, chunks))} characters); {6 * CHUNK} or more are enough")
    random.Random(0).shuffle(chunks)
    n = max(1, len(chunks) // 20)
    return {"val": "".join(chunks[:n]), "test": "".join(chunks[n:2 * n]), "train": "".join(chunks[2 * n:])}


WORDS = r" ?\w+| ?[^\s\w]+|\s+"  # how BPE cuts text before it merges: no token spans two words


def train_bpe(text, V):
    """Byte-pair merges learned on `text` until there are V tokens -> list of V `bytes`, the rank of each its place.

    Only unique words are kept, with their counts, and a merge touches only the words that contain its pair.
    """
    words = [[list(bytes([c]) for c in w.encode()), n] for w, n in Counter(re.findall(WORDS, text)).items()]
    pairs, where = Counter(), defaultdict(set)
    for k, (w, n) in enumerate(words):
        for pair in zip(w, w[1:]):
            pairs[pair] += n
            where[pair].add(k)
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < V and pairs:
        best = max(pairs, key=lambda p: (pairs[p], p))
        tokens.append(best[0] + best[1])
        for k in where.pop(best):
            w, n = words[k]
            for pair in zip(w, w[1:]):
                pairs[pair] -= n
            merged, i = [], 0
            while i < len(w):
                hit = tuple(w[i:i + 2]) == best
                merged.append(w[i] + w[i + 1] if hit else w[i])
                i += 2 if hit else 1
            words[k][0] = merged
            for pair in zip(merged, merged[1:]):
                pairs[pair] += n
                where[pair].add(k)
        pairs = +pairs  # drops what fell to zero
    return tokens


class Tokenizer:
    """Text to ids and back. kind `char`: `pieces` are characters; `bpe`: pieces are byte strings; `gpt2`: tiktoken's."""

    def __init__(self, kind, pieces=()):
        self.kind, self.pieces = kind, list(pieces)
        if kind == "char":
            self.ids = {c: i for i, c in enumerate(self.pieces)}
            self.V = len(self.pieces)
        elif kind == "bpe":
            ranks = {p.encode("latin-1"): i for i, p in enumerate(self.pieces)}
            self.bpe = tiktoken.Encoding("dlm", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
            self.V = len(self.pieces)
        elif kind == "gpt2":
            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as e:  # requests' errors are not tiktoken's to promise
                raise UserError(f"--tokenizer gpt2: its vocabulary could not be downloaded ({type(e).__name__}); set "
                                "TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer bpe") from None
            self.V = self.bpe.n_vocab
        else:
            raise UserError(f"--tokenizer {kind}: unknown; use char, bpe, bpe:SIZE or gpt2")

    @staticmethod
    def train(spec, text):
        """spec: `char`, `bpe` (1024 tokens), `bpe:SIZE` or `gpt2`; text: the training part of the corpus."""
        kind, _, size = spec.partition(":")
        if kind == "bpe":
            if size and not (size.isdecimal() and int(size) >= 256):
                raise UserError(f"--tokenizer {spec}: the size is a number from 256 up")
            return Tokenizer("bpe", [t.decode("latin-1") for t in train_bpe(text, int(size or 1024))])
        return Tokenizer(spec, sorted(set(text)) if spec == "char" else ())

    def encode(self, text, option="--data", unknown=None):
        """Text -> ids (n,), int64. A character outside a `char` vocabulary is left out, or an error naming `option`."""
        if self.kind != "char":
            return torch.tensor(self.bpe.encode_ordinary(text), dtype=torch.long)
        bad = sorted(set(text) - self.ids.keys())
        if bad and unknown != "drop":
            raise UserError(f"{option}: the model's vocabulary has no {' '.join(map(repr, bad[:5]))}; leave it out")
        return torch.tensor([self.ids[c] for c in text if c in self.ids], dtype=torch.long)

    def decode(self, ids):
        ids = torch.as_tensor(ids).tolist()
        return "".join(self.pieces[i] for i in ids) if self.kind == "char" else self.bpe.decode(ids)

    def state(self):
        return {"kind": self.kind, "pieces": self.pieces}


@dataclass
class Text:
    """A tokenised corpus: ids of each part, and what metrics files must say about it."""
    name: str
    tokenizer: Tokenizer
    parts: dict             # "train", "val", "test" -> ids (n,)
    words: set              # words of the training part
    sha256: str             # of the whole text: `docs` differs between Python versions
    chars_per_token: float  # on the test part, so nats per character = nats per token / this


def load_text(name, tokenizer, L):
    """Reads a corpus with a Tokenizer, or trains one on its training part if given a name. Needs L+1 tokens a part."""
    texts = split_corpus(name)
    if isinstance(tokenizer, str):
        tokenizer = Tokenizer.train(tokenizer, texts["train"])
    parts = {part: tokenizer.encode(text, unknown="drop") for part, text in texts.items()}
    for part, ids in parts.items():
        if len(ids) <= L:
            raise UserError(f"--data {name}: too short, its {part} part has {len(ids)} tokens and --context is {L}")
    lost = sum(map(len, texts.values())) - sum(map(len, parts.values()))
    if tokenizer.kind == "char" and lost:
        print(f"note: --data {name} has {lost} characters that the vocabulary has not; they are left out")
    sha256 = hashlib.sha256("\0".join(texts[p] for p in sorted(texts)).encode()).hexdigest()
    return Text(name, tokenizer, parts, set(re.findall(r"\w+", texts["train"])), sha256,
                len(texts["test"]) / len(parts["test"]))


def windows(ids, B, L):
    """B random windows of L tokens: (B, L)."""
    start = torch.randint(len(ids) - L + 1, (B, 1), device=ids.device)
    return ids[start + torch.arange(L, device=ids.device)]


def consecutive(ids, L, limit=None):
    """The text cut into consecutive windows: (n, L), n at most `limit`."""
    return ids[:len(ids) // L * L].view(-1, L)[:limit]


# ----------------------------------------------------------------------------------------------------------
# The model: one Transformer; the block length b makes it teacher or student

@dataclass
class Config:
    V: int              # vocabulary; [MASK] is one more *input* symbol, id V, and never an output
    L: int = 64         # context in tokens
    b: int = 1          # block length: 1 causal (AR), L bidirectional (denoiser), between them block diffusion
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0


def slots(L, b, device=None):
    """Input slots of one pass over a text: their positions (S,), and whether they carry clean or noisy tokens (S,).

    b = 1      clean  [MASK] x_0 .. x_{L-2}            slot i holds x_{i-1} and is read as p(x_i | x_<i)
    1 < b < L  clean  x of all blocks but the last, then noisy z_0 .. z_{L-1}, where p(x_i | ...) is read at z_i
    b = L      noisy  z_0 .. z_{L-1}                   no block is earlier than the last, so no clean slot is needed

    The shift at b = 1 is the one special case: a block of one hidden token has nothing to say but its position,
    so the clean stream can predict by itself, and [MASK] serves as beginning of text.
    """
    n_clean, n_noisy = (L, 0) if b == 1 else ((L - 1) // b * b, L)
    pos = torch.cat([torch.arange(n_clean, device=device), torch.arange(n_noisy, device=device)])
    return pos, torch.arange(len(pos), device=device) < n_clean


def attends(pos_q, clean_q, pos_k, clean_k, b):
    """The attention mask (Q, K): clean earlier blocks, and one's own block in one's own stream. b is all that is new."""
    block_q, block_k, other_stream = pos_q[:, None] // b, pos_k // b, clean_q[:, None] ^ clean_k
    return (clean_k & (block_k < block_q)) | (~other_stream & (block_k == block_q))


def norm(h):
    """RMSNorm (1910.07467) without a gain, in three operations where F.rms_norm takes twenty."""
    return h / (torch.linalg.vector_norm(h, dim=-1, keepdim=True) * h.size(-1) ** -0.5)


def rotate(x, rope):
    """Rotary positions (2104.09864). x (.., B, H, T, D); rope (2, B or 1, 1, T, D): cosines, and sines with their signs."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.addcmul(x * rope[0], torch.cat([x2, x1], dim=-1), rope[1]).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.dropout
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.up = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.down = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)  # each layer starts as the identity
        nn.init.zeros_(self.down.weight)

    def forward(self, h, rope, mask, past=None, done=0, read=0):
        """h (B, T, d); mask (.., T, K), "causal" or None for all. past (2, B, H, room, D): keys and values; the first
        `done` are there, these T are written behind them, and K = done + T. read: only so many, the last, go on; 0: all."""
        B, T, d = h.shape
        qkv = self.qkv(norm(h)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        (q, k), v = rotate(norm(qkv[:2].contiguous()), rope), qkv[2]  # QK-norm: lets the learning rate be high
        if past is not None:
            past[:, :, :, done:done + T] = torch.stack([k, v])
            k, v = past[:, :, :, :done + T].to(q.dtype)
        q, h, causal = q[:, :, -read:], h[:, -read:], isinstance(mask, str)             # -0 is 0: all
        mask = None if causal or mask is None else mask[..., -read:, :]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        h = h + F.dropout(self.proj(y.transpose(1, 2).reshape(h.shape)), self.dropout, self.training)
        y = self.down(self.up(norm(h)).relu_().square())
        return h + F.dropout(y, self.dropout, self.training)


class Transformer(nn.Module):
    """log p(x_i | the clean blocks left of i's block, the visible tokens of its own block), for any block length.

    model(x, z) -> (B, L, V). x (B, L) clean tokens, z (B, L) the same with some hidden ([MASK] = V). At b = 1 z is not
    read, at b = L x is not. What it says at visible tokens is never used: they are copied ("SUBS", MDLM 2406.07524).
    """

    def __init__(self, c):
        super().__init__()
        if c.n_embd % (2 * c.n_head):
            raise UserError(f"--n_embd {c.n_embd}: must be an even multiple of --n_head {c.n_head}")
        if c.b > c.L:
            raise UserError(f"--block {c.b}: longer than the context of {c.L}; use 0 for the whole context")
        if c.dropout >= 1:
            raise UserError(f"--dropout {c.dropout}: must be below 1")
        self.c, self.V, self.L, self.b = c, c.V, c.L, c.b
        self.embedding = nn.Embedding(c.V + 1, c.n_embd)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layer))
        self.head = nn.Linear(c.n_embd, c.V, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        D = c.n_embd // c.n_head
        angles = torch.arange(c.L)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)
        cos, sin = angles.cos().repeat(1, 2), torch.cat([angles.sin(), -angles.sin()], dim=1)
        self.register_buffer("rope", torch.stack([cos, sin]), persistent=False)            # (2, L, D)

    def run(self, e, pos, mask, past=None, done=0, read=0):
        """Embeddings e (B, T, d) at positions pos (T,) or (B, T) -> log-probabilities (B, T, V); fills `past`.

        read: of the last so many slots only, which is all that the last layer must compute; 0: of all."""
        h = norm(e)
        rope = self.rope[:, pos].view(2, -1, 1, e.size(1), self.rope.size(-1))
        for i, layer in enumerate(self.layers):
            h = layer(h, rope, mask, None if past is None else past[i], done, read if layer is self.layers[-1] else 0)
        return F.log_softmax(self.head(norm(h)), dim=-1)   # float32 also under autocast

    def room(self, B, n):
        """Empty keys and values of n slots, for each layer (2, B, H, n, D)."""
        return [self.embedding.weight.new_empty(2, B, self.c.n_head, n, self.c.n_embd // self.c.n_head)
                for _ in self.layers]

    def forward(self, x, z):
        L, b = x.size(1), self.b
        pos, clean = slots(L, b, x.device)
        if b == 1:
            return self.run(self.embedding(self.shift(x)), pos, "causal")
        tokens = torch.cat([x[:, :len(pos) - L], z], dim=1)
        mask = None if b >= L else attends(pos, clean, pos, clean, b)
        return self.run(self.embedding(tokens), pos, mask, read=L)

    def shift(self, x):
        return F.pad(x[:, :-1], (1, 0), value=self.V)  # (B, L): [MASK] x_0 .. x_{L-2}

    # The next four serve decoding and scoring. Keys and values are kept in tensors made once, with room for all.

    def restart(self, x, e, b):
        """AR only: log p(y_i | x before i's block, y_<i in it) (B, L, V): clean x beside y, which starts anew in blocks.

        e (B, L, d): the embeddings of y. With y = x it is what model(x, x) says."""
        L = x.size(1)
        pos = torch.arange(L, device=x.device)
        clean, old = torch.arange(2 * L, device=x.device) < L, self.embedding(self.shift(x))
        new = torch.where((pos % b == 0)[:, None], old, F.pad(e[:, :-1], (0, 0, 1, 0)))
        pos = pos.repeat(2)
        mask = attends(pos, clean, pos, clean, b) & (pos <= pos[:, None])
        return self.run(torch.cat([old, new], dim=1), pos, mask, read=L)

    def decode(self, x, z, start, stop, past, most=None):
        """log p of tokens start..stop-1, one block or several, z's, given x before each -> (B, stop-start, V), new past.

        past: keys, values and how many clean slots of them are done (None at first). Equal to the uncached model(x, z).
        most: in one block, the largest number of hidden tokens in a row. Then no others need be read, and get zeros."""
        b, L, size = self.b, x.size(1), stop - start
        noisy, n = (z[:, :0], stop) if b == 1 else (z[:, start:stop], (stop - 1) // b * b)       # n clean slots
        pos = torch.cat([torch.arange(n, device=x.device), torch.arange(start, start + noisy.size(1), device=x.device)])
        clean = torch.arange(len(pos), device=x.device) < n
        kv, done = past or (self.room(len(x), max(L, len(pos))) if b < L else None, 0)
        alone = done >= start and size <= b                                                      # one block sees all
        mask, pos = None if alone else attends(pos[done:], clean[done:], pos, clean, b), pos[done:]
        few = most is not None and len(x) * (size - most) > 16            # where less is saved, sorting costs more
        if few:                                                           # hidden tokens to the end, which alone is read
            place = (noisy == self.V).int().argsort(1)
            noisy, pos = noisy.gather(1, place), torch.cat([pos[:-size].expand(len(x), -1), start + place], dim=1)
        new = torch.cat([(self.shift(x[:, :n]) if b == 1 else x[:, :n])[:, done:], noisy], dim=1)
        logp = self.run(self.embedding(new), pos, mask, kv, done, read=most if few else size)
        if few:
            logp = logp.new_zeros(*noisy.shape, self.V).scatter(1, place[:, -most:, None].expand(-1, -1, self.V), logp)
        return logp, kv and (kv, n)

    def prefill(self, x):
        """AR only: log p(x_i | x_<i) (B, L, V), and the keys and values that `extend` continues."""
        past = self.room(*x.shape)
        return self.run(self.embedding(self.shift(x)), torch.arange(x.size(1), device=x.device), "causal", past), past

    def extend(self, e, start, past, rows):
        """AR only: G other continuations e (R, G, W, d), as embeddings, of the text of `past` row rows[r], cut at start[r].

        Their first token enters slot start[r] (R,): it is token start[r]-1. -> log p(x_{start+w} | ..) (R, G, W, V)."""
        (R, G, W, d), P = e.shape, past[0].size(3)
        w, p = torch.arange(W, device=e.device), torch.arange(P, device=e.device)
        old = (p < start[:, None])[:, None, None, :].expand(-1, 1, G * W, -1)
        own = torch.block_diag(*[(w <= w[:, None])] * G).expand(R, 1, -1, -1)        # continuations do not see each other
        pos = (start[:, None] + w).clamp(max=self.L - 1).repeat(1, G)                # past the end: the caller's to ignore
        past = [F.pad(kv[:, rows], (0, 0, 0, G * W)) for kv in past]
        return self.run(e.view(R, G * W, d), pos, torch.cat([old, own], dim=-1), past, P).view(R, G, W, -1)


# ----------------------------------------------------------------------------------------------------------
# Exact sources: hidden Markov chains that answer the same calls as a Transformer

class HiddenMarkov(nn.Module):
    """p(s_0) = start, p(s_{i+1}|s_i) = trans, p(x_i|s_i) = emit: every conditional is exact, by forward-backward.

    source(x, z) -> log p(x_i | clean blocks left, visible tokens of the own block) (B, L, V): the true AR model at
    b = 1, the true denoiser at b = L. So it stands in as teacher, student or judge; b is an attribute to set.
    """

    def __init__(self, start, trans, emit, L, b=1):
        super().__init__()
        self.start, self.trans, self.emit = (torch.as_tensor(a, dtype=torch.float64) for a in (start, trans, emit))
        self.S, self.V = self.emit.shape
        self.L, self.b, self.embedding = L, b, nn.Embedding.from_pretrained(torch.eye(self.V + 1).double()[:, :-1])

    @staticmethod
    def markov(V, L, seed=0, sharp=2.0):
        """An ordinary Markov chain with random transitions; the larger `sharp`, the more neighbours share."""
        g = torch.Generator().manual_seed(seed)
        rows = (sharp * torch.randn(V + 1, V, generator=g, dtype=torch.float64)).softmax(-1)
        return HiddenMarkov(rows[0], rows[1:], torch.eye(V), L)

    @staticmethod
    def branch(L, n=10):
        """A uniform x_0; the rest of the row is x_0 again and again, or x_0 + n/2 (mod n) again and again."""
        trans, v = torch.zeros(2 * n, 2 * n), torch.arange(n)          # states: the first letter, then the kept one
        trans[v, n + v] = trans[v, n + (v + n // 2) % n] = 0.5
        trans[n + v, n + v] = 1
        start = torch.cat([torch.ones(n) / n, torch.zeros(n)])
        return HiddenMarkov(start, trans, torch.eye(n).repeat(2, 1), L)

    def forward(self, x, z):
        L = x.size(1)
        e, seen = self.embedding(x), z < self.V
        clean = self.filter(e, self.start.expand(len(x), -1))[0]                 # p(s_i | x_<i)  (B, L, S)
        noisy = torch.where(seen[..., None], self.embedding(z) @ self.emit.T, 1.0)
        ahead, state, out = torch.ones_like(clean), None, []
        for i in range(L - 2, -1, -1):                                            # what the block's right part says
            if (i + 1) % self.b:
                a = (ahead[:, i + 1] * noisy[:, i + 1]) @ self.trans.T
                ahead[:, i] = a / a.sum(-1, keepdim=True).clamp(min=1e-300)
        for i in range(L):                                                        # and its left part
            state = clean[:, i] if i % self.b == 0 else (state * noisy[:, i - 1]) @ self.trans
            state = state / state.sum(-1, keepdim=True).clamp(min=1e-300)
            out.append((state * ahead[:, i]) @ self.emit)
        p = torch.stack(out, 1)
        total = p.sum(-1, keepdim=True)
        return torch.where(total > 0, p / total, 1 / self.V).log()                # what cannot be says nothing: uniform

    def filter(self, e, state):
        """Tokens e (B, T, V) from the state before them (B, S) -> p(s) before each (B, T, S), and after the last."""
        states = []
        for i in range(e.size(1)):
            states.append(state)
            state = (state * (e[:, i] @ self.emit.T)) @ self.trans
            state = state / state.sum(-1, keepdim=True).clamp(min=1e-300)
        return torch.stack(states, 1), state

    def decode(self, x, z, start, stop, past, most=None):
        return self(x, z)[:, start:stop], None

    def restart(self, x, e, b):
        states = self.filter(self.embedding(x), self.start.expand(len(x), -1))[0][:, ::b].flatten(0, 1)
        blocks = F.pad(e, (0, 0, 0, -x.size(1) % b)).view(-1, b, self.V)
        p = (self.filter(blocks, states)[0] @ self.emit).view(len(x), -1, self.V)[:, :x.size(1)]
        return (p / p.sum(-1, keepdim=True).clamp(min=1e-300)).log()

    def prefill(self, x):
        past = self.filter(self.embedding(x), self.start.expand(len(x), -1))[0]
        return (past @ self.emit).log(), past

    def extend(self, e, start, past, rows):
        state = past[rows, start - 1].repeat_interleave(e.size(1), 0)
        states, last = self.filter(e.flatten(0, 1), state)
        p = torch.cat([states[:, 1:], last[:, None]], 1) @ self.emit
        return (p / p.sum(-1, keepdim=True).clamp(min=1e-300)).log().view(e.shape)

    def log_prob(self, x):
        """Exact log-likelihood of whole texts x (B, L): (B,), nats."""
        return self.prefill(x)[0].gather(2, x[..., None]).sum((1, 2))

    def draw(self, B, generator=None):
        """B texts from the source: (B, L)."""
        s = torch.multinomial(self.start.expand(B, -1), 1, generator=generator)[:, 0]
        x = []
        for _ in range(self.L):
            x.append(torch.multinomial(self.emit[s], 1, generator=generator)[:, 0])
            s = torch.multinomial(self.trans[s], 1, generator=generator)[:, 0]
        return torch.stack(x, 1)


# ----------------------------------------------------------------------------------------------------------
# States and targets: what to hide, what to aim at, and the one loss

def stratified(B, n, device):
    """Uniform numbers (B, n); those of a column lie one in each B-th of [0, 1), in random order."""
    order = torch.rand(B, n, device=device).argsort(0)                             # one permutation a column
    return (order + torch.rand(n, device=device)) / B


def blocks(a, b, fill=0):
    """Rows (B, L) cut into blocks (B, n, b), the last filled up."""
    return F.pad(a, (0, -a.size(1) % b), value=fill).view(len(a), -1, b)


def hide(x, b, mask):
    """Masked data: in each block of b tokens hide a random m-subset, m uniform on 1..block length. -> z (B, L).

    Stratified: the m of one block's column spread evenly over the batch. At b = 1 everything is hidden. With `weights`
    this is the bound ∫ 1/t E_z|t Σ_hidden -log p(x_i|z) dt of MDLM (2406.07524) and 2406.03736, m in the place of t."""
    size = blocks(torch.ones_like(x), b).sum(-1)                                   # (B, n); the last may be shorter
    m = (stratified(*size.shape, x.device) * size).long().clamp(max=size - 1) + 1
    noise = blocks(torch.rand(x.shape, device=x.device), b, fill=2.0)
    hidden = noise.argsort(-1).argsort(-1) < m[..., None]                          # rank of each token's noise < m
    return torch.where(hidden.flatten(1)[:, :x.size(1)], mask, x)


def weights(hidden, b):
    """Weight of each hidden token (B, L): block length / hidden in its block / L. Summed over a text: nats per token."""
    L, h = hidden.size(1), blocks(hidden.float(), b)
    size = blocks(torch.ones_like(hidden), b).sum(-1, keepdim=True)
    return (h * size / h.sum(-1, keepdim=True).clamp(min=1) / L).flatten(1)[:, :L]


def divergence(p, log_q, kind="forward"):
    """D(target p || student q) over the last axis. p (.., V) probabilities, log_q (.., V) log-probabilities -> (..), nats.

    forward: sum p log(p/q), covers all that p does; reverse: sum q log(q/p), infinite where p = 0 < q;
    tvd: half the absolute difference; mse: the squared difference of probabilities. With p one-hot and `forward`
    it is the cross-entropy."""
    if kind == "forward":
        return torch.xlogy(p, p).sum(-1) - (p * log_q.clamp(min=-1e4)).sum(-1)       # 0 · -inf would be nan
    q = log_q.exp()
    if kind == "reverse":
        return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)
    if kind == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if kind == "mse":
        return (p - q).square().sum(-1)
    raise UserError(f"--divergence {kind}: unknown; use forward, reverse, tvd or mse")


def loss(student, x, z, target, kind="forward"):
    """The one loss. x, z (B, L): the text and the state; target (B, L, V) -> scalar, nats per token.

    With a one-hot target and z = hide(x, b) it estimates the negative log-likelihood bound without bias; at b = 1 it is
    the AR model's exact negative log-likelihood."""
    w = weights(z == student.V, student.b)
    return (w * divergence(target, student(x, z), kind)).sum(1).mean()


def one_hot(x, V):
    """Target of plain masked diffusion: the text itself. (B, L, V)"""
    return F.one_hot(x, V).float()


# ----------------------------------------------------------------------------------------------------------
# TCS: the teacher's target concrete score (OpenReview xfw92pDy2u; TCSM, 2504.16431)
#
# The score of changing x_i into v, normalised over v, is c_i(v) = p_T(v | x_<i, rest of i's block)
#                                                        ∝ p_T(v | x_<i) · p_T(rest of the block | x_<i, v).

ESTIMATORS = {            # candidates by: the prefix, or prefix and gradient   K   scored exactly?
    "exact":     dict(by="prefix", K=None, rescore=True),
    "topk":      dict(by="prefix", K=16, rescore=True),
    "grad+topk": dict(by="grad", K=16, rescore=True),
    "grad":      dict(by="grad", K=None, rescore=False),
    "prefix":    dict(by="prefix", K=None, rescore=False),   # the causal head alone: a biased shortcut, a control
}


def suffix_log_prob(teacher, x, past, pos, cand, b, budget=None):
    """log p_T(x_{i+1} .. end of i's block | x_<i, x_i = v). pos (B, M), candidates v (B, M, K) -> (B, M, K), nats.

    The substitutions at one position continue the same cached prefix, G at a time. Positions are sorted by the length
    of their suffix and run in chunks of about `budget` slots: few on a CPU, whose cache is small."""
    budget = budget or (2048 if x.device.type == "cpu" else 2 ** 17)
    (B, L), (M, K) = x.shape, cand.shape[1:]
    row, i = torch.arange(B, device=x.device).repeat_interleave(M), pos.reshape(-1)      # (B*M,)
    length = ((i // b + 1) * b).clamp(max=L) - i - 1                                     # of the suffix
    order = length.argsort()
    out = torch.zeros(B * M, K, device=x.device, dtype=past[0].dtype)
    while len(order) and (W := int(length[order[-1]])):                                  # the longest one left; 0: none
        order, chunk = order.tensor_split([max(0, len(order) - max(1, budget // (K * W)))])    # R positions, the longest
        G = max(1, min(K, 64 // W))     # substitutions in a row: they share its prefix, but attention grows as (G W)^2
        n = -(-K // G)                                                                   # rows for a position
        j = i[chunk, None] + torch.arange(W + 1, device=x.device)
        text = x[row[chunk, None], j.clamp(max=L - 1)]                                   # (R, W+1): x_i .. x_{i+W}
        v = F.pad(cand.view(-1, K)[chunk], (0, n * G - K)).view(-1, G, 1)                # (R n, G, 1)
        tokens = torch.cat([v, text[:, None, 1:-1].repeat(1, n * G, 1).view(len(v), G, W - 1)], dim=2)
        logp = teacher.extend(teacher.embedding(tokens), (i[chunk] + 1).repeat_interleave(n), past,
                              row[chunk].repeat_interleave(n)).view(len(chunk), n * G, W, -1)[:, :K]
        said = logp.gather(3, text[:, None, 1:, None].expand(-1, K, -1, -1))[..., 0]     # (R, K, W)
        inside = torch.arange(W, device=x.device) < length[chunk, None, None]
        out[chunk] = said.where(inside, 0).sum(-1).to(out.dtype)
    return out.view(B, M, K)


def suffix_gradient(teacher, x, b):
    """∇_{e_i} log p_T(rest of i's block | x_<=i) for every i: (B, L, d). One forward and one backward: as each block
    starts anew in a stream of its own, nothing flows through earlier blocks or a block's first prediction."""
    with torch.enable_grad():
        e = teacher.embedding(x).detach().requires_grad_()
        return torch.autograd.grad(teacher.restart(x, e, b).gather(2, x[..., None]).sum(), e)[0]


@torch.no_grad()
@torch.autocast("cuda", enabled=False)   # scores are differences of long sums: bfloat16 would blur them
def concrete_score(teacher, x, pos, b, by="prefix", K=None, rescore=True):
    """The estimators of c_i, one function: log c_i(v) at positions pos (B, M) -> (B, M, V), normalised over v.

    Candidates are the K most likely by `prefix`, p_T(v|x_<i), or by `grad`, which adds the first-order change of the
    suffix <∇_{e_i} log p_T(suffix), E_v - E_{x_i}>; then scored exactly unless `rescore` is off. Where x_i is not a
    candidate the result is one-hot x_i: so, by "prefix", the mean over x ~ p_T(x|z) is p_T(x_i|z) for every K."""
    B, L = x.shape
    prior, past = teacher.prefill(x)
    rows = torch.arange(B, device=x.device)[:, None]
    score = prior[rows, pos]                                                             # (B, M, V)
    if by == "grad":
        E, g = teacher.embedding.weight[:teacher.V], suffix_gradient(teacher, x, b)[rows, pos]
        score = score + g @ E.T - (g * E[x[rows, pos]]).sum(-1, keepdim=True)
    if not rescore:
        return score.log_softmax(-1)
    cand = score.topk(min(K or teacher.V, teacher.V), dim=-1).indices                    # (B, M, K)
    exact = prior[rows, pos].gather(-1, cand) + suffix_log_prob(teacher, x, past, pos, cand, b).to(prior.dtype)
    log_c = torch.full_like(score, -math.inf).scatter(-1, cand, exact.log_softmax(-1))
    x_i = F.one_hot(x[rows, pos], teacher.V).bool()
    missed = ~(cand == x[rows, pos][..., None]).any(-1, keepdim=True)
    return torch.where(missed, torch.where(x_i, 0.0, -math.inf), log_c)


def tcs(teacher, x, b, estimator="topk", K=None, quiet=False):
    """The targets of TCS at every token of texts x (n, L): candidates v (n, L, K), int32, and c_i(v) (n, L, K).

    c_i depends on the text and on b, not on what is hidden, so it is computed once and serves every epoch and noise
    level; `dense` makes rows of it a target. K: instead of the estimator's own; all of the vocabulary if it has none."""
    how = ESTIMATORS[estimator]
    K = (K or how["K"]) if how["K"] else teacher.V
    v, c, pos = [], [], torch.arange(x.size(1), device=x.device)
    for rows in tqdm(x.split(16), desc="scoring texts", unit="16 texts", leave=False, disable=quiet or None):
        p = concrete_score(teacher, rows, pos.expand(len(rows), -1), b, how["by"], K, how["rescore"]).exp().float()
        p, candidates = p.topk(min(K, teacher.V), dim=-1)
        v.append(candidates.int())
        c.append(p)
    return torch.cat(v), torch.cat(c)


def dense(v, c, V):
    """Candidates and their probabilities (B, L, K) -> target (B, L, V)."""
    return c.new_zeros(*c.shape[:2], V).scatter(-1, v.long(), c)


# ----------------------------------------------------------------------------------------------------------
# SDTT: self-distillation through time (2410.21035)

def hide_at(x, b, mask, N):
    """States that an N-step sampler meets: in each block every token is hidden with probability t, a uniform one of
    1/N, 2/N .. 1. x (B, L) -> z (B, L), t (B, L) of each token's block, stratified over the batch."""
    B, L = x.shape
    n = -(-L // b)
    t = ((stratified(B, n, x.device) * N).long().clamp(max=N - 1) + 1) / N
    t = t.repeat_interleave(b, dim=1)[:, :L]
    return torch.where(torch.rand(B, L, device=x.device) < t, mask, x), t


@torch.no_grad()
def sdtt(teacher, x, z, t, dt, k=2):
    """Target of SDTT: what a diffusion teacher says after up to k ancestral steps of size dt from z at time t. (B, L, V)

    A step reveals each hidden token with probability dt / t_now, drawn from the teacher. A token's target is the
    distribution it was drawn from, or where it is still hidden after the last step, that step's. t (B, L)."""
    target = None
    for step in range(k):
        hidden, now = z == teacher.V, (t - step * dt).clamp(min=0)
        p = teacher(x, z).exp()
        target = p if target is None else torch.where(hidden[..., None], p, target)
        reveal = hidden & (torch.rand(z.shape, device=z.device) * now < dt)       # at now <= dt: all
        z = torch.where(reveal, draw(p, torch.rand(z.shape, device=z.device)), z)
    return target


# ----------------------------------------------------------------------------------------------------------
# OPDLM: on-policy distillation of an AR model into a diffusion LM (2606.06712)

class Blocks:
    """Stands in for `model` in `sample`: z (B n, b), of which row j is block j % n of text j // n, behind x's own earlier
    blocks; n = L / b."""

    def __init__(self, model, x):
        self.model, self.x, self.V, self.L, self.b = model, x, model.V, model.b, model.b

    def decode(self, x, z, start, stop, past, most=None):
        logp, past = self.model.decode(self.x, z.view_as(self.x), 0, self.x.size(1), past)
        return logp.reshape(*z.shape, -1), past


@torch.no_grad()
def rollout(model, x, steps=0, order="spread", whole=False):
    """States of OPDLM: what the model itself writes, and a moment of its writing. Texts x (B, L) -> y, z (B, L).

    y is from `sample`: each block written behind x's own earlier blocks, all at once; or the `whole` text but a prompt of
    x, 0 to L-1 tokens long. z is y with tokens still hidden: in each block those of a uniform one of the states that its
    steps began in."""
    if order not in ORDERS or order == "ancestral":
        raise UserError(f"--order {order}: a rollout reveals equally many tokens a step; use {', '.join(ORDERS[1:])}")
    if x.size(1) % model.b:
        raise UserError(f"--block {model.b}: does not divide the context of {x.size(1)}, as rollouts need")
    (B, L), b, training, device = x.shape, model.b, model.training, x.device
    n, N = L // b, steps or b
    model.eval()
    if whole:
        prompt = (stratified(B, 1, device) * L).long()
        z = torch.where(torch.arange(L, device=device) < prompt, x, model.V)
        states = torch.stack(list(sample(model, z, steps, order)))                 # (1 + n N, B, L): after each step
        begin = N * torch.arange(n, device=device)                                 # of each block: the state it begins in
    else:
        z = x.new_full((B * n, b), model.V)
        states = torch.stack(list(sample(Blocks(model, x), z, steps, order))).view(N + 1, B, L)
        begin = torch.zeros(n, dtype=torch.long, device=device)
    model.train(training)
    hidden = (states[0] == model.V).view(B, n, b).sum(-1)                          # (B, n), at the beginning
    at = begin + (stratified(B, n, device) * hidden.clamp(max=N)).long().clamp(max=N - 1)    # a state that a step began in
    return states[-1], states.gather(0, at.repeat_interleave(b, dim=1)[None])[0]


@torch.no_grad()
def opdlm(teacher, x, y, b):
    """Target of OPDLM: the frozen AR model on the finished rollout, p_T(y_i | x before i's block, y_<i in it). (B, L, V)

    It takes no account of what the student saw right of i in the block: a bias that `tcs` has not, and that grows with b;
    none where nothing is seen there, as at b = 1."""
    return teacher.restart(x, teacher.embedding(y), b).exp()


# ----------------------------------------------------------------------------------------------------------
# The sampler

def draw(p, u):
    """Tokens from p (.., V) by inverse CDF with uniforms u (..). Summed in float64: sampling in float32 has been biased
    towards likely tokens elsewhere (2409.02908)."""
    c = (p if p.device.type == "mps" else p.double()).cumsum(-1)
    return torch.searchsorted(c, (u.to(c) * c[..., -1])[..., None], right=True)[..., 0].clamp(max=p.size(-1) - 1)


def warp(logp, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities that tokens are drawn with, from log-probabilities (.., V). Each row for itself.

    temperature 0 and top_k 1 take the arg max; top_p keeps the likeliest tokens up to the one that reaches it."""
    if temperature < 1e-6 or top_k == 1:
        return F.one_hot(logp.softmax(-1).argmax(-1), logp.size(-1)).to(logp)
    p = (logp / temperature).softmax(-1)
    if not top_k and top_p == 1:
        return p
    best, index = p.sort(dim=-1, descending=True, stable=True)
    keep = best.cumsum(-1) - best < top_p
    keep[..., 0], keep[..., top_k or p.size(-1):] = True, False
    p = torch.zeros_like(p).scatter(-1, index, best * keep)
    return p / p.sum(-1, keepdim=True)


def sureness(logp, kind):
    """How sure the network is of a token, 0 to 1, from log-probabilities (.., V) -> (..)."""
    if kind == "confidence":
        return logp.amax(-1).exp()
    if kind == "margin":
        return -logp.topk(2).values.exp().diff(dim=-1)[..., 0]
    return (-torch.special.entr(logp.exp()).sum(-1)).exp()       # entropy: 1 / the number it hesitates between


SCORES = ("confidence", "margin", "entropy", "spread")             # orders that ask the network
CHANCE = ("ancestral", "random")
ORDERS = (*CHANCE, "left", *SCORES)


@torch.no_grad()
def sample(model, z, steps=0, order=None, threshold=0.0, remask=0, noise=None, **how):
    """Fills the hidden tokens of z (B, T), block by block, each block in `steps` steps; yields the state after each.

    A step reveals some tokens, all drawn in parallel from their own marginals (`warp(**how)`). steps 0: one token a step.

    order                            first come                                    how many a step
    ancestral                        random ones                                   each at a uniform one of the steps
    random, left                     random ones; those further left               equally many
    confidence, margin, entropy      the surest: by the likeliest token,           equally many
                                     its lead over the second, the entropy
    spread                           the surest, by entropy                        one of each stretch of `steps` hidden

    With a threshold a step reveals the first in order (`left`, unless told) and all that are at least so sure. Given tokens
    never change; those right of a block are seen only at b = L. An AR model has blocks of one token: ordinary generation.
    `remask` steps more, when a block is full, hide as many tokens again as one step revealed and draw them anew: those
    drawn with the least probability, or with random orders random ones. noise (B, T, 2 + 2 remask): uniforms, so that a row
    can be had again. Beyond the context the text goes on in windows that see the last half context."""
    order = order or ("left" if threshold else "spread")
    if order not in ORDERS:
        raise UserError(f"--order {order}: unknown; use {', '.join(ORDERS)}")
    L, b, z = model.L, model.b, z.clone()
    noise = torch.rand(*z.shape, 2 + 2 * remask, device=z.device) if noise is None else noise
    keep = L // 2 if b == L else L // 2 // b * b
    yield z.clone()
    for w in range(0, max(1, z.size(1) - keep), L - keep):
        for part in fill(model, z[:, w:w + L], noise[:, w:w + L], steps, order, threshold, remask, how):
            z[:, w:w + L] = part
            yield z.clone()


def schedule(hidden, N, remask, when=None):
    """How many tokens a row reveals in each step of each block: hidden (B, n, b) -> (B, n, N + remask).

    Equally many a step, or in the step that `when` (B, n, b) says; remasking as many again. And, as lists [block][step]
    so that nothing waits for the device, how many rows reveal some, and how many tokens are hidden in a row at most."""
    total = hidden.sum(-1, keepdim=True)
    if when is None:
        count = total // N + (torch.arange(N, device=hidden.device) < total % N).long()
    else:
        count = hidden.new_zeros(*hidden.shape[:2], N, dtype=torch.long).scatter_add(2, when, hidden.long())
    again = ((total + N - 1) // N).expand(-1, -1, remask)
    most = torch.cat([total - count.cumsum(-1) + count, again], dim=-1).amax(0)
    count = torch.cat([count, again], dim=-1)
    return count, (count > 0).sum(0).tolist(), most.tolist()


def choose(score, hidden, count, sure=None, stretch=None):
    """Which tokens a step reveals, (B, n): the `count` (B,) hidden ones of highest score; with `sure` (B, n) the first of
    them and all that are sure; with `stretch` (B, n), each token's number of one, the first of each stretch."""
    place = rank(-score.masked_fill(~hidden, -1))
    if stretch is not None:
        best = torch.full_like(place, hidden.size(1)).scatter_reduce(1, stretch, place, "amin")
        return hidden & (place == best.gather(1, stretch))
    if sure is not None:
        return hidden & (sure | (place == 0))
    return hidden & (place < count[:, None])


def fill(model, z, noise, steps, order, threshold, remask, how):
    """`sample` within one context, (B, L)."""
    z, b, V, (B, L) = z.clone(), model.b, model.V, z.shape
    N = b if threshold else steps or b                                             # steps in each block
    if b == 1:                                                                     # one token has no order
        N, order, remask = 1, "random", 0
    spread = order == "spread" and not threshold
    u, shuffle = noise.unflatten(-1, (-1, 2)).unbind(-1)                           # (B, L, 1 + remask)
    if order == "left":
        shuffle = (torch.arange(L, device=z.device) / L)[:, None].expand_as(shuffle)
    free, said = z == V, z.new_full((B, L), math.inf, dtype=noise.dtype)           # said: the probability it was drawn with
    when = blocks((shuffle[..., 0] * N).long(), b) if order == "ancestral" else None
    count, busy, most = schedule(blocks(free, b), N, remask, when)
    past = None
    for block, start in enumerate(range(0, L, b)):
        span, fresh = slice(start, min(start + b, L)), b < L   # a block's first call is for all rows: it fills the cache
        stretch = (free[:, span].cumsum(1) - 1).clamp(min=0) // N if spread else None      # hidden tokens 0..N-1: 0, ..
        for step in range(N + remask):
            redo = max(0, step - N + 1)                                            # 0: writing; 1, 2, ..: remasking
            if redo:
                least = (shuffle[..., redo] if order in CHANCE else said)[:, span].masked_fill(~free[:, span], 2)
                z[:, span].masked_fill_(rank(least) < count[:, block, step, None], V)
            hidden = z[:, span] == V
            rows, number, at_most = count[:, block, step] > 0, busy[block][step], most[block][step]
            if threshold:
                rows, at_most = hidden.any(1), int(hidden.sum(1).amax())
                number = int(rows.sum())
            if not number:                                                         # the network need not run
                yield z
                continue
            everyone = fresh or number == B
            active = slice(None) if everyone else rows.nonzero()[:, 0]
            kept = past if everyone or not past else ([kv[:, active] for kv in past[0]], past[1])
            with torch.inference_mode():                                           # quicker than no_grad
                logp, kept = model.decode(z[active], z[active], span.start, span.stop, kept, at_most)
                score = sureness(logp, order) if order in SCORES else 1 - shuffle[active, span, 0].to(logp)
                sure = None
                if threshold:
                    sure = (score if order in SCORES else sureness(logp, "confidence")) >= threshold
                apart = stretch[active] if spread and not redo else None
                new = choose(score, hidden[active], count[active, block, step], sure, apart)
                drawn = draw(warp(logp[new], **how), u[active, span, redo][new])       # only what is revealed
                z[active, span] = z[active, span].masked_scatter(new, drawn)
                if remask:
                    p = logp[new].gather(1, drawn[:, None])[:, 0].exp()
                    said[active, span] = said[active, span].masked_scatter(new, p.to(said))
            past, fresh = kept if everyone else past, False
            yield z


def rank(a):
    """Place of each number of a (B, n) in its row, the smallest 0."""
    order = a.argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(a.size(1), device=a.device).expand_as(order))


def generate(model, B, steps=0, given=None, **how):
    """The last state of `sample`: B texts (B, L). given (B, L) or (L,): tokens to keep, [MASK] where to write."""
    z = torch.full((B, model.L), model.V, device=model.embedding.weight.device)
    if given is not None:
        z = given.expand(B, -1)
    for z in sample(model, z, steps, **how):
        pass
    return z


@torch.no_grad()
def correct(model, x, doubt=6.0):
    """Rewrites unlikely tokens of a text x (L,), the worst first; yields (position, its doubt, the text so far).

    A token's doubt: how much likelier, in nats, the network finds its favourite in that place, given all the others that
    it may see. One call over L rows, each with one token hidden, judges them all; the worst becomes the favourite, and
    so on until none is doubted by more than `doubt`, or every place was tried once."""
    x, tried, eye = x.clone(), torch.zeros_like(x, dtype=torch.bool), torch.eye(len(x), dtype=torch.bool, device=x.device)
    while True:
        logp = model(x.expand(len(x), -1), x.masked_fill(eye, model.V))[eye]                          # (L, V)
        best, v = logp.max(-1)
        excess = (best - logp.gather(1, x[:, None])[:, 0]).masked_fill(tried, -1)
        i = int(excess.argmax())
        if excess[i] <= doubt:
            return
        x[i], tried[i] = v[i], True
        yield i, float(excess[i]), x.clone()


def unseen(z, model):
    """Whether some given token right of a hidden block will not be seen when that block is written (b < L)."""
    block = torch.arange(z.size(1), device=z.device) // model.b
    first = torch.where(z == model.V, block, len(block)).amin(1, keepdim=True)     # block with something hidden
    return bool(((z < model.V) & (block > first)).any())


# ----------------------------------------------------------------------------------------------------------
# Judging

def generators():
    """The modules that keep random numbers: the CPU's, and the accelerator's if there is one."""
    return [torch.random, *[torch.cuda] * torch.cuda.is_available(), *[torch.mps] * torch.backends.mps.is_available()]


def set_random_state(states):
    """states: of each of `generators`, as a checkpoint keeps them."""
    for g, state in zip(generators(), states):
        g.set_rng_state(state.cpu())


@contextlib.contextmanager
def seeded(seed):
    """Inside, random numbers follow `seed`; outside, they go on as if nothing had been drawn."""
    states = [g.get_rng_state() for g in generators()]
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(states)


@contextlib.contextmanager
def counting(model):
    """Counts what the network does inside: {"calls": of the network, "rows" in all of them, "slots": tokens run}."""
    count = {"calls": 0, "rows": 0, "slots": 0}

    def hook(_, inputs, output):
        count["calls"] += 1
        count["rows"] += len(inputs[0])
        count["slots"] += inputs[0].shape[:-1].numel()

    handle = model.layers[0].register_forward_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


@torch.no_grad()
def bound(model, x, repeats=1, seed=0):
    """Negative log-likelihood bound of texts x (n, L): mean and standard error over texts, nats per token; exact at b = 1.

    Mean over `repeats` states a text, the same states for every model of this b."""
    training = model.training
    model.eval()
    with seeded(seed):
        each = torch.cat([sum(text_bound(model, c, hide(c, model.b, model.V)) for _ in range(repeats)) / repeats
                          for c in x.split(128)])
    model.train(training)
    return each.mean().item(), (each.std() / len(each) ** 0.5).item()


def text_bound(model, x, z):
    """One state's estimate for each text: (B,)."""
    nll = -model(x, z).gather(2, x[..., None])[..., 0]
    return (weights(z == model.V, model.b) * nll).sum(1)


def grams(x, n):
    """The different n-grams of texts x (B, L), pooled: how often each stands there (number of them,)."""
    return x.cpu().unfold(1, n, 1).reshape(-1, n).unique(dim=0, return_counts=True)[1]


def entropy(x, n=1):
    """Entropy of the n-grams of texts x (B, L), pooled: nats. Beside every generative NLL, which repetition lowers."""
    counts = grams(x, n).double()
    return torch.special.entr(counts / counts.sum()).sum().item()


def distinct(x, n):
    """Share of the n-grams of texts x (B, L), pooled, that are different ones."""
    counts = grams(x, n)
    return len(counts) / int(counts.sum())


def known_words(texts, words):
    """Share of the whole words in `texts` (strings; the first and last may be cut and do not count) that are in `words`."""
    found = [w for t in texts for w in re.findall(r"\w+", t)[1:-1]]
    return sum(w in words for w in found) / max(1, len(found))


def judge_samples(judge, x, text):
    """What is said of generated tokens x (B, L): NLL under an AR judge, entropies, share of known words."""
    nll, se = bound(judge, x)
    return {"judge_nll": nll, "judge_se": se, "entropy": entropy(x), "bigram_entropy": entropy(x, 2),
            "distinct_2": distinct(x, 2), "distinct_3": distinct(x, 3),
            "known_words": known_words([text.tokenizer.decode(t) for t in x], text.words)}


def judge_sampling(model, B, judge, text, **way):
    """Lets a model write B texts: what is said of them and what they cost -> row, texts (B, L). `calls` of the network are
    those a text takes part in, on average; `seconds` are those of the whole batch."""
    with counting(model) as count:
        start = time.time()
        x = generate(model, B, **way)
        int(x[0, 0])                                                    # waits for the device
    return {**way, "calls": count["rows"] / B, "seconds": time.time() - start, **judge_samples(judge, x, text)}, x


@torch.no_grad()
def inference_gap(student, teacher, x, steps=0, order="spread"):
    """KL from what the AR teacher says of the next token to what the student says, nats per token: on the states the
    student visits when it writes blocks behind texts x (n, L) in this order, and on random masks of x."""
    b = student.b
    with seeded(0):
        y, z = rollout(student, x, steps, order)
        visited = loss(student, x, z, opdlm(teacher, x, y, b)).item()
        return visited, loss(student, x, hide(x, b, student.V), opdlm(teacher, x, x, b)).item()


def passages(text, n=512):
    """Held-out text, cut behind n of its words (for sums: results), evenly spaced: list of strings."""
    held = text.tokenizer.decode(text.parts["test"])
    ends = [m.end() for m in re.finditer(r"=\w+" if text.name == "arithmetic" else r"\w+", held)]
    ends = ends[len(ends) // 10:]                                       # each with something before it
    return [held[:end] for end in ends[::max(1, -(-len(ends) // n))]]


def last_word_accuracy(model, passages, tokenizer, **way):
    """Share of passages whose last word the model finds from what stands before it, of which it sees as much as its
    context holds. Greedy, told how many tokens to find; `way`: steps and order of `sample`. After LAMBADA (1606.06031)."""
    right, alike = [torch.zeros(0)], defaultdict(list)
    for p in passages:
        word = re.search(r" ?\w+(?=\W*$)", p)
        if word:
            known, wanted = (tokenizer.encode(s, unknown="drop") for s in (p[:word.start()][-20 * model.L:], word[0]))
            x = torch.cat([known, wanted])[-model.L:]
            z = torch.cat([known, torch.full_like(wanted, model.V)])[-model.L:]
            alike[len(x)].append((x, z))
    for pairs in alike.values():
        x, z = (torch.stack(each).to(model.embedding.weight.device) for each in zip(*pairs))
        right.append((generate(model, len(z), given=z, temperature=0, **way) == x).all(1).float().cpu())
    return torch.cat(right).mean().nan_to_num(0).item()


# ----------------------------------------------------------------------------------------------------------
# Training

def orthogonalise(G, steps=5):
    """Newton-Schulz: G (n, r, c) -> nearly U V^T of its singular value decomposition, (n, r, c).

    The quintic of Muon (kellerjordan.github.io/posts/muon), iterated on the smaller Gram matrix, in float32: on
    a CPU some 25 times faster than torch.optim.Muon, which works in bfloat16."""
    wide = G.size(1) <= G.size(2)
    A = G @ G.mT if wide else G.mT @ G
    size = A.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] + 1e-14
    A, Q = A / size, torch.eye(A.size(1), device=G.device).expand_as(A)
    for _ in range(steps):
        P = 3.4445 * torch.eye(A.size(1), device=G.device) - 4.7750 * A + 2.0315 * A @ A
        Q, A = Q @ P, P @ A @ P
    Q = Q / size.sqrt()
    return Q @ G if wide else G @ Q


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised, scaled to AdamW's usual size. For 2-D weights inside layers."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    alike[p.shape].append((p, p.grad.lerp(m, group["momentum"])))
            for shape, pairs in alike.items():
                for (p, _), update in zip(pairs, orthogonalise(torch.stack([g for _, g in pairs]))):
                    p.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


class Trainer:
    """The one loop, and all that a resumed run needs to equal an uninterrupted one."""

    ADAM = 0.15   # AdamW's learning rate for embedding and head, as a share of Muon's
    EMA = 0.99    # evaluation and later teachers use averaged weights

    def __init__(self, model, steps, lr):
        self.model, self.steps, self.step, self.seconds = model, steps, 0, 0.0
        ends = [model.embedding.weight, model.head.weight]
        fused = ends[0].device.type in ("cpu", "cuda")
        self.optimizers = [Muon(model.layers.parameters(), lr),
                           torch.optim.AdamW(ends, lr * self.ADAM, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)]
        self.rates = [lr, lr * self.ADAM]
        self.ema = {k: v.clone() for k, v in model.state_dict().items()}
        self.best, self.history = None, []     # [step, seconds, training loss, validation bound]
        self.loss_sum = 0.0                    # since the last line of the history

    def state(self):
        return {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                "ema": self.ema, "best": self.best, "history": self.history, "step": self.step, "seconds": self.seconds,
                "loss_sum": float(self.loss_sum), "random": [g.get_rng_state() for g in generators()]}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        for o, s in zip(self.optimizers, state["optimizers"]):
            o.load_state_dict(s)
        for k, v in state["ema"].items():
            self.ema[k].copy_(v)               # the checkpoint was read to the CPU, the model may be elsewhere
        for k in ("best", "history", "step", "loss_sum", "seconds"):
            setattr(self, k, state[k])
        set_random_state(state["random"])

    def averaged(self, weights=None):
        """A copy of the model with the averaged weights that did best on validation, or with these."""
        model = Transformer(self.model.c).to(self.model.embedding.weight.device)
        model.load_state_dict(weights or self.best or self.ema)
        return model.eval()

    def update(self, batch_loss):
        """One step. The rate rises over a tenth of the steps (at most 100), stays, and falls to zero over the last 60%."""
        left = (self.steps - self.step) / self.steps
        rate = min(1, (self.step + 1) / min(100, max(1, self.steps / 10)), left / 0.6)
        for o, lr in zip(self.optimizers, self.rates):
            o.param_groups[0]["lr"] = lr * rate
        value = self.gradient(batch_loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for o in self.optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        decay = min(self.EMA, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), list(self.model.state_dict().values()), 1 - decay)
        self.step += 1
        return value

    def gradient(self, batch_loss):
        """Adds the gradient of a batch's loss to the parameters -> the loss."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.model.embedding.weight.is_cuda):
            value = batch_loss()
        value.backward()
        return value.detach()

    def estimate(self, batch_loss):
        """Seconds that the steps left will take, from the fastest of three tries that leave no trace."""
        tries = []
        with seeded(0):
            for _ in range(3):
                start = time.time()
                float(self.gradient(batch_loss))                # waits for the device
                tries.append(time.time() - start)
        self.model.zero_grad(set_to_none=True)
        return min(tries) * (self.steps - self.step)

    def fit(self, batch_loss, validate, save, name, evaluations=10):
        """Trains to the last step. batch_loss() draws a batch and returns its loss; of validate(model) the weights that are
        kept have least; save() is called after every evaluation and on Ctrl-C, which is honoured between two steps."""
        print(f"{name}: about {self.estimate(batch_loss) / 60:.1f} minutes", flush=True)
        every, interrupted = max(1, self.steps // evaluations), []
        bar = tqdm(total=self.steps, initial=self.step, desc=name, unit="step", mininterval=0.5, disable=None)
        before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
        start = time.time() - self.seconds
        self.model.train()
        try:
            while self.step < self.steps:
                value = self.update(batch_loss)
                self.loss_sum = self.loss_sum + value
                bar.update()
                if self.step % 10 == 0:
                    bar.set_postfix(loss=f"{float(value):.3f}", val=f"{self.history[-1][3]:.3f}" if self.history else "-")
                if self.step % every == 0 or self.step == self.steps:
                    n, validation = self.step % every or every, validate(self.averaged(self.ema))
                    self.seconds = time.time() - start
                    if not self.history or validation < min(h[3] for h in self.history):
                        self.best = {k: v.clone() for k, v in self.ema.items()}
                    self.history.append([self.step, self.seconds, float(self.loss_sum) / n, validation])
                    self.loss_sum = 0.0
                    save()
                if interrupted:
                    self.seconds = time.time() - start
                    save()
                    raise KeyboardInterrupt
        finally:
            bar.close()
            signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------------------------
# Files and command lines

FORMAT = "dlm checkpoint 1"


def replace_file(path, write, option="--out"):
    """Writes a file whole or not at all: write(f) fills a temporary one beside it, which then takes its place."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{option}: cannot write {path} ({e.strerror}); free some space or name another folder") from None


def save(path, model, tokenizer, options, trainer=None, weights=None, corpus=None):
    """A checkpoint that needs nothing else: config, tokenizer, weights, options, the hash of the text it learned from, and
    with a Trainer all its state."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "config": dataclasses.asdict(model.c), "tokenizer": tokenizer.state(),
                "weights": weights or model.state_dict(), "options": options, "corpus": corpus,
                "trainer": trainer and trainer.state()}, buffer)
    replace_file(path, lambda f: f.write(buffer.getbuffer()))


def load(path, option, device="cpu"):
    """-> model in eval mode (with `weights`), tokenizer, the whole checkpoint. A folder stands for its checkpoint.pt."""
    path = Path(path)
    try:
        path = path / "checkpoint.pt" if path.is_dir() else path
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{option} {path}: there is no such checkpoint ({e.strerror}); train one with train_teacher.py "
                        "or distill.py") from None
    try:
        ckpt = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception:  # a broken file can fail in many ways inside torch.load
        raise UserError(f"{option} {path}: corrupt, or not a checkpoint; delete it or name another") from None
    if not isinstance(ckpt, dict) or ckpt.get("format") != FORMAT:
        raise UserError(f"{option} {path}: not a checkpoint of this program")
    model = Transformer(Config(**ckpt["config"])).to(device)
    model.load_state_dict(ckpt["weights"])
    return model.eval(), Tokenizer(**ckpt["tokenizer"]), ckpt


def same_text(folder, ckpt, text):
    """Refuses a checkpoint that learned from another version of a text: it may have seen what is held out now."""
    if ckpt.get("corpus", text.sha256) != text.sha256:
        raise UserError(f"--data {text.name}: is not the text that {folder} learned from; rename it, or delete that folder "
                        "to train anew")


def same_vocabulary(name, tokenizer, model, with_name, with_tokenizer, with_model):
    """Refuses models that do not read the same tokens, or not as many."""
    if tokenizer.state() != with_tokenizer.state():
        raise UserError(f"{name}: its vocabulary is not that of {with_name}; use models trained with the same --data "
                        "and --tokenizer")
    if model.L != with_model.L:
        raise UserError(f"{name}: its context is {model.L} and that of {with_name} {with_model.L}; train both with one "
                        "--context")


def write_json(path, data):
    replace_file(path, lambda f: f.write(json.dumps(data, indent=1).encode()))


def versions():
    return {"python": sys.version.split()[0], "torch": torch.__version__, "threads": torch.get_num_threads()}


def pick_device(name):
    """auto takes CUDA, then Apple's MPS, then the CPU."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(d for d in have if have[d])
    if not have.get(name, False):
        raise UserError(f"--device {name}: not to be had here; use {', '.join(d for d in have if have[d])} or auto")
    return name


def option(default, help, choices=None, at_least=None, at_most=2 ** 63 - 1):
    """A field of a script's config: the command line and --help are made from it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "range": (at_least, at_most)})


def parse(cls, argv=None, doc=None):
    """The command line for a dataclass of options; every error is one line and exit code 2."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)

    p = Parser(description=doc, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(cls):
        kind = type(f.default)
        extra = {"action": "store_true"} if kind is bool else {"type": kind, "choices": f.metadata["choices"]}
        p.add_argument("--" + f.name, default=f.default, help=f.metadata["help"], **extra)
    o = cls(**vars(p.parse_args(argv)))
    for f in dataclasses.fields(cls):
        (low, high), value = f.metadata["range"], getattr(o, f.name)
        if low is not None and not low <= value <= high:
            raise UserError(f"--{f.name} {value}: must be {f'at most {high}' if value > high else f'{low} or more'}")
    return o


def run_script(main, argv=None):
    """Runs main(argv) and turns what the user can mend into one line and exit code 2, Ctrl-C into 130."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")      # a terminal that cannot show a character shows ?
    try:
        main(argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
