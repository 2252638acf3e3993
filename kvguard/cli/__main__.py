"""`python -m kvguard.cli`: the command line where its script isn't on the PATH."""

from __future__ import annotations

from kvguard.cli import main

main()
