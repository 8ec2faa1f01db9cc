"""Headers of GGUF files: what is read, and files that are refused."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest

from vllm_omni.diffusion.catalog.gguf_header import TYPES, read_gguf_header
from vllm_omni.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with metadata of every kind and three tensors, one of them reshaped."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen_image")
    writer.add_bool("some.bool", True)
    writer.add_float64("some.float", 1.5)
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.texts", ["a", "bc", "ä"])
    writer.add_array("comfy.gguf.orig_shape.patches", [6, 2, 1, 4, 4])
    writer.add_tensor("blocks.0.weight", np.zeros((5, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.add_tensor("blocks.0.bias", np.arange(5, dtype=np.float32))
    writer.add_tensor("patches", np.zeros((6, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_names_types_shapes_and_places_are_read(file: Path) -> None:
    header = read_gguf_header(file)
    assert header.architecture == "qwen_image"
    found = {name: (tensor.type.name, tensor.shape) for name, tensor in header.tensors.items()}
    assert found == {
        "blocks.0.weight": ("Q4_K", (5, 256)),
        "blocks.0.bias": ("F32", (5,)),
        "patches": ("F16", (6, 2, 1, 4, 4)),
    }
    for theirs in gguf.GGUFReader(file).tensors:
        tensor = header.tensors[theirs.name]
        assert (tensor.first, tensor.num_bytes) == (theirs.data_offset, theirs.n_bytes)


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_gguf_header(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_truncated_file_is_refused_wherever_it_ends(file: Path) -> None:
    content = file.read_bytes()
    size = max(tensor.first + tensor.num_bytes for tensor in read_gguf_header(file).tensors.values())
    for length in range(4, size, 7):
        assert f"is truncated or damaged: it has {length} bytes and needs" in refusal(file, content[:length])
    assert f"it has {size - 1} bytes and needs {size}" in refusal(file, content[: size - 1])


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    assert "is no GGUF file: it begins with b'PK\\x03\\x04'" in refusal(file, b"PK\x03\x04" + content[4:])
    assert "is no GGUF file: it begins with b''" in refusal(file, b"")
    assert "it is a Git LFS pointer" in refusal(file, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "GGUF version takes 2 or 3, got 1" in refusal(file, content[:4] + struct.pack("<I", 1) + content[8:])
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.gguf: No such file"):
        read_gguf_header(tmp_path / "gone.gguf")


def test_a_type_that_is_not_read_is_named_with_its_tensor(file: Path) -> None:
    content = file.read_bytes()
    place = content.index(b"blocks.0.weight") + len(b"blocks.0.weight") + 4 + 2 * 8
    (number,) = struct.unpack_from("<I", content, place)
    assert TYPES[number].name == "Q4_K"
    for other, words in ((22, "type 22 (IQ2_S)"), (99, "type 99 (unknown)")):
        message = refusal(file, content[:place] + struct.pack("<I", other) + content[place + 4 :])
        assert f"model.gguf: blocks.0.weight has {words}; types that are read are F32, " in message


def test_damaged_headers_are_refused(file: Path) -> None:
    """Any byte of the header may be wrong: the file is read, or refused with a reason; nothing hangs."""
    content = file.read_bytes()
    end = content.index(b"patches", content.index(b"blocks.0.bias")) + 40
    for place in range(4, end, 2):
        for value in (9, 255):
            file.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            with suppress(ConfigError):
                read_gguf_header(file)
