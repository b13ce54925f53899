"""The coordinator's decisions, without any I/O: no socket, no clock, no task. ``now`` is always passed in."""
