"""Version of the tables, and the statements that bring older ones up to date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import inspect, select, text, update
from sqlalchemy.orm import Session

from vllm_omni.errors import ConfigError
from vllm_omni.video_jobs.store.tables import JobRow, StoreTable, VersionRow

VERSION = 1
MIGRATIONS: Mapping[int, Sequence[str]] = {}
"""Version -> SQL statements, valid on SQLite and PostgreSQL, that turn its tables into those of the next version.

They add: servers of the version before may go on with the store during a rolling update.
"""
_LOCK = 0x766964656F  # any number that other programs are unlikely to use


def lock_store(session: Session) -> None:
    """Let one transaction at a time go on from here, until it ends. On SQLite each write does so from its begin."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})


def upgrade(
    session: Session, now: float, version: int = VERSION, migrations: Mapping[int, Sequence[str]] = MIGRATIONS
) -> None:
    """Make the tables, or bring those of an older version up to date. Raises ConfigError for a newer version."""
    lock_store(session)
    connection = session.connection()
    tables = inspect(connection).get_table_names()
    if VersionRow.__tablename__ not in tables:
        if JobRow.__tablename__ in tables:
            raise ConfigError(f"its table {JobRow.__tablename__} belongs to another program; use another database")
        StoreTable.metadata.create_all(connection)
        session.add(VersionRow(version=version))
        return
    found = session.scalars(select(VersionRow.version)).one()
    if found > version:
        raise ConfigError(f"has version {found}, written by a newer vllm-omni; this one takes up to {version}")
    for step in range(found, version):
        for statement in migrations[step]:
            session.execute(text(statement))
    session.execute(update(VersionRow).values(version=version))
