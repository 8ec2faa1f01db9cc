"""Every attention backend against the definition, sequence by sequence in float64."""

from __future__ import annotations

import pytest
import torch

from vllm_omni.diffusion.attention import BACKENDS, create_attention
from vllm_omni.diffusion.packing import Offsets
from vllm_omni.errors import ConfigError

CPU = torch.device("cpu")
LENGTHS_Q = [3, 7, 7, 7, 1, 12, 3]
LENGTHS_K = [5, 7, 7, 2, 1, 12, 9]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("heads", [1, 3, 5])
def test_each_sequence_attends_to_itself_alone(name: str, heads: int) -> None:
    torch.manual_seed(heads)
    q = torch.randn(sum(LENGTHS_Q), heads, 16)
    k, v = torch.randn(2, sum(LENGTHS_K), heads, 16).unbind()
    offsets_q, offsets_k = Offsets.of(LENGTHS_Q, CPU), Offsets.of(LENGTHS_K, CPU)
    backend = create_attention(name)

    out = backend.attend(q, k, v, offsets_q, offsets_k)
    out_too, lse = backend.attend_with_lse(q, k, v, offsets_q, offsets_k)

    wanted_out, wanted_lse = [], []
    for qs, ks, vs in zip(q.double().split(LENGTHS_Q), k.double().split(LENGTHS_K), v.double().split(LENGTHS_K)):
        scores = torch.einsum("qhd,khd->qhk", qs, ks) / 4
        wanted_out.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), vs))
        wanted_lse.append(scores.logsumexp(-1))
    assert out.shape == q.shape
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, torch.cat(wanted_out).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out_too, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, torch.cat(wanted_lse).float(), atol=1e-5, rtol=1e-5)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--attention-backend takes sdpa.*got 'nope'"):
        create_attention("nope")
