"""Paths of adapters that clients give: nothing outside the folders is opened, or told about."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_omni.inputs.adapter_files import PEFT_CONFIG, PEFT_FILE, WEIGHTS
from vllm_omni.inputs.adapter_names import check_adapter_name, listed
from vllm_omni.inputs.adapter_paths import file_within, path_in_folders
from vllm_omni.inputs.field_values import WrongValueError


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two folders, the second by a link, and files outside them."""
    for name in ("first", "first/wet", "first/odd", "first/settings", "second", "outside", "first-not"):
        (tmp_path / name).mkdir()
    for name in ("first/ink", "first/odd/a", "first/odd/b", "second/oil", "outside/secret", "first-not/x"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "first" / "wet" / WEIGHTS).touch()
    (tmp_path / "first" / "notes.txt").touch()
    for link, target in (
        ("first/out.safetensors", "../outside/secret.safetensors"),
        ("first/outside", "../outside"),
        ("first/inside.safetensors", "wet/" + WEIGHTS),
        ("first/gone.safetensors", "nowhere.safetensors"),
        ("first/settings/" + PEFT_CONFIG, "../../outside/secret.safetensors"),
        ("first/settings/adapter_model.safetensors", "../ink.safetensors"),
        ("linked", "second"),
    ):
        (tmp_path / link).symlink_to(target)
    os.mkfifo(tmp_path / "first" / "pipe.safetensors")
    return [str(tmp_path / "first"), str(tmp_path / "linked")]


def test_paths_lead_to_files_within(folders: list[str], tmp_path: Path) -> None:
    first = tmp_path / "first"
    for path, file in (
        ("ink.safetensors", first / "ink.safetensors"),
        (str(first / "ink.safetensors"), first / "ink.safetensors"),
        ("./wet//", first / "wet" / WEIGHTS),
        ("inside.safetensors", first / "inside.safetensors"),
        ("oil.safetensors", tmp_path / "second" / "oil.safetensors"),
        (str(tmp_path / "linked" / "oil.safetensors"), tmp_path / "second" / "oil.safetensors"),
        (str(tmp_path / "second" / "oil.safetensors"), tmp_path / "second" / "oil.safetensors"),
    ):
        assert file_within(path, folders) == str(file), path
    assert path_in_folders(str(first / "wet" / WEIGHTS), folders) == f"wet/{WEIGHTS}"
    assert path_in_folders("/elsewhere/ink.safetensors", folders) == "ink.safetensors"
    for name in (WEIGHTS, PEFT_FILE):
        assert path_in_folders(f"/elsewhere/night/{name}", folders) == f"night/{name}"


@pytest.mark.parametrize(
    "path",
    [
        *("../outside/secret.safetensors", "wet/../ink.safetensors", "..", "/etc/passwd", "/etc/nothing", "/"),
        *("OUT/secret.safetensors", "OUT/nothing.safetensors", "OUT-not/x.safetensors"),
        *("out.safetensors", "outside", "outside/secret.safetensors", "outside/nothing", "settings"),
        *("ink.safetensors\0", "ink\n.safetensors", "a" * 5000, "\udcff.safetensors"),
    ],
)
def test_nothing_outside_is_told(folders: list[str], tmp_path: Path, path: str) -> None:
    path = path.replace("OUT-not", str(tmp_path / "first-not")).replace("OUT", str(tmp_path / "outside"))
    with pytest.raises(WrongValueError, match=r"^a path within the folders of --lora-dir, without `..` and without"):
        file_within(path, folders)
    with pytest.raises(WrongValueError, match="a path within"):
        file_within(path, [])


@pytest.mark.parametrize("path", ["notes.txt", "odd", "gone.safetensors", "pipe.safetensors", "."])
def test_other_files_within_are_no_adapters(folders: list[str], path: str) -> None:
    with pytest.raises(WrongValueError, match="safetensors file"):
        file_within(path, folders)


@pytest.mark.parametrize("path", ["pencil.safetensors", "a" * 300, "wet/nothing", "ink.safetensors/x"])
def test_a_path_that_no_folder_has_is_told_apart(folders: list[str], path: str) -> None:
    with pytest.raises(FileNotFoundError):
        file_within(path, folders)


def test_names_are_one_line_of_text() -> None:
    for name in ("ink", "org/ink v1.2 (beta)", "x" * 128, "\u58a8"):
        check_adapter_name(name)
    for wrong in ("", "x" * 129, "a\nb", "a\x1bb", " a", "a ", "\udcff", "a\u202eb", 3, None):
        with pytest.raises(WrongValueError, match="a name"):
            check_adapter_name(wrong)
    assert listed([f"a{number}" for number in range(22)]).endswith("a18, a19 and 2 more")
    assert (listed([]), listed(["a"])) == ("none", "a")
