"""A private PostgreSQL server of the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import count
from pathlib import Path

import psycopg

from testbed.patience import wait_for
from vllm_omni.processes.parent_death import die_with_parent

_USER = "omni"
_PACKAGE = "postgresql"


class PostgresServer:
    """A server without TCP, in a folder of its own; everybody who can read the folder may connect."""

    def __init__(self, folder: Path, programs: Path, account: str | None) -> None:
        self._folder, self._programs, self._account = folder, programs, account
        self._numbers = count()
        options = ("--username", _USER, "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync")
        subprocess.run(
            [programs / "initdb", "--pgdata", folder / "data", *options],
            check=True,
            stdout=subprocess.DEVNULL,
            user=account,
            cwd=folder,
        )
        self.start()

    def start(self) -> None:
        # Nothing waits for the disk: the data need not survive a crash of the machine.
        settings = ("listen_addresses=", f"unix_socket_directories={self._folder}", "fsync=off", "max_connections=60")
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._folder / "data", *(f"--{text}" for text in settings)],
                stdout=log,
                stderr=log,
                user=self._account,
                cwd=self._folder,
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        wait_for(self._answers)

    def stop(self) -> None:
        """End the server at once; its connections break."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def url(self, database: str) -> str:
        return f"postgresql://{_USER}@/{database}?host={self._folder}"

    def execute(self, statement: str, database: str = "postgres") -> None:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement.encode())

    @contextmanager
    def database(self) -> Iterator[str]:
        """Name of a new, empty database."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        yield name
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder / "log").read_text()
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A running server; raises NoPostgresError where there is none."""
    programs = find_programs()
    # A server refuses to run as root, and another account cannot read pytest's folders.
    account = ("postgres" if _has_account("postgres") else "nobody") if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="omni-pg-"))
    try:
        if account is not None:
            shutil.chown(folder, account)
        server = PostgresServer(folder, programs, account)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


class NoPostgresError(Exception):
    """PostgreSQL is not installed and cannot be; the message says why."""


@cache
def find_programs() -> Path:
    """Folder of `initdb` and `postgres`; installs Debian's package if this process may. Raises NoPostgresError."""
    found = _installed()
    if found is None:
        found = _install()
    return found


def _installed() -> Path | None:
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


def _install() -> Path:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoPostgresError("PostgreSQL is not installed, and only root with apt-get can install it")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", _PACKAGE]):
        done = subprocess.run(["apt-get", "-q", *command], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise NoPostgresError(f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}")
    found = _installed()
    if found is None:
        raise NoPostgresError(f"Debian's package {_PACKAGE} has no initdb in /usr/lib/postgresql")
    return found


def _has_account(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
