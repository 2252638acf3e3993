"""The settings of each process: defaults < TOML file < conf.d/*.toml beside it < environment < flags.

Knows: names, bounds and relations of settings, and where each value came from. Must not know: what the settings are used for.
Invariants: a value that leaves this file has passed every check; one load reports *all* faults, each with file, line and key (exit code 78).

A file has one section per process, `[node]`, `[coordinator]` and `[gateway]`; a file may hold several, and conf.d is shared, so a section that a process
doesn't use is left alone. Environment: KVGUARD_NODE_NAME for `name` in `[node]`, KVGUARD_COORDINATOR_DEAD_MS for `dead_ms` in `[coordinator]`, lists
joined by commas.
Sizes are integers in bytes or texts such as "512MiB". The same form serves nodes on loopback and on three hosts.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from kvguard.errors import BadConfig
from kvguard.limits import MIB, NAME_BYTES_MAX, PAYLOAD_BYTES_MAX, WINDOW_BYTES_DEFAULT

SIZES = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
LEVELS = ("debug", "info", "warning", "error")
ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")
URL = re.compile(r"(?P<scheme>https?)://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>\d{1,5}))?(/[A-Za-z0-9._~/-]*)?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def setting(default, kind: str, doc: str, low: int | None = None, high: int | None = None, choices: tuple[str, ...] = ()):
    """A field of a configuration. `kind`: name | path | address | url | bytes | int | bool | word | ints | instances | text."""
    metadata = {"kind": kind, "doc": doc, "low": low, "high": high, "choices": choices}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


REQUIRED = dataclasses.MISSING


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """`kvguard node`: one daemon a node."""

    SECTION = "node"

    name: str = setting(REQUIRED, "name", "this node's name, unique among all nodes of the coordinator")
    runtime_dir: str = setting("/run/kvguard", "path", "the Unix socket and the promises; on a tmpfs also the replicas, see keep_replicas")
    listen: str = setting("tcp://127.0.0.1:7420", "address", "where peers and the command line reach this daemon; port 0 takes a free one")
    advertise: str = setting("", "address", "how others reach `listen`; empty where it is that address itself")
    coordinator: str = setting("tcp://127.0.0.1:7400", "address", "the coordinator's address")
    arena_bytes: int = setting(1024 * MIB, "bytes", "budget for replicas held here for other nodes", MIB, 1 << 46)
    window_bytes: int = setting(WINDOW_BYTES_DEFAULT, "bytes", "KV in flight to one holder", PAYLOAD_BYTES_MAX, 1 << 32)
    heartbeat_ms: int = setting(100, "int", "how often the coordinator hears of this node; as in [coordinator]", 10, 60_000)
    poll_ms: int = setting(20, "int", "how often commit tables are looked at when no bell rings", 1, 10_000)
    hang_ms: int = setting(10_000, "int", "no step is called hung before this long, however fast the ones before it were", 100, 3_600_000)
    ids_retention_s: int = setting(300, "int", "how long token ids are kept after delivery", 0, 86_400)
    keys: str = setting("", "path", "file with this process's key and the peers that are allowed (`kvguard keys generate`); empty: no encryption")
    insecure: bool = setting(False, "bool", "true allows addresses off loopback without keys")
    device: str = setting("host", "word", "where pools live: shared memory, GPUs, or host memory that plays them", choices=("host", "cuda", "rehearsal"))
    capture: str = setting("engine", "word", "on a GPU: who packs a step's new slots, the engine into our ring or this daemon", choices=("engine", "daemon"))
    ring_bytes: int = setting(64 * MIB, "bytes", "on a GPU: device memory of each rank's ring; a step that doesn't fit is fetched later", MIB, 1 << 34)
    capture_bytes_per_s: int = setting(0, "bytes", "on a GPU: copies to host memory are held below this, for each rank; 0: as fast as they go", 0, 1 << 40)
    salvage_ms_max: int = setting(300, "int", "how long a dead engine's GPU memory is read before it is given back; this daemon does nothing else", 0, 10_000)
    uids: tuple[int, ...] = setting((), "ints", "users whose engines may attach; empty: only the daemon's own", 0, (1 << 32) - 2)
    fault_injection: bool = setting(False, "bool", "true lets drills damage replicas and frames on purpose; never in production")
    log_level: str = setting("info", "word", "least severity that is logged", choices=LEVELS)
    log_format: str = setting("text", "word", "a log line's form: text, or one JSON object", choices=("text", "json"))
    metrics: str = setting("", "address", "where Prometheus reads this process's metrics, such as tcp://127.0.0.1:9464; empty: nowhere")
    bulk_port: int = setting(0, "int", "where peers bring payloads, on the host of `listen`; 0 takes a free one. Say it where a firewall has to know", 0, 65535)

    transport: str = setting("zeromq", "word", "what payloads between nodes travel over: TCP beside ZeroMQ, or NIXL (extra rdma)", choices=("zeromq", "nixl"))
    nixl_devices: str = setting("", "text", 'the network devices that NIXL may use, as UCX names them: "mlx5_0:1"; it has no authentication of its own')
    nixl_tls: str = setting("rc,dc,ud", "text", "UCX's transports to choose from; tcp lets whoever reaches the device write into this daemon")
    keep_replicas: str = setting(
        "auto", "word", "where replicas stay while this daemon is away: with the service manager, in files of a runtime_dir on a tmpfs, or nowhere (no); "
        "auto: the first of these that there is", choices=("auto", "service", "files", "no"),
    )  # fmt: skip

    @property
    def socket_path(self) -> Path:
        return Path(self.runtime_dir) / "kvguard.sock"


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """`kvguard coordinator`."""

    SECTION = "coordinator"

    name: str = setting("coordinator", "name", "issuer of the epochs; two coordinators must not share it")
    listen: str = setting("tcp://127.0.0.1:7400", "address", "where nodes, emitters and the command line reach the coordinator")
    state_dir: str = setting("/var/lib/kvguard", "path", "the durable epochs and recoveries; on a disk that survives a reboot")
    replicas: int = setting(1, "int", "how many other nodes hold each rank's KV", 1, 8)
    heartbeat_ms: int = setting(100, "int", "how often nodes are heard of; as in [node]", 10, 60_000)
    suspect_ms: int = setting(500, "int", "silence after which a node is suspected: said, nothing is done", 30, 600_000)
    dead_ms: int = setting(1000, "int", "silence after which a node is dead, where nothing of it makes progress", 60, 600_000)
    emitter_ms: int = setting(1000, "int", "silence after which an emitter is dead that didn't say that its own may be longer", 60, 600_000)
    emitter_ms_max: int = setting(60_000, "int", "the longest silence that an emitter may say of itself", 60, 600_000)
    reattach_ms: int = setting(5000, "int", "how long ranks may stay away whose daemon was restarted; engines try again every 2 s", 100, 600_000)
    exclude_ms: int = setting(2000, "int", "how long a fence waits for a node's report before the node is excluded", 100, 600_000)
    seal_ms: int = setting(10_000, "int", "how long a fence waits for proof that nothing of the old epoch can be acknowledged any more", 100, 600_000)
    standby_ms: int = setting(60_000, "int", "how long a lost rank waits for a standby or a restarted process", 100, 3_600_000)
    restore_ms: int = setting(60_000, "int", "a planned recovery that takes longer begins again, or fails, explicitly", 1000, 86_400_000)
    move_after_ms: int = setting(0, "int", "how long a standby is waited for where the emitter can go on in another instance", 0, 3_600_000)
    moved_retention_s: int = setting(600, "int", "how long what goes on in another instance stays to be fetched if nobody says that it is delivered", 1, 86_400)
    failovers_per_window: int = setting(10, "int", "automatic failovers of one instance within `window_s`; more need an operator", 1, 10_000)
    window_s: int = setting(60, "int", "see failovers_per_window", 1, 86_400)
    metrics: str = setting("", "address", "where Prometheus reads this process's metrics, such as tcp://127.0.0.1:9464; empty: nowhere")
    on_failover: str = setting("", "path", "program that is run when a recovery begins, with one JSON document on its stdin; empty: none")
    on_recovered: str = setting("", "path", "program that is run when a recovery has ended, well or not")
    on_unprotected: str = setting("", "path", "program that is run when a rank is no longer protected")
    backoff_ms: int = setting(500, "int", "how long the fourth failover within `window_s` waits; twice as long each one after it; 0: none waits", 0, 600_000)
    keys: str = setting("", "path", "file with this process's key and the peers that are allowed (`kvguard keys generate`); empty: no encryption")
    insecure: bool = setting(False, "bool", "true allows addresses off loopback without keys")
    log_level: str = setting("info", "word", "least severity that is logged", choices=LEVELS)
    log_format: str = setting("text", "word", "a log line's form: text, or one JSON object", choices=("text", "json"))


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """`kvguard gateway`."""

    SECTION = "gateway"

    name: str = setting("gateway", "name", "this gateway's name among the coordinator's emitters; an instance has one emitter")
    listen: str = setting("http://127.0.0.1:8000", "url", "where clients reach the gateway; port 0 takes a free one")
    instances: tuple[str, ...] = setting(REQUIRED, "instances", 'the engine servers, each as "INSTANCE URL NODE": "llama-a http://10.0.0.1:8000 node-a"')
    tokenizer: str = setting(REQUIRED, "path", "the model's directory, or its tokenizer.json: text is made from token ids here")
    coordinator: str = setting("tcp://127.0.0.1:7400", "address", "the coordinator's address")
    chat: str = setting("followed", "word", "relayed: chats are never resumed; for servers with a reasoning parser", choices=("followed", "relayed"))
    seeded: str = setting("generator", "word", "how the engines draw seeded samples; only by position can they be resumed", choices=("generator", "position"))
    max_tokens_default: int = setting(0, "int", "max_new_tokens of the engines' generation config; 0: none, the context is the bound", 0, 1 << 24)
    in_flight_max: int = setting(256, "int", "requests at a time; more are refused with 429", 1, 65536)
    body_bytes_max: int = setting(8 * MIB, "bytes", "of a request's body", 1024, 1 << 30)
    attempts: int = setting(4, "int", "how many instances in turn are asked to go on with one answer", 1, 64)
    fence_ms: int = setting(3000, "int", "how long a lost answer waits for the coordinator's fence, before it is computed again elsewhere", 0, 600_000)
    resume_ms: int = setting(10_000, "int", "how long a fenced answer waits for its resume token, and then for an active instance", 100, 600_000)
    connect_ms: int = setting(2000, "int", "to connect to an instance", 10, 600_000)
    idle_ms: int = setting(120_000, "int", "silence after which an instance has lost an answer; longer than queue and prefill take", 100, 86_400_000)
    client_ms: int = setting(60_000, "int", "how long a client may take to send its request, or not to read its answer", 100, 86_400_000)
    probe_ms: int = setting(500, "int", "between two looks at each instance's health", 10, 600_000)
    silence_ms: int = setting(5000, "int", "silence after which the coordinator takes this gateway for dead; never less than its emitter_ms", 500, 600_000)
    drain_ms: int = setting(60_000, "int", "how long SIGTERM waits for the answers that are under way", 0, 86_400_000)
    keys: str = setting("", "path", "file with this process's key and the peers that are allowed (`kvguard keys generate`); empty: no encryption")
    insecure: bool = setting(False, "bool", "true allows addresses off loopback without keys")
    log_level: str = setting("info", "word", "least severity that is logged", choices=LEVELS)


KINDS: dict[str, type] = {cls.SECTION: cls for cls in (NodeConfig, CoordinatorConfig, GatewayConfig)}
Config = TypeVar("Config", NodeConfig, CoordinatorConfig, GatewayConfig)


class Fault(NamedTuple):
    """One thing that is wrong, and where it was said."""

    where: str
    key: str
    what: str
    attempt: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.what}. Try: {self.attempt}"


class Given(NamedTuple):
    """A value as found, not yet checked. `text`: it comes from the environment or a flag and may need parsing."""

    value: object
    where: str
    text: bool


def load(cls: type[Config], file: str | Path | None, flags: dict[str, object] | None = None, environ: dict[str, str] | None = None) -> Config:
    """The checked settings of one process. Raises BadConfig that lists every fault found."""
    return load_with_origins(cls, file, flags, environ)[0]


def load_with_origins(
    cls: type[Config], file: str | Path | None, flags: dict[str, object] | None = None, environ: dict[str, str] | None = None
) -> tuple[Config, dict[str, str]]:
    """As load; also where each value came from ("default", "FILE:LINE", a variable's or a flag's name), by key."""
    faults: list[Fault] = []
    given: dict[str, Given] = {}
    for path in layers(file, faults):
        given.update(read_section(cls, path, faults))
    given.update(read_environment(cls, os.environ if environ is None else environ, faults))
    for key, value in (flags or {}).items():
        if value is not None:
            given[key] = Given(value, f"flag --{key.replace('_', '-')}", True)
    values, origins = checked_values(cls, given, faults)
    faults += relations(cls, values, lambda key: given[key].where if key in given else "default")
    if faults:
        raise BadConfig("\n".join(map(str, faults)))
    return cls(**values), origins


def layers(file: str | Path | None, faults: list[Fault]) -> list[Path]:
    """The file, then conf.d/*.toml beside it in order of their names."""
    if file is None:
        return []
    path = Path(file)
    if not path.is_file():
        faults.append(Fault(str(path), "-", "there is no such file", f"kvguard config init > {path}"))
        return []
    return [path, *sorted((path.parent / "conf.d").glob("*.toml"))]


def parse(path: Path, faults: list[Fault]) -> tuple[dict, list[str]]:
    """Tables and lines of a TOML file; empty, with a fault, where it isn't one."""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text.splitlines()
    except OSError as error:
        faults.append(Fault(str(path), "-", f"can't be read: {error.strerror}", "give this user read permission"))
    except UnicodeDecodeError:
        faults.append(Fault(str(path), "-", "isn't UTF-8 text", "save it as UTF-8"))
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        faults.append(Fault(f"{path}:{found[1] if found else 1}", "-", f"isn't TOML: {error}", 'key = "value", one a line'))
    return {}, []


def line_of(lines: list[str], section: str, key: str | None) -> int:
    """The line (from 1) that sets `key` in `section`, or that opens the section: tomllib keeps no positions. 1 where it can't be told."""
    inside, opened = False, 1
    for number, line in enumerate(lines, 1):
        header = re.match(r"\s*\[\s*\"?([^\]\"]+?)\"?\s*\]", line)
        if header:
            inside = header[1] == section
            opened = number if inside else opened
            if inside and key is None:
                return number
        elif key is not None and re.match(rf"\s*{'' if inside else re.escape(section) + r'[.]'}\"?{re.escape(key)}\"?\s*=", line):
            return number
    return opened


def read_section(cls: type[Config], path: Path, faults: list[Fault]) -> dict[str, Given]:
    """What one file says in this process's section."""
    tables, lines = parse(path, faults)
    names = [field.name for field in dataclasses.fields(cls)]
    for section in tables:
        if section not in KINDS:
            near = difflib.get_close_matches(section, KINDS, 1) or [cls.SECTION]
            faults.append(Fault(f"{path}:{top_line(lines, section)}", section, "is not a section of kvguard", f"[{near[0]}]"))
    table = tables.get(cls.SECTION, {})
    if not isinstance(table, dict):
        faults.append(Fault(f"{path}:{top_line(lines, cls.SECTION)}", cls.SECTION, "is not a section", f"[{cls.SECTION}]"))
        return {}
    found = {}
    for key, value in table.items():
        where = f"{path}:{line_of(lines, cls.SECTION, key)}"
        if key in names:
            found[key] = Given(value, where, False)
        else:
            near = difflib.get_close_matches(key, names, 1)
            faults.append(Fault(where, key, f"is not a setting of [{cls.SECTION}]", near[0] if near else f"one of {', '.join(names)}"))
    return found


def top_line(lines: list[str], name: str) -> int:
    """The line of a section's header or of a top-level key."""
    pattern = re.compile(rf"\s*(\[\s*)?\"?{re.escape(name)}\b")
    return next((number for number, line in enumerate(lines, 1) if pattern.match(line)), 1)


def read_environment(cls: type[Config], environ, faults: list[Fault]) -> dict[str, Given]:
    """KVGUARD_<SECTION>_<KEY>. A variable of the section that names no setting is a fault: a misspelt one would be lost silently."""
    prefix = f"KVGUARD_{cls.SECTION.upper()}_"
    names = {field.name for field in dataclasses.fields(cls)}
    found = {}
    for variable in sorted(environ):
        if variable.startswith(prefix):
            key = variable[len(prefix) :].lower()
            if key in names:
                found[key] = Given(environ[variable], f"environment {variable}", True)
            else:
                near = difflib.get_close_matches(key, sorted(names), 1)
                faults.append(Fault(f"environment {variable}", key, f"is not a setting of [{cls.SECTION}]", near[0] if near else f"unset {variable}"))
    return found


def checked_values(cls: type[Config], given: dict[str, Given], faults: list[Fault]) -> tuple[dict[str, object], dict[str, str]]:
    """Values that passed their own check, and the origin of each setting."""
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        origins[field.name] = "default"
        if field.name not in given:
            if field.default is REQUIRED:
                faults.append(Fault(f"[{cls.SECTION}]", field.name, f"is missing: {field.metadata['doc']}", f'{field.name} = "..."'))
            else:
                values[field.name] = field.default
            continue
        one = given[field.name]
        origins[field.name] = one.where
        try:
            values[field.name] = converted(field, one.value, one.text)
        except ValueError as error:
            what, _, attempt = str(error).partition("|")
            faults.append(Fault(one.where, field.name, what, attempt or example(field)))
    return values, origins


def example(field) -> str:
    return f"{field.name} = {literal(field.default) if field.default is not REQUIRED else literal('...')}"


def converted(field, value, text: bool):
    """The value in its type. Raises ValueError("what|attempt")."""
    kind = field.metadata["kind"]
    if kind in ("int", "bytes"):
        return bounded(field, as_int(value, kind, text))
    if kind == "ints":
        parts = [part for part in value.split(",") if part] if text and isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise ValueError(f"{value!r} is not a list of integers|{field.name} = [1000]")
        return tuple(bounded(field, as_int(part, "int", text)) for part in parts)
    if kind == "instances":
        return checked_instances(field, [part for part in value.split(",") if part] if text and isinstance(value, str) else value)
    if kind == "bool":
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text and isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false|{field.name} = true")
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return checked_text(field, kind, value)


def checked_instances(field, values) -> tuple[str, ...]:
    """Lines of instance, URL and node, each instance once. Raises ValueError("what|attempt")."""
    attempt = f'{field.name} = ["llama-a http://10.0.0.1:8000 node-a"]'
    if not isinstance(values, list | tuple) or not values or not all(isinstance(one, str) for one in values):
        raise ValueError(f"{values!r} is not a list of texts|{attempt}")
    for one in values:
        parts = one.split()
        if len(parts) != 3 or not NAME.fullmatch(parts[0]) or not URL.fullmatch(parts[1]) or not NAME.fullmatch(parts[2]):
            raise ValueError(f'{one!r} is not "INSTANCE URL NODE"|{attempt}')
    names = [one.split()[0] for one in values]
    twice = next((name for name in names if names.count(name) > 1), "")
    if twice:
        raise ValueError(f"instance {twice!r} is listed twice|{attempt}")
    return tuple(" ".join(one.split()) for one in values)


def checked_text(field, kind: str, value: str) -> str:
    if kind == "word" and value not in field.metadata["choices"]:
        raise ValueError(f"{value!r} is none of {', '.join(field.metadata['choices'])}")
    if kind == "name" and not (NAME.fullmatch(value) and len(value.encode()) <= NAME_BYTES_MAX):
        raise ValueError(f'{value!r} is not a name (letters, digits, ".", "_", "-", at most {NAME_BYTES_MAX} bytes)|{field.name} = "node-1"')
    if kind == "address" and (value or field.default != ""):
        found = ADDRESS.fullmatch(value)
        if not found or int(found["port"]) > 65535:
            raise ValueError(f'{value!r} is not an address|{field.name} = "tcp://127.0.0.1:7420"')
    if kind == "url" and not ((found := URL.fullmatch(value)) and found["scheme"] == "http" and found["port"] and int(found["port"]) <= 65535):
        raise ValueError(f'{value!r} is not an address for clients|{field.name} = "http://127.0.0.1:8000"')
    if kind == "path" and (value or field.default != "") and not os.path.isabs(value):
        raise ValueError(f'{value!r} is not an absolute path|{field.name} = "/run/kvguard"')
    return value


def as_int(value, kind: str, text: bool) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (text or kind == "bytes"):
        found = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", value)
        if found and (found[2].upper() in SIZES if kind == "bytes" else not found[2]):
            return int(found[1]) * SIZES[found[2].upper()]
    raise ValueError(f"{value!r} is not {'a size' if kind == 'bytes' else 'an integer'}")


def bounded(field, value: int) -> int:
    low, high = field.metadata["low"], field.metadata["high"]
    if not low <= value <= high:
        raise ValueError(f"{value} is outside {low}..{high}|{field.name} = {min(max(value, low), high)}")
    return value


def on_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine alone. Host names other than localhost are taken to be elsewhere."""
    host = ADDRESS.fullmatch(address)["host"].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def relations(cls: type[Config], values: dict[str, object], where) -> list[Fault]:
    """Faults between values that are each good alone; a relation is judged only where all its values are."""
    faults = []

    def judge(keys: tuple[str, ...], broken, what: str, attempt) -> None:
        if all(key in values for key in keys) and broken(*(values[key] for key in keys)):
            origin = next((where(key) for key in keys if where(key) != "default"), f"[{cls.SECTION}]")
            faults.append(Fault(origin, keys[0], what, attempt(*(values[key] for key in keys))))

    secured = ("keys", "insecure")
    for key in ("listen", "advertise", "coordinator"):
        if values.get(key) and ADDRESS.fullmatch(values[key]):  # a gateway's clients come by HTTP, and bring no keys
            judge(
                (key, *secured), lambda a, k, i: not on_loopback(a) and not k and not i, "leaves this machine without keys",
                lambda *_: 'keys = "/etc/kvguard/key" (`kvguard keys generate`), or insecure = true on a network that you trust',
            )  # fmt: skip
    judge(
        ("transport", "nixl_devices"), lambda t, d: t == "nixl" and not d, "needs nixl_devices: UCX would listen at every interface",
        lambda *_: 'nixl_devices = "mlx5_0:1"',
    )  # fmt: skip
    anywhere = ("tcp://0.0.0.0:", "tcp://[::]:")
    judge(
        ("advertise", "listen"), lambda a, b: (a or b).startswith(anywhere), "others can't reach this node at a wildcard address",
        lambda *_: 'advertise = "tcp://THIS_HOST:PORT"',
    )  # fmt: skip
    judge(
        ("suspect_ms", "heartbeat_ms"), lambda s, h: h * 3 > s, "is less than three heartbeats: one that is late would raise suspicion",
        lambda s, h: f"suspect_ms = {h * 3}",
    )  # fmt: skip
    judge(("dead_ms", "suspect_ms"), lambda d, s: d < s, "is less than suspect_ms", lambda d, s: f"dead_ms = {s * 2}")
    judge(("seal_ms", "exclude_ms"), lambda s, e: s < e, "is less than exclude_ms", lambda s, e: f"seal_ms = {e * 2}")
    return faults


def literal(value) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal, value))}]"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def template(cls: type[Config], values: dict[str, object] | None = None) -> str:
    """A commented section: given values are set, the others stand as comments with their defaults."""
    values = values or {}
    lines = [f"[{cls.SECTION}]"]
    for field in dataclasses.fields(cls):
        known = values.get(field.name)
        lines.append(f"# {field.metadata['doc']}")
        if known is not None:
            lines.append(f"{field.name} = {literal(known)}")
        elif field.default is REQUIRED:
            lines.append(f'{field.name} = ""  # required')
        else:
            lines.append(f"# {field.name} = {literal(field.default)}")
    return "\n".join(lines) + "\n"
