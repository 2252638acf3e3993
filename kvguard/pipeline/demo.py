"""`kvguard demo`: one run undisturbed, one with a fault in it, on the same processes; then everything is compared.

Knows: which fault means what to the cluster, what must be seen afterwards. Must not know: torch, how recovery works.
Invariants: a fault is fired at a stated moment and its effect on the process is verified; nothing waits without a deadline and a condition.
"""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kvguard.errors import BadConfig, KvguardError, TimedOut
from kvguard.pipeline import report
from kvguard.pipeline.report import Transcript
from kvguard.pipeline.world import INSTANCE, Conversation, Node, World, WorldSettings

KILLS = ("rank", "node", "daemon", "coordinator", "driver", "none")
PROMPTS = (
    "Tell me a short story about a robot who keeps a lighthouse.",
    "Explain why the sky is blue to a child.",
    "What should I pack for a week in the mountains?",
    "Write a poem about the sea in winter.",
    "How does a bicycle stay upright?",
    "Name three inventions that changed the world, and say why.",
    "Describe a market square in the early morning.",
    "What is the difference between a lake and a pond?",
)
OUTAGE_TOKENS = 3  # an outage lasts until at least so many tokens came without the one that is away


@dataclass(frozen=True)
class Options:
    stages: int = 3
    tp: int = 1
    kill: str = "node"
    at_token: int = 20
    max_tokens: int = 60
    sequences: int = 1
    seed: int | None = None  # samples; None is greedy
    prompt: str | None = None
    model: str | None = None
    corrupt: str | None = None
    timeout_s: float = 300.0

    def check(self) -> None:
        """Raises UsageFault naming every fault."""
        faults = []
        if not 1 <= self.stages <= 8:
            faults.append(f"--stages {self.stages} is outside 1..8")
        if self.tp != 1:
            faults.append(f"--tp {self.tp}: the reference engine has no tensor parallelism yet. Try: --tp 1")
        if self.kill not in KILLS:
            faults.append(f"--kill {self.kill} is none of {', '.join(KILLS)}")
        if self.corrupt not in (None, "replica", "frame"):
            faults.append(f"--corrupt {self.corrupt} is neither replica nor frame")
        if self.corrupt == "replica" and self.kill != "node":
            faults.append("--corrupt replica is the negative control of a restored replica. Try: --kill node")
        if self.kill != "none" and not 0 <= self.at_token < self.max_tokens:
            faults.append(f"--at-token {self.at_token} is outside 0..{self.max_tokens - 1}")
        if not 1 <= self.sequences <= 16:
            faults.append(f"--sequences {self.sequences} is outside 1..16")
        if faults:
            raise UsageFault("; ".join(faults))


class UsageFault(KvguardError):
    exit_code = 2


def model_directory(options: Options) -> Path:
    """The model's directory; the default one is fetched and converted in a process of its own, which needs torch."""
    if options.model:
        path = Path(options.model)
        if not (path / "config.json").is_file():
            raise BadConfig(f"{path} is not a model directory: no config.json. Try: a directory that transformers can load")
        return path
    found = subprocess.run([sys.executable, "-m", "kvguard.pipeline.smollm2"], stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise KvguardError("the default model could not be made ready (see above). Try: --model DIR")
    return Path(found.stdout.strip().splitlines()[-1])


class Demo:
    """One demo: a world, two runs, a fault, a document."""

    def __init__(self, options: Options, world: World, say):
        self.options, self.world, self.say = options, world, say
        self.conversation: Conversation | None = None
        self.transcripts = {name: Transcript(options.sequences) for name in ("before", "after")}
        self.marks: dict[str, list[dict]] = {}  # events other than tokens, by kind
        self.arrivals: list[tuple[int, str]] = []  # (t_ns, run) of tokens that were new to the client
        self.struck_ns = 0
        self.fault: dict | None = None
        self.corruption: dict | None = None
        self.outage: dict | None = None
        self.prefilled = 0

    # ---- the driver's events

    def start_driver(self) -> None:
        self.conversation = Conversation(self.world.start_driver())
        self.await_event("ready", 120.0)

    def pump(self, timeout_s: float) -> list[dict]:
        """Events that arrive within the timeout, already entered in transcripts and marks."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.conversation, selectors.EVENT_READ)
            selector.select(timeout_s)
        events = self.conversation.read()
        for event in events:
            if event["event"] == "token":
                if self.transcripts[event["run"]].add(event):
                    self.arrivals.append((event["t_ns"], event["run"]))
            else:
                self.marks.setdefault(event["event"], []).append(event)
            if event["event"] == "error":
                raise KvguardError(f"the driver says: {event['message']}. Try: the logs in {self.world.root / 'logs'}")
        if self.conversation.closed and not events and not self.driver_expected_dead:
            raise KvguardError(f"the driver ended unasked:\n{self.world.driver.last_words()}")
        return events

    driver_expected_dead = False

    def await_event(self, kind: str, timeout_s: float, run: str | None = None) -> dict:
        self.await_condition(f"the driver's event {kind}", lambda: self.last(kind, run), timeout_s)
        return self.last(kind, run)

    def await_condition(self, what: str, condition, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimedOut(f"{what} did not come within {timeout_s:g} s. Try: the logs in {self.world.root / 'logs'}")
            self.pump(0.05)

    def last(self, kind: str, run: str | None = None) -> dict | None:
        found = [mark for mark in self.marks.get(kind, []) if run is None or mark.get("run") == run]
        return found[-1] if found else None

    # ---- runs

    def begin(self, run: str, prompts: list) -> None:
        options = self.options
        sampling = {} if options.seed is None else {"temperature": 0.8, "top_k": 50, "seed": options.seed}
        self.conversation.say(do="run", run=run, prompts=prompts, max_tokens=options.max_tokens, ignore_eos=True, chat=True, **sampling)

    def digest(self, run: str) -> dict:
        self.conversation.say(do="digest", run=run)
        return self.await_event("digest", 60.0, run)["digests"]

    def release(self, run: str) -> None:
        self.conversation.say(do="release", run=run)
        self.await_event("released", 30.0, run)

    def strike_point(self) -> bool:
        """Whether the run has come to where the fault is wanted."""
        if self.options.at_token == 0:
            return any(mark["run"] == "after" for mark in self.marks.get("prefill", []))
        return min(self.transcripts["after"].emitted()) >= self.options.at_token

    # ---- faults

    def target(self) -> int:
        """The stage that faults are aimed at: the middle one."""
        return self.options.stages // 2

    def strike(self) -> None:
        """Fires the fault and verifies that it did what it should to the process."""
        options, world = self.options, self.world
        stage = self.target()
        node = world.nodes[stage]
        positions = [mark["position"] for mark in self.marks.get("prefill", []) if mark["run"] == "after" and mark["sequence"] == 0]
        emitted = self.transcripts["after"].emitted()[0]
        prompt = self.last("prefill", "after")
        at_position = (positions[-1] if positions else 0) + max(0, emitted - 1) if prompt else 0
        target = {"rank": f"0.{stage}.0", "node": node.name, "daemon": node.name, "coordinator": "coordinator", "driver": "driver"}[options.kill]
        if options.corrupt == "replica":
            self.corrupt_replica(node, stage)
        process = {
            "rank": lambda: next(engine for engine in node.engines if engine.name == f"stage-{stage}"),
            "node": lambda: node.daemon,
            "daemon": lambda: node.daemon,
            "coordinator": lambda: world.coordinator,
            "driver": lambda: world.driver,
        }[options.kill]()
        was_alive = process.alive()
        self.driver_expected_dead = options.kill == "driver"
        self.struck_ns = time.monotonic_ns()
        if options.kill == "node":
            world.kill_node(node)
        else:
            process.kill()
        self.fault = {"kind": options.kill, "target": target, "at_token": options.at_token, "at_position": at_position,
                      "fired": was_alive and process.popen.returncode == -9}  # fmt: skip
        self.say(f"killed {options.kill} {target} at token {emitted}")

    def corrupt_replica(self, node: Node, stage: int) -> None:
        """The negative control: an acknowledged position of the replica and its sum change together, so that no checksum can tell."""
        status = self.world.status()
        holder = next(rank["holders"] for rank in status["ranks"] if rank["rank"] == f"0.{stage}.0" and rank["state"] != "standby")[0]
        arguments = {"instance": INSTANCE, "rank": f"0.{stage}.0", "sequence": "after-0", "position": 3}
        answer = self.world.query(self.world.node_named(holder), "corrupt_replica", arguments)
        self.corruption = {"kind": "replica", "fired": bool(answer["changed"]), "detected": False}

    def corrupt_frame(self) -> None:
        """Arms the sender: the next KV frame leaves with one byte changed."""
        node = self.world.nodes[self.target()]
        self.world.query(node, "corrupt_frame", {})
        self.corruption = {"kind": "frame", "fired": False, "detected": False}

    def seen_corruption(self) -> None:
        counters = [self.world.query(node, "stats", {}) for node in self.world.nodes if node.daemon and node.daemon.alive()]
        self.corruption["fired"] = any(one.get("frames_corrupted", 0) for one in counters)
        self.corruption["detected"] = any(one.get("checksum_failures", 0) for one in counters)

    # ---- after the fault

    def mend(self) -> None:
        """What the supervisor of a real fleet does: starts again what died. An outage's length is bounded below by tokens that came without it."""
        options, world = self.options, self.world
        node = world.nodes[self.target()]
        if options.kill == "driver":
            self.conversation.read()
            self.driver_expected_dead = False
            world.driver.popen.stdin.close()
            world.driver.popen.stdout.close()
            self.conversation = Conversation(world.start_driver())
            self.await_event("resumed", 60.0)
        elif options.kill in ("rank", "node"):
            self.await_event("resumed", 60.0)
            if options.kill == "rank":
                node.engines = [engine for engine in node.engines if engine.alive()]
                world.start_standby(node)
            else:
                world.restart_node(node)
        elif options.kill in ("daemon", "coordinator"):
            self.end_outage(node)

    def end_outage(self, node: Node) -> None:
        options, world = self.options, self.world
        enough = len(self.arrivals) + OUTAGE_TOKENS
        self.await_condition("tokens during the outage", lambda: len(self.arrivals) >= enough or self.last("finished", "after"), 60.0)
        if options.kill == "daemon":
            world.start_daemon(node)
        else:
            world.start_coordinator()

        def back() -> bool:
            status = world.status_or_none()
            if status is None:
                return False
            here = [one for one in status["nodes"] if options.kill == "coordinator" or one["node"] == node.name]
            ranks = [rank for rank in status["ranks"] if rank["state"] != "standby"]
            return bool(here) and all(one["state"] == "alive" for one in here) and len(ranks) >= options.stages and all(
                rank["state"] == "protected" or not rank["sequences"] for rank in ranks
            )  # fmt: skip

        self.await_condition(f"the {options.kill} back, everything protected", back, 60.0)
        back_ns = time.monotonic_ns()
        meanwhile = sum(run == "after" and self.struck_ns < t_ns < back_ns for t_ns, run in self.arrivals)
        self.outage["down_ms"] = (back_ns - self.struck_ns) / 1e6
        self.outage["tokens_meanwhile"] = meanwhile

    def totals(self) -> tuple[int, int]:
        """(acknowledged positions over all ranks, the instance's epoch)."""
        status = self.world.status()
        acked = sum(rank["acked"] for rank in status["ranks"])
        epoch = next((one["epoch"] for one in status["instances"] if one["instance"] == INSTANCE), 0)
        return acked, epoch

    def timing(self, resumed: dict) -> dict:
        """Phases in ms; each starts where the last ended. All clocks are the machine's one monotonic clock."""
        told = resumed["timing_ms"]
        first = min((t_ns for t_ns, run in self.arrivals if run == "after" and t_ns > resumed["t_ns"]), default=None)
        verdict_ns = next((one.get("verdict_ns") for one in reversed(self.history()) if one["epoch"] == resumed["epoch"]), None)
        detect = (verdict_ns - self.struck_ns) / 1e6 if verdict_ns else told.get("detect")
        timing = {"detect": detect, "fence": told.get("fence"), "plan": told.get("plan"), "restore": told.get("restore")}
        timing["first_token"] = (first - resumed["t_ns"]) / 1e6 if first else None
        timing["total"] = (first - self.struck_ns) / 1e6 if first else None
        return timing

    def history(self) -> list[dict]:
        from kvguard.transport.ask import ask

        return ask(self.world.coordinator_address, "history", {}, timeout=5.0)["history"]

    def replica_sums(self, digests: dict) -> dict:
        """What holders have, by rank and sequence, once they have all that the pools have (their last acknowledgements may be under way)."""
        found: dict = {}

        def complete() -> bool:
            for rank in self.world.status()["ranks"]:
                if rank["rank"] not in digests or rank["state"] == "standby" or not rank["holders"]:
                    continue
                arguments = {"instance": INSTANCE, "rank": rank["rank"], "sequences": [f"after-{i}" for i in range(self.options.sequences)]}
                sums = self.world.query(self.world.node_named(rank["holders"][0]), "sums", arguments)["sums"]
                found[rank["rank"]] = {str(i): [f"{one:016x}" for one in sums.get(f"after-{i}", [])] for i in range(self.options.sequences)}
            return all(len(found.get(rank, {}).get(i, [])) >= len(sums) for rank, one in digests.items() for i, sums in one.items())

        self.world.wait_until("the replicas complete", complete, 15.0)
        return found

    def replication(self) -> dict:
        stats = [self.world.query(node, "stats", {}) for node in self.world.nodes if node.daemon and node.daemon.alive()]

        def worst(key: str):
            return max((one[key] for one in stats if one.get(key) is not None), default=None)

        return {
            "lag_tokens_p50": worst("lag_tokens_p50"), "lag_tokens_p99": worst("lag_tokens_p99"), "time_to_protected_ms": worst("time_to_protected_ms"),
            "bytes": sum(one["replicated_bytes"] for one in stats), "frames": sum(one["frames_sent"] for one in stats),
        }  # fmt: skip

    # ---- the whole

    def run(self, prompts: list, model: dict) -> dict:
        options, world = self.options, self.world
        self.say(f"starting {len(world.nodes)} nodes, {options.stages} stages, coordinator")
        world.start()
        world.wait_ready()
        self.start_driver()
        self.say("the undisturbed run")
        self.begin("before", prompts)
        finished = self.await_event("finished", options.timeout_s, "before")
        before = self.digest("before")
        self.release("before")
        self.say("the same again, with a fault" if options.kill != "none" else "the same again")
        if options.corrupt == "frame":
            self.corrupt_frame()
        self.begin("after", prompts)
        if options.kill != "none":
            self.await_condition("the moment to strike", self.strike_point, options.timeout_s)
            acked, epoch = self.totals()
            if options.kill in ("daemon", "coordinator"):
                self.outage = {"kind": options.kill, "acked_before": acked, "epoch_before": epoch}
            self.strike()
            self.mend()
        self.await_event("finished", options.timeout_s, "after")
        after = self.digest("after")
        document = self.document(finished, before, after, model)
        self.release("after")
        return document

    def document(self, finished: dict, before: dict, after: dict, model: dict) -> dict:
        options = self.options
        resumed = self.last("resumed")
        recovered = None
        if resumed:
            named = {one["sequence"]: one["resume_position"] for one in resumed["sequences"]}
            below = [named.get(i, 0) for i in range(options.sequences)]
            recovered = report.recovery(resumed, self.timing(resumed), resumed["epoch"], lost=options.sequences - len(named))
            kv = report.kv_identical(before, after, below)
        else:
            kv = report.kv_identical(after, self.replica_sums(after), [1 << 62] * options.sequences)
        if self.outage:
            self.outage["acked_after"], self.outage["epoch_after"] = self.totals()
        if self.corruption and self.corruption["kind"] == "frame":
            self.seen_corruption()
        one, two = self.transcripts["before"], self.transcripts["after"]
        return {
            "schema": report.SCHEMA, "model": model, "stages": options.stages, "tp": options.tp,
            "prompt_tokens": finished["prompt_tokens"][0], "generated_tokens": options.max_tokens, "text": two.text[0],
            "fault": self.fault, "corruption": self.corruption, "recovery": recovered, "outage": self.outage,
            "identical": report.identical(one, two, options.max_tokens), "logits_identical": report.logits_identical(one, two), "kv_identical": kv,
            "tokens_before": one.tokens(), "tokens_after": two.tokens(), "replication": self.replication(), "overhead_percent": None,
            "conflicts": two.conflicts,
        }  # fmt: skip


def prompts_of(options: Options, model: Path) -> list:
    """One prompt per sequence: texts, or ids where the model has no tokenizer."""
    if not (model / "tokenizer.json").is_file():
        return [[(7 * i + 3 * j) % 50 + 1 for j in range(24 + 5 * i)] for i in range(options.sequences)]
    chosen = [PROMPTS[i % len(PROMPTS)] for i in range(options.sequences)]
    return [options.prompt, *chosen[1:]] if options.prompt else chosen


def main(output: str, **given) -> int:
    """What the command line calls: runs, prints the document or the table, returns the exit code."""
    import json

    from rich.console import Console

    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    document = run(Options(**given), say=lambda line: err.print(f"[dim]{line}[/dim]"))
    if output == "json":
        print(json.dumps(document, ensure_ascii=False, indent=1))
    else:
        out.print(document["text"], style="italic")
        report.render(document, out)
    return 0 if report.passed(document) else 1


def run(options: Options, say=lambda line: None) -> dict:
    """The whole demo in a directory of its own, which is removed at the end (kept, and named, when the demo failed). Returns the document."""
    import json

    options.check()
    model = model_directory(options)
    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    layers = shape.get("num_hidden_layers", shape.get("n_layer"))
    described = {"name": shape.get("_name_or_path") or model.name, "layers": layers, "real_weights": options.model is None}
    if options.stages > (layers or 0):
        raise UsageFault(f"--stages {options.stages}: {described['name']} has {layers} layers. Try: --stages {layers}")
    prompts = prompts_of(options, model)
    root = Path(tempfile.mkdtemp(prefix="kvguard-demo.", dir=os.environ.get("XDG_RUNTIME_DIR") or None))
    world = World(WorldSettings(root=root, model=model, stages=options.stages))
    try:
        document = Demo(options, world, say).run(prompts, described)
    except BaseException:
        world.stop()
        say(f"the logs are in {root}/logs")
        raise
    world.stop()
    shutil.rmtree(root)
    return document
