"""From what was seen to verdicts: did the fault fire, did the hypothesis hold, which invariants were held, violated, or not looked at.

Knows: the evidence that a bench (or a live cluster) gives, the invariants of the project. Must not know: processes, how evidence was obtained.
Invariants: pure; nothing is called held without a fact that could have said otherwise, and the fact is named beside the verdict; a fact that is missing makes
"not_checked", never "held".
"""

from __future__ import annotations

from typing import NamedTuple

from kvguard.drill.scenarios import OUTAGE, RECOVERY, Scenario
from kvguard.types import Rung

HELD, VIOLATED, NOT_CHECKED = "held", "violated", "not_checked"
INVARIANTS = tuple(f"I{number}" for number in range(1, 12))
DESCRIPTORS_MORE_MAX = 64  # of a daemon, over one drill: links and replicas come and go
BUFFERS_MAX = 64


class Finding(NamedTuple):
    """`state`: held | violated | not_checked. `why`: the evidence, in words."""

    state: str
    why: str


class Judgement(NamedTuple):
    invariants: dict[str, Finding]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


def judge(scenario: Scenario, run: dict) -> Judgement:
    """`run`: fault, recovery, outage, the three comparisons, and `observed`; or `error` alone where the drill could not be carried out."""
    if run.get("error"):
        return Judgement(dict.fromkeys(INVARIANTS, Finding(NOT_CHECKED, "the drill was not carried out")), (run["error"],))
    found = {name: check(scenario, run) for name, check in CHECKS.items()}
    failures = [*_outcome(scenario, run)]
    failures += [f"{name} is violated: {finding.why}" for name, finding in found.items() if finding.state == VIOLATED]
    wanted = [name for name in scenario.proves if run["target"] == "bench" or name in ("I3", "I7")]
    failures += [f"{name} could not be checked: {found[name].why}" for name in wanted if found[name].state == NOT_CHECKED]
    return Judgement(found, tuple(failures))


def _outcome(scenario: Scenario, run: dict) -> list[str]:
    """What contradicts the hypothesis itself."""
    fault, recovered, observed = run["fault"], run["recovery"], run["observed"]
    failures = [] if fault["fired"] else [f"the fault did not fire: {fault['evidence']}"]
    failures += [f"{key} is false: the run differs from the undisturbed one" for key in ("identical", "logits_identical", "kv_identical") if run[key] is False]
    rose = observed["epoch_after"] - observed["epoch_before"]
    if scenario.outcome == OUTAGE and (recovered or rose):
        failures.append(f"the epoch rose from {observed['epoch_before']} to {observed['epoch_after']}: nobody should have failed over")
    if scenario.outcome == RECOVERY and not recovered:
        failures.append("no recovery followed")
    if recovered:
        rungs = {one["rung"] for one in recovered["sequences"]} or {recovered["rung"]}
        # A live cluster's own coordinator waits for a pool for its `pool_ms`, no longer.
        late = (Rung.REPLICA,) if run["target"] != "bench" and Rung.POOL in scenario.rungs else ()
        if scenario.rungs and not rungs <= {*scenario.rungs, *late}:
            failures.append(f"came back from {', '.join(sorted(rungs))}, not from {' or '.join((*scenario.rungs, *late))}")
        rolled_back = recovered["rolled_back"]  # None where only the engine knows
        if None not in (scenario.rolled_back_max, rolled_back) and rolled_back > scenario.rolled_back_max:
            failures.append(f"{rolled_back} positions were rolled back, {scenario.rolled_back_max} may be")
        if recovered["lost_sequences"]:
            failures.append(f"{recovered['lost_sequences']} sequences are lost")
    return failures + _special(scenario.name, fault["evidence"], observed)


def _special(name: str, evidence: dict, observed: dict) -> list[str]:
    """What only one drill claims."""
    if name == "pause-rank" and not observed["counters"]["processes_killed"]:
        return ["the stopped rank died, but no daemon says that it killed it"]
    if name == "pause-node" and not evidence.get("woken"):
        return ["no rank was woken that could have been fenced"]
    if name == "corrupt-frame" and not observed["counters"]["checksum_failures"]:
        return ["the damaged frame was not found"]
    if name == "corrupt-replica" and evidence["resumed_at"] > evidence["position"]:
        return [f"resumed at {evidence['resumed_at']}, beyond the damaged position {evidence['position']}"]
    return []


# ---- invariants -------------------------------------------------------------------------------------------------------------------


def _bench_only(check):
    """These need a twin run, or all daemons' counters."""

    def checked(scenario: Scenario, run: dict) -> Finding:
        return check(scenario, run) if run["target"] == "bench" else Finding(NOT_CHECKED, "a live cluster has no undisturbed twin to compare with")

    return checked


def _all(facts: list[tuple[bool | None, str]]) -> Finding:
    """Violated by the first fact that is false; held by those that are true; a fact that is None was not there."""
    for true, said in facts:
        if true is False:
            return Finding(VIOLATED, f"not so: {said}")
    known = [said for true, said in facts if true is True]
    return Finding(HELD, "; ".join(known)) if known else Finding(NOT_CHECKED, "; ".join(said for _, said in facts) or "nothing was seen")


@_bench_only
def resume_safety(scenario: Scenario, run: dict) -> Finding:
    recovered, observed = run["recovery"], run["observed"]
    if not recovered:
        return Finding(NOT_CHECKED, "nothing was resumed")
    within = all(position < prompt + emitted for _, _, position, prompt, emitted in observed["resumed"])
    return _all([
        (within, "every resume position leaves one to compute"),
        (run["kv_identical"], "bytes below the resume positions are the undisturbed run's" if run["kv_identical"] is not None else "nothing was restored"),
        (not observed["disagreed"], "no rank disagreed with the plan"),
        (run["logits_identical"], "logits of recomputed positions are those of the first time"),
    ])


@_bench_only
def bounded_loss(scenario: Scenario, run: dict) -> Finding:
    recovered, observed = run["recovery"], run["observed"]
    if not recovered:
        return Finding(NOT_CHECKED, "nothing was resumed")
    entry = next((one for one in reversed(observed["history"]) if one["epoch"] == recovered["epoch"]), None)
    if entry is None:
        return Finding(VIOLATED, f"the history has no entry of epoch {recovered['epoch']}")
    told = entry["positions"]
    # KV may be there for every known id, where a death took only the newest position's logits: that one is computed once more.
    same = all(min(told.get(f"{name}-{number}", 0), prompt + emitted - 1) == position for name, number, position, prompt, emitted in observed["resumed"])
    return _all([
        (len(entry["lost"]) == recovered["lost_sequences"] == 0, "no sequence is lost, by the coordinator's history"),
        (same, "the history states the positions from which the run went on"),
        (not observed["conflicts"], "no token was told twice with another value"),
    ])


def fencing(scenario: Scenario, run: dict) -> Finding:
    observed = run["observed"]
    epochs = [entry["epoch"] for entry in observed["history"]]
    before, after = observed["epoch_before"], observed["epoch_after"]
    facts = [
        (epochs == sorted(set(epochs)) and all(epoch > before for epoch in epochs), "every recovery has an epoch of its own, higher than all before"),
        (observed["watch"]["epochs_rise"], "no status ever showed a lower epoch than the one before"),
        (after > before if run["recovery"] else after == before, "the epoch rose with the recovery" if run["recovery"] else "no epoch was raised"),
    ]
    if run["recovery"] and not observed["silent"]:
        facts.append((all(promise == after for promise in observed["promises"].values()), f"every node has promised epoch {after}"))
    woken = run["fault"]["evidence"].get("woken")
    if woken:
        facts.append((all(code == -9 for code in woken.values()) and not observed["conflicts"], "the woken ranks ended and emitted nothing"))
    return _all(facts)


@_bench_only
def exactly_once(scenario: Scenario, run: dict) -> Finding:
    equal = run["observed"]["replicas_equal_pools"]
    return _all([(equal, "every replica has its pool's bytes at the end" if equal is not None else "no replica was compared")])


@_bench_only
def non_interference(scenario: Scenario, run: dict) -> Finding:
    outage, observed = run["outage"], run["observed"]
    if outage is None or scenario.name == "pause-briefly":
        return Finding(NOT_CHECKED, "the fault struck the engine itself")
    return _all([
        (outage["tokens_meanwhile"] > 0, f"{outage['tokens_meanwhile']} tokens came while the fault lasted"),
        (not observed["died"], f"no process of the engine ended{': ' + ', '.join(observed['died']) if observed['died'] else ''}"),
        (run["identical"], "the tokens are the undisturbed run's"),
    ])


@_bench_only
def bounded_resources(scenario: Scenario, run: dict) -> Finding:
    observed = run["observed"]
    arenas = [run["fault"]["evidence"]] if scenario.name == "fill-arena" else []
    within = all(used <= most for used, most in observed["arena"].values())
    within = within and all(one["arena_bytes"] + one["arena_bytes_promised"] <= one["arena_bytes_max"] for one in arenas)
    return _all([
        (within and observed["watch"]["arena_share_max"] <= 1.0, "no arena held more than its budget"),
        (all(count <= BUFFERS_MAX for count in observed["buffers"].values()), f"at most {BUFFERS_MAX} buffers are left in any daemon"),
        (all(after - before <= DESCRIPTORS_MORE_MAX for before, after in observed["descriptors"].values()), "no daemon keeps descriptors"),
    ])


def liveness(scenario: Scenario, run: dict) -> Finding:
    took = run["observed"].get("whole_ms")
    return _all([(True if took is not None else None, f"whole again {took:.0f} ms after the fault was mended" if took is not None else "not seen whole again")])


@_bench_only
def truthful_status(scenario: Scenario, run: dict) -> Finding:
    observed, watch = run["observed"], run["observed"]["watch"]
    facts: list[tuple[bool | None, str]] = []
    if run["recovery"]:
        entry = next((one for one in observed["history"] if one["epoch"] == run["recovery"]["epoch"]), None)
        facts.append((entry is not None and bool(entry["reason"]) and not entry["error"], "the recovery stands in the history, with its reason"))
    if scenario.name in ("cut-link", "fill-arena"):
        facts.append((bool(watch["states"].get("unprotected")), "the status said unprotected while it was"))
    if scenario.name == "slow-link":
        facts.append((watch["lag_tokens_max"] > 0 or bool(watch["states"].get("unprotected")), f"the status showed a lag of {watch['lag_tokens_max']} tokens"))
    if scenario.outcome == OUTAGE:
        facts.append((not watch["states"].get("lost"), "no rank was called lost"))
    reasoned = all(reason for state in ("unprotected", "lost", "recovering") for reason in watch["states"].get(state, []))
    facts.append((reasoned if watch["samples"] else None, f"every state but protected had a reason, in {watch['samples']} samples"))
    facts.append((observed["replicas_equal_pools"], "what was called protected at the end is there, byte for byte"))
    return _all(facts)


@_bench_only
def equivalence(scenario: Scenario, run: dict) -> Finding:
    return _all([
        (run["identical"], f"tokens of {run['observed']['waves']} waves equal the undisturbed run's"),
        (run["logits_identical"], "so do the logits' checksums"), (run["kv_identical"], "so do the restored bytes"),
        (run["observed"]["replicas_equal_pools"], "replica bytes = pool bytes"),
    ])


def authentication(scenario: Scenario, run: dict) -> Finding:
    strangers = run["observed"].get("strangers")
    if strangers is None:
        return Finding(NOT_CHECKED, "no keys are in use here: whoever reaches an address is let in")
    told = {"refused": True, "answered": False}
    return _all([(told.get(what), f"a stranger whose key is not listed is refused by {name}{'' if what in told else f': {what}'}")
                 for name, what in strangers.items()])  # fmt: skip


def crash_consistency(scenario: Scenario, run: dict) -> Finding:
    observed = run["observed"]
    if scenario.name in ("kill-daemon", "restart-daemon"):
        before = observed["epoch_before"]
        promised = all(promise >= before for promise in observed["promises"].values()) and not observed["silent"]
        finding = _all([(promised, f"the daemon came back with what it had promised (epoch {before})"), *_kept(observed.get("kept"))])
        unread = (observed.get("kept") or {}).get("unread")
        return Finding(NOT_CHECKED, f"its replicas could not be read again: {unread}") if unread and finding.state == HELD else finding
    return _loaded_again(scenario, run)


def _kept(kept: dict | None) -> list[tuple[bool | None, str]]:
    """What was promised of a daemon's replicas: drill/kept.py."""
    if kept is None or not kept["promised"] or not kept["replicas"]:
        return []
    held, back = kept["replicas"], kept["read_back"]
    said = f"the replicas that it held stayed with the service manager ({held} held, {back} read back, {kept['unreadable']} unreadable)"
    return [
        (back >= held and not kept["unreadable"], said), (not kept["unsound"], f"{kept['unsound']} of their positions didn't match their sums"),
        (kept["verified"], "every byte of them was read again and matches its sum"),
    ]  # fmt: skip


@_bench_only
def _loaded_again(scenario: Scenario, run: dict) -> Finding:
    observed, evidence = run["observed"], run["fault"]["evidence"]
    if scenario.name == "kill-coordinator":
        return _all([
            (observed["epoch_after"] == observed["epoch_before"], "the coordinator came back with its epoch"),
            (observed["history_after"] == observed["history_before"], f"and with the {observed['history_before']} recoveries of its history"),
        ])
    if scenario.name == "corrupt-replica":
        damaged = observed["counters"]["positions_damaged"]
        return _all([
            (False in evidence["verified"], "reading the replica finds the damage"), (damaged > 0, f"{damaged} positions were dropped, none was loaded"),
        ])  # fmt: skip
    return Finding(NOT_CHECKED, "nothing that was left behind was loaded again")


CHECKS = {
    "I1": resume_safety, "I2": bounded_loss, "I3": fencing, "I4": exactly_once, "I5": non_interference, "I6": bounded_resources, "I7": liveness,
    "I8": truthful_status, "I9": equivalence, "I10": authentication, "I11": crash_consistency,
}  # fmt: skip
