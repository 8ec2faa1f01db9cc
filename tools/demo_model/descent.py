"""Optimizer and weight average for captured training steps: values that change between steps are tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Descent:
    """AdamW with clipped gradients; the learning rate is set between steps."""

    def __init__(self, parameters: list[torch.Tensor], betas: tuple[float, float], weight_decay: float) -> None:
        device = parameters[0].device
        on_gpu = device.type == "cuda"
        self.parameters = parameters
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=self.rate,
            betas=betas,
            weight_decay=weight_decay,
            fused=on_gpu,
            capturable=on_gpu,
            foreach=False,
        )

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate


class Average:
    """Exponential moving average of parameters, with a state dict like a module's."""

    def __init__(self, parameters: list[torch.Tensor], keep: float) -> None:
        self.parameters, self.keep = parameters, keep
        self.values = [p.detach().clone() for p in parameters]
        self.new_part = torch.zeros((), device=parameters[0].device)

    def set_step(self, step: int) -> None:
        """Set the number of the step. Call it before `update`, outside of the captured step."""
        self.new_part.fill_(1 - min(self.keep, (1 + step) / (10 + step)))

    def update(self) -> None:
        change = torch._foreach_sub([p.detach() for p in self.parameters], self.values)
        torch._foreach_mul_(change, self.new_part)
        torch._foreach_add_(self.values, change)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the parameters hold the average."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.values)
            yield
            torch._foreach_copy_(self.parameters, kept)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.values, [v.to(self.values[0].device) for v in state["values"]])
