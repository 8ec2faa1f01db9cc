"""Folders of adapters: changes, links out of them, stamps of files, unloads."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from unittest.mock import Mock, patch

import pytest

from testbed.fakes import FakeExecutor, make_config
from tests.diffusion.control.builders import INFO
from tests.diffusion.control.engines import now_request, running_engine
from vllm_omni.diffusion.control import adapter_registry
from vllm_omni.diffusion.control.adapter_loading import AdapterLoading
from vllm_omni.diffusion.control.adapter_registry import AdapterRegistry
from vllm_omni.diffusion.control.adapters import default_adapters
from vllm_omni.diffusion.messages.request import LoRA
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.inputs.adapter_files import PEFT_CONFIG, WEIGHTS
from vllm_omni.inputs.adapters import ServedAdapter


@pytest.fixture(autouse=True)
def relists_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_registry, "RELIST_SECONDS", -1.0)  # times of files may be as coarse as 4 ms


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    (folder / "wet").mkdir(parents=True)
    for name in ("b.safetensors", "a.safetensors", "wet.txt", f"wet/{WEIGHTS}"):
        (folder / name).touch()
    return folder


def age(folder: Path) -> None:
    """Let the folders be old enough for their listing to be kept."""
    for each in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
        os.utime(each, ns=(1, each.stat().st_mtime_ns - int(1e9 * adapter_registry.SETTLED_SECONDS)))


def test_folders_are_listed_anew_when_they_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (start := tmp_path / "b.safetensors").touch()
    registry = AdapterRegistry(
        make_config(
            lora_modules={"b": str(start)}, lora_dirs=[folder], lora_defaults={"wet": {"num_inference_steps": 8}}
        )
    )
    assert registry.names() == ("b", "a", "wet")
    assert [adapter.source for adapter in registry] == ["start", "folder", "folder"]
    assert registry.get("wet") == ServedAdapter(
        "wet", str(folder / "wet" / WEIGHTS), {"num_inference_steps": 8}, "folder"
    )
    age(folder)
    assert len(registry.names()) == 3
    scan = Mock(side_effect=os.scandir)
    monkeypatch.setattr(os, "scandir", scan)
    assert registry.names() == ("b", "a", "wet")
    assert not scan.called, "nothing has changed"
    (folder / "wet" / "second.safetensors").touch()
    (folder / "wet" / WEIGHTS).unlink()
    (folder / "c.safetensors").touch()
    assert registry.names() == ("b", "a", "c", "wet")
    assert registry.require("wet").file.endswith("second.safetensors")
    (folder / "wet" / "third.safetensors").touch()  # which of the two is meant?
    assert registry.names() == ("b", "a", "c")
    registry.put(ServedAdapter("a", str(start), source="loaded"))
    assert registry.require("a").file == str(start)
    assert registry.remove("a").source == "loaded"
    assert registry.require("a").source == "folder"
    folder.rename(tmp_path / "gone")
    assert registry.names() == ("b",)
    with pytest.raises(InvalidRequestError, match="there is no LoRA adapter 'a'; served: b"):
        registry.require("a")


def test_nothing_outside_a_folder_is_listed(folder: Path, tmp_path: Path) -> None:
    (outside := tmp_path / "outside").mkdir()
    for name in ("x.safetensors", PEFT_CONFIG):
        (outside / name).touch()
    for name in ("settings", "within"):
        (folder / name).mkdir()
    (folder / "out.safetensors").symlink_to(outside / "x.safetensors")
    (folder / "dir").symlink_to(outside)
    (folder / "within" / "in.safetensors").symlink_to(folder / "a.safetensors")
    (folder / "settings" / PEFT_CONFIG).symlink_to(outside / PEFT_CONFIG)
    (folder / "settings" / "adapter_model.safetensors").touch()
    os.mkfifo(folder / "pipe.safetensors")
    assert AdapterRegistry(make_config(lora_dirs=[folder])).names() == ("a", "b", "wet", "within")


def test_a_stamp_tells_states_of_a_file_apart_and_lasts_while_it_is_served(tmp_path: Path) -> None:
    (file := tmp_path / "ink.safetensors").write_bytes(b"one")
    registry = AdapterRegistry(make_config(lora_modules={"ink": str(file)}))
    stamps = {registry.stamp(str(file))}
    times = file.stat()
    while file.stat().st_ctime_ns == times.st_ctime_ns:  # some clocks tick every few milliseconds
        file.write_bytes(b"two")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    stamps.add(last := registry.stamp(str(file)))
    assert len(stamps - {""}) == 2
    file.unlink()
    assert registry.stamp(str(file)) == last
    registry.remove("ink")
    assert registry.stamp(str(tmp_path / "other")) == ""
    (weights := tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    (link := tmp_path / "link.safetensors").symlink_to(weights)
    before = registry.stamp(str(weights)), registry.stamp(str(link))
    (tmp_path / PEFT_CONFIG).write_text("{}")
    assert registry.stamp(str(weights)) != before[0], "settings of peft beside the file count too"
    assert registry.stamp(str(link)) != before[1], "also beside the target of a link"


def test_folders_must_exist(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^--lora-dir takes folders that exist, got '/nowhere'"):
        make_config(lora_dirs=["/nowhere"]).with_adapter_files()
    monkeypatch.chdir(tmp_path)
    assert make_config(lora_dirs=["adapters"]).with_adapter_files().lora_dirs == (str(folder),)


async def test_unloads_wait_for_the_requests_of_now_and_defaults_stay(folder: Path) -> None:
    (ink := folder / "ink.safetensors").touch()
    defaults = {"lora_request": {"name": "ink"}}
    config = make_config(lora_modules={"ink": str(ink)}, lora_dirs=[folder], default_sampling_params=defaults)
    registry = AdapterRegistry(config)
    async with running_engine(FakeExecutor(hold=True)) as engine:
        loading = AdapterLoading(registry, INFO, engine, default_adapters(config))
        with pytest.raises(InvalidRequestError, match="get 'ink', by --default-sampling-params: it stays"):
            await loading.unload("ink")
        lora = LoRA("a", registry.require("a").file, 1.0)
        engine.add([now_request("first", loras=(lora,))])
        unloading = asyncio.create_task(loading.unload("a"))
        await asyncio.sleep(0)
        engine.add([now_request("second", loras=(lora,))])
        engine.abort(["first"])
        await unloading
        assert "a" in registry, "a folder still has it"
        assert engine.holds("second")


def test_a_folder_that_changes_or_has_a_clock_ahead_is_listed_now_and_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_registry, "RELIST_SECONDS", 3600.0)
    ahead = 2 * time.time_ns()
    for each in (folder, folder / "wet"):
        os.utime(each, ns=(ahead, ahead))
    listed = adapter_registry.AdapterFolder(folder)
    assert set(listed.files()) == {"a", "b", "wet"}
    with patch.object(os, "scandir") as scan:
        listed.files()
    assert not scan.called
    monkeypatch.setattr(adapter_registry, "RELIST_SECONDS", -1.0)
    monkeypatch.setattr(adapter_registry, "SETTLED_SECONDS", -1.0)  # the times have been the same for long enough
    listed.files()
    with patch.object(os, "scandir") as scan:
        listed.files()
    assert not scan.called
