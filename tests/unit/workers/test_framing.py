from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drumline.protocol.errors import ProtocolError
from drumline.workers.framing import Command, CommandReader, pack

COMMANDS = pack({"spawn": [3, "ipc:///e", "token"]}) + pack({"kill": [77, 9]})


@given(st.lists(st.integers(min_value=0, max_value=len(COMMANDS)), max_size=6))
def test_commands_come_whole_however_the_stream_is_cut(cuts: list[int]) -> None:
    reader = CommandReader()
    edges = [0, *sorted(cuts), len(COMMANDS)]
    found = [command for first, end in pairwise(edges) for command in reader.feed(COMMANDS[first:end])]
    assert found == [Command(spawn=(3, "ipc:///e", "token")), Command(kill=(77, 9))]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x00\x01\x00\x01", "65537 bytes; at most 65536"),
        (pack({}), "exactly one"),
        (pack({"spawn": [1, "e", "t"], "kill": [1, 9]}), "exactly one"),
        (pack({"spawn": ["one", "e", "t"]}), "does not decode"),
        (pack({"reboot": 1}), "does not decode"),
        (b"\x00\x00\x00\x01\xc1", "does not decode"),
    ],
)
def test_what_is_no_command_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        list(CommandReader().feed(data))
