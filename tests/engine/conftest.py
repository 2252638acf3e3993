"""A daemon of a few lines, and where it listens."""

from __future__ import annotations

import pytest
from tests.engine.tiny_daemon import TinyDaemon


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "node.sock")


@pytest.fixture
def daemon(path):
    daemon = TinyDaemon(path)
    yield daemon
    daemon.close()
