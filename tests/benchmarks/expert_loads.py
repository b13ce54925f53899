"""Expert loads by which placements are judged, made from a seed.

    python -m tests.benchmarks.expert_loads [--out build/expert_loads] [--seed 0] [--times 8]

Writes DIR/LAYERSxEXPERTS.npz for each shape, with the arrays ``lognormal``, ``zipf``, ``drift`` and ``noise``, float64
(times, layers, experts), as ``drumline bench eplb --loads FILE --key NAME`` takes them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

F64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

START = 3
"""Times of the same load with which ``drift`` and ``noise`` begin."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's MoE layers and experts, and the slots, ranks and nodes that they are spread over."""

    layers: int
    experts: int
    slots: int
    ranks: int
    nodes: int
    groups: int

    def __str__(self) -> str:
        return f"{self.layers}x{self.experts}->{self.slots} on {self.ranks}"


SHAPES = (
    Shape(58, 256, 288, 32, 4, 8),
    Shape(61, 384, 416, 32, 4, 8),
    Shape(94, 128, 160, 16, 2, 8),
    Shape(4, 16, 20, 2, 1, 4),
)


def lognormal(random: np.random.Generator, times: int, layers: int, experts: int) -> F64:
    """Sigma 1, the same at all times."""
    return np.repeat(random.lognormal(0.0, 1.0, (1, layers, experts)), times, axis=0)


def zipf(random: np.random.Generator, times: int, layers: int, experts: int) -> F64:
    """The rank to the power of -1.2, each layer in an order of its own, the same at all times."""
    popularity = np.tile(np.arange(1.0, experts + 1.0) ** -1.2, (layers, 1))
    return np.repeat(random.permuted(popularity, axis=1)[None], times, axis=0)


def drift(random: np.random.Generator, times: int, layers: int, experts: int) -> F64:
    """Lognormal; after the start, from each time to the next 30 % of the load are drawn anew."""
    loads = list(lognormal(random, min(START, times), layers, experts))
    while len(loads) < times:
        loads.append(0.7 * loads[-1] + 0.3 * random.lognormal(0.0, 1.0, (layers, experts)))
    return np.stack(loads)


def noise(random: np.random.Generator, times: int, layers: int, experts: int) -> F64:
    """Lognormal; after the start each expert is off by 5 % of its load, independently."""
    loads = lognormal(random, times, layers, experts)
    loads[START:] *= 1.0 + 0.05 * random.standard_normal(loads[START:].shape)
    return loads


KINDS: dict[str, Callable[[np.random.Generator, int, int, int], F64]] = {
    "lognormal": lognormal,
    "zipf": zipf,
    "drift": drift,
    "noise": noise,
}


def make(kind: str, times: int, layers: int, experts: int, seed: int) -> F64:
    """float64 (times, layers, experts), the same for the same arguments."""
    return KINDS[kind](np.random.default_rng([seed, sorted(KINDS).index(kind)]), times, layers, experts)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="expert_loads", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/expert_loads"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=8)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for shape in SHAPES:
        path = options.out / f"{shape.layers}x{shape.experts}.npz"
        loads = {kind: make(kind, options.times, shape.layers, shape.experts, options.seed) for kind in KINDS}
        np.savez_compressed(path, **loads)  # type: ignore[arg-type]
        print(f"{path}: {', '.join(loads)}, float64 {loads['zipf'].shape}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
