"""Stores of adapters: ranks that check different requests, in different order, keep the same adapters."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from testbed.runner_driver import make_request
from vllm_omni.diffusion.compute.families.adapter_store import AdapterStore
from vllm_omni.diffusion.compute.step.adapters import LoadedAdapter
from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFileError
from vllm_omni.diffusion.compute.weights.adapter_layers import AdapterReader
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA
from vllm_omni.errors import AdapterChangedError, InvalidRequestError
from vllm_omni.inputs.adapter_files import AdapterPaths, file_stamp


class Files:
    """Stands for the files."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.bad: set[str] = set()

    def read(self, paths: AdapterPaths) -> LoadedAdapter:
        file = paths.weights
        if file.stem in self.bad:
            raise AdapterFileError("it holds no weights")
        self.reads.append(file.stem)
        return LoadedAdapter((), (), file.stem)


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    files = Files()
    monkeypatch.setattr(AdapterReader, "read", lambda reader, paths: files.read(paths))
    return files


class Rank:
    """Store of one rank, and the adapters that have left its device."""

    def __init__(self) -> None:
        loader: Any = SimpleNamespace(
            dtype=torch.float32, device=torch.device("cpu"), config=OmniDiffusionConfig("demo")
        )
        self.dropped: list[str] = []
        self.store = AdapterStore(loader, (), "", lambda adapter: self.dropped.append(adapter.digest))

    @property
    def loaded(self) -> list[str]:
        return [adapter.digest for adapter in self.store._loaded.values()]

    def begin(self, *requests: DiffusionRequest) -> None:
        for request in requests:
            self.store.check(request)
        for request in requests:
            self.store.admit(request)


def key(name: str) -> AdapterKey:
    return AdapterKey(f"/{name}.safetensors")


def request(request_id: str, *names: str) -> DiffusionRequest:
    return make_request(request_id, loras=tuple(LoRA(name, f"/{name}.safetensors", 0.5) for name in names))


def test_a_request_that_one_rank_skips_changes_no_store() -> None:
    ranks = Rank(), Rank()
    for rank in ranks:
        rank.begin(request("1", "a"))
        rank.store.release("1")
    ranks[0].store.check(request("2", "b"))  # an abort reached the other rank before the request
    assert [rank.loaded for rank in ranks] == [["a"], ["a"]]
    for rank in ranks:
        rank.store.release("2")
        rank.begin(request("3", "a"))
    assert [rank.loaded for rank in ranks] == [["a"], ["a"]]
    assert ranks[0].dropped == ranks[1].dropped == []


def test_a_load_that_fails_changes_no_store(files: Files) -> None:
    rank = Rank()
    rank.begin(request("1", "a"))
    files.bad.add("bad")
    with pytest.raises(InvalidRequestError, match=r"/bad\.safetensors cannot be read: its file is gone"):
        rank.store.check(request("2", "b", "bad"))
    rank.store.release("2")
    assert rank.loaded == ["a"]
    assert not rank.dropped


def test_adapters_are_read_once_and_come_from_host_memory_until_they_are_forgotten(files: Files) -> None:
    rank = Rank()
    assert rank.store.read(key("a")) == 0
    rank.begin(request("1", "a"))
    rank.store.release("1")
    rank.store.drop([key("a"), key("never")])
    assert (rank.loaded, rank.dropped) == ([], ["a"])
    rank.begin(request("2", "a"))
    rank.store.release("2")
    assert files.reads == ["a"]
    rank.store.forget([key("a")])
    rank.begin(request("3", "a"))
    assert files.reads == ["a"], "the device has it"
    rank.store.release("3")
    rank.store.drop([key("a")])
    rank.begin(request("4", "a"))
    assert files.reads == ["a", "a"]


def test_an_adapter_in_use_is_not_dropped() -> None:
    rank = Rank()
    first, third = request("1", "a"), request("3", "a")
    rank.begin(first, request("2", "b"))
    rank.store.check(third)
    rank.store.drop([key("a"), key("b")])
    assert rank.loaded == ["a", "b"]
    rank.store.release("1")
    rank.store.release_memory()
    assert (rank.loaded, rank.dropped) == (["b"], ["a"]), "the idle one goes"
    rank.store.admit(third)
    ((kept, scale),) = rank.store.composition(third)
    assert (kept.digest, scale) == ("a", 0.5)
    assert rank.store.composition(request("4")) == ()


def test_a_file_that_changes_is_another_adapter(tmp_path: Path, files: Files) -> None:
    file = tmp_path / "ink.safetensors"
    file.write_bytes(b"one")
    old = AdapterKey(str(file), file_stamp(str(file)))
    rank = Rank()
    rank.store.read(old)
    (new := tmp_path / "new").write_bytes(b"two")
    os.utime(new, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))  # only its content tells
    new.replace(file)
    assert file_stamp(str(file)) != old.stamp
    with pytest.raises(AdapterChangedError, match="has changed since it was named: send the request again"):
        rank.store.read(old)
    rank.store.check(make_request("1", loras=(LoRA("ink", str(file), 1.0, old.stamp),)))
    rank.store.read(AdapterKey(str(file), file_stamp(str(file))))
    assert len(rank.store._host) == 2, "requests that run keep the old one"
