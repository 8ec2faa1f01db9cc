"""Parameters of stages, under the import path of the public vllm-omni package: a model has one stage here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_omni.foreign.module_names import refuse_names
from vllm_omni.inputs.data import OmniDiffusionSamplingParams


def clone_sampling_params(params: OmniDiffusionSamplingParams) -> OmniDiffusionSamplingParams:
    """`params`, which cannot be changed and so needs no copy."""
    return params


if not TYPE_CHECKING:  # type checkers know our names alone
    __getattr__ = refuse_names(
        __name__, {}, "a model has one stage here: give its OmniDiffusionSamplingParams to Omni.generate"
    )
