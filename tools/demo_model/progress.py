"""Progress lines, the training log, and checkpoints that a later run continues from."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch


def cosine_after(rate: float, step: int, steps: int, warm_up: int, start: float) -> float:
    """Factor of the learning rate: short warm-up, constant up to the fraction `start` of the steps, cosine to 1 %."""
    part = max(0.0, (step / steps - start) / (1 - start))
    return rate * min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))


class Progress:
    """Log of averages every `every` steps, with a checkpoint every `save_every` steps."""

    def __init__(self, folder: Path, every: int, save_every: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.every, self.save_every = folder, every, save_every
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0
        self._started = time.time()

    def resume(self, stage: str, state: dict[str, Any]) -> int:
        """Load the stage's checkpoint into `state` if there is one; return the next step."""
        path = self.folder / f"{stage}.pt"
        self._started = time.time()
        if not path.exists():
            return 0
        saved = torch.load(path, weights_only=True, map_location="cpu")
        for name, holder in state.items():
            holder.load_state_dict(saved[name])
        print(f"{stage}: continuing at step {saved['step']}", flush=True)
        return int(saved["step"])

    def save(self, stage: str, step: int, state: dict[str, Any]) -> None:
        path = self.folder / f"{stage}.pt"
        unfinished = path.with_suffix(".new")
        torch.save({"step": step} | {name: holder.state_dict() for name, holder in state.items()}, unfinished)
        os.replace(unfinished, path)

    def step(self, stage: str, step: int, steps: int, state: dict[str, Any], **values: torch.Tensor) -> None:
        """Record a step. Call it after every step, with the number of steps done."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1
        if step % self.every == 0 or step == steps:
            means = {name: round(value.item() / self._count, 5) for name, value in self._sums.items()}
            self.log(stage=stage, step=step, steps=steps, seconds=round(time.time() - self._started, 1), **means)
            self._sums, self._count = {}, 0
        if self.is_saved(step, steps):
            self.save(stage, step, state)

    def is_saved(self, step: int, steps: int) -> bool:
        """Whether a checkpoint follows this number of steps."""
        return step % self.save_every == 0 or step == steps

    def log(self, **line: Any) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(text + "\n")
