"""Scripts of the public vllm-omni package: import paths, keywords, parameters and outputs that mean the same run here.

A name with another meaning is refused in one line that says which one to use.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from testbed.fakes import FakeExecutor, fake_image, make_request
from testbed.tiny_models import photo
from testbed.tiny_z_image import build_tiny_z_image
from vllm_omni import outputs
from vllm_omni.diffusion.catalog.model_adapters import with_model_adapters
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig, parse_cache_config
from vllm_omni.diffusion.data import logger as public_logger
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.omni import Omni
from vllm_omni.errors import ConfigError, InvalidRequestError
from vllm_omni.foreign.keywords import as_keywords, flags_by_keyword, ignored_keywords
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.lora.request import LoRARequest
from vllm_omni.lora.utils import stable_lora_int_id
from vllm_omni.omni_settings import ACCEPTED, make_config
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.platforms import current_omni_platform

Adapter: Any = LoRARequest  # called in ways that its types do not show
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def device() -> Iterator[FakeExecutor]:
    executor = FakeExecutor()
    with patch("vllm_omni.omni.make_executor", lambda config, info: executor):
        yield executor


def fresh_generator(seed: int) -> torch.Generator:
    return torch.Generator(device=current_omni_platform.device_type).manual_seed(seed)


def expected(seed: int) -> np.ndarray:
    return fake_image(make_request(size=(32, 48), seed=seed))


def test_a_script_of_text_to_image(caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {
        "model": "demo",
        "enable_layerwise_offload": False,
        "vae_use_slicing": current_omni_platform.is_npu(),
        "cache_backend": "cache_dit",
        "cache_config": {"Fn_compute_blocks": 1, "scm_steps_mask_policy": None, "scm_steps_policy": "dynamic"},
        "enable_cache_dit_summary": False,
        "ulysses_degree": 1,
        "ring_degree": 1,
        "ulysses_mode": "strict",
        "cfg_parallel_size": 1,
        "tensor_parallel_size": 1,
        "vae_patch_parallel_size": 1,
        "enable_expert_parallel": False,
        "enforce_eager": True,
        "mode": "text-to-image",
        "log_stats": False,
        "profiler_config": None,
        "init_timeout": 600,
        "stage_init_timeout": 600,
        "progress_bar": False,
    }
    with patch("vllm_omni.omni.make_executor", return_value=FakeExecutor()) as make_executor:
        omni = Omni(**settings)
    ignored = "ignored, as the pictures are the same without: ulysses_mode, mode, init_timeout, stage_init_timeout"
    assert [record.getMessage() for record in caplog.records] == [ignored]
    served = OmniDiffusionConfig(
        "demo",
        cache_backend="cache_dit",
        cache_config={"Fn_compute_blocks": 1, "scm_steps_mask_policy": None, "steps_computation_policy": "dynamic"},
        enforce_eager=True,
        max_num_queued_reqs=2**31,
        max_queue_seconds=float("inf"),
        max_pixels=2**31,
        max_num_frames=2**31,
        progress_bar=False,
    )
    assert make_executor.call_args.args[0] == with_model_adapters(served, load_model_info("demo"))
    params = OmniDiffusionSamplingParams(
        generator=fresh_generator(142),  # type: ignore[call-arg]
        true_cfg_scale=4.0,
        guidance_scale_2=1.0,
        num_outputs_per_prompt=2,
        lora_requests=[],
        lora_scales=[],
        extra_args={"system_prompt": None},
        **SMALL,
    )
    outputs = omni.generate([{"prompt": "a cup", "negative_prompt": None}], params)
    images = outputs[0].request_output.images
    assert all(np.array_equal(np.asarray(image), expected(142 + i)) for i, image in enumerate(images))
    omni.close()
    public_logger.info("%d pictures", len(images))


def test_a_script_of_image_to_image(tiny_edit_model: Path) -> None:
    omni = Omni(model=str(tiny_edit_model), cache_backend=None, cache_config=None, trust_remote_code=False)  # type: ignore[call-arg]
    params = OmniDiffusionSamplingParams(
        generator=fresh_generator(3),  # type: ignore[call-arg]
        true_cfg_scale=4.0,
        guidance_scale_2=None,
        num_outputs_per_prompt=1,
        layers=4,
        resolution=640,
        **SMALL,
    )
    prompt = {"prompt": "at night", "negative_prompt": "", "multi_modal_data": {"image": [photo(64, 64, 1)]}}
    (output,) = omni.generate(prompt, sampling_params_list=[params])
    assert np.array_equal(np.asarray(output.images[0]), expected(3))
    omni.close()


def test_a_script_of_z_image(tmp_path: Path) -> None:
    omni = Omni(str(build_tiny_z_image(tmp_path / "model")))
    prompts = [{"prompt": text, "negative_prompt": "blurry"} for text in "abc"]
    outputs = omni.generate(prompts, OmniDiffusionSamplingParams(guidance_scale=4.0, seed=42, **SMALL), use_tqdm=False)
    for output in outputs:
        inner = output.request_output[0]
        assert isinstance(inner, OmniRequestOutput)
        assert np.array_equal(np.asarray(inner.images[0]), expected(42))
    omni.close()


async def test_a_list_with_the_parameters_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    params = OmniDiffusionSamplingParams(seed=5, **SMALL)
    with Omni("demo") as omni:
        for given in (params, [params], (params,), iter([params])):
            outputs = omni.generate(["a", "b"], sampling_params_list=given, use_tqdm=False)
            assert [output.seeds for output in outputs] == [[5], [5]]
        assert capsys.readouterr().err == "", "use_tqdm=False hides the bar"
        omni.generate("a", params)
        assert "denoising" in capsys.readouterr().err
        for wrong in (
            {"sampling_params_list": [params, params]},
            {"sampling_params_list": [params], "sampling_params": params},
        ):
            with pytest.raises(InvalidRequestError, match="sampling_params_list takes the parameters of the one stage"):
                omni.generate(["a", "b"], **wrong)
    asynchronous = AsyncOmni("demo")
    await asynchronous.start()
    outputs = [output async for output in asynchronous.generate("a", sampling_params_list=[params])]
    assert outputs[-1].seeds == [5]
    await asynchronous.close()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"height": 64},
            "generate takes no 'height': it is a sampling parameter: give OmniDiffusionSamplingParams(height=...)",
        ),
        (
            {"guidance_scale_2": 2.0},
            "generate takes no 'guidance_scale_2': it is a sampling parameter: give OmniDiffusionSamplingParams(",
        ),
        ({"lora_request": "ink"}, "generate takes no 'lora_request': it is a sampling parameter: give "),
        ({"priority": 3}, "generate takes no 'priority': it is a sampling parameter: give "),
        ({"prompt_text": "a"}, "generate takes no 'prompt_text': the prompt is the first argument"),
        ({"tokenization_kwargs": {"max_length": 3}}, "generate takes no 'tokenization_kwargs': here OmniDiffusionSam"),
        ({"output_modalities": ["audio"]}, 'output_modalities takes ["image"], or leave it out'),
        ({"negative_prompt": "x"}, "generate takes no 'negative_prompt': it is part of the prompt: {\"prompt\": "),
        ({"py_generator": True}, "generate takes no 'py_generator': outputs come as a list; AsyncOmni gives them "),
    ],
)
async def test_other_keywords_of_a_call_are_told_their_place(keywords: dict[str, Any], message: str) -> None:
    with Omni("demo", progress_bar=False) as omni:
        with pytest.raises(InvalidRequestError, match="^" + re.escape(message)) as caught:
            omni.generate("a", **keywords)
        assert caught.value.param in keywords
        with pytest.raises(InvalidRequestError, match="^" + re.escape(message)):
            AsyncOmni("demo").generate("a", **keywords)
        omni.generate("a", OmniDiffusionSamplingParams(**SMALL), py_generator=False)  # type: ignore[arg-type]


async def test_keywords_of_a_call_without_effect_are_ignored_and_named(caplog: pytest.LogCaptureFixture) -> None:
    harmless: dict[str, Any] = {
        "output_modalities": ["image"],
        "priority": 0,
        "lora_request": None,
        "prompt_text": None,
    }
    params = OmniDiffusionSamplingParams(**SMALL)
    with Omni("demo", progress_bar=False) as omni:
        omni.generate("a", params, **harmless)
        assert not caplog.records
        omni.generate("a", params, session_id="s", trace_headers={"traceparent": "x"}, arrival_time=1.0)  # type: ignore[arg-type]
        ignored = "ignored, as the pictures are the same without: session_id, trace_headers, arrival_time"
        assert [record.getMessage() for record in caplog.records] == [ignored]
        with pytest.raises(InvalidRequestError, match=r"'request_id': AsyncOmni.generate takes it"):
            omni.generate("a", request_id="x")  # type: ignore[arg-type]
        for value in (None, 3):
            message = (
                "generate takes no 'num_steps'; accepted are prompts, sampling_params, sampling_params_list, use_tqdm"
            )
            with pytest.raises(InvalidRequestError, match=message):
                omni.generate("a", num_steps=value)  # type: ignore[arg-type]
            message = (
                "generate takes no 'num_steps'; accepted are prompt, sampling_params, request_id, sampling_params_list"
            )
            with pytest.raises(InvalidRequestError, match=message):
                AsyncOmni("demo").generate("a", num_steps=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_hsdp": True}, "use_hsdp: here tensor_parallel_size, which shares the weights"),
        ({"num_gpus": 4}, "num_gpus: here the product of ulysses_degree, ring_degree, cfg_parallel_size, "),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size: here ulysses_degree and ring_degree"),
        ({"deploy_config": "x.yaml"}, "deploy_config 'x.yaml': one model is run, without stages"),
        ({"boundary_ratio": 0.9}, "boundary_ratio 0.9: a model is loaded as its folder says"),
        ({"lora_path": "x"}, "lora_path: here lora_modules={name: path}"),
        ({"seed": 3}, 'seed: here default_sampling_params={"seed": ...}'),
        ({"quantization_config": {"method": "fp8"}}, 'quantization_config: here quantization="fp8"'),
        ({"stage_id": 1}, "stage_id 1: one model is run, without stages: its settings are keywords"),
        ({"progress_bar": "no"}, "progress_bar takes true or false, got 'no'"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization takes a number above 0 and at most 1, got 1.5"),
        ({"gpu_memory_utilization": "0.5"}, "--gpu-memory-utilization takes a number, got '0.5'"),
        ({"tp": 2}, "unknown keyword 'tp'; accepted are model, "),
        ({"tensor_paralel_size": None}, "unknown keyword 'tensor_paralel_size'; accepted are model, parallel_config, "),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size takes an integer, got '2'"),
    ],
)
def test_settings_that_differ_name_ours(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        Omni("demo", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_gpus": 1, "hsdp_shard_size": -1, "worker_backend": "multi_process"},
        {"trust_remote_code": True, "log_stats": True, "max_model_len": 4096, "output_modalities": ["image"]},
    ],
)
def test_settings_without_effect_are_ignored_and_named(settings: dict[str, Any]) -> None:
    assert ignored_keywords(settings, ACCEPTED) == list(settings)
    assert ignored_keywords(dict.fromkeys(settings), ACCEPTED) == []


def test_texts_for_keywords_name_no_flags() -> None:
    flags = [flag for flag in flags_by_keyword().values() if flag.treatment != "ignored"]
    texts = [as_keywords(flag.text) for flag in flags]
    assert len(texts) > 50
    assert [text for text in texts if re.search(r"--|\bflags?\b|FILE|NAME=|quantization fp8|\"lora\":", text)] == []


def test_names_of_the_module_of_outputs() -> None:
    assert outputs.__all__ == ["OmniRequestOutput", "write_video"]
    assert all(hasattr(outputs, name) for name in outputs.__all__)


def test_none_is_the_default(caplog: pytest.LogCaptureFixture) -> None:
    kinds = [OmniDiffusionConfig, DiffusionParallelConfig, OmniDiffusionSamplingParams, LoRARequest]
    for kind in kinds:
        required = {"model": "demo"} if kind is OmniDiffusionConfig else {"name": "ink"} if kind is LoRARequest else {}
        optional = [f.name for f in fields(kind) if f.name not in required]
        assert kind(**required, **dict.fromkeys(optional)) == kind(**required), kind
    nothing: dict[str, Any] = dict.fromkeys(name for name in ACCEPTED if name != "model")
    assert make_config("demo", nothing) == OmniDiffusionConfig("demo")  # type: ignore[arg-type]
    unbounded = make_config("demo", nothing, {"max_num_queued_reqs": 7})  # type: ignore[arg-type]
    assert unbounded.max_num_queued_reqs == 7, "the default of the class that is made, not that of the config"
    assert make_config(None, {**nothing, "model": "demo"}) == OmniDiffusionConfig("demo")  # type: ignore[typeddict-item]
    assert not caplog.records


def test_progress_bar_beside_a_config() -> None:
    shown, hidden = OmniDiffusionConfig("demo"), OmniDiffusionConfig("demo", progress_bar=False)
    assert make_config(hidden, {"progress_bar": True}) == make_config(shown, {}) == shown
    assert make_config(shown, {"progress_bar": False}) == make_config(hidden, {"progress_bar": None}) == hidden  # type: ignore[typeddict-item]
    with pytest.raises(ConfigError, match="progress_bar takes true or false, got 'no'"):
        make_config(shown, {"progress_bar": "no"})  # type: ignore[typeddict-item]


def test_a_config_takes_the_keyword_of_a_constructor() -> None:
    parallel = DiffusionParallelConfig(ring_degree=2)
    named: dict[str, Any] = {"parallel_config": parallel}
    assert OmniDiffusionConfig("demo", **named) == OmniDiffusionConfig("demo", parallel)
    for wrong, message in (
        ({**named, "parallel": parallel}, "give parallel or parallel_config, which mean the same: got both"),
        ({"num_steps": 3}, "unknown keyword 'num_steps'; accepted are model, parallel, cache_backend, "),
        ({"use_hsdp": True}, "use_hsdp: here tensor_parallel_size, which shares the weights"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            OmniDiffusionConfig("demo", **wrong)


def test_degrees_that_mean_the_same(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    ours = DiffusionParallelConfig(ulysses_degree=2, ring_degree=2)
    same: dict[str, Any] = {"sequence_parallel_size": 4, "pipeline_parallel_size": 1, "use_hsdp": False}
    assert DiffusionParallelConfig(ulysses_degree=2, ring_degree=2, **same) == ours
    assert [record.getMessage() for record in caplog.records] == [
        "ignored, as the pictures are the same without: pipeline_parallel_size"
    ]
    pair: dict[str, Any] = {"ulysses_degree": 2, "ring_degree": None, "sequence_parallel_size": 2}
    two = DiffusionParallelConfig(2)
    assert DiffusionParallelConfig(**pair) == DiffusionParallelConfig(2, sequence_parallel_size=2) == two  # type: ignore[call-arg]
    for settings in (pair, {"parallel_config": two, "sequence_parallel_size": 2}):
        assert make_config("demo", settings).parallel == two  # type: ignore[arg-type]
    assert OmniDiffusionConfig("demo", two, sequence_parallel_size=2).parallel == two  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="sequence_parallel_size: here ulysses_degree and ring_degree"):
        make_config("demo", {"sequence_parallel_size": 4, "ulysses_degree": 2})  # type: ignore[typeddict-unknown-key]
    for wrong, message in (
        ({"use_hsdp": True}, "use_hsdp: here tensor_parallel_size"),
        ({"sequence_parallel_size": 4}, "sequence_parallel_size: here ulysses_degree and ring_degree"),
        ({"ulyses_degree": 2}, "unknown keyword 'ulyses_degree'; accepted are ulysses_degree, ring_degree, "),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            DiffusionParallelConfig(**wrong)
    mask = {"scm_steps_mask_policy": "fast"}
    policy = parse_cache_config("cache_dit", {**mask, "scm_steps_policy": "static"})
    assert policy == parse_cache_config("cache_dit", {**mask, "steps_computation_policy": "static"})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"heigth": None}, "unknown parameter 'heigth'; accepted are height, width, "),
        ({"guidance_rescale": 3.0}, "guidance_rescale: guidance is not rescaled, got 3.0"),
        (
            {"extra_args": {"shift": 1.0}},
            "extra_args: parameters have fields of their own here, and no model takes others, got {'shift': 1.0}",
        ),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt: here num_outputs_per_prompt, got 2"),
        ({"negative_prompt": "x"}, "negative_prompt: it is part of the prompt: "),
        ({"latents": torch.zeros(2)}, "latents: noise is drawn from the seed, got tensor"),
        ({"generator": 3}, "generator takes one torch.Generator (output i uses its seed + i), got int"),
        ({"generator": [fresh_generator(1), fresh_generator(2)]}, "generator takes one torch.Generator"),
        ({"generator": fresh_generator(1), "seed": 2}, "generator and seed differ: got 1 and 2"),
        ({"lora_requests": "a"}, "lora_requests takes a list, got 'a'"),
        ({"guidance_rescale": np.array([1.0, 2.0])}, "guidance_rescale: guidance is not rescaled, got array"),
        ({"eta": torch.zeros(3)}, "eta: the model's own noise scheduler is used, got tensor"),
        ({"generator": fresh_generator(1), "seed": np.array([1, 2])}, "generator and seed differ: got 1 and array"),
        ({"latents": torch.zeros(99, 99)}, "latents: noise is drawn from the seed, got tensor([[0., 0., 0."),
    ],
)
def test_parameters_that_differ_name_ours(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match="^" + re.escape(message)) as caught:
        OmniDiffusionSamplingParams(**params)
    assert caught.value.param in params


def test_a_generator_is_its_seed_until_it_draws() -> None:
    generator = fresh_generator(7)
    for given in (generator, [generator]):
        assert OmniDiffusionSamplingParams(generator=given, seed=None).seed == 7  # type: ignore[call-arg]
    torch.rand(1, generator=generator)
    with pytest.raises(InvalidRequestError, match="generator has drawn numbers since its seed was set: give seed=7"):
        OmniDiffusionSamplingParams(generator=generator)  # type: ignore[call-arg]


def test_adapters_by_their_public_names() -> None:
    number = stable_lora_int_id("/adapters/ink")
    assert 0 < number == stable_lora_int_id(Path("/adapters/ink")) < 2**31
    adapter = LoRARequest(lora_name="ink", lora_int_id=number, lora_path="/adapters/ink")  # type: ignore[call-arg]
    assert adapter == LoRARequest("ink", "/adapters/ink")
    params = OmniDiffusionSamplingParams(lora_requests=[adapter], lora_scales=[0.5])  # type: ignore[call-arg]
    assert params == OmniDiffusionSamplingParams(lora_request=adapter, lora_scale=0.5)
    vllms: Any = SimpleNamespace(lora_name="ink", lora_int_id=number, lora_path="/adapters/ink")
    assert OmniDiffusionSamplingParams(lora_request=vllms).lora_request == adapter
    assert OmniDiffusionSamplingParams(lora_request=[vllms, adapter]).lora_request == [adapter, adapter]
    with pytest.raises(InvalidRequestError, match="unknown 'rank'; accepted are name, path, scale"):
        LoRARequest("ink", rank=4)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequestError, match="needs a name"):
        LoRARequest(lora_path="/adapters/ink")  # type: ignore[call-arg]


def test_the_shift_of_the_schedule_has_two_names() -> None:
    assert OmniDiffusionSamplingParams(shift=3.0) == OmniDiffusionSamplingParams(flow_shift=3.0)  # type: ignore[call-arg]
    with pytest.raises(InvalidRequestError, match=r"^shift and flow_shift differ: got 3\.0 and 5\.0$"):
        OmniDiffusionSamplingParams(shift=3.0, flow_shift=5.0)  # type: ignore[call-arg]


def test_positions_are_fields_too() -> None:
    adapter = LoRARequest("ink", "/a")
    numbered: dict[str, Any] = {"lora_int_id": 3}
    assert LoRARequest("ink", "/a", **numbered) == Adapter("ink", lora_path="/a", **numbered) == adapter
    vllm_order: Any = ("ink", 1, "/a")
    assert LoRARequest(*vllm_order) == Adapter(*vllm_order[:2], lora_path=Path("/a")) == adapter
    assert OmniDiffusionSamplingParams(64, eta=0.0) == OmniDiffusionSamplingParams(height=64)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (LoRARequest, "LoRARequest needs a name; it takes name, path, scale"),
        (partial(Adapter, lora_path="/a"), "LoRARequest needs a name"),
        (partial(Adapter, "a", lora_name="b"), "lora_name and name differ: got 'b' and 'a'"),
        (partial(Adapter, "a", name="b"), "LoRARequest: name is given twice, by its place and by its name"),
        (partial(Adapter, "a", 1), "lora_request takes name, path and scale, got 1 as the path; vLLM's order is"),
        (partial(Adapter, 1, 2, 3, 4), "LoRARequest takes name, path, scale: got 4 arguments"),
        (partial(OmniDiffusionSamplingParams, 64, height=64), "OmniDiffusionSamplingParams: height is given twice"),  # type: ignore[misc]
        (partial(DiffusionParallelConfig, 2, ulysses_degree=2), "DiffusionParallelConfig: ulysses_degree is given tw"),  # type: ignore[misc]
        (OmniDiffusionConfig, "OmniDiffusionConfig needs a model; it takes model, parallel, "),
    ],
)
def test_wrong_arguments_are_one_line(make: Callable[[], Any], message: str) -> None:
    kind = make.func if isinstance(make, partial) else make
    error = ConfigError if kind in (OmniDiffusionConfig, DiffusionParallelConfig) else InvalidRequestError
    with pytest.raises(error, match="^" + re.escape(message)):
        make()
