"""Activations that several Triton kernels compute."""

from __future__ import annotations

import math

import triton
import triton.language as tl

TWICE_ROOT_OF_2_OVER_PI = tl.constexpr(2 * math.sqrt(2 / math.pi))


@triton.jit
def gelu_by_tanh(x):
    """GELU of float32 values, approximated with tanh: x / 2 * (1 + tanh(y)) is x / (1 + exp(-2 * y))."""
    return x / (1 + tl.exp(-x * TWICE_ROOT_OF_2_OVER_PI * (1 + 0.044715 * x * x)))
