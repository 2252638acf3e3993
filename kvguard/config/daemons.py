"""The settings of the two daemons, `[node]` and `[coordinator]`.

Knows: names, defaults and bounds. Must not know: where values come from, what they are used for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvguard.config.setting import LEVELS, REQUIRED, setting
from kvguard.limits import HEADER_BYTES_MAX, MIB, PAYLOAD_BYTES_MAX, WINDOW_BYTES_DEFAULT

NIXL_ZONE_BYTES_MIN = 2 * (HEADER_BYTES_MAX + PAYLOAD_BYTES_MAX) + MIB  # two of the largest frames, one on each side of half a zone


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
    salvage_ms_max: int = setting(300, "int", "how long a dead engine's GPU memory is read before it is given back; a recovery waits for it", 0, 10_000)
    uids: tuple[int, ...] = setting((), "ints", "users whose engines may attach; empty: only the daemon's own", 0, (1 << 32) - 2)
    fault_injection: bool = setting(False, "bool", "true lets drills damage replicas and frames on purpose; never in production")
    log_level: str = setting("info", "word", "least severity that is logged", choices=LEVELS)
    log_format: str = setting("text", "word", "a log line's form: text, or one JSON object", choices=("text", "json"))
    metrics: str = setting("", "address", "where Prometheus reads this process's metrics, such as tcp://127.0.0.1:9464; empty: nowhere")
    bulk_port: int = setting(0, "int", "where peers bring payloads, on the host of `listen`; 0 takes a free one. Say it where a firewall has to know", 0, 65535)

    transport: str = setting("zeromq", "word", "what payloads between nodes travel over: TCP beside ZeroMQ, or NIXL (extra rdma)", choices=("zeromq", "nixl"))
    nixl_devices: str = setting("", "text", 'the network devices that NIXL may use, as UCX names them: "mlx5_0:1"; it has no authentication of its own')
    nixl_tls: str = setting("rc,dc,ud", "text", "UCX's transports to choose from; tcp lets whoever reaches the device write into this daemon")
    nixl_zone_bytes: int = setting(32 * MIB, "bytes", "over NIXL: memory of this daemon that one peer may write, for each link", NIXL_ZONE_BYTES_MIN, 1 << 34)
    nixl_lent_bytes: int = setting(32 * MIB, "bytes", "over NIXL: memory that captures are made in and sent from, for all links", MIB, 1 << 34)
    nixl_stuck_ms: int = setting(10_000, "int", "over NIXL: a write that the peer doesn't take for so long ends the link; payloads take TCP", 1000, 600_000)
    nixl_quarantine_s: int = setting(
        0, "int", "over NIXL: how long a dead link's addresses stay out of use, so that a write that was stuck lands nowhere; 0: while this daemon lives",
        0, 31_536_000,
    )  # fmt: skip
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
    pool_ms: int = setting(50, "int", "how long a plan waits for the memory of a process that is being torn down where replicas do as well", 0, 60_000)
    pool_lag_tokens: int = setting(64, "int", "where replicas have so many tokens less of a sequence, it is waited for up to standby_ms", 0, 1_000_000)
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
