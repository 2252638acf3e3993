"""Where the descriptors of arenas and their indexes stay, by name, when the process that fills them dies.

Knows: names, memfds, files of a tmpfs. Must not know: what is in them, who keeps them (a service manager's descriptor store is daemon/keeping.py's).
Invariants: what a shelf hands out belongs to the caller; a name that was removed is not handed out again; only this user can open what is kept.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Protocol

TMPFS_MAGIC = 0x01021994
_libc = ctypes.CDLL(None, use_errno=True)


class Shelf(Protocol):
    """`keeps`: whether anything outlives this process; where nothing does no index is written."""

    keeps: bool

    def create(self, name: str) -> int:
        """A new, empty descriptor that is kept under `name`; one that was kept there before is forgotten. Raises OSError."""

    def kept(self) -> dict[str, int]:
        """What a former life left: descriptors by name, the caller's from now on. Once."""

    def remove(self, name: str) -> None:
        """Nothing is kept under `name` any more."""


class Memfds:
    """Memory that goes with the process."""

    keeps = False

    def create(self, name: str) -> int:
        return new_memfd(name)

    def kept(self) -> dict[str, int]:
        return {}

    def remove(self, name: str) -> None:
        """It was never kept."""


class Files:
    """Files of `directory`, on a tmpfs: they outlive the process, not the machine."""

    keeps = True

    def __init__(self, directory: str | Path, suffixes: tuple[str, ...]) -> None:
        self._directory, self._suffixes = Path(directory), suffixes

    def create(self, name: str) -> int:
        return os.open(self._directory / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def kept(self) -> dict[str, int]:
        found = {}
        for path in sorted(self._directory.iterdir()):
            if path.suffix in self._suffixes and path.is_file() and not path.is_symlink():
                found[path.name] = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        return found

    def remove(self, name: str) -> None:
        (self._directory / name).unlink(missing_ok=True)


def new_memfd(name: str) -> int:
    return os.memfd_create(f"kvguard-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def on_tmpfs(directory: str | Path) -> bool:
    """Whether files of `directory` are memory: on a disk an arena would wear it out and wait for it."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs; f_type is its first word
    if _libc.statfs(os.fsencode(directory), buffer):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(directory))
    return ctypes.c_long.from_buffer(buffer).value == TMPFS_MAGIC
