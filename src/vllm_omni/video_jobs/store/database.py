"""Database of the store: connections, transactions, and the errors of drivers."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.orm import Session

from vllm_omni.errors import ConfigError, RequestError, StoreFullError, UnavailableError, error_line, to_one_line
from vllm_omni.video_jobs.store.migrations import upgrade
from vllm_omni.video_jobs.store.urls import make_sqlite_file, parse_store_url, without_password

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Work = Callable[[Session, float], Result]
"""Statements of one transaction: they get its session and the time in Unix seconds."""

MAX_CONNECTIONS = 5
_BUSY_SECONDS = 5.0
"""Time for which SQLite waits for another writer."""
_POSTGRES_START = text(
    "SELECT extract(epoch FROM clock_timestamp())::float8, set_config('statement_timeout', '30s', true)"
)
_POSTGRES_CONNECTION = {
    "connect_timeout": 10,
    # Notice within about 25 s that the host is gone.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # ms
}
_OUR_BUGS = (DataError, IntegrityError, ProgrammingError)
_FULL = ("SQLITE_FULL", "53100")
"""SQLite's and PostgreSQL's codes of a full disk."""


class Database:
    """A database with the tables of the store. Its methods block and may be called from several threads."""

    def __init__(self, url: str, clock: Callable[[], float] | None = None) -> None:
        """Connect, and make the tables or bring them up to date. Raises ConfigError."""
        parsed = parse_store_url(url)
        self._is_postgres = parsed.get_backend_name() == "postgresql"
        if not self._is_postgres:
            make_sqlite_file(parsed)
        self._clock = clock if clock or self._is_postgres else time.time
        try:
            engine = _make_engine(parsed)
        except (ArgumentError, ValueError) as error:  # a wrong option in the URL
            raise ConfigError(f"--job-store {without_password(url)}: {to_one_line(str(error))}") from error
        self._reads = engine.execution_options(begin="BEGIN")
        self._writes = engine.execution_options(begin="BEGIN IMMEDIATE")
        if not self._is_postgres:
            _set_up_connections(engine)
        try:
            if not self._is_postgres:
                _use_write_ahead_log(engine)
            self._transaction(self._writes, upgrade)
        except (DBAPIError, sqlite3.Error, ConfigError) as error:
            engine.dispose()
            reason = str(error) if isinstance(error, ConfigError) else error_line(_cause(error))
            raise ConfigError(f"--job-store {without_password(url)}: {reason}") from error

    def read(self, work: Work[Result]) -> Result:
        """Result of `work`, which changes nothing. Raises UnavailableError."""
        return self._run(self._reads, work)

    def write(self, work: Work[Result]) -> Result:
        """Result of `work` once its changes are committed. Raises UnavailableError and StoreFullError.

        Then the changes were not made, unless the connection was lost during the commit.
        """
        return self._run(self._writes, work)

    def close(self) -> None:
        """Close all connections."""
        self._reads.dispose()

    def _run(self, engine: Engine, work: Work[Result]) -> Result:
        is_retry = False
        while True:
            try:
                return self._transaction(engine, work)
            except _OUR_BUGS:
                raise
            except _CommitError as error:
                raise _to_request_error(error.cause) from error.cause
            except DBAPIError as error:
                # Nothing was committed: another try is safe. A full disk needs more than that.
                if is_retry or _is_full(error):
                    raise _to_request_error(error) from error
                is_retry = True

    def _transaction(self, engine: Engine, work: Work[Result]) -> Result:
        with Session(engine) as session:
            now = self._start(session)
            result = work(session, now)
            session.flush()
            try:
                session.commit()
            except DBAPIError as error:
                raise _CommitError(error) from error
            return result

    def _start(self, session: Session) -> float:
        """Begin the transaction and return its time; on PostgreSQL its statements get a time limit."""
        connection = session.connection()  # on SQLite a write has the file to itself from here on
        time_of_database = connection.execute(_POSTGRES_START).one()[0] if self._is_postgres else 0.0
        return self._clock() if self._clock else float(time_of_database)


class _CommitError(Exception):
    """A commit failed, and its changes may have been made."""

    def __init__(self, cause: DBAPIError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _make_engine(url: URL) -> Engine:
    is_postgres = url.get_backend_name() == "postgresql"
    settings = _POSTGRES_CONNECTION if is_postgres else {"timeout": _BUSY_SECONDS, "check_same_thread": False}
    # Each statement sees what was committed before it: `add` counts rows after it has waited for its lock.
    isolation: dict[str, Any] = {"isolation_level": "READ COMMITTED"} if is_postgres else {}
    return create_engine(
        url,
        **isolation,
        connect_args={name: value for name, value in settings.items() if name not in url.query},
        json_serializer=partial(json.dumps, allow_nan=False),
        pool_size=MAX_CONNECTIONS,
        max_overflow=0,
        pool_pre_ping=is_postgres,  # a server that was restarted is connected again
    )


def _set_up_connections(engine: Engine) -> None:
    """Let SQLAlchemy, not Python's driver, begin the transactions of SQLite: a write locks the file at its begin."""

    @event.listens_for(engine, "connect")
    def take_over(connection: Any, record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=FULL")  # some builds' default loses the last commits with the power

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))


def _use_write_ahead_log(engine: Engine) -> None:
    """Let readers and one writer of the file work at the same time; the file keeps the mode. Raises ConfigError."""
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        (mode,) = cursor.execute("PRAGMA journal_mode=WAL").fetchone()
    finally:
        connection.close()
    if mode != "wal":
        raise ConfigError(f"takes a file on a local disk, where SQLite has a write-ahead log; got mode {mode!r}")


def _to_request_error(error: DBAPIError) -> RequestError:
    """Error for callers. The cause goes to the log alone, because it may name hosts and users."""
    logger.warning("job store: %s", error_line(_cause(error)))
    if _is_full(error):
        return StoreFullError("The store of video jobs is full: its disk has no room.")
    return UnavailableError("The store of video jobs does not answer now; try again later.", retry_after=5.0)


def _is_full(error: DBAPIError) -> bool:
    cause = _cause(error)
    return getattr(cause, "sqlite_errorname", None) in _FULL or getattr(cause, "sqlstate", None) in _FULL


def _cause(error: Exception) -> BaseException:
    """Error of the driver: SQLAlchemy's own also quotes the statement."""
    return error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
