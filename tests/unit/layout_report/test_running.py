"""The layout of a running engine, over the wire."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.engine.layout_report.question import ask
from drumline.engine.layout_report.report import report
from drumline.engine.layout_report.running import layout_facts, report_of
from drumline.engine.resolve import resolve
from drumline.protocol.codec import Codec
from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import LayoutFacts, ToClient

CONFIG = EngineConfig(model="demo", parallel=ParallelConfig(data_parallel_size=2, enable_expert_parallel=True))


def sent(facts: LayoutFacts) -> LayoutFacts:
    codec: Codec[ToClient] = Codec(ToClient)
    arrived = codec.decode(codec.encode(facts))
    assert isinstance(arrived, LayoutFacts)
    return arrived


def test_a_client_makes_the_report_that_the_command_makes() -> None:
    facts = sent(layout_facts(1, resolve(CONFIG)))
    assert report_of(facts) == report(ask(CONFIG))


def test_without_expert_parallel_too() -> None:
    config = EngineConfig(model="demo", parallel=ParallelConfig(tensor_parallel_size=2))
    assert report_of(sent(layout_facts(1, resolve(config)))) == report(ask(config))


def test_the_placement_of_now_is_reported() -> None:
    resolved = resolve(CONFIG)
    placement = np.ascontiguousarray(resolved.placements[0][:, ::-1])
    made = report_of(sent(layout_facts(1, resolved, placement)))
    assert made.ranks[0].experts == report(ask(CONFIG)).ranks[1].experts


@pytest.mark.parametrize("question", [b"", b"{}", b"[1]", b'{"model": 3}'])
def test_facts_that_do_not_decode_are_a_typed_error(question: bytes) -> None:
    with pytest.raises(ProtocolError, match="layout does not decode"):
        report_of(LayoutFacts(1, question, np.zeros((0, 0), dtype=np.int32)))
