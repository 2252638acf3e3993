"""What a link carries, against a raw TCP socket of the same run: frames of 64 KiB to 4 MiB between two processes, in alternating pairs.

    python tools/bench_stream.py [--pairs 12] [--megabytes 192] [-o table|json]

Everything is in kvguard/capacity/link.py, of which this is the long form; `kvguard bench` is the short one.
"""

from __future__ import annotations

import argparse
import json
import sys

from kvguard.capacity import link
from kvguard.limits import KIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--megabytes", type=int, default=192, help="payload a run")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    options = parser.parse_args()
    with link.loopback() as address:
        rows = link.measure(address, link.SIZES, options.pairs, options.megabytes * 1_000_000)["rows"]
    if options.output == "json":
        print(json.dumps({"schema": "kvguard.bench_stream/1", "rows": rows}))
        return 0
    print(f"{'frame':>8} {'raw TCP':>9} {'bulk':>9} {'control':>9}   bulk / raw (median of {options.pairs} pairs, lowest, highest)")
    for row in rows:
        speeds = " ".join(f"{row[f'{way}_gb_s']:>4.2f} GB/s" for way in link.WAYS)
        print(f"{row['frame_bytes'] // KIB:>4} KiB {speeds}   {row['ratio']:.2f}  {row['ratio_low']:.2f}  {row['ratio_high']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
