"""Drills: faults fired on purpose, proved, and judged by what was seen. Never imports the pipeline: it runs as a process of its own."""
