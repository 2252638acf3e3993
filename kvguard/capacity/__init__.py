"""What a machine and a link can carry, against memcpy and raw sockets of the same run. Behind `kvguard bench` and tools/bench_stream.py."""
