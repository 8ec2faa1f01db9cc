"""Time of a denoising step whose sequences have LoRA adapters, relative to the same step without.

    python -m benchmarks.lora                                        # the demo model; any machine
    python -m benchmarks.lora --published qwen-image --out out/lora  # random weights of the published size, on a GPU

A batch is written REQUESTS:WIDTHxHEIGHT, with `:guided` for two sequences a request. Each request has one adapter, and
the adapters of the requests are the same one, or several in turn. Adapters are random and change all linear layers of
the blocks but modulation. A step with merged weights takes as long as one without adapters; the time of merging is
measured too, which a server that merges spends at each change of adapters.

Ways of computing a layer's change: `loop`: a product with A and one with B for each adapter, in PyTorch; `loop first`:
the same, written before the layer's product adds to it; `grouped after`: two kernels for all adapters, which add to the
output; `grouped first`: these kernels, which write before the product adds, where all rows are changed; `grouped`: the
same, and GELU together with the change before it. The last one is what the engine does on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import write_model
from benchmarks.gpu.report import Report, Row
from benchmarks.lora_adapters import Traffic, merge, random_adapter, traffic
from benchmarks.roofline.measured import card_at_hand
from benchmarks.timing import Spread, measure
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.families.flow_pipeline import FlowPipeline
from vllm_omni.diffusion.compute.layers.low_rank import AdaptedLayer, LayerChange, TorchChange, torch_changes
from vllm_omni.diffusion.compute.step.adapters import LoadedAdapter
from vllm_omni.diffusion.compute.step.cuda_graphs import MAX_TOKENS
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest

NUM_STEPS = 20
PUBLISHED_BATCHES = ("1:1024x1024:guided", "16:512x512")
WARM_UPS = 3
"""Runs before the clock: one is eager, one is captured as a CUDA graph."""

Pipeline = FlowPipeline[Any, Any, Any]
Changes = Callable[[Sequence[AdaptedLayer], torch.device], list[LayerChange]]


class TorchChangeFirst(TorchChange):
    """Change of all rows by one adapter, which is written before the layer's product adds to it."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ((changed, weights),) = self.parts
        assert isinstance(changed.scale, float)
        shrunk = (x @ weights.down.t()) * changed.scale
        y = x.new_empty((len(x), len(weight)))
        for up in weights.ups:
            target, ranks = y[:, up.columns], shrunk[:, up.ranks]
            if bias is None:
                torch.mm(ranks, up.weight.t(), out=target)
            else:
                torch.addmm(bias[up.columns], ranks, up.weight.t(), out=target)
        return y.addmm_(x, weight.t())


def torch_changes_first(layers: Sequence[AdaptedLayer], device: torch.device) -> list[LayerChange]:
    return [TorchChangeFirst(its.parts) for its in torch_changes(layers, device) if isinstance(its, TorchChange)]


def grouped(layers: Sequence[AdaptedLayer], device: torch.device) -> list[LayerChange]:
    from vllm_omni.diffusion.compute.layers.kernels.low_rank import grouped_changes

    return grouped_changes(layers, device)


def grouped_after(layers: Sequence[AdaptedLayer], device: torch.device) -> list[LayerChange]:
    return [replace(change, is_complete=False) for change in grouped(layers, device)]  # type: ignore[type-var]


def grouped_first(layers: Sequence[AdaptedLayer], device: torch.device) -> list[LayerChange]:
    from vllm_omni.diffusion.compute.layers.kernels.low_rank import GroupedChange

    class Apart(GroupedChange):
        def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
            return None

    return [Apart(**vars(change)) for change in grouped(layers, device)]


WAYS: dict[str, Changes] = {
    "grouped": grouped,
    "grouped first": grouped_first,
    "grouped after": grouped_after,
    "loop": torch_changes,
    "loop first": torch_changes_first,
}
"""Ways of computing changes; a CPU has the loops alone."""


@dataclass(frozen=True)
class Batch:
    text: str
    count: int
    width: int
    height: int
    is_guided: bool

    @classmethod
    def parse(cls, text: str) -> Batch:
        """Raise ValueError for another form than REQUESTS:WIDTHxHEIGHT or REQUESTS:WIDTHxHEIGHT:guided."""
        count, size, *guided = text.split(":")
        width, height = map(int, size.split("x"))
        if guided not in ([], ["guided"]):
            raise ValueError(f"expected :guided or nothing after the size, got {text}")
        return cls(text, int(count), width, height, bool(guided))

    def requests(self, max_sequence_length: int) -> Iterator[DiffusionRequest]:
        for i in range(self.count):
            yield DiffusionRequest(
                f"{i}",
                "a photo of a red apple and a blue car on a wooden table",
                self.height,
                self.width,
                NUM_STEPS,
                i,
                max_sequence_length,
                negative_prompt=" " if self.is_guided else None,
                true_cfg_scale=4.0 if self.is_guided else 1.0,
            )


@dataclass(frozen=True)
class Measurement:
    rank: int = 0
    """Rank of the adapters; 0: none."""
    count: int = 0
    """Number of different adapters."""
    way: str = ""
    has_graphs: bool = True

    def __str__(self) -> str:
        graphs = "" if self.has_graphs else ", without CUDA graphs"
        if not self.rank:
            return f"no adapter{graphs}"
        return f"{self.count} of rank {self.rank}, {self.way}{graphs}"

    @property
    def base(self) -> Measurement:
        return Measurement(has_graphs=self.has_graphs)


def measurements(
    ranks: Sequence[int], counts: Sequence[int], ways: Sequence[str], has_graphs: bool
) -> Iterator[Measurement]:
    """Measurements of one batch: the first way of all ranks and counts, and the others of the first rank and of the
    most adapters. `loop first` takes one adapter."""
    most = max(counts)
    first, *others = ways
    yield Measurement()
    for rank in ranks:
        for count in counts:
            yield Measurement(rank, count, first)
    for way in others:
        if most == 1 or way != "loop first":
            yield Measurement(ranks[0], most, way)
    if has_graphs:
        yield Measurement(has_graphs=False)
        for way in ways:
            if most == 1 or way != "loop first":
                yield Measurement(ranks[0], most, way, has_graphs=False)


class Bench:
    def __init__(self, runner: ModelRunner, seconds: float) -> None:
        assert isinstance(runner.pipeline, FlowPipeline), "a packed family"
        self.pipeline: Pipeline = runner.pipeline
        self._capturer = self.pipeline.capturer
        self._seconds = seconds
        self._adapters: dict[tuple[int, int], LoadedAdapter] = {}
        self._kernels = self.pipeline.transformer.kernels

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.pipeline.transformer.parameters()).device)

    def adapter(self, rank: int, number: int) -> LoadedAdapter:
        if (rank, number) not in self._adapters:
            self._adapters[rank, number] = random_adapter(self.pipeline, rank, number)
        return self._adapters[rank, number]

    def step(self, states: Sequence[Any], its: Measurement) -> Spread:
        for i, state in enumerate(states):
            state.composition = ((self.adapter(its.rank, i % its.count), 1.0),) if its.rank else ()
        self.pipeline.capturer = self._capturer if its.has_graphs else None
        kernels = copy.copy(self._kernels)
        if its.way:
            kernels.layer_changes = WAYS[its.way]
        self.pipeline.transformer.kernels = kernels
        spread = measure(lambda: self.pipeline.predict(states), self.device, warm_ups=WARM_UPS, budget=self._seconds)
        for state in states:
            self.pipeline.forget(state)
        return spread

    def merging(self, rank: int) -> Spread:
        adapter = self.adapter(rank, 0)
        scales = iter([1.0, -1.0] * 100)  # merged, then taken out again
        return measure(lambda: merge(self.pipeline, adapter, next(scales)), self.device, budget=self._seconds)

    def traffic(self, states: Sequence[Any], its: Measurement) -> Traffic:
        its_adapters = [self.adapter(its.rank, i % its.count) for i, _ in enumerate(states)]
        return traffic(self.pipeline, states, its_adapters)


@torch.inference_mode()
def run(bench: Bench, batch: Batch, args: argparse.Namespace, max_tokens: int, deadline: float) -> list[Row]:
    """Rows of one batch: the fastest of the rounds of each measurement, and its ratio to a step without adapters."""
    states = [bench.pipeline.encode(request) for request in batch.requests(max_tokens)]
    counts = [count for count in args.adapters if count <= batch.count] or [1]
    ways = list(WAYS)[0 if bench.device.type == "cuda" else list(WAYS).index("loop") :]
    is_captured = sum(sum(state.sequence_lengths) for state in states) <= MAX_TOKENS
    planned = list(measurements(args.ranks, counts, ways, is_captured and bench.pipeline.capturer is not None))
    best: dict[Measurement, Spread] = {}
    for number in range(args.rounds):
        for its in planned:
            if number and time.monotonic() > deadline:
                break
            spread = bench.step(states, its)
            best[its] = min(spread, best.get(its, spread), key=lambda spread: spread.median)
    card = card_at_hand()
    rows = []
    for its, spread in best.items():
        detail: dict[str, Any] = {"times a step without": spread.median / best[its.base].median}
        predicted = None
        if its.rank:
            cost = bench.traffic(states, its)
            detail |= {"GB": cost.num_bytes / 1e9, "TFLOP": cost.flops / 1e12}
            if card is not None:
                predicted = 1e3 * (best[its.base].median + cost.num_bytes / card.memory_bytes)
        rows.append(Row.milliseconds(f"{batch.text}: {its}", spread, predicted, **detail))
    for rank in args.ranks:
        rows.append(Row.milliseconds(f"{batch.text}: merging one of rank {rank}", bench.merging(rank)))
    return rows


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--published", choices=["qwen-image", "z-image"], help="random weights of the published size")
    parser.add_argument("--tiny", action="store_true", help="--published with a small transformer")
    parser.add_argument("--quantization", choices=["fp8"])
    parser.add_argument("--batches", nargs="+", help="default: 16:64x64, or those of the published size")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=2, help="rounds in which all measurements take turns")
    parser.add_argument("--seconds", type=float, default=0.5, help="budget of one measurement")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds after which no further round begins")
    parser.add_argument("--out", type=Path, help="folder for lora.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    deadline = time.monotonic() + args.limit
    with tempfile.TemporaryDirectory() as folder:
        config = OmniDiffusionConfig(args.model, quantization=args.quantization)
        if args.published:
            path = write_model(args.published, Path(folder, "model"), args.tiny)
            config = OmniDiffusionConfig(str(path), quantization=args.quantization, load_format="dummy")
        info = load_model_info(config.model, config.load_format)
        runner = ModelRunner(config, info)
        runner.start()
        bench = Bench(runner, args.seconds)
        report = None
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            report = Report(
                args.out / "lora.json", {"device": str(bench.device), "model": args.published or args.model}
            )
        for text in args.batches or (PUBLISHED_BATCHES if args.published else ["16:64x64"]):
            rows = run(bench, Batch.parse(text), args, info.max_prompt_tokens, deadline)
            for row in rows:
                print(row.line(), flush=True)
            if report is not None:
                report.add("lora", f"{text} {args.quantization or ''}".strip(), rows)


if __name__ == "__main__":
    main()
