"""The driver of a simulated instance: schedules steps over the ranks, samples ids, is the emitter. A new life knows only what a Resume tells it.

Knows: sequences, blocks, the emitter's messages. Must not know: daemons, tables, how a recovery proceeds.
Invariants: one epoch is adopted once and never an older one (asserted); results of other epochs change nothing; every resumption is checked against the pools.
"""

from __future__ import annotations


from simulation.content import BLOCK_TOKENS, BLOCKS, chain, token_of
from simulation.engines import Order

from kvguard.errors import BadFrame
from kvguard.format import messages, wire
from kvguard.format.lineage import birth_of, life_of
from kvguard.transport.base import Down, Frame, Up
from kvguard.types import NO_EPOCH, Life, Rank

MS = 1_000_000
BEAT_NS = 50 * MS
COORDINATOR = "coordinator"
CHUNK = 8


class Running:
    """One sequence; `life` tells two uses of one name apart. `kv`: accepted positions; `said`: ids that the ranks know; `blocks`: its block list on every rank."""

    def __init__(self, name: str, ids: list[int], prompt: int, target: int, life: int) -> None:
        self.name, self.ids, self.prompt, self.target, self.life = name, ids, prompt, target, life
        self.kv = self.said = 0
        self.blocks: list[int] = []
        self.listed = 0
        self.opened = False
        self.paused_steps = 0

    @property
    def request(self) -> bytes:
        return b"%d,%d,%d" % (self.prompt, self.target, self.life)


class Driver:
    """One life. `answers`: what earlier lives had emitted, which clients have seen."""

    def __init__(self, world) -> None:
        self.world = world
        self.incarnation = world.random.getrandbits(60) | 1
        self.transport = world.network.join("driver")
        self.transport.dial(COORDINATOR, f"inproc://{COORDINATOR}")
        self.adopted = self.announced = NO_EPOCH
        self.welcomed = self.linked = False
        self.started = False
        self.resume: messages.Resume | None = None
        self.members: dict[Rank, str] = {}
        self.progress = 0
        self.sequences: dict[str, Running] = {}
        self.over: list[str] = []
        self.delivered: dict[Life, bool] = {}  # said with every session: the coordinator never answers
        self.refs = [0] * BLOCKS
        self.free = list(range(BLOCKS))
        self.number = 0
        self.cuts: list[tuple[str, int]] = []  # to be truncated with the next step
        self.void: dict[str, list[int]] = {}  # blocks that ranks list beyond what goes on, free once that is cut
        self.held_by_over: dict[str, list[int]] = {}
        self.waiting: dict[Rank, bool] = {}
        self.pending: list = []
        self.due_ns = world.now + MS
        self.beat_ns = world.now
        self.failed = ""
        self.recheck = True

    def end(self) -> None:
        self.world.network.leave("driver")

    # ---- messages ----

    def say(self, message) -> None:
        self.transport.send(COORDINATOR, wire.encode(message))

    def deliver(self, *lives: Life) -> None:
        self.delivered |= dict.fromkeys(lives, True)
        self.say(messages.Delivered.of(self.world.instance, lives))

    def turn(self) -> None:
        for incoming in self.world.mail(self):
            kind = type(incoming)
            if kind is Up and incoming.link == COORDINATOR:
                self.linked = True
                self.say(messages.EmitterHello(self.world.instance, self.incarnation, self.adopted, self.world.moving.on))
                if self.adopted != NO_EPOCH:
                    self.say(messages.Adopted(self.world.instance, self.incarnation, self.adopted))
                self.say(messages.Delivered.of(self.world.instance, tuple(self.delivered)))
                if any(life.sequence in self.sequences for life in self.delivered):
                    self.world.count("delivered_again_of_a_reused_name")
            elif kind is Down:
                self.linked = False
            elif kind is Frame:
                try:
                    self._heard(wire.decode(incoming.head)[0])
                except BadFrame:
                    self.world.count("driver_broken_frames")
        now = self.world.now
        if now >= self.beat_ns:
            self.beat_ns = now + BEAT_NS
            busy = len(self.sequences) if self.started else 0
            self.say(messages.EmitterBeat(self.world.instance, self.incarnation, self.adopted, busy, self.progress))
        if now >= self.due_ns:
            self.due_ns = now + 10 * MS
            self._act()

    def due(self) -> int:
        return min(self.beat_ns, self.due_ns)

    def ways(self) -> list[int]:
        return self.transport._times()

    def _heard(self, message) -> None:
        if type(message) is messages.Welcome:
            first, self.welcomed = not self.welcomed, True
            if message.members and not message.recovering:
                self.members = {member.rank: member.endpoint for member in message.members}
                self.world.moving.homeless &= len(self.members) < len(self.world.ranks)
            if first and not message.recovering and self.adopted == NO_EPOCH:
                self.adopted = message.epoch
            self._announce(message.epoch)
        elif type(message) is messages.Fenced:
            self._announce(message.epoch)
        elif type(message) is messages.Resume:
            if message.epoch.counter <= self.adopted.counter or (self.resume is not None and message.epoch.counter < self.resume.epoch.counter):
                return
            self._announce(message.epoch)
            self.resume = message

    def _announce(self, epoch) -> None:
        if epoch.counter > max(self.announced.counter, self.adopted.counter):
            self.announced = epoch

    # ---- what to do ----

    def _act(self) -> None:
        resume = self.resume
        if resume is not None and resume.epoch.counter > self.adopted.counter and resume.epoch.counter >= self.announced.counter:
            if resume.error:
                assert "two lives" not in resume.error, f"I7: an instance fails for what some of its sequences had: {resume.error}"
                if self.failed != f"{resume.epoch.counter}":
                    self.failed = f"{resume.epoch.counter}"
                    self.world.count("failed_recoveries")
                    self.world.note(f"recovery failed: {resume.error}")
                return
            self._adopt(resume)
            return
        if self.announced.counter > self.adopted.counter or not self.welcomed:
            return
        if set(self.members) != set(self.world.ranks):
            return
        if not self.waiting and not self.world.quiet:
            self._schedule()

    def _adopt(self, resume: messages.Resume) -> None:
        world = self.world
        assert resume.epoch.counter > self.adopted.counter
        if resume.moved:
            self._move(resume)
            return
        world.checks.adopted(self, resume)
        self.members = {member.rank: member.endpoint for member in resume.members}
        former, self.sequences = self.sequences, {}
        self.adopted, self.resume, self.waiting, self.failed = resume.epoch, None, {}, ""
        self.refs, self.free, self.cuts, self.void = [0] * BLOCKS, [], [], {}
        for entry in resume.sequences:
            ids = [int.from_bytes(entry.known.ids[n : n + 4], "little") for n in range(0, len(entry.known.ids), 4)]
            old = former.pop(entry.sequence, None)
            prompt, target, life = (int(part) for part in entry.known.request.split(b","))
            sequence = Running(entry.sequence, ids, prompt, target, life)
            if old is not None and old.life != life:
                world.count("names_reused_in_recovery")
                self.over.append(entry.sequence)
                former[entry.sequence] = old
                continue
            if old is not None:
                sequence.ids = old.ids if len(old.ids) > len(ids) else ids
                world.rolled_back.append(max(0, old.kv - entry.position))
            elif life in world.finished:
                self.over.append(entry.sequence)
                continue
            elif len(ids) < prompt:
                sequence.ids = list(world.prompts[life])  # preempted in its prompt: the rest is what its client asked
            self._place(sequence, entry.position)
            for block in sequence.blocks:
                self.refs[block] += 1
            self.sequences[entry.sequence] = sequence
        for name, old in former.items():
            if old.opened or old.kv:
                world.count("sequences_lost")
            self.sequences[name] = self._begun_again(old) if world.sampled else Running(name, old.ids, old.prompt, old.target, old.life)
        self.over = [name for name in dict.fromkeys(self.over) if world.checks.is_open(self, name)]
        held = [(name, world.checks.blocks_of(self, name)[1]) for name in self.over]
        taken = {block: None for blocks in [*(blocks for _, blocks in held), *self.void.values()] for block in blocks}
        self.held_by_over = dict(held)
        self.free = [block for block in range(BLOCKS) if not self.refs[block] and block not in taken]
        world.random.shuffle(self.free)
        self.started = True
        self.say(messages.Adopted(world.instance, self.incarnation, self.adopted))
        world.count("adopted")

    def _begun_again(self, old: Running) -> Running:
        """Sampled anew from its prompt: another life of the name, so that what comes back of the old one is told from it."""
        world = self.world
        world.finished[old.life] = True
        world.names += 1
        world.prompts[world.names] = tuple(old.ids[: old.prompt])
        return Running(old.name, old.ids[: old.prompt], old.prompt, old.target, world.names)

    def _move(self, resume: messages.Resume) -> None:
        """All that was served goes on elsewhere; here nothing is left, and the next processes of this instance begin empty."""
        world = self.world
        world.checks.moved(self, resume)
        for entry in resume.sequences:
            world.finished[int(entry.known.request.split(b",")[2])] = True
        for sequence in self.sequences.values():
            world.finished[sequence.life] = True
        self.sequences, self.members, self.over, self.cuts, self.void, self.held_by_over = {}, {}, [], [], {}, {}
        self.refs, self.free = [0] * BLOCKS, list(range(BLOCKS))
        world.random.shuffle(self.free)
        self.adopted, self.resume, self.waiting, self.failed, self.pending = resume.epoch, None, {}, "", []
        self.started = True
        self.say(messages.Adopted(world.instance, self.incarnation, self.adopted))
        world.count("adopted")
        world.moving.resumed(self, resume)

    def _place(self, sequence: Running, position: int) -> None:
        """Where it goes on: where KV is, where all ranks have it in the same blocks, and where the next input is known."""
        world = self.world
        sequence.opened = world.checks.is_open(self, sequence.name)
        blocks, everything = world.checks.blocks_of(self, sequence.name)
        start = min(position, len(blocks) * BLOCK_TOKENS, len(sequence.ids) - 1)
        if start % BLOCK_TOKENS and start < position:
            start -= start % BLOCK_TOKENS
        if start < position:
            world.count("resumed_below_the_plan")
            self.cuts.append((sequence.name, start))
        keep = -(-start // BLOCK_TOKENS)
        sequence.kv = sequence.said = start
        sequence.blocks, sequence.listed = blocks[:keep], keep
        self.void[sequence.name] = [block for block in everything if block not in sequence.blocks]

    # ---- scheduling ----

    def _allocate(self) -> int | None:
        if not self.free:
            return None
        block = self.free.pop()
        self.refs[block] += 1
        return block

    def _drop(self, blocks: list[int]) -> list[int]:
        freed = []
        for block in blocks:
            self.refs[block] -= 1
            if not self.refs[block]:
                freed.append(block)
                self.free.append(block)
        return freed

    def _schedule(self) -> None:
        world, random = self.world, self.world.random
        acts, freed, commits, slots = [], [], [], []
        for name in self.over:
            acts.append(("release", name))
            blocks = self.held_by_over.pop(name, [])
            free = [block for block in blocks if not self.refs[block] and block not in self.free]
            self.free += free
            freed += free
        over, self.over = dict.fromkeys(self.over), []
        for name, position in self.cuts:
            acts.append(("truncate", name, position))
        for blocks in self.void.values():
            free = [block for block in blocks if not self.refs[block] and block not in self.free]
            self.free += free
            freed += free
        self.cuts, self.void = [], {}
        for sequence in list(self.sequences.values()):
            if len(sequence.ids) >= sequence.target or (sequence.opened and random.random() < world.cancels):
                acts.append(("release", sequence.name))
                freed += self._drop(sequence.blocks)
                del self.sequences[sequence.name]
                world.finished[sequence.life] = True
                self.deliver(life_of(sequence.name, sequence.request))
            elif sequence.kv and random.random() < world.preempts:
                position = random.randrange(sequence.kv)
                if position % BLOCK_TOKENS and self.refs[sequence.blocks[position // BLOCK_TOKENS]] > 1:
                    position -= position % BLOCK_TOKENS
                acts.append(("truncate", sequence.name, position))
                keep = -(-position // BLOCK_TOKENS)
                freed += self._drop(sequence.blocks[keep:])
                del sequence.blocks[keep:]
                sequence.kv = sequence.said = position
                sequence.listed = keep
                sequence.paused_steps = random.randrange(3)
                world.count("preempted")
        if len(self.sequences) < world.width and not world.draining and random.random() < 0.4:
            self._new()
        grown, resting = [], False
        for sequence in self.sequences.values():
            if sequence.paused_steps:
                sequence.paused_steps -= 1
                resting = True
                continue
            if sequence.name in over:  # its name is free after this step
                resting = True
                continue
            self._extend(sequence, commits, slots, grown)
        used = {block for block, _, _ in slots}
        if not commits and self.sequences and not resting:
            self._make_room(acts, freed)
        if not acts and not commits:
            return
        self.number += 1
        self.pending = grown
        order = Order(self.adopted, self.number, acts, commits, slots, [block for block in dict.fromkeys(freed) if block not in used and not self.refs[block]])
        self.waiting = dict.fromkeys(self.members)
        self.started = True
        for rank, endpoint in self.members.items():
            world.to_rank(endpoint, order)

    def _make_room(self, acts, freed) -> None:
        """Every sequence waits for a block: the last one starts over later."""
        last = [sequence for sequence in self.sequences.values() if sequence.blocks][-1]
        if last.opened:
            acts.append(("truncate", last.name, 0))
        freed += self._drop(last.blocks)
        last.blocks, last.kv, last.said, last.listed = [], 0, 0, 0
        last.paused_steps = 8
        self.world.count("starved")

    def _new(self) -> None:
        world, random = self.world, self.world.random
        world.names += 1
        name = f"q{random.randrange(4)}" if random.random() < world.reuses else f"s{world.names}"
        if name in self.sequences or name in self.over or world.checks.is_open(self, name):
            return
        if world.checks.is_left(name):
            world.count("names_reused_while_left")
        prompt = random.randrange(2, 20)
        family = random.randrange(3)
        ids = [token_of(f"family{family}", n, 0) for n in range(min(prompt, 12))]
        ids += [token_of(f"{name}#{world.names}", n, 0) for n in range(len(ids), prompt)]
        sequence = Running(name, ids, prompt, prompt + random.randrange(3, 30), world.names)
        source = next((other for other in self.sequences.values() if other.ids[:BLOCK_TOKENS] == ids[:BLOCK_TOKENS] and other.kv >= BLOCK_TOKENS), None)
        if source is not None:
            common = 0
            while common < min(source.kv, source.prompt, prompt - 1) and source.ids[common] == ids[common]:
                common += 1
            whole = common // BLOCK_TOKENS
            sequence.blocks = source.blocks[:whole]
            for block in sequence.blocks:
                self.refs[block] += 1
            sequence.kv = whole * BLOCK_TOKENS
            if whole:
                world.count("prefixes_shared")
        self.sequences[name] = sequence
        world.prompts[sequence.life] = tuple(ids)

    def _extend(self, sequence: Running, commits, slots, grown) -> None:
        end = min(len(sequence.ids), sequence.kv + CHUNK)
        needed = -(-end // BLOCK_TOKENS)
        while len(sequence.blocks) < needed:
            block = self._allocate()
            if block is None:
                break
            sequence.blocks.append(block)
        end = min(end, len(sequence.blocks) * BLOCK_TOKENS)
        start = sequence.kv
        if end <= start and sequence.opened:
            return
        values = chain(sequence.ids[:end])
        for position in range(start, end):
            slots.append((sequence.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS, values[position]))
        known = len(sequence.ids)
        request = None if start and sequence.opened else sequence.request
        self.world.births[birth_of(sequence.request)] = sequence.life
        commits.append((sequence.name, end, sequence.blocks[sequence.listed :], (sequence.said, sequence.ids[sequence.said : known]), request))
        sequence.opened = True
        sequence.said, sequence.listed = known, len(sequence.blocks)
        grown.append((sequence, end))

    def result(self, rank: Rank, epoch, number: int) -> None:
        """A rank has done its part of a step."""
        if epoch != self.adopted or number != self.number or rank not in self.waiting or self.announced.counter > self.adopted.counter:
            self.world.count("results_too_late")
            return
        del self.waiting[rank]
        if self.waiting:
            return
        self.progress += 1
        for sequence, end in self.pending:
            sequence.kv = end
            if end == len(sequence.ids):
                sequence.ids.append(token_of(sequence.name, end, self.adopted.counter if self.world.sampled else 0))
        self.pending = []
        self.due_ns = self.world.now + self.world.random.randrange(MS, 20 * MS)
        self.world.driver_host.own_ns = self.due()


