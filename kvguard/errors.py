"""Operating errors: what can go wrong in a correct program. Bugs are asserts, not errors.

Every message says what, why, and `Try: ...`. `exit_code` is what the command line ends with.
"""


class KvguardError(Exception):
    """Base of all operating errors."""

    exit_code = 1


class BadConfig(KvguardError):
    """A configuration, model directory or layout that can't be used; the message lists every fault found."""

    exit_code = 78


class Unreachable(KvguardError):
    """Nobody answers where somebody should."""

    exit_code = 3


class Refused(KvguardError):
    """Refused for safety: a duplicate live rank, a layout that doesn't fit, redundancy that is not whole."""

    exit_code = 4


class TimedOut(KvguardError):
    """A bounded wait ended without the thing waited for."""

    exit_code = 5


class Fenced(KvguardError):
    """The caller's epoch is over: it must restore (a rank) or resume (an emitter) before it goes on."""

    exit_code = 6


class NotAuthorised(KvguardError):
    """The peer has no key, or one that isn't listed."""

    exit_code = 7


class StoreFull(KvguardError):
    """The replica arena's byte budget can't take the whole sequence."""


class BadFrame(KvguardError):
    """Bytes that are not a frame of this protocol: wrong magic, version, bounds or checksum."""


class Stale(KvguardError):
    """A block or sequence generation moved on while it was being read."""


class DeviceLost(KvguardError):
    """The GPU had a fault, or is gone: nothing of its memory may be believed, and this process can use it no more."""
