"""Fixed seeds, fresh ones, and proof that every fault fired where it mattered."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from simulation.world import World

HERE = Path(__file__).resolve().parent
FIXED = 500
FRESH = int(os.environ.get("KVGUARD_SIMULATION_FRESH", "24"))
COMMAND = "bash tools/simulate_seeds.sh"
# What must have happened over the fixed seeds, at least so often: faults that struck, and their traces in the system.
FIRED = {
    "fault_kill_rank": 20, "fault_kill_node": 20, "fault_kill_daemon": 10, "fault_kill_coordinator": 10, "fault_kill_coordinator_midway": 10,
    "fault_kill_node_midway": 10, "fault_kill_driver": 10, "fault_partition": 10, "fault_partition_one_way": 20, "fault_cut_off_and_fence": 10, "fault_reset": 5,
    "fault_pause_daemon": 10, "fault_pause_rank": 10, "fault_pause_coordinator": 10, "fault_pause_node": 10, "fault_hang_rank": 10, "fault_lose_disk": 10,
    "fault_noise": 20, "fault_rude": 10, "journal_failures": 5, "crashed_between_effects": 20, "killed_by_the_daemon": 5, "torn_tables": 1000, "torn_reads": 100,
    "late_words": 1000, "steps_split": 500, "reused_during_capture": 20, "stale_pieces": 50, "frames_lost": 20, "frames_overtaken": 2, "frames_replayed": 5,
    "note_resync": 100, "note_duplicate": 20, "note_stale_epoch": 50, "note_stale_answer": 10, "note_fenced": 100, "note_broken_frame": 20, "shed_at_rest": 1,
    "claims_adopt": 50, "claims_pull": 50, "rung_pool": 50, "rung_replica": 50, "resumptions_checked": 200, "positions_resumed": 2000, "steps_fenced": 5,
    "steps_of_other_epochs": 5, "prefixes_shared": 100, "preempted": 500, "transfers_done": 1, "reused_between_looks": 5, "cut_to_the_plan": 20,
    "moves": 10, "moved_replica": 10, "moved_tokens": 10, "fetches_replica": 20, "fetches_forged_refused": 4, "started_empty_after_a_move": 20,
    "suspected_early": 100, "suspected_alive": 20, "sequences_read_back": 40, "names_reused_while_left": 100, "delivered_again_of_a_reused_name": 50,
    "deaths_seen_late": 100, "planned_before_the_death": 100, "waited_for_a_death": 20,
    "captured_later": 1000, "captures_late": 20, "second_lives_lost": 20, "claims_of_two_lives": 5, "clashes": 5,
    "beats_protected_with_a_mate": 1000, "ranks_copied_with_a_mate": 50, "claims_of_a_mate": 20, "pushed_to_two_nodes": 5,
    "transfers_to_two_nodes_done": 5, "survivors_behind": 5, "drained": FIXED, "finished": FIXED,
}  # fmt: skip


def played(seed: int) -> tuple[int, str, dict[str, int]]:
    """(seed, what went wrong or "", counts)."""
    logging.disable(logging.CRITICAL)
    world = World(seed)
    try:
        world.run()
    except Exception as error:
        last = "\n".join(list(world.log)[-12:])
        return seed, f"seed {seed}: {type(error).__name__}: {error}\n{last}\n  again: {COMMAND} {seed}", dict(world.counts)
    return seed, "", dict(world.counts)


def play(seeds: list[int]) -> Counter[str]:
    """All of them, on two cores. Fails with the command that plays a bad one again."""
    counts: Counter[str] = Counter()
    wrong = []
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        for _, fault, counted in pool.imap_unordered(played, seeds, chunksize=4):
            counts.update(counted)
            wrong += [fault] if fault else []
    assert not wrong, f"{len(wrong)} of {len(seeds)} seeds:\n" + "\n".join(wrong[:5])
    return counts


def regressions() -> list[int]:
    """Seeds that found bugs once; the fixed range follows on."""
    lines = (HERE / "seeds.txt").read_text().splitlines()
    return [int(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


@pytest.mark.timeout(900)
def test_fixed_seeds_hold_every_invariant_and_every_fault_fired() -> None:
    fixed = list(dict.fromkeys([*regressions(), *range(FIXED)]))[:FIXED]
    counts = play(fixed)
    idle = {what: counts[what] for what, least in FIRED.items() if counts[what] < least}
    assert not idle, f"too rare to prove anything: {idle}"


def version_of_the_code() -> bytes:
    """What the fresh seeds follow from: every version plays worlds that none has played before, and plays the same ones again on every machine."""
    digest = hashlib.sha256()
    for path in sorted([*(HERE.parents[1] / "kvguard").rglob("*.py"), *HERE.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.digest()


@pytest.mark.timeout(300 + 3 * FRESH)
def test_fresh_seeds() -> None:
    fresh = random.Random(os.environ.get("KVGUARD_SIMULATION_SEED", "").encode() + version_of_the_code())
    play([fresh.randrange(1 << 32) for _ in range(FRESH)])


def test_the_same_seed_is_the_same_world_under_any_hash_seed() -> None:
    def digests(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])}
        words = [sys.executable, "-m", "simulation", "--digest", "3", "20", "151"]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout

    first = digests("0")
    assert len(first.split()) == 3 and first == digests("4242")
