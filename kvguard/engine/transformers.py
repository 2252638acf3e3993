"""generate() of Hugging Face transformers, protected: the script is the rank and its own emitter; killed and started again, it goes on where it was.

    guarded = kvguard.engine.transformers.protect(model, "essay", coordinator="tcp://10.0.0.1:7400")
    output = guarded.resume()                                   # None where no former life left anything
    if output is None:
        output = guarded.generate(**inputs, max_new_tokens=400)

Knows: a call's rows, ids as they come, when which of them is a fact. Must not know: who replicates, recovery plans.
Invariants: no fault of kvguard reaches generate(): it goes on, UNPROTECTED, and says so once per reason; a call that could not be resumed as it was is refused
before it begins; ids and random state are committed before a streamer sees the token; what is computed again has the shapes of the first time.
"""

from __future__ import annotations

import logging
import os
from functools import partial

import torch
import transformers
from transformers import GenerationConfig, StoppingCriteriaList

from kvguard.device import KINDS
from kvguard.engine import generate_call, joining, telling
from kvguard.engine.arena_cache import ArenaCache, Shape, identity_of, layout_of, prove, shape_of
from kvguard.engine.generate_call import Drawn, Row, Terms
from kvguard.engine.generate_seams import Told, random_state, set_random_state, with_ended
from kvguard.engine.random_state import DrawCount, GpuCount, count_from, start_again, start_of
from kvguard.engine.script import Script
from kvguard.engine.tensors import CUDA, HOST, computed_on, tensor_of
from kvguard.errors import BadConfig, KvguardError, Refused

POSITIONS_DEFAULT = 4096
log = logging.getLogger("kvguard.engine")


def protect(
    model, instance: str, coordinator: str = "", *, keys: joining.Keys | str | os.PathLike | None = None, insecure: bool = False,
    socket: str | os.PathLike | None = None, sequences: int = 8, positions: int = 0, wait_s: float = 15.0,
    device: str = "",
) -> Guarded:  # fmt: skip
    """Protect this model's generate() calls under the name `instance`, which one living process may have.

    `coordinator`: its address, else $KVGUARD_COORDINATOR. `socket`: of the node's daemon, else $KVGUARD_SOCKET. `sequences`, `positions`: rows of a batch, and
    columns of each, that fit in the pool (0: the model's context, at most 4,096). Waits up to `wait_s` for a coordinator, and for a former life's recovery.
    `device`: of the pool; it is where the model is ("": just that; "rehearsal": on a CPU, by a GPU's code).
    Raises Refused for a model that can't be protected, BadConfig for a name or address that can't be.
    """
    if not transformers.__version__.startswith("5."):
        log.warning("kvguard: transformers %s is outside the range that this adapter was tested with (5.x)", transformers.__version__)
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    kind = _kind(model, device)
    shape = shape_of(model, sequences, positions or min(context or POSITIONS_DEFAULT, POSITIONS_DEFAULT))
    prove(shape, kind)
    address = coordinator or os.environ.get("KVGUARD_COORDINATOR", "")
    place = joining.Place(instance, address, joining.keys_of(keys), insecure, os.fspath(socket) if socket else None, wait_s, device=kind)
    layout = layout_of(shape, identity_of(model))
    here = [range(row * shape.per_sequence, (row + 1) * shape.per_sequence) for row in range(sequences)]
    return Guarded(model, shape, joining.join(place, layout, partial(generate_call.remap, here), sequences, shape.positions))


def _kind(model, device: str) -> str:
    """Of the pool. Raises BadConfig for one that lies elsewhere than the model."""
    kind = device or (CUDA if model.device.type == CUDA else HOST)
    if kind not in KINDS or computed_on(kind).type != model.device.type:
        raise BadConfig(f"device {kind!r} for a model on {model.device}: the pool is where the model is. Try: device='', else one of {', '.join(KINDS)}")
    return kind


class Guarded(Script):
    """From protect(). One call at a time, on one thread.

    `cache`: in the pool. `unprotected`: why the present or last call isn't, or wasn't, as far as this process knows; else "". `earlier`: the ResumeTokens
    that a former life left. `resumed_at`: the column at which resume() went on, `recomputed`: how many columns it computed again.
    """

    def __init__(self, model, shape: Shape, joined: joining.Joined) -> None:
        self.model, self.shape = model, shape
        self.cache = ArenaCache(shape, tensor_of(joined.pool), self._written, joined.guard.pulse if joined.guard is not None else _nothing)
        self.resumed_at, self.recomputed = None, 0
        self._prompt = 0
        self._count: DrawCount | GpuCount | None = None
        self._drawn: Drawn | None = None
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)
        super().__init__(joined)

    # ---- calls ------------------------------------------------------------------------------------------------------------------

    def generate(self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **arguments):
        """model.generate(), greedy or sampled, one row or a batch padded on the left; the same output. Raises Refused for what could not be resumed."""
        ids = inputs if inputs is not None else arguments.pop("input_ids", None)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not ids.numel():
            raise Refused("generate() needs input_ids of [rows, columns]: embeddings have no ids to go on with. Try: tokenizer(..., return_tensors='pt')")
        self._refuse_second()
        mask = arguments.pop("attention_mask", None)
        terms = generate_call.terms(self.model.generation_config, generation_config, arguments, ids.shape[1], ids.shape[0], self._context())
        mask = mask if mask is not None else _inferred_mask(ids, terms)
        count = ids.shape[0] * terms.copies
        self._refuse_misfit(count, terms.limit)
        rows = _rows_of(os.urandom(6).hex(), mask.repeat_interleave(terms.copies, 0).cpu(), terms, self.model.device)
        drawn = Drawn(ids.shape[1], 0, 0, True) if terms.sampled else None
        self._give_up_earlier()
        self._begin([(row, ()) for row in rows], 0, drawn)
        return self._run(ids, mask, {**arguments, "generation_config": generation_config})

    def generate_batch(self, *_, **__):
        """Continuous batching has a cache of another make: engine.continuous, see docs/adapters.md."""
        raise Refused("continuous batching has a pool of its own make. Try: kvguard.engine.continuous.protect(model, ...), then its generate_batch()")

    def resume(self, **again):
        """Go on with what a former life left, to its end; None where it left nothing. Returns what generate() would have: all ids, from the first on.

        `again`: objects of that call which can't be packed (logits_processor, stopping_criteria, tokenizer), and a streamer.
        Raises Refused where it could not be the same answer; what was left is given up then.
        """
        if not self.earlier:
            return None
        self._refuse_second()
        tokens, self.earlier = self.earlier, ()
        try:
            return self._go_on(sorted(((generate_call.unpack(token.request), token) for token in tokens), key=lambda pair: pair[0].row), again)
        except KvguardError:
            self._attempt(self._give_up, [token.sequence for token in tokens])
            raise

    def _go_on(self, left: list, again: dict):
        first, token = left[0]
        generate_call.check_whole([row for row, _ in left], again)
        self._refuse_misfit(first.rows, first.limit)
        columns = generate_call.undecided(min(len(token.prefix) + len(token.tokens) for _, token in left), first)
        known = [[*token.prefix, *token.tokens][:columns] for _, token in left]
        drawn = Drawn.unpack(token.sampler) if first.sampled else None
        if drawn is not None:
            drawn = drawn._replace(ids=columns, draws=drawn.at(columns))
        length = generate_call.replayable(min(columns - 1, *(token.position for _, token in left)), first.prompt, columns, first.chunk)
        self.resumed_at, self.recomputed = length, columns - 1 - length
        device = self.model.device
        ids = torch.tensor(known, device=device)
        mask = (torch.arange(columns)[None] >= torch.tensor([[row.pads] for row, _ in left])).long().to(device)
        options = GenerationConfig(**first.options, max_length=first.limit, min_length=first.floor)
        ends = torch.as_tensor([] if options.eos_token_id is None else options.eos_token_id, device=device).flatten()
        ended = torch.isin(ids[:, first.prompt :], ends).any(1)
        self._begin(list(zip([row for row, _ in left], known, strict=True)), length, drawn)
        try:
            if columns >= first.limit or bool(ended.all()):
                return ids
            self._replay(ids, mask, first)
            if drawn is not None:
                set_random_state(device, start_again(first.start).state_at(drawn.draws))
            return self._run(ids, mask, {**with_ended(again, ended, options, ends), "generation_config": options})
        finally:
            self._end()

    def _replay(self, ids: torch.Tensor, mask: torch.Tensor, first: Row) -> None:
        """Compute what is missing below the last column, in the shapes of the first time: the prompt at once (or in its chunks), then column by column."""
        if ids.shape[1] == first.prompt:
            return  # nothing was generated yet: generate() itself computes the prompt, and chooses from it
        once = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "prefill_chunk_size": first.chunk or None}
        while (length := self.cache.get_seq_length()) < ids.shape[1] - 1:
            upto = first.prompt if length < first.prompt else length + 1
            config = GenerationConfig(**once, pad_token_id=0)
            self.model.generate(ids[:, :upto], attention_mask=mask[:, :upto], past_key_values=self.cache, generation_config=config)

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, arguments: dict):
        arguments = {name: value for name, value in arguments.items() if value is not None}
        criteria = StoppingCriteriaList([*(arguments.pop("stopping_criteria", None) or ()), Told(self._sampled)])
        try:
            return self.model.generate(ids, attention_mask=mask, past_key_values=self.cache, stopping_criteria=criteria, **arguments)
        finally:
            self._end()

    def _refuse_misfit(self, rows: int, limit: int) -> None:
        if rows > self.shape.sequences or limit - 1 > self.shape.positions:
            raise Refused(
                f"{rows} rows of up to {limit} columns, the pool has {self.shape.sequences} of {self.shape.positions}. "
                "Try: protect(..., sequences=, positions=) for more, or fewer new tokens"
            )

    def _context(self) -> int | None:
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    # ---- a call's life ------------------------------------------------------------------------------------------------------------

    def _begin(self, rows: list, length: int, drawn: Drawn | None) -> None:
        """`rows`: (Row, ids known) each. The cache's first rows are the call's; `length` columns of them are there."""
        self._drawn, self._prompt = drawn, rows[0][0].prompt
        self._count = count_from(start_again(rows[0][0].start), drawn.draws, drawn.each, drawn.even) if drawn is not None else None
        self.cache.begin(len(rows), length)
        if self._begin_rows([row.name for row, _ in rows]):
            self._attempt(self._begin_telling, rows, length)

    def _begin_telling(self, rows: list, length: int) -> None:
        self._tell([telling.Row(row.name, row.row * self.shape.per_sequence, generate_call.pack(row), ids) for row, ids in rows])
        if any(ids for _, ids in rows):
            self._telling.rewind(length, self._sampler())

    def _end(self) -> None:
        super()._end()
        self._count, self._drawn = None, None

    def close(self) -> None:
        if os.getpid() == self._pid:
            self._hook.remove()
        super().close()

    # ---- steps ------------------------------------------------------------------------------------------------------------------

    def _before(self, module, positional, named: dict) -> None:
        """Ahead of every forward pass with our cache: the step is entered."""
        if named.get("past_key_values") is not self.cache:
            return
        if not self._active:
            self._say("the cache was passed to model.generate() itself. Try: guarded.generate(), which knows ids and options")
        elif self._telling is not None:
            self._attempt(self._enter, named["input_ids"])

    def _enter(self, ids: torch.Tensor) -> None:
        self._telling.learn(ids.tolist(), self.cache.get_seq_length())
        self._telling.enter(ids.numel())

    def _written(self, cache: ArenaCache) -> None:
        """The last layer has its KV: on a CPU it is in memory; on a GPU it was launched, and the commit is a fact when that is done."""
        if self._telling is not None:
            self._attempt(self._commit_written)

    def _commit_written(self) -> None:
        """At once, unless an id is about to be chosen from it: without that id it is worth nothing to a resumption, and one commit costs half of two."""
        length = self.cache.get_seq_length()
        if length <= self._prompt or len(self._telling.rows[0].ids) > length:
            self._commit()

    def _sampled(self, ids: torch.Tensor) -> None:
        """Chosen, and not yet shown to anybody."""
        self._progressed()
        if self._telling is not None:
            self._attempt(self._commit_sampled, ids)

    def _commit_sampled(self, ids: torch.Tensor) -> None:
        self._telling.learn(ids[:, -1:].tolist(), ids.shape[1] - 1)
        if self._count is not None:
            draws = self._count.count(random_state(self.model.device))
            if draws is None:
                raise Refused("torch's random state moved in a way that can't be counted: others draw from it. Try: a torch.Generator for other draws")
            self._drawn = Drawn(ids.shape[1], draws, self._count.last, self._count.even)
        self._commit()

    def _commit(self) -> None:
        if not self.cache.placed:
            raise Refused("the cache has left the pool: it was rearranged, or grew longer than the call said")
        self._telling.publish(self.cache.get_seq_length(), self._sampler())

    def _sampler(self) -> bytes | None:
        return None if self._drawn is None else self._drawn.pack()


def _nothing() -> None:
    """No step to pulse in."""


def _inferred_mask(ids: torch.Tensor, terms: Terms) -> torch.Tensor:
    """As generate() infers it: padding is what looks like it, unless it is the end mark too."""
    if terms.pad is None or terms.pad in terms.ends or not bool((ids == terms.pad).any()):
        return torch.ones_like(ids)
    return (ids != terms.pad).long()


def _rows_of(call: str, mask: torch.Tensor, terms: Terms, device: torch.device) -> list[Row]:
    """One Row per row of the batch. `device`: whose random state is drawn from. Raises Refused for a mask that is more than padding on the left."""
    count, columns = mask.shape
    pads = (columns - mask.long().sum(1)).tolist()
    if not torch.equal(mask.long(), (torch.arange(columns)[None] >= torch.tensor(pads)[:, None]).long()):
        raise Refused("the attention mask is more than padding on the left. Try: tokenizer.padding_side = 'left'")
    start = start_of(random_state(device)).packed if terms.sampled else b""
    made = [
        Row(call, n, count, columns, pads[n], terms.limit, terms.floor, terms.sampled, terms.chunk, terms.options if n == 0 else {},
            start if n == 0 else b"", terms.again if n == 0 else ())
        for n in range(count)
    ]  # fmt: skip
    generate_call.pack(made[0])  # refuses what can't be kept, before anything has begun
    return made
