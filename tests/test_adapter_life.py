"""Adapters loaded, unloaded, replaced and evicted in the middle of steps: each picture has its own adapters alone."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from testbed.patience import GUARD_SECONDS
from testbed.runner_driver import psnr
from testbed.tiny_adapters import random_pairs, save_peft, transformer_of
from vllm_omni import AsyncOmni
from vllm_omni.diffusion.compute.step.adapters import LoadedAdapter
from vllm_omni.diffusion.compute.weights.adapter_layers import AdapterReader
from vllm_omni.diffusion.control.resident_adapters import ResidentAdapters
from vllm_omni.errors import AdapterChangedError, GenerationError, InvalidRequestError, RequestAbortedError
from vllm_omni.inputs.adapter_files import AdapterPaths
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams
from vllm_omni.jobs import OutputStream

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "a red apple"
NAMES = "abcde"
LIMITS = {"max_loras": 2, "max_cpu_loras": 3}
Composition = tuple[tuple[Path, float], ...]
"""Files, which nobody changes, and their scales."""


@dataclass
class Life:
    """A served folder of adapter files, and archived copies of all that these have been."""

    omni: AsyncOmni
    folder: Path
    transformer: torch.nn.Module
    rng: random.Random
    versions: dict[str, int] = field(default_factory=dict)
    pictures: dict[Composition, np.ndarray] = field(default_factory=dict)
    """Pictures of compositions made alone."""
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def archived(self, name: str) -> Path:
        """Copy of the present file."""
        return self.folder / "archive" / f"{name}{self.versions[name]}.safetensors"

    def replace(self, name: str) -> None:
        """Write a file, or put its other version in its place."""
        self.versions[name] = number = (self.versions.get(name, 0) + 1) % 2
        if not (copy := self.archived(name)).exists():
            copy.parent.mkdir(exist_ok=True)
            index = NAMES.index(name)  # every other one changes modulation, too
            pairs = random_pairs(self.transformer, 10 * index + number, part=("attn", "")[index % 2], size=1.0)
            save_peft(pairs, copy)
        shutil.copy(copy, new := self.folder / "new")
        os.replace(new, self.file(name))

    @property
    def resident(self) -> ResidentAdapters:
        (resident,) = self.omni._engine.resident_adapters
        return resident

    def submit(self, lora: list[LoRARequest], steps: int = 2, request_id: str | None = None) -> OutputStream:
        params = OmniDiffusionSamplingParams(
            height=32, width=32, num_inference_steps=steps, seed=1, output_type="np", lora_request=lora
        )
        return self.omni.generate(PROMPT, params, request_id)

    def asked(self, name: str) -> LoRARequest:
        """The adapter by its name, or by its path if it is not served, at a random scale."""
        path = None if name in self.omni.adapters else self.file(name)
        return LoRARequest(name, path, self.rng.choice((0.5, 1.0)))

    async def draw(self, stream: OutputStream) -> np.ndarray:
        try:
            async for output in stream:
                self.progress.set()
                if output.finished:
                    return np.asarray(output.images[0])
        finally:
            self.progress.set()
        raise AssertionError("a stream ends with its picture")

    async def alone(self, composition: Composition) -> np.ndarray:
        """Picture of archived files, made while nothing else runs."""
        if composition not in self.pictures:
            lora = [LoRARequest(file.stem, file, scale) for file, scale in composition]
            self.pictures[composition] = await self.draw(self.submit(lora))
        return self.pictures[composition]

    async def next_step(self) -> None:
        self.progress.clear()
        await self.progress.wait()


@asynccontextmanager
async def living(model: Path, folder: Path, seed: int = 0, **settings: Any) -> AsyncIterator[Life]:
    """An engine that serves `a` and `b` from its start."""
    transformer = transformer_of(model)
    life = Life(None, folder, transformer, random.Random(seed))  # type: ignore[arg-type]  # made below
    for name in NAMES:
        life.replace(name)
    served = {name: life.file(name) for name in "ab"}
    settings = {"distributed_executor_backend": "uni", "lora_modules": served} | settings
    async with asyncio.timeout(GUARD_SECONDS), AsyncOmni(str(model), **settings) as life.omni:
        yield life


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [1])
async def test_random_events_never_show_in_another_picture(tiny_model: Path, tmp_path: Path, seed: int) -> None:
    async with living(tiny_model, tmp_path, seed, **LIMITS) as life:
        await run_random_events(life, 200)


async def run_random_events(life: Life, num_events: int) -> None:
    """Let random events meet in the middle of steps, then compare every picture with that of its composition alone."""
    rng, omni = life.rng, life.omni
    drawn: list[tuple[Composition, asyncio.Task[np.ndarray]]] = []
    changes: list[asyncio.Task[None]] = []
    num_replaced = 0
    for _ in range(num_events):
        event, name = rng.choice(("draw", "draw", "draw", "load", "unload", "replace", "abort")), rng.choice(NAMES)
        if event == "draw":
            lora = [life.asked(each) for each in rng.sample(NAMES, rng.choice((0, 1, 1, 2)))]
            stream = life.submit(lora, request_id=f"r{len(drawn)}")
            composition = tuple(sorted((life.archived(each.name), each.scale) for each in lora))
            drawn.append((composition, asyncio.create_task(life.draw(stream))))
            await life.next_step()
        elif event == "load":
            request = LoRARequest(name, life.file(name))
            changes.append(asyncio.create_task(omni.load_lora(request, replace=rng.random() < 0.5)))
        elif event == "unload" and name in omni.adapters:
            changes.append(asyncio.create_task(omni.unload_lora(name)))
        elif event == "replace":
            life.replace(name)
        elif event == "abort" and drawn:
            omni.abort(f"r{rng.randrange(len(drawn))}")
        await asyncio.sleep(0)
    for outcome in await asyncio.gather(*changes, return_exceptions=True):
        assert outcome is None or isinstance(outcome, InvalidRequestError | AdapterChangedError), outcome
    made = await asyncio.gather(*(task for _, task in drawn), return_exceptions=True)
    assert life.resident.num_held == 0
    assert life.resident.num_on_host <= 3
    assert life.resident.num_on_device <= 2
    num_good = 0
    for (composition, _), picture in zip(drawn, made):
        if isinstance(picture, AdapterChangedError):
            num_replaced += 1  # the file was replaced before a thread could read it
        elif not isinstance(picture, RequestAbortedError):
            assert not isinstance(picture, BaseException), picture
            assert psnr(picture, await life.alone(composition)) >= 60, composition
            num_good += 1
    assert num_good > num_events / 6
    pictures = list(life.pictures.values())
    for index, one in enumerate(pictures):
        assert all(psnr(one, other) < 55 for other in pictures[:index]), "adapters and their scales show"
    assert life.resident.num_evictions > 0


async def test_loads_unloads_and_replaced_files_while_requests_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with living(tiny_model, tmp_path, **LIMITS) as life:
        omni = life.omni
        plain, first = await life.alone(()), await life.alone(((life.archived("a"), 1.0),))
        assert psnr(plain, first) < 45

        # An unload waits for the request that runs, and refuses new ones at once.
        running = asyncio.create_task(life.draw(life.submit([LoRARequest("a")], steps=20)))
        await life.next_step()
        unloading = asyncio.create_task(omni.unload_lora("a"))
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequestError, match="there is no LoRA adapter 'a'; served: b"):
            life.submit([LoRARequest("a")])
        with pytest.raises(InvalidRequestError, match="there is no LoRA adapter 'a'"):
            await omni.unload_lora("a")
        assert not unloading.done()
        await asyncio.gather(running, unloading)
        assert running.done()
        assert omni.adapter_stats().states == {"device": 0, "host": 1, "disk": 0}

        await fail_loads(life, tmp_path)

        # Steps go on while a file is read; its request is encoded meanwhile.
        gate = asyncio.Event()
        loop, read = asyncio.get_running_loop(), AdapterReader.read

        def slow_read(reader: AdapterReader, paths: AdapterPaths) -> Any:
            if paths.name == str(life.file("c")):
                asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
            return read(reader, paths)

        monkeypatch.setattr(AdapterReader, "read", slow_read)
        loading = asyncio.create_task(omni.load_lora(LoRARequest("c", life.file("c"))))
        waiting = asyncio.create_task(life.draw(life.submit([LoRARequest("c", life.file("c"))])))
        assert psnr(await life.draw(life.submit([])), plain) >= 60
        assert not waiting.done()
        with pytest.raises(InvalidRequestError, match="'c' is being loaded"):
            await omni.load_lora(LoRARequest("c", life.file("c")))
        gate.set()
        await loading
        assert psnr(await waiting, await life.alone(((life.archived("c"), 1.0),))) >= 60

        # A replaced file is noticed by the next request; the one that runs keeps the old weights.
        old, stream = life.archived("c"), life.submit([LoRARequest("c")])
        await asyncio.sleep(0)
        keeps = asyncio.create_task(life.draw(stream))
        await life.next_step()
        life.replace("c")
        takes = await life.draw(life.submit([LoRARequest("c")]))
        assert psnr(await keeps, await life.alone(((old, 1.0),))) >= 60
        assert psnr(takes, await life.alone(((life.archived("c"), 1.0),))) >= 60
        assert psnr(takes, life.pictures[(old, 1.0),]) < 45

        await run_without_file(life)
        await run_without_memory(life, monkeypatch)
        await run_random_events(life, 30)


async def fail_loads(life: Life, folder: Path) -> None:
    """A load that fails changes nothing: the only adapter that is served is `b`."""
    omni = life.omni
    save_file(
        {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)},
        bad := folder / "x.safetensors",
    )
    stats = omni.adapter_stats()
    for request, words in (
        (LoRARequest("bad", bad), "does not fit this model: no layer here"),
        (LoRARequest("b", life.file("c")), "'b' has already been loaded"),
        (LoRARequest("none"), "needs a path"),
        (LoRARequest(3, life.file("c")), "an adapter takes a name of 1 to 128 printable characters, got 3"),  # type: ignore[arg-type]
        (LoRARequest("none", "/nowhere"), "the path of a LoRA adapter takes a safetensors file that exists"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            await omni.load_lora(request)
    with pytest.raises(InvalidRequestError, match="defaults of the LoRA adapter 'c': unknown keys"):
        await omni.load_lora(LoRARequest("c", life.file("c")), {"stepps": 8})
    assert (omni.adapters.names(), omni.adapter_stats().states) == (("b",), stats.states)


async def run_without_file(life: Life) -> None:
    """A loaded file that is gone before the first request that names it is served from memory."""
    await life.omni.load_lora(LoRARequest("d", life.file("d")))
    life.file("d").rename(kept := life.folder / "kept")
    picture = await life.draw(life.submit([LoRARequest("d")]))
    kept.rename(life.file("d"))
    await life.omni.unload_lora("d")
    assert psnr(picture, await life.alone(((life.archived("d"), 1.0),))) >= 60


async def run_without_memory(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to the device that fails is the error of its request alone, and leaves nothing behind."""

    def lack(adapter: LoadedAdapter, device: torch.device) -> LoadedAdapter:
        raise torch.OutOfMemoryError("CUDA out of memory")

    beside = asyncio.create_task(life.draw(life.submit([], steps=6)))
    await life.next_step()
    with monkeypatch.context() as patched:
        patched.setattr(LoadedAdapter, "to", lack)
        with pytest.raises(GenerationError, match="not enough memory"):
            await life.draw(life.submit([LoRARequest("e", life.file("e"))]))
    await beside
    assert life.resident.num_held == 0
    again = await life.draw(life.submit([LoRARequest("e", life.file("e"))]))
    assert psnr(again, await life.alone(((life.archived("e"), 1.0),))) >= 60


@pytest.mark.layouts
async def test_replicas_of_two_ranks_load_alike_and_a_killed_worker_reads_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    transformer = transformer_of(tiny_model)
    files = {
        name: save_peft(random_pairs(transformer, seed), tmp_path / f"{name}.safetensors")
        for seed, name in enumerate("abc")
    }
    params: dict[str, Any] = {"seed": 1, "output_type": "np", "num_inference_steps": 3}

    async def draw(omni: AsyncOmni, name: str) -> np.ndarray:
        lora = LoRARequest(name, None if name in omni.adapters else files[name])
        asked = OmniDiffusionSamplingParams(lora_request=lora, **params)
        return np.asarray([output async for output in omni.generate(PROMPT, asked)][-1].images[0])

    layout: dict[str, Any] = {"data_parallel_size": 2, "ulysses_degree": 2}
    served = {"a": str(files["a"])}
    async with asyncio.timeout(GUARD_SECONDS), AsyncOmni(str(tiny_model), lora_modules=served, **layout) as omni:
        await omni.load_lora(LoRARequest("b", files["b"]))
        assert omni.adapter_stats().states == {"device": 0, "host": 2, "disk": 0}
        assert omni.adapter_stats().loads == 4, "each replica has read both"
        wanted = {name: await draw(omni, name) for name in "abc"}
        both = await asyncio.gather(*(draw(omni, name) for name in "abcabc"))
        for name, picture in zip("abcabc", both):
            assert psnr(picture, wanted[name]) >= 55
        drawing = [asyncio.create_task(draw(omni, name)) for name in "abcabc"]
        await asyncio.sleep(0)
        replicas: Any = omni._engine
        for engine in replicas._engines:
            os.kill(engine._executor.worker_pids[1], signal.SIGKILL)
        for name, picture in zip("abcabc", await asyncio.gather(*drawing)):
            assert psnr(picture, wanted[name]) >= 55
        await omni.unload_lora("a")
        assert omni.adapters.names() == ("b",)
        assert psnr(await draw(omni, "b"), wanted["b"]) >= 55
        assert all(its.num_held == 0 for its in omni._engine.resident_adapters)
