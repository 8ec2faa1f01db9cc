"""UniPC, the multistep noise scheduler of video models, without reads from the device."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor


class FlowUniPC(UniPCMultistepScheduler):  # type: ignore[misc]  # diffusers has no types
    """diffusers' scheduler for flow matching; the latents may have any shape.

    diffusers copies noise levels to the latents' device and solves a system of equations there, so that the CPU waits
    for the device several times a step. Here all coefficients are scalars on the CPU, which kernels take as arguments.
    Formulas and their order are diffusers': on a CPU the latents are the same bit for bit up to `solver_order` 2.

    A step goes from noise level s to t. With alpha = 1 - sigma, lambda = log(alpha / sigma), h = lambda_t - lambda_s:
    x_t = sigma_t / sigma_s x_s - alpha_t (e^-h - 1) (m_s + sum(rho_i D_i)), where m are clean latents and D_i are
    divided differences of them (UniPC with `solver_type` bh2, arXiv 2302.04867).
    """

    def set_timesteps(self, *arguments: Any, **keywords: Any) -> None:
        super().set_timesteps(*arguments, **keywords)
        levels = [self._sigma_to_alpha_sigma_t(sigma) for sigma in self.sigmas]
        self._lambdas = [torch.log(alpha) - torch.log(sigma) for alpha, sigma in levels]

    def has_falling_levels(self) -> bool:
        """Whether noise falls at every step, so that lambda rises; a step without length would divide by zero."""
        return all(bool(a < b) for a, b in pairwise(self._lambdas))

    def multistep_uni_p_bh_update(self, model_output: Tensor, *_: Any, sample: Tensor, order: int) -> Tensor:
        """Predictor: latents at the next noise level from `sample`, those at the current one."""
        return self._update(sample, self.step_index, order)

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *_: Any, last_sample: Tensor, this_sample: Tensor, order: int
    ) -> Tensor:
        """Corrector: latents at the current noise level from `last_sample`, those at the previous one.

        this_model_output: clean latents foreseen at the current level.
        """
        return self._update(last_sample, self.step_index - 1, order, this_model_output)

    def _update(self, x: Tensor, start: int, order: int, newest: Tensor | None = None) -> Tensor:
        """Latents at level `start + 1` from `x` at level `start`; newest: clean latents foreseen at `start + 1`."""
        alpha_t, sigma_t = self._sigma_to_alpha_sigma_t(self.sigmas[start + 1])
        _, sigma_s = self._sigma_to_alpha_sigma_t(self.sigmas[start])
        lambda_s = self._lambdas[start]
        h = self._lambdas[start + 1] - lambda_s
        ratios = [(self._lambdas[start - i] - lambda_s) / h for i in range(1, order)]
        m_s, *older = reversed(self.model_outputs[-order:])
        differences = [(m - m_s) / ratio for m, ratio in zip(older, ratios)]
        if newest is not None:
            differences.append(newest - m_s)
        b_h = torch.expm1(-h)
        moved: Tensor = sigma_t / sigma_s * x - alpha_t * b_h * m_s
        if differences:
            weights = _weights(ratios, -h, len(differences))
            moved = moved - alpha_t * b_h * sum(rho.to(x.dtype) * d for rho, d in zip(weights, differences))
        return moved.to(x.dtype)


def _weights(ratios: list[Tensor], hh: Tensor, count: int) -> list[Tensor]:
    """rho of each of `count` divided differences: the solution of R rho = b, on the CPU; of one alone it is 1/2.

    ratios: steps in lambda to earlier noise levels, relative to this step. hh: -h.
    """
    if count == 1:
        return [torch.tensor(0.5)]
    points = torch.stack([*ratios, torch.ones(())])[:count]
    b_h = torch.expm1(hh)
    phi, factorial, b = b_h / hh - 1, 1, []
    for i in range(1, count + 1):
        b.append(phi * factorial / b_h)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    powers = torch.stack([points**i for i in range(count)])
    return list(torch.linalg.solve(powers, torch.stack(b)).unbind())
