"""What the adapter for continuous batching uses of transformers that is nobody's promise: looked at by name and signature, of one minor release.

Knows: transformers' batching thread, its cache, scheduler and requests from inside. Must not know: guards, tables, how a batch is resumed.
Invariants: where something isn't as expected, nothing has begun; every request has blocks of its own for its whole length from the start, so nothing is
preempted, offloaded, shared or moved; a request that is handed back with KV decodes at once: none of its positions is computed again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

from kvguard.device import open_device, proof
from kvguard.engine.arena_cache import BLOCK_TOKENS, Shape
from kvguard.engine.tensors import HOST, tensor_of
from kvguard.errors import Refused
from kvguard.format.layout import Layout

try:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.cache_allocators import CachePool, FullAttentionCacheAllocator
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, ContinuousBatchProcessor
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus
    from transformers.generation.continuous_batching.scheduler import FIFOScheduler
except ImportError as error:  # another release: whoever protects generate() alone needs none of it
    raise Refused(f"transformers {transformers.__version__} has its continuous batching elsewhere ({error}). Try: transformers 5.23") from error

RELEASE = "5.23."
ORDER = "block,layer,kv,slot,head,dim"
TRASH = 2  # blocks ahead of all others, for padding: nobody's
ALIGNED = 128  # bytes, of which a block is a multiple here: then a block is what transformers calls a sector
SEAMS = {
    ContinuousBatchingManager._create_batch_processor: "self",
    ContinuousBatchingManager._generation_step: "self",
    ContinuousBatchingManager._generation_loop_body: "self batch_processor bootstrapping",
    ContinuousBatchProcessor.update_batch: "self",
    FullAttentionCacheAllocator.__init__: "self index config num_key_value_heads cache_dtype page_size layer_indices allow_block_sharing",
    FullAttentionCacheAllocator.register_cache_tensor: "self bytes_per_sector non_trash_bytes cache_tensor pool",
    FullAttentionCacheAllocator.get_write_indices: "self request_id past_length query_length",
    FullAttentionCacheAllocator.update: "self key_states value_states layer_idx read_index write_index",
    FullAttentionCacheAllocator.free_blocks: "self request_id no_cache",
    PagedAttentionCache.update: "self key_states value_states layer_idx kwargs",
    CachePool.__init__: "self num_sectors num_allocators num_reserved_sectors",
    FIFOScheduler.add_waiting_request: "self state",
}
STATE = {"initial_tokens", "generated_tokens", "tokens_to_process", "remaining_prefill_tokens", "position_offset", "max_new_tokens", "eos_token_id", "_status"}


def check() -> None:
    """Raises Refused where this is not the transformers that the adapter was written for."""
    odd = [] if transformers.__version__.startswith(RELEASE) else [f"it is {transformers.__version__}"]
    odd += [seam.__qualname__ for seam, names in SEAMS.items() if " ".join(inspect.signature(seam).parameters) != names]
    odd += sorted(STATE - set(RequestState.__dataclass_fields__))
    if odd:
        raise Refused(
            f"continuous batching is protected with transformers {RELEASE}x alone, by way of its private objects; not as expected: {', '.join(odd)}. "
            "Try: that release, generate() with a batch, or vLLM with kvguard's connector"
        )


def layout_of(shape: Shape, identity: str) -> Layout:
    """Of transformers' slab: a block has a page per layer, and in it all keys ahead of all values. Raises Refused for a shape that transformers would pad."""
    blocks = TRASH + shape.sequences * shape.per_sequence
    layout = Layout.paged(identity, str(shape.dtype).removeprefix("torch."), shape.layers, blocks, BLOCK_TOKENS, shape.heads, shape.dim, order=ORDER)
    if layout.block_bytes % ALIGNED:
        raise Refused(f"blocks of {layout.block_bytes} bytes, not a multiple of {ALIGNED}. Try: generate() with a batch")
    return layout


def prove(shape: Shape, config) -> None:
    """Raises Refused where the layout doesn't say what transformers' own code writes. On a small pool of the same make: every byte is looked at."""
    small = shape._replace(sequences=2, positions=2 * BLOCK_TOKENS)
    layout = layout_of(small, "proof")
    pool = open_device(HOST).allocate(layout)
    allocator = FullAttentionCacheAllocator(
        index=0, config=config, num_key_value_heads=shape.heads, cache_dtype=shape.dtype, page_size=BLOCK_TOKENS, layer_indices=list(range(shape.layers)),
        allow_block_sharing=False,
    )  # fmt: skip
    blocks = layout.blocks - TRASH
    allocator.register_cache_tensor(layout.block_bytes, blocks * layout.block_bytes, tensor_of(pool), CachePool(blocks, 1))
    token = torch.full((1, shape.heads, shape.dim), 1.0 / 3.0, dtype=shape.dtype)

    def write_token(block: int, slot: int) -> None:
        allocator.block_table["proof"] = [block]
        here = torch.tensor(allocator.get_write_indices("proof", slot, 1))
        for layer in range(shape.layers):
            allocator.update(token, token, layer, torch.empty(0, dtype=torch.int64), here)

    for block in (TRASH, layout.blocks - 1):
        proof.prove(layout, pool.memory, write_token, block)
    del allocator
    pool.close()


class Seat(NamedTuple):
    """A request and its place: `ids` from `prompt` on are its answer so far, KV of [0, length) lies in `blocks`."""

    name: str
    blocks: range
    prompt: int
    ids: Sequence[int]
    length: int
    new: int
    ends: tuple[int, ...]


class Watch(NamedTuple):
    """Called in the thread that computes: ahead of a forward pass over so many positions, per layer, and when its ids are chosen."""

    enter: Callable[[int], None]
    pulse: Callable[[], None]
    leave: Callable[[], None]


class Seated(ContinuousBatchingManager):
    """A batch whose cache is a pool's memory and whose requests are there from the start. `states`: by seat, what transformers knows of each."""

    def __init__(self, model, config: GenerationConfig, batch_tokens: int, memory: torch.Tensor, layout: Layout, seats: Sequence[Seat], watch: Watch) -> None:
        settings = ContinuousBatchingConfig(
            page_size=BLOCK_TOKENS, num_blocks=layout.blocks - TRASH, max_batch_tokens=batch_tokens, max_requests_per_batch=max(1, len(seats)),
            allow_block_sharing=False, use_async_batching=False, use_cuda_graph=False, max_blocks_per_request=0, safety_margin=0.0, scheduler_type="fifo",
            cpu_offload_space=0.0, auto_switch_to_flash=False,
        )  # fmt: skip
        super().__init__(model, config, settings)
        self._memory, self._layout, self._seats, self._watch = memory, layout, seats, watch
        self._stepped = False
        self.states = [_state_of(seat) for seat in seats]
        if self.logit_processor.do_processing:
            raise Refused("logits processors in continuous batching: what they count from would change. Try: plain greedy, or generate() with a batch")

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        self._place(processor.cache)
        (allocator,) = processor.cache.cache_allocators.values()
        for seat, state in zip(self._seats, self.states, strict=True):
            allocator.block_table[seat.name] = list(seat.blocks)
            if state.status == RequestStatus.PENDING:
                processor.scheduler.add_waiting_request(state)
            else:
                processor.scheduler.active_requests[seat.name] = state
        return processor

    def _place(self, cache: PagedAttentionCache) -> None:
        """The pool's memory instead of the cache's own, and no block in it that isn't somebody's."""
        kinds = [type(allocator) for allocator in cache.cache_allocators.values()]
        sizes = (cache.bytes_per_sector, cache.cache_tensor.numel(), cache.cache_tensor.dtype, cache.num_sectors)
        expected = (self._layout.block_bytes, self._layout.pool_bytes, torch.uint8, self._layout.blocks - TRASH)
        if kinds != [FullAttentionCacheAllocator] or sizes != expected:
            raise Refused(f"a cache of {kinds} and {sizes} can't be placed where {expected} was expected. Try: generate() with a batch")
        (allocator,) = cache.cache_allocators.values()
        cache.cache_tensor = self._memory
        allocator.register_cache_tensor(cache.bytes_per_sector, cache.num_sectors * cache.bytes_per_sector, self._memory, cache.pool)
        cache.pool.free_sectors = []
        update, pulse = cache.update, self._watch.pulse

        def pulsed(*arguments, **named):
            pulse()
            return update(*arguments, **named)

        cache.update = pulsed

    def _generation_step(self) -> None:
        self._watch.enter(sum(one.query_length for one in self.batch_processor.inputs_and_outputs.requests_in_batch))
        super()._generation_step()
        self._stepped = True

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        self._stepped = False
        going = super()._generation_loop_body(batch_processor, bootstrapping)
        if self._stepped:
            self._watch.leave()
        return going

    def run(self) -> None:
        """To every request's end. Raises what ended the thread."""
        waited = sum(1 for state in self.states if state.status < RequestStatus.FINISHED)
        self.start()
        clean = False
        try:
            while waited and (self.is_running() or not self.output_router.output_queue.empty()):
                result = self.get_result(timeout=1.0)
                waited -= result is not None and result.is_finished()
            clean = not waited
        finally:
            self.stop(block=True, hard_stop=not clean)
            self.destroy()
        if error := self.background_thread_status.fatal_error:
            raise error

    def outputs(self) -> dict[str, GenerationOutput]:
        return {state.request_id: state.to_generation_output() for state in self.states}


def whole(seat: Seat) -> GenerationOutput:
    """Of a request whose answer was complete before this life."""
    state = _state_of(seat)
    state.status = RequestStatus.FINISHED
    return state.to_generation_output()


def _state_of(seat: Seat) -> RequestState:
    ids = list(seat.ids)
    state = RequestState(request_id=seat.name, initial_tokens=ids[: seat.prompt], max_new_tokens=seat.new, eos_token_id=list(seat.ends))
    state.generated_tokens = ids[seat.prompt :]
    state.position_offset = seat.length
    if state.generated_tokens:
        state.tokens_to_process, state.remaining_prefill_tokens = ids[-1:], []
        state.status = RequestStatus.DECODING
    elif seat.length:
        state.remaining_prefill_tokens = ids[seat.length :]
        state.status = RequestStatus.PREFILLING
    return state
