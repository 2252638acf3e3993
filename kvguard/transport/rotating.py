"""A key in the place of another without anybody being locked out: what that does to key files, step by step.

Knows: lines of key files (keys.py). Must not know: who reloads when, sockets.
Invariants: a file is replaced whole or not at all, with its owner, its group and mode 0600; lines that a step doesn't concern stay as they are, comments
too; a step that makes no sense now changes nothing and says why.

1. `begun`, where the key is: a new pair beside the old one, which stays in use. 2. `allowing`, at everybody else: the new public key beside the old one; then
they reload. 3. `switched`, where the key is: the new pair in the place of the old one, then reload. 4. `finished`, everywhere: of each name the newest key
alone, then reload: whoever has an older one is out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from kvguard.errors import BadConfig
from kvguard.transport.keys import KEYS_PER_NODE_MAX, PAIRS, Keys, generate, load

Lines = list[str]


def rewrite(path: str | Path, step: Callable[[Lines, Keys], Lines]) -> Keys:
    """What the file says after `step`. Raises BadConfig, and leaves it as it was, where it is no key file, can't be written, or wouldn't be one any more."""
    path = Path(path)
    before = load(path)
    text = "\n".join(step(path.read_text().splitlines(), before)) + "\n"
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        owner = path.stat()
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)  # the daemon's user reads it
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        after = load(partial)
        os.replace(partial, path)
    except OSError as error:
        raise BadConfig(f"{path}: can't be replaced: {error.strerror}. Try: as root, or as the user whose file it is") from error
    finally:
        partial.unlink(missing_ok=True)
    return after


def begun(lines: Lines, keys: Keys) -> Lines:
    """A fresh pair beside the one in use; listed too where this process is."""
    if keys.coming is not None:
        raise BadConfig(f"a rotation is under way already, to {keys.coming[1].decode()}. Try: kvguard keys rotate FILE --switch, once everybody lists that key")
    fresh, own = generate(), keys.own_name()
    told = [f"{word} {key.decode()}" for word, key in zip(PAIRS[1], (fresh.secret, fresh.public), strict=True)]
    return [*lines, *told, *(_allowed(keys, {own: fresh.public}) if own else [])]


def allowing(named: Mapping[str, bytes]) -> Callable[[Lines, Keys], Lines]:
    """Further keys of peers, or peers that are new; those that are listed already are passed over."""

    def step(lines: Lines, keys: Keys) -> Lines:
        return [*lines, *_allowed(keys, named)]

    return step


def _allowed(keys: Keys, named: Mapping[str, bytes]) -> Lines:
    known, told = keys.names(), []
    for node, key in named.items():
        if known.get(key, node) != node:
            raise BadConfig(f"{key.decode()} is listed as the key of {known[key]}. Try: kvguard keys list FILE on {node}")
        if key not in known:
            if len(keys.of(node)) >= KEYS_PER_NODE_MAX:
                raise BadConfig(f"{node} has {KEYS_PER_NODE_MAX} keys already. Try: kvguard keys rotate FILE --finish")
            told.append(f"allow {node} {key.decode()}")
    return told


def switched(lines: Lines, keys: Keys) -> Lines:
    """The new pair in the place of the old one, whose secret half is gone then."""
    if keys.coming is None:
        raise BadConfig("there is no new pair to switch to. Try: kvguard keys rotate FILE first")
    (secret, public), told = keys.coming, []
    for line in lines:
        word = line.split()[0] if line.split() else ""
        if word == "secret":
            told.append(f"secret {secret.decode()}")
        elif word == "public":
            told.append(f"public {public.decode()}")
        elif word not in PAIRS[1]:
            told.append(line)
    return told


def superseded(keys: Keys) -> dict[str, tuple[bytes, ...]]:
    """By name, the keys that `finished` takes away: all but the newest."""
    return {node: keys.of(node)[:-1] for node in keys.beside}


def finished(lines: Lines, keys: Keys) -> Lines:
    """Of each name the newest key alone."""
    if keys.coming is not None:
        raise BadConfig("the new pair of this file is not in use yet. Try: kvguard keys rotate FILE --switch first")
    if not keys.beside:
        raise BadConfig("nobody is listed with more than one key: there is nothing to finish. Try: kvguard keys list FILE")
    gone = {key.decode() for olds in superseded(keys).values() for key in olds}
    return [line for line in lines if not (line.split()[:1] == ["allow"] and line.split()[2] in gone)]
