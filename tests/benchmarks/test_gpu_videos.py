"""Sections of videos in small: steps, attention, kernels, decodes; a picture beside a video; several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.gpu import video_beside
from benchmarks.gpu.video_decode import decode_flops

from tests.benchmarks.test_layouts import measure

STEP = "480p 17 frames, one branch"


@pytest.mark.thorough
def test_a_step_is_measured_with_our_and_with_their_code(tmp_path: Path) -> None:
    few = (
        "video_attention/wan-14b 480p",
        "video_kernels/wan-14b",
        f"video_step/wan-14b-8 {STEP}, default",
        f"video_step/wan-14b-8 {STEP}, diffusers, eager",
        "video_decode/480p 81 frames, whole",
    )
    rows = measure(tmp_path, "video_attention,video_kernels,video_step,video_decode", "--only", *few)
    ours, theirs = (rows[f"wan-14b-8 {STEP}, {name}"] for name in ("default", "diffusers, eager"))
    assert ours["measured"] > 0 < theirs["measured"]
    assert ours["detail"]["TFLOP/s"] * ours["measured"] == pytest.approx(
        theirs["detail"]["TFLOP/s"] * theirs["measured"]
    )
    assert rows["wan-14b 480p, sdpa, itself"]["detail"]["tokens"] == 2 * 2 * 3
    assert "CUDA" in rows["wan-14b 480p, cudnn"]["refused"] or "GPU" in rows["wan-14b 480p, cudnn"]["refused"]
    assert rows["wan-14b, heads"]["measured"] > 0
    decode = rows["480p 81 frames, whole"]
    # The first latent frame becomes one frame, and the second becomes four.
    folder = str(tmp_path / "models" / "wan-1.3b-tiny")
    first, both = (decode_flops(folder, (32, 48, frames)) for frames in (1, 5))
    assert 3 < (both - first) / first < 5
    assert decode["detail"]["TFLOP, whole"] == pytest.approx(both / 1e12)


@pytest.mark.layouts
def test_videos_beside_pictures_and_on_two_ranks(tmp_path: Path) -> None:
    sections = "video_beside,video_layouts"
    only = ("video_beside", "video_layouts/wan-14b-8", "decode of 480p")
    rows = measure(tmp_path, sections, "--only", *only, "--layouts", "ulysses=2", "cfg=2")
    alone, beside = (
        rows[f"picture of {video_beside.PICTURE_STEPS} steps, {where}"] for where in ("alone", "beside a video of 720p")
    )
    assert beside["detail"]["over alone ms"] == pytest.approx(beside["measured"] - alone["measured"])
    one, ulysses, cfg = (
        rows[f"wan-14b-8 720p 81 frames, guidance, {layout}"] for layout in ("one device", "ulysses 2", "cfg 2")
    )
    for several in (ulysses, cfg):
        assert several["detail"]["speed-up"] == pytest.approx(one["measured"] / several["measured"])
        assert several["detail"]["predicted MB sent"] > 0 == one["detail"]["predicted MB sent"]
    shared = rows["decode of 480p 81 frames, 2 ranks, tiled"]
    assert shared["detail"]["over whole"] > 0
