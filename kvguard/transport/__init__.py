"""Transports move frames and know no meaning: base.py says what each of them promises, inproc.py is for simulation, zeromq.py (with bulk.py) for networks."""
