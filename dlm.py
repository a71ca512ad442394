"""dlm: diffusion language models distilled from autoregressive ones, small enough to read.

One Transformer is both teacher and student. The flag is its block length b: with b = 1 attention
is causal (the autoregressive teacher), with b = L it is bidirectional (the masked-diffusion
student), and between them it is block diffusion. Every method minimises one loss,

    mean over texts of  sum_i w_i * D( target_i || p_student(x_i | z) ),

where z is the text with some tokens hidden. The methods differ in two words: which states z the
student trains on, and which target it aims at.

In this order: the Transformer; states, the loss and the bound; TCS; SDTT; OPDLM; the sampler; the
continuous student, which has noise in the place of masks; the few numbers we judge by. (The exact
sources that all of it is checked with stand in notebooks/exact.py.) Shapes: B texts, L tokens, V
tokens in the vocabulary. Likelihoods and KL divergences are in nats per token.
"""
import contextlib
import functools
import math
import os
import time
from dataclasses import dataclass

# Before torch is imported: what Apple's GPUs cannot do is done by the CPU.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(Exception):
    """Something the user can fix. The message is one line: the option, and the way out."""


# --------------------------------------------------------------------------------------------------
# The Transformer, and the flag that makes it teacher or student

@dataclass
class Config:
    V: int              # vocabulary; [MASK] is one more *input* symbol, id V, and never an output
    L: int = 64         # context in tokens
    b: int = 1          # block length: 1 causal, L bidirectional, between them block diffusion
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    D: int = 0          # dimensions of a noisy token (see `Continuous`); 0: tokens are hidden

    def __post_init__(self):
        if self.b > self.L:
            raise UserError(f"--block {self.b}: longer than the context of {self.L}; "
                            "use 0 for the whole context")


def clean_slots(L, b):
    """How many slots carry clean tokens in one pass over a text of L tokens (see `slots`)."""
    return L if b == 1 else (L - 1) // b * b                   # of all blocks but the last


def slots(L, b, device=None, start=0):
    """The input slots of one pass: their positions (S,), and which carry clean tokens (S,).

    start: only tokens from here on are noisy (see `decode`).

    Slot i holds token i-1 and says token i, as in any AR model; slot 0 holds [MASK].

    clean  [MASK] x_0 x_1 .. of all blocks but the last: the AR model itself. Where b > 1 these
           slots say nothing; later blocks look at them.
    noisy  of all blocks. Slot i holds z_{i-1} or, where i begins a block, x_{i-1}. To its
           embedding is added own(z_i): without that nobody would see a block's last token. (z is
           noisy by masks or, in a `Continuous` student, by noise.)

    L = 8, b = 4:   clean  [MASK] x0 x1 x2      noisy  [MASK] z0 z1 z2 | x3 z4 z5 z6

    The matrix `own` starts at zero. So a student with the weights of an AR model starts as that
    model, except that it also looks to the right in its block ("shift", DiffuLLaMA, 2410.17891).
    With b = 1 every slot begins a block: a noisy one would hold and see what the clean one does,
    so there are none. With b = L no block lies left of another, so no clean slot is needed.
    """
    clean = torch.arange(clean_slots(L, b), device=device)
    noisy = torch.arange(start, start if b == 1 else L, device=device)
    position = torch.cat([clean, noisy])
    return position, torch.arange(len(position), device=device) < len(clean)


def attends(position_q, clean_q, position_k, clean_k, b):
    """The attention mask (Q, K): which slot may look at which.

    A slot sees the clean slots before its block, and its block in its own stream. In the clean
    stream a block is one token, so that stream is causal. (The clean slots before a block hold all
    earlier tokens but the last one, which stands in the block's first noisy slot.)
    """
    length = torch.where(clean_q, 1, b)[:, None]
    begin = position_q[:, None] // length * length         # where the slot's own block begins
    earlier_clean = clean_k & (position_k < begin)
    same_stream = ~(clean_q[:, None] ^ clean_k)            # torch.compile fails on `==` here
    own_block = same_stream & (position_k >= begin) & (position_k < begin + length)
    return earlier_clean | own_block


def norm(h):
    """RMSNorm (1910.07467) without a gain, in three operations where F.rms_norm takes twenty."""
    return h / (torch.linalg.vector_norm(h, dim=-1, keepdim=True) * h.size(-1) ** -0.5)


def rotate(x, rope):
    """Rotary positions (2104.09864). x (.., B, H, T, D); rope (2, B or 1, 1, T, D)."""
    first, second = x.chunk(2, dim=-1)
    cos, signed_sin = rope
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), signed_sin).to(x.dtype)


class Cache:
    """Keys and values of slots, for each layer (2, B, H, room, D); the first `done` are valid."""

    def __init__(self, layers, done=0):
        self.layers = layers
        self.done = done


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.dropout = c.dropout
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.up = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.down = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)
        nn.init.zeros_(self.proj.weight)     # each layer starts as the identity
        nn.init.zeros_(self.down.weight)

    def forward(self, h, rope, mask, kept=None, done=0, last=0, wanted=None):
        """h (B, T, d) -> (B, T, d), or fewer slots by `last` and `wanted`.

        mask: (T, K) or (B, 1, T, K); "causal", if nothing is cached; None: every slot sees all.

        kept (2, B, H, room, D): a layer of the cache. Its first `done` slots are valid, and these T
        are written behind them. last: compute the output for the last so many slots only; 0: all.
        wanted (B, last): a mask of those; then the output holds the wanted ones (number, d).
        """
        B, T, d = h.shape
        qkv = self.qkv(norm(h)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        qk = norm(qkv[:2].contiguous())      # QK-norm, which lets the learning rate be high
        q, k = rotate(qk, rope)              # (B, H, T, D)
        v = qkv[2]
        if kept is not None:
            kept[:, :, :, done:done + T] = torch.stack([k, v])
            k, v = kept[:, :, :, :done + T].to(q.dtype)
        causal = isinstance(mask, str)
        if causal:
            mask = None
        if last:
            q = q[:, :, -last:]
            h = h[:, -last:]
            mask = None if mask is None else mask[..., -last:, :]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        y = y.transpose(1, 2).reshape(h.shape)
        if wanted is not None:
            h, y = h[wanted], y[wanted]                    # (number wanted, d)
        h = h + F.dropout(self.proj(y), self.dropout, self.training)
        y = self.down(self.up(norm(h)).relu_().square())     # ReLU² (2109.08668)
        return h + F.dropout(y, self.dropout, self.training)


def behind(ar_slots, e, b):
    """What slots hold if each block of e stands behind the text before it. All are (B, L, d).

    Slot i holds e_{i-1} or, where i begins a block, the text's own x_{i-1}: what the AR model's
    slot i holds.
    """
    begins_block = torch.arange(e.size(1), device=e.device) % b == 0
    return torch.where(begins_block[:, None], ar_slots, F.pad(e[:, :-1], (0, 0, 1, 0)))


class Transformer(nn.Module):
    """log p(x_i | the clean blocks left of i's block, the visible tokens of its own block).

    model(x, z) -> (B, L, V). x (B, L) are clean tokens and z (B, L) the same with some hidden,
    that is [MASK] = V. With b = 1 z is not read, with b = L x is not. What the network says at
    visible tokens is never used: they are copied ("SUBS", MDLM, 2406.07524).
    """

    def __init__(self, c):
        super().__init__()
        if c.n_embd % (2 * c.n_head):
            raise UserError(f"--n_embd {c.n_embd}: must be an even multiple of --n_head {c.n_head}")
        if c.dropout >= 1:
            raise UserError(f"--dropout {c.dropout}: must be below 1")
        self.c = c
        self.V = c.V
        self.L = c.L
        self.b = c.b
        self.bos = c.V                       # what slot 0 holds: [MASK] stands for "begin of text"
        self.embedding = nn.Embedding(c.V + 1, c.n_embd)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layer))
        self.head = nn.Linear(c.n_embd, c.V, bias=False)
        if c.b > 1:
            self.own = nn.Linear(c.n_embd, c.n_embd, bias=False)    # for the slot's own token, z_i
            nn.init.zeros_(self.own.weight)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        D = c.n_embd // c.n_head
        wavelength = 10000 ** (torch.arange(0, D, 2) / D)
        angles = torch.arange(c.L)[:, None] / wavelength
        cos = angles.cos().repeat(1, 2)
        signed_sin = torch.cat([angles.sin(), -angles.sin()], dim=1)
        rope = torch.stack([cos, signed_sin])                                   # (2, L, D)
        self.register_buffer("rope", rope, persistent=False)
        self.register_buffer("ends_block", torch.arange(1, c.L + 1) % c.b == 0, persistent=False)

    def forward(self, x, z):
        L, b = x.size(1), self.b
        if b == 1:                                                              # the AR model
            position = torch.arange(L, device=x.device)
            return self.log_probs(self.run(self.embedding(self.shift(x)), position, "causal"))
        position, clean = slots(L, b, x.device)
        mask = None if b >= L else attends(position, clean, position, clean, b)
        e = self.embedding(self.shift(x)[:, :clean_slots(L, b)])
        e = torch.cat([e, self.noisy(x, z, slice(L))], dim=1)
        return self.log_probs(self.run(e, position, mask, last=L))

    def noisy(self, x, z, window):
        """What the noisy slots of a window of the text hold: (B, T, d)."""
        before = self.shift(torch.where(self.ends_block[:x.size(1)], x, z))
        return self.embedding(before[:, window]) + self.own(self.embedding(z[:, window]))

    def shift(self, x):
        """x_0 .. x_{L-1} -> bos x_0 .. x_{L-2}: what the AR model's slots hold."""
        return F.pad(x[:, :-1], (1, 0), value=self.bos)

    def run(self, e, position, mask, cache=None, last=0, wanted=None):
        """Embeddings e (B, T, d) at positions (T,) or (B, T) -> hidden states (B, T, d), or fewer.

        Fills the cache. last, wanted: which slots the last layer computes, as in Layer.
        """
        h = norm(e)
        rope = self.rope[:, position].view(2, -1, 1, e.size(1), self.rope.size(-1))  # as in rotate
        done = cache.done if cache else 0
        for i, layer in enumerate(self.layers[:-1]):
            h = layer(h, rope, mask, cache and cache.layers[i], done)
        return self.layers[-1](h, rope, mask, cache and cache.layers[-1], done, last, wanted)

    def log_probs(self, h):
        """Hidden states (.., d) -> log-probabilities (.., V), in float32 also under autocast."""
        return F.log_softmax(self.head(norm(h)), dim=-1)

    def empty_cache(self, B, room):
        D = self.c.n_embd // self.c.n_head
        shape = (2, B, self.c.n_head, room, D)
        return Cache([self.embedding.weight.new_empty(shape) for _ in self.layers])

    @torch.inference_mode()
    def decode(self, x, z, start, stop, wanted, cache=None):
        """For the sampler: model(x, z)[:, start:stop][wanted], which is (n, V), and the cache.

        Only quicker, since clean slots run once. x (B, L): the finished text before each block; z
        (B, L): the state of one block or several; wanted (B, stop - start), with n times True.
        cache: what the last call returned, None in the first; where b >= L it stays None, since
        there are no clean slots.

        The slots of a call are the clean ones that are not in the cache yet, then the noisy ones:

                           clean slots, cached or new   noisy slots
            AR model       0 .. stop-1                  none
            one block      0 .. start-1                 start .. stop-1
            all at once    0 .. L-b-1                   0 .. L-1         (start = 0, stop = L)

        Only clean slots stay in the cache: the next call overwrites what lies behind them.
        """
        b = self.b
        if b >= x.size(1):                                 # no cache, so rows may be left out
            rows = wanted.any(1)
            x, z, wanted = x[rows], z[rows], wanted[rows]
        n_clean = clean_slots(stop, b)
        position, is_clean = slots(stop, b, x.device, start)
        if cache is None and b < x.size(1):
            cache = self.empty_cache(len(x), max(x.size(1), len(position)))
        done = cache.done if cache else 0
        mask = None                                        # one block sees itself and the cache
        if done < start or stop - start > b:               # new clean slots, or several blocks
            mask = attends(position[done:], is_clean[done:], position, is_clean, b)
        e = self.embedding(self.shift(x)[:, done:n_clean])
        if b > 1:
            e = torch.cat([e, self.noisy(x, z, slice(start, stop))], dim=1)
        h = self.run(e, position[done:], mask, cache, stop - start, wanted)
        if cache:
            cache.done = n_clean
        return self.log_probs(h), cache

    # The rest is for AR models only: what methods ask of their teacher.

    def score_behind(self, x, e, b):
        """log p(y_i | x before i's block, y_<i in it) (B, L, V): each block of y stands behind x.

        With y = x this is model(x, x). Else it is, for each block, the AR model's answers to a text
        that is x before the block and y in it, all in one call. e (B, L, d) are the embeddings of
        y, which `suffix_gradient` differentiates by. b: the student's.
        """
        L = x.size(1)
        n_clean = clean_slots(L, b)                        # of x; the last block needs none
        ar_slots = self.embedding(self.shift(x))
        every = torch.arange(L, device=x.device)
        position = torch.cat([every[:n_clean], every])
        is_x = torch.arange(len(position), device=x.device) < n_clean
        causal = position <= position[:, None]
        mask = attends(position, is_x, position, is_x, b) & causal       # in the blocks, too
        e = torch.cat([ar_slots[:, :n_clean], behind(ar_slots, e, b)], dim=1)
        return self.log_probs(self.run(e, position, mask, last=L))

    def prefill(self, x):
        """log p(x_i | x_<i) (B, L, V), and the cache that `score_continuations` goes on from."""
        B, L = x.shape
        cache = self.empty_cache(B, L)
        position = torch.arange(L, device=x.device)
        h = self.run(self.embedding(self.shift(x)), position, "causal", cache)
        cache.done = L
        return self.log_probs(h), cache

    def score_continuations(self, e, start, cache):
        """log p of G other continuations, each W tokens long, of each text cut at n places.

        e (B, n, G, W, d): embeddings of tokens start-1 .. start+W-2, which enter the slots start ..
        start+W-1; start (n,). -> log p(x_{start+w} | ..) (B, n, G, W, V): what the model would
        say if these tokens stood there. The batch has a row for each place of each text. It holds
        that place's G continuations side by side; each sees the cached slots before `start` and
        itself. Answers for positions past the context mean nothing.

        G = W = 2, start 5:   cached slots 0 .. 4 | slots 5 6 of the one | slots 5 6 of the other
        """
        B, n, G, W, d = e.shape
        w = torch.arange(W, device=e.device)
        causal = w <= w[:, None]
        itself = torch.block_diag(*[causal] * G)                              # (G W, G W)
        before = torch.arange(cache.done, device=e.device) < start[:, None]   # (n, done)
        before = before[:, None].expand(-1, G * W, -1)
        mask = torch.cat([before, itself.expand(n, -1, -1)], dim=-1)          # (n, G W, done + G W)
        mask = mask.repeat(B, 1, 1)[:, None]                                  # of each row
        position = (start[:, None] + w).clamp(max=self.L - 1).repeat(B, G)    # (B n, G W)
        copies = [F.pad(kv.repeat_interleave(n, dim=1), (0, 0, 0, G * W)) for kv in cache.layers]
        e = e.view(B * n, G * W, d)
        h = self.run(e, position, mask, Cache(copies, cache.done))
        return self.log_probs(h).view(B, n, G, W, -1)


# --------------------------------------------------------------------------------------------------
# States and the loss: what to hide, the one thing that every method minimises, and the bound

def stratified(B, n, device):
    """Uniform numbers (B, n). Those of a column lie 1 / B apart, in random order."""
    permutation = torch.rand(B, n, device=device).argsort(0)
    return (permutation + torch.rand(n, device=device)) / B


def stratified_integers(B, n, N, device):
    """The same for integers 0 .. N-1; N may differ, (B, n)."""
    return (stratified(B, n, device) * N).long().clamp(max=N - 1)               # rounding reaches N


def cut_blocks(rows, b, fill=0):
    """Rows (B, L) cut into blocks (B, n, b), the last one filled up."""
    return F.pad(rows, (0, -rows.size(1) % b), value=fill).view(len(rows), -1, b)


def hide(x, b, mask_id):
    """Masked data: in each block hide a random m-subset, m uniform on 1..block length. -> z (B, L)

    MDLM's bound (2406.07524, 2406.03736) is ∫ 1/t E[ Σ_hidden -log p(x_i | z) ] dt, where each
    token is hidden with probability t. A set of m tokens of n is hidden with probability
    t^m (1-t)^(n-m), so it has the weight ∫ t^(m-1) (1-t)^(n-m) dt = 1 / (m C(n, m)). So we may as
    well draw m uniformly, then the set, and take the mean over its m tokens, times n:
    `token_weights`. The m are stratified over the batch. At b = 1 everything is hidden, and the
    loss is the AR model's.
    """
    size = cut_blocks(torch.ones_like(x), b).sum(-1)                            # (B, n)
    m = stratified_integers(*size.shape, size, x.device) + 1
    u = torch.rand(x.shape, device=x.device)
    u = cut_blocks(u, b, fill=2.0)              # (B, n, b), what is filled up comes last
    rank_in_block = u.argsort(-1).argsort(-1)   # of each random number, the lowest first
    hidden = (rank_in_block < m[..., None]).flatten(1)[:, :x.size(1)]
    return torch.where(hidden, mask_id, x)


def token_weights(hidden, b):
    """Weight of each hidden token (B, L): block length / number hidden in its block / L.

    So a weighted sum is the mean over the hidden tokens of each block, averaged over the text.
    """
    L = hidden.size(1)
    in_blocks = cut_blocks(hidden.float(), b)                                   # (B, n, b)
    number = in_blocks.sum(-1, keepdim=True).clamp(min=1)
    size = cut_blocks(torch.ones_like(hidden), b).sum(-1, keepdim=True)
    return (in_blocks * size / number / L).flatten(1)[:, :L]


def divergence(p, log_q, kind="forward"):
    """D(target p || student q) over the last axis: p (.., V), log_q (.., V) -> (..), nats.

    forward  Σ p log p/q: q must be likely wherever p is. With p one-hot it is -log q(x_i).
    reverse  Σ q log q/p: infinite where p = 0 < q
    tvd      ½ Σ |p - q|
    mse      Σ (p - q)²
    """
    if kind == "forward":
        finite = log_q.clamp(min=-1e4)  # 0 · -inf would be NaN
        return torch.xlogy(p, p).sum(-1) - (p * finite).sum(-1)
    q = log_q.exp()
    if kind == "reverse":
        return (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1)
    if kind == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if kind == "mse":
        return (p - q).square().sum(-1)
    raise UserError(f"--divergence {kind}: unknown; use forward, reverse, tvd or mse")


def loss(student, x, z, target, kind="forward"):
    """The one loss: mean over texts of Σ_i w_i D(target_i || p_student(x_i | z)), nats per token.

    x (B, L): the text left of each block; z (B, L): the state; target (B, L, V). With a one-hot
    target D is -log p_student(x_i | z), and with z = hide(x, b, V) the loss estimates without bias
    the bound on the negative log-likelihood. At b = 1 it is an AR model's mean cross-entropy,
    -1/L Σ_i log p(x_i | x_<i).
    """
    hidden = hidden_in(z, student.V)                                          # (B, L)
    # Visible tokens are left out, although their weight is 0: there D may be infinite.
    w = token_weights(hidden, student.b)[hidden]                              # (number hidden,)
    return (w * divergence(target, student(x, z), kind)[hidden]).sum() / len(x)


def hidden_in(z, V):
    """Which tokens of a state are asked about (B, L): hidden ones, or noisy ones (`Noisy`)."""
    return z.hidden if isinstance(z, Noisy) else z == V


def of_tokens(logp, x):
    """log p of tokens x (..), from logp (.., V): (..)."""
    return logp.gather(-1, x[..., None])[..., 0]


def one_hot(x, V):
    """Target of plain masked diffusion: the text itself. (B, L, V)"""
    return F.one_hot(x, V).float()


@torch.no_grad()
def prefix(teacher, x, y, b):
    """The causal target, also OPDLM's: p_T(y_i | x before i's block, y_<i in it). (B, L, V)

    With real text, y = x, this is p_T(x_i | x_<i). In OPDLM y is a finished rollout. The target
    ignores what the student saw to the right of i in the block. This bias grows with b; at b = 1
    there is none.
    """
    return teacher.score_behind(x, teacher.embedding(y), b).exp()


@torch.no_grad()
def bound(model, x, repeats=1, seed=0, neighbours=1):
    """Negative log-likelihood bound of texts x (n, L): mean and standard error, nats per token.

    It is exact at b = 1. Of a `Continuous` model it is no bound, but the loss at its noise levels.
    Each text is hidden `repeats` times; the seed makes these states the same for all models with
    this b. neighbours: so many texts in a row are cut from one longer text and are alike, so the
    error is computed over such groups of them.
    """
    each = torch.zeros(len(x), device=x.device, dtype=model.embedding.weight.dtype)
    with seeded(seed), evaluating(model):
        for rows in torch.arange(len(x), device=x.device).split(at_once(model)):
            for _ in range(repeats):
                z = states_of(model, x[rows])
                each[rows] += text_bound(model, x[rows], z) / repeats
    alike = max(1, min(neighbours, len(each) // 2))                  # two groups at the least
    groups = torch.stack([group.mean() for group in each.split(alike)])
    return each.mean().item(), (groups.std() / len(groups) ** 0.5).item()


def text_bound(model, x, z):
    """One state's estimate of each text's bound (B,): `loss` with `one_hot`, text by text."""
    hidden = hidden_in(z, model.V)
    nll = -of_tokens(model(x, z), x)                        # -log p(x_i | z)
    return (token_weights(hidden, model.b) * nll.where(hidden, 0)).sum(1)


def states_of(model, x):
    """States such as plain diffusion trains on."""
    return noisy_states(model, x) if is_continuous(model) else hide(x, model.b, model.V)


def at_once(model):
    """How many texts to run at once, so that log-probabilities (texts, L, V) stay below 16 MB."""
    return min(128, max(1, 2 ** 22 // (model.L * model.V)))


# --------------------------------------------------------------------------------------------------
# TCS: the teacher's target concrete score (OpenReview xfw92pDy2u; TCSM, 2504.16431)
#
# The concrete score of v at i is p_T(x with x_i = v) / p_T(x). Here x ends with i's block, since
# the student sees no further. Normalised over v the score is
#
#     c_i(v) = p_T(v | x_<i, rest of i's block) ∝ p_T(v | x_<i) · p_T(rest of i's block | x_<i, v).

ESTIMATORS = ("exact", "topk", "grad+topk", "grad")


def suffix_log_prob(teacher, x, cache, candidates, b):
    """log p_T(x_{i+1} .. end of i's block | x_<i, x_i = v), v in candidates (B, L, K) -> (B, L, K).

    In plain words, with a call of the teacher for each i and k:

        y = x, but y_i = v = candidates[:, i, k]
        out[:, i, k] = Σ_{j = i+1 .. end of i's block} log p_T(y_j | y_<j)

    Here a call takes the same place of many blocks, whose suffixes have one length W (some end at
    L), and many candidates side by side, all behind the cached text.
    """
    L = x.size(1)
    out = teacher.embedding.weight.new_zeros(candidates.shape)
    for place in range(min(b, L) - 1):
        W = min(b, L) - 1 - place
        side_by_side = max(1, 64 // W)                # attention costs (side_by_side W)²
        # The same place of every block; 16 blocks at a time, to save memory.
        for i in torch.arange(place, L - 1, b, device=x.device).split(16):    # (n,)
            after = i[:, None] + 1 + torch.arange(W, device=x.device)         # (n, W)
            inside = (after < L)[:, None]             # of the last block, which may be shorter
            suffix = x[:, after.clamp(max=L - 1)]                             # (B, n, W)
            parts = []
            for v in candidates[:, i].split(side_by_side, dim=-1):            # (B, n, G)
                logp = continuation_log_prob(teacher, cache, i + 1, v, suffix)
                parts.append(logp.where(inside, 0).sum(-1))                   # (B, n, G)
            out[:, i] = torch.cat(parts, dim=-1)
    return out


def continuation_log_prob(teacher, cache, start, v, suffix):
    """log p_T of each token of a suffix (B, n, W) behind v (B, n, G), which enters slot `start`."""
    suffix = suffix[:, :, None].expand(-1, -1, v.size(-1), -1)                # (B, n, G, W)
    tokens = torch.cat([v[..., None], suffix[..., :-1]], dim=-1)
    logp = teacher.score_continuations(teacher.embedding(tokens), start, cache)
    return of_tokens(logp, suffix)


def suffix_gradient(teacher, x, b):
    """∇_{e_i} log p_T(rest of i's block | x_<=i) for every i: (B, L, d). One forward, one backward.

    In `score_behind` e_i enters only slot i+1, if that is in i's block, and only later slots of the
    block see it. So the gradient of the sum over all tokens is that of the rest of i's block.
    """
    with torch.enable_grad():
        e = teacher.embedding(x).detach().requires_grad_()
        logp = of_tokens(teacher.score_behind(x, e, b), x)
        return torch.autograd.grad(logp.sum(), e)[0]


@torch.no_grad()
@torch.autocast("cuda", enabled=False)   # differences of long sums, which bfloat16 would blur
def concrete_score(teacher, x, b, estimator="topk", K=16):
    """log c_i(v) at every token of x (B, L) -> (B, L, V), normalised over v. The estimators:

    exact      scores all V substitutions
    topk       scores the K that are likeliest under p_T(v | x_<i)
    grad+topk  scores the K of the highest gradient score
    grad       the gradient score: log p_T(v | x_<i) + <∇_{e_i} log p_T(suffix), E_v - E_{x_i}>

    Where x_i is not among the candidates C the result is one-hot x_i. Given the other tokens of a
    text that the teacher wrote, x_i follows c_i. So it is in C with probability c_i(C), where the
    result is c_i(v) / c_i(C): on average the result is c_i again, for every K, if C does not depend
    on x_i. So it is for topk, where C depends on x_<i, but not for grad+topk.
    """
    V = teacher.V
    prior, cache = teacher.prefill(x)                         # log p_T(v | x_<i)  (B, L, V)
    ranking = prior
    if estimator in ("grad", "grad+topk"):
        E = teacher.embedding.weight[:V]
        g = suffix_gradient(teacher, x, b)                                      # (B, L, d)
        ranking = prior + g @ E.T             # <g, -E_{x_i}> is the same for all v, so it may go
    if estimator == "grad":
        return log_normalised(ranking)
    if estimator == "exact":
        K = V
    candidates = ranking.topk(min(K, V), dim=-1).indices                        # (B, L, K)
    joint = prior.gather(-1, candidates) + suffix_log_prob(teacher, x, cache, candidates, b)
    log_c = torch.full_like(prior, -math.inf).scatter(-1, candidates, log_normalised(joint))
    text_itself = torch.where(F.one_hot(x, V).bool(), 0.0, -math.inf)
    missed = (candidates != x[..., None]).all(-1, keepdim=True)
    return torch.where(missed, text_itself, log_c)


def tcs(teacher, x, b, estimator="topk", K=16):
    """Targets of TCS at every token of x (B, L): candidates v and c_i(v), both (B, L, K).

    c_i depends on the text and on b, not on what is hidden. So it is computed once, before
    training, and serves every epoch and noise level. Kept are the K candidates only, since V
    numbers a token would fill the memory; `dense` makes a batch of them a target again.
    """
    if estimator in ("exact", "grad"):
        K = teacher.V
    c = concrete_score(teacher, x, b, estimator, K).exp().float()
    c, candidates = c.topk(min(K, teacher.V), dim=-1)
    return candidates.int(), c


def log_normalised(score):
    """Log-probabilities (.., V) from scores. Impossible evidence (all -inf) gives uniform ones."""
    impossible = (score == -math.inf).all(-1, keepdim=True)
    return score.masked_fill(impossible, 0.0).log_softmax(-1)


def dense(v, c, V):
    """Candidates and their probabilities (B, L, K) -> target (B, L, V)."""
    return c.new_zeros(*c.shape[:2], V).scatter(-1, v.long(), c)


# --------------------------------------------------------------------------------------------------
# SDTT: self-distillation through time (2410.21035)

def hide_at_step_times(x, b, mask_id, N):
    """States that an N-step sampler meets: in each block every token is hidden with probability t.

    t is drawn uniformly from 1/N, 2/N .. 1, stratified over the batch. x (B, L) -> z (B, L), and
    t (B, L) of each token's block.
    """
    B, L = x.shape
    n_blocks = -(-L // b)
    step = stratified_integers(B, n_blocks, N, x.device)
    t = ((step + 1) / N).repeat_interleave(b, dim=1)[:, :L]
    return torch.where(torch.rand(B, L, device=x.device) < t, mask_id, x), t


def ancestral(hidden, moment, elapsed):
    """The ancestral step: which tokens are revealed when `elapsed` of the time has passed.

    Each hidden token has a moment of its own, uniform over the time t that is left. So a step of
    size dt reveals it with probability dt / t, independently of the others. Moments and elapsed
    time count from the same instant: the present one (`sdtt`), or the beginning of the block
    (`Schedule`).
    """
    return hidden & (moment < elapsed)


@torch.no_grad()
def sdtt(earlier_self, x, z, t, dt, k=2):
    """Target of SDTT: what the earlier self says during its next k ancestral steps. (B, L, V)

    There are k calls, with k - 1 steps between them. A token's target is from the last call that
    saw it hidden, which is what it was drawn from, if it was. With k = 1 it is what the earlier
    self says of z. x, z, t (B, L): the
    text, the state, and the time of each token's block; dt: the size of a step.
    """
    target = earlier_self(x, z).exp()
    for step in range(k - 1):
        t_now = (t - step * dt).clamp(min=0)
        moment = torch.rand(z.shape, device=z.device) * t_now
        revealed = ancestral(z == earlier_self.V, moment, dt)      # with probability dt / t_now
        drawn = categorical(target, torch.rand(z.shape, device=z.device))
        z = torch.where(revealed, drawn, z)
        hidden = (z == earlier_self.V)[..., None]
        target = torch.where(hidden, earlier_self(x, z).exp(), target)
    return target


# --------------------------------------------------------------------------------------------------
# OPDLM: on-policy distillation of an AR model into a diffusion LM (2606.06712); target: `prefix`

class BlocksAtOnce:
    """Stands in for `model` in `sample`, so that all blocks of texts x (B, L) are written at once.

    Row j of z (B n, b) is block j % n of text j // n, behind x's own earlier blocks; n = L / b. So
    a text has one block, which begins at 0, and a call of `decode` answers for all of them.
    """

    def __init__(self, model, x):
        self.model = model
        self.x = x
        self.V = model.V
        self.b = model.b
        self.L = model.b

    def decode(self, x, z, start, stop, wanted, cache):
        B, L = self.x.shape
        return self.model.decode(self.x, z.view(B, L), 0, L, wanted.view(B, L), cache)


@torch.no_grad()
def rollout(model, x, steps=0, order="spread"):
    """States of OPDLM: what the model itself writes, and a state from the way there. -> y, z (B, L)

    y is written by `sample`: each block behind x's own earlier blocks, all blocks at once. z is y
    with some tokens still hidden: in each block the state before one of its steps, any of them.
    """
    B, L = x.shape
    b = model.b
    if order not in ORDERS[1:]:
        raise UserError(f"--order {order}: rollouts take {', '.join(ORDERS[1:])}; "
                        "an ancestral step may reveal nothing")
    if L % b:
        raise UserError(f"--block {b}: does not divide the context of {L}, as rollouts need")
    n_blocks = L // b
    N = min(steps or b, b)
    z = x.new_full((B * n_blocks, b), model.V)
    with evaluating(model):
        states = torch.stack(list(sample(BlocksAtOnce(model, x), z, N, order)))
    states = states.view(N + 1, B, L)
    step = stratified_integers(B, n_blocks, N, x.device)
    chosen = step.repeat_interleave(b, dim=1)                                 # (B, L)
    return states[-1], states.gather(0, chosen[None])[0]


# --------------------------------------------------------------------------------------------------
# The sampler

ORDERS = ("ancestral", "random", "confidence", "spread", "left")
TIE = 0.01      # nats of chance in each score: float32's error must not decide between equals


def categorical(p, u):
    """Tokens from p (.., V), by inverse CDF with uniforms u (..).

    Summed in float64, since sampling in float32 is biased towards likely tokens (2409.02908).
    """
    cdf = (p if p.device.type == "mps" else p.double()).cumsum(-1)
    level = u.to(cdf) * cdf[..., -1]
    token = torch.searchsorted(cdf, level[..., None], right=True)[..., 0]
    return token.clamp(max=p.size(-1) - 1)


def warp(logp, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities that tokens are drawn with, from log-probabilities (.., V).

    temperature 0 and top_k 1 take the arg max. top_p keeps the likeliest tokens up to the one that
    reaches it.
    """
    if temperature < 1e-6 or top_k == 1:
        return F.one_hot(logp.softmax(-1).argmax(-1), logp.size(-1)).to(logp)
    p = (logp / temperature).softmax(-1)
    if not top_k and top_p == 1:
        return p
    best, index = p.sort(dim=-1, descending=True, stable=True)
    if top_k:
        best = best.masked_fill(torch.arange(p.size(-1), device=p.device) >= top_k, 0)
        best = best / best.sum(-1, keepdim=True)
    likelier = best.cumsum(-1) - best                        # sum of all that are likelier
    best = best.masked_fill(likelier >= top_p, 0)
    return torch.zeros_like(p).scatter(-1, index, best / best.sum(-1, keepdim=True))


def rank(score, hidden):
    """Place of each hidden token in its row (B, n), the highest score first: 0, 1, 2 .."""
    order = score.masked_fill(~hidden, -math.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.size(1), device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def first(score, hidden, count):
    """The `count` (B, 1) hidden tokens of highest score in each row. (B, n)"""
    return hidden & (rank(score, hidden) < count)


def first_of_each(score, hidden, count):
    """Cuts each row's hidden tokens into `count` (B, 1) equal stretches (but for one token), and
    takes the one of highest score in each. (B, n)"""
    index = (hidden.cumsum(1) - 1).clamp(min=0)              # 0, 1, 2 .. along the hidden tokens
    stretch = index * count // hidden.sum(1, keepdim=True).clamp(min=1)
    place = rank(score, hidden)                              # visible ones come last
    best = torch.full_like(place, place.size(1)).scatter_reduce(1, stretch, place, "amin")
    return hidden & (place == best.gather(1, stretch))


@torch.no_grad()
def sample(model, z, steps=0, order=None, threshold=0.0, uniforms=None, **warping):
    """Fills the hidden tokens of z (B, T) block by block, and yields the state after each step.

    A block takes `steps` steps; 0 means one token a step. A step reveals k of its tokens, hidden
    tokens / steps left, rounded up. They are drawn in parallel, each from its own distribution, as
    `warp` makes it. Which k tokens:

    left         the leftmost of each of k equal stretches. This is the default: tokens drawn
                 together do not know of each other, and here they stand as far apart as they can
    spread       the surest of each stretch, by entropy
    confidence   the k surest, by likeliest token
    random       k random ones
    ancestral    each at its own random moment, so that k is random, too

    Continuous students know `left` and `together`, where all tokens of a block lose their noise at
    once.

    threshold: all whose likeliest token has at least this probability, before `warp`, come as well
    (but for `ancestral` and continuous students). Given tokens never change; those right of a block
    are seen only if b = L. An AR model has blocks of one token, so this is ordinary generation.
    Beyond the context the text goes on in windows, each of which begins with the last half context.
    uniforms (B, T, 2): random numbers to draw with, so that a row can be reproduced (but not that
    of a continuous student, whose noise is normal).
    """
    order = order or "left"
    if order not in orders_of(model):
        raise UserError(f"--order {order}: this model knows {', '.join(orders_of(model))}")
    L, b = model.L, model.b
    z = z.clone()
    if uniforms is None:
        uniforms = torch.rand(*z.shape, 2, device=z.device)
    overlap = L // 2 if 2 * b > L else L // 2 // b * b      # whole blocks, where one fits
    yield z.clone()
    for start in range(0, max(1, z.size(1) - overlap), L - overlap):
        window = slice(start, start + L)
        part = (model, z[:, window], uniforms[:, window], steps)
        if is_continuous(model):
            filling = fill_from_noise(*part, order, warping)
        else:
            filling = fill(*part, order, threshold, warping)
        for _ in filling:
            yield z.clone()


def fill(model, z, uniforms, steps, order, threshold, warping):
    """`sample` within one context: fills z (B, L) in place, and yields after each step.

    uniforms (B, L, 2): what a token is drawn with, and what random orders and ties go by.
    """
    cache = None
    for start in range(0, z.size(1), model.b):
        block = z[:, start:start + model.b]                  # a view of z
        stop = start + block.size(1)
        uniform = uniforms[:, start:stop, 0]
        schedule = Schedule(order, steps, threshold, uniforms[:, start:stop, 1])
        for step in range(schedule.N):
            may_come = schedule.may_come(step, block == model.V)              # (B, n)
            if may_come.any():                               # else the network need not run
                # Left of the block z is the finished text. logp has a row for each that may come.
                logp, cache = model.decode(z, z, start, stop, may_come, cache)
                new = schedule.choose(step, may_come, logp)                   # (B, n)
                p = warp(logp[new[may_come]], **warping)                      # (number new, V)
                block.masked_scatter_(new, categorical(p, uniform.masked_select(new)))
            yield


class Schedule:
    """Which hidden tokens of a block each of its N steps reveals. All masks are (B, n)."""

    def __init__(self, order, steps, threshold, shuffle):
        n = shuffle.size(1)
        self.N = steps or n
        self.order = order
        if n == 1:                 # an AR model, or a last token alone: it comes, and nothing needs
            self.N = 1             # to be ordered, as in an ancestral step with N = 1
            self.order = "ancestral"
        self.threshold = threshold
        self.shuffle = shuffle                               # a random number for each token

    def may_come(self, step, hidden):
        """The tokens that the network is asked about. An ancestral step knows them beforehand."""
        if self.order == "ancestral":
            return ancestral(hidden, self.shuffle, (step + 1) / self.N)
        return hidden

    def choose(self, step, may_come, logp):
        """Which of them come, by what the network says: logp (number of them, V)."""
        if self.order == "ancestral":
            return may_come
        steps_left = self.N - step
        k = -(-may_come.sum(1, keepdim=True) // steps_left)  # rounded up: the last step ends it
        of_stretches = self.order in ("left", "spread")
        take = first_of_each if of_stretches else first
        new = take(self.score(may_come, logp), may_come, k)
        if self.threshold:
            sure = logp.amax(-1) >= math.log(self.threshold)
            new = new | torch.zeros_like(new).masked_scatter(may_come, sure)
        return new

    def score(self, may_come, logp):
        """The order, as a number for each token (B, n): the highest comes first.

        Where the network is about equally sure, as of a first block of which all is hidden, chance
        decides, and not rounding.
        """
        if self.order == "random":
            return self.shuffle
        if self.order == "left":
            return -torch.arange(may_come.size(1), device=logp.device).expand_as(may_come).to(logp)
        if self.order == "spread":
            sureness = -torch.special.entr(logp.exp()).sum(-1)
        else:
            sureness = logp.amax(-1)
        score = logp.new_zeros(may_come.shape).masked_scatter(may_come, sureness)
        return score + TIE * self.shuffle


def generate(model, B, steps=0, given=None, **way):
    """The last state of `sample`: B texts (B, L). given (B, L) or (L,): tokens, [MASK] to write."""
    z = torch.full((B, model.L), model.V, device=model.embedding.weight.device)
    if given is not None:
        z = given.expand(B, -1)
    for z in sample(model, z, steps, **way):
        pass
    return z


@torch.no_grad()
def nll_in_steps(model, x, steps=0):
    """Exact negative log-likelihood of texts x (n, L) for the sampler: mean, standard error.

    In nats per token, n at least 2. In the order `left` the step that reveals a token does not
    depend on the text. So the p(x) of `sample`, at temperature 1, is the product of what the
    network says of each token in that step. It counts the price of drawing the tokens of a step
    independently. steps: per block; 0 means one token a step, from left to right as an AR model.

    All blocks are hidden and asked at once, since each sees the text itself to its left.
    """
    reveals = left_steps(x.size(1), model.b, steps).to(x.device)                # (L,)
    nll = torch.zeros(len(x), device=x.device, dtype=model.embedding.weight.dtype)
    with evaluating(model):
        for rows in torch.arange(len(x), device=x.device).split(at_once(model)):
            for step in reveals.unique():
                z = torch.where(reveals >= step, model.V, x[rows])
                logp = of_tokens(model(x[rows], z), x[rows])                    # (rows, L)
                nll[rows] -= logp[:, reveals == step].sum(1) / x.size(1)
    return nll.mean().item(), (nll.std() / len(nll) ** 0.5).item()


def left_steps(L, b, steps):
    """The step of its block in which the order `left` reveals each token of a text: (L,)."""
    blocks = []
    for start in range(0, L, b):
        hidden = torch.ones(1, min(b, L - start), dtype=torch.bool)             # (1, n)
        schedule = Schedule("left", steps, 0.0, torch.zeros(hidden.shape))      # no threshold
        step_of = torch.zeros(hidden.size(1), dtype=torch.long)
        for step in range(schedule.N):
            logp = torch.zeros(int(hidden.sum()), 1)                            # is not looked at
            new = schedule.choose(step, hidden, logp)
            step_of[new[0]] = step
            hidden = hidden & ~new
        blocks.append(step_of)
    return torch.cat(blocks)


# --------------------------------------------------------------------------------------------------
# The continuous student: noise in the place of masks
#
# Token v is a point E_v. A noisy token is z_i = alpha E[x_i] + sigma eps, and how noisy it is, says
# gamma = log(sigma² / alpha²). All points are equally long, so what the noise leaves of x_i is
# softmax_v(alpha/sigma² z_i·E_v), whatever stands around it. So by Bayes' rule
#
#     p(x_i | x_!=i, z_i) = softmax_v( log c_i(v) + alpha/sigma² z_i·E_v ),
#
# with the concrete score c_i that a masked student has for its target. Endless noise is [MASK], no
# noise is a visible token. Noise levels: LangFlow (2604.11748).

CLEAN = -15.0       # the gamma of visible tokens: sigma is .0006


def rates(gamma):
    """alpha and sigma, whose squares add up to 1."""
    return (-gamma).sigmoid().sqrt(), gamma.sigmoid().sqrt()


@dataclass
class Noisy:
    """A state of noisy tokens."""
    z: torch.Tensor         # (B, L, D)
    gamma: torch.Tensor     # (B, L)
    hidden: torch.Tensor    # (B, L), the tokens that are asked about; the others are CLEAN

    def __getitem__(self, rows):
        return Noisy(self.z[rows], self.gamma[rows], self.hidden[rows])


class Continuous(Transformer):
    """log p(x_i | the clean blocks left of i's block, the noisy tokens z of its own block).

    model(x, z: Noisy) -> (B, L, V). The slots are those of the masked student. A noisy token is
    read as the mean embedding of what it may be, by its noise alone. So near gamma = CLEAN it is
    the token's own embedding, and the student begins as the AR model whose weights it has. (To
    read its own last guess instead was tried. It counts the same evidence twice, and in small
    sources the texts became always the same.)
    """

    def __init__(self, c):
        super().__init__(c)
        self.level = nn.Linear(2, c.n_embd, bias=False)      # tells the network alpha and sigma
        nn.init.zeros_(self.level.weight)
        self.register_buffer("E", torch.empty(c.V, c.D))
        self.register_buffer("gumbel", torch.tensor([math.log(c.D / 4), 0.85]))      # mu, beta
        self.set_points(torch.randn(c.V, c.D))

    def set_points(self, W):
        """Puts the tokens in the directions of W (V, d), brought to D dimensions, all √D long."""
        if W.size(1) > self.c.D:
            W = W - W.mean(0)
            W = W @ torch.linalg.svd(W, full_matrices=False).Vh[:self.c.D].T
        W = F.pad(W, (0, self.c.D - W.size(1)))
        self.E.copy_(F.normalize(W, dim=-1) * self.c.D ** 0.5)

    def forward(self, x, z):
        return (super().forward(x, z) + self.channel(z)).log_softmax(-1)

    def decode(self, x, z, start, stop, wanted, cache=None):
        logp, cache = super().decode(x, z, start, stop, wanted, cache)
        return (logp + self.channel(z)[wanted]).log_softmax(-1), cache

    def channel(self, z):
        """What the noise alone says of each token, not normalised: (B, L, V)."""
        alpha, sigma = rates(z.gamma[..., None])                                # (B, L, 1)
        return alpha / sigma ** 2 * (z.z @ self.E.T)

    def noisy(self, x, z, window):
        level = self.level(torch.stack(rates(z.gamma), dim=-1))
        said = self.channel(z).softmax(-1)                                      # (B, T, V)
        e = said @ self.embedding.weight[:self.V] + level                       # (B, T, d)
        ar_slots = self.embedding(self.shift(x)[:, window])
        return behind(ar_slots, e, self.b) + self.own(e)

    def with_noise(self, x, hidden, gamma):
        """Texts x (B, L) with noise of level gamma (B, L) on the hidden tokens (B, L): a state."""
        gamma = torch.where(hidden, gamma.to(self.E), CLEAN)
        alpha, sigma = rates(gamma[..., None])
        return Noisy(alpha * self.E[x] + sigma * torch.randn_like(self.E[x]), gamma, hidden)

    def levels(self, u):
        """Noise levels by uniforms u (..): mostly where the answer is neither plain nor hopeless.

        What noise costs in nats goes as A exp(-exp(-(gamma - mu) / beta)), measured in
        assets/levels.png. So its slope is the density of a Gumbel law, whose quantiles these are.
        """
        mu, beta = self.gumbel
        u = u.to(mu).clamp(1e-4, 1 - 1e-4)
        return mu - beta * (-u.log()).log()


def is_continuous(model):
    return isinstance(getattr(model, "_orig_mod", model), Continuous)   # torch.compile wraps it


def noisy_states(student, x):
    """States to train on: one noise level a block. In every second text some tokens are visible."""
    B, L = x.shape
    n_blocks = -(-L // student.b)
    u = stratified(B, n_blocks, x.device)
    gamma = student.levels(u).repeat_interleave(student.b, dim=1)[:, :L]
    some_hidden = hide(x, student.b, student.V) == student.V
    all_hidden = (torch.arange(B, device=x.device) % 2 == 0)[:, None]           # (B, 1)
    return student.with_noise(x, some_hidden | all_hidden, gamma)


def seen_through(student, z, target):
    """What a target (B, L, V) for masked tokens becomes where the noise leaves something of them.

    With c_i it is p_T(x_i | x_!=i, z_i), and its mean over the teacher's completions of z is
    p_T(x_i | z). A one-hot target stays what it is.
    """
    return (target.log() + student.channel(z)).softmax(-1)


def orders_of(model):
    return ("together", "left") if is_continuous(model) else ORDERS


def fill_from_noise(model, z, uniforms, steps, order, warping):
    """`sample` within one context: fills z (B, L) in place, and yields after each step.

    A block begins as noise. A step asks what the tokens are, and moves them towards the mean of
    that, to their next lower level ("DDIM", 2010.02502). At the end of its way a token is drawn and
    is visible from then on. Until then z shows what is likeliest.
    """
    cache = None
    for start in range(0, z.size(1), model.b):
        block = z[:, start:start + model.b]                                     # a view of z
        stop = start + block.size(1)
        state = only_noise(model, block)
        if not state.hidden.any():
            continue
        uniform = uniforms[:, start:stop, 0]
        progress = ways_out_of_noise(block.size(1), steps, order).to(z.device)  # (N + 1, n)
        level = model.levels(1 - progress)   # high to low, but never to CLEAN: that is by drawing
        for step in range(len(progress) - 1):
            ends = state.hidden & (progress[step + 1] == 1)         # whose way ends in this step
            state.gamma = torch.where(state.hidden, level[step], CLEAN)
            # Ask the network.
            logp, cache = model.decode(z, state, start, stop, torch.ones_like(ends), cache)
            logp = logp.view(*block.shape, -1)                                  # (B, n, V)
            # Draw the tokens whose way ends. The others are only shown: what is likeliest now.
            said = logp.argmax(-1)                                              # (B, n)
            said[ends] = categorical(warp(logp[ends], **warping), uniform[ends])
            block.copy_(torch.where(state.hidden, said, block))
            # Move the others to their next level; what was drawn is clean from now on.
            less_noise(state, logp.exp() @ model.E, level[step + 1])
            state.z = torch.where(ends[..., None], model.E[said], state.z)
            state.hidden = state.hidden & ~ends
            yield


def only_noise(model, block):
    """The state in which nothing is left of the hidden tokens of a block (B, n)."""
    hidden = block == model.V
    gamma = torch.full(block.shape, 20.0, device=block.device)     # beyond the highest level
    return model.with_noise(block.masked_fill(hidden, 0), hidden, gamma)


@functools.lru_cache
def ways_out_of_noise(n, steps, order):
    """How far each of n tokens has come out of the noise before each step, and at the end.

    -> (N + 1, n), from 0 to 1. In the order `left` each is drawn in one step, when a masked student
    would reveal it if nothing is given: so nothing is ever half noisy, and noise does what a mask
    does.
    """
    N = steps or n
    if order == "together":
        return (torch.arange(N + 1) / N)[:, None].expand(-1, n)
    N = min(N, n)
    return (torch.arange(N + 1)[:, None] > left_steps(n, n, N)).float()


def less_noise(state, mean, lower):
    """Moves the hidden tokens of a state to lower noise levels (n,), towards points (B, n, D)."""
    alpha, sigma = rates(state.gamma[..., None])                                # (B, n, 1)
    lower_alpha, lower_sigma = rates(lower[..., None])                          # (n, 1)
    eps = (state.z - alpha * mean) / sigma
    moved = lower_alpha * mean + lower_sigma * eps
    state.z = torch.where(state.hidden[..., None], moved, state.z)


# --------------------------------------------------------------------------------------------------
# Randomness, counting, and the few numbers we judge by

def generators():
    """The modules that keep random numbers: the CPU's, and the accelerator's if there is one."""
    cuda = [torch.cuda] if torch.cuda.is_available() else []
    mps = [torch.mps] if torch.backends.mps.is_available() else []
    return [torch.random, *cuda, *mps]


def set_random_state(states):
    """Sets the state of each of `generators`, as a checkpoint keeps them."""
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
def evaluating(model):
    """Inside, the model is in evaluation mode; outside, it is as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def counting(model):
    """Counts what the network does inside: calls, rows in all of them, slots (tokens run)."""
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


def gram_counts(x, n):
    """How often each different n-gram of texts x (B, L) stands there: (number of them,)."""
    grams = x.cpu().unfold(1, n, 1).reshape(-1, n)
    return grams.unique(dim=0, return_counts=True)[1]


def entropy(x, n=1):
    """Entropy of the n-grams of texts x (B, L), in nats. Dull texts have little of it."""
    counts = gram_counts(x, n).double()
    return torch.special.entr(counts / counts.sum()).sum().item()


def distinct(x, n):
    """Share of the n-grams of texts x (B, L) that are different ones."""
    counts = gram_counts(x, n)
    return len(counts) / int(counts.sum())


def copied(x, text, n=8):
    """Share of the n-grams of texts x (B, L) that stand in `text` (T,), token for token."""
    base = torch.tensor([6364136223846793005 ** k % 2 ** 63 for k in range(n)])  # a rolling hash

    def hashes(rows):
        return (rows.cpu().unfold(-1, n, 1) * base).sum(-1)      # int64, which wraps around

    return torch.isin(hashes(x), hashes(text)).float().mean().item()


def write_at_cost(model, B, given=None, **way):
    """Lets a model write B texts -> the way and what it cost, as a row of a table; texts (B, L).

    given (B, L): the state to begin with; None: all is hidden. calls: steps that reveal something
    of a text, on average, which are the calls of the network that it would need alone. seconds: of
    the whole batch.
    """
    x = given
    if given is None:
        x = torch.full((B, model.L), model.V, device=model.embedding.weight.device)
    calls = 0
    start = time.time()
    for z in sample(model, x, **way):
        calls += B if is_continuous(model) else (z != x).any(1).sum()
        x = z
    calls -= B if is_continuous(model) else 0                # the first state took none
    return {**way, "calls": int(calls) / B, "seconds": time.time() - start}, x


@torch.no_grad()
def inference_gap(student, teacher, x, steps=0, order="spread"):
    """KL from what the AR teacher says of the next token to what the student says, nats per token.

    Two numbers: on the states the student visits when it writes blocks behind texts x (n, L) in
    this order, and on random masks of x.
    """
    b = student.b
    with seeded(0):
        y, z = rollout(student, x, steps, order)
        visited = loss(student, x, z, prefix(teacher, x, y, b)).item()
        z = hide(x, b, student.V)
        return visited, loss(student, x, z, prefix(teacher, x, x, b)).item()
