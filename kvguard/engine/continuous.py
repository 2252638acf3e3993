"""generate_batch() of Hugging Face transformers (continuous batching), protected: killed and started again, the script goes on with every request where it was.

    guarded = kvguard.engine.continuous.protect(model, "digests", coordinator="tcp://10.0.0.1:7400")
    outputs = guarded.resume()                                  # None where no former life left anything
    if outputs is None:
        outputs = guarded.generate_batch(prompts, max_new_tokens=400)

Knows: a call's requests, what of them the table is told after each batch. Must not know: transformers' private objects, who replicates, recovery plans.
Invariants: a call that could not be resumed as it was is refused before it begins; what a caller is handed was committed before; a request never has another's
blocks; on resumption every request goes on from one step, and no position below it is computed again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from transformers import GenerationConfig

from kvguard.engine import continuous_seams as seams
from kvguard.engine import generate_call, joining, telling
from kvguard.engine.arena_cache import Shape, identity_of, shape_of
from kvguard.engine.continuous_steps import At, Left, go_back
from kvguard.engine.generate_call import Row
from kvguard.engine.script import Script
from kvguard.engine.tensors import HOST, tensor_of
from kvguard.errors import KvguardError, Refused
from kvguard.format.layout import Layout

POSITIONS_DEFAULT = 4096
BATCH_TOKENS_DEFAULT = 1024
CALL = "generate_batch"  # what generate()'s adapter would have to be told again: it doesn't resume these
ONE = ("num_return_sequences", "num_beams")  # which mean nothing when they are 1
NEUTRAL = {"max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "use_cache", "output_attentions", "output_hidden_states"}


def protect(
    model, instance: str, coordinator: str = "", *, keys: joining.Keys | str | os.PathLike | None = None, insecure: bool = False,
    socket: str | os.PathLike | None = None, requests: int = 8, positions: int = 0, wait_s: float = 15.0,
) -> Batches:  # fmt: skip
    """Protect this model's generate_batch() calls under the name `instance`, which one living process may have. On a CPU.

    `requests`, `positions`: of a call, and of each request, that fit in the pool (0: the model's context, at most 4,096). The rest is as in
    engine.transformers.protect. Raises Refused for a model, or a transformers, that can't be protected, BadConfig for a name or address that can't be.
    """
    seams.check()
    if model.device.type != "cpu":
        raise Refused(f"continuous batching on {model.device}: with graphs and asynchronous batches nothing says when a step is done. Try: generate(), or vLLM")
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    shape = shape_of(model, requests, positions or min(context or POSITIONS_DEFAULT, POSITIONS_DEFAULT))
    seams.prove(shape, config)
    layout = seams.layout_of(shape, identity_of(model))
    remap = partial(generate_call.remap, [_blocks(shape, row) for row in range(requests)])
    address = coordinator or os.environ.get("KVGUARD_COORDINATOR", "")
    place = joining.Place(instance, address, joining.keys_of(keys), insecure, os.fspath(socket) if socket else None, wait_s, device=HOST)
    return Batches(model, shape, layout, joining.join(place, layout, remap, requests, shape.positions))


def _blocks(shape: Shape, row: int) -> range:
    first = seams.TRASH + row * shape.per_sequence
    return range(first, first + shape.per_sequence)


class Batches(Script):
    """From protect(). One call at a time.

    `resumed_at`: by request, the position at which resume() went on; `recomputed`: how many ids were chosen once more for that, and prompt positions computed.
    """

    def __init__(self, model, shape: Shape, layout: Layout, joined: joining.Joined) -> None:
        self.model, self.shape, self.layout = model, shape, layout
        self._memory = tensor_of(joined.pool)
        self.resumed_at, self.recomputed = None, 0
        self._batch: seams.Seated | None = None
        self._rows: list[telling.Row] = []
        self._step = 0
        super().__init__(joined)

    def generate_batch(
        self, inputs: Sequence[Sequence[int]], generation_config: GenerationConfig | None = None, *, max_new_tokens: int | None = None,
        max_batch_tokens: int = 0,
    ) -> dict:  # fmt: skip
        """model.generate_batch(), greedy: GenerationOutput by request id, in the prompts' order. `max_batch_tokens`: of one forward pass (0: 1,024).

        Raises Refused for what could not be resumed.
        """
        self._refuse_second()
        prompts = _prompts_of(inputs)
        new, ends = _terms(self.model.generation_config if generation_config is None else generation_config, max_new_tokens)
        if not prompts:
            return {}
        call, batch = os.urandom(6).hex(), max_batch_tokens or BATCH_TOKENS_DEFAULT
        if batch < len(prompts):
            raise Refused(f"max_batch_tokens={batch} for {len(prompts)} requests: each takes one per step. Try: {len(prompts)} at least")
        options = {"ends": ends}
        rows = [
            Row(call, n, len(prompts), len(ids), 0, len(ids) + new, 0, False, batch, options, b"", (CALL,))
            for n, ids in enumerate(prompts)
        ]  # fmt: skip
        self._refuse_misfit(rows)
        generate_call.pack(rows[0])  # refuses what can't be kept, before anything has begun
        self._give_up_earlier()
        return self._run(rows, prompts, [0] * len(rows), 0)

    def resume(self) -> dict | None:
        """Go on with what a former life left, to its end; None where it left nothing. Returns what generate_batch() would have.

        Raises Refused where it could not be the same answer; what was left is given up then.
        """
        if not self.earlier:
            return None
        self._refuse_second()
        tokens, self.earlier = self.earlier, ()
        try:
            left = sorted(((generate_call.unpack(token.request), token) for token in tokens), key=lambda pair: pair[0].row)
            rows, known, lengths, step = self._taken_up(left)
        except KvguardError:
            self._attempt(self._give_up, [token.sequence for token in tokens])
            raise
        return self._run(rows, known, lengths, step)

    def _taken_up(self, left: list):
        rows = [row for row, _ in left]
        if any(row.again != (CALL,) for row in rows):
            raise Refused("what a former life left is of generate(). Try: engine.transformers.protect, or another instance name")
        generate_call.check_all(rows)
        self._refuse_misfit(rows)
        known = [[*token.prefix, *token.tokens] for _, token in left]
        stood = [
            Left(row.prompt, len(ids), token.position, _has_ended(row, ids), At.unpack(token.sampler)) for (row, token), ids in zip(left, known, strict=True)
        ]
        if any(one.ids < one.prompt for one in stood):
            raise Refused("not all ids of the prompts are known any more. Try: generate_batch() anew")
        step, there = go_back(stood)
        self.resumed_at = [length for _, length in there]
        self.recomputed = sum(_again(one, *back) for one, back in zip(stood, there, strict=True))
        return rows, [ids[:count] for ids, (count, _) in zip(known, there, strict=True)], [length for _, length in there], step

    def _refuse_misfit(self, rows: list[Row]) -> None:
        longest = max(row.limit for row in rows)
        if len(rows) > self.shape.sequences or longest - 1 > self.shape.positions:
            raise Refused(
                f"{len(rows)} requests of up to {longest} ids, the pool has {self.shape.sequences} of {self.shape.positions}. "
                "Try: protect(..., requests=, positions=) for more, or fewer new tokens"
            )

    # ---- a call's life ------------------------------------------------------------------------------------------------------------

    def _run(self, rows: list[Row], known: list[list[int]], lengths: list[int], step: int) -> dict:
        """`known`, `lengths`: ids, and positions of KV, by request, as they stand after `step` steps."""
        first, self._step = rows[0], step
        ends = tuple(first.options["ends"])
        seats = [
            seams.Seat(f"req_{row.row}", _blocks(self.shape, row.row), row.prompt, ids, length, row.limit - row.prompt, ends)
            for row, ids, length in zip(rows, known, lengths, strict=True)
        ]
        done = {seat.name: seams.whole(seat) for row, seat in zip(rows, seats, strict=True) if _has_ended(row, seat.ids)}
        config = GenerationConfig(do_sample=False, max_new_tokens=max(seat.new for seat in seats), eos_token_id=list(ends) or -1)
        watch = seams.Watch(self._enter, self.guard.pulse if self.guard is not None else _nothing, self._leave)
        going = [seat for seat in seats if seat.name not in done]
        batch = seams.Seated(self.model, config, first.chunk, self._memory, self.layout, going, watch)
        made = [telling.Row(row.name, seat.blocks.start, generate_call.pack(row), seat.ids) for row, seat in zip(rows, seats, strict=True)]
        self._batch, self._rows = batch, [told for told, seat in zip(made, seats, strict=True) if seat.name not in done]
        try:
            if self._begin_rows([row.name for row in rows]):
                self._attempt(self._begin_telling, made, lengths)
            if going:
                batch.run()
            done.update(batch.outputs())
            return {seat.name: done[seat.name] for seat in seats}
        finally:
            self._batch = None
            self._end()

    def _begin_telling(self, made: list[telling.Row], lengths: list[int]) -> None:
        """The prompts first: a request that waits is resumed, too."""
        self._tell(made)
        for told, length in zip(made, lengths, strict=True):
            told.length, told.sampler = length, At(self._step, len(told.ids), length).pack()
        self._telling.go_back()

    # ---- steps: in the thread that computes -----------------------------------------------------------------------------------------

    def _enter(self, size: int) -> None:
        if self._telling is not None:
            self._attempt(self._telling.enter, size)

    def _leave(self) -> None:
        """KV of this step is in memory and its ids are chosen: one commit for all of it."""
        self._step += 1
        self._progressed()
        if self._telling is not None:
            self._attempt(self._commit)

    def _commit(self) -> None:
        for told, state in zip(self._rows, self._batch.states, strict=True):
            told.ids.extend(state.generated_tokens[len(told.ids) - len(state.initial_tokens) :])
            if told.length != state.position_offset:
                told.length = state.position_offset
                told.sampler = At(self._step, len(told.ids), told.length).pack()
        self._telling.say()


def _nothing() -> None:
    """No step to pulse in."""


def _has_ended(row: Row, ids: Sequence[int]) -> bool:
    return len(ids) >= row.limit or (len(ids) > row.prompt and ids[-1] in row.options["ends"])


def _again(one: Left, ids: int, length: int) -> int:
    """How many ids are chosen, and positions of a prompt computed, that once were."""
    return one.ids - ids + (0 if ids > one.prompt else max(0, min(one.position, one.prompt) - length))


def _prompts_of(inputs) -> list[list[int]]:
    try:
        prompts = [[int(token) for token in ids] for ids in inputs]
    except (TypeError, ValueError) as error:
        raise Refused(f"generate_batch() needs a list of lists of ids: {error}. Try: tokenizer(prompts)['input_ids']") from error
    if not all(prompts):
        raise Refused("a prompt without ids: there is nothing to go on from. Try: a first id, such as the model's beginning mark")
    return prompts


def _terms(config: GenerationConfig, max_new_tokens: int | None) -> tuple[int, list[int]]:
    """New ids at most, and the ids that end an answer. Raises Refused for options other than those."""
    said = {name: value for name, value in config.to_diff_dict().items() if name not in NEUTRAL and not name.startswith("_")}
    told = {name: value for name, value in said.items() if value not in (None, False) and not (name in ONE and value == 1)}
    odd = [f"{name}={value!r}" for name, value in told.items()]
    if odd:
        raise Refused(f"{', '.join(odd)}: of continuous batching greedy decoding alone is protected. Try: GenerationConfig(max_new_tokens=...), or generate()")
    new = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    if new is None or new < 1:
        raise Refused("how long an answer may be isn't said. Try: max_new_tokens=")
    ends = config.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]
    return new, [end for end in ends if end >= 0]


