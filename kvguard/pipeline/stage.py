"""A stage of the reference engine, or a standby that can become any: `python -m kvguard.pipeline.stage SETTINGS.toml`.

Knows: settings, the loop over messages and fences, what becomes of messages of other epochs. Must not know: scheduling, sampling, tokens' text.
Invariants: a message of an older epoch is dropped and counted; one of a newer epoch is not run before guard.restore has adopted that epoch (kept, bounded);
the result of a step in which the rank was fenced is not sent; garbage changes nothing; SIGTERM detaches cleanly and exits 0.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
from collections import deque
from pathlib import Path

import msgspec
import torch
import zmq

from kvguard import engine
from kvguard.engine.table import TableWriter
from kvguard.engine.tensors import CUDA, computed_on, tensor_of
from kvguard.errors import Fenced, KvguardError, Refused, TimedOut
from kvguard.format.layout import Layout, Shard
from kvguard.format.rows import Geometry
from kvguard.pipeline import settings as settings_
from kvguard.pipeline.batch import Batch, Share
from kvguard.pipeline.links import Links
from kvguard.pipeline.model import StageModel
from kvguard.pipeline.rank import NoGuard, RankLoad
from kvguard.pipeline.runs import SEQUENCES_KEPT_MAX
from kvguard.pipeline.settings import StageSettings
from kvguard.pipeline.steps import DIGEST, STATE, STEP, Message
from kvguard.pipeline.weights import ModelFiles, open_model
from kvguard.types import Rank, Span

PENDING_MAX = 64  # messages of an epoch that this rank has yet to adopt
WAKE_MS = 5  # how late a fence may be noticed between steps
log = logging.getLogger("kvguard.pipeline")


class Stopped(BaseException):
    """SIGTERM, wherever the process was."""


def layers_of(layers: int, stages: int, pp: int) -> range:
    """The layers of stage `pp`: as even as can be, front stages get the remainder."""
    each, more = divmod(layers, stages)
    start = pp * each + min(pp, more)
    return range(start, start + each + (pp < more))


def identity(files: ModelFiles) -> str:
    """Names model and weights: ranks and standbys of one instance must agree on it."""
    digest = hashlib.sha256((files.directory / "config.json").read_bytes())
    for path in sorted(set(files.where.values())):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return f"{files.shape.family}-{digest.hexdigest()[:16]}"


def layout_of(files: ModelFiles, settings: StageSettings, pp: int) -> Layout:
    shape, layers = files.shape, layers_of(files.shape.layers, settings.stages, pp)
    shard = Shard((layers.start, layers.stop, shape.layers), (0, shape.kv_heads, shape.kv_heads))
    return Layout.paged(identity(files), "float32", len(layers), settings.blocks, settings.block_tokens, shape.kv_heads, shape.head_dim, shard=shard)


def model_of(files: ModelFiles, settings: StageSettings, pp: int) -> StageModel:
    layers = layers_of(files.shape.layers, settings.stages, pp)
    first, last, device = pp == 0, pp == settings.stages - 1, computed_on(settings.device)
    return StageModel(files, layers, first, last, invariant=settings.invariant, device=device)


def view_of(memory: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The pool's memory (engine.tensors.tensor_of) as the forward pass writes it: [layers, 2, blocks, block_tokens, kv_heads, head_dim]."""
    sizes = {name: size for name, size, _ in layout.regions[0].inner}
    return memory.view(torch.float32).view(sizes["layer"], 2, layout.blocks, layout.block_tokens, sizes["head"], sizes["dim"])


def prove(pool, layout: Layout, kv: torch.Tensor) -> None:
    """Raises Refused where the layout doesn't say what the engine's own indexing writes."""
    from kvguard.device import proof

    def write_token(block: int, slot: int) -> None:
        kv[:, :, block, slot] = 1.0 / 3.0

    proof.prove(layout, getattr(pool, "memory", pool), write_token)


def settle(settings: StageSettings) -> None:
    """Equal bits for equal shapes: attention by plain products on a GPU, where the other ways choose how to split their work by themselves."""
    torch.set_num_threads(settings.threads)
    if settings.device == CUDA:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_tf32 = False


def warm_up(model: StageModel) -> None:
    """One tiny forward pass: page in the weights, start torch's kernels. Writes to a pool of its own."""
    kv = torch.zeros(model.pool_shape(4, 16), device=model.device)
    batch = Batch((Share("warm", Span(0, 1), False, (0,), int(model.last)),), 16)
    model.forward(torch.zeros(1, dtype=torch.int64) if model.first else torch.zeros((1, model.shape.hidden)), batch, kv)


def rehearse(device: str) -> None:
    """A sequence's whole life on a table and a pool of its own: what is imported at first use (numpy.ma alone: 150 ms) is there before it is needed."""
    layout = Layout.paged("rehearsal", "float32", 1, 4, 16, 1, 1)
    pool = engine.allocate(layout, device)
    table = TableWriter.create(Geometry(4, 4, 4, 64, 16))
    row = table.open("rehearsal", (), b"")
    table.commit(row, 32, range(32), (0, 1))
    table.publish()
    table.truncate(row, 16)
    table.release(row)
    piece = memoryview(bytearray(2 * 16 * layout.token_bytes))
    pool.capture((0, 1), (0, 0), (16, 16), piece)
    pool.scatter((0, 1), (0, 0), (16, 16), piece)
    table.close()
    pool.close()


class Stage:
    """The loop of a rank."""

    def __init__(self, settings: StageSettings, pp: int, load: RankLoad, links: Links):
        self.settings, self.pp, self.load, self.links = settings, pp, load, links
        self.dropped = 0
        self._pending: deque[tuple[Message, memoryview]] = deque()

    @property
    def epoch(self) -> int:
        """The adopted one. A rank without sequences adopts by attaching, so it is never remembered here."""
        return 0 if isinstance(self.load.guard, NoGuard) else self.load.guard.epoch.counter

    def run(self) -> None:
        """Until Stopped."""
        poller = zmq.Poller()
        poller.register(self.links.inbox, zmq.POLLIN)
        while True:
            self._restore_if_fenced()
            poller.poll(WAKE_MS if self.settings.guarded else 200)
            while (received := self._next()) is not None:
                self._take(*received)
                self._restore_if_fenced()

    def _next(self) -> tuple[Message, memoryview] | None:
        if self._pending and self._pending[0][0].epoch <= self.epoch:
            return self._pending.popleft()
        return self.links.receive()

    def _take(self, message: Message, tensor: memoryview) -> None:
        if message.epoch < self.epoch:
            self._drop(message, f"epoch {self.epoch} is adopted here")
        elif message.epoch > self.epoch:
            if len(self._pending) == PENDING_MAX:
                self._drop(self._pending.popleft()[0], f"more than {PENDING_MAX} messages wait for an epoch to be adopted")
            self._pending.append((message, tensor))
        elif message.hop != self.pp or len(message.route) != self.settings.stages + 1:
            self._drop(message, f"hop {message.hop} of {len(message.route)} is not stage {self.pp} of {self.settings.stages}")
        elif message.kind == STEP:
            self._step(message, tensor)
        elif message.kind == STATE:
            self._pass_on(message, self.load.state())
        elif message.kind == DIGEST:
            self._pass_on(message, self.load.digest(message.released))
        else:
            self._drop(message, "its kind is unknown")

    def _send(self, message: Message, tensor=b"") -> None:
        """On to the next on the route, and to nobody else: what is queued for a stage that is gone goes with its socket."""
        endpoint = message.route[self.pp + 1]
        self.links.keep((endpoint,))
        self.links.send(endpoint, message, tensor)

    def _step(self, message: Message, tensor: memoryview) -> None:
        fault = self.load.fault(message, tensor)
        if fault:
            return self._drop(message, fault)
        try:
            out = self.load.run(message, tensor)
        except Fenced as fenced:
            log.info("step %d of epoch %d is not sent: %s", message.number, message.epoch, fenced)
            return self._restore()
        self._send(msgspec.structs.replace(message, hop=self.pp + 1), out.contiguous().cpu().numpy().data if out.numel() else b"")

    def _pass_on(self, message: Message, reply: bytes) -> None:
        self._send(msgspec.structs.replace(message, hop=self.pp + 1, replies=(*message.replies, reply)))

    def _drop(self, message: Message, reason: str) -> None:
        self.dropped += 1
        log.warning("dropped %s %d of epoch %d (%d so far): %s", message.kind[:16], message.number, message.epoch, self.dropped, reason)

    # ---- fences -----------------------------------------------------------------------------------------------------------------

    def _restore_if_fenced(self) -> None:
        if self.settings.guarded and self.load.guard.fenced:
            self._restore()

    def _restore(self) -> None:
        while True:
            try:
                restored = self.load.guard.restore(self.settings.restore_timeout_s)
                break
            except TimedOut as late:  # no order yet: the coordinator may be away, and there is nothing else to do in an epoch that is over
                log.warning("%s", late)
        carry_out(self.load, restored)
        log.info("stage %d goes on in epoch %d with %d sequences", self.pp, self.epoch, len(self.load.rows))


def carry_out(load: RankLoad, restored) -> None:
    """Rows as the table says after a restore; then the epoch is adopted. Raises Refused where what was to be pulled is not whole."""
    if restored.epoch == load.guard.epoch:
        return  # the fence came down by itself: the attachment found that it had nothing to restore
    sequences, table = restored.pull(), load.guard.table
    load.adopt((each.name, each.position, each.blocks, table.ids(table.row(each.name)).tolist()) for each in sequences)
    restored.done()


# ---- the process ----------------------------------------------------------------------------------------------------------------


def serve(settings: StageSettings) -> None:
    """A rank from its settings; ends with Stopped."""
    files = open_model(settings.model)
    layout = layout_of(files, settings, settings.pp)
    model = model_of(files, settings, settings.pp)
    warm_up(model)
    rehearse(settings.device)
    pool = engine.allocate(layout, settings.device)
    kv = view_of(tensor_of(pool), layout)
    prove(pool, layout, kv)
    links = Links(settings.listen)
    guard = NoGuard()
    try:
        if settings.guarded:
            rank = Rank(0, settings.pp, 0)
            guard = engine.attach(settings.instance, rank, pool, layout, endpoint=settings.listen, socket=settings.socket, rows=SEQUENCES_KEPT_MAX)
        log.info("stage %d of %d ready on %s, layers %s", settings.pp, settings.stages, settings.listen, model.layers)
        Stage(settings, settings.pp, RankLoad(model, kv, guard), links).run()
    finally:
        if settings.guarded and not isinstance(guard, NoGuard):
            guard.detach()
        links.close(linger_ms=200)


def stand_by(settings: StageSettings) -> None:
    """A spare: every stage's weights mapped and touched, until a rank is given to it; ends with Stopped."""
    files = open_model(settings.model)
    models = [model_of(files, settings, pp) for pp in range(settings.stages)]
    for model in models:
        warm_up(model)
    rehearse(settings.device)
    layouts = {str(Rank(0, pp, 0)): layout_of(files, settings, pp) for pp in range(settings.stages)}
    links = Links(settings.listen)
    spare = engine.attach_standby(settings.instance, layouts, endpoint=settings.listen, socket=settings.socket, device=settings.device)
    guard = None
    try:
        log.info("standby for %d stages ready on %s", settings.stages, settings.listen)
        claim = wait_for_claim(spare)
        pp, layout = claim.rank.pp, layouts[str(claim.rank)]
        log.info("claimed as %s for epoch %d, %s", claim.rank, claim.epoch.counter, "its pool is here" if claim.adopt else "to be pulled")
        pool = claim.adopt[1] if claim.adopt is not None else engine.allocate(layout, settings.device)
        guard = engine.attach(settings.instance, claim.rank, pool, layout, endpoint=settings.listen, claim=claim, rows=SEQUENCES_KEPT_MAX)
        load = RankLoad(models[pp], view_of(tensor_of(pool), layout), guard)
        carry_out(load, guard.restore(settings.restore_timeout_s))
        log.info("standby is stage %d now, epoch %d, %d sequences", pp, guard.epoch.counter, len(load.rows))
        Stage(settings, pp, load, links).run()
    finally:
        (guard or spare).detach()
        links.close(linger_ms=200)


def wait_for_claim(spare):
    """The claim that can be taken; one that can't is refused and told so, and the spare stays one."""
    while True:
        try:
            claim = spare.wait(1.0)
        except Refused as refused:
            log.warning("%s", refused)
            continue
        if claim is not None:
            return claim


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s stage %(message)s")
    if len(arguments) != 1:
        print("usage: python -m kvguard.pipeline.stage SETTINGS.toml", file=sys.stderr)
        return 2

    def stop(*_) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        settings = settings_.read(Path(arguments[0]), StageSettings)
        settle(settings)
        (stand_by if settings.pp == -1 else serve)(settings)
    except Stopped:
        log.info("stopped")
        return 0
    except KvguardError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
