"""Checkpoints as files: every bit comes back, and other files are one clear error."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save

from vllm_omni.diffusion.messages.checkpoint import Checkpoint, check_checkpoint
from vllm_omni.errors import InvalidRequestError
from vllm_omni.video_jobs.checkpoint_file import from_bytes, to_bytes

KEY = "wan video_1"
RANDOM = np.random.default_rng(0)


def bits_of_bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)


CHECKPOINT = Checkpoint(
    7,
    {
        "latents": RANDOM.standard_normal((6, 4), dtype=np.float32),
        "scheduler.model_outputs.0": bits_of_bfloat16(RANDOM.standard_normal((6, 4), dtype=np.float32)),
        "scheduler.last_sample": RANDOM.standard_normal((4, 6)).astype(np.float16).T,
    },
    {"latents": "float32", "scheduler.model_outputs.0": "bfloat16", "scheduler.last_sample": "float16"},
    {"scheduler": "FlowUniPC", "seed": 2**63 - 1, "timestep": 937.5, "none": None, "list": [1, None, 0.1]},
)


def test_a_checkpoint_comes_back_bit_for_bit() -> None:
    read = from_bytes(to_bytes(CHECKPOINT, KEY), KEY)
    assert (read.step, read.dtypes, read.values) == (CHECKPOINT.step, CHECKPOINT.dtypes, CHECKPOINT.values)
    assert read.arrays.keys() == CHECKPOINT.arrays.keys()
    for name, array in CHECKPOINT.arrays.items():
        assert read.arrays[name].dtype == array.dtype
        assert np.array_equal(read.arrays[name], array)
    check_checkpoint(read, num_steps=7)


def test_a_file_of_another_request_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"is of 'wan video_1', not of 'wan video_2'") as error:
        from_bytes(to_bytes(CHECKPOINT, KEY), "wan video_2")
    assert error.value.param == "resume"


WHOLE = to_bytes(CHECKPOINT, KEY)
FACTS = {"key": KEY, "step": 1, "dtypes": {}, "values": {}}


def with_facts(**changes: object) -> bytes:
    return bytes(save({}, metadata={"checkpoint": json.dumps(FACTS | changes)}))


DEEP = bytes(save({}, metadata={"checkpoint": '{"x":' + 100_000 * "[" + 100_000 * "]" + "}"}))
"""JSON of more levels than a parser follows."""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        pickle.dumps(CHECKPOINT),
        bytes(save(CHECKPOINT.arrays)),
        bytes(save({}, metadata={"checkpoint": "[]"})),
        bytes(save({}, metadata={"checkpoint": "{"})),
        with_facts(step="1"),
        with_facts(step=1.5),
        with_facts(key=None),
        with_facts(dtypes={"latents": ["float32"]}),
        with_facts(values={"seed": {"nested": 1}}),
        DEEP,
        WHOLE + b"\0",
        (2**62).to_bytes(8, "little") + WHOLE[8:],
        WHOLE.replace(b'"I16"', b'"I17"'),
        WHOLE.replace(b'"I16"', b'"I64"'),
    ],
)
def test_a_foreign_or_damaged_file_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="the checkpoint cannot be read: ") as error:
        from_bytes(data, KEY)
    assert error.value.param == "resume"
    assert "\n" not in str(error.value)


def test_a_file_cut_at_any_place_is_an_error() -> None:
    for length in range(0, len(WHOLE), 7):
        with pytest.raises(InvalidRequestError, match="the checkpoint cannot be read: "):
            from_bytes(WHOLE[:length], KEY)
