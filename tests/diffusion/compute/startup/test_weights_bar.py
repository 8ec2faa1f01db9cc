"""The bar of loading: its end is the size of the files that are read."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from vllm_omni.diffusion.compute.startup import model_start


def test_a_file_takes_the_place_of_a_components_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for component, size in (("vae", 10), ("transformer", 200), ("transformer_2", 3000)):
        (tmp_path / "model" / component).mkdir(parents=True)
        (tmp_path / "model" / component / "diffusion_pytorch_model.safetensors").write_bytes(bytes(size))
    (tmp_path / "x.safetensors").write_bytes(bytes(40_000))
    bar = Mock()
    monkeypatch.setattr(model_start, "progress_bar", bar)
    for files in ({}, {"transformer": str(tmp_path / "x.safetensors")}):
        model_start.WeightsBar(tmp_path / "model", files, shown=False)
    assert [call.args[0] for call in bar.call_args_list] == [3210, 43_010]
