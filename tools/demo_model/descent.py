"""Following the gradient, in a way that a recorded step can repeat: what changes from step to step is a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Descent:
    """AdamW with clipped gradients and a learning rate that is set between the steps."""

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
    """An exponential moving average of parameters, with a state like a module's."""

    def __init__(self, parameters: list[torch.Tensor], keep: float) -> None:
        self.parameters, self.keep = parameters, keep
        self.values = [p.detach().clone() for p in parameters]
        self.new_part = torch.zeros((), device=parameters[0].device)

    def set_step(self, step: int) -> None:
        """To be called before `update`, outside of what is recorded."""
        self.new_part.fill_(1 - min(self.keep, (1 + step) / (10 + step)))

    def update(self) -> None:
        change = torch._foreach_sub([p.detach() for p in self.parameters], self.values)
        torch._foreach_mul_(change, self.new_part)
        torch._foreach_add_(self.values, change)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average into the parameters for a while."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.values)
            yield
            torch._foreach_copy_(self.parameters, kept)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.values, [v.to(self.values[0].device) for v in state["values"]])
