"""How a KV pool's bytes lie: regions, strides and named dimensions, and which shard of the model they are.

Knows: arithmetic from (block, slot) to bytes, and the canonical order that makes two pools with other strides interchangeable.
Must not know: memory, numpy, sequences, who copies.
Invariants: everything is arithmetic over strides, never a list entry per slot; `fingerprint` depends on the canonical bytes alone: offsets, strides and the
number of blocks do not change it, a region per layer or one for all layers do not either.

Canonical bytes of one token: region by region, within a region in the order of its inner dimensions. Where a token is not addressable in its block
(`addressable` false) a region's inner dimensions describe the whole block's bytes and slot_stride is 0; then only whole blocks have canonical bytes.

A region's name gives the coordinates that its whole content shares, joined by dots: "", "layer3", "layer3.kv1" (kv0 is K, kv1 is V).
Dimension names with a meaning here: layer, kv, head (local to the shard). All others (dim, latent, ...) are only sizes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import lru_cache

import msgspec
import xxhash

from kvguard.errors import BadConfig
from kvguard.format.shapes import SHARED, StreamShape

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1}
REGIONS_MAX = 4096
REGION_NAME_CHARS_MAX = 128
POOL_BYTES_MAX = 1 << 56  # beyond any address space; sums and products of what is below it stay within 64 bits where they are used
ALIGNMENT_BYTES = 64  # between tensors that are laid one behind the other
NAMED = ("layer", "kv", "head")  # dimensions whose index says where in the model an element stands

Dimension = tuple[str, int, int]  # name, size, stride in bytes
Part = tuple[int, int, int]  # first, end, total: half-open, in units of the whole model
_coordinate = re.compile(r"([a-z_]+?)(\d{1,9})")


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """Which part of the model's KV a rank holds.

    `shared`: the engine's word that all tensor-parallel ranks that name this shard hold equal bytes (MLA, fewer KV heads than ranks), so that one of them is
    copied for all. Never by default: of ranks that only forgot to name their parts each would come back with the first one's bytes.
    """

    layers: Part
    heads: Part
    shared: bool = False


class Region(msgspec.Struct, frozen=True, array_like=True):
    """A strided part of the pool. Bytes of (block, slot, i, j, ...): offset + block * block_stride + slot * slot_stride + i * inner[0].stride + ..."""

    name: str
    offset: int
    block_stride: int
    slot_stride: int
    inner: tuple[Dimension, ...]

    def inner_bytes(self, itemsize: int) -> int:
        size = itemsize
        for _, count, _ in self.inner:
            size *= count
        return size

    def coordinates(self) -> tuple[tuple[str, int], ...]:
        """What the name says: (("layer", 3), ("kv", 1)); a part without a number has index 0 of its own word."""
        found = []
        for part in filter(None, self.name.split(".")):
            match = _coordinate.fullmatch(part)
            found.append((match[1], int(match[2])) if match else (part, 0))
        return tuple(found)


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """One rank's KV pool. `model`: fingerprint text of weights and configuration; `dtype`: a key of ITEMSIZE or an engine's own name."""

    model: str
    dtype: str
    itemsize: int
    blocks: int
    block_tokens: int
    regions: tuple[Region, ...]
    shard: Shard
    addressable: bool
    pool_bytes: int

    # ---- constructors -----------------------------------------------------------------------------------------------------------

    @classmethod
    def paged(
        cls, model: str, dtype: str, layers: int, blocks: int, block_tokens: int, kv_heads: int, head_dim: int, *, shard: Shard | None = None,
        order: str = "layer,kv,block,slot,head,dim",
    ) -> Layout:  # fmt: skip
        """One tensor for all layers, dimensions from outer to inner in any `order`. `layers`, `kv_heads`: of this shard. Raises BadConfig for other names."""
        sizes = {"layer": layers, "kv": 2, "block": blocks, "slot": block_tokens, "head": kv_heads, "dim": head_dim}
        region, pool_bytes = _dense("", 0, sizes, order, ("layer", "kv", "head", "dim"), dtype)
        return cls._made(model, dtype, blocks, block_tokens, (region,), shard or whole(layers, kv_heads), True, pool_bytes)

    @classmethod
    def per_layer(
        cls, model: str, dtype: str, layers: int, blocks: int, block_tokens: int, kv_heads: int, head_dim: int, *, shard: Shard | None = None,
        order: str = "kv,block,slot,head,dim", offsets: tuple[int, ...] | None = None,
    ) -> Layout:  # fmt: skip
        """One tensor per layer (without "kv" in `order`: two, K then V), at `offsets` of the pool or one behind the other."""
        sizes = {"kv": 2, "block": blocks, "slot": block_tokens, "head": kv_heads, "dim": head_dim}
        apart = "kv" not in order.split(",")
        names = [f"layer{layer}.kv{kv}" for layer in range(layers) for kv in range(2)] if apart else [f"layer{layer}" for layer in range(layers)]
        if apart:
            del sizes["kv"]
        inner = tuple(name for name in ("kv", "head", "dim") if name in sizes)
        regions, pool_bytes = _rowed(names, offsets, sizes, order, inner, dtype)
        return cls._made(model, dtype, blocks, block_tokens, regions, shard or whole(layers, kv_heads), True, pool_bytes)

    @classmethod
    def latent(
        cls, model: str, dtype: str, layers: int, blocks: int, block_tokens: int, latent_dim: int, *, shard: Shard | None = None,
        order: str = "layer,block,slot,dim",
    ) -> Layout:  # fmt: skip
        """MLA: one latent vector (with its rotary part) per token and layer, no heads, equal on all tp ranks. No "layer" in `order`: a tensor per layer."""
        sizes = {"layer": layers, "block": blocks, "slot": block_tokens, "dim": latent_dim}
        if "layer" in order.split(","):
            region, pool_bytes = _dense("", 0, sizes, order, ("layer", "dim"), dtype)
            regions = (region,)
        else:
            del sizes["layer"]
            regions, pool_bytes = _rowed([f"layer{layer}" for layer in range(layers)], None, sizes, order, ("dim",), dtype)
        return cls._made(model, dtype, blocks, block_tokens, regions, shard or Shard((0, layers, layers), (0, 1, 1), True), True, pool_bytes)

    @classmethod
    def opaque(cls, model: str, dtype: str, layers: int, blocks: int, block_tokens: int, page_bytes: int, *, shard: Shard | None = None) -> Layout:
        """Pages in which a token can't be told apart (packed K, scales at the end): `page_bytes` per layer and block, a tensor per layer."""
        regions = tuple(Region(f"layer{n}", n * blocks * page_bytes, page_bytes, 0, (("byte", page_bytes, 1),)) for n in range(layers))
        pool_bytes = layers * blocks * page_bytes
        return cls(model, dtype, 1, blocks, block_tokens, regions, shard or whole(layers, 1), False, pool_bytes)

    @classmethod
    def _made(cls, model, dtype, blocks, block_tokens, regions, shard, addressable, pool_bytes) -> Layout:
        layout = cls(model, dtype, ITEMSIZE[dtype], blocks, block_tokens, regions, shard, addressable, pool_bytes)
        layout.check(pool_bytes)
        return layout

    def with_offset(self, offset: int) -> Layout:
        """The same pool `offset` bytes further into its memory."""
        moved = tuple(msgspec.structs.replace(region, offset=region.offset + offset) for region in self.regions)
        return msgspec.structs.replace(self, regions=moved, pool_bytes=self.pool_bytes + offset)

    # ---- sizes and identity -----------------------------------------------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Canonical bytes of one block of this shard."""
        per_region = sum(region.inner_bytes(self.itemsize) for region in self.regions)
        return per_region * self.block_tokens if self.addressable else per_region

    @property
    def token_bytes(self) -> int:
        """Canonical bytes of one token; where tokens aren't addressable a block's share, rounded up, for accounting only."""
        return -(-self.block_bytes // self.block_tokens)

    @property
    def fingerprint(self) -> int:
        """64 bits over model, dtype, shard and canonical order: only equal fingerprints hold interchangeable bytes. The lowest bit is `shard.shared`
        (shapes.is_shared)."""
        return _fingerprint(self)

    def shape(self) -> StreamShape:
        """What a holder must know."""
        return StreamShape(self.fingerprint, self.block_tokens, self.token_bytes, self.block_bytes, self.blocks, self.addressable)

    # ---- bytes ------------------------------------------------------------------------------------------------------------------

    def ranges(self, block: int, slot: int = 0) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of one token's canonical bytes in order (of the whole block where tokens aren't addressable). For tests and proofs alone."""
        for region in self.regions:
            start = region.offset + block * region.block_stride + slot * region.slot_stride
            outer, run_bytes = _run(region.inner, self.itemsize)
            for index in itertools.product(*(range(size) for _, size, _ in outer)):
                yield start + sum(i * stride for i, (_, _, stride) in zip(index, outer, strict=True)), run_bytes

    def check(self, pool_bytes: int) -> None:
        """Raises BadConfig that lists every fault: sizes, regions that overlap or leave a pool of `pool_bytes`, a shard that isn't what the regions hold."""
        faults = list(_faults(self, pool_bytes))
        if faults:
            raise BadConfig(
                "layout doesn't describe a KV pool:\n  " + "\n  ".join(faults) + "\nTry: Layout.paged, per_layer, latent or opaque, or the tensors' own strides"
            )


def whole(layers: int, heads: int) -> Shard:
    """The shard of a rank that holds everything."""
    return Shard((0, layers, layers), (0, heads, heads))


# ---- construction ---------------------------------------------------------------------------------------------------------------


def _dense(name: str, offset: int, sizes: dict[str, int], order: str, inner: tuple[str, ...], dtype: str) -> tuple[Region, int]:
    """A region over a dense tensor whose dimensions stand in `order`, and the tensor's bytes."""
    names = order.split(",")
    if sorted(names) != sorted(sizes) or dtype not in ITEMSIZE:
        raise BadConfig(f"order {order!r} of {dtype!r} must name each of {', '.join(sizes)} once. Try: {','.join(sizes)}, dtype one of {', '.join(ITEMSIZE)}")
    strides: dict[str, int] = {}
    step = ITEMSIZE[dtype]
    for dimension in reversed(names):
        strides[dimension] = step
        step *= sizes[dimension]
    region = Region(name, offset, strides["block"], strides["slot"], tuple((dimension, sizes[dimension], strides[dimension]) for dimension in inner))
    return region, step


def _rowed(names, offsets, sizes, order, inner, dtype) -> tuple[tuple[Region, ...], int]:
    """Regions over equal dense tensors, at `offsets` or one behind the other."""
    _, tensor_bytes = _dense("", 0, sizes, order, inner, dtype)
    step = -(-tensor_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    offsets = tuple(n * step for n in range(len(names))) if offsets is None else offsets
    if len(offsets) != len(names):
        raise BadConfig(f"{len(offsets)} offsets for {len(names)} tensors. Try: one for each, or none at all")
    regions = tuple(_dense(name, offset, sizes, order, inner, dtype)[0] for name, offset in zip(names, offsets, strict=True))
    return regions, max(offsets, default=0) + tensor_bytes


def _run(inner: tuple[Dimension, ...], itemsize: int) -> tuple[tuple[Dimension, ...], int]:
    """The dimensions that are stepped over, and the bytes that lie contiguously below them."""
    run_bytes, kept = itemsize, list(inner)
    while kept and (kept[-1][2] == run_bytes or kept[-1][1] == 1):
        run_bytes *= kept.pop()[1]
    return tuple(kept), run_bytes


# ---- identity -------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _fingerprint(layout: Layout) -> int:
    content = []
    for region in layout.regions:
        leading = list(itertools.takewhile(lambda dimension: dimension[0] in ("layer", "kv"), region.inner))
        rest = tuple((name, size) for name, size, _ in region.inner[len(leading) :])
        for index in itertools.product(*(range(size) for _, size, _ in leading)):
            named = region.coordinates() + tuple((dimension[0], i) for dimension, i in zip(leading, index, strict=True))
            content.append((named, rest))
    parts = (layout.shard.layers, layout.shard.heads)
    said = (layout.model, layout.dtype, layout.itemsize, layout.block_tokens, parts, layout.addressable, content)
    return xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(said)) & ~SHARED | SHARED * layout.shard.shared


# ---- faults ---------------------------------------------------------------------------------------------------------------------


def _faults(layout: Layout, pool_bytes: int) -> Iterator[str]:
    for what, value in (("blocks", layout.blocks), ("block_tokens", layout.block_tokens), ("itemsize", layout.itemsize), ("regions", len(layout.regions))):
        if not 0 < value <= POOL_BYTES_MAX:
            yield f"{what} is {value}, must be positive{' and less than that' if value > 0 else ''}"
            return
    if len(layout.regions) > REGIONS_MAX:
        yield f"{len(layout.regions)} regions, at most {REGIONS_MAX}"
        return
    if layout.addressable and ITEMSIZE.get(layout.dtype, layout.itemsize) != layout.itemsize:
        yield f"itemsize {layout.itemsize} is not that of {layout.dtype}"
    if layout.pool_bytes > pool_bytes:
        yield f"the layout needs {layout.pool_bytes} bytes, the pool has {pool_bytes}"
    sound = []
    for region in layout.regions:
        found = list(_region_faults(region, layout, pool_bytes))
        yield from found
        if not found:
            sound.append(region)
    yield from _pair_faults(sound, layout)
    yield from _shard_faults(layout)


def _dimensions(region: Region, layout: Layout) -> list[tuple[int, int]]:
    """(stride, size) of all dimensions that step, largest stride first."""
    steps = [(region.block_stride, layout.blocks)] + [(stride, size) for _, size, stride in region.inner]
    if layout.addressable:
        steps.append((region.slot_stride, layout.block_tokens))
    return sorted(((stride, size) for stride, size in steps if size > 1), reverse=True)


def _extent(steps, itemsize: int) -> int:
    return itemsize + sum(stride * (size - 1) for stride, size in steps)


def _region_faults(region: Region, layout: Layout, pool_bytes: int) -> Iterator[str]:
    label = f"region {region.name[:REGION_NAME_CHARS_MAX] or '(all)'}"
    if len(region.name) > REGION_NAME_CHARS_MAX:
        yield f"{label}...: a name of {len(region.name)} characters, at most {REGION_NAME_CHARS_MAX}"
        return
    if region.offset < 0 or any(size <= 0 or stride <= 0 for _, size, stride in region.inner) or region.block_stride <= 0 or region.slot_stride < 0:
        yield f"{label}: offsets must not be negative, sizes and strides must be positive"
        return
    if layout.addressable != (region.slot_stride > 0):
        yield f"{label}: slot_stride {region.slot_stride} in a layout whose tokens are {'' if layout.addressable else 'not '}addressable"
        return
    parts = 1
    for name, size, _ in region.inner:
        parts *= size if name in NAMED else 1
    if parts > REGIONS_MAX:
        yield f"{label}: {parts} layers, kv and heads, at most {REGIONS_MAX}"
        return
    numbers = (region.offset, region.block_stride, region.slot_stride, *(number for _, size, stride in region.inner for number in (size, stride)))
    if max(numbers) > POOL_BYTES_MAX:
        yield f"{label}: {max(numbers)} is more than a pool's bytes can be"
        return
    steps = _dimensions(region, layout)
    end = region.offset + _extent(steps, layout.itemsize)
    if end > min(pool_bytes, layout.pool_bytes):
        yield f"{label}: ends at byte {end}, beyond the pool's {min(pool_bytes, layout.pool_bytes)}"
    for n, (stride, _) in enumerate(steps):
        below = _extent(steps[n + 1 :], layout.itemsize)
        if below > stride:
            yield f"{label}: overlaps itself: {below} bytes lie within a stride of {stride}"
            return


def _pair_faults(regions: list[Region], layout: Layout) -> Iterator[str]:
    """Regions that share bytes. Exact where their strides are alike, else a common range counts as shared."""
    spans = sorted(((region.offset, _dimensions(region, layout), region.name) for region in regions), key=lambda span: span[0])
    active: list[tuple[int, int, list, str]] = []
    for offset, steps, name in spans:
        active = [other for other in active if other[1] > offset]
        for other_offset, _, other_steps, other_name in active:
            if _share(offset - other_offset, steps, other_steps, layout.itemsize):
                yield f"regions {other_name or '(all)'} and {name or '(all)'} share bytes"
                return
        active.append((offset, offset + _extent(steps, layout.itemsize), steps, name))


def _share(distance: int, a, b, itemsize: int) -> bool:
    """Whether a region `distance` bytes behind another shares a byte with it."""
    if distance >= _extent(b, itemsize) or -distance >= _extent(a, itemsize):
        return False
    if not a or not b or a[0][0] != b[0][0]:
        return True
    stride = a[0][0]
    within = distance % stride  # each step's content fits in its stride, so only two shifts can meet
    return _share(within, a[1:], b[1:], itemsize) or _share(within - stride, a[1:], b[1:], itemsize)


def _shard_faults(layout: Layout) -> Iterator[str]:
    for what, (first, end, total) in (("layers", layout.shard.layers), ("heads", layout.shard.heads)):
        if not 0 <= first < end <= total:
            yield f"shard: {what} [{first}, {end}) of {total} is not a part of the model"
    layers, heads = set(), set()
    for region in layout.regions:
        named = dict(region.coordinates())
        sizes = {name: size for name, size, _ in region.inner}
        layers.update(range(sizes["layer"]) if "layer" in sizes and sizes["layer"] <= REGIONS_MAX else [named.get("layer", 0)])
        heads.add(sizes.get("head"))
    held = layout.shard.layers[1] - layout.shard.layers[0]
    if len(layers) != held or max(layers, default=0) != held - 1:
        yield f"shard: {held} layers, but the regions hold {len(layers)}"
    if heads - {None, layout.shard.heads[1] - layout.shard.heads[0]}:
        yield f"shard: {layout.shard.heads[1] - layout.shard.heads[0]} heads, but the regions hold {sorted(heads - {None})}"
