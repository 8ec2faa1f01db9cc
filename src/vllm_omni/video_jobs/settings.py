"""Settings of video jobs: where jobs and their files are kept, for how long, and how many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vllm_omni.errors import ConfigError

_SCHEMES = ("sqlite:", "postgres", "mysql:")
"""Starts of mistyped URLs, which are no paths of files."""
JOB_FILE, MEDIA_FOLDER, SCRATCH_FOLDER = "jobs.sqlite", "media", "scratch"


@dataclass(frozen=True)
class VideoJobSettings:
    """Settings of video jobs. Servers with the same two stores share their jobs."""

    job_store: str | None = None
    """SQLAlchemy URL of the database of jobs, or path of an SQLite file; None: such a file in `default_folder`."""
    media_store: str | None = None
    """fsspec URL, or a folder, of the jobs' files; None: a folder beside the SQLite file."""
    job_ttl_seconds: float = 86400.0
    """Seconds for which an ended job and its files are kept."""
    max_jobs_per_key: int = 256
    """Most unfinished jobs of one API key; without keys, of all clients together."""
    max_jobs: int = 10_000
    """Most jobs that are kept, ended ones included."""
    checkpoint_seconds: float = 30.0
    """Work of a job, in seconds, after which its state is stored again."""
    lease_seconds: float = 20.0
    """Seconds after which another server takes up a job whose server is silent."""
    poll_seconds: float = 1.0
    """Interval at which the store is asked for jobs that came to other servers, and for the progress of their jobs."""
    sweep_seconds: float = 5.0
    """Interval at which deleted and expired jobs are removed with their files, and jobs are counted."""
    num_encoding_threads: int = 2
    """Threads that encode videos."""

    def __post_init__(self) -> None:
        if self.media_store is None and self.job_store is not None and _is_postgres(self.job_store):
            raise ConfigError(
                "--job-store with a database server needs --media-store too: a URL such as s3://bucket/videos, or a "
                "folder that all servers of the database share"
            )

    @property
    def job_store_url(self) -> str:
        """URL of the database, with the default filled in, that of a file's path, and its home folder (`~`).

        Raises ConfigError for the home of an unknown user.
        """
        if self.job_store is None:
            return f"sqlite:///{default_folder() / JOB_FILE}"
        if self.job_store and "://" not in self.job_store and not self.job_store.startswith(_SCHEMES):
            backend, separator, file = "sqlite", ":///", self.job_store
        else:
            backend, separator, file = self.job_store.partition(":///")
        if not backend.startswith("sqlite") or not file.startswith("~"):
            return f"{backend}{separator}{file}"
        try:  # the shell leaves it alone, because a URL does not begin with it
            return f"{backend}{separator}{Path(file).expanduser()}"
        except RuntimeError as error:
            home = Path(file).parts[0]
            raise ConfigError(f"--job-store {self.job_store}: no user has the home folder {home}") from error

    @property
    def media_store_url(self) -> str:
        """URL or folder of the files, with the default filled in."""
        return self.media_store if self.media_store is not None else str(self._folder / MEDIA_FOLDER)

    @property
    def scratch_folder(self) -> Path:
        """Folder of this host for files that are being written."""
        return self._folder / SCRATCH_FOLDER

    @property
    def _folder(self) -> Path:
        """Folder of the SQLite file; with a database server, that of jobs by default."""
        backend, _, file = self.job_store_url.partition(":///")
        return Path(file).absolute().parent if backend.startswith("sqlite") else default_folder()


def _is_postgres(job_store: str) -> bool:
    return job_store.startswith("postgres") and "://" in job_store


def default_folder() -> Path:
    """Folder of jobs by default: `vllm-omni` in XDG_STATE_HOME, or in ~/.local/state without that variable."""
    state = os.environ.get("XDG_STATE_HOME")  # relative paths are to be ignored, says the XDG specification
    root = Path(state) if state and os.path.isabs(state) else Path.home() / ".local" / "state"
    return root / "vllm-omni"
