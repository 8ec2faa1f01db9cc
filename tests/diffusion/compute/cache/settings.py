"""Settings with which each step cache skips some steps of the small random models of these tests."""

from __future__ import annotations

from typing import Any

# Thresholds are near the changes of the models, so that a rank that decided by its own tokens alone, or a sequence that
# saw another one's, would now and then decide otherwise.
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("cache_dit", "calm"): {
        "residual_diff_threshold": 0.2,
        "max_warmup_steps": 2,
        "Bn_compute_blocks": 1,
        "enable_taylorseer": True,
    },
    ("cache_dit", "edits"): {
        "residual_diff_threshold": 0.2,
        "max_warmup_steps": 1,
        "max_continuous_cached_steps": 2,
    },
    ("cache_dit", "z_images"): {
        "residual_diff_threshold": 0.6,
        "max_warmup_steps": 1,
        "max_continuous_cached_steps": 2,
    },
    ("cache_dit", "videos"): {
        "residual_diff_threshold": 0.2,
        "max_warmup_steps": 1,
        "max_continuous_cached_steps": 2,
    },
    ("tea_cache", "calm"): {"rel_l1_thresh": 0.25, "coefficients": [1.0, 0.0]},
    ("tea_cache", "edits"): {"rel_l1_thresh": 0.1, "coefficients": [1.0, 0.0]},
    ("tea_cache", "z_images"): {"rel_l1_thresh": 0.3, "coefficients": [1.0, 0.0]},
    ("tea_cache", "videos"): {"rel_l1_thresh": 0.2, "coefficients": [1.0, 0.0]},
}
"""(step cache, model) -> settings; a cache without an entry is tested with its defaults."""


def settings_of(backend: str, model: str = "calm") -> dict[str, Any]:
    """Settings for a test of a step cache on `calm_model`, or on a family of test_families.py."""
    return SETTINGS.get((backend, model), {})
