"""`kvguard demo`: one run undisturbed, one with a fault in it, on the same processes; then everything is compared.

Knows: what must be seen of each fault, and the document. Must not know: torch, how recovery works, how faults are fired (faults.py).
Invariants: a fault is fired at a stated moment and proved; nothing waits without a deadline and a condition; what is not compared is said.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvguard.errors import BadConfig, KvguardError
from kvguard.pipeline import faults, report
from kvguard.pipeline.client import Client
from kvguard.pipeline.faults import KILLS, Fault
from kvguard.pipeline.observing import replicas_equal
from kvguard.pipeline.world import INSTANCE, World, WorldSettings

PREFIX = "kvguard-demo."
SUPERVISED = "supervised"  # in a demo's directory, locked while its supervisor lives; not in one that is kept for its logs
DEVICES = {"cpu": "host", "cuda": "cuda", "rehearsal": "rehearsal"}  # as the command line says it -> of pools
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


class UsageFault(KvguardError):
    exit_code = 2


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
    prompt_ids: int | None = None  # a first prompt of so many ids
    model: str | None = None
    corrupt: str | None = None
    timeout_s: float = 600.0
    device: str = "cpu"

    def check(self) -> None:
        """Raises UsageFault naming every fault."""
        found = []
        if not 1 <= self.stages <= 8:
            found.append(f"--stages {self.stages} is outside 1..8")
        if self.tp != 1:
            found.append(f"--tp {self.tp}: the reference engine has no tensor parallelism. Try: --tp 1")
        if self.kill not in KILLS:
            found.append(f"--kill {self.kill} is none of {', '.join(KILLS)}")
        if self.corrupt not in (None, "replica", "frame"):
            found.append(f"--corrupt {self.corrupt} is neither replica nor frame")
        if self.corrupt == "replica" and (self.kill != "node" or self.at_token == 0):
            found.append("--corrupt replica damages what a node's death restores. Try: --kill node --at-token 20")
        if self.kill != "none" and not 0 <= self.at_token < self.max_tokens:
            found.append(f"--at-token {self.at_token} is outside 0..{self.max_tokens - 1}")
        if self.device not in DEVICES:
            found.append(f"--device {self.device} is none of {', '.join(DEVICES)}")
        if not 1 <= self.sequences <= 16:
            found.append(f"--sequences {self.sequences} is outside 1..16")
        if found:
            raise UsageFault("; ".join(found))


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


def shape_of(model: Path) -> dict:
    """What config.json says. Raises BadConfig; whether it is a model that can be run, its stages say."""
    try:
        shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadConfig(f"{model / 'config.json'} can't be read: {error}. Try: copy the model anew") from error
    if not isinstance(shape, dict):
        raise BadConfig(f"{model / 'config.json'} is not a JSON object. Try: copy the model anew")
    return shape


def prompts_of(options: Options, model: Path) -> list:
    """One prompt per sequence: texts, or ids where the model has no tokenizer."""
    if (model / "tokenizer.json").is_file():
        chosen: list = [PROMPTS[i % len(PROMPTS)] for i in range(options.sequences)]
    else:
        chosen = [ids(24 + 5 * i, 7 * i) for i in range(options.sequences)]
    if options.prompt_ids:
        chosen[0] = ids(options.prompt_ids, 0)
    return [options.prompt, *chosen[1:]] if options.prompt else chosen


def ids(count: int, start: int) -> list[int]:
    """A prompt that needs no tokenizer; every vocabulary has these."""
    return [(start + 3 * i + i * i) % 97 + 1 for i in range(count)]


class Demo:
    """One demo: a world, two runs, a fault, a document."""

    def __init__(self, options: Options, world: World, say):
        self.options, self.world, self.say = options, world, say
        self.client = Client(world)
        self.fault: Fault | None = None
        self.at_position = 0
        self.corruption: dict | None = None
        self.outage: dict | None = None

    def run(self, prompts: list, model: dict) -> dict:
        options, world, client = self.options, self.world, self.client
        self.say(f"starting {len(world.nodes)} nodes, {options.stages} stages, coordinator")
        world.start()
        world.wait_ready()
        client.connect("ready")
        self.say("the undisturbed run")
        client.begin("before", prompts, options.max_tokens, options.seed)
        finished = client.finished("before", options.timeout_s)
        before = client.digest("before")
        client.release("before")
        # The status is as old as the last heartbeat: what it counts as acknowledged at the strike must be of the run that is struck.
        world.wait_until("the undisturbed run to be let go", lambda: faults.totals(world)[0] == 0, options.timeout_s)
        self.say("the same again, with a fault" if options.kill != "none" else "the same again")
        if options.corrupt == "frame":
            faults.arm_corrupt_frame(world.engine_at(client.endpoints[self.stage])[0], world)
            self.corruption = {"kind": "frame", "fired": False, "detected": False}
        client.begin("after", prompts, options.max_tokens, options.seed)
        if options.kill != "none":
            client.wait("the moment to strike", self.moment, options.timeout_s)
            self.strike()
        client.finished("after", options.timeout_s)
        after = client.digest("after")
        document = self.document(finished, before, after, model)
        client.release("after")
        return document

    @property
    def stage(self) -> int:
        """Faults are aimed at the middle of the pipeline: it has a neighbour on both sides."""
        return self.options.stages // 2

    def moment(self) -> bool:
        """Whether the run has come to where the fault is wanted; 0 is between two chunks of a prompt, or after the only one."""
        if self.options.at_token == 0:
            return self.client.last("prefill", "after") is not None
        return min(self.client.transcripts["after"].emitted()) >= self.options.at_token

    def strike(self) -> None:
        options, client = self.options, self.client
        self.fault = faults.aim(self.world, client, options.kill, self.stage)
        if options.corrupt == "replica":
            changed = faults.corrupt_replica(self.world, self.stage, "after-0", position=3)
            self.corruption = {"kind": "replica", "fired": changed, "detected": False}
        if options.kill in ("daemon", "coordinator"):
            acked, epoch = faults.totals(self.world)
            self.outage = {"kind": options.kill, "acked_before": acked, "epoch_before": epoch}
        self.at_position = client.position("after")
        self.say(f"killing {options.kill} {self.fault.target}, position {self.at_position}")
        faults.strike(self.world, client, self.fault)
        faults.mend(self.world, client, self.fault, "after")

    # ---- the document

    def document(self, finished: dict, before: dict, after: dict, model: dict) -> dict:
        options, fault = self.options, self.fault
        one, two = self.client.transcripts["before"], self.client.transcripts["after"]
        recovered = None
        if fault and fault.resumed:
            below = positions(fault.resumed, options.sequences)
            timing = timing_ms(self.world, self.client, fault, "after")
            recovered = report.recovery(fault.resumed, timing, fault.resumed["epoch"], lost=lost_sequences(self.world, fault.resumed["epoch"]))
            kv = report.kv_identical(before, after, below)
        else:
            kv = replicas_equal(self.world, after, "after")
        if self.outage:
            acked, epoch = faults.totals(self.world)
            self.outage |= {"down_ms": fault.down_ms, "tokens_meanwhile": fault.tokens_meanwhile, "acked_after": acked, "epoch_after": epoch}
        stats = self.stats()
        if self.corruption and self.corruption["kind"] == "frame":
            self.corruption["fired"] = any(one_node["frames_corrupted"] for one_node in stats)
            self.corruption["detected"] = any(one_node["checksum_failures"] for one_node in stats)
        return {
            "schema": report.SCHEMA, "model": model, "stages": options.stages, "tp": options.tp, "device": options.device,
            "prompt_tokens": finished["prompt_tokens"][0], "generated_tokens": options.max_tokens, "text": two.text[0],
            "fault": self.fault_seen(), "corruption": self.corruption, "recovery": recovered, "outage": self.outage,
            "identical": report.identical(one, two, options.max_tokens), "logits_identical": report.logits_identical(one, two), "kv_identical": kv,
            "tokens_before": one.tokens(), "tokens_after": two.tokens(), "replication": report.replication(stats), "overhead_percent": None,
            "conflicts": two.conflicts + [json.dumps(mark) for mark in self.client.marks.get("diverged", [])],
        }  # fmt: skip

    def fault_seen(self) -> dict | None:
        fault = self.fault
        if fault is None:
            return None
        return {"kind": fault.kind, "target": fault.target, "at_token": self.options.at_token, "at_position": self.at_position, "fired": fault.fired}

    def stats(self) -> list[dict]:
        return [self.world.query(node, "stats", {}) for node in self.world.nodes if node.daemon and node.daemon.alive()]


def positions(resumed: dict, sequences: int) -> list[int]:
    """Each sequence's resume position; 0 for one that started over."""
    named = {one["sequence"]: one["resume_position"] for one in resumed["sequences"]}
    return [named.get(i, 0) for i in range(sequences)]


def lost_sequences(world: World, epoch: int) -> int:
    """How many the coordinator gave up in that epoch's recovery, by its own history."""
    return next(len(one["lost"]) for one in reversed(world.history()) if one["epoch"] == epoch)


def timing_ms(world: World, client: Client, fault: Fault, run: str) -> dict:
    """Phases in ms; each starts where the last ended. All clocks are the machine's one monotonic clock."""
    resumed = fault.resumed
    told = resumed["timing_ms"]
    verdict_ns = next((one["verdict_ns"] for one in reversed(world.history()) if one["epoch"] == resumed["epoch"]), None)
    first = min((t_ns for t_ns, told_run in client.arrivals if told_run == run and t_ns > resumed["t_ns"]), default=None)
    return {
        "detect": (verdict_ns - fault.struck_ns) / 1e6 if verdict_ns else None, "fence": told.get("fence"), "plan": told.get("plan"),
        "restore": told.get("restore"), "first_token": (first - resumed["t_ns"]) / 1e6 if first else None,
        "total": (first - fault.struck_ns) / 1e6 if first else None,
    }  # fmt: skip


def run(options: Options, say=lambda line: None) -> dict:
    """The whole demo in a directory of its own, which is removed at the end (kept, and named, when the demo failed). Returns the document."""
    options.check()
    model = model_directory(options)
    shape = shape_of(model)
    layers = shape.get("num_hidden_layers", shape.get("n_layer"))
    described = {"name": shape.get("_name_or_path") or model.name, "layers": layers, "real_weights": options.model is None}
    if options.stages > (layers or 0):
        raise UsageFault(f"--stages {options.stages}: {described['name']} has {layers} layers. Try: --stages {layers}")
    prompts = prompts_of(options, model)
    root = own_directory()
    world = World(WorldSettings(root=root, model=model, stages=options.stages, device=DEVICES[options.device]))
    try:
        document = Demo(options, world, say).run(prompts, described)
    except Exception:
        world.stop()
        (root / SUPERVISED).unlink()
        say(f"the logs are in {root}/logs")
        raise
    except BaseException:  # stopped by its user: nothing went wrong that a log could tell
        world.stop()
        shutil.rmtree(root)
        raise
    world.stop()
    shutil.rmtree(root)
    return document


def own_directory() -> Path:
    """A new directory for a demo's world. Those of demos that were killed with SIGKILL, and could remove nothing, go first: nobody holds their lock."""
    parent = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    for left in parent.glob(f"{PREFIX}*/{SUPERVISED}"):
        try:
            with open(left, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left.parent)
        except OSError:  # its demo runs, it is another user's, or another demo removes it
            continue
    root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    fcntl.flock(os.open(root / SUPERVISED, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_EX)  # held for this process's life
    return root


def stopped(number: int, _frame) -> None:
    """SIGTERM ends the demo as Ctrl-C does: in order."""
    raise SystemExit(128 + number)


def main(output: str, **given) -> int:
    """What the command line calls: runs, prints the document or the table, returns the exit code."""
    from rich.console import Console

    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    signal.signal(signal.SIGTERM, stopped)
    document = run(Options(**given), say=lambda line: err.print(f"[dim]{line}[/dim]"))
    if output == "json":
        print(json.dumps(document, ensure_ascii=False, indent=1))
    else:
        out.print(document["text"], style="italic")
        report.render(document, out)
    return 0 if report.passed(document) else 1
