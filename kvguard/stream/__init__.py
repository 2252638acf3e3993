"""DejaVuLib's primitives for users: flush and fetch (pool <-> host memory), stream_out and stream_in (between two topologies)."""
