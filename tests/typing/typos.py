"""Mistakes that type checkers must find; `make check` reads this file, nothing runs it.

Each line has an ignore, and mypy reports an ignore that silences nothing: so it fails where a mistake is not found.
"""

from __future__ import annotations

from pathlib import Path

from vllm_omni import AsyncOmni, Omni
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.inputs import data
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

Omni(modle="demo")  # type: ignore[call-arg]
Omni("demo", dtype="float8")  # type: ignore[arg-type]
Omni("demo", max_num_seqs="many")  # type: ignore[arg-type]
AsyncOmni("demo", cache_backnd="tea_cache")  # type: ignore[call-arg]
DiffusionParallelConfig(ulysses=2)  # type: ignore[call-arg]
OmniDiffusionSamplingParams(heigth=64)  # type: ignore[call-arg]
OmniDiffusionSamplingParams(sigmas=0.5)  # type: ignore[arg-type]

omni = Omni(Path("model"), parallel_config=DiffusionParallelConfig(ring_degree=2), progress_bar=False)
params = OmniDiffusionSamplingParams(sigmas=[1.0, 0.5])
omni.generate("a", heigth=64)  # type: ignore[arg-type]
omni.generate("a", {"height": 64})  # type: ignore[dict-item]
omni.generate(iter(["a", "b"]), [params, params])
AsyncOmni("demo").generate("a", params, step=3)  # type: ignore[arg-type]
data.OmniSamplingParms  # type: ignore[attr-defined]  # noqa: B018
params.extra_args  # type: ignore[attr-defined]  # noqa: B018
omni.start_profile()  # type: ignore[attr-defined]
