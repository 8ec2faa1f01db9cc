"""`Omni.generate` with many prompts: any iterable of them, and failures that say which prompt failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from testbed.fakes import FakeExecutor, FakeRunner
from vllm_omni import AsyncOmni, Omni
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import ItemError
from vllm_omni.errors import (
    GenerationError,
    InvalidRequestError,
    ModerationBlockedError,
    QueueFullError,
    UnavailableError,
)
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPrompt

SMALL = OmniDiffusionSamplingParams(height=32, width=48, num_inference_steps=3, seed=5)
GUIDED, UNGUIDED = replace(SMALL, true_cfg_scale=4.0), replace(SMALL, true_cfg_scale=1.0)


@contextmanager
def omni_with(errors: Callable[[str, str, int], ItemError | None] | None = None, **settings: Any) -> Iterator[Omni]:
    """An Omni on a fake device. `errors`: prompt, phase and step to the failure there."""

    def error_of(request_id: str, phase: str, step: int) -> ItemError | None:
        return errors(executor.runner.prompt_of(request_id), phase, step) if errors else None

    executor = FakeExecutor(lambda: FakeRunner(errors=error_of))
    with (
        patch("vllm_omni.omni.make_executor", lambda config, info: executor),
        Omni(progress_bar=False, **(settings or {"model": "demo"})) as omni,
    ):
        yield omni


@pytest.mark.parametrize(
    "prompts",
    [
        ["a", "b"],
        ("a", "b"),
        (text for text in "ab"),
        {"a": 1, "b": 2}.keys(),
        np.array(["a", "b"]),
        map(OmniPrompt, "ab"),
        iter([{"prompt": "a"}, OmniPrompt("b")]),
    ],
)
def test_any_iterable_holds_prompts(prompts: object) -> None:
    with omni_with() as omni:
        outputs = omni.generate(prompts, (params for params in [SMALL, SMALL]))  # type: ignore[arg-type]
    assert [output.prompt for output in outputs] == ["a", "b"]


@pytest.mark.parametrize("prompt", ["ab", {"prompt": "ab"}, OmniPrompt("ab")])
def test_one_prompt_is_one_prompt(prompt: str | dict[str, str] | OmniPrompt) -> None:
    with omni_with() as omni:
        (output,) = omni.generate(prompt, SMALL)
        assert omni.generate([]) == []
    assert output.prompt == "ab"


@pytest.mark.parametrize("prompts", [b"ab", 3, None, np.array("ab")])
def test_other_objects_are_told_to_be_lists(prompts: object) -> None:
    with omni_with() as omni, pytest.raises(InvalidRequestError, match="or a list of prompts, got ") as caught:
        omni.generate(prompts)  # type: ignore[arg-type]
    assert str(caught.value).endswith(type(prompts).__name__)


def test_a_wrong_prompt_among_good_ones_is_named_before_anything_runs() -> None:
    wrong = OmniDiffusionSamplingParams(height=33)
    with omni_with() as omni:
        with pytest.raises(InvalidRequestError, match=r"^prompts\[2\]: size 64x33") as caught:
            omni.generate(["a", "b", "c"], [SMALL, SMALL, wrong])
        assert (caught.value.index, caught.value.param, caught.value.outputs) == (2, "height", ())
        with pytest.raises(InvalidRequestError, match=r"^prompts\[1\]: a prompt is a string or a mapping"):
            omni.generate(["a", 3])  # type: ignore[list-item]
        with pytest.raises(InvalidRequestError, match=r"^size 64x33"):
            omni.generate("a", wrong)
        assert omni.generate("a", SMALL)[0].finished


def test_a_failure_among_many_leaves_the_results_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    def errors(prompt: str, phase: str, step: int) -> ItemError | None:
        if phase == "decode" and prompt == "blocked":
            return ItemError("the safety checker replaced it", "blocked")
        return ItemError("float16 overflowed", "not_finite") if phase == "decode" and prompt == "black" else None

    with omni_with(errors) as omni:
        with pytest.raises(ModerationBlockedError) as caught:
            omni.generate(["a", "blocked", "b", "black"], SMALL)
        assert str(caught.value) == "prompts[1]: the safety checker replaced it (2 of 4 prompts failed)"
        assert caught.value.index == 1
        outputs = caught.value.outputs
        assert [output.prompt for output in outputs] == ["a", "blocked", "b", "black"]
        assert [len(output.images) for output in outputs] == [1, 0, 1, 0]
        assert [type(output.error) for output in outputs] == [
            type(None),
            ModerationBlockedError,
            type(None),
            GenerationError,
        ]
        assert str(outputs[1].error) == "the safety checker replaced it"
        assert all(output.finished and output.seeds == [5] for output in outputs)

        with pytest.raises(GenerationError, match=r"^float16 overflowed$") as caught_alone:
            omni.generate("black", SMALL)
        assert caught_alone.value.index == 0
    assert "float16 overflowed" in caplog.text
    assert "\n" not in caplog.records[0].getMessage(), "a failure with a kind of its own has no traceback"


def params_read_at_most(count: int) -> Iterator[OmniDiffusionSamplingParams]:
    """In place of `itertools.repeat`: a test must end where too many are read, too."""
    yield from repeat(SMALL, count)
    raise AssertionError(f"more than {count} are read")


def test_parameters_without_an_end_are_refused() -> None:
    with omni_with() as omni:
        for name, count, message in (
            ("sampling_params", 3, "got 2 prompts and more than 2 sampling_params: give one, or one each"),
            ("sampling_params_list", 2, "parameters of the one stage that a model has here, got several of them"),
        ):
            endless: dict[str, Any] = {name: params_read_at_most(count)}
            with pytest.raises(InvalidRequestError, match=message):
                omni.generate(["a", "b"], **endless)
        with pytest.raises(InvalidRequestError, match="got 2 prompts and 1 sampling_params"):
            omni.generate(["a", "b"], [SMALL])
        with pytest.raises(InvalidRequestError, match="the one stage that a model has here, got none"):
            omni.generate("a", sampling_params_list=[])


def test_parameters_that_can_be_read_once_are_refused() -> None:
    sigmas: Any = (sigma for sigma in [1.0, 0.5])
    with omni_with() as omni:
        with pytest.raises(InvalidRequestError, match=r"^prompts\[0\]: sigmas takes a list of numbers, got <generator"):
            omni.generate(["a", "b"], replace(SMALL, num_inference_steps=None, sigmas=sigmas))
        assert list(sigmas) == [1.0, 0.5], "not used up"
        outputs = omni.generate(["a", "b"], replace(SMALL, num_inference_steps=None, sigmas=[1.0, 0.5]))
    assert [output.num_inference_steps for output in outputs] == [2, 2]


def test_prompts_beyond_the_queue_run_none_of_the_call() -> None:
    config = OmniDiffusionConfig("demo", max_num_queued_reqs=2)
    with omni_with(config=config) as omni:
        with pytest.raises(QueueFullError, match=r"^prompts\[2\]: ") as caught:
            omni.generate(["a", "b", "c"], SMALL)
        assert (caught.value.index, caught.value.outputs) == (2, ())
        assert len(omni.generate(["a", "b"], SMALL)) == 2, "the first two left the queue"


def test_an_engine_that_takes_nothing_blames_no_prompt() -> None:
    with omni_with() as omni:
        omni._async.begin_drain()
        with pytest.raises(UnavailableError, match="draining") as caught:
            omni.generate(["a", "b"], SMALL)
        assert caught.value.index is None
        assert "prompts[" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ("a", GUIDED, "true_cfg_scale without a negative_prompt (an empty one will do)"),
        ({"prompt": "a", "negative_prompt": "b"}, UNGUIDED, "negative_prompt without true_cfg_scale above 1"),
        ({"prompt": "a", "negative_prompt": ""}, GUIDED, None),
        ("a", UNGUIDED, None),
    ],
)
async def test_half_of_guidance_is_said_once(
    prompt: str | dict[str, str],
    params: OmniDiffusionSamplingParams,
    said: str | None,
    tiny_model: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = str(tiny_model)  # unlike the demo model, it has no guidance by default
    with omni_with(model=model) as omni:
        omni.generate([prompt, prompt], params)
        omni.generate(prompt, params)
    expected = [] if said is None else [f"there is no guidance, and this has no effect: {said} (said once)"]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == expected

    caplog.clear()
    with patch("vllm_omni.omni.make_executor", lambda config, info: FakeExecutor()):
        asynchronous = AsyncOmni(model=model)
        await asynchronous.start()
    try:
        for _ in range(2):
            await asynchronous.generate(prompt, params).aclose()
    finally:
        await asynchronous.close()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == expected
