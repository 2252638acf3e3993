"""torch's random state, counted instead of copied: what comes back draws what the original would have drawn."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kvguard.engine.random_state import DrawCount, RandomStart  # noqa: E402
from kvguard.errors import Refused  # noqa: E402
from kvguard.limits import REQUEST_BYTES_MAX  # noqa: E402


def state() -> bytes:
    return torch.get_rng_state().numpy().tobytes()


def restore(data: bytes) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def sample(rows: int, vocabulary: int) -> torch.Tensor:
    return torch.multinomial(torch.ones(rows, vocabulary) / vocabulary, 1)


@pytest.mark.parametrize(("rows", "vocabulary", "before"), [(1, 50, 0), (1, 128, 7), (3, 311, 0), (4, 50257, 1), (2, 312, 624)])
def test_what_comes_back_draws_what_the_original_drew(rows, vocabulary, before):
    torch.manual_seed(vocabulary)
    torch.rand(before)
    start = RandomStart.of(state())
    assert len(start.packed) < REQUEST_BYTES_MAX
    count = DrawCount(start)
    marks = []
    for _ in range(12):
        sample(rows, vocabulary)
        marks.append((count.count(state()), state(), [torch.rand(3).tolist(), torch.randint(1000, (2,)).tolist()]))
        restore(marks[-1][1])
    for draws, whole, following in marks:
        again = RandomStart(start.packed).state_at(draws)
        restore(again)
        assert [torch.rand(3).tolist(), torch.randint(1000, (2,)).tolist()] == following
        restore(again)
        assert DrawCount(start, draws).count(state()) == draws == DrawCount(start, draws).count(whole)
    assert count.even


def test_uneven_draws_are_counted_and_said():
    torch.manual_seed(3)
    start = RandomStart.of(state())
    count = DrawCount(start)
    for size in (10, 10, 1000, 3):
        torch.rand(size)
        assert count.count(state()) is not None
    assert (count.draws, count.even) == (1023, False)
    restore(start.state_at(1023))
    found = torch.rand(5)
    torch.manual_seed(3)
    torch.rand(1023)
    assert torch.equal(found, torch.rand(5))


def test_what_can_not_be_reached_is_none():
    torch.manual_seed(4)
    start = RandomStart.of(state())
    count = DrawCount(start)
    torch.rand(5)
    assert count.count(state()) == 5
    torch.randn(1)  # keeps the second of a pair outside the twister
    assert count.count(state()) is None
    torch.manual_seed(5)
    assert count.count(state()) is None
    assert count.draws == 5
    with pytest.raises(Refused, match="not torch's"):
        RandomStart.of(b"short")
    with pytest.raises(Refused, match="packed"):
        RandomStart(b"short")
