"""Pictures of packed families with LoRA adapters against diffusers with the same adapters (`set_adapters`)."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from testbed import tiny_edit_models
from testbed.runner_driver import QUICK, Drive, make_request, psnr
from testbed.tiny_adapters import random_pairs, save_peft, transformer_of
from testbed.tiny_models import SMALL, build_tiny_qwen_image, photo
from testbed.tiny_wan import build_tiny_wan
from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.cache.settings import settings_of
from tests.diffusion.compute.families.qwen_image import test_pictures as qwen_image
from tests.diffusion.compute.families.test_cuda_graphs import Capturer
from tests.diffusion.compute.families.wan import test_videos as wan
from tests.diffusion.compute.families.z_image import test_pictures as z_image
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.layers.kernels import TorchKernels
from vllm_omni.diffusion.compute.weights.adapter_layers import COMPONENTS
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.control.adapter_prices import num_adapter_weights
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA
from vllm_omni.errors import InvalidRequestError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # diffusers loads several adapters one after the other.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model"),
]

PHOTOS = [photo(64, 48, 1), photo(40, 64, 2)]


def draw_edit(pipeline: Any, request: DiffusionRequest) -> np.ndarray:
    pictures = PHOTOS[: len(request.images)]
    with tiny_edit_models.small_pictures():
        return tiny_edit_models.draw(pipeline, pictures, request, height=request.height, width=request.width)


@dataclass(frozen=True)
class Family:
    build: Callable[..., Path]
    reference: Callable[[Path], Any]
    draw: Callable[[Any, DiffusionRequest], np.ndarray]
    fields: Sequence[dict[str, Any]] = ()
    """Fields of the requests, in turn."""
    num_pictures: Sequence[int] = (0,)

    def request(self, path: Path, number: int, loras: Sequence[LoRA], **more: Any) -> DiffusionRequest:
        """Request with sizes, steps and guidance that its number decides."""
        fields = self.fields[number % len(self.fields)] | more
        name = " + ".join(f"{lora.name} x {lora.scale}" for lora in loras) or "none"
        request_id = f"{number}: {name}"
        if count := self.num_pictures[number % len(self.num_pictures)]:
            fields = fields | {"loras": tuple(loras)}
            return tiny_edit_models.request_of(path, request_id, PHOTOS[:count], **fields)
        return make_request(request_id, loras=tuple(loras), **fields)


GUIDED = {"negative_prompt": "a blue car", "true_cfg_scale": 3.0}
PICTURES: list[dict[str, Any]] = [
    {"seed": 3, "num_inference_steps": 4, **GUIDED},
    {"seed": 1, "height": 32, "width": 80, "num_inference_steps": 3},
    {"seed": 2, "prompt": "apple " * 20, "height": 80, "width": 48, "num_inference_steps": 2},
]
EDITS: list[dict[str, Any]] = [{"num_inference_steps": n, **more} for n, more in ((3, GUIDED), (2, {}))]
VIDEOS: list[dict[str, Any]] = [
    {"num_frames": 5, "height": 32, "width": 64, "num_inference_steps": 3, "max_sequence_length": 24, **GUIDED},
    {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 24},
]
FAMILIES = {
    "qwen_image": Family(
        partial(build_tiny_qwen_image, heads=4, default_sampling_params=SMALL),
        qwen_image.reference,
        qwen_image.draw,
        PICTURES,
    ),
    "edit": Family(
        partial(tiny_edit_models.build, pipeline=tiny_edit_models.PLUS, zero_cond_t=True),
        tiny_edit_models.reference,
        draw_edit,
        EDITS,
        num_pictures=(1, 2),
    ),
    "z_image": Family(
        partial(build_tiny_z_image, default_sampling_params=SMALL), z_image.reference, z_image.draw, PICTURES
    ),
    "wan": Family(
        partial(build_tiny_wan, kind="t2v-2.1", default_sampling_params=SMALL), wan.reference, wan.draw, VIDEOS
    ),
}


class Bench:
    """Models of the families, adapters for them, and diffusers' pictures."""

    def __init__(self, folder: Path, name: str, **sizes: Any) -> None:
        self.family = FAMILIES[name]
        self.folder = folder
        self.path = self.family.build(folder / "model", **sizes)
        transformer = transformer_of(self.path)
        self.pairs = [
            random_pairs(transformer, 1, rank=4),
            random_pairs(transformer, 2, rank=6, part="attn" if name != "z_image" else "attention"),
            random_pairs(transformer, 3, rank=2, size=2.0, part="to_q"),
        ]
        self.files = [save_peft(pairs, folder / f"{number}.safetensors") for number, pairs in enumerate(self.pairs)]
        self.pipeline = self.family.reference(self.path)
        for number, file in enumerate(self.files):
            self.pipeline.load_lora_weights(str(folder), weight_name=file.name, adapter_name=f"{number}")

    def lora(self, number: int, scale: float = 1.0) -> LoRA:
        return LoRA(f"{number}", str(self.files[number]), scale)

    def request(self, number: int, *loras: LoRA, **more: Any) -> DiffusionRequest:
        return self.family.request(self.path, number, loras, **more)

    def start(self, **settings: Any) -> ModelRunner:
        runner = ModelRunner(
            OmniDiffusionConfig(model=str(self.path), **settings), load_model_info(str(self.path)), options=QUICK
        )
        runner.start()
        return runner

    def wanted(self, request: DiffusionRequest) -> np.ndarray:
        """diffusers' picture, uint8."""
        if request.loras:
            self.pipeline.enable_lora()
            self.pipeline.set_adapters([lora.name for lora in request.loras], [lora.scale for lora in request.loras])
        else:
            self.pipeline.disable_lora()
        picture = self.family.draw(self.pipeline, request)
        return (picture * 255).round().astype(np.uint8)


@pytest.fixture(autouse=True)
def no_single_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a batch raises: its requests would run one by one, and their pictures would hide the error."""

    def fail(self: ModelRunner, error: Exception) -> None:
        if not isinstance(error, InvalidRequestError):
            raise AssertionError("a batch was not run together") from error

    monkeypatch.setattr(ModelRunner, "_release_memory", fail)


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp(request.param), request.param)


def test_a_batch_of_adapters_draws_what_diffusers_draws(bench: Bench) -> None:
    """Eight requests with other adapters, scales, sizes and steps join one batch; some have two adapters or none."""
    compositions = [
        (bench.lora(0),), (), (bench.lora(1, 0.7),), (bench.lora(0, 0.5), bench.lora(1)),
        (bench.lora(2, -1.0),), (bench.lora(0, 0.3),), (), (bench.lora(2), bench.lora(1, 0.4), bench.lora(0, 0.2)),
    ]  # fmt: skip
    requests = [bench.request(number, *loras) for number, loras in enumerate(compositions)]
    runner = bench.start(lora_modules={"0": str(bench.files[0])})
    drive = Drive(runner).run({0: requests[:5], 1: requests[5:]})
    assert not drive.errors
    assert max(drive.pack_sizes) >= 8
    for request in requests:
        wanted = bench.wanted(request)
        assert psnr(drive.images[request.request_id], wanted) >= 55, request.request_id
        if request in requests[2:4]:
            assert psnr(bench.wanted(replace(request, loras=())), wanted) < 45, "the adapters must show"


def test_neighbours_do_not_notice(bench: Bench) -> None:
    runner = bench.start()
    base = [bench.request(number) for number in range(2)]
    alone = Drive(runner).run({0: base}).images
    adapted = [bench.request(number, bench.lora(0, 2.0), bench.lora(1)) for number in range(2)]
    together = Drive(runner).run({0: [base[0], adapted[0], base[1]], 1: [adapted[1]]})
    after = Drive(runner).run({0: base}).images
    assert not together.errors
    for request in base:
        assert psnr(alone[request.request_id], together.images[request.request_id]) >= 60
        assert np.array_equal(alone[request.request_id], after[request.request_id])


def test_a_token_is_priced_by_the_weights_that_it_meets(bench: Bench, tmp_path: Path) -> None:
    """Rank * (inputs + outputs) for each inputs * outputs of the layers that an image token passes."""
    in_blocks = {name: pair for name, pair in bench.pairs[0].items() if re.match(r"(\w*blocks|layers)\.\d", name)}
    not_met = r"_mod\.|modulation|\.add_|to_add_out|txt_"  # modulation, and the text's own layers
    met = [pair for name, pair in in_blocks.items() if not re.search(not_met, name)]
    share = sum(a.numel() + b.numel() for a, b in met) / sum(a.shape[1] * b.shape[0] for a, b in met)
    file = save_peft(in_blocks, tmp_path / "blocks.safetensors")
    price = load_model_info(str(bench.path)).adapter_cost(num_adapter_weights([LoRA("a", str(file), 1.0)]))
    assert 0.8 < price / share < 1.25


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("qwen"), "qwen_image")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Qwen-Image whose velocities change slowly, so that step caches skip blocks."""
    return Bench(tmp_path_factory.mktemp("calm"), "qwen_image", layers=4, time_scale=0.1)


def merged(bench: Bench, folder: Path, *loras: LoRA) -> Path:
    """Model folder whose transformer has these adapters in its weights."""
    shutil.copytree(bench.path, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for lora in loras:
        for name, (down, up) in bench.pairs[int(lora.name)].items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + lora.scale * up @ down
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("backend", ["cache_dit", "tea_cache"])
def test_a_step_cache_skips_as_with_merged_weights(calm: Bench, tmp_path: Path, backend: str) -> None:
    """Requests with and without adapters share a batch, and skip blocks at other steps than their neighbours."""
    more = {"residual_diff_threshold": 0.6} if backend == "cache_dit" else {}
    cache: dict[str, Any] = {"cache_backend": backend, "cache_config": settings_of(backend) | more}
    compositions = [(calm.lora(1, 0.5),), (), (calm.lora(2, 0.5), calm.lora(1, 0.2))]
    requests = [calm.request(i, *loras, num_inference_steps=10 - i) for i, loras in enumerate(compositions)]
    made = Drive(calm.start(**cache)).run({0: requests[:2], 1: requests[2:]})
    assert not made.errors
    for number, (request, loras) in enumerate(zip(requests, compositions)):
        path = merged(calm, tmp_path / f"{number}", *loras)
        runner = ModelRunner(OmniDiffusionConfig(model=str(path), **cache), load_model_info(str(path)), options=QUICK)
        runner.start()
        alone = Drive(runner).run({0: [replace(request, loras=())]})
        assert psnr(made.images[request.request_id], alone.images[request.request_id]) >= 55
        computed = calm.wanted(request)
        assert psnr(made.images[request.request_id], computed) < 55, "blocks were skipped"


def test_float8_weights_keep_adapters_in_the_models_dtype(qwen: Bench) -> None:
    requests = [qwen.request(0, qwen.lora(0)), qwen.request(0)]
    rounded = Drive(qwen.start(quantization="fp8")).run({0: requests})
    assert not rounded.errors
    with_adapter, without = (psnr(rounded.images[r.request_id], qwen.wanted(r)) for r in requests)
    assert without < 50, "the weights are rounded"
    assert with_adapter > without - 6, "the adapter adds no error of its own"


@pytest.mark.thorough
def test_compiled_blocks_run_eagerly_with_adapters_and_compiled_without(qwen: Bench) -> None:
    requests = [qwen.request(0, qwen.lora(0)), qwen.request(0), qwen.request(1)]
    wanted = Drive(qwen.start()).run({0: requests}).images
    runner = qwen.start()
    compiled = runner.pipeline.transformer.compile_blocks("eager")  # type: ignore[attr-defined]
    plain = Drive(runner).run({0: requests[1:]})
    num_compilations = compiled.num_compilations
    assert num_compilations > 0
    together = Drive(runner).run({0: requests})
    again = Drive(runner).run({0: requests[1:]})
    assert compiled.num_compilations == num_compilations
    for request in requests:
        assert psnr(together.images[request.request_id], wanted[request.request_id]) >= 60
    for request in requests[1:]:
        assert np.array_equal(plain.images[request.request_id], again.images[request.request_id])


@pytest.mark.parametrize("is_dropped", [False, True])
def test_steps_with_adapters_are_captured_until_an_adapter_is_dropped(
    qwen: Bench, is_dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [qwen.request(0, qwen.lora(0), num_inference_steps=3), qwen.request(1, num_inference_steps=7)]
    runner = qwen.start()
    wanted = Drive(runner).run({0: requests}).images
    pipeline: Any = runner.pipeline
    capturer = pipeline.capturer = Capturer()
    predict, num_steps = pipeline.predict, itertools.count(1)

    def drop_before_the_third_step(*args: Any) -> Any:
        if next(num_steps) == 3 and is_dropped:
            (adapter,) = pipeline._adapters._loaded.values()
            pipeline._forget_adapter(adapter)
            assert len(pipeline._layouts) == 0
        return predict(*args)

    monkeypatch.setattr(pipeline, "predict", drop_before_the_third_step)
    made = Drive(runner).run({0: requests}).images
    # Together three steps, then the second request alone in four. The first step of each is seen, the second captured.
    assert (capturer.num_captures, capturer.num_replays) == (2, 1 + (not is_dropped) + 3)
    for request_id, picture in wanted.items():
        assert np.array_equal(made[request_id], picture)


def test_layers_that_read_attention_in_joint_order_change_the_same_rows(
    qwen: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [qwen.request(0, qwen.lora(0), num_inference_steps=2), qwen.request(1, num_inference_steps=2)]
    wanted = Drive(qwen.start()).run({0: requests}).images
    monkeypatch.setattr(TorchKernels, "picks_rows", True)
    made = Drive(qwen.start()).run({0: requests}).images
    for request_id, picture in wanted.items():
        assert psnr(made[request_id], picture) >= 60


def test_adapters_leave_the_device_and_come_back(qwen: Bench) -> None:
    """A plan drops only what no request runs with; rows of modulation go with their adapter."""
    requests = [qwen.request(number, qwen.lora(number)) for number in range(3)]
    runner = qwen.start()
    alone = [Drive(runner).run({0: [request]}).images[request.request_id] for request in requests]
    runner.execute(StepPlan(100, new_requests=requests[:1], encode=[requests[0].request_id]))
    runner.execute(StepPlan(101, drop_adapters=[request.loras[0].key for request in requests]))
    pipeline: Any = runner.pipeline
    assert list(pipeline._adapters._loaded) == [requests[0].loras[0].key]
    (kept,) = pipeline._adapters._loaded.values()
    for table in pipeline._modulations:
        assert {its for condition in table._rows for its, _ in condition.composition} <= {kept}
    runner.execute(StepPlan(102, release=[requests[0].request_id]))
    runner.forget_adapters([qwen.lora(1).key])
    together = Drive(runner).run({step: [request] for step, request in enumerate(requests)})
    for request, picture in zip(requests, alone):
        assert psnr(together.images[request.request_id], picture) >= 60


def test_a_file_that_does_not_fit_costs_its_sender_an_error(qwen: Bench, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    save_file(
        {"transformer.nobody.lora_A.weight": torch.ones(2, 8), "transformer.nobody.lora_B.weight": torch.ones(8, 2)},
        file,
    )
    good = qwen.request(0)
    made = Drive(qwen.start()).run({0: [qwen.request(1, LoRA("bad", str(file), 1.0)), good]})
    ((error),) = made.errors.values()
    assert (error.kind, error.param) == ("invalid", "lora_request")
    assert f"the LoRA adapter {file} does not fit this model: no layer here has the name" in error.message
    assert psnr(made.images[good.request_id], qwen.wanted(good)) >= 60


@pytest.mark.thorough
def test_both_transformers_of_wan_have_their_adapters(tmp_path: Path) -> None:
    path = build_tiny_wan(tmp_path / "model", "t2v-a14b", default_sampling_params=SMALL)
    pipeline: Any = wan.reference(path)
    pairs = [random_pairs(transformer_of(path, name), 5 + i, part="blocks.") for i, name in enumerate(COMPONENTS)]
    files = [save_peft(its, tmp_path / f"{name}.safetensors", f"{name}.") for name, its in zip(COMPONENTS, pairs)]
    loras = [LoRA(file.stem, str(file), 0.8) for file in files]
    fields = VIDEOS[0] | {"num_inference_steps": 4}
    requests = [
        make_request(name, loras=its, **fields)
        for name, its in (("first", loras[:1]), ("second", loras[1:]), ("both", loras), ("none", ()))
    ]
    requests = [replace(request, loras=tuple(request.loras)) for request in requests]
    runner = ModelRunner(OmniDiffusionConfig(model=str(path)), load_model_info(str(path)), options=QUICK)
    runner.start()
    made = Drive(runner).run({0: requests[:2], 1: requests[2:]})
    assert not made.errors
    first, second = (load_file(file) for file in files)
    pipeline.load_lora_weights(first, adapter_name="transformer")
    as_first = {name.replace("transformer_2.", "transformer."): weight for name, weight in second.items()}
    pipeline.load_lora_weights(as_first, adapter_name="transformer_2", load_into_transformer_2=True)
    plain = made.images["none"]
    for request in requests:
        names = [lora.name for lora in request.loras]
        for name in COMPONENTS:
            component = getattr(pipeline, name)
            if name in names:
                component.enable_adapters()
                component.set_adapters(name, 0.8)
            else:
                component.disable_adapters()
        wanted = (wan.draw(pipeline, request) * 255).round().astype(np.uint8)
        assert psnr(made.images[request.request_id], wanted) >= 55
        assert not names or psnr(wanted, plain) < 45, "the adapters must show"
