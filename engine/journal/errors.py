"""What can be wrong with the file of a journal."""

from __future__ import annotations

import sqlite3

_BUSY = 5
_LOCKED = 6
_DAMAGE = (11, 24, 26)
"""SQLITE_CORRUPT, SQLITE_FORMAT, SQLITE_NOTADB."""


class JournalTrouble(Exception):
    """Base. The text says what is wrong, without the path."""


class Locked(JournalTrouble):
    """Another process has locked it. Nothing has changed; the same again may succeed."""


class Unwritable(JournalTrouble):
    """A transaction failed (full disk, failing disk, ...) and was rolled back."""


class Damaged(JournalTrouble):
    """It does not hold what was written to it."""


class Superseded(JournalTrouble):
    """It belongs to a coordinator of the same or a higher term. Nothing has changed."""


def trouble(error: sqlite3.Error) -> JournalTrouble:
    """What an error of SQLite means for the journal."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (_BUSY, _LOCKED):
        return Locked("another process has locked it")
    if code in _DAMAGE:
        return Damaged(str(error))
    return Unwritable(str(error))
