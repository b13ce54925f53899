"""Ways to start the processes of an engine."""
