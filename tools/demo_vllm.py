"""The demonstration behind tools/demo_vllm.sh: a text undisturbed, the same text with the server killed in the middle, both compared.

Knows: the tests' world of two vLLM servers, the gateway's command line, what a client sees. Must not know: how any of it works.
Exit code 0 where the streams are equal and the KV was restored, not computed again; else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import httpx
from front import Gateway  # tests/vllm, on PYTHONPATH
from running import ending_in_order
from world import MODEL, World

DIM, RED, GREEN, PLAIN = ("\033[2m", "\033[31m", "\033[32m", "\033[0m") if sys.stdout.isatty() else ("", "", "", "")


def say(line: str) -> None:
    print(f"{DIM}{line}{PLAIN}", flush=True)


def stream(url: str, question: str, tokens: int, kill_at: int, kill) -> tuple[str, dict, float]:
    """The answer's text, its usage and the longest pause between two chunks in ms; `kill` is called after so many chunks."""
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    text, usage, chunks, stall_ms, last = "", {}, 0, 0.0, time.monotonic()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=300, trust_env=False) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            document = json.loads(line[6:])
            if "error" in document:
                raise SystemExit(f"the stream ended in an error: {document['error']['message']}")
            usage = document.get("usage") or usage
            for choice in document["choices"]:
                now = time.monotonic()
                stall_ms, last = (max(stall_ms, (now - last) * 1000) if chunks > 1 else 0.0), now
                text += choice["delta"]["content"]
                print(choice["delta"]["content"], end="", flush=True)
            chunks += 1
            if chunks == kill_at:
                kill()
    print(flush=True)
    return text, usage, stall_ms


def show(world: World, gateway: Gateway, arguments: argparse.Namespace) -> bool:
    url = gateway.url
    say(f"\nundisturbed, greedy, at most {arguments.max_tokens} tokens:")
    wanted, usage, _ = stream(url, arguments.question, arguments.max_tokens, 0, None)

    def kill() -> None:
        print(f"{RED}[SIGKILL to smol-a]{PLAIN}", end="", flush=True)
        world.servers["smol-a"].kill()

    say(f"\nthe same, and the server that serves it is killed after {arguments.kill_at} chunks:")
    text, usage_after, stall_ms = stream(url, arguments.question, arguments.max_tokens, arguments.kill_at, kill)
    rungs = gateway.rungs()
    outcome = httpx.get(f"{world.servers['smol-b'].url}/metrics", timeout=10, trust_env=False).text
    hits = [float(line.split()[-1]) for line in outcome.splitlines() if line.startswith("vllm:external_prefix_cache_hits_total")]
    if not rungs:
        print(f"{RED}the answer was over before the kill{PLAIN}. Try: a smaller --kill-at, or another --question")
        return False
    same = (text, usage_after) == (wanted, usage)
    colour = GREEN if same else RED
    say("")
    print(f"{colour}text and usage {'identical' if same else 'DIFFERENT'}{PLAIN}; rung: {', '.join(rungs)}; ", end="")
    print(f"{sum(hits):.0f} positions restored into smol-b; longest pause {stall_ms:.0f} ms")
    return same and sum(hits) > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default="Explain in a few sentences how a lighthouse works.")
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--kill-at", type=int, default=25, help="chunks of the second run after which the server is killed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvguard-demo-vllm-") as directory:
        world = World(Path(directory))
        try:
            say("a coordinator, two nodes, two vLLM servers (half a minute) ...")
            world.start_daemons()
            for name in ("a", "b"):
                world.start_server(name, wait=False)
            for server in world.servers.values():
                world.wait_ready(server)
            gateway = Gateway(world)
            say(f"an OpenAI-compatible gateway at {gateway.url}")
            return 0 if show(world, gateway, arguments) else 1
        finally:
            world.stop()


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
