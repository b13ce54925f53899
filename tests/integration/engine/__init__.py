"""The shells with real processes."""
