"""Opening a journal: a new file, one to continue, or one that is set aside because it is damaged."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from drumline.engine.core.restored import RestoredRequest
from drumline.engine.journal.errors import Damaged, JournalTrouble, Locked, Superseded, Unwritable, trouble
from drumline.engine.journal.loading import Loaded, is_new, load
from drumline.engine.journal.schema import connect, settle
from drumline.engine.journal.store import Store
from drumline.protocol.errors import InvalidConfig

LOCK_WAIT_S = 1.0
"""How long opening waits for a lock of another process."""
KEPT_ASIDE = 3
"""How many damaged files are kept."""
_REFUSED = (8, 14, 23)
"""SQLITE_READONLY, SQLITE_CANTOPEN, SQLITE_AUTH."""


@dataclass(slots=True)
class Opened:
    """``store`` is None when it cannot be written to now, and ``reason`` says why; ``requests`` is what could be read.
    ``seq``: the number of the last batch that was read, -1 where nothing was. ``aside``: what has become of a damaged
    file, empty without one."""

    store: Store | None
    requests: tuple[RestoredRequest, ...] = ()
    seq: int = -1
    aside: str = ""
    reason: str = ""


def journal_term(path: str) -> int:
    """The term that the journal at ``path`` belongs to; 0 when there is none that can be read."""
    if not Path(path).is_file():
        return 0
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=LOCK_WAIT_S)) as connection:
            return int(connection.execute("SELECT term FROM meta").fetchone()[0])
    except (sqlite3.Error, TypeError, ValueError):
        return 0


def open_store(path: str, term: int, again: bool = False) -> Opened:
    """The journal at ``path``, taken over for ``term``. Raises InvalidConfig for a path that cannot be a journal's, and
    Superseded when it belongs to that term or a higher one. ``again``: that term has had it before."""
    _prepare(path)
    aside, seq = "", -1
    requests: tuple[RestoredRequest, ...] = ()
    try:
        return _open(path, term, again)
    except _DamagedLater as error:
        # What was verified before the damage showed is all there was.
        requests, seq, reason = error.loaded.requests, error.loaded.seq, str(error)
    except Damaged as error:
        reason = str(error)
    except (Locked, Unwritable) as error:
        return Opened(None, _read_only(path), reason=str(error))
    try:
        aside = set_aside(path, reason)
        _prepare(path)
        opened = _open(path, term, again)
        if opened.store is not None:
            opened.store.replace(requests)
    except (Damaged, Locked, Unwritable) as error:
        return Opened(None, requests, reason=f"{reason}; then: {error}", aside=aside)
    return Opened(opened.store, requests, seq, aside, opened.reason)


class _DamagedLater(Damaged):
    """All could be read, and not be written."""

    def __init__(self, text: str, loaded: Loaded) -> None:
        super().__init__(text)
        self.loaded = loaded


def _open(path: str, term: int, again: bool) -> Opened:
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return _open_once(path, term, again)
        except Locked:
            # SQLite has waited already, except where waiting would not help.
            if time.monotonic() >= end:
                raise
            time.sleep(0.01)


def _open_once(path: str, term: int, again: bool) -> Opened:
    try:
        connection = connect(path)
    except sqlite3.Error as error:
        raise _opening_trouble(path, error) from error
    try:
        store = Store(path, connection, term)
        new = is_new(connection, path)
        settle(connection, new)
        if new:
            store.create()
            return Opened(store)
        loaded = _take_over(store, again)
        return Opened(store, loaded.requests, loaded.seq)
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.Error):
            raise _opening_trouble(path, error) from error
        cause = error.__cause__
        if isinstance(error, Unwritable) and isinstance(cause, sqlite3.Error):
            raise _opening_trouble(path, cause) from error
        raise


def _take_over(store: Store, again: bool) -> Loaded:
    loaded: Loaded | None = None
    try:
        with store.transaction() as connection:
            loaded = load(connection)
            if loaded.term >= store.term + again:
                raise Superseded(f"it belongs to term {loaded.term}; this coordinator's is {store.term}")
            store.take_over(connection, loaded.seq, loaded.requests)
    except Damaged as error:
        if loaded is None:
            raise
        raise _DamagedLater(str(error), loaded) from error
    return loaded


def _read_only(path: str) -> tuple[RestoredRequest, ...]:
    """What can be read although the file cannot be written to."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0.1, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            return load(connection).requests
    except (sqlite3.Error, JournalTrouble):
        return ()


def _opening_trouble(path: str, error: sqlite3.Error) -> Exception:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSED:
        return InvalidConfig("journal", f"{path}: {error}", 'a file that can be read and written, or "off"')
    return trouble(error)


def _prepare(path: str) -> None:
    """Make the folder and the file, for nobody else to read."""
    file = Path(path)
    try:
        if not file.parent.exists():
            file.parent.mkdir(mode=0o700, parents=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        os.close(fd)
    except (OSError, ValueError) as error:
        raise InvalidConfig("journal", f"{path}: {error}", 'a file that can be read and written, or "off"') from error
    if not regular:
        raise InvalidConfig("journal", f"{path}, a pipe, a device or a socket", 'a file, or "off"')


def set_aside(path: str, reason: str) -> str:
    """Rename a damaged journal. At most ``KEPT_ASIDE`` are kept. Returns what to tell about it. Raises Unwritable."""
    file = Path(path)
    prefix = f"{file.name}.corrupt-"
    try:
        endings = [one.name[len(prefix) :] for one in file.parent.iterdir() if one.name.startswith(prefix)]
        numbers = sorted(int(ending) for ending in endings if ending.isdigit())
        new = f"{path}.corrupt-{numbers[-1] + 1 if numbers else 1}"
        file.rename(new)
        for old in numbers[: max(len(numbers) + 1 - KEPT_ASIDE, 0)]:
            Path(f"{path}.corrupt-{old}").unlink(missing_ok=True)
            Path(f"{path}.corrupt-{old}-wal").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}-wal").rename(f"{new}-wal")
        Path(f"{path}-shm").unlink(missing_ok=True)
    except OSError as error:
        raise Unwritable(f"it is damaged ({reason}) and cannot be renamed: {error}") from error
    return f"{path} was damaged ({reason}); it is {new} now, and an empty journal was begun"
