"""Stands in for `vllm.entrypoints.openai.api_server` where only a program's handling of servers is tested: its options, /health, streamed completions, a child
that takes no notice of SIGTERM and has a file in /dev/shm, as an engine has. `SLOW` in the environment: it never becomes ready.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STEP_S = 0.005


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *_) -> None:
        return

    def do_GET(self) -> None:
        self.send_response(503 if os.environ.get("SLOW") else 200)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()
        for number in range(body["max_tokens"]):
            time.sleep(STEP_S)
            choice = {"index": 0, "text": "x", "token_ids": [number], "finish_reason": None}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


def engine() -> None:
    """Like an engine's process: nothing but SIGKILL ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(f"/dev/shm/psm_kvguard_test_{os.getpid()}", "w+b") as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096):
            signal.pause()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    if os.fork() == 0:
        engine()
    arguments, _ = parser.parse_known_args()
    ThreadingHTTPServer(("127.0.0.1", arguments.port), Answer).serve_forever()
