"""FLOPs and bytes that the roofline counts for videos, on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.test_roofline import check_videos

pytestmark = pytest.mark.layouts


@pytest.mark.parametrize(
    "layout",
    [{"ulysses_degree": 2, "ring_degree": 2}, {"tensor_parallel_size": 2, "cfg_parallel_size": 2}],
    ids="x".join,
)
def test_flops_and_exchanges_of_videos(tmp_path: Path, layout: dict[str, int]) -> None:
    check_videos(tmp_path, layout)
