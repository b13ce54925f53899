"""Whether a journal tells all: a small file beside it that is there only while it does."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_DIGITS = 20


def boot_id() -> str:
    """Names the time since this machine was started; empty where that is not known."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


class Mark:
    """The file ``path``: the number of the last batch that was committed, and in which boot of the machine.

    It is taken away before anything is told that has not been committed, for which a full disk needs no room. A journal
    that ends before the number that stands there has lost its tail; after a crash of the machine it may have.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._boot_id = boot_id()
        self._fd = -1

    def covers(self, seq: int) -> bool:
        """Whether the mark is there and a journal whose last batch is ``seq`` is all that it speaks of."""
        try:
            words = Path(self._path).read_bytes().split()
            return len(words) == 2 and words[1].decode() == self._boot_id and int(words[0]) <= seq
        except (OSError, ValueError):
            return False

    def create(self, seq: int) -> None:
        """The journal tells all, up to ``seq``. Raises OSError."""
        self.close()
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.pwrite(self._fd, b"%0*d %s\n" % (_DIGITS, seq, self._boot_id.encode()), 0)

    def record(self, seq: int) -> None:
        """Batch ``seq`` is committed. Raises OSError."""
        if self._fd >= 0:
            os.pwrite(self._fd, b"%0*d" % (_DIGITS, seq), 0)

    def remove(self) -> None:
        """Something will be told that is not in the journal. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            Path(self._path).unlink()

    def close(self) -> None:
        """Let go of the file. It stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
