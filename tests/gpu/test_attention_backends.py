"""The attention backends on a GPU's own kernels."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():  # elsewhere the same tests run with stand-ins, where they live
    pytest.skip("needs a GPU", allow_module_level=True)

from tests.diffusion.compute.attention.test_backends import (
    make,
    test_blocks_of_keys_merge_to_the_whole,
    test_each_sequence_attends_to_itself_alone,
    test_the_host_does_not_wait_for_the_device,
)

__all__ = [
    "make",
    "test_blocks_of_keys_merge_to_the_whole",
    "test_each_sequence_attends_to_itself_alone",
    "test_the_host_does_not_wait_for_the_device",
]
