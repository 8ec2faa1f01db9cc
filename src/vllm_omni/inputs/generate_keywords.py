"""Keywords of the public vllm-omni package's `generate`: ignored here, or refused with what to use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vllm_omni.errors import InvalidRequestError
from vllm_omni.foreign.class_decorators import has_no_effect
from vllm_omni.foreign.keywords import log_ignored
from vllm_omni.inputs.data import PARAMETERS, check_modalities
from vllm_omni.inputs.foreign_params import FOREIGN_PARAMS, IN_PROMPT, PROMPT_FORM

_IGNORED = ("arrival_time", "reasoning_ended", "reasoning_parser_kwargs", "session_id", "trace_headers", "use_tqdm")
"""Keywords without effect on the pictures. `use_tqdm` is here for `AsyncOmni`, which shows no bar of steps."""
_HERE = {
    "data_parallel_rank": "the copies of a model share the requests by their load",
    "prompt_text": "the prompt is the first argument",
    "py_generator": "outputs come as a list; AsyncOmni gives them one by one",
    "request_id": "AsyncOmni.generate takes it; here outputs come in the order of the prompts",
    "tokenization_kwargs": "here OmniDiffusionSamplingParams(max_sequence_length=...)",
    **dict.fromkeys(IN_PROMPT, PROMPT_FORM),
}


def check_call(keywords: Mapping[str, Any], accepted: Collection[str]) -> None:
    """Check keywords that `generate` does not have; `accepted`: those that it has.

    Keywords without effect are ignored and logged. Raises InvalidRequestError, with what to use, for the others unless
    they ask for nothing, and for a keyword that no package has.
    """
    ignored = []
    for name, value in keywords.items():
        if name == "output_modalities":
            check_modalities(value, name)
        elif name in _IGNORED:
            if not has_no_effect(value):
                ignored.append(name)
        elif name in PARAMETERS or name in FOREIGN_PARAMS or name in _HERE:
            harmless = has_no_effect(value) or (name == "priority" and value == 0)
            if not harmless:
                here = _HERE.get(name, f"it is a sampling parameter: give OmniDiffusionSamplingParams({name}=...)")
                raise InvalidRequestError(f"generate takes no {name!r}: {here}", param=name)
        else:
            raise InvalidRequestError(
                f"generate takes no {name!r}; accepted are {', '.join(accepted)}, and sampling parameters as "
                "OmniDiffusionSamplingParams(...)",
                param=name,
            )
    log_ignored(ignored)
