"""The coordinator's process: the core, its loop, a journal and a transport, put together.

Knows: which part is made of what. Must not know: decisions (core/coordinator.py).
Invariants: the core hears what the journal says before it hears anything else; a state directory serves one coordinator at a time.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from kvguard.config import CoordinatorConfig
from kvguard.core import effects, events
from kvguard.core.coordinator import Coordinator
from kvguard.core.known import Settings
from kvguard.core.membership import Patience
from kvguard.daemon import drilled, whereabouts
from kvguard.daemon.hooks import Hooks
from kvguard.daemon.journal import Journal
from kvguard.daemon.loop import Loop
from kvguard.daemon.mail import Mail, answering
from kvguard.daemon.moments import Moments
from kvguard.daemon.occasions import EVENTS, Occasions
from kvguard.daemon.perform import SHARED, Events, Shell, performer
from kvguard.daemon.process import begun, noted, serve
from kvguard.daemon.questions import Questions
from kvguard.format import ledger, moves
from kvguard.format.messages import Answer, Query
from kvguard.transport import keys as keyring
from kvguard.transport.zeromq import ZeromqTransport

log = logging.getLogger(__name__)

MS = 1_000_000
ORDERS = ("drain", "failover", "handoff", "pause", "unpause")  # change something: the core decides
ASKED_MAX = 1024
PROTECTION_NS = 500 * MS  # how long a rank may be unprotected before its hook hears of it


class CoordinatorDaemon:
    """Listens when made; `loop.run()` works. Raises BadConfig where something can't be opened."""

    RELOADED = ()  # everything but the log level waits for a restart: epochs in flight were promised under the old deadlines

    def __init__(self, config: CoordinatorConfig) -> None:
        self.config = config
        self.journal = Journal(Path(config.state_dir) / "journal.db")
        keys = keyring.load(config.keys) if config.keys else None
        self.transport = ZeromqTransport("coordinator", keys, config.insecure, incarnation=self.journal.next_incarnation())
        self.address = self.transport.listen(config.listen)
        self.core = Coordinator(config.name, settings_of(config))
        self.occasions = Occasions(Hooks({event: getattr(config, event) for event in EVENTS}))
        self.shell = Shell(self.transport, self.journal, time.monotonic_ns, self._noted)
        self.loop = Loop(self.core, performer(self.shell, {**SHARED, effects.AnswerAsked: self._answer_asked}, {}))
        self._answer = answering(self.shell)
        self._asked: dict[int, tuple[str, int]] = {}
        self._numbers = itertools.count(1)
        self.drilled = drilled.Drilled(self.journal)
        verbs = {
            "status": lambda arguments: self.core.status(time.monotonic_ns()), "history": self._history, "stats": self._stats, "drilled": self.drilled.told,
            "heard": lambda arguments: {},  # what was said before on this link, proved by the answer
        }  # fmt: skip
        self.mail = Mail(self.shell, Questions(verbs, self._answer, self.loop.after), {Query: self._query})
        self.questions = self.mail.questions
        self.loop.feed(events.Loaded(drilled.without(with_secret(self.journal))))
        self.loop.watch(self.transport.fileno(), self.mail.read)
        self.scrapes = None
        if config.metrics:  # imported where it is asked for: a restart is quicker without
            from kvguard.daemon.metrics import CoordinatorFigures
            from kvguard.daemon.scrape import Scrapes

            figures = CoordinatorFigures(self.core, self.shell, self.drilled, lambda: dict(self.transport.counters))
            self.scrapes = Scrapes(config.metrics, self.loop, figures.families)

        if config.on_unprotected:
            self._watch_protection()

    def _noted(self, note: effects.Note) -> None:
        noted(note)
        self.occasions.noted(note)

    def _watch_protection(self) -> Events:
        self.loop.after(PROTECTION_NS, self._watch_protection)
        self.occasions.seen(self.core.status(time.monotonic_ns())["ranks"])
        return ()

    def _query(self, link: str, query: Query) -> None:
        """Orders go to the core, everything else is answered from what it knows."""
        if query.verb not in ORDERS:
            self.questions.asked(link, query)
            return
        arguments = self.questions.arguments_of(link, query)
        if arguments is None:
            return
        if len(self._asked) >= ASKED_MAX:
            self._answer(link, Answer(query.id, b"{}", f"{ASKED_MAX} orders are waiting already. Try: again in a while", 1))
            return
        number = next(self._numbers)
        self._asked[number] = (link, query.id)
        self.loop.feed(events.Asked(number, query.verb, arguments))

    def _answer_asked(self, shell: Shell, effect: effects.AnswerAsked) -> Events:
        link, number = self._asked.pop(effect.id)
        if effect.error:
            self._answer(link, Answer(number, b"{}", effect.error, effect.code or 1))
        else:
            self.questions.answer(link, number, effect.body)
        return ()

    def _history(self, arguments: dict) -> dict:
        return {"schema": "kvguard.history/1", "history": self.core.history(), "held": self.core.held()}

    def _stats(self, arguments: dict) -> dict:
        return {
            "process": {**whereabouts.here(), **whereabouts.process(os.getpid())},
            "counters": dict(sorted(self.shell.counters.items())), "transport": dict(self.transport.counters),
            "hooks": {**self.occasions.hooks.counters, "ranks_watched": self.occasions.watched},
        }  # fmt: skip

    def take_over(self, config: CoordinatorConfig) -> None:
        """Nothing beyond the log level."""

    def summary(self) -> str:
        status = self.core.status(time.monotonic_ns())
        nodes, ranks = status["nodes"], [rank for rank in status["ranks"] if rank["state"] != "standby"]
        alive, protected = (sum(one["state"] == word for one in ones) for ones, word in ((nodes, "alive"), (ranks, "protected")))
        paused = "; paused" if status["paused"] else ""
        return f"{alive} of {len(nodes)} nodes alive, {protected} of {len(ranks)} ranks protected{paused}"

    def close(self) -> None:
        if self.scrapes is not None:
            self.scrapes.close()
        self.occasions.hooks.close()
        self.transport.close()
        self.journal.close()
        self.loop.close()


def with_secret(journal: Journal) -> dict[str, bytes]:
    """What the journal says. The secret behind the proofs of moved sequences is made with the journal, and lives as long as it."""
    values = journal.load()
    if "secret" not in values:
        values["secret"] = ledger.pack(os.urandom(moves.SECRET_BYTES))
        journal.persist("secret", values["secret"])
    return values


def settings_of(config: CoordinatorConfig) -> Settings:
    """The core's settings in ns."""
    patience = Patience(
        heartbeat_ns=config.heartbeat_ms * MS, suspect_ns=config.suspect_ms * MS, silence_ns=config.dead_ms * MS, reattach_ns=config.reattach_ms * MS,
        emitter_ns=config.emitter_ms * MS, emitter_most_ns=config.emitter_ms_max * MS,
    )  # fmt: skip
    return Settings(
        patience=patience, exclude_ns=config.exclude_ms * MS, seal_ns=config.seal_ms * MS, standby_ns=config.standby_ms * MS, restore_ns=config.restore_ms * MS,
        failovers_max=config.failovers_per_window, window_ns=config.window_s * 1000 * MS, backoff_ns=config.backoff_ms * MS, replicas=config.replicas,
        move_ns=config.move_after_ms * MS, moved_ns=config.moved_retention_s * 1000 * MS, pool_ns=config.pool_ms * MS,
        pool_lag_tokens=config.pool_lag_tokens,
    )  # fmt: skip


def run(config: CoordinatorConfig, reload: Callable[[], CoordinatorConfig], moments: Moments | None = None) -> None:
    """The process's main."""
    notifier = begun(config)
    daemon = CoordinatorDaemon(config)
    try:
        log.info("coordinator %s listens at %s, its epochs are in %s", config.name, daemon.address, daemon.journal.path)
        serve(daemon, notifier, reload, moments or Moments())
    finally:
        daemon.close()
        notifier.close()
