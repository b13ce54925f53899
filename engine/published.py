"""Published algorithms under the name that an app imports them by."""

from drumline.protocol.rebalance import rebalance_experts

__all__ = ["rebalance_experts"]
