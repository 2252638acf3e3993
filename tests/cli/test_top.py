"""The live screen, of documents as daemons give them."""

from __future__ import annotations

import io

from rich.console import Console

from kvguard.cli import top

NAME = "a[/]b"  # an instance, a node, an issuer may be called so; rich takes it for the end of a style that never began


def drawn(seen: top.Seen) -> str:
    said = io.StringIO()
    Console(file=said, width=250).print(top.screen(seen))
    return said.getvalue()


def test_names_are_shown_as_they_are():
    rank = {
        "instance": NAME, "rank": "0.0.0", "node": NAME, "holders": [NAME], "state": "protected", "sequences": 1, "unprotected_sequences": 0,
        "committed": 1, "lag_tokens": 0, "lag_ms": 1.0, "reason": NAME,
    }  # fmt: skip
    node = {"node": NAME, "state": "alive", "heartbeat_age_ms": 1.0, "standbys": 0, "arena_bytes": 1, "arena_bytes_max": 2, "reason": NAME}
    instance = {"instance": NAME, "epoch": 1, "issuer": NAME, "state": "active", "emitter": NAME, "reason": NAME}
    history = [{"instance": NAME, "epoch": 1, "ranks": ["0.0.0"], "rungs": {}, "error": "", "reason": NAME, "timing_ms": {}, "lost": []}]
    status = {"coordinator": {"issuer": NAME}, "paused": False, "nodes": [node], "ranks": [rank], "instances": [instance]}
    assert drawn(top.Seen(status, history, {NAME: NAME})).count(NAME) == 13
