"""How long the coordinator bears an emitter's silence: as long as that emitter promised in its hello, within the coordinator's bounds."""

from __future__ import annotations

import msgspec
import pytest

from kvguard.core.known import Settings
from kvguard.core.membership import Patience
from tests.core.cast import MS, Cast, Emitter, three_stages


def silent_for(promised_ms: int, ms: int, patience: Patience = Patience()) -> Cast:  # noqa: B008 - a frozen value
    """Three stages at work whose emitter, with this promise, has been silent for so long."""
    cast = three_stages(settings=Settings(patience=patience))
    emitter = Emitter(2)
    plain = emitter.hello
    emitter.hello = lambda: msgspec.structs.replace(plain(), silence_ms=promised_ms)
    cast.kill(cast.emitter)
    cast.connect(emitter)
    cast.run(500)
    assert cast.epoch() == 1 and cast.emitter.resumes, "a new emitter"
    cast.kill(emitter, torn=False)
    cast.run(ms)
    return cast


@pytest.mark.parametrize(("promised_ms", "borne_ms"), [(0, 1000), (3000, 3000), (300, 1000), (90_000, 4000)])
def test_its_promise_counts_within_bounds(promised_ms, borne_ms):
    patience = Patience(emitter_most_ns=4000 * MS)
    assert silent_for(promised_ms, borne_ms - 300, patience).epoch() == 1
    late = silent_for(promised_ms, borne_ms + 300, patience)
    assert late.epoch() == 2 and "the emitter has been silent" in late.coordinator.history()[-1]["reason"]


def test_the_promise_is_of_a_session():
    """Another life of the emitter promises for itself."""
    cast = silent_for(3000, 1000)
    cast.connect(Emitter(3))
    cast.run(500)
    assert cast.epoch() == 2
    cast.kill(cast.emitter, torn=False)
    cast.run(1300)
    assert cast.epoch() == 3
