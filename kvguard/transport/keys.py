"""Keys: CURVE key pairs in files, the list of peers that are allowed, and the desk at which a listening transport looks every caller up.

Knows: key files, ZAP (ZeroMQ's authentication protocol, RFC 27). Must not know: links, frames.
Invariants: a secret is never written to a file that others can read, nor read from one; without a key that is listed nobody is let in; refusals are
counted with the address, in bounded memory.

A key file has three kinds of lines: `secret Z85`, `public Z85`, `allow NODE Z85`. `allow *` does not exist: every peer is named. While a key is rotated
(rotating.py) its node is listed with both, the newer one below, and its own file has `next-secret` and `next-public` beside the pair that is in use.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from kvguard.errors import BadConfig
from kvguard.limits import NAME_BYTES_MAX

ZAP_ADDRESS = "inproc://zeromq.zap.01"
ADDRESSES_MAX = 256  # counted one by one; the rest under "others"
KEYS_PER_NODE_MAX = 4
PAIRS = (("secret", "public"), ("next-secret", "next-public"))
KEY_PROPERTY = "Kvguard-Key"  # what the desk writes beside a caller's name


@dataclass(frozen=True)
class Keys:
    """One process's key pair and the public keys it knows, all Z85 text of 40 bytes. `allowed`: by node name, both to call and to be called by.

    `beside`: newer keys of names in `allowed`, as good as those. `coming`: (secret, public) that this process will have next, not used yet.
    """

    secret: bytes = field(repr=False)
    public: bytes
    allowed: Mapping[str, bytes] = field(default_factory=dict)
    beside: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    coming: tuple[bytes, bytes] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        twice = f"; several keys of {', '.join(sorted(self.beside))}" if self.beside else ""
        return f"{self.own_name() or 'not listed itself'}, {len(self.allowed)} names are listed{twice}"

    def of(self, node: str) -> tuple[bytes, ...]:
        """All keys of a node, oldest first."""
        return (self.allowed[node], *self.beside.get(node, ())) if node in self.allowed else ()

    def server_keys(self, link: str) -> tuple[bytes, ...]:
        """The public keys of which one must answer on a dialled link: "peer:NODE" means NODE, other names mean themselves."""
        return self.of(link.removeprefix("peer:").partition("/")[0])

    def names(self) -> dict[bytes, str]:
        """Whose each listed key is."""
        return {key: node for node in self.allowed for key in self.of(node)}

    def own_name(self) -> str:
        """The name under which this pair itself is listed; "" when it isn't."""
        return self.names().get(self.public, "")


def generate() -> Keys:
    """A fresh pair that knows nobody."""
    public, secret = zmq.curve_keypair()
    return Keys(secret, public)


def save(keys: Keys, path: str | Path) -> None:
    """Write a key file, mode 0600, whole or not at all. Raises BadConfig when it exists: a key is never overwritten by mistake."""
    path = Path(path)
    lines = [f"secret {keys.secret.decode()}", f"public {keys.public.decode()}"]
    lines += [f"allow {node} {key.decode()}" for node, key in sorted(keys.allowed.items())]
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise BadConfig(f"{path}: exists already. Try: another name, or move the old key away first") from error
    except OSError as error:
        raise BadConfig(f"{path}: can't be written: {error.strerror}. Try: a directory that this user may write to") from error
    with os.fdopen(fd, "w") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())


def load(path: str | Path) -> Keys:
    """Read a key file. Raises BadConfig that lists every fault."""
    path = Path(path)
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path}: can't be read: {error}. Try: kvguard keys generate") from error
    faults, single, allowed = [], {}, {}
    words_of_pairs = [word for pair in PAIRS for word in pair]
    if stat.S_IMODE(mode) & 0o077:
        faults.append(f"readable by others (mode {stat.S_IMODE(mode):04o}). Try: chmod 600 {path}")
    for number, line in enumerate(text.splitlines(), 1):
        words = [] if line.lstrip().startswith("#") else line.split()  # whole lines only: "#" is a character of Z85
        if not words:
            continue
        if words[0] in words_of_pairs and len(words) == 2 and _is_key(words[1]):
            single[words[0]] = words[1].encode()
        elif words[0] == "allow" and len(words) == 3 and _is_key(words[2]) and len(words[1].encode()) <= NAME_BYTES_MAX:
            if any(words[2].encode() in keys for keys in allowed.values()) or len(allowed.get(words[1], ())) >= KEYS_PER_NODE_MAX:
                faults.append(f"line {number}: this key of {words[1]} is listed twice, or the node has more than {KEYS_PER_NODE_MAX}")
            allowed.setdefault(words[1], []).append(words[2].encode())
        else:
            faults.append(f"line {number}: neither `secret KEY`, `public KEY` nor `allow NODE KEY` with a key of 40 Z85 characters")
    begun = any(word in single for word in PAIRS[1])
    for pair in PAIRS if begun else PAIRS[:1]:
        faults += [f"no line `{word} KEY`" for word in pair if word not in single]
        if not faults and zmq.curve_public(single[pair[0]]) != single[pair[1]]:
            faults.append(f"the {pair[1]} key doesn't belong to the {pair[0]} one")
    if faults:
        raise BadConfig(f"{path}: " + "; ".join(faults) + ". Try: kvguard keys generate")
    first = {node: keys[0] for node, keys in allowed.items()}
    beside = {node: tuple(keys[1:]) for node, keys in allowed.items() if len(keys) > 1}
    return Keys(single["secret"], single["public"], first, beside, (single["next-secret"], single["next-public"]) if begun else None)


def _is_key(word: str) -> bool:
    try:
        return len(word) == 40 and len(z85.decode(word.encode())) == 32
    except (ValueError, KeyError, UnicodeEncodeError):
        return False


class Desk:
    """Answers the ZAP questions of one context: is this public key listed, and whose is it. Bound before anything listens, because without it all are let
    in."""

    def __init__(self, context: zmq.Context, keys: Keys):
        self.refusals: dict[str, int] = {}
        self.rekey(keys)
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.bind(ZAP_ADDRESS)

    def rekey(self, keys: Keys) -> None:
        """Who is let in from now on."""
        self._listed = {z85.decode(key): (node.encode(), _property(KEY_PROPERTY, key)) for key, node in keys.names().items()}

    def answer(self) -> list[str]:
        """Answer all that is asked; returns a reason for each caller that was refused."""
        refused = []
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return refused
            cut = parts.index(b"") + 1
            envelope, request = parts[:cut], parts[cut:]
            if len(request) < 6:
                continue  # not libzmq: nobody else can reach an inproc address of this context
            version, number, _, address, _, mechanism = request[:6]
            listed = self._listed.get(request[6]) if version == b"1.0" and mechanism == b"CURVE" and len(request) == 7 else None
            verdict = (b"200", b"OK", *listed) if listed is not None else (b"400", b"key not listed", b"", b"")
            if listed is None:
                caller = address.decode(errors="replace")
                self.count(caller)
                refused.append(f"{caller}: {mechanism.decode(errors='replace')} key not listed")
            self.socket.send_multipart([*envelope, b"1.0", number, *verdict])

    def count(self, address: str) -> None:
        if address not in self.refusals and len(self.refusals) >= ADDRESSES_MAX:
            address = "others"
        self.refusals[address] = self.refusals.get(address, 0) + 1


def _property(name: str, value: bytes) -> bytes:
    """One of a connection's properties, as ZMTP writes them."""
    return bytes([len(name)]) + name.encode() + len(value).to_bytes(4, "big") + value
