"""Each pipeline class of the installed diffusers against a list: served as what, or refused with which words.

After an upgrade of diffusers: `python -m tests.diffusion.models.diffusers_fallback.test_classes` writes the list anew;
what changes is to be judged line by line.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import diffusers

from vllm_omni.diffusion.models.diffusers_fallback.signature import CallSignature
from vllm_omni.errors import ConfigError

LIST = Path(__file__).parent / "pipeline_classes.txt"


def outcome(pipeline: type) -> str:
    try:
        signature = CallSignature.of(pipeline)
    except ConfigError as error:
        return str(error).removeprefix(pipeline.__name__).strip()
    kind = "video" if "num_frames" in signature.defaults else "picture"
    notes = ["from a picture"] * signature.takes_image + ["without step callback"] * (not signature.step_callback)
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


if __name__ == "__main__":
    LIST.write_text("\n".join(outcomes()) + "\n")
