"""The example cache of docs/adding_a_cache.md is only written and registered: flags, texts and tests apply to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.matrix import step_cache_table

from tests.diffusion.compute.cache import test_company, test_families, test_layouts
from tests.diffusion.compute.cache.driving import draw
from tests.diffusion.compute.cache.example import example_source, registered
from tests.features import step_caches_feature
from vllm_omni.diffusion.compute.cache.base import Budget
from vllm_omni.diffusion.data import STEP_CACHES, OmniDiffusionConfig
from vllm_omni.entrypoints.cli.args import parse_args
from vllm_omni.errors import ConfigError

GENERAL = {
    "test_company.py": [
        "decisions_and_pictures_are_those_of_the_request_alone",
        "a_request_that_opts_out_is_drawn_as_without_a_cache",
        "results_tell_what_was_cached_and_what_is_kept",
        "what_does_not_fit_is_a_miss",
        "the_budget_bounds_the_memory_that_is_held",
        "a_neighbour_that_fails_in_the_middle_of_a_step_changes_no_decision",
    ],
    "test_families.py": [
        "decisions_and_pictures_are_those_of_the_request_alone",
        "layouts_decide_as_one_process",
    ],
    "test_layouts.py": [
        "a_layout_decides_as_one_process",
        "many_random_batches_end_and_decide_as_one_process",
        "a_sequence_that_moves_between_rank_groups_has_a_miss",
        "what_one_rank_has_no_room_for_is_a_miss_on_all",
        "ranks_decide_alike_where_one_of_them_has_less_room",
    ],
}
"""File -> the tests that each registered cache must pass."""


@pytest.fixture
def interval() -> Iterator[str]:
    with registered() as name:
        yield name


def cases(request: pytest.FixtureRequest, path: Path) -> list[str]:
    """Names of the cases that pytest makes of a test file now."""
    folder = request.node.parent.parent
    module = pytest.Module.from_parent(folder, path=path)
    return [item.name for item in module.collect()]


def test_general_tests_run_every_registered_cache(request: pytest.FixtureRequest, interval: str) -> None:
    for file, tests in GENERAL.items():
        names = cases(request, Path(__file__).with_name(file))
        for test in tests:
            of_test = [name for name in names if name.startswith(f"test_{test}[")]
            for cache in STEP_CACHES:
                assert any(cache in name.partition("[")[2].replace("]", "-").split("-") for name in of_test), (
                    test,
                    cache,
                )


def test_the_feature_table_names_general_tests(interval: str) -> None:
    feature = step_caches_feature()
    assert f"`{interval}`" in feature.name
    for name in (test.partition("::")[2].partition("[")[0] for cell in feature.cells[:3] for test in cell.tests):
        assert name.removeprefix("test_") in {test for tests in GENERAL.values() for test in tests}


def test_flags_and_texts_know_it(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", "demo", "--omni", "--cache-backend", interval, "--cache-config.interval", "3"]
    assert parse_args(words).config.cache_config == {"interval": 3}
    with pytest.raises(SystemExit):
        parse_args(["serve", "--omni", "--help"])
    assert "{none,tea_cache,cache_dit,interval}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="one of none, tea_cache, cache_dit, interval, got 'magic'"):
        OmniDiffusionConfig("demo", cache_backend="magic")
    with pytest.raises(ConfigError, match="needs --cache-backend tea_cache or cache_dit or interval"):
        OmniDiffusionConfig("demo", cache_config={"interval": 2})
    with pytest.raises(ConfigError, match="--cache-config: interval takes an integer of at least 2, got 1"):
        OmniDiffusionConfig("demo", cache_backend=interval, cache_config={"interval": 1})
    description = "Interval cache: compute every n-th step and repeat its change at the steps between."
    assert f"| `interval` | {description} `interval` (2) |" in step_cache_table()


@pytest.mark.thorough
def test_it_passes_the_general_tests(calm_model: Path, interval: str) -> None:
    plain, _ = draw(calm_model, "none", {}, test_company.ARRIVALS)
    test_company.test_decisions_and_pictures_are_those_of_the_request_alone(calm_model, interval)
    test_company.test_what_does_not_fit_is_a_miss(calm_model, plain, interval)
    test_company.test_the_budget_bounds_the_memory_that_is_held(calm_model, interval)
    test_layouts.test_what_one_rank_has_no_room_for_is_a_miss_on_all(calm_model, interval)
    test_layouts.test_ranks_decide_alike_where_one_of_them_has_less_room(calm_model, interval)


@pytest.mark.layouts
@pytest.mark.parametrize("family", [test_families.edits, test_families.z_images])
def test_it_passes_the_general_tests_of_families(tmp_path: Path, interval: str, family: object) -> None:
    test_families.test_decisions_and_pictures_are_those_of_the_request_alone(tmp_path, interval, family)


@pytest.mark.layouts
@pytest.mark.parametrize("layout", test_layouts.LAYOUTS)
def test_it_passes_the_general_tests_of_layouts(calm_model: Path, interval: str, layout: str) -> None:
    wanted = test_layouts.alone(calm_model, interval, range(2))
    assert test_layouts.check(calm_model, interval, layout, range(2), wanted) > 10


def test_the_general_test_of_the_budget_can_fail(
    calm_model: Path, interval: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "enforce", lambda budget, slots: None)
    with pytest.raises(AssertionError):
        test_company.test_the_budget_bounds_the_memory_that_is_held(calm_model, interval)


def test_settings_are_read_without_pytorch(tmp_path: Path) -> None:
    (tmp_path / "interval.py").write_text(example_source())
    code = (
        "import sys; from vllm_omni.diffusion.data import STEP_CACHES, parse_cache_config\n"
        f"sys.path.append({str(tmp_path)!r}); STEP_CACHES['interval'] = 'interval'\n"
        "for name in STEP_CACHES: parse_cache_config(name, {})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
