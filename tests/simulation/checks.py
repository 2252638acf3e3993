"""The invariants of the house (section 4), each asserted by its name, over the whole world: what no single process could see.

Knows: everything. Must not change anything.
Invariants checked: I1 at every resumption and every applied piece, I3 at every promise, order and applied frame, I4 by content, I6 buffers and budgets, I7 by a
bound on the time to drain, I8 at every heartbeat, I9 at rest.
"""

from __future__ import annotations

from simulation.content import BLOCK_TOKENS, chain, read_slots, slot_bytes, token_in

from kvguard.core import effects
from kvguard.format import messages
from kvguard.limits import HELD_FRAMES_MAX

MS = 1_000_000


class Checks:
    def __init__(self, world) -> None:
        self.world = world
        self._chains: dict[tuple, tuple[bytes, list[int]]] = {}
        self._promised: dict[str, int] = {}  # by node: the highest promise that this machine ever wrote
        self._fences: dict[tuple, tuple] = {}
        self._plans: dict[tuple, bytes] = {}
        self._raised: dict[str, int] = {}  # by key of the durable store
        self._reported: dict[int, dict[str, bool]] = {}  # by epoch: sequences whose ids some node reported
        self._touched: dict[str, bool] = {}  # nodes whose store changed in this turn

    # ---- around every effect ----

    def before(self, life, effect) -> None:
        kind = type(effect)
        if kind is effects.Persist:
            self._persist(life, effect)
        elif kind is effects.Send:
            message = effect.message
            if type(message) is messages.Beat:
                self._beat(life, message)
            elif type(message) is messages.Fence and message.lost:
                key = (message.instance, message.epoch)
                former = self._fences.get(key, ())
                self._fences[key] = message.lost
                assert all(rank in message.lost for rank in former), f"I3: epoch {key} means two things: {former} and {message.lost}"
            elif type(message) is messages.PlanOrder:
                key, packed = (message.instance, message.epoch), messages.pack(message)
                new = key not in self._plans
                assert self._plans.setdefault(key, packed) == packed, f"I3: two plans in epoch {key}"
                self._nothing_left_out(life, message)
                self._of_the_dead_alone(message)
                assert len(dict.fromkeys(message.transfers)) == len(message.transfers), f"I4: a replica is sent to one node twice: {message.transfers}"
                pushed = [(holder, stream) for holder, _, _, stream in message.transfers]
                self.world.count("pushed_to_two_nodes", new and len(pushed) - len(dict.fromkeys(pushed)))
            elif type(message) is messages.Report and message.instance == self.world.instance:
                for holding in message.holdings:
                    pending = holding.kind == "pool" and holding.stream in message.pending
                    for name, known in zip(holding.sequences, holding.ids, strict=True):
                        if known and not pending:
                            self._reported.setdefault(message.epoch.counter, {})[name] = True
            elif type(message) is messages.Done:
                self.world.count("transfers_done", message.part.startswith("transfer"))
                self.world.count("transfers_to_two_nodes_done", len(life.core.orders[message.instance].targets(message.stream)) > 1)
                self.world.count("clashes", len(message.clashes))
        elif kind is effects.Claim:
            taken = {source.stream for at, source in enumerate(effect.rebuild.sources) if at in effect.rebuild.source}
            self.world.count("claims_of_two_lives", len(taken) > 1)
            mates = [stream for stream in taken if stream.rank != effect.rebuild.rank]
            assert all((stream.rank.dp, stream.rank.pp) == (effect.rebuild.rank.dp, effect.rebuild.rank.pp) for stream in mates), f"I1: {effect.rebuild} takes {mates}"
            self.world.count("claims_of_a_mate", len(mates) > 0)
        elif kind is effects.CarryPlan:
            places = dict(zip(effect.plan.sequences, effect.plan.positions, strict=True))
            for replica in life.shell.store._replicas.values():
                self.world.count("cut_to_the_plan", sum(1 for held in replica.live() if held.position > places.get(held.name, held.position)))
        elif kind is effects.Apply:
            session = life.shell.store._sessions.get(effect.session)
            if session is not None:
                instance = session.replica.stream.instance
                promise = life.core.promises.of(instance)
                assert effect.message.epoch == promise, f"I3: a frame of {effect.message.epoch} is applied after the promise of {promise}"

    def _nothing_left_out(self, life, order) -> None:
        """I2: whatever was reported and its client hasn't had yet is planned, or somebody says why. Not what a rank alone has that was given up: one that
        lives, or a former life, in its pool, of a rank that goes on without it."""
        current = life.core.known.rounds[order.instance]
        named = dict.fromkeys((*order.sequences, *(name for name, _ in current.record.lost_sequences)))
        for clash in current.record.clashes:
            for rebuild in order.rebuilds:
                sources = [rebuild.sources[at] for name, at in zip(order.sequences, rebuild.source, strict=True) if at >= 0 and name == clash.sequence]
                position = dict(zip(order.sequences, order.positions, strict=True)).get(clash.sequence, 0)
                again = any(source.stream == clash.stream and source.kind == "replica" for source in sources)  # a pool is adopted alone, and whole
                assert not again or position <= clash.position, f"I7: {clash} is planned with again"
        for report in current.reports.values() if order.instance == self.world.instance else ():
            for holding in report.holdings:
                rank, lost = holding.stream.rank, holding.stream.rank in current.record.lost
                member = current.record.members.get(str(rank))
                if holding.kind == "pool" and (holding.alive if lost else member is not None and member.stream != holding.stream):
                    continue
                for name, known, birth in zip(holding.sequences, holding.ids, holding.births, strict=True):
                    number = self.world.births[birth]
                    if known and number not in self.world.finished:
                        assert name in named, f"I2: life {number} of {name} was reported by {report.node}, isn't planned, and nobody says why"

    def _of_the_dead_alone(self, order) -> None:
        """I1: nobody is given the memory of a process that may still write it."""
        dying = [process.guard for process in self.world.processes.values() if process.dying and process.guard is not None]
        adopted = [source.stream for rebuild in order.rebuilds for source in rebuild.sources if source.kind == "pool"]
        assert not any(guard.stream in adopted for guard in dying), f"I1: the plan of {order.epoch} adopts memory that is being torn down"
        ranks = (*order.moved, *(rebuild.rank for rebuild in order.rebuilds))
        self.world.count("planned_before_the_death", any(guard.instance == order.instance and guard.rank in ranks for guard in dying))

    def coordinator_turn(self, life) -> None:
        """I7: a process that is being torn down is waited for only where it has what no replica has."""
        known = life.core.known
        for instance, current in known.rounds.items():
            waits = current.waiting.startswith("waiting for the memory") and known.fair_ns - current.since_ns >= known.settings.pool_ns
            if not waits or not known.emitter_lives(instance) or known.moves(instance):
                continue
            self.world.count("waited_for_a_death")
            held = [holding for report in current.reports.values() for holding in report.holdings]
            pending = [stream for report in current.reports.values() for stream in report.pending]
            had: dict[tuple, int] = {}
            for holding in (one for one in held if one.kind == "replica"):
                for name, position in zip(holding.sequences, holding.positions, strict=True):
                    had[holding.stream, name] = max(had.get((holding.stream, name), 0), position)
            lag_tokens = known.settings.pool_lag_tokens
            needed = [
                name for holding in held if holding.kind == "pool" and holding.stream in pending
                for name, position in zip(holding.sequences, holding.positions, strict=True)
                if (holding.stream, name) not in had or position - had[holding.stream, name] > lag_tokens or position > had[holding.stream, name] == 0
            ]  # fmt: skip
            assert needed, f"I7: {instance} waits for {pending}, and replicas have everything of them"

    def delivered(self, life) -> None:
        """I2: ids that may go are of answers that clients have."""
        for replica in life.shell.store._replicas.values():
            for sequence in replica.sequences.values() if replica.stream.instance == self.world.instance else ():
                number = self.world.births[sequence.birth]
                assert not sequence.expires_ns or number in self.world.finished, f"I2: {life.name} takes life {number} of {sequence.name} for delivered"

    def _persist(self, life, effect) -> None:
        if effect.key.startswith("promise/"):
            counter = int(effect.value.split(b" ")[0])
            on_disk = life.shell.journal.values.get(effect.key)
            assert on_disk is None or int(on_disk.split(b" ")[0]) < counter, f"I3: {life.name} promises {counter} after {on_disk}"
        elif effect.key.startswith("epoch/"):
            from kvguard.format import ledger

            counter = ledger.unpack(effect.key, effect.value).counter
            raised = self._raised.get(effect.key, 0)
            assert counter >= raised, f"I3: {effect.key} {counter} is raised after {raised}"
            self._raised[effect.key] = counter

    def after(self, life, effect, told) -> None:
        if type(effect) in (effects.Apply, effects.Probe, effects.CarryPlan, effects.DropReplica):
            self._touched[life.name] = True
        if type(effect) is effects.Apply and type(effect.message) is messages.KvFrame:
            session = life.shell.store._sessions.get(effect.session)
            if session is not None:
                self.world.count("kv_frames_applied")
                for no in dict.fromkeys(effect.message.nos):
                    sequence = session._sequences.get(no)
                    if sequence is not None:
                        first = min(start for n, start in zip(effect.message.nos, effect.message.starts, strict=True) if n == no)
                        self._content(life, session.replica, sequence, first)
        elif type(effect) is effects.Capture:
            stale = sum(len(event.stale) for event in told)
            self.world.count("stale_pieces", stale)

    def _content(self, life, replica, sequence, first: int = 0) -> None:
        """I4, I9: what a replica holds at [first, position) is what these ids give, whatever came in whatever order."""
        if sequence.position <= first:
            return
        assert sequence.known >= sequence.position, f"I6: {sequence.name}: {sequence.position} positions with {sequence.known} ids"
        key = (life.name, str(replica.stream), sequence.name)
        ids = bytes(sequence.ids)
        cached = self._chains.get(key)
        if cached is None or cached[0] != ids:
            tokens = [int.from_bytes(ids[n : n + 4], "little") for n in range(0, len(ids), 4)]
            cached = self._chains[key] = (ids, chain(tokens))
        values, stage = cached[1], replica.stream.rank.pp
        for position in range(first, sequence.position):
            block = sequence.blocks[position // BLOCK_TOKENS]
            slot = position % BLOCK_TOKENS
            if self.world.addressable:
                held = bytes(replica.arena.tokens(block, slot, 1))
            else:
                held = token_in(replica.arena.block(block), slot, False)
            assert held == slot_bytes(values[position], stage), f"I1: {life.name} holds wrong bytes of {sequence.name} at {position} (stream {replica.stream}, block {block})"

    def of_one_life(self, known) -> None:
        """I1: ids that a plan takes and the request that comes with them are of one sequence, whatever else bore its name."""
        _, _, life = (int(part) for part in known.request.split(b","))
        first = self.world.prompts.get(life)
        assert first is not None, f"I1: {known.sequence} comes back with a request that nobody made: {known.request!r}"
        ids = [int.from_bytes(known.ids[n : n + 4], "little") for n in range(0, len(known.ids), 4)]
        assert ids[: len(first)] == list(first[: len(ids)]), f"I1: {known.sequence} comes back with the ids of another of its lives"

    def whole_store(self, life) -> None:
        for replica in life.shell.store._replicas.values():
            for sequence in replica.live():
                self._content(life, replica, sequence)

    # ---- after every turn of a node ----

    def node_turn(self, life) -> None:
        world, shell = self.world, life.shell
        if self._touched.pop(life.name, False):
            shell.store.check()
        assert shell.buffers.total_bytes() <= 64 * world.window_bytes + (1 << 20), "I6: buffers grow"
        for local in life.core.outbound.all():
            for node, sender in local.senders.items():
                if sender.state == "stream" and world.random_checks.random() < 0.5:
                    self._acked(life, local, node, sender)
        for receiver in life.core.inbound._streams.values():
            assert len(receiver._ids_held) + len(receiver._kv_held) <= HELD_FRAMES_MAX, "I6: held frames"
        for local in life.core.outbound.streams.values():
            for copy in (copy for sender in local.senders.values() for copy in sender.flow.copies.values()):
                assert copy.acked <= copy.row.committed or copy.row.generation not in copy.row.former, "I8: acknowledged beyond what is committed"

    def _acked(self, life, local, node: str, sender) -> None:
        """An acknowledged position is held, verified and of these very ids, by the holder's life that granted the session."""
        holder = self.world.nodes[node].life
        store = holder.shell.store if holder is not None else None
        if store is None or store._current.get(local.stream) != sender.session or holder.core.promises.of(local.stream.instance) != sender.epoch:
            return  # another life, or fenced: whoever still counts on it is cut off, and will hear
        replica = store._replicas[local.stream]
        for copy in sender.flow.copies.values():
            if copy.shed or copy.no in store._sessions[sender.session]._refused:
                continue  # shed for want of room: the word is on its way
            if not copy.acked or self._moved_on(life, local.stream, copy):
                continue
            held = replica.sequences.get(copy.row.sequence)
            position = held.position if held is not None and not held.released else 0
            assert copy.acked <= position, f"I6: {life.name} counts {copy.acked} of {copy.row.sequence} as acknowledged, {node} holds {position}"

    def _moved_on(self, life, stream, copy) -> bool:
        """The engine has cut or released the row and the daemon hasn't seen it yet: another row's frame may already have taken its blocks."""
        source = life.shell.streams.get(stream)
        return source is None or source.table.row_generation(copy.number) != copy.row.generation

    def _beat(self, life, beat) -> None:
        """I8: a rank that is called protected is."""
        for rank in beat.ranks:
            if rank.state != "protected":
                continue
            self.world.count("beats_protected")
            local = life.core.outbound.streams[rank.stream]
            assert rank.epoch == life.core.promises.of(rank.stream.instance), "I8: protected in an epoch that is over"
            cover = local.mate if local.mate is not None and not local.mate.watched else local.cover  # it may have died after the beat was made
            streams = [local, *([cover] if cover is not None else [])]
            assert any(node != life.name for one in streams for node in one.senders), "I8: protected by nobody"
            assert rank.as_rank is None or (cover.stream.rank == rank.as_rank and not local.senders), "I8: copied by nobody"
            self.world.count("beats_protected_with_a_mate", rank.as_rank is not None and rank.committed > 0)
            for row in local.ledger.rows.values():
                best = self._held_of(streams, row)
                assert best >= min(row.previous, row.committed), f"I8: {rank.stream} is called protected, {row.sequence}: {best} of {row.committed} ({row.previous} before)"

    def _held_of(self, streams, row) -> int:
        """How far any holder of these streams has acknowledged the sequence of this row: told by name and birth alone, as a plan would find it."""
        copies = [copy for one in streams for sender in one.senders.values() if sender.state == "stream" for copy in sender.flow.copies.values()]
        return max((copy.acked for copy in copies if (copy.row.sequence, copy.row.request) == (row.sequence, row.request)), default=0)

    # ---- resumption ----

    def _guard(self, endpoint: str):
        process = self.world.processes.get(endpoint)
        return process.guard if process is not None else None

    def adopted(self, driver, resume) -> None:
        """I1: after a resumption every rank's KV for [0, position) is byte for byte what the ids give."""
        world = self.world
        members = {member.rank: member for member in resume.members}
        named = {entry.sequence: True for entry in resume.sequences}
        begun = world.moving.on and not resume.sequences  # not all of its new processes have attached yet
        assert begun or sorted(members) == list(world.ranks), f"I7: resumed with {sorted(members)}"
        for rank, member in members.items():
            process = world.processes[member.endpoint]
            guard = process.guard
            if not process.alive or guard is None:
                world.count("resumed_rank_died_meanwhile")
                continue
            assert guard.epoch.counter >= resume.epoch.counter, f"I1: {rank} lives in {guard.epoch}, resumed is {resume.epoch}"
            live = guard.table.sequences()
            for entry in resume.sequences:
                self._resumed(driver, rank, guard, process.pool, live, entry)
            for name, row in live.items():
                known = next((entry.known.ids for entry in resume.sequences if entry.sequence == name), b"")
                own = b"".join(int(token).to_bytes(4, "little") for token in guard.table.ids(row))
                requests = [entry.known.request for entry in resume.sequences if entry.sequence == name]
                assert guard.table.meta(row).request in requests, f"I1: {rank} goes on with another life of {name} than is resumed"
                assert known.startswith(own), f"I1: {rank} has ids of {name} that nobody resumes with"
                assert name in named, f"I1: {rank} goes on with {name}, which the plan doesn't name"
        for name, sequence in driver.sequences.items():
            if name not in named and sequence.kv:
                told = {lost: True for record in world.coordinator.life.core.known.history for lost in record.lost} if world.coordinator.life else {name: True}
                assert name in told or name not in self._reported.get(resume.epoch.counter, {}), f"I2: {name} was reported, is not resumed, and nobody says why"
        world.count("resumptions_checked")
        world.count("resumed_sequences", len(resume.sequences))
        for entry in resume.sequences:
            world.count(f"rung_{entry.rung}")
            self.of_one_life(entry.known)

    def moved(self, driver, resume) -> None:
        """I1, I2: what moves is what was emitted, and what isn't named was never reported, or somebody says why."""
        named = {entry.sequence: True for entry in resume.sequences}
        for entry in resume.sequences:
            self.of_one_life(entry.known)
            ids = [int.from_bytes(entry.known.ids[n : n + 4], "little") for n in range(0, len(entry.known.ids), 4)]
            old, life = driver.sequences.get(entry.sequence), int(entry.known.request.split(b",")[2])
            common = min(len(ids), len(old.ids)) if old is not None and old.life == life else 0
            assert not common or ids[:common] == old.ids[:common], f"I1: {entry.sequence} comes back with other ids than were emitted"
        for name, sequence in driver.sequences.items():
            if name not in named and sequence.kv and self.world.coordinator.life is not None:
                told = {lost: True for record in self.world.coordinator.life.core.known.history for lost in record.lost}
                assert name in told or name not in self._reported.get(resume.epoch.counter, {}), f"I2: {name} was reported, does not move, and nobody says why"

    def _resumed(self, driver, rank, guard, pool, live, entry) -> None:
        ids = [int.from_bytes(entry.known.ids[n : n + 4], "little") for n in range(0, len(entry.known.ids), 4)]
        position, name = entry.position, entry.sequence
        assert len(ids) >= position, f"I1: {name} resumes at {position} with {len(ids)} ids"
        old = driver.sequences.get(name)
        life = int(entry.known.request.split(b",")[2])
        if old is not None and old.life == life:
            common = min(len(ids), len(old.ids))
            assert ids[:common] == old.ids[:common], f"I1: {name} comes back with other ids than were emitted"
        if not position:
            return
        assert name in live, f"I1: {rank} doesn't know {name}, which resumes at {position}"
        row = live[name]
        assert guard.table.accepted(row) == position, f"I1: {rank} has {guard.table.accepted(row)} positions of {name}, resumed is {position}"
        own = guard.table.ids(row).tolist()
        assert len(own) >= position and own == ids[: len(own)], f"I1: {rank} knows other ids of {name}"
        blocks = guard.table.blocks(row)
        pages, values = read_slots(pool, blocks), chain(ids)
        for at in range(position):
            held = token_in(pages[at // BLOCK_TOKENS], at % BLOCK_TOKENS, self.world.addressable)
            assert held == slot_bytes(values[at], rank.pp), f"I1: {rank} has wrong bytes of {name} at {at}, resumed at {position} ({entry.rung})"
        self.world.count("positions_resumed", position)

    def is_open(self, driver, name: str) -> bool:
        return any(name in guard.table.sequences() for guard in map(self._guard, driver.members.values()) if guard is not None)

    def is_left(self, name: str) -> bool:
        """Whether some replica may still have a former life of this name: it has, or a daemon that will read its replicas back is down."""
        lives = [host.life for host in self.world.nodes.values()]
        return None in lives or any(one.name == name for life in lives for replica in life.shell.store._replicas.values() for one in replica.live())

    def blocks_of(self, driver, name: str) -> tuple[list[int], list[int]]:
        """The blocks that all ranks agree on, from the first, and all that any rank has in its list: a fence may fall between two ranks' share of a step."""
        lists = []
        for endpoint in driver.members.values():
            guard = self._guard(endpoint)
            process = self.world.processes[endpoint]
            if guard is not None and process.alive and name in guard.table.sequences():
                lists.append(guard.table.blocks(guard.table.row(name)))
        common = []
        for column in zip(*lists, strict=False):
            if any(block != column[0] for block in column):
                break
            common.append(column[0])
        return common, list(dict.fromkeys(block for blocks in lists for block in blocks))

    # ---- at rest ----

    def wait_for(self, missing, bound_ns: int) -> None:
        """I7: what must come comes within a bound of virtual time."""
        world = self.world
        until = world.now + bound_ns
        while True:
            left = missing()
            if not left:
                return
            for _ in range(20):
                if not world.advance(until):
                    raise AssertionError(f"I7: {bound_ns // MS} ms after the faults had stopped: {missing()}")

    def undrained(self) -> str:
        world = self.world
        if any(host.life is None for host in world.hosts()):
            return "somebody is still down"
        coordinator, driver = world.coordinator.life.core, world.driver
        known = coordinator.known
        if world.instance in known.failed:
            world.count("failovers_ordered")
            self._failover(known)
            return "the instance has failed"
        current = known.rounds.get(world.instance)
        if known.phase(world.instance):
            return f"a recovery: {current.record.phase}, {current.waiting}"
        if driver.announced.counter > driver.adopted.counter or not driver.welcomed:
            return f"the driver waits for {driver.announced}, adopted {driver.adopted}"
        members = known.membership.members.get(world.instance, {})
        if sorted(members) != list(world.ranks) or any(member.lost for member in members.values()):
            return f"ranks {sorted(members)} of {len(world.ranks)}"
        if driver.waiting:
            return f"a step of epoch {driver.adopted.counter} waits for {[str(rank) for rank in driver.waiting]}"
        return self._unacked(members)

    def _failover(self, known) -> None:
        """What an operator would do once standbys are back."""
        from kvguard.core.events import Asked

        world = self.world
        life = world.coordinator.life
        members = known.membership.members.get(world.instance, {})
        rank = next((rank for rank, member in sorted(members.items()) if member.lost), None)
        if rank is None:
            rank = next(iter(sorted(members)), None)
        if rank is not None and world.now >= getattr(self, "_asked_ns", 0):
            self._asked_ns = world.now + 500 * MS
            life.loop.feed(Asked(1, "failover", {"instance": world.instance, "rank": str(rank)}))
            world.wake("coordinator")

    def _unacked(self, members) -> str:
        world = self.world
        for rank, member in members.items():
            life = world.nodes[member.node].life
            local = life.core.outbound.streams.get(member.stream)
            if local is None or not local.alive:
                return f"rank {rank} is not attached at {member.node}"
            if local.fenced:
                return f"rank {rank} is still fenced"
            if not local.senders and len(world.nodes) > 1 and local.cover is None:
                return f"rank {rank} has no holder"
            full = local.cover is not None and self._is_without(local)
            if local.cover is not None and local.senders and not full:
                return f"rank {rank} is copied with rank {local.as_rank}, and {list(local.senders)} are still to end"
            for node, sender in local.senders.items():
                copies = sender.flow.copies.values()  # what was refused is offered again and again: it counts only while it waits for that
                whole = all(copy.shed or copy.acked >= copy.row.committed and copy.acked_ids >= copy.row.ids for copy in copies)
                if sender.state != "stream" or not whole:
                    return f"rank {rank}: {node} has not acknowledged all ({sender.state}: {sender.reason})"
            room = not any(copy.shed for node, sender in local.senders.items() if node not in local.ending for copy in sender.flow.copies.values())
            if local.ending and room and not full:
                return f"rank {rank}: {list(local.ending)} are still to end"
        for host in world.nodes.values():
            if len(host.life.shell.buffers):
                return f"{host.name} has {len(host.life.shell.buffers)} buffers"
        return ""

    def _is_without(self, local) -> bool:
        """What a rank has of its own stays as long as its mate's holder has no room for it, or the mate knows less of it: at rest it learns nothing."""
        shed = any(copy.shed for sender in local.cover.senders.values() for copy in sender.flow.copies.values())
        known = {row.sequence: row.ids for row in local.cover.ledger.rows.values()}
        return shed or any(known.get(row.sequence, -1) < row.ids for row in local.ledger.rows.values())

    def drained(self) -> None:
        """I9: at rest replica bytes = pool bytes for everything that is committed; I6: nothing is held for nobody."""
        world = self.world
        for rank, member in world.coordinator.life.core.known.membership.members[world.instance].items():
            local = world.nodes[member.node].life.core.outbound.streams[member.stream]
            guard = self._guard(member.endpoint)
            assert guard is not None and guard.epoch == world.driver.adopted, f"I3: {rank} lives in {guard.epoch if guard else None}"
            table = guard.table
            live = table.sequences()
            for sequence in world.driver.sequences.values():
                if sequence.kv and sequence.opened and (sequence.name, sequence.kv) not in world.driver.cuts:  # the cut goes with the next step
                    assert table.accepted(live[sequence.name]) == sequence.kv, f"I1: {rank} has {table.accepted(live[sequence.name])} of {sequence.name}"
            world.count("ranks_copied_with_a_mate", local.cover is not None)
            assert local.cover is None or rank.tp, "a mate of another rank than the first copies"
            for node, sender in (local.cover or local).senders.items():
                holder = world.nodes[node].life
                replica = holder.shell.store._replicas[(local.cover or local).stream]
                held = {one.name: one for one in replica.live()}
                begun = [name for name in live if table.accepted(live[name])]  # what one of them alone had opened when a fence fell between them is at 0
                shed = [copy.row.sequence for copy in sender.flow.copies.values() if copy.shed]
                assert local.cover is None or all(name in held or name in shed for name in begun), f"I9: {node} has {sorted(held)}, {rank} is copied with another and has {begun}"
                for copy in sender.flow.copies.values():
                    if copy.shed:
                        world.count("shed_at_rest")
                        continue
                    name = copy.row.sequence
                    if local.cover is not None and name not in live:  # the other way round: its mate alone had opened it
                        assert not copy.row.committed, f"I9: {rank} is copied with a rank that has {copy.row.committed} of {name}, and has none"
                        continue
                    assert held[name].position == table.accepted(live[name]), f"I9: {node} holds {held[name].position} of {name}"
                    here, there = b"".join(int(token).to_bytes(4, "little") for token in table.ids(live[name])), bytes(held[name].ids)
                    common = min(len(here), len(there)) if local.cover is not None else max(len(here), len(there))  # a mate may know of more that come
                    assert here[:common] == there[:common] and common >= 4 * table.accepted(live[name]), f"I9: ids of {name}: {len(here)} and {len(there)}"
                assert local.cover is not None or len(held) <= len(live), f"I6: {node} holds {sorted(held)}, alive are {sorted(live)}"
        for host in world.nodes.values():
            self.whole_store(host.life)
        world.count("drained")

    def unfinished(self) -> str:
        world = self.world
        if world.driver.sequences or world.driver.over or world.driver.waiting:
            return f"sequences {sorted(world.driver.sequences)} are not at their end, waiting {world.driver.waiting}"
        left = self.undrained()
        if left:
            return left
        for host in world.nodes.values():
            for stream, sequences, used in host.life.shell.store.beat():
                if sequences or used:
                    return f"{host.name} still holds {sequences} sequences, {used} bytes of {stream}"
        for host in world.nodes.values():
            streams = [local for local in host.life.core.outbound.streams.values() if local.stream.instance == world.instance]
            dead = [str(local.stream) for local in streams if not local.alive]
            if dead:
                return f"{host.name} still maps the dead {dead}"
        return ""

    def finished(self) -> None:
        """I6: with no sequence left nothing is held but ids that wait for their retention."""
        for host in self.world.nodes.values():
            assert not len(host.life.shell.buffers), "I6: buffers at the end"
        self.world.count("finished")
