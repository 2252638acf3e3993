"""What a node has promised: per instance the highest epoch that it has written down. Whatever is older changes nothing here (I3).

Knows: epochs, and how one is written. Must not know: who asks, disks.
Invariant: a promise only rises; an equal counter of another issuer is refused, because two that raise the same number can't both be right.
"""

from __future__ import annotations

from kvguard.core.effects import Persist
from kvguard.types import NO_EPOCH, Epoch

OLDER, OTHER, SAME, NEWER = "older", "other", "same", "newer"


def encode_epoch(epoch: Epoch) -> bytes:
    return f"{epoch.counter} {epoch.issuer}".encode()


def decode_epoch(value: bytes) -> Epoch:
    """Raises ValueError for anything that `encode_epoch` didn't write."""
    counter, _, issuer = value.decode().partition(" ")
    return Epoch(int(counter), issuer)


class Promises:
    def __init__(self, known: dict[str, Epoch]) -> None:
        self.known = dict(known)

    def of(self, instance: str) -> Epoch:
        return self.known.get(instance, NO_EPOCH)

    def judge(self, instance: str, epoch: Epoch) -> str:
        promised = self.of(instance)
        if epoch.counter != promised.counter:
            return OLDER if epoch.counter < promised.counter else NEWER
        return SAME if epoch.issuer == promised.issuer else OTHER

    def rise(self, instance: str, epoch: Epoch) -> Persist:
        """The deed that must be done before anything that follows from it."""
        assert self.judge(instance, epoch) == NEWER, (epoch, self.of(instance))
        self.known[instance] = epoch
        return Persist(f"promise/{instance}", encode_epoch(epoch))
