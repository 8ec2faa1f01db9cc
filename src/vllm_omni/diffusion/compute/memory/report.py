"""Text of a budget: the table, and the line that refuses a model which does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_omni.diffusion.compute.memory.budget import DeviceLimits, MemoryBudget, gib
from vllm_omni.diffusion.compute.memory.remedies import ASSUMED, Remedy

NAMED_OTHERS_BYTES = 2**29
"""Memory of others from which on it is named."""


def table(budget: MemoryBudget) -> str:
    """Rows, sums and the device's memory, in lines."""
    width = max(len(row.name) for row in budget.rows) + 2
    lines = []
    for row in budget.rows:
        size = "?" if row.num_bytes is None else gib(row.num_bytes)
        if row.is_optional:
            size = f"({size})"
        lines.append(f"  {row.name:<{width}}{size:>14}  {row.note}".rstrip())
    sums = (
        ("needed for a default request", budget.needed_bytes),
        ("needed for the largest request", budget.largest_bytes),
        ("given", budget.limits.given_bytes),
    )
    lines += [f"  {name:<{width}}{gib(size):>14}" for name, size in sums]
    lines.append(f"  {device_line(budget.limits)}")
    return "\n".join(lines)


def device_line(limits: DeviceLimits) -> str:
    """Memory of the device, and the part that the server may take."""
    if not limits.is_gpu:
        return f"the host has {gib(limits.given_bytes)} available"
    line = (
        f"the device has {gib(limits.total_bytes)}, of which --gpu-memory-utilization gives {gib(limits.given_bytes)}"
    )
    if limits.others_bytes >= NAMED_OTHERS_BYTES:
        line += f"; {gib(limits.others_bytes)} of {gib(limits.total_bytes)} are used by other processes"
    return line


def remedy_table(remedies: Sequence[Remedy]) -> str:
    """Flags that make the model fit, with their memory and speed, in lines."""
    if not remedies:
        return "no flags make it fit"
    width = max(len(remedy.flags) for remedy in remedies) + 2
    lines = [f"  {remedy.flags:<{width}}{gib(remedy.budget.needed_bytes):>12}  {remedy.speed}" for remedy in remedies]
    return "\n".join([f"it fits with one of these ({ASSUMED}):", *lines])


def refusal(budget: MemoryBudget, remedies: Sequence[Remedy]) -> str:
    """One line: what the model needs, what there is, and the flags with which it fits."""
    line = f"the model needs {gib(budget.needed_bytes)}, {device_line(budget.limits)}"
    if not remedies:
        return f"{line}; no flags make it fit"
    choices = (f"{remedy.flags} ({gib(remedy.budget.needed_bytes)}, {remedy.speed})" for remedy in remedies)
    return f"{line}; it fits with {', or '.join(choices)}; {ASSUMED}"


def verdict(budget: MemoryBudget) -> str:
    """Whether the model fits, in one line."""
    if not budget.fits:
        return "it does not fit"
    return warning(budget) or "it fits"


def warning(budget: MemoryBudget) -> str:
    """Line about requests that do not fit; empty: all do."""
    if budget.serves_largest:
        return ""
    if budget.needed_bytes > budget.limits.given_bytes:
        return f"memory may not suffice: {gib(budget.needed_bytes)} needed, {device_line(budget.limits)}"
    return (
        f"the largest requests may not fit: {gib(budget.largest_bytes)} needed, {gib(budget.limits.given_bytes)} "
        "given; smaller ones run (--max-pixels and --max-num-frames bound them)"
    )
