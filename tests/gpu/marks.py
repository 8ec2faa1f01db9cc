"""Marks of test modules that need a GPU."""

from __future__ import annotations

import pytest
import torch

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
"""PyTorch's compiler imports modules of PyTorch that are deprecated, and recommends TF32.

It does so at its first use in a process, which may be in any module with this mark.
"""
