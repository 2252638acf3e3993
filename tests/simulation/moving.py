"""Worlds in which the emitter moves: no spare anywhere, a second instance that hosts, and engines that fetch what a dead instance left.

Knows: the world, the real engine's fetch. Must not know: how places are chosen.
Invariants checked: I1, what is fetched is byte for byte what the ids give, up to the position and no further; I7, the instance that lost its sequences to another
one comes back, empty, and serves again. Its randomness is apart: worlds without moves are what they were.
"""

from __future__ import annotations

from random import Random

from simulation.content import BLOCK_TOKENS, chain, read_slots, slot_bytes, token_in

from kvguard.engine.fetch import Fetch
from kvguard.format import local, messages
from kvguard.format.lineage import life_of
from kvguard.types import Life, MovedToken

MS = 1_000_000
SHARE = 0.12
SUPERVISE_NS = 250 * MS
FOREVER_S = float("inf")


class Moving:
    """`on`: whether this is such a world. `homeless`: the driver has no instance until new processes are its ranks."""

    def __init__(self, world) -> None:
        self.world = world
        self.random = Random(world.seed ^ 0x6D6F7665)
        self.on = self.random.random() < SHARE
        self.homeless = False
        self._hosts = 0
        self.resumed_ns = 0

    def start(self) -> None:
        if self.on:
            self._supervise()

    def _supervise(self) -> None:
        """The hosting instance, and the moved one's new processes, are kept alive."""
        world = self.world
        world.after(SUPERVISE_NS, self._supervise)
        hosts = self._living(f"host{self._hosts}")
        nodes = list(world.nodes)
        if len(hosts) != len(world.ranks) and not world.faults.calmed or not self._hosts:
            for process in hosts.values():
                process.kill("another process of its instance died")
            self._hosts += 1
            for rank in world.ranks:
                world.process(nodes[(rank.pp + 1) % len(nodes)], f"host{self._hosts}").start_as_rank(rank)
        if self.homeless and world.now >= self.resumed_ns:
            living = self._living(world.instance)
            for rank in world.ranks:
                if rank not in living:
                    world.process(nodes[rank.pp % len(nodes)]).start_as_rank(rank)
                    world.count("started_empty_after_a_move")

    def _living(self, instance: str) -> dict:
        found = {}
        for process in self.world.processes.values():
            if process.alive and process.guard is not None and process.guard.instance == instance:
                found[process.guard.rank] = process
        return found

    # ---- a resumption that moved ----

    def resumed(self, driver, resume: messages.Resume) -> None:
        """Every sequence is fetched where its places say, and said to be delivered a while later."""
        world = self.world
        assert resume.moved and not resume.members, f"moved, and {resume.members} still serve"
        world.count("moves")
        for entry in resume.sequences:
            assert len(entry.known.ids) >= 4 * entry.position and bool(entry.places) == (entry.position > 0), entry
            world.count(f"moved_{entry.rung}")
            token = MovedToken(resume.instance, entry.sequence, resume.epoch, entry.position, entry.proof, entry.places)
            for process in self._living(f"host{self._hosts}").values():
                if (process.guard.rank, process.node) in entry.places:
                    world.after(self.random.randrange(1, 30) * MS, lambda process=process, token=token, entry=entry: self._ask(process, token, entry))
        lives = tuple(life_of(entry.sequence, entry.known.request) for entry in resume.sequences)
        world.after(self.random.randrange(60, 900) * MS, lambda: self._delivered(driver, lives))
        self.homeless, self.resumed_ns = True, world.now + self.random.randrange(20, 400) * MS

    def _delivered(self, driver, lives: tuple[Life, ...]) -> None:
        if self.world.driver is driver:
            driver.deliver(*lives)

    def _ask(self, process, token: MovedToken, entry) -> None:
        if not process.alive or process.guard is None:
            return
        forged = self.random.random() < 0.2
        if forged:
            token = token._replace(proof=bytes(reversed(token.proof)))
        process.fetches[len(process.fetches) + 1] = (token, entry.known.ids, forged)
        process.line.say(local.Fetch(len(process.fetches), token))

    def answered(self, process, message, descriptors: list[int]) -> None:
        """What came is pulled and compared; what was refused is counted."""
        world = self.world
        token, ids, forged = process.fetches[message.number]
        if isinstance(message, local.FetchRefused):
            world.count("fetches_forged_refused" if forged else "fetches_refused")
            world.note(f"{process.name}: fetch of {token.sequence} at {token.position} refused: {message.reason}")
            return
        assert not forged, "a forged token was believed"
        with Fetch(process.pool, token, message, descriptors[0], 0.0, FOREVER_S) as found:
            fetched = found.pull(list(range(found.blocks_needed)))
        assert fetched.position == token.position
        values = chain([int.from_bytes(ids[n : n + 4], "little") for n in range(0, 4 * token.position, 4)])
        pages = read_slots(process.pool, list(range(found.blocks_needed)))
        for at, value in enumerate(values):
            held = token_in(pages[at // BLOCK_TOKENS], at % BLOCK_TOKENS, world.addressable)
            assert held == slot_bytes(value, process.guard.rank.pp), f"I1: {process.name} fetched wrong bytes of {token.sequence} at {at} of {token.position}"
        world.count("fetches_of_a_mate", message.layout is None and process.guard.rank.tp > 0)
        world.count("fetches_pool" if message.layout is not None else "fetches_replica")
        world.count("positions_fetched", token.position)
