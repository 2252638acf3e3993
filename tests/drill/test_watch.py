"""What a watch of a status remembers."""

from __future__ import annotations

from kvguard.pipeline.observing import STATES_MAX, Watch


def status(state: str, reason: str, lag_tokens: int = 0) -> dict:
    rank = {"rank": "0.0.0", "state": state, "reason": reason, "lag_tokens": lag_tokens, "unprotected_sequences": 1}
    nodes = [{"state": "alive", "reason": reason, "arena_bytes": 1, "arena_bytes_max": 4}]
    return {"ranks": [rank], "nodes": nodes, "instances": [{"instance": "demo", "epoch": 1}]}


def test_reasons_that_differ_in_a_number_alone_do_not_crowd_out_another() -> None:
    watch = Watch(None)
    for ms in range(10 * STATES_MAX):
        watch._take(status("unprotected", f"node node-2: silent for {ms} ms", ms % 7))
    watch._take(status("unprotected", "store full at node-2: no room for 75 positions"))
    assert watch.saw("unprotected", "store full") and not watch.saw("unprotected", "catching up") and not watch.saw("lost")
    assert watch.document()["states"] == {"unprotected": ["node node-#: silent for # ms", "store full at node-#: no room for # positions"]}
    assert watch.document()["lag_tokens_max"] == 6 and watch.document()["arena_share_max"] == 0.25 and watch.document()["epochs_rise"]
