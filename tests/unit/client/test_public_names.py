"""What an app imports from ``drumline.engine``."""

from __future__ import annotations

import subprocess
import sys

import drumline.engine


def test_every_public_name_can_be_imported_without_torch() -> None:
    program = (
        "import sys, drumline.engine as e\n"
        "for name in e.__all__: getattr(e, name)\n"
        "assert sorted(e.__all__) == dir(e), dir(e)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)


def test_the_published_algorithm_is_one_of_them() -> None:
    physical, logical, count = drumline.engine.rebalance_experts([[3.0, 1.0]], 4, 1, 1, 2)
    assert (physical.shape, logical.shape, count.tolist()) == ((1, 4), (1, 2, 3), [[3, 1]])
