"""torch's random state in few bytes: where generation began, and how many draws have been made since.

Knows: the bytes of torch.get_rng_state() (a Mersenne twister: 624 words, a place in them, what normal() keeps) and numpy's own twister, which counts along;
those of torch.cuda.get_rng_state(), which are a seed and a count.
Must not know: torch, what the draws were for.
Invariants: a state that can't be reached from the start within DRAWS_MAX draws, or that differs in anything but the twister, is None, never an estimate;
`state_at` gives back bit by bit what torch had, or raises Refused.

Why: a state is 5,056 bytes and changes with every token, a commit has 32. Drawing is cheap (2 ns) and the twister has no shorter memory than its count.
"""

from __future__ import annotations

import struct

import numpy as np

from kvguard.errors import Refused

STATE_BYTES = 5056
WORDS = 624
DRAWS_MAX = 1 << 25  # between two looks: more than a batch of 64 draws from a vocabulary of 256 k
_HEAD = struct.Struct("<QiIQ")  # seed, draws left before the next twist (plus one), seeded, next word
_WORDS_END = _HEAD.size + 8 * WORDS
_PACKED = struct.Struct("<QH40s")
_GPU = struct.Struct("<Qq")  # seed, count


class RandomStart:
    """The state that a generation began with. `packed`: 2,546 bytes."""

    def __init__(self, packed: bytes) -> None:
        if len(packed) != _PACKED.size + 4 * WORDS:
            raise Refused(f"{len(packed)} bytes are not a packed random state. Try: the bytes that were committed, unchanged")
        self.packed = packed
        self.seed, self.place, self.tail = _PACKED.unpack_from(packed)
        self.words = np.frombuffer(packed, "<u4", offset=_PACKED.size)

    @classmethod
    def of(cls, state: bytes) -> RandomStart:
        """From torch.get_rng_state(). Raises Refused for a state of another form."""
        seed, place, words, tail = _read(state)
        return cls(_PACKED.pack(seed, place, tail) + words.astype("<u4").tobytes())

    def twister(self) -> np.random.MT19937:
        made = np.random.MT19937()
        made.state = {"bit_generator": "MT19937", "state": {"key": self.words.astype(np.uint32), "pos": self.place}}
        return made

    def state_at(self, draws: int) -> bytes:
        """torch's state after so many draws of 32 bits."""
        twister = self.twister()
        _skip(twister, draws)
        found = twister.state["state"]
        place = int(found["pos"])
        head = _HEAD.pack(self.seed, WORDS + 1 - place, 1, place)
        return head + np.asarray(found["key"]).astype("<u8").tobytes() + self.tail


class DrawCount:
    """Counts along with torch. `draws`: made since the start; `last`: by the last count; `even`: whether every count so far added the same."""

    def __init__(self, start: RandomStart, draws: int = 0, each: int = 0, even: bool = True) -> None:
        self._start, self._twister = start, start.twister()
        _skip(self._twister, draws)
        self.draws, self.last, self.even = draws, each, even
        self._counts = 1 if each else 0

    def count(self, state: bytes) -> int | None:
        """Draws since the start, now that torch's state is `state`; None where that can't be reached (and nothing is counted)."""
        seed, place, words, tail = _read(state)
        if seed != self._start.seed or tail != self._start.tail:
            return None
        added = self._distance(place, words)
        if added is None:
            return None
        self.even = self.even and (not self._counts or added == self.last)
        self._counts += 1
        self.draws, self.last = self.draws + added, added
        return self.draws

    def _distance(self, place: int, words: np.ndarray) -> int | None:
        """How far the twister has to go; it is there afterwards (where it was, when None)."""
        before = self._twister.state
        if self.last:  # as far as the last time: a token's draws are as many as there are scores
            _skip(self._twister, self.last)
            if self._is_at(place, words):
                return self.last
            self._twister.state = before
        walked = 0
        while walked <= DRAWS_MAX:
            now = self._twister.state["state"]
            here = int(now["pos"])
            if here <= place and np.array_equal(now["key"], words):
                _skip(self._twister, place - here)
                return walked + place - here
            step = WORDS - here + 1  # into the next words
            _skip(self._twister, step)
            walked += step
        self._twister.state = before
        return None

    def _is_at(self, place: int, words: np.ndarray) -> bool:
        now = self._twister.state["state"]
        return int(now["pos"]) == place and np.array_equal(now["key"], words)


class GpuStart:
    """The same of a GPU's generator, which draws by (seed, count): nothing has to be wound on. `packed`: 16 bytes."""

    def __init__(self, packed: bytes) -> None:
        if len(packed) != _GPU.size:
            raise Refused(f"{len(packed)} bytes are not a GPU's random state. Try: a torch version that this release was tested with")
        self.packed = packed
        self.seed, self.offset = _GPU.unpack(packed)

    def state_at(self, draws: int) -> bytes:
        return _GPU.pack(self.seed, self.offset + draws)


class GpuCount:
    """As DrawCount."""

    def __init__(self, start: GpuStart, draws: int = 0, each: int = 0, even: bool = True) -> None:
        self._start, self.draws, self.last, self.even = start, draws, each, even
        self._counts = 1 if each else 0

    def count(self, state: bytes) -> int | None:
        now = GpuStart(state)
        added = now.offset - self._start.offset - self.draws
        if now.seed != self._start.seed or added < 0:
            return None
        self.even = self.even and (not self._counts or added == self.last)
        self._counts += 1
        self.draws, self.last = self.draws + added, added
        return self.draws


def start_of(state: bytes) -> RandomStart | GpuStart:
    """From a generator's state, a CPU's or a GPU's. Raises Refused for one of another form."""
    return GpuStart(state) if len(state) == _GPU.size else RandomStart.of(state)


def start_again(packed: bytes) -> RandomStart | GpuStart:
    """From what `start_of` packed. Raises Refused."""
    return GpuStart(packed) if len(packed) == _GPU.size else RandomStart(packed)


def count_from(start: RandomStart | GpuStart, draws: int, each: int, even: bool) -> DrawCount | GpuCount:
    return (GpuCount if isinstance(start, GpuStart) else DrawCount)(start, draws, each, even)


def _skip(twister: np.random.MT19937, draws: int) -> None:
    if draws:
        twister.random_raw(draws, output=False)


def _read(state: bytes) -> tuple[int, int, np.ndarray, bytes]:
    """Seed, place (words drawn of the present ones, 1..624), words u32 [624], what comes after them. Raises Refused."""
    if len(state) != STATE_BYTES:
        raise Refused(f"a random state of {len(state)} bytes is not torch's on a CPU ({STATE_BYTES}). Try: a torch version that this release was tested with")
    seed, left, seeded, _ = _HEAD.unpack_from(state)
    if seeded != 1 or not 1 <= left <= WORDS:
        raise Refused(f"a random state that isn't seeded, or has {left} draws left of {WORDS}")
    words = np.frombuffer(state, "<u8", WORDS, _HEAD.size)
    return seed, WORDS + 1 - left, words.astype(np.uint32), bytes(state[_WORDS_END:])
