"""Parameters of single models, under the import path of the public vllm-omni package: no model here has any."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from vllm_omni.errors import InvalidRequestError
from vllm_omni.foreign.module_names import refuse_names
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.inputs.foreign_params import NO_FIELDS


def apply_declared_extra_args(
    sampling_params: OmniDiffusionSamplingParams, declared_params: Collection[str], user_kwargs: Mapping[str, object]
) -> None:
    """Raise InvalidRequestError if a declared parameter is given; otherwise do nothing."""
    given = [name for name in sorted(declared_params) if user_kwargs.get(name) is not None]
    if given:
        raise InvalidRequestError(f"{', '.join(given)}: {NO_FIELDS['extra_args']}", param=given[0])


if not TYPE_CHECKING:  # type checkers know our names alone
    __getattr__ = refuse_names(__name__, {}, NO_FIELDS["extra_args"])
