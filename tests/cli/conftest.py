"""The command line through its real entry point."""

from __future__ import annotations

import pytest

from kvguard.cli import main


@pytest.fixture
def cli(capsys):
    """Runs a command line; returns exit code, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run
