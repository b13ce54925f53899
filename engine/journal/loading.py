"""Reading a journal back: all of it is verified before any of it is believed."""

from __future__ import annotations

import sqlite3
import struct
from dataclasses import dataclass

from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal.errors import Damaged, Locked, trouble
from drumline.engine.journal.restoring import restore
from drumline.engine.journal.rows import (
    TOTAL_MASK,
    RehandledRow,
    RequestRow,
    StepRow,
    check_rehandled,
    read_request,
    read_step,
)
from drumline.engine.journal.schema import APPLICATION_ID, VERSION
from drumline.protocol.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class Loaded:
    """What stands in a journal. ``seq``: the number of its last batch."""

    term: int
    seq: int
    requests: tuple[RestoredRequest, ...]


def is_new(connection: sqlite3.Connection, path: str) -> bool:
    """Whether the file is empty. Raises InvalidConfig for one that is something else than a journal of this version,
    Damaged, Locked."""
    with _Reading():
        application = int(connection.execute("PRAGMA application_id").fetchone()[0])
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        tables = {str(name) for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if not tables:
            return True
        if application != APPLICATION_ID:
            if {"meta", "rehandled", "steps"} <= tables:
                raise Damaged("its header is not that of a journal")
            raise InvalidConfig("journal", f"{path}, another SQLite database", "a file that only drumline uses")
        if version != VERSION:
            written = connection.execute("SELECT version FROM meta").fetchone()
            if written is None or written[0] != version:
                raise Damaged(f"its header tells of version {version}")
            text = f"{path}, a journal of version {version}"
            raise InvalidConfig("journal", text, f"a journal of version {VERSION}, or a file that does not exist")
    return False


def load(connection: sqlite3.Connection) -> Loaded:
    """All of a journal, in the transaction that the connection is in. Raises Damaged, Locked."""
    with _Reading():
        meta = connection.execute("SELECT version, term, seq, total FROM meta").fetchall()
        if len(meta) != 1:
            raise Damaged(f"its table meta has {len(meta)} rows")
        version, term, seq, total = (int(number) for number in meta[0])
        if version != VERSION:
            raise Damaged(f"its table meta tells of version {version}")
        found = 0
        requests = []
        for one in connection.execute("SELECT * FROM requests"):
            row = RequestRow(*one)
            requests.append((read_request(row), row.first))
            found += row.checksum
        rehandled = []
        for one in connection.execute("SELECT * FROM rehandled"):
            new = RehandledRow(*one)
            check_rehandled(new)
            rehandled.append((new.first, new.request))
            found += new.checksum
        steps = []
        for one in connection.execute("SELECT * FROM steps ORDER BY seq"):
            step = StepRow(*one)
            steps.append(read_step(step))
            found += step.checksum
        if found & TOTAL_MASK != total:
            raise Damaged("its rows do not add up to what its table meta says")
        return Loaded(term, seq, restore(requests, rehandled, steps))


class _Reading:
    """Whatever goes wrong while a file is read is damage, unless it is a lock."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            found = trouble(error)
            raise found if isinstance(found, Locked) else Damaged(str(error)) from error
        if isinstance(error, TypeError | ValueError | OverflowError | struct.error) and not isinstance(
            error, InvalidConfig
        ):
            raise Damaged(f"a row that does not decode: {error}") from error
