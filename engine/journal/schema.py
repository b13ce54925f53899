"""The file of a journal: its tables, and the settings of a connection to it."""

from __future__ import annotations

import sqlite3

VERSION = 1
APPLICATION_ID = 0x6472756D
BUSY_MS = 100
"""How long SQLite itself waits for a lock."""
PAGE_BYTES = 4096
SIZE_LIMIT_BYTES = 4 << 20
"""What the log is cut down to when it begins anew."""

SCHEMA = (
    (
        "CREATE TABLE meta (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL, term INTEGER NOT NULL,"
        " seq INTEGER NOT NULL, total INTEGER NOT NULL)"
    ),
    "CREATE TABLE requests (first INTEGER PRIMARY KEY, submit BLOB NOT NULL, checksum INTEGER NOT NULL)",
    "CREATE TABLE rehandled (first INTEGER PRIMARY KEY, request INTEGER NOT NULL, checksum INTEGER NOT NULL)",
    (
        "CREATE TABLE steps (seq INTEGER PRIMARY KEY, handles BLOB NOT NULL, positions BLOB NOT NULL,"
        " tokens BLOB NOT NULL, logprob_index BLOB NOT NULL, logprobs BLOB NOT NULL, ends BLOB NOT NULL,"
        " checksum INTEGER NOT NULL)"
    ),
    "CREATE TABLE room (bytes BLOB)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)


def connect(path: str) -> sqlite3.Connection:
    """A connection to an existing file; it has changed nothing. Raises sqlite3.Error."""
    return sqlite3.connect(path, timeout=BUSY_MS / 1000, isolation_level=None)


def settle(connection: sqlite3.Connection, new: bool) -> None:
    """Make the settings of a connection; ``new``: and of an empty file. Raises sqlite3.Error."""
    if new:
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL").fetchone()
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA secure_delete = OFF")
    connection.execute(f"PRAGMA journal_size_limit = {SIZE_LIMIT_BYTES}")
