"""`vllm-omni plan`: what it prints, its exit codes, and sizes of memory that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_omni.entrypoints.cli import plan
from vllm_omni.entrypoints.cli.flag_types import memory_size
from vllm_omni.entrypoints.cli.main import main
from vllm_omni.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("8192MiB", 2**33), ("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29)],
)
def test_sizes_have_units(text: str, num_bytes: int) -> None:
    assert memory_size(text) == num_bytes


@pytest.mark.parametrize("text", ["24", "", "GiB", "-1GiB", "0GiB", "24gib", "24GiBs", "nanGiB", "1e3GiB", "24 TB"])
def test_a_wrong_size_is_refused_with_those_that_are_right(text: str) -> None:
    message = f"--device-memory takes a size above 0 with its unit, GiB, GB, MiB or MB, such as 24GiB, got {text!r}"
    for words in (["demo", f"--device-memory={text}"], ["demo", "--device-memory", text]):
        with pytest.raises(ConfigError) as caught:
            plan.parse_args(words)
        assert str(caught.value) == message
    with pytest.raises(ConfigError, match=r"^--device-memory takes a size above 0 .* got ''$"):
        plan.parse_args(["demo", "--device-memory"])


def test_the_other_words_are_flags_of_serve() -> None:
    args = plan.parse_args(["demo", "--device_memory", "24GiB", "--quantization", "fp8", "--max-pixels=65536"])
    assert args.device_bytes == 24 * 2**30
    assert (args.config.model, args.config.quantization, args.config.max_pixels) == ("demo", "fp8", 65536)
    assert plan.parse_args(["demo"]).device_bytes is None
    with pytest.raises(ConfigError, match="unrecognized --device-memories"):
        plan.parse_args(["demo", "--device-memories", "24GiB"])
    with pytest.raises(ConfigError, match="MODEL is missing"):
        plan.parse_args(["--device-memory", "24GiB"])


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_a_model_that_fits_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["demo", "--device-memory", "24GiB"], capsys)
    assert code == 0
    assert "bfloat16:\n  weights: text encoder" in out
    assert "the device has 24.00 GiB, of which --gpu-memory-utilization gives 22.08 GiB\nit fits\n" in out


def test_a_model_that_does_not_fit_ends_with_1_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["demo", "--device-memory", "1GiB"], capsys)
    assert code == 1
    assert "\nit does not fit\n" in out


def test_without_a_size_the_plan_is_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["demo", "--device", "cpu"], capsys)
    assert code == 0
    assert "float32:" in out
    assert "the host has " in out


def test_a_wrong_setting_ends_with_2(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    code, _, err = run([str(tiny_model), "--tensor-parallel-size", "2", "--device-memory", "24GiB"], capsys)
    assert code == 2
    assert err.startswith("vllm-omni: error: --tensor-parallel-size takes 1, 3 with this model's transformer")
    assert run(["no/such/model"], capsys)[0] == 2


def test_weights_are_not_needed(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in tiny_model.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            copy = tmp_path / file.relative_to(tiny_model)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    printed = [run([str(path), "--device-memory", "8GiB"], capsys) for path in (tiny_model, tmp_path)]
    assert printed[0] == printed[1]
    assert printed[0][0] == 0


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["--help"], capsys)
    assert code == 0
    assert "--device-memory SIZE" in out
    assert "0 the model fits, 1 it does not, 2 a setting is wrong" in out
