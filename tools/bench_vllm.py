"""What kvguard costs vLLM, and what it saves: decode throughput with and without it, and the first token of a resumed request against vLLM's own
re-prefill, and against LMCache's restoring.

    PYTHONPATH=. $(tools/setup_vllm.sh) tools/bench_vllm.py [--pairs 10] [--streams 8] [--tokens 64] [--context 1500] [--resumes 6]
                                                            [--lmcache PYTHON] [--lmcache-resumes 6] [-o FILE]

Each part by itself: `--resumes 0` is throughput alone, `--pairs 0` resumption alone, both with `--lmcache` LMCache alone. Every server, pair and resumption
is a line on stderr; FILE holds what is known at every moment (`complete`: whether that is all), so that no limit loses more than the round under way.
Exit code 143 at SIGTERM, 130 at Ctrl-C: with the servers ended and what was found printed.

Throughput: two servers of the same model live at once, one guarded (its daemon, another node that holds its replica, a coordinator), one bare, both bound to
the same core; only one has work at any time. Pairs alternate; `ratio` is the median over pairs of guarded / bare, with a bootstrap interval of 95 %; `control`
is the bare server against itself. Tokens are counted from when all streams have their first one until the first stream ends.

Resume: sequences of `--context` tokens run in A, A is killed, and each goes on in B twice, in alternating order: with its moved token, and as a plain request
with nothing cached. Times are from the request to its first new token, at the client.

LMCache: the same in two servers with LMCache's connector beside its server, generated tokens saved too, in chunks of a block: A runs and is killed, B gets
prompt and generated ids; `plain` is a prompt of the same length that LMCache has never seen. PYTHON: of an environment with vLLM and lmcache (docs/vllm.md).

Knows: tests/vllm/world.py, emitters. Must not know: how replication works. Invariant: a run that is not whole ends the program.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "vllm"))
from running import Report, ending_in_order, whole
from world import World

from kvguard import emitter
from kvguard.emitter import moves
from kvguard.pipeline.ports import free_ports

RESAMPLES = 10_000
ALIVE_S = 600.0


def prompt_of(number: int, tokens: int) -> list[int]:
    """Ids that no other number's prompt begins with."""
    return [(11 * position + 137 * number + position * position // 7) % 20000 + 100 for position in range(tokens)]


def throughput(server, streams: int, prompt_tokens: int, tokens: int, label: str) -> float:
    """Tokens per second while all streams decode. Raises RuntimeError for a run that isn't whole."""
    times: list[list[float]] = [[] for _ in range(streams)]

    def run(n: int) -> None:
        for ids, _ in server.stream(prompt_of(zlib.crc32(f"{label} {n}".encode()) % 10**6, prompt_tokens), tokens, f"{label}-{n}"):
            times[n] += [time.perf_counter()] * len(ids)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ALIVE_S)
    if any(len(one) != tokens for one in times):
        raise RuntimeError(f"{label}: {[len(one) for one in times]} tokens of {tokens}")
    since, until = max(one[0] for one in times), min(one[-1] for one in times)
    return sum(sum(since < at <= until for at in one) for one in times) / (until - since)


def interval(values: list[float]) -> dict:
    """Median, and a bootstrap interval of 95 % for it."""
    drawn = np.random.default_rng(0).choice(np.array(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"median": round(float(np.median(values)), 4), "low": round(float(low), 4), "high": round(float(high), 4), "n": len(values)}


def measured_overhead(world: World, report: Report, pairs: int, streams: int, tokens: int) -> None:
    guarded, bare = world.servers["smol-a"], world.servers["smol-c"]
    rates: dict[str, list[float]] = {"guarded": [], "bare": [], "control": []}
    for server in (guarded, bare):
        throughput(server, streams, 32, 16, f"warm-{server.url[-5:]}")
    for pair in range(pairs):
        order = [("guarded", guarded), ("bare", bare), ("control", bare)]
        for name, server in order if pair % 2 else reversed(order):
            rates[name].append(throughput(server, streams, 32, tokens, f"{name}-{pair}"))
        ratios = [a / b for a, b in zip(rates["guarded"], rates["bare"], strict=True)]
        controls = [a / b for a, b in zip(rates["control"], rates["bare"], strict=True)]
        report.keep(throughput={
            "ratio": interval(ratios), "control": interval(controls), "target": 0.97, "streams": streams, "tokens": tokens,
            "tokens_per_s": {name: round(float(np.median(rate)), 2) for name, rate in rates.items()},
        })  # fmt: skip
        newest = ", ".join(f"{name} {rate[-1]:.1f}" for name, rate in rates.items())
        report.say(f"pair {pair + 1} of {pairs}: {newest} tokens/s, ratio {ratios[-1]:.3f}")


def first_token_ms(server, prompt: list[int], name: str, **more) -> float:
    began = time.perf_counter()
    for ids, _ in server.stream(prompt, 2, name, ALIVE_S, **more):
        if ids:
            return 1e3 * (time.perf_counter() - began)
    raise RuntimeError(f"{name}: no token came")


def compared(restored: list[float], computed: list[float]) -> dict:
    ratios = [x / y for x, y in zip(restored, computed, strict=True)]
    return {"ratio": interval(ratios), "restored_ms": [round(ms, 1) for ms in restored], "computed_ms": [round(ms, 1) for ms in computed]}


def measured_resume(world: World, report: Report, context: int, resumes: int) -> None:
    a, b = world.servers["smol-a"], world.servers["smol-b"]
    outlet = emitter.connect("smol-a", world.coordinator, moves=True)
    got: dict[str, list[int]] = {f"moving-{n}": [] for n in range(resumes)}
    prompts = {name: prompt_of(5000 + n, context - 20) for n, name in enumerate(got)}

    def run(name: str) -> None:
        for ids, _ in a.stream(prompts[name], 400, name, ALIVE_S):
            got[name] += ids

    try:
        outlet.welcome(30.0)
        outlet.scheduled(resumes)
        threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in got]
        for thread in threads:
            thread.start()
        def are_there(count: int) -> bool:
            short = [name for name, thread in zip(got, threads, strict=True) if not thread.is_alive() and len(got[name]) < 20]
            if short:
                raise RuntimeError(f"{', '.join(short)} ended before 20 tokens: was this machine too busy? Try: with nothing beside")
            return sum(len(ids) >= 20 for ids in got.values()) >= count

        for count in range(1, resumes + 1):  # one after another: a prefill of 1,500 tokens takes half a minute on a CPU without instructions for bf16
            world.until("all contexts", lambda count=count: are_there(count), ALIVE_S)
            report.say(f"context {count} of {resumes} is there")
        killed = time.perf_counter()
        a.kill()
        resumption = outlet.resume(60.0)
        recovered_ms = 1e3 * (time.perf_counter() - killed)
        outlet.adopt(resumption)
        first = {"target": 0.1, "kill_to_resumption_ms": round(recovered_ms, 1), "timing_ms": resumption.timing_ms}
        report.keep(resume=first)
        report.say(f"killed, and resumption after {recovered_ms:.0f} ms")
        tokens = {token.sequence: token for token in resumption}
        first_token_ms(b, prompt_of(9000, context), "warm")
        restored, computed, positions = [], [], []
        for n, name in enumerate(got):
            token, known = tokens[name], max(prompts[name] + got[name], [*tokens[name].prefix, *tokens[name].tokens], key=len)
            ways = [("moved", {"kv_transfer_params": {"kvguard": moves.encode(token)}}, restored), ("plain", {"cache_salt": f"plain-{n}"}, computed)]
            for way, more, into in ways if n % 2 else reversed(ways):
                into.append(first_token_ms(b, known, f"{way}-{n}", **more))
            positions.append((token.position, len(known)))
            report.keep(resume={**compared(restored, computed), **first, "positions": positions})
            report.say(f"resume {n + 1} of {resumes}: restored {restored[-1]:.0f} ms, computed {computed[-1]:.0f} ms")
        outlet.delivered(list(got))
    finally:
        outlet.close()


def measured_lmcache(directory: Path, report: Report, python: str, context: int, resumes: int) -> None:
    """LMCache's server and two vLLM servers of its own, gone at the end."""
    world, port = World(directory, ("a", "b")), free_ports(1)[0]
    memory = f"kvguard-bench-{os.getpid()}"
    command = [
        python, "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1", "--port", str(port), "--chunk-size", "32", "--l1-size-gb", "1",
        "--eviction-policy", "LRU", "--supported-transfer-mode", "engine_driven", "--shm-name", memory,
    ]  # fmt: skip
    where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port, "lmcache.mp.save_decode_cache": True}
    transfer = {"kv_connector": "LMCacheMPConnector", "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector", "kv_role": "kv_both",
                "kv_connector_extra_config": where}  # fmt: skip
    own = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
    store = None
    try:
        with open(directory / "lmcache.log", "ab") as log, whole():
            store = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory, env=own)
        bound = {"VLLM_CPU_OMP_THREADS_BIND": str(sorted(os.sched_getaffinity(0))[0]), "LMCACHE_TRACK_USAGE": "false"}
        for name in ("a", "b"):
            world.start_server(name, "--kv-transfer-config", json.dumps(transfer), wait=False, kvguard=False, python=python, env=bound)
        wait_ready(world, report)
        a, b = world.servers["smol-a"], world.servers["smol-b"]
        known = []
        for n in range(resumes):
            prompt = prompt_of(5000 + n, context - 20)
            known.append(prompt + a.complete(prompt, 20, f"lmcache-{n}")["choices"][0]["token_ids"])
            report.say(f"context {n + 1} of {resumes} is there")
        a.kill()
        first_token_ms(b, prompt_of(9000, context), "warm")
        restored, computed, positions = [], [], []
        for n, ids in enumerate(known):
            before = external_hits(b)
            ways = [("moved", ids, restored), ("plain", prompt_of(7000 + n, len(ids)), computed)]
            for way, prompt, into in ways if n % 2 else reversed(ways):
                into.append(first_token_ms(b, prompt, f"lmcache-{way}-{n}"))
            positions.append((int(external_hits(b) - before), len(ids)))
            report.keep(lmcache={**compared(restored, computed), "positions": positions})
            report.say(f"resume {n + 1} of {resumes}: restored {restored[-1]:.0f} ms, computed {computed[-1]:.0f} ms")
    finally:
        with whole():
            world.stop()
            if store is not None:
                store.terminate()
                store.wait(30)
            Path(f"/dev/shm/lmcache_l1_pool_{memory}").unlink(missing_ok=True)


def external_hits(server) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:  # noqa: S310 (loopback)
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:external_prefix_cache_hits_total"))


def wait_ready(world: World, report: Report) -> None:
    for name, server in world.servers.items():
        world.wait_ready(server)
        report.say(f"{name} answers at {server.url}")


def measured_beside(directory: Path, report: Report, pairs: int, streams: int, tokens: int, context: int, resumes: int) -> None:
    """Both parts with kvguard's own world: what a part doesn't need isn't started."""
    world = World(directory, ("a", "b", "c"))
    names = ["a", *(["b"] if resumes else []), *(["c"] if pairs else [])]
    try:
        with report.part("start"):
            world.start_daemons()
            core = {"VLLM_CPU_OMP_THREADS_BIND": str(sorted(os.sched_getaffinity(0))[0])}
            for name in names:
                world.start_server(name, wait=False, kvguard=name != "c", env=core)
            wait_ready(world, report)
        if pairs:
            with report.part("throughput"):
                measured_overhead(world, report, pairs, streams, tokens)
        if resumes:
            with report.part("resume"):
                measured_resume(world, report, context, resumes)
    finally:
        world.stop()


@click.command()
@click.option("--pairs", default=10, show_default=True, help="0: no throughput.")
@click.option("--streams", default=8, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Of each stream of a throughput run.")
@click.option("--context", default=1500, show_default=True)
@click.option("--resumes", default=6, show_default=True, help="0: no resumption.")
@click.option("--lmcache", default="", help="The python of an environment with vLLM and lmcache: resumption with it, too.")
@click.option("--lmcache-resumes", default=6, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False), default=None)
def main(pairs: int, streams: int, tokens: int, context: int, resumes: int, lmcache: str, lmcache_resumes: int, output: str | None) -> None:
    first = {
        "model": "SmolLM2-135M, bfloat16", "machine": f"{os.cpu_count()} cores, {platform.machine()}, CPU only", "vllm": "0.32.0 (vllm-cpu)",
        "load_1min_at_start": os.getloadavg()[0], "took_s": {},
    }  # fmt: skip
    with ending_in_order(), Report(output, **first) as report, tempfile.TemporaryDirectory(prefix="kvguard-bench-vllm-") as directory:
        if pairs or resumes:
            measured_beside(Path(directory) / "kvguard", report, pairs, streams, tokens, context, resumes)
        if lmcache:
            with report.part("lmcache"):
                measured_lmcache(Path(directory) / "lmcache", report, lmcache, context, lmcache_resumes)


if __name__ == "__main__":
    main()
