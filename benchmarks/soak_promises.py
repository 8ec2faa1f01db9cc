"""Promises of a server under a soak, and their check against the evidence."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.served import Usage
from benchmarks.soak_load import Tally

MOST_DESCRIPTORS = 8
"""Allowed growth in open descriptors of the server, because clients keep connections open."""
_FAULTY_LINES = r"^Traceback|never retrieved|was never awaited"


@dataclass(frozen=True)
class Counts:
    """Counts from `/metrics`."""

    success: int
    failed: int
    aborted: int
    invalid: int
    turned_away: int
    """Requests refused because the queue was full or workers were missing."""
    restarts: int
    replayed: int
    under_way: int
    """Requests that run or are queued now."""

    @property
    def ended(self) -> int:
        """Number of pictures delivered, failed or aborted."""
        return self.success + self.failed + self.aborted

    def since(self, before: Counts) -> Counts:
        """Difference to the counts `before`; `under_way` stays the number now."""
        values = {name: value - getattr(before, name) for name, value in vars(self).items()}
        return Counts(**{**values, "under_way": self.under_way})


@dataclass(frozen=True)
class Evidence:
    """Evidence from one run."""

    tally: Tally
    before: Counts
    after: Counts
    usages: tuple[Usage, Usage]
    """Usage before and after the load."""
    num_faults: int
    """Number of planned signals to workers."""
    healed: Sequence[float]
    """Seconds from each sent fault until new workers ran; infinite if they never did."""
    health: int
    """Status of `/health` at the end."""


@dataclass(frozen=True)
class Promise:
    """One row of the table: a promise and whether it was kept."""

    name: str
    found: str
    allowed: str
    is_kept: bool
    details: Sequence[str] = ()
    """Texts of the responses that break the promise."""


async def read_counts(client: httpx.AsyncClient) -> Counts:
    text = (await client.get("/metrics")).raise_for_status().text
    samples: list[Any] = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(name: str, *reasons: str) -> int:
        named = [s for s in samples if s.name == name and (not reasons or s.labels["reason"] in reasons)]
        return int(sum(sample.value for sample in named))

    rejected = "vllm_omni:requests_rejected_total"
    return Counts(
        success=total("vllm_omni:request_success_total"),
        failed=total("vllm_omni:requests_failed_total"),
        aborted=total("vllm_omni:requests_aborted_total"),
        invalid=total(rejected, "invalid"),
        turned_away=total(rejected, "queue_full", "unavailable"),
        restarts=total("vllm_omni:worker_restarts_total"),
        replayed=total("vllm_omni:requests_replayed_total"),
        under_way=total("vllm:num_requests_running") + total("vllm:num_requests_waiting"),
    )


def judge(
    evidence: Evidence, log: str, exit_code: int, survivors: int, least_psnr: float, most_megabytes: float
) -> list[Promise]:
    """Check all promises. `log`: the server's output; `survivors`: number of processes that outlive it."""
    return [
        *_of_answers(evidence.tally, least_psnr),
        *_of_counts(evidence),
        *usage_promises(*evidence.usages, most_megabytes),
        *process_promises(log, exit_code, survivors),
    ]


def _of_answers(tally: Tally, least_psnr: float) -> list[Promise]:
    median, late = np.percentile(tally.seconds, (50, 99)) if tally.seconds else (float("nan"),) * 2
    return [
        Promise(
            "good requests get their pictures",
            f"{tally.answered}, {tally.pictures} pictures",
            "some",
            tally.answered > 0,
        ),
        Promise("latency, p50 and p99", f"{median:.2f} s, {late:.2f} s", "", True),
        Promise(
            "pictures are those of the calm",
            f"{tally.worst_psnr:.1f} dB",
            f"{least_psnr:g} dB",
            tally.worst_psnr >= least_psnr,
        ),
        Promise("bad requests get their error", str(tally.refused.total()), "some", tally.refused.total() > 0),
        Promise("answers are as they should be", f"{len(tally.faults)} are not", "0", not tally.faults, tally.faults),
    ]


def _of_counts(evidence: Evidence) -> list[Promise]:
    tally, counts = evidence.tally, evidence.after.since(evidence.before)
    slowest = max(evidence.healed, default=0.0)
    left = counts.under_way
    spread = f"{tally.pictures} to {tally.pictures + tally.left}"
    lost = counts.failed + counts.turned_away
    return [
        Promise(
            "dead workers are replaced",
            f"{counts.restarts}, the slowest in {slowest:.1f} s",
            str(evidence.num_faults),
            counts.restarts == evidence.num_faults and slowest < math.inf,
        ),
        Promise("requests of clients that left end", f"{left} have not", "0", left == 0),
        Promise("the server is healthy again", str(evidence.health), "200", evidence.health == 200),
        Promise("metrics: pictures delivered", str(counts.success), spread, _within(counts.success, spread)),
        Promise(
            "metrics: pictures that ended",
            f"{counts.ended}, {counts.replayed} replays",
            spread,
            _within(counts.ended, spread),
        ),
        Promise("metrics: failed or turned away", str(lost), "0", lost == 0),
        Promise(
            "metrics: refused as invalid",
            str(counts.invalid),
            str(tally.refused[400]),
            counts.invalid == tally.refused[400],
        ),
    ]


def _within(number: int, spread: str) -> bool:
    least, most = map(int, spread.split(" to "))
    return least <= number <= most


def usage_promises(before: Usage, after: Usage, most_megabytes: float) -> list[Promise]:
    """Promises about what a server keeps after a load."""
    grown = after.megabytes - before.megabytes
    opened = after.descriptors - before.descriptors
    return [
        Promise(
            "memory does not grow",
            f"{before.megabytes:.0f} to {after.megabytes:.0f} MB",
            f"{most_megabytes:g} MB more",
            grown <= most_megabytes,
        ),
        Promise(
            "descriptors do not grow",
            f"{before.descriptors} to {after.descriptors}",
            f"{MOST_DESCRIPTORS} more",
            opened <= MOST_DESCRIPTORS,
        ),
        Promise(
            "no process is left over",
            f"{before.processes} to {after.processes}",
            "as many",
            after.processes <= before.processes,
        ),
    ]


def process_promises(log: str, exit_code: int, survivors: int) -> list[Promise]:
    """Promises about a server's log and its end."""
    faulty = re.findall(_FAULTY_LINES, log, re.MULTILINE)
    return [
        Promise("the log has no traceback", str(len(faulty)), "0", not faulty),
        Promise(
            "SIGTERM ends the server",
            f"exit code {exit_code}, {survivors} processes left",
            "0, 0",
            exit_code == survivors == 0,
        ),
    ]
