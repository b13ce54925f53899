"""The private folder and the process mark of the engine's own tests, here too."""

from tests.integration.engine.conftest import mark, runtime_root

__all__ = ["mark", "runtime_root"]
