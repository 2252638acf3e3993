"""The forward pass of one stage: Llama, GPT-2 and OPT, our own, split by layers.

Knows: the families' arithmetic, tiles of rows, which tensors a stage maps. Must not know: processes, epochs, who schedules, sampling.
Invariants (batch-invariant mode): a position's hidden state, KV and logits are a function of its sequence alone, bit for bit: not of the other
rows of the step, their number or order, nor of whether the step is a replay. Every matrix product runs over a fixed number of rows: positions
outside a prompt in tiles of exactly DECODE_ROWS, a prompt's chunk in a tile of its own. Proven with one compute thread.
The serving path imports torch, safetensors and numpy, never transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy

import torch
from torch.nn import functional

from kvguard.pipeline.attention import Paging, attend, pool_shape
from kvguard.pipeline.batch import PREFILL_CHUNK, Batch, Share
from kvguard.pipeline.weights import ModelFiles, ModelShape, rope_parameters, tensor_shapes
from kvguard.types import Span

DECODE_ROWS = 8  # M: a product over 8 rows costs little more than over one, for reading the weights is what costs
CPU = torch.device("cpu")
_WIDE = 2048  # outputs computed at once: the output projection in pieces that stay in cache takes three quarters of the time
_ROPE_UNIT = 1024  # rotary tables grow by whole units, each computed in one way, so that no entry depends on when it was made

_ACTIVATION: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class Rows:
    """How a step's rows are padded and tiled.

    `padded`: int64 [tile rows], the row each tile row holds (padding repeats a row). `place`: int64 [rows], where each row lies. `tiles`: the
    half-open ranges over which products run. In plain mode, no padding and one tile.
    """

    def __init__(self, counts: list[tuple[int, bool]], invariant: bool):
        """`counts`: (rows, own tile) of each share, in order; shares without a tile of their own fill tiles of DECODE_ROWS together."""
        total = sum(count for count, _ in counts)
        self.tiles: list[tuple[int, int]] = []
        if not invariant:
            self.padded = self.place = torch.arange(total)
            self.tiles = [(0, total)] if total else []
            return
        together: list[int] = []
        own: list[list[int]] = []
        row = 0
        for count, own_tile in counts:
            if own_tile:
                own.append(list(range(row, row + count)))
            else:
                together.extend(range(row, row + count))
            row += count
        tiles = [together[i:i + DECODE_ROWS] for i in range(0, len(together), DECODE_ROWS)] + own
        padded: list[int] = []
        place = [0] * total
        for tile in tiles:
            start = len(padded)
            for i, held in enumerate(tile):
                place[held] = start + i
            padded += tile + [tile[-1]] * (-len(tile) % DECODE_ROWS)
            self.tiles.append((start, len(padded)))
        self.padded, self.place = torch.tensor(padded, dtype=torch.int64), torch.tensor(place, dtype=torch.int64)

    def on(self, device: torch.device) -> Rows:
        """These, with their numbers where the rows are."""
        self.padded, self.place = self.padded.to(device), self.place.to(device)
        return self

    def each(self, what: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """`what`, which sums along each row of x [tile rows, ...]. A GPU splits such a sum by how many rows there are: there tile by tile, as products."""
        if len(self.tiles) == 1 or x.device == CPU:
            return what(x)
        return torch.cat([what(x[start:end]) for start, end in self.tiles])

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [tile rows, in] times weight [out, in], tile by tile."""
        if len(self.tiles) == 1:
            return _linear(x, weight, bias)
        return torch.cat([_linear(x[start:end], weight, bias) for start, end in self.tiles])


class StageModel:
    """The layers [layers.start, layers.stop) of a model, mapped from its files; `first` embeds, `last` computes logits.

    `dtype` and `device` are those of weights, hidden states and pool. Raises BadConfig if a tensor is missing, ValueError for layers that the model lacks.
    """

    def __init__(
        self, files: ModelFiles, layers: range, first: bool, last: bool, dtype: torch.dtype = torch.float32, invariant: bool = True,
        device: torch.device = CPU,
    ):  # fmt: skip
        shape = files.shape
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= shape.layers:
            raise ValueError(f"stage of layers {layers.start} to {layers.stop}: the model has {shape.layers}. Try: no more stages than layers")
        self.shape, self.layers, self.first, self.last, self.dtype, self.invariant, self.device = shape, layers, first, last, dtype, invariant, device
        family = {"llama": _Llama, "gpt2": _Gpt2, "opt": _Opt}[shape.family]
        read = files.read(tensor_shapes(shape, layers, first, last), dtype)
        self._family: _Family = family(shape, {name: tensor.to(device) for name, tensor in read.items()}, dtype, device)

    def part(self, layers: range, first: bool, last: bool) -> StageModel:
        """A stage within this one that shares its tensors: what a standby, which maps the whole model and is warm, becomes when it is claimed.
        Raises ValueError for what this one has not.
        """
        if layers.step != 1 or not self.layers.start <= layers.start < layers.stop <= self.layers.stop or first > self.first or last > self.last:
            raise ValueError(f"layers {layers.start} to {layers.stop}, first={first}, last={last} are not within layers {self.layers.start} to "
                             f"{self.layers.stop}, first={self.first}, last={self.last}. Try: a stage of the whole model")
        made = copy(self)
        made.layers, made.first, made.last = layers, first, last
        return made

    def warm(self) -> None:
        """Runs a prompt's chunk and a decoded position on a small pool of its own, so that the weights are in memory and mapped, and the
        libraries have chosen their kernels, before a step's deadline counts. Takes as long as reading the weights.
        """
        block_tokens, end = 16, min(PREFILL_CHUNK, self.shape.context - 1)
        blocks = tuple(range(-(-(end + 1) // block_tokens)))
        kv = torch.zeros(self.pool_shape(len(blocks), block_tokens), dtype=self.dtype, device=self.device)
        for span, prefill in ((Span(0, end), True), (Span(end, end + 1), False)):
            rows = span.end - span.start
            x = torch.zeros(rows, dtype=torch.int64) if self.first else torch.zeros(rows, self.shape.hidden, dtype=self.dtype)
            self.forward(x, Batch((Share("warm", span, prefill, blocks, 1),), block_tokens), kv)

    def pool_shape(self, blocks: int, block_tokens: int) -> tuple[int, ...]:
        """The shape that `kv` must have: [layers, 2, blocks, block_tokens, kv_heads, head_dim]."""
        return pool_shape(len(self.layers), blocks, block_tokens, self.shape.kv_heads, self.shape.head_dim)

    @torch.inference_mode()
    def forward(self, x: torch.Tensor, batch: Batch, kv: torch.Tensor, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """One step. `x`: ids int64 [rows] for a first stage, else hidden states [rows, hidden]; rows as in `batch`; from any device. `kv`: this stage's pool,
        written for the batch's positions and read up to them. `on_layer(i)` is called after layer i (numbered in the whole model).

        Returns hidden states [rows, hidden], or of a last stage logits [batch.logit_rows, vocab].
        """
        x = x.to(self.device)
        if not batch.shares:
            return x.new_empty((0, self.shape.vocab if self.last else self.shape.hidden), dtype=self.dtype)
        self._check(x, batch, kv)
        rows = Rows([(share.count, share.prefill) for share in batch.shares], self.invariant)
        paging = Paging(batch, self.shape.heads // self.shape.kv_heads, self.dtype, self.invariant, self.device)
        positions = torch.cat([torch.arange(share.span.start, share.span.end) for share in batch.shares])[rows.padded]
        rows, turn = rows.on(self.device), self._family.turns(positions)
        hidden = self._family.embed(x[rows.padded], positions.to(self.device)) if self.first else x[rows.padded]
        for number, layer in enumerate(self.layers):
            q, k, v = self._family.project(layer, hidden, rows, turn)
            read = attend(q[rows.place], k[rows.place], v[rows.place], kv[number], paging, self._family.scale(layer))
            hidden = self._family.finish(layer, hidden, read[rows.padded], rows)
            if on_layer is not None:
                on_layer(layer)
        hidden = hidden[rows.place]
        return self._logits(hidden, batch) if self.last else hidden

    def rows_are_independent(self) -> bool:
        """Whether this machine's matrix products keep the promise of batch-invariant mode: tries each distinct shape of product once, with the
        other rows changed and the row moved. False means that equal bits after a resume are luck here.
        """
        draw = torch.Generator().manual_seed(0)
        tried: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        for weight in self._family.products():
            if (tuple(weight.shape), weight.stride()) in tried:
                continue
            tried.add((tuple(weight.shape), weight.stride()))
            rows, others = (torch.randn(DECODE_ROWS, weight.shape[1], generator=draw).to(self.device, self.dtype) for _ in range(2))
            expected = _linear(rows, weight)
            for place in range(DECODE_ROWS):
                others[place] = rows[0]
                if not torch.equal(_linear(others, weight)[place], expected[0]):
                    return False
        return True

    def _logits(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Logits of the rows that asked for them, in tiles of their own: the output projection is the largest product of a small model."""
        wanted, row = [], 0
        for share in batch.shares:
            row += share.count
            wanted += range(row - share.logits, row)
        if not wanted:
            return hidden.new_empty((0, self.shape.vocab))
        rows = Rows([(len(wanted), False)], self.invariant).on(self.device)
        return self._family.logits(hidden[torch.tensor(wanted, device=self.device)][rows.padded], rows)[rows.place]

    def _check(self, x: torch.Tensor, batch: Batch, kv: torch.Tensor) -> None:
        expected = self.pool_shape(kv.shape[2], batch.block_tokens)
        assert tuple(kv.shape) == expected and kv.dtype == self.dtype, f"pool is {kv.dtype} {tuple(kv.shape)}, expected {self.dtype} {expected}"
        assert x.shape == ((batch.rows,) if self.first else (batch.rows, self.shape.hidden)), f"x is {tuple(x.shape)} for {batch.rows} rows"
        longest = max(share.span.end for share in batch.shares)
        assert longest <= self.shape.context, f"position {longest - 1} is beyond the model's context of {self.shape.context}"
        batch.check(kv.shape[2])


class _Family:
    """What the three families share. Hidden states are [tile rows, hidden] throughout."""

    stem = "layers"
    final_norm = ""
    embedding = "embed_tokens.weight"

    def __init__(self, shape: ModelShape, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device):
        self.shape, self.tensors, self.dtype, self.device = shape, tensors, dtype, device
        self.activate = _ACTIVATION[shape.activation]

    def of(self, layer: int, name: str) -> torch.Tensor | None:
        return self.tensors.get(f"{self.stem}.{layer}.{name}")

    def product(self, layer: int, name: str, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return rows.product(x, self.of(layer, f"{name}.weight"), self.of(layer, f"{name}.bias"))

    def products(self) -> Iterator[torch.Tensor]:
        """Every weight that product() and logits() multiply by, as [out, in]."""
        for name, tensor in self.tensors.items():
            if tensor.dim() == 2 and name.startswith(f"{self.stem}."):
                yield tensor
        output = self.tensors.get(self.embedding if self.shape.tied else "lm_head.weight")
        if output is not None:
            yield output

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], self.shape.norm_eps)

    def normed(self, name: str, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return rows.each(lambda part: self.norm(name, part), x)

    def scale(self, layer: int) -> float:
        return self.shape.head_dim**-0.5

    def turns(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`positions`: on the CPU."""
        return None

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, self.shape.head_dim)

    def logits(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        if f"{self.final_norm}.weight" in self.tensors:
            hidden = self.normed(self.final_norm, hidden, rows)
        return rows.product(hidden, self.tensors[self.embedding if self.shape.tied else "lm_head.weight"])


class _Llama(_Family):
    final_norm = "norm"

    def __init__(self, shape: ModelShape, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device):
        super().__init__(shape, tensors, dtype, device)
        self._frequencies = _rope_frequencies(shape)
        self._cos = self._sin = torch.empty(0, shape.head_dim // 2)

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.tensors[self.embedding])

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.shape.norm_eps)
        return self.tensors[f"{name}.weight"] * wide.to(x.dtype)

    def turns(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self._cos) <= int(positions.max()):
            start = len(self._cos)
            angles = torch.arange(start, start + _ROPE_UNIT, dtype=torch.float32)[:, None] * self._frequencies
            self._cos, self._sin = torch.cat([self._cos, angles.cos()]), torch.cat([self._sin, angles.sin()])
        return self._cos[positions][:, None].to(self.device, self.dtype), self._sin[positions][:, None].to(self.device, self.dtype)

    def project(self, layer: int, hidden: torch.Tensor, rows: Rows, turn) -> tuple[torch.Tensor, ...]:
        x = self.normed(f"layers.{layer}.input_layernorm", hidden, rows)
        q, k, v = (self.heads(self.product(layer, f"self_attn.{name}_proj", x, rows)) for name in "qkv")
        return _rotate(q, *turn), _rotate(k, *turn), v

    def finish(self, layer: int, hidden: torch.Tensor, read: torch.Tensor, rows: Rows) -> torch.Tensor:
        hidden = hidden + self.product(layer, "self_attn.o_proj", read, rows)
        x = self.normed(f"layers.{layer}.post_attention_layernorm", hidden, rows)
        gated = self.activate(self.product(layer, "mlp.gate_proj", x, rows)) * self.product(layer, "mlp.up_proj", x, rows)
        return hidden + self.product(layer, "mlp.down_proj", gated, rows)


class _Gpt2(_Family):
    stem = "h"
    final_norm = "ln_f"
    embedding = "wte.weight"

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.tensors[self.embedding]) + functional.embedding(positions, self.tensors["wpe.weight"])

    def product(self, layer: int, name: str, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        return rows.product(x, self.of(layer, f"{name}.weight").t(), self.of(layer, f"{name}.bias"))  # stored inputs first

    def products(self) -> Iterator[torch.Tensor]:
        return (tensor if tensor is self.tensors.get(self.embedding) else tensor.t() for tensor in super().products())

    def scale(self, layer: int) -> float:
        scale = self.shape.head_dim**-0.5 if self.shape.raw.get("scale_attn_weights", True) else 1.0
        return scale / (layer + 1) if self.shape.raw.get("scale_attn_by_inverse_layer_idx") else scale

    def project(self, layer: int, hidden: torch.Tensor, rows: Rows, turn) -> tuple[torch.Tensor, ...]:
        together = self.product(layer, "attn.c_attn", self.normed(f"h.{layer}.ln_1", hidden, rows), rows)
        return tuple(self.heads(part.contiguous()) for part in together.chunk(3, dim=-1))

    def finish(self, layer: int, hidden: torch.Tensor, read: torch.Tensor, rows: Rows) -> torch.Tensor:
        hidden = hidden + self.product(layer, "attn.c_proj", read, rows)
        x = self.normed(f"h.{layer}.ln_2", hidden, rows)
        return hidden + self.product(layer, "mlp.c_proj", self.activate(self.product(layer, "mlp.c_fc", x, rows)), rows)


class _Opt(_Family):
    final_norm = "final_layer_norm"

    def embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # OPT keeps two unused rows before position 0.
        return functional.embedding(ids, self.tensors[self.embedding]) + functional.embedding(positions + 2, self.tensors["embed_positions.weight"])

    def project(self, layer: int, hidden: torch.Tensor, rows: Rows, turn) -> tuple[torch.Tensor, ...]:
        x = self.normed(f"layers.{layer}.self_attn_layer_norm", hidden, rows)
        return tuple(self.heads(self.product(layer, f"self_attn.{name}_proj", x, rows)) for name in "qkv")

    def finish(self, layer: int, hidden: torch.Tensor, read: torch.Tensor, rows: Rows) -> torch.Tensor:
        hidden = hidden + self.product(layer, "self_attn.out_proj", read, rows)
        x = self.normed(f"layers.{layer}.final_layer_norm", hidden, rows)
        return hidden + self.product(layer, "fc2", self.activate(self.product(layer, "fc1", x, rows)), rows)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if len(weight) <= 2 * _WIDE or bias is not None:
        return functional.linear(x, weight, bias)
    return torch.cat([functional.linear(x, piece) for piece in weight.split(_WIDE)], dim=1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of x [rows, heads, head_dim]; cos and sin [rows, 1, head_dim / 2]. Halves, not pairs, as checkpoints store them."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _rope_frequencies(shape: ModelShape) -> torch.Tensor:
    """Angle per position of each pair of elements, float32 [head_dim / 2]."""
    rope = rope_parameters(shape.raw)
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).to(torch.float32) / shape.head_dim
    frequencies = 1.0 / (rope["rope_theta"] ** exponents)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended.
        low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        turns = original * frequencies / (2 * torch.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return frequencies / rope["factor"] * (1 - kept) + frequencies * kept
    return frequencies
