"""Several prompts in one call: their list, their parameters, and the error of the first that failed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from vllm_omni.errors import InvalidRequestError, RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt, PromptLike
from vllm_omni.outputs import OmniRequestOutput


def to_prompt_list(prompts: PromptLike | Iterable[PromptLike]) -> list[PromptLike]:
    """List of prompts from one prompt or an iterable of prompts. Raises InvalidRequestError for other objects."""
    if isinstance(prompts, str | Mapping | OmniPrompt):
        return [prompts]
    listed = None if isinstance(prompts, bytes | bytearray) else _list(prompts)
    if listed is None:
        raise InvalidRequestError(
            "prompts takes a prompt (a string, a mapping or an OmniPrompt) or a list of prompts, got "
            f"{type(prompts).__name__}",
            param="prompt",
        )
    return listed


def params_per_prompt(params: Any, num_prompts: int) -> list[Any]:
    """Sampling parameters of each prompt, from one object for all or a list with one each. Raises InvalidRequestError.

    An object of another type is returned for every prompt: the check of each prompt refuses it by name.
    """
    is_one = params is None or isinstance(params, str | bytes | Mapping | OmniDiffusionSamplingParams)
    # Read at most one more than there are prompts: `itertools.repeat` never ends.
    listed = None if is_one else _list(params, num_prompts + 1)
    if listed is None:
        listed = [params] * num_prompts
    if len(listed) != num_prompts:
        num_params = f"more than {num_prompts}" if len(listed) > num_prompts else len(listed)
        raise InvalidRequestError(
            f"got {num_prompts} prompts and {num_params} sampling_params: give one, or one each",
            param="sampling_params",
        )
    for one in listed:
        if isinstance(one, OmniDiffusionSamplingParams) and one.num_previews:
            raise InvalidRequestError(
                f"num_previews takes 0 here, got {one.num_previews}: Omni returns finished pictures alone, "
                "AsyncOmni delivers previews",
                param="num_previews",
            )
    return listed


def single_stage_params(sampling_params: Any, sampling_params_list: Any) -> Any:
    """Sampling parameters of the one stage that a model has here: `sampling_params`, or the list's only item.

    Raises InvalidRequestError.
    """
    if sampling_params_list is None:
        return sampling_params
    is_one = isinstance(sampling_params_list, str | Mapping)
    listed = None if is_one else _list(sampling_params_list, 2)
    if listed is None:
        listed = [sampling_params_list]
    if sampling_params is not None or len(listed) != 1:
        got = ("several of them" if listed else "none") if sampling_params is None else "sampling_params too"
        raise InvalidRequestError(
            "sampling_params_list takes the parameters of the one stage that a model has here, got "
            f"{got}; sampling_params takes one for all prompts, or a list of one each",
            param="sampling_params",
        )
    return listed[0]


def _list(items: Any, most: int | None = None) -> list[Any] | None:
    """First `most` items, or all; None for an object that is not iterable."""
    if not isinstance(items, Iterable):
        return None
    try:
        iterator = iter(items)
    except TypeError:  # an array without dimensions: an Iterable by its class, but not iterable
        return None
    return list(islice(iterator, most))


def raise_first_failure(outputs: Sequence[OmniRequestOutput]) -> None:
    """Raise the error of the first failed output, with all outputs attached; do nothing if none failed."""
    failed = [index for index, output in enumerate(outputs) if output.error is not None]
    if not failed:
        return
    error = outputs[failed[0]].error
    assert error is not None
    others = f" ({len(failed)} of {len(outputs)} prompts failed)" if len(failed) > 1 else ""
    raise prompt_error(error, failed[0], len(outputs), others, outputs) from error.__cause__


def prompt_error(
    error: RequestError,
    index: int,
    num_prompts: int,
    others: str = "",
    outputs: Sequence[OmniRequestOutput] = (),
) -> RequestError:
    """Copy of `error` with the prompt's number, which begins the message if there are several prompts.

    A copy, because the engine may have given the same error object to other requests.
    """
    located = error.copy()
    located.index, located.outputs = index, outputs
    if num_prompts > 1:
        located.args = (f"prompts[{index}]: {error}{others}",)
    return located
