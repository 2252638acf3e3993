"""Kills vLLM servers at random points under streams that go through the gateway, and compares every answer, id by id, with the undisturbed one.

    PYTHONPATH=. $(tools/setup_vllm.sh) tools/vllm_kills.py [--kills 50] [--streams 8] [--servers 3] [--seed 0] [-o FILE]

Each round: `--streams` streaming clients, SIGKILL to all processes of one of the servers once a number of ids that the seed drew has reached them, every
answer to its end; the dead server is started again after it, beside the next rounds. A kill counts when its processes ended by it and at least one answer lost
its server. What a server does that is starting (importing torch takes 100 s of both cores) is held back from a kill until every stream has gone on: all its
processes are stopped meanwhile, since a server elsewhere would start on a machine of its own. What is measured runs beside the other servers' answers alone.
The servers compute in fp32: in bf16 vLLM's greedy answers depend on who else is in the batch, in fp32 a difference is one. Where one stands, the two best
logits of an undisturbed server at that place tell a tie of arithmetic (counted apart, and the rest compared with the answer that goes on from there)
from an id that was lost, doubled or changed.

`stall_ms` is what clients saw: the gap around the kill in the streams that were on the dead server. `parts_ms` are the coordinator's: detect, fence, plan,
restore from its history, and `pull` from the engines' logs (KV into vLLM's blocks). `stall_parts_ms` are the gateway's, one after the other: `fence` (from the
loss to the fence), `recovery` (to the resume token: the coordinator's fence, plan and restore, and their way), `placing` (to an instance that takes the rest),
`first_token` (from asking it, restoring included: most of it is the engine's step). `kvguard_ms` = recovery + placing + pull of one answer: what is kvguard's.

Each kill is a line on stderr, and FILE holds what is known after it. Exit code 1 where an id is lost, doubled or changed; 143 at SIGTERM, 130 at Ctrl-C, with
the servers ended and what was found printed (`complete`: whether that is all).

Knows: tests/vllm's world and gateway. Must not know: how anything is recovered.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import click
import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "vllm"))
from front import Gateway
from running import Report, ending_in_order
from world import MODEL, World

from kvguard.errors import KvguardError
from kvguard.transport.ask import ask

WHOLE_S = 600.0
TIE = 1e-3  # of the two best logits, in fp32: further apart no order of additions turns them round
PULLED = re.compile(r"kvguard: \S*?(kvg-[0-9a-f]{24})-\d+\S* goes on from position \d+: \d+ bytes in ([\d.]+) ms")
STALLED = re.compile(r"(kvg-[0-9a-f]{24}): \S+ goes on after [\d.]+ ms: (.+)$", re.MULTILINE)
KVGUARDS_MS = 200
HELD_S = 60.0  # a server that starts is held back for so long at most: one that had just been given an answer would keep it waiting
ON_ITS_WAY_S = 0.25  # what a dead server had sent has arrived by then
FP32 = ("--dtype", "float32")
TEXTS = (
    "The lighthouse stood on a rock far from the shore, and every evening ", "To bake bread you need flour, water, salt and time. First ",
    "In the year 1850 the railway reached the small town, and ", "A computer remembers what it is told until the power goes, so ",
    "The committee met on Tuesday to decide whether the bridge ", "When the storm was over the children went to the beach and ",
)  # fmt: skip


class Case(NamedTuple):
    """One request: text, and how many ids are asked for."""

    prompt: str
    tokens: int


class Answer:
    """One client's stream. `times`: when each id came; `errors`: whatever is not as of one whole answer."""

    def __init__(self, url: str, case: Case) -> None:
        self.case, self.ids, self.times, self.errors, self.prompt_ids = case, [], [], [], []
        self.name = ""
        self._url = url
        self._ends = 0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        body = {
            "model": MODEL, "prompt": self.case.prompt, "max_tokens": self.case.tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "return_token_ids": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        done, usage = False, {}
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=WHOLE_S, trust_env=False) as response:
                self.name = response.headers.get("x-request-id", "")
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line.startswith("data: "):
                        usage = self._take(json.loads(line[6:])) or usage
        except httpx.HTTPError as error:
            self.errors.append(f"{type(error).__name__}: {error}")
        whole = done and self._ends == 1 and usage.get("completion_tokens") == self.case.tokens == len(self.ids)
        if not whole:
            self.errors.append(f"done {done}, {self._ends} ends, usage {usage}, {len(self.ids)} ids of {self.case.tokens}")

    def _take(self, document: dict) -> dict | None:
        if "error" in document:
            self.errors.append(str(document["error"]))
        for choice in document.get("choices") or []:
            ids = choice.get("token_ids") or []
            self.prompt_ids = choice.get("prompt_token_ids") or self.prompt_ids
            self.ids += ids
            self.times += [time.monotonic()] * len(ids)
            self._ends += choice.get("finish_reason") is not None
        return document.get("usage")

    def has_gone_on(self, at: float) -> bool:
        """Since the moment `at`: with an id that was not merely on its way then, or to its end."""
        return not self.thread.is_alive() or (bool(self.times) and self.times[-1] > at + ON_ITS_WAY_S)

    def gap_ms(self, at: float) -> float | None:
        """The pause that holds the moment `at`; None where it was over, or had not begun."""
        before, after = [one for one in self.times if one <= at], [one for one in self.times if one > at]
        return 1e3 * (after[0] - before[-1]) if before and after else None


class Kills:
    """`counted`: kills with an answer under way. The lists hold what is reported."""

    def __init__(self, world: World, gateway: Gateway, streams: int, seed: int, tokens: int) -> None:
        self.world, self.gateway, self.streams, self.drawn = world, gateway, streams, random.Random(seed)
        names = [f"{text * repeat}({number}) " for number, text in enumerate(TEXTS) for repeat in (1, 4, 12)]
        self.cases = [Case(prompt, tokens - tokens // 4 + 7 * number % max(1, tokens // 2)) for number, prompt in enumerate(names)]
        self.undisturbed: dict[Case, list[int]] = {}
        self.counted = self.idle = self.ties = self.equal = 0
        self.resumed_by_kill: list[int] = []
        self.wrong: list[str] = []
        self.stalls_ms: list[float] = []
        self._starting: dict[str, float] = {}
        self.starts_s: list[float] = []

    def learn(self, report: Report) -> None:
        """What every request is answered with when nobody dies, from one server, alone in its batch."""
        server = self.world.servers["smol-a"]
        for case in self.cases:
            choice = server.complete(case.prompt, case.tokens, f"undisturbed-{self.cases.index(case)}")["choices"][0]
            self.undisturbed[case] = choice["token_ids"]
            report.say(f"undisturbed answer {len(self.undisturbed)} of {len(self.cases)}")

    def round(self) -> None:
        """One kill. Raises RuntimeError where it can't be proved to have fired."""
        self._ready()
        lost, answered = self.gateway.metric("kvguard_gateway_lost_total"), sum(self.gateway.rungs().values())
        answers = [Answer(self.gateway.url, self.drawn.choice(self.cases)) for _ in range(self.streams)]
        wanted = self.drawn.randrange(int(0.85 * sum(answer.case.tokens for answer in answers)))
        self.world.until("the point of the kill", lambda: sum(len(answer.ids) for answer in answers) >= wanted, WHOLE_S, 0.002)
        victim = self._victim()
        with self._without_starts():
            at = time.monotonic()
            self.world.servers[victim].kill()
            if self.world.servers[victim].popen.returncode != -signal.SIGKILL:
                raise RuntimeError(f"{victim} ended with {self.world.servers[victim].popen.returncode}, not by the kill")
            self.world.until("every stream to go on", lambda: _since(at, HELD_S) or all(answer.has_gone_on(at) for answer in answers), WHOLE_S, 0.01)
        for answer in answers:
            answer.thread.join(WHOLE_S)
        fired = self.gateway.metric("kvguard_gateway_lost_total") > lost
        self.counted, self.idle = self.counted + fired, self.idle + (not fired)
        if fired:
            self.resumed_by_kill.append(sum(self.gateway.rungs().values()) - int(answered))
            self._stalls(victim, at, answers)
        for answer in answers:
            self._check(answer)
        self._starting[victim] = time.monotonic()
        self.world.start_server(victim.removeprefix("smol-"), *FP32, wait=False)

    # ---- inside ----

    @contextmanager
    def _without_starts(self) -> Iterator[None]:
        """Servers that are starting stand still. Nobody judges them: their daemons are patient (World), and most haven't attached yet."""
        groups = [self.world.servers[name].popen.pid for name in self._starting]
        try:
            _signal(groups, signal.SIGSTOP)
            yield
        finally:
            _signal(groups, signal.SIGCONT)

    def _ready(self) -> None:
        """Two servers at least are active and protected; those that were started again are counted."""

        def whole() -> bool:
            if self.gateway.active() < 2:
                return False
            ranks = [self.world.rank(name) for name, server in self.world.servers.items() if name not in self._starting]
            return all(rank is not None and rank["state"] == "protected" for rank in ranks) and len(self._alive()) >= 2

        self.world.until("two servers to be active and protected", whole, WHOLE_S, 0.2)

    def _alive(self) -> list[str]:
        """Servers that can be killed under an answer."""
        for name in list(self._starting):
            server = self.world.servers[name]
            if server.popen.poll() is not None:
                raise RuntimeError(f"{name} did not start again\n{self.world.last_words()}")
            if self._running(name) is not None:
                self.starts_s.append(time.monotonic() - self._starting.pop(name))
        return [name for name, server in self.world.servers.items() if name not in self._starting and server.popen.poll() is None]

    def _running(self, name: str) -> float | None:
        try:
            text = httpx.get(f"{self.world.servers[name].url}/metrics", timeout=5, trust_env=False).text
        except httpx.HTTPError:
            return None
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_running"))

    def _victim(self) -> str:
        """Rather one that computes something: the choice is the seed's, what there is to choose from the moment's."""
        alive = self._alive()
        busy = [name for name in alive if self._running(name)]
        return self.drawn.choice(busy or alive)

    def _stalls(self, victim: str, at: float, answers: list[Answer]) -> None:
        history = ask(self.world.coordinator, "history", {}, timeout=10.0)["history"]
        record = next((one for one in reversed(history) if one["instance"] == victim), {"positions": {}})
        for answer in answers:
            if answer.name and any(answer.name in sequence for sequence in record["positions"]):
                gap = answer.gap_ms(at)
                self.stalls_ms += [gap] if gap is not None else []

    def _check(self, answer: Answer) -> None:
        if answer.errors:
            self.wrong.append(f"{answer.case.prompt[:30]!r}: {'; '.join(answer.errors)}")
            return
        wanted, tied = self.undisturbed[answer.case], False
        while answer.ids != wanted:
            at = next(index for index, (one, other) in enumerate(zip(answer.ids, wanted, strict=True)) if one != other)
            known = answer.prompt_ids + answer.ids[:at]
            server = self.world.servers[next(name for name in self._alive())]
            best = server.complete(known, 1, "tie", logprobs=2)["choices"][0]["logprobs"]["top_logprobs"][0]
            first, second = sorted(best.values(), reverse=True)[:2]
            if first - second > TIE:
                self.wrong.append(f"{answer.case.prompt[:30]!r}: id {at} is {answer.ids[at]}, undisturbed {wanted[at]}, {first - second:.4f} apart")
                return
            tied = True
            left = len(wanted) - at - 1
            wanted = answer.ids[: at + 1] + (server.complete(known + [answer.ids[at]], left, "rest")["choices"][0]["token_ids"] if left else [])
        self.ties, self.equal = self.ties + tied, self.equal + (not tied)


def _since(at: float, seconds: float) -> bool:
    return time.monotonic() - at > seconds


def _signal(groups: list[int], number: signal.Signals) -> None:
    for group in groups:
        with suppress(ProcessLookupError):  # it has ended by itself, which is told where its start is waited for
            os.killpg(group, number)


def percentiles(values: list[float]) -> dict:
    if not values:
        return {"n": 0}
    p50, p99 = np.percentile(values, [50, 99])
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1), "max": round(max(values), 1), "n": len(values)}


def parts_ms(world: World) -> dict:
    """The coordinator's share of every recovery, by phase; nothing where it is gone (Ctrl-C ends it as well)."""
    try:
        history = [one for one in ask(world.coordinator, "history", {}, timeout=10.0)["history"] if not one["error"]]
    except KvguardError:
        return {}
    phases = ("detect", "fence", "plan", "restore", "total")
    return {phase: percentiles([one["timing_ms"][phase] for one in history if phase in one["timing_ms"]]) for phase in phases}


def stalls_ms(gateway_log: str, engine_logs: list[str]) -> dict:
    """The gateway's share of every stall, and the engines', by their logs."""
    pulls = [(request, float(ms)) for log in engine_logs for request, ms in PULLED.findall(log)]
    parts: dict[str, list[float]] = {}
    own = []
    pulled = dict(pulls)  # of a request that was restored twice, the newest
    for request, said in STALLED.findall(gateway_log):
        found = {part: float(ms) for part, ms in (one.rsplit(" ", 1) for one in said.split(", "))}
        for part, ms in found.items():
            parts.setdefault(part, []).append(ms)
        own.append(found["recovery"] + found["placing"] + pulled.get(request, 0.0))
    found = {part: percentiles(values) for part, values in parts.items()}
    return {"pull": percentiles([ms for _, ms in pulls]), "stall_parts_ms": found, "kvguard_ms": {**percentiles(own), "target": KVGUARDS_MS}}


def document(run: Kills) -> dict:
    """What is known so far."""
    world, gateway = run.world, run.gateway
    logs = [log.read_text(errors="replace") for log in sorted(world.directory.glob("vllm-*.log"))]
    stalls = stalls_ms(gateway.log.read_text(errors="replace"), logs)
    return {
        "load_1min_at_end": os.getloadavg()[0], "kills": run.counted, "kills_without_an_answer": run.idle, "streams": run.streams,
        "answers_equal": run.equal, "answers_tied": run.ties, "wrong": run.wrong, "resumed_by_kill": run.resumed_by_kill, "rungs": gateway.rungs(),
        "unplaced": gateway.metrics("kvguard_gateway_unplaced_total"), "lost": gateway.metrics("kvguard_gateway_lost_total"),
        "stall_ms": percentiles(run.stalls_ms), "parts_ms": {**parts_ms(world), "pull": stalls.pop("pull")}, **stalls,
        "start_again_s": percentiles(run.starts_s),
    }  # fmt: skip


def killed(report: Report, world: World, gateway: Gateway, kills: int, streams: int, minutes: float, tokens: int, seed: int) -> None:
    run = Kills(world, gateway, streams, seed, tokens)
    run.learn(report)
    report.keep(ready_s=round(report.seconds))
    while run.counted < kills and not 0 < 60 * minutes < report.seconds:
        run.round()
        report.keep(**document(run), took_s=round(report.seconds))
        own = report.found["kvguard_ms"]
        said = f"{run.counted} kills, {run.idle} without an answer under way, {run.equal} answers equal, {run.ties} ties, {len(run.wrong)} wrong"
        report.say(f"{said}, rungs {gateway.rungs()}, kvguard's ms p50 {own.get('p50')} p99 {own.get('p99')}")


@click.command()
@click.option("--kills", default=50, show_default=True)
@click.option("--streams", default=8, show_default=True)
@click.option("--servers", default=3, show_default=True, help="So many are there; those that were killed are started again beside the next rounds.")
@click.option("--minutes", default=0.0, help="Begin no further kill after so long; 0: until all are done.")
@click.option("--tokens", default=64, show_default=True, help="Of an answer, about.")
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False), default=None)
def main(kills: int, streams: int, servers: int, minutes: float, tokens: int, seed: int, output: str | None) -> None:
    first = {"model": "SmolLM2-135M, fp32", "machine": f"{os.cpu_count()} cores, CPU only", "seed": seed, "kills": 0, "wrong": []}
    with ending_in_order(), Report(output, **first) as report:
        with tempfile.TemporaryDirectory(prefix="kvguard-vllm-kills-") as directory:
            names = tuple("abcdefgh"[:servers])
            world = World(Path(directory), names, backoff_ms=0)
            try:
                world.start_daemons()
                for name in names:
                    world.start_server(name, *FP32, wait=False)
                for name, server in world.servers.items():
                    world.wait_ready(server)
                    report.say(f"{name} answers")
                killed(report, world, Gateway(world), kills, streams, minutes, tokens, seed)
            finally:
                world.stop()
        wrong = report.found["wrong"]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
