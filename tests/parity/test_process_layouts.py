"""Each layout once on real processes, spread over the models; `make soak-layouts` runs every model in every layout."""

from __future__ import annotations

import pytest

from tests.checkpoints import Checkpoints
from tests.parity.layout_cases import SUITE_CASES, Case
from tests.parity.process_layouts import run_case


@pytest.mark.parametrize("case", SUITE_CASES, ids=[case.title for case in SUITE_CASES])
async def test_a_layout_writes_what_transformers_writes_and_holds_what_it_says(
    case: Case, checkpoints: Checkpoints
) -> None:
    judgement = await run_case(case, checkpoints)
    print(judgement.line())
    assert judgement.passed, judgement.line()
    assert judgement.counters["chunked_prefills"] > 0
    assert judgement.counters["prefix_hit_tokens"] > 0
