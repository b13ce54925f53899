from typing import Any

import pytest

from drumline.engine.commands.batch import most_running, parse_line
from drumline.engine.config import EngineConfig, ParallelConfig, SchedulerConfig
from drumline.engine.errors import InvalidRequest


def test_a_line_goes_before_the_flags() -> None:
    request = parse_line(3, b'{"prompt": "x", "max_tokens": 5}', {"max_tokens": 9, "temperature": 0.0})
    assert (request.request_id, request.prompt) == ("line-3", "x")
    assert (request.params.max_tokens, request.params.temperature) == (5, 0.0)


def test_a_line_may_bring_token_ids_and_a_request_id() -> None:
    request = parse_line(1, b'{"prompt_token_ids": [1, 2], "request_id": "mine"}', {})
    assert (request.request_id, request.prompt) == ("mine", [1, 2])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"{", "line 7"),
        (b"[1]", "line 7"),
        (b'{"prompt": "\xff"}', "line 7"),
        (b"[" * 100_000, "line 7"),
        (b'{"prompt": "x", "prompt_token_ids": [1]}', "prompt and prompt_token_ids"),
        (b"{}", "none"),
        (b'{"prompt": 3}', "prompt"),
        (b'{"prompt_token_ids": "ab"}', "prompt_token_ids"),
        (b'{"prompt": "x", "temprature": 1}', "temprature"),
        (b'{"prompt": "x", "max_tokens": "5"}', "max_tokens"),
        (b'{"prompt": "x", "request_id": 5}', "request_id"),
        (b'{"prompt": "x", "temperature": -1}', "temperature"),
    ],
)
def test_a_line_that_cannot_be_served_says_what_is_wrong_with_it(line: bytes, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        parse_line(7, line, {})


def test_so_many_lines_run_that_no_row_stays_empty_and_no_more() -> None:
    sizes: dict[str, Any] = {"scheduler": SchedulerConfig(max_num_seqs=100), "parallel": ParallelConfig(2)}
    assert most_running(EngineConfig("demo", **sizes)) == 264
    sizes["scheduler"] = SchedulerConfig(max_num_seqs=100_000, max_num_batched_tokens=100_000)
    assert most_running(EngineConfig("demo", **sizes)) == 8192
