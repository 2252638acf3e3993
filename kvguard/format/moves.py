"""The token that names one sequence of a dead instance to another instance's engine: its JSON form, and the proof that it is genuine.

Knows: the token's fields and bounds, a keyed hash. Must not know: who keeps secrets, what is fetched with a token.
Invariants: decode(json(encode(token))) is the token; whatever isn't exactly one well-formed token raises BadFrame with a text that says what is wrong; a proof
holds for one (instance, sequence, epoch, position) under one secret, and is compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec
import xxhash

from kvguard.errors import BadFrame
from kvguard.limits import EPOCH_MAX, IDS_PER_ROW_MAX, NAME_BYTES_MAX
from kvguard.types import SCHEDULER_PP, Epoch, MovedToken, NodeId, Position, Rank, ResumeToken, SequenceId

PROOF_BYTES = 32
SECRET_BYTES = 32
PLACES_MAX = 4096
KEYS = ("instance", "sequence", "epoch", "position", "proof", "places")


def encode(token: ResumeToken | MovedToken) -> dict:
    """JSON-safe: what goes into `kv_transfer_params = {"kvguard": encode(token)}`."""
    return {
        "instance": token.instance,
        "sequence": token.sequence,
        "epoch": [token.epoch.counter, token.epoch.issuer],
        "position": token.position,
        "proof": token.proof.hex(),
        "places": [[str(rank), node] for rank, node in token.places],
    }


def decode(data: object) -> MovedToken:
    """What encode() made, from anywhere: nothing of it is believed. Raises BadFrame."""
    if not isinstance(data, dict):
        raise BadFrame(f"a moved token is an object with {', '.join(KEYS)}, not {type(data).__name__}. Try: kvguard.emitter.moves.encode")
    wrong = [key for key in KEYS if key not in data] or [str(key)[:NAME_BYTES_MAX] for key in data if key not in KEYS]
    if wrong:
        what = "lacks" if wrong[0] in KEYS else "has unknown"
        raise BadFrame(f"a moved token {what} {', '.join(wrong[:6])}. Try: pass on exactly what kvguard.emitter.moves.encode made")
    epoch = data["epoch"]
    if not (isinstance(epoch, list | tuple) and len(epoch) == 2 and _is_count(epoch[0], EPOCH_MAX) and _is_name(epoch[1], empty=True)):
        raise _malformed("epoch", "[counter, issuer]")
    for key in ("instance", "sequence"):
        if not _is_name(data[key]):
            raise _malformed(key, f"a name of 1 to {NAME_BYTES_MAX} bytes")
    if not _is_count(data["position"], IDS_PER_ROW_MAX):
        raise _malformed("position", f"a number from 0 to {IDS_PER_ROW_MAX}")
    return MovedToken(data["instance"], data["sequence"], Epoch(*epoch), data["position"], _proof(data["proof"]), _places(data["places"]))


def _malformed(key: str, wanted: str) -> BadFrame:
    return BadFrame(f"a moved token whose {key} is not {wanted}. Try: pass on exactly what kvguard.emitter.moves.encode made")


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_name(value: object, empty: bool = False) -> bool:
    if not isinstance(value, str) or not (empty or value):
        return False
    try:
        return len(value.encode()) <= NAME_BYTES_MAX
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can say and no message can carry
        return False


def _proof(value: object) -> bytes:
    if not isinstance(value, str) or len(value) != 2 * PROOF_BYTES:
        raise _malformed("proof", f"{PROOF_BYTES} bytes in hex")
    try:
        return bytes.fromhex(value)
    except ValueError:
        raise _malformed("proof", f"{PROOF_BYTES} bytes in hex") from None


def _places(value: object) -> tuple[tuple[Rank, NodeId], ...]:
    if not isinstance(value, list | tuple) or len(value) > PLACES_MAX:
        raise _malformed("places", "a list of [rank, node]")
    found = []
    for place in value:
        if not isinstance(place, list | tuple) or len(place) != 2 or not isinstance(place[0], str) or len(place[0]) > NAME_BYTES_MAX or not _is_name(place[1]):
            raise _malformed("places", "a list of [rank, node]")
        try:
            rank = Rank.parse(place[0])
        except ValueError:
            raise _malformed("places", "a list of [rank, node]") from None
        if max(rank) > SCHEDULER_PP:
            raise _malformed("places", f"a list of [rank, node] with ranks up to {SCHEDULER_PP}")
        found.append((rank, place[1]))
    return tuple(found)


def ids_sum(ids: bytes) -> int:
    """Of token ids, u32 little-endian each: whether two know the same ones."""
    return xxhash.xxh3_64_intdigest(ids)


# ---- proofs ---------------------------------------------------------------------------------------------------------------------


def secret_of(master: bytes, instance: str, epoch: Epoch) -> bytes:
    """The secret of one recovery, from its coordinator's own."""
    return _keyed(master, ("recovery", instance, epoch.counter, epoch.issuer))


def prove(secret: bytes, instance: str, sequence: SequenceId, epoch: Epoch, position: Position) -> bytes:
    """What only a holder of the recovery's secret can make."""
    return _keyed(secret, ("moved", instance, sequence, epoch.counter, epoch.issuer, position))


def proves(secret: bytes, token: MovedToken) -> bool:
    """Whether the token's proof is genuine. Never true without a secret."""
    wanted = prove(secret, token.instance, token.sequence, token.epoch, token.position)
    return len(secret) == SECRET_BYTES and hmac.compare_digest(wanted, token.proof)


def _keyed(secret: bytes, said: tuple) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(said), digest_size=PROOF_BYTES, key=secret[:64], person=b"kvguard-moves").digest()
