"""Tests of the vLLM adapter, run by tools/test_vllm.sh in an environment that has vLLM; without it they are not collected."""

from __future__ import annotations

import importlib.util

import pytest

from tests.engine.conftest import daemon, path  # noqa: F401 (fixtures of test_parts.py)

_found = importlib.util.find_spec("vllm")  # this very folder looks like a package without a file
HAS_VLLM = _found is not None and _found.origin is not None
NEED_VLLM = ["test_gateway.py", "test_layouts.py", "test_parallel.py", "test_servers.py", "test_storms.py", "test_vllm_interface.py", "test_vllm_scheduler.py"]
collect_ignore = [] if HAS_VLLM else NEED_VLLM


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two servers, two nodes, a coordinator; made once, because a server takes half a minute to start."""
    from world import World

    made = World(tmp_path_factory.mktemp("world"))
    try:
        made.start_daemons()
        for name in ("a", "b"):
            made.start_server(name, wait=False)
        for server in made.servers.values():
            made.wait_ready(server)
        yield made
    finally:
        made.stop()
