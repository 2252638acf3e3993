"""Evidence as a bench gives it, of a drill in which everything went well: tests spoil one fact of it at a time."""

from __future__ import annotations

from kvguard.drill.scenarios import OUTAGE, SCENARIOS

PROMISES = {"node-0": 2, "node-1": 2, "node-2": 2}


def evidence(name: str) -> dict:
    """A run in epoch 1 that went to epoch 2 where the drill wants a recovery."""
    scenario = SCENARIOS[name]
    fails_over = scenario.outcome != OUTAGE
    rung = scenario.rungs[0] if scenario.rungs else ""
    position = 0 if rung == "tokens" else 40
    before, after = 1, 2 if fails_over else 1
    return {
        "seed": 1, "target": "bench",
        "fault": {"kind": name, "target": "0.1.0", "at_token": 9, "at_position": 33, "fired": True, "evidence": proof(name)},
        "recovery": recovery(rung, position) if fails_over else None,
        "outage": None if fails_over else {"kind": name, "down_ms": 400.0, "tokens_meanwhile": 30, "acked_before": 5, "acked_after": 9, "epoch_before": 1,
                                           "epoch_after": 1},
        "identical": True, "logits_identical": True, "kv_identical": True if fails_over and position else None,
        "observed": {
            "epoch_before": before, "epoch_after": after, "history": [entry(rung, position)] if fails_over else [], "history_before": 4,
            "history_after": 5 if fails_over else 4, "promises": dict.fromkeys(PROMISES, after), "silent": {}, "conflicts": [], "disagreed": [], "waves": 2,
            "died": [], "buffers": dict.fromkeys(PROMISES, 0), "descriptors": {node: [40, 41] for node in PROMISES},
            "arena": {node: [100, 1000] for node in PROMISES},
            "counters": {"checksum_failures": 1, "frames_corrupted": 1, "refused": 3, "positions_damaged": 7, "stale_epoch": 0, "processes_killed": 1},
            "watch": {"samples": 12, "unanswered": 0, "states": {"protected": [""], "unprotected": ["catching up"]}, "node_states": {"alive": ["heartbeats"]},
                      "lag_tokens_max": 3, "unprotected_sequences_max": 2, "arena_share_max": 0.4, "epochs_rise": True},
            "resumed": [["drill-1.0", 0, position, 24, 20]] if fails_over else [], "replicas_equal_pools": True, "whole_ms": 900.0,
        },
    }  # fmt: skip


def proof(name: str) -> dict:
    return {
        "pause-node": {"stopped": ["stage-1", "node-1"], "woken": {"stage-1": -9}},
        "corrupt-replica": {"waitpid": -9, "position": 20, "resumed_at": 16, "verified": [False], "changed": True},
        "fill-arena": {"refused": 3, "arena_bytes": 900, "arena_bytes_promised": 50, "arena_bytes_max": 1000},
    }.get(name, {"waitpid": -9})  # fmt: skip


def recovery(rung: str, position: int) -> dict:
    one = {"sequence": "0", "rung": rung, "resume_position": position, "rolled_back": 0, "recomputed": 0}
    return {
        "epoch": 2, "rung": rung, "resume_position": position, "rolled_back": 0, "recomputed": 0, "lost_sequences": 0, "bytes": 0, "bytes_by_rung": {},
        "ms": {"detect": 2.0, "fence": 10.0, "plan": 1.0, "restore": 30.0, "first_token": 20.0, "total": 63.0}, "sequences": [one],
    }  # fmt: skip


def entry(rung: str, position: int) -> dict:
    return {
        "instance": "demo", "epoch": 2, "reason": "its process ended", "error": "", "lost": {}, "positions": {"drill-1.0-0": position} if position else {},
        "rungs": {"drill-1.0-0": rung}, "timing_ms": {"detect": 2.0, "fence": 10.0, "plan": 1.0, "restore": 30.0, "total": 43.0}, "bytes_by_rung": {},
    }  # fmt: skip
