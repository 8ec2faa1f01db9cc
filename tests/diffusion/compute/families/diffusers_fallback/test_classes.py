"""Each pipeline class of the installed diffusers against a list: served as what, or refused with which words.

After an upgrade of diffusers, write the list anew and judge each changed line:
`python -m tests.diffusion.compute.families.diffusers_fallback.test_classes`
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import diffusers

from vllm_omni.diffusion.compute.families.diffusers_fallback.config_sizes import size_bins
from vllm_omni.diffusion.compute.families.diffusers_fallback.info import NUM_REFERENCES
from vllm_omni.diffusion.compute.families.diffusers_fallback.signature import CallSignature
from vllm_omni.errors import ConfigError

LIST = Path(__file__).parent / "pipeline_classes.txt"


def outcome(pipeline: type) -> str:
    try:
        signature = CallSignature.of(pipeline)
    except ConfigError as error:
        return str(error).removeprefix(pipeline.__name__).strip()
    kind = "video" if "num_frames" in signature.defaults else "picture"
    notes = [] if signature.whole.step_callback else ["without step callback"]
    if signature.takes_image:
        least, most = NUM_REFERENCES.get(pipeline.__name__, (1, 1))
        notes.append(f"input pictures: {least} to {most}" if least < most else f"input pictures: {least}")
    return ", ".join([kind, *notes])


def outcomes() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # modules of old classes warn as they are imported
        members = [getattr(diffusers, name) for name in dir(diffusers) if "ModularPipeline" not in name]
        classes = [cls for cls in members if inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)]
        return sorted(f"{cls.__name__}: {outcome(cls)}" for cls in set(classes))


def test_every_class_gives_what_the_list_says() -> None:
    made, listed = outcomes(), LIST.read_text().splitlines()
    assert sorted(set(made) - set(listed)) == []
    assert sorted(set(listed) - set(made)) == []


def test_pipelines_that_round_sizes_and_resize_have_a_table() -> None:
    """HunyuanDiT's alone do not resize what they make: they have none, and are told not to round."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        served = {line.partition(":")[0] for line in LIST.read_text().splitlines() if "not available" not in line}
        classes = [getattr(diffusers, name) for name in served]
        binned = {cls.__name__: cls for cls in classes if CallSignature.of(cls).has_binning}
    sides = {"PixArtSigmaPAGPipeline": 2048, "PixArtSigmaPipeline": 2048, "SanaPAGPipeline": 4096, "SanaPipeline": 4096}
    tables = {name: len(size_bins(cls, sides.get(name, 1024))) for name, cls in binned.items()}
    assert {name for name, num_sizes in tables.items() if num_sizes == 0} == {
        "HunyuanDiTPAGPipeline",
        "HunyuanDiTPipeline",
    }
    assert len(tables) == 11


def test_the_field_of_the_output_is_read_off_its_class() -> None:
    for name, field in (("Kandinsky5T2IPipeline", "image"), ("FluxPipeline", "images"), ("WanPipeline", "frames")):
        assert CallSignature.of(getattr(diffusers, name)).whole.output_name == field


if __name__ == "__main__":
    LIST.write_text("\n".join(outcomes()) + "\n")
