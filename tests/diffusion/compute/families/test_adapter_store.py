"""Stores of adapters: ranks that check different requests, in different order, keep the same adapters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from testbed.runner_driver import make_request
from vllm_omni.diffusion.compute.families import adapter_store
from vllm_omni.diffusion.compute.families.adapter_store import AdapterStore
from vllm_omni.diffusion.compute.step.adapters import LoadedAdapter
from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFileError
from vllm_omni.diffusion.compute.weights.adapter_layers import AdapterReader
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA
from vllm_omni.errors import ConfigError, InvalidRequestError


class Files:
    """Stands for the files and for the device's memory."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.gone: set[str] = set()
        self.room = 100
        """Adapters for which there is memory."""

    def read(self, file: Path) -> LoadedAdapter:
        if file.stem in self.gone:
            raise AdapterFileError("the file is gone")
        if len(self.reads) >= self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.reads.append(file.stem)
        return LoadedAdapter((), (), file.stem)


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    files = Files()
    monkeypatch.setattr(AdapterReader, "read", lambda reader, file: files.read(file))
    monkeypatch.setattr(adapter_store, "MAX_UNSERVED", 1)
    return files


class Rank:
    """Store of one rank, and the adapters that it has dropped."""

    def __init__(self, **lora_modules: str) -> None:
        loader: Any = SimpleNamespace(
            dtype=torch.float32, device=torch.device("cpu"), config=SimpleNamespace(lora_modules=lora_modules)
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
    files.gone.add("bad")
    with pytest.raises(InvalidRequestError, match="does not fit this model: the file is gone"):
        rank.store.check(request("2", "b", "bad"))
    rank.store.release("2")
    assert rank.loaded == ["a"]
    assert not rank.dropped


def test_a_request_keeps_its_adapters_from_its_check_to_its_end(files: Files) -> None:
    rank = Rank()
    first, second, third = request("1", "a"), request("2", "b"), request("3", "a")
    rank.store.check(first)
    rank.store.check(second)
    files.gone |= {"a", "b"}
    rank.store.admit(first)
    rank.store.admit(second)
    assert sorted(rank.loaded) == ["a", "b"], "both are in use"
    rank.store.check(third)
    rank.store.release("1")
    assert (rank.loaded, rank.dropped) == (["b"], ["a"]), "the idle one goes"
    rank.store.admit(third)
    ((kept, scale),) = rank.store.composition(third)
    assert (kept.digest, scale) == ("a", 0.5)
    assert files.reads == ["a", "b"]
    rank.store.release("2")
    rank.store.release("3")
    assert rank.loaded == ["a"]
    assert rank.store.composition(request("4")) == ()


def test_a_lack_of_memory_drops_idle_adapters_and_no_others(tmp_path: Path) -> None:
    served = tmp_path / "served.safetensors"
    served.touch()
    rank = Rank(served=str(served))
    rank.begin(request("1", "a"))
    rank.store.release("1")
    rank.begin(request("2", "b"))
    rank.store.release("2")
    rank.begin(request("3", "c"))
    rank.store.release_memory()
    assert sorted(rank.loaded) == ["c", "served"]
    rank.store.release("3")
    rank.store.release_memory()
    assert rank.loaded == ["served"]


def test_served_adapters_that_are_gone_or_too_large_end_a_start_with_the_flag(tmp_path: Path, files: Files) -> None:
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b")}
    for path in paths.values():
        path.touch()
    files.room = 1
    with pytest.raises(ConfigError, match=r"^--lora-modules: the device has no memory left for .*b.safetensors"):
        Rank(**{name: str(path) for name, path in paths.items()})
    paths["b"].unlink()
    with pytest.raises(ConfigError, match=r"^--lora-modules b takes a safetensors file that exists"):
        Rank(**{name: str(path) for name, path in paths.items()})
