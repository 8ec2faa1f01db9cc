"""Every attention backend against the definition, sequence by sequence in float64.

On a GPU where there is one. Elsewhere the backends of GPUs run on stand-ins for their kernels (`kernels.py`), or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.diffusion.compute.attention.kernels import EMULATED, emulate, install_vllm
from tests.waiting import no_waits
from vllm_omni.diffusion.compute.attention import BACKENDS, AttentionBackend, Setting, backend_class, create_attention
from vllm_omni.diffusion.compute.attention.sharded import Merged
from vllm_omni.diffusion.compute.packing import Offsets
from vllm_omni.diffusion.data import AttentionBackendName

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Absolute and relative, of the output and of the log-sum-exp.
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-3), torch.float16: (3e-3, 2e-3)}

PACKS = {
    "one": ([33], [33]),
    "equal": ([17, 17, 17], [17, 17, 17]),
    "mixed": ([3, 7, 7, 7, 1, 12, 3, 150], [5, 7, 7, 2, 1, 12, 9, 150]),
    "one long, one short": ([257, 31], [129, 300]),
    "some empty": ([0, 4, 6, 0, 5, 9], [3, 0, 6, 0, 0, 40]),
    "no keys": ([4, 2], [0, 0]),
    "no queries": ([0, 0], [4, 2]),
}
"""Lengths of queries and of keys."""

Make = Callable[[torch.dtype, int], AttentionBackend]


def setting(dtype: torch.dtype, head_dim: int) -> Setting:
    return Setting(DEVICE, torch.cuda.get_device_capability() if HAS_GPU else None, dtype, head_dim)


@pytest.fixture(params=BACKENDS)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """The backend for a dtype and a head_dim; skips where it says that it cannot."""

    def for_setting(dtype: torch.dtype, head_dim: int) -> AttentionBackend:
        name = request.param
        if (reason := backend_class(name).why_not(setting(dtype, head_dim))) is not None:
            if HAS_GPU or name not in EMULATED:
                pytest.skip(f"{name} {reason}")
            emulate(name, monkeypatch)
        return create_attention(name)

    return for_setting


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def offsets_of(*lengths: list[int]) -> list[Offsets]:
    return [Offsets.of(x, DEVICE) for x in lengths]


def definition(q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int]) -> tuple[Tensor, Tensor]:
    """In float64; 0 and -inf where there are no keys."""
    outs, lses = [], []
    for qs, ks, vs in zip(q.double().split(lengths_q), k.double().split(lengths_k), v.double().split(lengths_k)):
        scores = torch.einsum("qhd,khd->qhk", qs, ks) * q.shape[-1] ** -0.5
        outs.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), vs))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (3, 32), (4, 48), (5, 128)])
@pytest.mark.parametrize("pack", PACKS)
def test_each_sequence_attends_to_itself_alone(
    make: Make, dtype: torch.dtype, heads: int, head_dim: int, pack: str
) -> None:
    backend = make(dtype, head_dim)
    lengths_q, lengths_k = PACKS[pack]
    q = random(dtype, sum(lengths_q), heads, head_dim)
    # Keys and values lie side by side, which is so after an exchange.
    k, v = random(dtype, sum(lengths_k), 2, heads, head_dim).unbind(1)
    offsets = offsets_of(lengths_q, lengths_k)

    out = backend.attend(q, k, v, *offsets)
    out_too, lse = backend.attend_with_lse(q, k, v, *offsets)

    wanted_out, wanted_lse = definition(q, k, v, lengths_q, lengths_k)
    assert out.shape == out_too.shape == q.shape
    assert out.dtype == out_too.dtype == dtype
    assert lse.shape == q.shape[:2]
    assert lse.dtype == torch.float32
    for_out, for_lse = TOLERANCES[dtype]
    assert_near(out, wanted_out, for_out)
    assert_near(out_too, wanted_out, for_out)
    assert_near(lse, wanted_lse, for_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_keys_merge_to_the_whole(make: Make, dtype: torch.dtype) -> None:
    backend = make(dtype, 64)
    lengths, firsts = [90, 7, 40], [30, 0, 40]  # keys of each sequence, and keys in the first block
    q, k, v = random(dtype, 3, sum(lengths), 3, 64).unbind()
    (whole,) = offsets_of(lengths)
    merged = Merged()
    cuts = [(0, first, n) for first, n in zip(firsts, lengths)]
    for block in range(2):
        spans = [cut[block : block + 2] for cut in cuts]
        rows = torch.cat([torch.arange(a, b) + start for (a, b), start in zip(spans, whole.values)]).to(DEVICE)
        (held,) = offsets_of([b - a for a, b in spans])
        merged.add(*backend.attend_with_lse(q, k[rows], v[rows], whole, held))
    assert_near(merged.out, definition(q, k, v, lengths, lengths)[0], TOLERANCES[dtype][0])


@pytest.mark.parametrize("pack", ["one", "mixed", "some empty"])
def test_the_host_does_not_wait_for_the_device(make: Make, pack: str) -> None:
    if not HAS_GPU:
        pytest.skip("needs a GPU")  # the stand-ins read what they are told
    backend = make(torch.bfloat16, 64)
    lengths_q, lengths_k = PACKS[pack]
    q = random(torch.bfloat16, sum(lengths_q), 3, 64)
    k, v = random(torch.bfloat16, 2, sum(lengths_k), 3, 64).unbind()
    offsets = offsets_of(lengths_q, lengths_k)
    for run in (backend.attend, backend.attend_with_lse):
        run(q, k, v, *offsets)  # libraries may wait while they load and plan
        with no_waits():
            run(q, k, v, *offsets)


class NoReads(TorchDispatchMode):
    """Fails where a value of a tensor is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_no_value_is_read_on_the_way_to_the_kernels() -> None:
    lengths = [64, 40, 40, 0, 8]
    q, k, v = random(torch.float32, 3, sum(lengths), 3, 64).unbind()
    offsets = offsets_of(lengths, [*lengths[:-1], 8])
    backend = create_attention("sdpa")
    with NoReads():  # type: ignore[no-untyped-call]
        backend.attend(q, k, v, *offsets)
        backend.attend_with_lse(q, k, v, *offsets)


HOPPER, AMPERE, TURING = (9, 0), (8, 6), (7, 5)
FLASH = ["torch_varlen", "cudnn", "vllm_flash"]


@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "reason"),
    [
        (None, torch.bfloat16, 128, "needs a CUDA GPU"),
        (TURING, torch.float16, 128, "needs compute capability 8.0, this GPU has 7.5"),
        (HOPPER, torch.float32, 128, "takes bfloat16 and float16, not float32"),
        (AMPERE, torch.bfloat16, 36, "takes heads of a multiple of 8 up to"),
        (HOPPER, torch.bfloat16, 264, "takes heads of a multiple of 8 up to"),
    ],
)
def test_a_backend_says_what_it_lacks(
    name: AttentionBackendName,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    reason: str,
) -> None:
    said = backend_class(name).why_not(Setting(CPU, capability, dtype, head_dim))
    assert said is not None
    assert said.startswith(reason)


@pytest.mark.parametrize(
    ("capability", "built", "reason"),
    [
        (HOPPER, (True, True), None),
        (HOPPER, (True, False), None),
        (AMPERE, (True, True), None),
        (AMPERE, (False, True), "vLLM was built without a FlashAttention for this GPU"),
    ],
)
def test_vllm_brings_a_flash_attention_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: tuple[bool, bool], reason: str | None
) -> None:
    install_vllm(monkeypatch, FA2_AVAILABLE=built[0], FA3_AVAILABLE=built[1])
    assert backend_class("vllm_flash").why_not(Setting(CPU, capability, torch.bfloat16, 128)) == reason


def test_a_vllm_without_flash_attention_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install_vllm(monkeypatch)
    said = backend_class("vllm_flash").why_not(Setting(CPU, HOPPER, torch.bfloat16, 128))
    assert said is not None
    assert said.startswith("vLLM's FlashAttention does not import: cannot import name")


def test_every_name_of_the_flag_is_a_backend() -> None:
    assert tuple(BACKENDS) == get_args(AttentionBackendName)
