"""Choice of the attention backend, among fake backends that tell how long they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo, Shares
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.attention import Setting
from vllm_omni.diffusion.compute.attention.sdpa import SdpaAttention
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.packing import Offsets
from vllm_omni.diffusion.compute.startup.attention_choice import (
    TIMED_RUNS,
    WARM_UP_RUNS,
    AttentionTask,
    BackendTrial,
    choose_attention,
    measure,
)
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.errors import ConfigError

CPU = torch.device("cpu")
SETTING = Setting(CPU, None, torch.float32, 8)
TASK = AttentionTask(SETTING, heads=3, lengths=(5, 4), with_lse=False, num_calls=100)


def backend(seconds: float, lacks: str | None = None, error: str | None = None) -> type[Any]:
    """A fake backend that adds `seconds` to `Clock.now` at each call."""

    class Fake(SdpaAttention):
        @classmethod
        def why_not(cls, setting: Setting) -> str | None:
            return lacks

        def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
            if error is not None:
                raise RuntimeError(error)
            Clock.now += seconds
            return super().attend(q, k, v, offsets_q, offsets_k)

    return Fake


class Clock:
    now = 0.0

    @classmethod
    def timing(cls, run: Callable[[], object]) -> float:
        start = cls.now
        run()
        return cls.now - start


class TwoRanks(Ranks):
    """One rank of two. On the other rank the backends of `lacks` do not run, and the timed ones take `seconds`."""

    def __init__(self, lacks: Sequence[bool], seconds: Sequence[float]) -> None:
        super().__init__()
        self._lacks = lacks
        self._seconds = iter(seconds)

    def unite(self, votes: Sequence[bool]) -> list[bool]:
        return [a or b for a, b in zip(votes, self._lacks, strict=True)]

    def agree(self, value: float) -> float:
        return max(value, next(self._seconds))


def never(run: Callable[[], object]) -> float:
    raise AssertionError("nothing is to be timed")


def test_the_fastest_backend_that_runs_is_chosen() -> None:
    classes: Any = {
        "sdpa": backend(3.0),
        "torch_varlen": backend(2.0),
        "cudnn": backend(0.5, error="no plan\nfor this graph"),
        "vllm_flash": backend(1.0, lacks="needs a CUDA GPU"),
    }
    choice = BackendTrial(classes, TASK, Ranks(), Clock.timing).fastest()
    assert choice.name == "torch_varlen"
    assert choice.seconds == {"sdpa": 3.0, "torch_varlen": 2.0}
    assert choice.refusals == {"vllm_flash": "needs a CUDA GPU", "cudnn": "fails: no plan"}
    assert str(choice) == (
        "attention backend: torch_varlen (sdpa 3000.000 ms; torch_varlen 2000.000 ms; "
        "vllm_flash needs a CUDA GPU; cudnn fails: no plan)"
    )


def test_the_slowest_rank_decides_for_all() -> None:
    classes: Any = {
        "sdpa": backend(3.0),
        "torch_varlen": backend(1.0),
        "cudnn": backend(0.1),
        "vllm_flash": backend(2.0),
    }
    infinity = float("inf")
    ranks = TwoRanks([False, False, True, False], [2.0, 4.0, infinity])
    choice = BackendTrial(classes, TASK, ranks, Clock.timing).fastest()
    assert choice.name == "sdpa"
    assert choice.seconds == {"sdpa": 3.0, "torch_varlen": 4.0}
    assert choice.refusals == {"cudnn": "does not run on another rank", "vllm_flash": "fails on another rank"}


def test_a_lone_backend_is_not_timed() -> None:
    classes: Any = {"sdpa": backend(1.0), "cudnn": backend(0.1, lacks="needs a CUDA GPU")}
    assert BackendTrial(classes, TASK, Ranks(), never).fastest().name == "sdpa"


def test_a_device_without_a_running_backend_is_refused() -> None:
    classes: Any = {"sdpa": backend(1.0, error="broken"), "cudnn": backend(1.0, error="broken too")}
    with pytest.raises(
        ConfigError, match=r"^no attention backend runs here: sdpa fails: broken; cudnn fails: broken too$"
    ):
        BackendTrial(classes, TASK, Ranks(), Clock.timing).fastest()


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ("cudnn", "cudnn needs a CUDA GPU"),
        ("torch_varlen", "torch_varlen fails: no kernel image"),
        ("vllm_flash", "vllm_flash does not run on another rank"),
    ],
)
def test_a_requested_backend_that_does_not_run_is_refused_with_the_reason(asked: Any, refusal: str) -> None:
    classes: Any = {
        "sdpa": backend(1.0),
        "torch_varlen": backend(1.0, error="no kernel image"),
        "cudnn": backend(1.0, lacks="needs a CUDA GPU"),
        "vllm_flash": backend(1.0),
    }
    ranks = TwoRanks([asked == "vllm_flash"], [])
    with pytest.raises(ConfigError) as refused:
        BackendTrial(classes, TASK, ranks, Clock.timing).requested(asked)
    message = str(refused.value)
    assert message.startswith("--attention-backend takes sdpa")
    assert message.endswith(f" here, got {asked}, which does not run: {refusal}")


def test_a_requested_backend_that_runs_is_chosen_without_asking_others() -> None:
    class NotToBeAsked(SdpaAttention):
        @classmethod
        def why_not(cls, setting: Setting) -> str | None:
            raise AssertionError

    classes: Any = {"sdpa": NotToBeAsked, "cudnn": backend(1.0)}
    assert BackendTrial(classes, TASK, Ranks(), Clock.timing).requested("cudnn").name == "cudnn"


def test_a_restart_keeps_the_first_choice_though_another_is_faster_now() -> None:
    classes: Any = {"sdpa": backend(1.0), "cudnn": backend(2.0)}
    assert BackendTrial(classes, TASK, Ranks(), Clock.timing).fastest().name == "sdpa"
    choice = BackendTrial(classes, TASK, Ranks(), Clock.timing).kept("cudnn")
    assert (choice.name, choice.seconds) == ("cudnn", {})


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [(Ranks(), "cudnn fails: no plan"), (TwoRanks([True], []), "cudnn does not run on another rank")],
)
def test_a_first_choice_that_does_not_run_any_more_ends_the_start(ranks: Ranks, reason: str) -> None:
    classes: Any = {"sdpa": backend(1.0), "cudnn": backend(1.0, error="no plan")}
    with pytest.raises(ConfigError) as refused:
        BackendTrial(classes, TASK, ranks, Clock.timing).kept("cudnn")
    name, _, why = reason.partition(" ")
    assert str(refused.value) == (
        f"the attention backend {name}, chosen at the first start, does not run any more: {why}"
    )


def info(**values: Any) -> PackedModelInfo:
    fields: dict[str, Any] = {
        "path": Path("model"),
        "family": "fake",
        "size_multiple": 16,
        "pixels_per_token": 16,
        "max_prompt_tokens": 64,
        "count_prompt_tokens": len,
        "attention_tokens": 100.0,
        "num_heads": 24,
        "head_dim": 128,
        "num_blocks": 2,
        "tensor_shares": Shares({"attention heads": 1}),
        "text_encoder_shares": Shares({"attention heads": 1}),
        "default_sampling_params": {"height": 512, "width": 256, "num_inference_steps": 50},
    }
    return PackedModelInfo(**fields | values)


def test_the_timed_task_has_the_heads_and_tokens_of_one_rank() -> None:
    task = AttentionTask.of(SETTING, info(), DiffusionParallelConfig())
    assert (task.heads, task.lengths, task.with_lse) == (24, (512 + 64, 512 + 32), False)
    assert task.num_calls == 2 * 50
    cut = DiffusionParallelConfig(tensor_parallel_size=2, ulysses_degree=5, ring_degree=2)
    task = AttentionTask.of(SETTING, info(), cut)
    assert (task.heads, task.lengths, task.with_lse) == (3, (288, 272), True)
    huge = info(default_sampling_params={"height": 8192, "width": 8192, "num_inference_steps": 8})
    assert AttentionTask.of(SETTING, huge, DiffusionParallelConfig()).lengths == (4096 + 64, 4096 + 32)


@pytest.mark.parametrize(("num_frames", "picture"), [(1, 512), (9, 3 * 512), (401, 16384)])
def test_the_timed_task_of_a_video_model_is_a_video(num_frames: int, picture: int) -> None:
    defaults = {"height": 512, "width": 256, "num_frames": num_frames, "num_inference_steps": 50}
    video = info(default_sampling_params=defaults, frame_multiple=4)
    lengths = AttentionTask.of(SETTING, video, DiffusionParallelConfig()).lengths
    assert lengths == (picture + 64, picture + 32)


def test_a_ring_times_attention_with_log_sum_exp() -> None:
    called = []

    class Fake(SdpaAttention):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
            called.append(("attend", q.shape, k.shape, v.shape))
            return q

        def attend_with_lse(
            self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
        ) -> tuple[Tensor, Tensor]:
            called.append(("attend_with_lse", q.shape, k.shape, v.shape))
            return q, q

    TASK.prepare(Fake())()
    replace(TASK, with_lse=True).prepare(Fake())()
    assert called == [
        ("attend", (9, 3, 8), (9, 3, 8), (9, 3, 8)),
        ("attend_with_lse", (9, 3, 8), (9, 3, 8), (9, 3, 8)),
    ]


def test_the_median_ignores_slow_first_calls() -> None:
    took = iter([90.0] * WARM_UP_RUNS + [1.0, 7.0, 2.0, 3.0, 50.0] + [3.0])
    assert TIMED_RUNS == 5
    assert measure({"sdpa": SdpaAttention}, TASK, lambda run: next(took)) == ({"sdpa": 3.0}, {})


def test_the_backend_timed_first_does_not_gain_from_a_rested_device() -> None:
    Clock.now = 0.0

    def throttled(run: Callable[[], object]) -> float:
        is_rested = Clock.now < 12
        return Clock.timing(run) * (0.7 if is_rested else 1.0)

    classes: Any = {"sdpa": backend(1.2), "vllm_flash": backend(1.0)}
    assert BackendTrial(classes, TASK, Ranks(), throttled).fastest().name == "vllm_flash"


def test_the_extra_time_of_new_lengths_is_spread_over_the_calls_of_a_request() -> None:
    class Plans(SdpaAttention):
        """A backend whose call takes 1 second, and 50 more when the lengths are new."""

        planned: ClassVar[set[tuple[int, ...]]] = set()

        def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
            Clock.now += 1.0 if offsets_q.values in self.planned else 51.0
            self.planned.add(offsets_q.values)
            return q

    classes: Any = {"sdpa": backend(2.0), "cudnn": Plans}
    for num_calls, chosen in ((40, "sdpa"), (60, "cudnn")):
        Plans.planned.clear()
        task = replace(TASK, num_calls=num_calls)
        choice = BackendTrial(classes, task, Ranks(), Clock.timing).fastest()
        assert choice.name == chosen
        assert choice.seconds["cudnn"] == pytest.approx(1 + 50 / num_calls)


def test_a_cpu_accepts_sdpa_only(tiny_model: Path) -> None:
    model = load_model_info(str(tiny_model))
    assert isinstance(model, PackedModelInfo)

    def choose(**settings: Any) -> str:
        config = OmniDiffusionConfig(str(tiny_model), **settings)
        return choose_attention(config, model, Device("cpu"), torch.float32, Ranks())

    assert choose() == choose(attention_backend="sdpa") == "sdpa"
    with pytest.raises(
        ConfigError,
        match=r"^--attention-backend takes sdpa here, got cudnn, which does not run: cudnn needs a CUDA GPU$",
    ):
        choose(attention_backend="cudnn")
