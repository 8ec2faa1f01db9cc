"""URLs of stores: `--job-store`."""

from __future__ import annotations

import re
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from vllm_omni.errors import ConfigError, to_one_line

_TAKES = "takes a path, sqlite:////absolute/path/jobs.db or postgresql://user:password@host/database"
_SQLITE = ("sqlite", "sqlite+pysqlite")
_POSTGRES = ("postgresql", "postgres", "postgresql+psycopg")


def parse_store_url(text: str) -> URL:
    """URL with its driver. Raises ConfigError for other databases and for a driver that is not installed."""
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:  # ValueError: a port that is no number
        raise ConfigError(f"--job-store {_TAKES}, got {without_password(text)!r}") from error
    if url.drivername in _SQLITE:
        return _sqlite_url(url)
    if url.drivername in _POSTGRES:
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--job-store {url.drivername}://... needs the package psycopg: pip install 'vllm-omni[postgres]' "
                f"({error})"
            ) from error
        return url.set(drivername="postgresql+psycopg")
    raise ConfigError(f"--job-store {_TAKES}, got {without_password(text)!r}")


def without_password(text: str) -> str:
    """`text` in one line, in which `***` stands for the password of a URL, whatever characters it has."""
    without = re.sub(r":(?!//).*@", ":***@", to_one_line(text))
    return re.sub(r"(?<=password=)[^&]*", "***", without)


def _sqlite_url(url: URL) -> URL:
    """URL with an absolute path. Raises ConfigError."""
    if url.database in (None, "", ":memory:") or url.query or url.host:
        raise ConfigError(f"--job-store {_TAKES}: a file without options, got {without_password(str(url))!r}")
    return url.set(drivername="sqlite+pysqlite", database=str(Path(str(url.database)).absolute()))


def make_sqlite_file(url: URL) -> None:
    """Make the folder and an empty file of a parsed URL of SQLite. Raises ConfigError."""
    path = Path(str(url.database))
    try:
        # Prompts and pictures are the users' own: nobody else reads them.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        raise ConfigError(f"--job-store {path}: cannot make {error.filename}: {error.strerror}") from error
