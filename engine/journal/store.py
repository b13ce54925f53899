"""The tables of a journal and its transactions. Used by one thread."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal.batches import Batch
from drumline.engine.journal.errors import Damaged, Superseded, Unwritable, trouble
from drumline.engine.journal.rows import (
    TOTAL_MASK,
    Columns,
    RehandledRow,
    RequestRow,
    StepRow,
    columns_of,
    rehandled_row,
    request_row,
    step_row,
)
from drumline.engine.journal.schema import BUSY_MS, SCHEMA, VERSION
from drumline.protocol.errors import ProtocolError
from drumline.protocol.messages import Submit

WAL_BYTES = 4 << 20
"""What the log may grow to before it is moved into the file, when there is a moment for that."""
NO_PAGE_LIMIT = 0x3FFFFFFE
FILLER_BYTES = 8192
_INSERT_STEP = "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(slots=True)
class LiveRequest:
    """A request that is in the file. ``rehandled``: rows of its later handles."""

    submit: Submit
    row: RequestRow
    rehandled: list[RehandledRow] = field(default_factory=list)


class Store:
    """The journal of one term, in the file at ``path``: what ``connection`` leads to. Every transaction checks that the
    file still belongs to ``term``.

    ``seq``: number of the last batch. ``appended``: bytes of tokens since the last compaction. After Unwritable or
    Damaged only :meth:`replace` and :meth:`probe` may follow.
    """

    def __init__(self, path: str, connection: sqlite3.Connection, term: int) -> None:
        self.path = path
        self.term = term
        self.seq = 0
        self.total = 0
        self.appended = 0
        self.live: dict[str, LiveRequest] = {}
        self.inode = Path(path).stat().st_ino
        self._connection = connection
        self._usable = False
        self._full = False

    # -------------------------------------------------------------------------------------------------- transactions

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One that ends with this store's ``seq`` and ``total``. Raises Locked before anything has changed, Superseded,
        Unwritable and Damaged after rolling back."""
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise trouble(error) from error
        try:
            self._make_full(connection)
            yield connection
            marked = connection.execute(
                "UPDATE meta SET seq = ?, total = ? WHERE term = ?", (self.seq, self.total, self.term)
            )
            if marked.rowcount != 1:
                raise self._superseded(connection)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            found = trouble(error)
            # Locked after its begin: it was rolled back like any other.
            raise found if isinstance(found, Damaged | Unwritable) else Unwritable(str(error)) from error
        except BaseException:
            self._roll_back()
            raise

    def _superseded(self, connection: sqlite3.Connection) -> Superseded | Damaged:
        found = connection.execute("SELECT term FROM meta").fetchone()
        if found is None:
            return Damaged("its table meta is empty")
        return Superseded(f"it belongs to term {found[0]} now; this coordinator's is {self.term}")

    def _roll_back(self) -> None:
        self._usable = False
        if self._connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")

    def commit(self, batches: Sequence[Batch]) -> None:
        """Write ``batches`` down in one transaction, in order. Raises what :meth:`transaction` does."""
        if not self._usable:
            raise Unwritable("an earlier transaction failed")
        with self.transaction() as connection:
            rows: list[StepRow] = []
            for batch in batches:
                self.seq += 1
                self._book(connection, batch)
                if len(batch.handles) or batch.ends:
                    row = self._step_row(self.seq, _columns(batch))
                    self.appended += row.nbytes
                    rows.append(row)
            connection.executemany(_INSERT_STEP, rows)

    def replace(self, requests: Sequence[RestoredRequest]) -> None:
        """Write ``requests`` down in place of all that is there, in one transaction."""
        with self.transaction() as connection:
            self.rewrite(connection, requests)
        self._usable = True

    def rewrite(self, connection: sqlite3.Connection, requests: Sequence[RestoredRequest]) -> None:
        """What :meth:`replace` does, inside a transaction."""
        for table in ("requests", "rehandled", "steps", "room"):
            connection.execute(f"DELETE FROM {table}")
        self.total, self.appended = 0, 0
        self.live.clear()
        for request in requests:
            self._accept(connection, request.submit, request.first_handle)
        for columns in columns_of(requests):
            self.seq += 1
            connection.execute(_INSERT_STEP, self._step_row(self.seq, columns))

    def take_over(self, connection: sqlite3.Connection, seq: int, requests: Sequence[RestoredRequest]) -> None:
        """The file, whose last batch was ``seq``, becomes this term's, with ``requests`` only. In a transaction."""
        connection.execute("UPDATE meta SET term = ?", (self.term,))
        self.seq = seq
        self.rewrite(connection, requests)
        self._usable = True

    @property
    def usable(self) -> bool:
        """Whether the file holds what this store says."""
        return self._usable

    def create(self) -> None:
        """Make the tables in an empty file, owned by this term."""
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:
                connection.execute(statement)
            connection.execute("INSERT INTO meta VALUES (1, ?, ?, 0, 0)", (VERSION, self.term))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            raise trouble(error) from error
        self._usable = True

    # ------------------------------------------------------------------------------------------------------ requests

    def _book(self, connection: sqlite3.Connection, batch: Batch) -> None:
        for request_id in batch.forgotten:
            self._forget(connection, request_id)
        for submit, first in batch.accepted:
            self._forget(connection, submit.request_id)
            self._accept(connection, submit, first)
        for request_id, first in batch.rehandled:
            live = self.live.get(request_id)
            if live is not None and live.row.first != first and all(row.first != first for row in live.rehandled):
                row = rehandled_row(first, live.row.first)
                connection.execute("INSERT INTO rehandled VALUES (?, ?, ?)", row)
                live.rehandled.append(row)
                self._add(row.checksum)

    def _accept(self, connection: sqlite3.Connection, submit: Submit, first: int) -> None:
        try:
            row = request_row(submit, first)
        except ProtocolError as error:
            raise Unwritable(f"request {submit.request_id!r}: {error}") from error
        connection.execute("INSERT INTO requests VALUES (?, ?, ?)", row)
        self.live[submit.request_id] = LiveRequest(submit, row)
        self._add(row.checksum)

    def _forget(self, connection: sqlite3.Connection, request_id: str) -> None:
        live = self.live.pop(request_id, None)
        if live is None:
            return
        connection.execute("DELETE FROM requests WHERE first = ?", (live.row.first,))
        self._add(-live.row.checksum)
        for row in live.rehandled:
            connection.execute("DELETE FROM rehandled WHERE first = ?", (row.first,))
            self._add(-row.checksum)

    def _step_row(self, seq: int, columns: Columns) -> StepRow:
        try:
            row = step_row(seq, columns)
        except ProtocolError as error:
            raise Unwritable(f"the tokens of a step: {error}") from error
        self._add(row.checksum)
        return row

    def _add(self, checksum: int) -> None:
        self.total = (self.total + checksum) & TOTAL_MASK

    # ---------------------------------------------------------------------------------------------------- compaction

    def read_steps(self, connection: sqlite3.Connection, after: int, last: int, nbytes: int) -> list[StepRow]:
        """Rows with after < seq <= last, in order, until they are ``nbytes``."""
        rows: list[StepRow] = []
        cursor = connection.execute("SELECT * FROM steps WHERE seq > ? AND seq <= ? ORDER BY seq", (after, last))
        for found in cursor:
            rows.append(StepRow(*found))
            nbytes -= rows[-1].nbytes + 64
            if nbytes <= 0:
                break
        cursor.close()
        return rows

    def put_in_place(self, connection: sqlite3.Connection, rows: Sequence[StepRow], columns: Columns | None) -> int:
        """``columns`` as one row in place of ``rows``, which follow each other. Returns the bytes of the new row."""
        connection.execute("DELETE FROM steps WHERE seq BETWEEN ? AND ?", (rows[0].seq, rows[-1].seq))
        for old in rows:
            self._add(-old.checksum)
        if columns is None:
            return 0
        row = self._step_row(rows[-1].seq, columns)
        connection.execute(_INSERT_STEP, row)
        return row.nbytes

    def vacuum(self, pages: int) -> bool:
        """Give back at most so many free pages. Returns whether some are left."""
        try:
            self._connection.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
            return bool(self._connection.execute("PRAGMA freelist_count").fetchone()[0])
        except sqlite3.Error as error:
            raise trouble(error) from error

    # ---------------------------------------------------------------------------------------------------- the file

    def probe(self, nbytes: int) -> None:
        """Whether a transaction of so many bytes can be committed. Raises what :meth:`transaction` does."""
        seq, total = self._connection.execute("SELECT seq, total FROM meta").fetchone() or (0, 0)
        self.seq, self.total = max(self.seq, seq), total
        with self.transaction() as connection:
            connection.execute("INSERT INTO room VALUES (zeroblob(?))", (nbytes,))
        with self.transaction() as connection:
            connection.execute("DELETE FROM room")

    def limit(self, full: bool) -> None:
        """Let SQLite find the disk full from now on, or no longer."""
        self._full = full
        with contextlib.suppress(sqlite3.Error):
            if full:
                self._connection.execute("PRAGMA incremental_vacuum").fetchall()
            # Fewer pages than there are means: as many as there are.
            self._connection.execute(f"PRAGMA max_page_count = {1 if full else NO_PAGE_LIMIT}").fetchone()

    def _make_full(self, connection: sqlite3.Connection) -> None:
        """With a limit, the next page is asked for at once: what fits into the last ones would take a while to."""
        if self._full:
            connection.execute("INSERT INTO room VALUES (zeroblob(?))", (FILLER_BYTES,))
            connection.execute("DELETE FROM room")

    def wal_bytes(self) -> int:
        """How long the log is."""
        try:
            return Path(self.path + "-wal").stat().st_size
        except OSError:
            return 0

    def in_place(self) -> bool:
        """Whether ``path`` still leads to this store's file."""
        try:
            return Path(self.path).stat().st_ino == self.inode
        except OSError:
            return False

    def checkpoint(self) -> None:
        """Move the log into the file, and cut it off unless somebody else reads the file at this moment."""
        try:
            self._connection.execute("PRAGMA busy_timeout = 0")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._connection.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        except sqlite3.Error as error:
            raise trouble(error) from error

    def close(self) -> None:
        """Close the connection. What was committed stays."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()


def _columns(batch: Batch) -> Columns:
    return Columns(batch.handles, batch.positions, batch.tokens, batch.logprob_index, batch.logprobs, batch.ends)
