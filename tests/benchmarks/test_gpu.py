"""`python -m benchmarks.gpu --tiny`: what measures GPUs runs, writes its rows and goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import step
from benchmarks.gpu.engine import forced_mask
from benchmarks.gpu.idle import covered
from benchmarks.gpu.layouts import parse_layout

pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for one another on a busy machine would take minutes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measure(tmp_path: Path) -> Any:
    """Run sections -> exit code and the file's content."""

    def run(sections: str, *more: str) -> tuple[Any, dict[str, Any]]:
        file = tmp_path / "gpu.json"
        arguments = ["--tiny", "--sections", sections, "--out", str(file), "--models", str(tmp_path / "models")]
        with pytest.raises(SystemExit) as ended:
            gpu.main([*arguments, *more])
        return ended.value.code, json.loads(file.read_text()) if file.is_file() else {}

    return run


def row(content: dict[str, Any], case: str) -> dict[str, Any]:
    return next(r for rows in content["cases"].values() for r in rows if r["case"] == case)


def test_rows_are_written_and_not_measured_twice(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few = (
        "step/z-image 1024, d",
        "step/qwen-image 1024, fp8, fused, eager",
        "step/qwen-image 1024, attention cudnn",
        "ceilings/",
    )
    code, content = measure("ceilings,step", "--only", *few)
    assert code == 0
    assert row(content, "qwen-image gemm, all shapes")["measured"] > 0
    names = ("default", "diffusers, eager", "diffusers, compiled")
    rows = [row(content, f"z-image 1024, {name}") for name in names]
    assert min(r["measured"] for r in rows) > 0
    assert len({r["predicted"] for r in rows}) == 1
    steps = [case.partition(", ")[2] for case in content["cases"] if case.startswith("step/")]
    assert sorted(set(steps)) == sorted({*names, "fp8, fused, eager", "attention cudnn"})
    assert not [r for rows in content["cases"].values() for r in rows if r["refused"].startswith("failed")]

    monkeypatch.setattr(gpu, "run_case", lambda case: pytest.fail(f"{case.name} was measured again"))
    assert measure("ceilings,step", "--only", *few) == (0, content)


def test_whole_pictures_skip_what_they_are_told_to(measure: Any) -> None:
    code, content = measure("caches")
    assert code == 0
    assert row(content, "uncached, 8 steps")["detail"]["cached steps"] == 0
    # The recommended setting skips as many with the demo model (docs/cache_quality.md).
    assert row(content, "cache_dit, 50 steps")["detail"]["cached steps"] == forced_mask(50).count(0) == 35
    assert row(content, "tea_cache, 50 steps")["detail"]["cached steps"] == 36
    for backend in ("cache_dit", "tea_cache"):
        assert row(content, f"{backend}, a skipping step")["measured"] is not None


def test_pictures_through_the_engine_over_http_and_in_batches(measure: Any) -> None:
    code, content = measure("end_to_end,batching", "--only", "/z-image, ", "256, batch 8")
    assert code == 0
    whole = row(content, "z-image, 4 steps")
    parts = [whole["detail"][f"{name} ms"] for name in ("text_encode", "denoise", "vae_decode", "rest")]
    assert min(parts) > 0
    assert row(content, "z-image, cold start with random weights")["measured"] > 0
    over = row(content, "z-image, HTTP over the engine, a picture")
    assert over["detail"]["PNG and base64 ms"] > 0
    assert over["detail"]["over HTTP ms"] == pytest.approx(over["detail"]["engine ms"] + over["measured"])
    together = row(content, "about 256x256, batch 8")["detail"]
    assert together["gain"] == pytest.approx(together["pictures a second"] * together["one by one ms"] / 8e3)


def test_pictures_of_small_models_are_diffusers_own(measure: Any) -> None:
    names = ("qwen-image float32", "qwen-image-edit-plus bfloat16", "sd3 float32", "demo fp8")
    code, content = measure("parity", "--only", *(f"parity/{name}" for name in names))
    assert code == 0
    for name in (names[0], names[2]):
        assert row(content, name)["measured"] > 60
        assert row(content, f"{name}, beside others and alone")["measured"] > 60
    assert row(content, names[3])["measured"] > 20
    ours, theirs = (row(content, names[1])["detail"][f"{who} to float32 dB"] for who in ("ours", "diffusers"))
    assert ours > theirs - 3


def test_peaks_of_memory_are_predicted(measure: Any) -> None:
    names = ("qwen-image 1024, resident", "qwen-image 1024, layerwise bf16", "z-image 1024, resident")
    code, content = measure("memory", "--only", *(f"memory/{name}" for name in names))
    assert code == 0
    resident, streamed, z_image = (row(content, name) for name in names)
    assert streamed["predicted"] < resident["predicted"]
    for each in (resident, streamed, z_image):
        assert not each["refused"]
        parts = each["detail"]
        whole = parts["encode s"] + 20 * parts["step s"] + parts["decode s"]
        assert parts["s a picture of 20 steps"] == pytest.approx(whole)
        assert parts["step s"] > 0


def test_exchanges_are_rates_of_the_link(measure: Any) -> None:
    code, content = measure("communication", "--layouts", "ring=2")
    assert code == 0
    assert not [r for rows in content["cases"].values() for r in rows if r["refused"]]
    link = row(content, "link, both ways at once")["measured"]
    turn = row(content, "ring 2, 128x128, keys and values")
    assert turn["detail"]["of the measured link"] == pytest.approx(turn["measured"] / link)
    shared, tiled = (row(content, f"decode, 128x128, {who}") for who in ("2 ranks", "one rank, tiled"))
    assert shared["predicted"] == pytest.approx(tiled["measured"])  # a single tile


def test_a_call_ends_in_time_and_the_next_one_goes_on(measure: Any) -> None:
    assert measure("parity", "--minutes", "0") == (3, {})


def test_what_fails_is_a_row(measure: Any) -> None:
    code, content = measure("idle", "--only", "gaps")
    assert code == 0
    assert row(content, "device idle within steps")["refused"] == "needs a GPU"


def test_wrong_arguments_and_files_of_elsewhere_are_refused(measure: Any, tmp_path: Path) -> None:
    assert measure("steps")[0].endswith("got steps")
    assert "ulysses" in measure("parity", "--layouts", "width=2")[0]
    (tmp_path / "gpu.json").write_text(json.dumps({"environment": {"device": "abacus"}, "cases": {}}))
    assert "abacus" in measure("parity")[0]


def test_what_is_called_compiled_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a family that by itself compiles only where it gains."""
    asked: list[bool | None] = []

    def starts(*arguments: Any) -> Any:
        *_, compile_blocks = arguments
        asked.append(compile_blocks)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(step, "started_runner", starts)
    bench = SimpleNamespace(device=torch.device("cuda"))
    for variant in step.VARIANTS.values():
        with pytest.raises(RuntimeError, match="no GPU"):
            step.start_ours(bench, variant)  # type: ignore[arg-type]
    assert [bool(compile_blocks) for compile_blocks in asked] == ["compiled" in name for name in step.VARIANTS]
    assert all(variant.settings.get("enforce_eager") for name, variant in step.VARIANTS.items() if "eager" in name)


def test_arithmetic() -> None:
    assert parse_layout("ulysses=2,cfg=2") == {"ulysses_degree": 2, "cfg_parallel_size": 2}
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0)]) == (6.0, 4.0, 2.0)
    assert forced_mask(10) == [1, 1, 1, 1, 0, 0, 0, 1, 0, 0]
    assert forced_mask(2) == [1, 1]


def test_blocks_that_stream_are_measured_beside_their_copies(measure: Any) -> None:
    case = "qwen-image 1024 bf16, layerwise, 2"
    code, content = measure("offload", "--only", "offload/link", f"offload/{case}")
    assert code == 0
    assert row(content, "link")["measured"] > 0
    assert row(content, case)["measured"] > 0
    assert row(content, case)["detail"]["computing ms"] > 0
