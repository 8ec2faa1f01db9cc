"""Stores that cannot be opened: one line that names the flag, what it got and what it takes."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import pytest

from tests.video_jobs.store.stores import Clock, open_test_store
from vllm_omni.errors import ConfigError
from vllm_omni.video_jobs.service import check_stores
from vllm_omni.video_jobs.settings import VideoJobSettings
from vllm_omni.video_jobs.store import check_job_store


def refusal(url: str) -> str:
    """Message for a URL: one line that names the flag and hides the password."""
    with pytest.raises(ConfigError) as refused:
        check_job_store(url)
    message = str(refused.value)
    assert message.startswith("--job-store ")
    assert "\n" not in message
    assert "secret" not in message
    return message


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/var/lib/jobs.db",
        "jobs.db",
        "s3://bucket/jobs",
        "mysql://user:secret@host/jobs",
        "mysql://user:a@secret:b/secret@host/jobs",
        "mysql://host/jobs?password=secret",
        "postgresql+asyncpg://user:secret@host/jobs",
        "postgresql//user:secret@host/jobs",
        "postgresql://user:secret@host:port/jobs",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///jobs.db?mode=ro",
        "sqlite://host/jobs.db",
        "sqlite+aiosqlite:////var/lib/jobs.db",
    ],
)
def test_a_url_that_is_no_store_is_refused(url: str) -> None:
    assert "takes a path, sqlite:////absolute/path/jobs.db or postgresql://user:password@host/database" in refusal(url)


@pytest.mark.parametrize("options", ["port=x", "plugin=nothing", "nonsense=1", "connect_timeout=soon"])
def test_a_wrong_option_of_postgres_is_refused(options: str) -> None:
    message = refusal(f"postgresql://host/jobs?password=secret&{options}")
    assert message.startswith(f"--job-store postgresql://host/jobs?password=***&{options}: ")


def test_a_store_makes_its_folder_and_only_its_user_reads_it(tmp_path: Path) -> None:
    check_job_store(f"sqlite:///{tmp_path}/a/b/jobs.db")
    assert (tmp_path / "a/b/jobs.db").is_file()
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a/b/jobs.db").stat().st_mode & 0o777 == 0o600


def test_a_relative_path_is_taken_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_job_store("sqlite:///a/jobs.db")
    assert (tmp_path / "a/jobs.db").is_file()


def test_the_home_folder_is_taken_for_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = VideoJobSettings(job_store="sqlite:///~/state/jobs.db")
    check_job_store(settings.job_store_url)
    assert (tmp_path / "state/jobs.db").is_file()
    assert settings.media_store_url == f"{tmp_path}/state/media"
    assert settings.scratch_folder == tmp_path / "state/scratch"


@pytest.mark.parametrize("path", ["{folder}/state/jobs.db", "jobs.db", "~/jobs.db"])
def test_a_path_is_an_sqlite_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = VideoJobSettings(job_store=path.format(folder=tmp_path))
    check_job_store(settings.job_store_url)
    file = tmp_path / path.format(folder=tmp_path).removeprefix("~/")
    assert file.is_file()
    assert settings.media_store_url == str(file.parent / "media")


@pytest.mark.parametrize(
    ("job_store", "media_store"), [("{folder}/state/jobs.db", "gs://bucket/x"), ("mysql://host/jobs", "{folder}/media")]
)
def test_a_refused_store_leaves_nothing_of_the_other_one(job_store: str, media_store: str, tmp_path: Path) -> None:
    folder = str(tmp_path)
    with pytest.raises(ConfigError):
        check_stores(VideoJobSettings(job_store.format(folder=folder), media_store.format(folder=folder)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["mysql://user:secret@host/jobs", "mysql:jobs", "s3://bucket/jobs", ""])
def test_the_form_is_checked_before_the_media_store(url: str) -> None:
    assert "takes a path, sqlite:////abs" in refusal(VideoJobSettings(job_store=url).job_store_url)


def test_the_home_of_an_unknown_user_is_refused() -> None:
    settings = VideoJobSettings(job_store="sqlite:///~nobody-has-this-name/jobs.db")
    with pytest.raises(ConfigError, match=r"^--job-store sqlite:///~nobody.*: no user has the home folder ~nobody"):
        settings.job_store_url  # noqa: B018


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"cannot make {tmp_path}/file: " in refusal(f"sqlite:///{tmp_path}/file/jobs.db")


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    assert "unable to open database file" in refusal(f"sqlite:///{tmp_path}")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_text("a diary\n" * 1000)
    assert "file is not a database" in refusal(f"sqlite:///{tmp_path}/jobs.db")
    assert (tmp_path / "jobs.db").read_text() == "a diary\n" * 1000


def test_a_file_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    check_job_store(url)
    connect = sqlite3.connect

    def connect_to_read(database: str, **options: object) -> sqlite3.Connection:
        # Root may write any file; SQLite refuses this one to everybody.
        return connect(f"file:{database}?mode=ro", uri=True, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(sqlite3.dbapi2, "connect", connect_to_read)
    monkeypatch.setattr(sqlite3, "connect", connect_to_read)
    assert "attempt to write a readonly database" in refusal(url)


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert "needs the package psycopg: pip install 'vllm-omni[postgres]'" in refusal(
        "postgresql://user:secret@host/jobs"
    )


def test_a_server_that_does_not_answer_is_an_error_at_the_start(tmp_path: Path) -> None:
    message = refusal(f"postgresql://user:secret@/jobs?host={tmp_path}")
    assert "OperationalError" in message
    assert str(tmp_path) in message


@pytest.mark.thorough
@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_names_of_postgres_are_taken(postgres_url: str, scheme: str) -> None:
    check_job_store(postgres_url.replace("postgresql", scheme))


@pytest.mark.thorough
def test_a_postgres_database_that_is_not_there_is_refused(postgres_url: str) -> None:
    assert "does not exist" in refusal(postgres_url.replace("/test_", "/nothing_"))


async def test_a_store_of_this_version_is_opened_again(store_url: str) -> None:
    for _ in range(2):
        await open_test_store(store_url, Clock()).close()
