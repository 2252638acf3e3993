"""Where a node's replicas stay while its daemon is away: with the service manager, in files of a tmpfs, or nowhere.

Knows: the three places, and what marks a replica as this node's. Must not know: what is in an arena.
Invariants: a replica is taken up only under the journal that it was made under and in the same boot: a daemon that forgot what it promised must not hold what
it promised about; what was kept and isn't wanted any more is forgotten at once.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvguard.daemon.journal import Journal
from kvguard.daemon.notify import Notifier
from kvguard.errors import BadConfig
from kvguard.store.adoption import ARENA, INDEX
from kvguard.store.shelf import Files, Memfds, Shelf, new_memfd, on_tmpfs

BOOT_ID = "/proc/sys/kernel/random/boot_id"
OWNER = "replicas/owner"
SUFFIXES = (ARENA, INDEX)


class ServiceShelf:
    """Memfds whose duplicates the service manager holds (FDSTORE)."""

    keeps = True

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._held: set[str] = set()
        self.refused = 0  # what the manager didn't take goes with this process

    def create(self, name: str) -> int:
        if name in self._held:
            self.remove(name)
        descriptor = new_memfd(name)
        if self._notifier.keep(name, descriptor):
            self._held.add(name)
        else:
            self.refused += 1
        return descriptor

    def kept(self) -> dict[str, int]:
        found = self._notifier.inherited()
        for name in [name for name in found if not name.endswith(SUFFIXES)]:
            os.close(found.pop(name))
            self._notifier.forget(name)
        self._held.update(found)
        return found

    def remove(self, name: str) -> None:
        if name in self._held:
            self._held.discard(name)
            self._notifier.forget(name)


def shelf_of(where: str, directory: Path, notifier: Notifier) -> tuple[Shelf, str]:
    """The shelf and a word for people. `where`: auto | service | files | no. Raises BadConfig where it was asked for and can't be had."""
    if where == "service" and not notifier.present:
        raise BadConfig("keep_replicas: no service manager listens (NOTIFY_SOCKET is not set). Try: keep_replicas = \"auto\"")
    if where == "service" or (where == "auto" and notifier.present):
        return ServiceShelf(notifier), "with the service manager"
    tmpfs = on_tmpfs(directory)
    if where == "files" and not tmpfs:
        raise BadConfig(f"keep_replicas: {directory} is on a disk; replicas belong in memory. Try: a runtime_dir on a tmpfs, such as /run or /dev/shm")
    if where != "no" and tmpfs:
        return Files(directory, SUFFIXES), f"in {directory}"
    return Memfds(), "nowhere: they go with this process"


def owner_of(journal: Journal, boot_id: str = BOOT_ID) -> bytes:
    """The mark of this journal in this boot."""
    token = journal.load().get(OWNER)
    if token is None:
        token = os.urandom(16)
        journal.persist(OWNER, token)
    return Path(boot_id).read_bytes().strip() + b" " + token
