"""The noise of sampling, as ranks draw it, of single tokens: a function of seed, index, position and token.

Ranks compute whole rows on their device (``drumline.workers.noise``); a test holds that both agree.
"""

from __future__ import annotations

import math

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def gumbel(seed: int, index: int, position: int, token: int) -> float:
    """What is added to the score of ``token`` at output ``position`` (0 is the first) of sequence ``index``."""
    key = _mix((seed + _GOLDEN) & _MASK)
    key = _mix(((key ^ index) + _GOLDEN) & _MASK)
    key = _mix(((key ^ position) + _GOLDEN) & _MASK)
    uniform = ((_mix((key + (token + 1) * _GOLDEN) & _MASK) >> 11) + 0.5) * 2.0**-53
    return -math.log(-math.log1p(-min(uniform, 1.0 - 2.0**-24)))
