"""A deterministic world around the real core, wire, tables, pools and stores: one seed, one run, one digest."""
