"""Several streams on one terminal: one is shown as it comes, the others wait for their turn and run meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from drumline.engine.commands.running import writing_stdout


class Transcript:
    """Blocks of text in a fixed order. The first that has not ended is written as its text arrives; what arrives for a
    later one is kept until then, so nothing is ever interleaved. With several blocks each has its label above it;
    ``leads`` are texts that the blocks begin with."""

    def __init__(self, labels: Sequence[str], leads: Sequence[str], out: TextIO) -> None:
        self._labels = list(labels)
        self._out = out
        self._kept = list(leads)
        self._ended = [False] * len(self._labels)
        self._current = -1
        self._ends_with_newline = True
        self._advance()

    def add(self, block: int, text: str) -> None:
        """Text of one block, as it streams."""
        if block == self._current:
            self._write(text)
        else:
            self._kept[block] += text

    def end(self, block: int) -> None:
        """Nothing more comes for ``block``."""
        self._ended[block] = True
        while self._current < len(self._labels) and self._ended[self._current]:
            self._close_line()
            self._advance()

    def interrupted(self) -> None:
        """The rest does not come: the line that is being written ends."""
        if self._current < len(self._labels):
            self._close_line()

    def _advance(self) -> None:
        self._current += 1
        if self._current >= len(self._labels):
            return
        if len(self._labels) > 1:
            self._write(("\n" if self._current else "") + f"--- {self._labels[self._current]}\n")
        kept, self._kept[self._current] = self._kept[self._current], ""
        self._write(kept)

    def _close_line(self) -> None:
        if not self._ends_with_newline:
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            self._ends_with_newline = text.endswith("\n")
            with writing_stdout():
                self._out.write(text)
                self._out.flush()
