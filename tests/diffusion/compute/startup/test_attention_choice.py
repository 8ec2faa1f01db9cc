"""Choice of the attention backend, among made-up backends that report made-up times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vllm_omni.diffusion.catalog.registry import ModelInfo, Shares, load_model_info
from vllm_omni.diffusion.compute.attention import Setting
from vllm_omni.diffusion.compute.attention.sdpa import SdpaAttention
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.kinds import Device
from vllm_omni.diffusion.compute.packing import Offsets
from vllm_omni.diffusion.compute.startup.attention_choice import (
    TIMED_RUNS,
    WARM_UP_RUNS,
    Task,
    check,
    choose_attention,
    elapsed,
    find_fastest,
    keep,
    measure,
)
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.errors import ConfigError

CPU = torch.device("cpu")
SETTING = Setting(CPU, None, torch.float32, 8)
TASK = Task(SETTING, heads=3, lengths=(5, 4), with_lse=False, num_calls=100)


def backend(seconds: float, lacks: str | None = None, error: str | None = None) -> type[Any]:
    """A backend that adds to `Clock.now` what it takes."""

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
    """One rank of two; the other says `lacks` of the backends and takes `seconds`, in turn."""

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


def test_the_fastest_that_runs_is_taken() -> None:
    classes: Any = {
        "sdpa": backend(3.0),
        "torch_varlen": backend(2.0),
        "cudnn": backend(0.5, error="no plan\nfor this graph"),
        "vllm_flash": backend(1.0, lacks="needs a CUDA GPU"),
    }
    choice = find_fastest(classes, TASK, Ranks(), Clock.timing)
    assert choice.name == "torch_varlen"
    assert choice.seconds == {"sdpa": 3.0, "torch_varlen": 2.0}
    assert choice.refusals == {"vllm_flash": "needs a CUDA GPU", "cudnn": "fails: no plan"}
    assert str(choice) == (
        "attention backend: torch_varlen (sdpa 3000.000 ms; torch_varlen 2000.000 ms; "
        "vllm_flash needs a CUDA GPU; cudnn fails: no plan)"
    )


def test_all_ranks_take_what_is_fastest_on_the_slowest() -> None:
    classes: Any = {
        "sdpa": backend(3.0),
        "torch_varlen": backend(1.0),
        "cudnn": backend(0.1),
        "vllm_flash": backend(2.0),
    }
    infinity = float("inf")
    ranks = TwoRanks([False, False, True, False], [2.0, 4.0, infinity])
    choice = find_fastest(classes, TASK, ranks, Clock.timing)
    assert choice.name == "sdpa"
    assert choice.seconds == {"sdpa": 3.0, "torch_varlen": 4.0}
    assert choice.refusals == {"cudnn": "does not run on another rank", "vllm_flash": "fails on another rank"}


def test_a_lone_backend_is_not_timed() -> None:
    classes: Any = {"sdpa": backend(1.0), "cudnn": backend(0.1, lacks="needs a CUDA GPU")}
    assert find_fastest(classes, TASK, Ranks(), never).name == "sdpa"


def test_a_machine_on_which_nothing_runs_is_told() -> None:
    classes: Any = {"sdpa": backend(1.0, error="broken"), "cudnn": backend(1.0, error="broken too")}
    with pytest.raises(
        ConfigError, match=r"^no attention backend runs here: sdpa fails: broken; cudnn fails: broken too$"
    ):
        find_fastest(classes, TASK, Ranks(), Clock.timing)


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        ("cudnn", "cudnn needs a CUDA GPU"),
        ("torch_varlen", "torch_varlen fails: no kernel image"),
        ("vllm_flash", "vllm_flash does not run on another rank"),
    ],
)
def test_what_does_not_run_is_refused_with_the_reason(asked: Any, refusal: str) -> None:
    classes: Any = {
        "sdpa": backend(1.0),
        "torch_varlen": backend(1.0, error="no kernel image"),
        "cudnn": backend(1.0, lacks="needs a CUDA GPU"),
        "vllm_flash": backend(1.0),
    }
    ranks = TwoRanks([asked == "vllm_flash"], [])
    with pytest.raises(ConfigError) as refused:
        check(asked, classes, TASK, ranks, Clock.timing)
    message = str(refused.value)
    assert message.startswith("--attention-backend takes sdpa")
    assert message.endswith(f" here, got {asked}, which does not run: {refusal}")


def test_what_is_asked_for_and_runs_is_taken_and_no_other_is_asked() -> None:
    class NotToBeAsked(SdpaAttention):
        @classmethod
        def why_not(cls, setting: Setting) -> str | None:
            raise AssertionError

    classes: Any = {"sdpa": NotToBeAsked, "cudnn": backend(1.0)}
    assert check("cudnn", classes, TASK, Ranks(), Clock.timing).name == "cudnn"


def test_a_restart_keeps_the_first_choice_though_another_is_faster_now() -> None:
    classes: Any = {"sdpa": backend(1.0), "cudnn": backend(2.0)}
    assert find_fastest(classes, TASK, Ranks(), Clock.timing).name == "sdpa"
    choice = keep("cudnn", classes, TASK, Ranks(), Clock.timing)
    assert (choice.name, choice.seconds) == ("cudnn", {})


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [(Ranks(), "cudnn fails: no plan"), (TwoRanks([True], []), "cudnn does not run on another rank")],
)
def test_a_first_choice_that_does_not_run_any_more_is_not_replaced_in_silence(ranks: Ranks, reason: str) -> None:
    classes: Any = {"sdpa": backend(1.0), "cudnn": backend(1.0, error="no plan")}
    with pytest.raises(ConfigError) as refused:
        keep("cudnn", classes, TASK, ranks, Clock.timing)
    name, _, why = reason.partition(" ")
    assert str(refused.value) == (
        f"the attention backend {name}, chosen at the first start, does not run any more: {why}"
    )


def info(**values: Any) -> ModelInfo:
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
    return ModelInfo(**fields | values)


def test_the_task_is_what_a_rank_computes() -> None:
    task = Task.of(SETTING, info(), DiffusionParallelConfig())
    assert (task.heads, task.lengths, task.with_lse) == (24, (512 + 64, 512 + 32), False)
    assert task.num_calls == 2 * 50
    cut = DiffusionParallelConfig(tensor_parallel_size=2, ulysses_degree=5, ring_degree=2)
    task = Task.of(SETTING, info(), cut)
    assert (task.heads, task.lengths, task.with_lse) == (3, (288, 272), True)
    huge = info(default_sampling_params={"height": 8192, "width": 8192, "num_inference_steps": 8})
    assert Task.of(SETTING, huge, DiffusionParallelConfig()).lengths == (4096 + 64, 4096 + 32)


def test_the_task_runs_what_the_layout_needs() -> None:
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


def test_the_median_forgives_a_slow_start() -> None:
    took = iter([90.0] * WARM_UP_RUNS + [1.0, 7.0, 2.0, 3.0, 50.0] + [3.0])
    assert TIMED_RUNS == 5
    assert measure(SdpaAttention(), TASK, lambda run: next(took)) == 3.0


def test_what_new_lengths_cost_is_shared_by_the_calls_of_a_request() -> None:
    class Plans(SdpaAttention):
        """Plans for 50 seconds whenever lengths are new, and then takes 1."""

        planned: ClassVar[set[tuple[int, ...]]] = set()

        def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
            Clock.now += 1.0 if offsets_q.values in self.planned else 51.0
            self.planned.add(offsets_q.values)
            return q

    classes: Any = {"sdpa": backend(2.0), "cudnn": Plans}
    for num_calls, chosen in ((40, "sdpa"), (60, "cudnn")):
        Plans.planned.clear()
        task = replace(TASK, num_calls=num_calls)
        choice = find_fastest(classes, task, Ranks(), Clock.timing)
        assert choice.name == chosen
        assert choice.seconds["cudnn"] == 1 + 50 / num_calls


def test_a_run_is_timed_until_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Slow(Device):
        def synchronize(self) -> None:
            nonlocal now
            now += 10.0

    def run() -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr("vllm_omni.diffusion.compute.startup.attention_choice.time.perf_counter", lambda: now)
    assert elapsed(run, Slow("cpu")) == 11.0


def test_a_cpu_takes_sdpa_alone(tiny_model: Path) -> None:
    model = load_model_info(str(tiny_model))

    def choose(**settings: Any) -> str:
        config = OmniDiffusionConfig(str(tiny_model), **settings)
        return choose_attention(config, model, Device("cpu"), torch.float32, Ranks())

    assert choose() == choose(attention_backend="sdpa") == "sdpa"
    with pytest.raises(
        ConfigError,
        match=r"^--attention-backend takes sdpa here, got cudnn, which does not run: cudnn needs a CUDA GPU$",
    ):
        choose(attention_backend="cudnn")
