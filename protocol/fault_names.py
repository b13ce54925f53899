"""What injected faults are called by those who order them, check them and bring them about."""

from __future__ import annotations

RANK_KINDS = ("kill", "stop", "exit", "segv", "raise", "nan", "hang", "slow")
"""What a rank can bring upon itself."""
POINTS = ("now", "loading", "leave", "regroup", "joining", "idle", "step", "prefill", "decode", "staging", "commit")
"""Where in its life it does."""
SHUFFLE_POINTS = ("staging", "commit")
"""Those of steps that move experts."""
TAKEN_BACK = "none"
"""The kind that takes an order back."""
MESSAGE_KINDS = ("drop", "delay", "duplicate", "corrupt")
"""What can befall messages between the coordinator and ranks."""
DIRECTIONS = ("to_worker", "from_worker", "both")
