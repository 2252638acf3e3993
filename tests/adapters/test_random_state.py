"""torch's random state, counted instead of copied: what comes back draws what the original would have drawn."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from kvguard.engine.random_state import DrawCount, RandomStart, count_from, start_again, start_of  # noqa: E402
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


def gpu_state(seed: int, offset: int) -> bytes:
    """As torch.cuda.get_rng_state() has it."""
    return seed.to_bytes(8, "little") + offset.to_bytes(8, "little", signed=True)


def test_a_gpu_s_state_is_a_seed_and_a_count():
    start = start_of(gpu_state(7, 40))
    assert len(start.packed) == 16 and start_again(start.packed).state_at(12) == gpu_state(7, 52)
    count = count_from(start, 0, 0, True)
    assert [count.count(gpu_state(7, offset)) for offset in (44, 48, 52)] == [4, 8, 12] and (count.last, count.even) == (4, True)
    assert count.count(gpu_state(7, 60)) == 20 and not count.even
    again = count_from(start_again(start.packed), 12, 4, True)
    assert again.count(gpu_state(7, 56)) == 16 and again.even


def test_a_gpu_s_state_that_went_back_or_elsewhere_is_not_counted():
    count = count_from(start_of(gpu_state(7, 40)), 8, 4, True)
    assert count.count(gpu_state(7, 44)) is None and count.count(gpu_state(8, 52)) is None
    assert count.count(gpu_state(7, 52)) == 12
