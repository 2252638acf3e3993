"""One seed, told: python -m simulation SEED [-v], with tests/ on PYTHONPATH (tools/simulate_seeds.sh does it)."""

from __future__ import annotations

import logging
import sys
import time

from simulation.world import World


def main() -> int:
    logging.disable(logging.CRITICAL)
    seeds = [int(word) for word in sys.argv[1:] if not word.startswith("-")]
    verbose = "-v" in sys.argv
    bad = 0
    for seed in seeds:
        began = time.process_time()
        world = World(seed, verbose)
        try:
            digest = world.run()
            if "--digest" in sys.argv:
                print(digest)
                continue
            print(f"seed {seed}: {digest} in {time.process_time() - began:.2f} s of processor time, {world.now / 1e9:.1f} s of virtual time")
        except Exception:
            bad += 1
            if not verbose:
                print("\n".join(list(world.log)[-60:]))
            print(f"seed {seed} FAILED at {world.now / 1e6:.3f} ms")
            raise
        if verbose:
            print(dict(sorted(world.counts.items())))
    return bad


if __name__ == "__main__":
    sys.exit(main())
