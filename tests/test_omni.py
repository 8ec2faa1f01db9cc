"""`AsyncOmni` and `Omni` over a fake device: outputs, order, refusals, aborts, and a script that never closes."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tqdm import tqdm

from testbed.fakes import FakeExecutor, FakeRunner, fake_image, make_request
from testbed.patience import GUARD_SECONDS
from vllm_omni import AsyncOmni, Omni
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import ItemError, WorkerReady
from vllm_omni.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    RequestAbortedError,
    UnavailableError,
)
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.logs.bars import progress_bar
from vllm_omni.omni_settings import OmniSettings
from vllm_omni.outputs import OmniRequestOutput

ROOT = Path(__file__).parents[1]
SMALL = OmniDiffusionSamplingParams(height=32, width=48, num_inference_steps=3, seed=5)


def expected(seed: int, height: int = 32, width: int = 48) -> np.ndarray:
    return fake_image(make_request(size=(height, width), seed=seed))


@pytest.fixture
def device() -> Iterator[FakeExecutor]:
    executor = FakeExecutor()
    with patch("vllm_omni.omni.make_executor", lambda config, info: executor):
        yield executor


@pytest.fixture
def omni(device: FakeExecutor) -> Iterator[Omni]:
    with Omni(model="demo", progress_bar=False) as omni:
        yield omni


def test_a_default_prompt_that_is_too_long_is_refused_before_any_worker_starts(
    device: FakeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[FakeExecutor] = []
    monkeypatch.setattr(device, "start", lambda: started.append(device))
    with pytest.raises(ConfigError, match="--default-sampling-params: negative_prompt has"):
        Omni(model="demo", default_sampling_params={"negative_prompt": "red apple " * 600}, progress_bar=False)
    assert started == []


def test_outputs_come_in_the_order_of_the_prompts(omni: Omni) -> None:
    params = [
        OmniDiffusionSamplingParams(height=128, width=128, num_inference_steps=9, seed=1),
        OmniDiffusionSamplingParams(height=32, width=32, num_inference_steps=1, seed=2),
    ]
    outputs = omni.generate(["long", {"prompt": "short", "negative_prompt": "bad"}], params)
    assert [output.prompt for output in outputs] == ["long", "short"]
    assert [output.seeds for output in outputs] == [[1], [2]]
    assert [output.images[0].size for output in outputs] == [(128, 128), (32, 32)]
    assert all(output.finished for output in outputs)
    assert outputs[0].timings["computed_steps"] == 9


def test_one_prompt_may_make_several_pictures(omni: Omni) -> None:
    (output,) = omni.generate("x", OmniDiffusionSamplingParams(height=32, width=48, seed=7, num_outputs_per_prompt=3))
    assert output.seeds == [7, 8, 9]
    for seed, image in zip(output.seeds, output.images):
        assert np.array_equal(np.asarray(image), expected(seed))
    assert output.num_output_tokens == 3 * 2 * 3


def test_pixels_on_request(omni: Omni) -> None:
    params = OmniDiffusionSamplingParams(height=32, width=48, seed=5, output_type="np")
    (output,) = omni.generate("x", params)
    assert np.array_equal(output.images[0], expected(5))


def test_a_wrong_prompt_among_good_ones_runs_nothing(omni: Omni) -> None:
    wrong = OmniDiffusionSamplingParams(height=33)
    with pytest.raises(InvalidRequestError) as caught:
        omni.generate(["good", "bad"], [SMALL, wrong])
    assert caught.value.param == "height"
    assert omni.generate("good", SMALL)[0].finished  # and the engine is as before
    with pytest.raises(InvalidRequestError, match="2 prompts and 1 sampling_params"):
        omni.generate(["a", "b"], [SMALL])


def test_a_failure_is_raised_once_the_others_have_ended(device: FakeExecutor, omni: Omni) -> None:
    """A script that goes on without one of its pictures would take others for it."""
    first: list[str] = []
    finished: list[str] = []

    def fail_the_first(request_id: str, phase: str, step: int) -> ItemError | None:
        first.append(request_id)
        if phase == "decode":
            finished.append(request_id)
        return ItemError("broken", "internal") if request_id == first[0] and step == 2 else None

    device.runner.errors = fail_the_first
    with pytest.raises(GenerationError, match="the device failed on this request"):
        omni.generate(["a", "b", "c"], SMALL)
    assert len(finished) == 2
    assert omni.generate("after it", SMALL)[0].finished


@pytest.mark.parametrize("num_pictures", [1, 2])
def test_the_bar_counts_every_step_of_every_picture(device: FakeExecutor, num_pictures: int) -> None:
    bars: list[tqdm] = []

    def recorded_bar(*args: object, **settings: object) -> tqdm:
        bars.append(progress_bar(*args, **settings))  # type: ignore[arg-type]
        return bars[-1]

    with patch("vllm_omni.omni.progress_bar", recorded_bar), Omni(model="demo") as omni:
        params = OmniDiffusionSamplingParams(
            height=32, width=48, num_inference_steps=3, num_outputs_per_prompt=num_pictures
        )
        omni.generate(["a", "b"], params)
    bar, frames_bar = bars
    assert bar.n == bar.total == 2 * num_pictures * 3
    assert frames_bar.disable, "pictures have no frames to decode"


@pytest.mark.parametrize("params", [{"height": 64}, {}, "fast", 3, [{"height": 64}]])
def test_sampling_params_of_another_kind_are_named(omni: Omni, device: FakeExecutor, params: object) -> None:
    with pytest.raises(InvalidRequestError, match="sampling_params takes OmniDiffusionSamplingParams") as caught:
        omni.generate("a", params)  # type: ignore[arg-type]
    assert caught.value.param == "sampling_params"
    (given,) = params if isinstance(params, list) else (params,)
    assert str(caught.value).endswith(repr(given))
    assert device.num_plans == 0


def test_previews_that_nobody_would_see_are_refused(omni: Omni, device: FakeExecutor) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"^num_previews takes 0 here, got 2: .* AsyncOmni delivers"
    ) as caught:
        omni.generate("x", OmniDiffusionSamplingParams(num_previews=2))
    assert caught.value.param == "num_previews"
    assert device.num_plans == 0


def test_what_was_closed_says_so(omni: Omni) -> None:
    omni.close()
    omni.close()
    with pytest.raises(UnavailableError, match="closed"):
        omni.generate("x")


def test_settings_are_checked_before_anything_loads() -> None:
    with pytest.raises(ConfigError, match=r"^unknown keyword 'num_steps'; accepted are model, parallel_config, "):
        Omni(model="demo", num_steps=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"parallel_config takes a DiffusionParallelConfig, got \{\}"):
        Omni(model="demo", parallel_config={})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^the first argument is an OmniDiffusionConfig or a model, got 3"):
        Omni(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^give the model once: got 'demo' and model='other'"):
        Omni("demo", model="other")
    with pytest.raises(ConfigError, match=r"^give a config or keywords, not both: got a config and \['dtype'\]"):
        Omni(OmniDiffusionConfig("demo"), dtype="float32")
    with pytest.raises(ConfigError, match=r"^give parallel_config or its fields as keywords, not both"):
        Omni("demo", parallel_config=DiffusionParallelConfig(), ulysses_degree=2)
    with pytest.raises(ConfigError, match="model must be a folder"):
        Omni()
    with pytest.raises(ConfigError, match="--max-num-seqs takes an integer, got 'a'"):
        Omni(model="demo", max_num_seqs="a")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--overlap-decode runs the VAE beside the transformer; with --enable-cpu"):
        Omni(model="demo", enable_cpu_offload=True, overlap_decode=True)
    with pytest.raises(ConfigError, match=r"^model '/no/such/folder': there is no such folder$"):
        Omni(model="/no/such/folder")


@pytest.mark.parametrize("name", [str, Path])
async def test_a_model_is_a_name_or_a_path(
    name: type[str] | type[Path], tiny_model: Path, device: FakeExecutor
) -> None:
    model = name(tiny_model)
    for omni in (AsyncOmni(model), AsyncOmni(model=model)):
        assert omni.config.model == str(tiny_model)
        await omni.close()


def test_keywords_are_the_fields_of_the_config() -> None:
    def hints(cls: type) -> dict[str, object]:
        return get_type_hints(cls, localns={"torch": torch})

    keywords = hints(OmniSettings)
    config = hints(OmniDiffusionConfig) | hints(DiffusionParallelConfig)
    assert keywords.pop("parallel_config") == config.pop("parallel") | None  # type: ignore[operator]
    assert keywords.keys() == config.keys()
    paths = ("model", "lora_modules", "lora_dirs", "download_dir", "transformer_file", "transformer_file_2")
    paths_and_none = (*paths, "dtype", "cache_backend", "cache_config")
    for name in keywords.keys() - set(paths_and_none):
        assert keywords[name] == config[name], name


def test_numbers_of_numpy_are_numbers(omni: Omni) -> None:
    numbers: dict[str, Any] = {"height": np.int64(32), "true_cfg_scale": np.float64(4)}
    params = OmniDiffusionSamplingParams(width=48, sigmas=list(np.linspace(1, 0.5, 2)), seed=5, **numbers)
    (output,) = omni.generate("x", params)
    assert np.array_equal(np.asarray(output.images[0]), expected(5))


@pytest.mark.parametrize("shown", [True, False])
def test_the_keyword_beside_a_config_decides_about_the_bar(
    shown: bool, device: FakeExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    for config, keyword in [
        (OmniDiffusionConfig("demo", progress_bar=not shown), shown),
        (OmniDiffusionConfig("demo"), shown),
    ]:
        with Omni(config, progress_bar=keyword) as omni:
            omni.generate("x", SMALL)
        assert ("denoising" in capsys.readouterr().err) is shown


async def test_what_no_worker_can_be_sent_is_one_requests_failure(device: FakeExecutor) -> None:
    omni = AsyncOmni(model="demo")
    await omni.start()
    try:
        with pytest.raises(InvalidRequestError, match="cannot be sent to a worker"):
            omni.generate("x", SMALL, request_id="\ud800")
        assert (await outputs_of(omni.generate("x", SMALL)))[-1].finished
    finally:
        await omni.close()


async def outputs_of(stream: object) -> list[OmniRequestOutput]:
    return [output async for output in stream]  # type: ignore[attr-defined]


async def test_progress_previews_and_result(device: FakeExecutor) -> None:
    omni = AsyncOmni(model="demo")
    await omni.start()
    try:
        params = OmniDiffusionSamplingParams(height=32, width=48, num_inference_steps=4, seed=5, num_previews=1)
        outputs = await outputs_of(omni.generate("x", params))
        steps = [output.step for output in outputs if not output.finished and not output.images]
        assert steps == [0, 1, 2, 3, 4], "the first message says that the request has begun"
        assert all(output.started for output in outputs)
        preview, done = [output for output in outputs if not output.finished and output.images]
        assert preview.step == 2
        assert np.array_equal(np.asarray(preview.images[0]), fake_image(make_request(size=(32, 48), seed=5), 2))
        assert done.step == 4
        assert np.array_equal(np.asarray(done.images[0]), expected(5))
        assert [output.finished for output in outputs] == [False] * 7 + [True]
    finally:
        await omni.close()


async def test_an_abandoned_or_aborted_request_leaves_the_engine(device: FakeExecutor) -> None:
    device.hold = True
    omni = AsyncOmni(model="demo")
    await omni.start()
    try:
        stream, other = omni.generate("x", SMALL), omni.generate("y", SMALL, request_id="mine")
        with pytest.raises(InvalidRequestError, match="in use"):
            omni.generate("z", SMALL, request_id="mine")
        await stream.aclose()
        omni.abort("mine")
        omni.abort("unknown")
        with pytest.raises(RequestAbortedError):
            await outputs_of(other)
        status = omni.status()
        assert (status.num_running, status.num_waiting) == (0, 0)
    finally:
        await omni.close()


async def test_a_cancelled_reader_aborts_its_request(device: FakeExecutor) -> None:
    device.hold = True
    omni = AsyncOmni(model="demo")
    await omni.start()
    try:
        reading = asyncio.create_task(outputs_of(omni.generate("x", SMALL)))
        await asyncio.sleep(0)
        assert omni.status().num_running + omni.status().num_waiting == 1
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert omni.status().num_running + omni.status().num_waiting == 0
    finally:
        await omni.close()


async def test_a_failure_of_one_output_fails_its_prompt_alone() -> None:
    def fail_one(request_id: str, phase: str, step: int) -> ItemError | None:
        return ItemError("broken", "internal") if request_id == "bad-1" and step == 2 else None

    executor = FakeExecutor(lambda: FakeRunner(errors=fail_one))
    with patch("vllm_omni.omni.make_executor", lambda config, info: executor):
        omni = AsyncOmni(model="demo")
        await omni.start()
    try:
        params = OmniDiffusionSamplingParams(height=32, width=48, num_inference_steps=3, num_outputs_per_prompt=2)
        bad, good = omni.generate("x", params, request_id="bad"), omni.generate("y", params, request_id="good")
        with pytest.raises(GenerationError):
            await outputs_of(bad)
        assert (await outputs_of(good))[-1].finished
        omni.begin_drain()
        with pytest.raises(UnavailableError):
            omni.generate("x", SMALL)
        assert await omni.drain(GUARD_SECONDS)
    finally:
        await omni.close()


class SlowlyCancelledStart(FakeExecutor):
    """Presses Ctrl-C while it starts, and takes many turns of the loop to stop then."""

    async def start(self) -> WorkerReady:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            for _ in range(100):
                await asyncio.sleep(0)
        raise AssertionError("the start is cancelled")


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the shell that started the tests ignores it for its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_ctrl_c_while_it_starts_leaves_no_task(caplog: pytest.LogCaptureFixture) -> None:
    with (
        patch("vllm_omni.omni.make_executor", lambda config, info: SlowlyCancelledStart()),
        pytest.raises(KeyboardInterrupt),
    ):
        Omni(model="demo", progress_bar=False)
    gc.collect()  # asyncio complains where a pending task is destroyed
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


SCRIPT = """
from vllm_omni import Omni
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

omni = Omni(model="demo", distributed_executor_backend="{backend}", progress_bar=False)
outputs = omni.generate("red apple", OmniDiffusionSamplingParams(num_inference_steps=2, seed=1))
print(outputs[0].images[0].size)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["uni", "mp"])
def test_a_script_without_guard_and_close_ends_by_itself(backend: str) -> None:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", SCRIPT.format(backend=backend)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "(64, 64)\n"), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "%|" not in done.stderr, "progress_bar=False hides every bar"


MANY_WORKERS = """
import sys
from unittest.mock import patch
from vllm_omni import Omni
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

def make_executor(config, info, replica_index):
    return MultiprocExecutor(config, "testbed.fakes:FakeRunner", replica_index=replica_index)

with patch("vllm_omni.omni.make_executor", make_executor):
    omni = Omni(model="demo", parallel_config=DiffusionParallelConfig(ulysses_degree=2, data_parallel_size=2))
params = OmniDiffusionSamplingParams(num_inference_steps=2, seed=1, num_outputs_per_prompt=4)
print(len(omni.generate("red apple", params)[0].images))
print(*[pid for engine in omni._async._engine._engines for pid in engine._executor.worker_pids])
"""


@pytest.mark.thorough
def test_a_script_with_many_workers_ends_by_itself_and_leaves_nothing() -> None:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", MANY_WORKERS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    num_pictures, *pids = done.stdout.split()
    assert (num_pictures, len(pids)) == ("4", 4)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
