"""Open files of adapters: what can be read from them after their removal, and when they are not kept."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.descriptors import descriptors_left
from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFile
from vllm_omni.diffusion.compute.weights.adapter_read import read_unchanged
from vllm_omni.diffusion.control.open_adapters import OpenAdapter, open_adapter
from vllm_omni.diffusion.messages.adapters import AdapterKey
from vllm_omni.errors import AdapterChangedError, InvalidRequestError
from vllm_omni.inputs.adapter_files import PEFT_CONFIG, PEFT_FILE, file_stamp


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An adapter of peft with settings: rank 2, alpha 8."""
    (tmp_path / PEFT_CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    return write(tmp_path / PEFT_FILE)


def write(file: Path, value: float = 1.0) -> Path:
    save_file({"a.lora_A.weight": torch.full((2, 4), value), "a.lora_B.weight": torch.ones(4, 2)}, file)
    return file


def key_of(file: Path) -> AdapterKey:
    return AdapterKey(str(file), file_stamp(str(file)))


def opened(key: AdapterKey) -> OpenAdapter:
    found = open_adapter(key)
    assert found is not None
    return found


def scale_in(key: AdapterKey, kept: OpenAdapter) -> float:
    (change,) = read_unchanged(key, AdapterFile.read, kept.files).changes
    return change.scale


def test_a_file_that_is_gone_is_read_with_its_settings(file: Path) -> None:
    kept = opened(key := key_of(file))
    file.rename(moved := file.with_name("moved"))
    assert scale_in(key, kept) == 4
    moved.unlink()
    file.with_name(PEFT_CONFIG).unlink()
    assert scale_in(key, kept) == 4
    write(file, 2.0)
    file.with_name(PEFT_CONFIG).write_text(json.dumps({"lora_alpha": 2}))
    assert scale_in(key, kept) == 4, "files of the same names are others"
    with pytest.raises(AdapterChangedError):
        read_unchanged(key, AdapterFile.read)


@pytest.mark.parametrize("name", [PEFT_FILE, PEFT_CONFIG])
def test_a_file_that_is_overwritten_is_told_apart(file: Path, name: str) -> None:
    kept = opened(key := key_of(file))
    path = file.with_name(name)
    with path.open("r+b") as stream:  # its size stays
        stream.write(stream.read(1))
        stream.seek(0)
    os.utime(path, ns=(0, 0))
    with pytest.raises(AdapterChangedError, match=r"adapter_model\.safetensors has changed since it was named"):
        scale_in(key, kept)


def test_a_file_that_is_cut_has_changed_and_one_that_does_not_fit_is_named_by_its_path(file: Path) -> None:
    file.write_bytes(b"no adapter")
    kept = opened(key := key_of(file))
    with pytest.raises(InvalidRequestError, match=f"^the LoRA adapter {file} does not fit this model: ") as caught:
        scale_in(key, kept)
    assert "/proc/" not in str(caught.value)
    file.write_bytes(b"")
    with pytest.raises(AdapterChangedError):
        scale_in(key, kept)


def test_only_the_state_that_was_named_is_kept(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = key_of(file)
    file.write_bytes(b"of another size")
    assert open_adapter(key) is None
    assert open_adapter(AdapterKey(str(file))) is None, "no state is known"
    file.unlink()
    assert open_adapter(key) is None
    os.mkfifo(file)
    assert open_adapter(key) is None
    assert not caplog.records


def test_a_lack_of_descriptors_is_told_and_costs_no_request(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = key_of(file)
    with caplog.at_level(logging.WARNING), descriptors_left(1):
        assert open_adapter(key) is None
    (record,) = caplog.records
    assert "is not kept open ([Errno 24] Too many open files" in record.message


def test_descriptors_are_closed_with_their_adapter(file: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    kept = opened(key_of(file))
    path = Path(kept.files.weights)
    assert path.exists()
    del kept
    assert not path.exists()
    assert set(os.listdir("/proc/self/fd")) == before
