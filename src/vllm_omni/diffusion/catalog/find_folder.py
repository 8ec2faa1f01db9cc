"""From the name of a model to its folder: an embedded model, a local folder, or a download from the hub."""

from __future__ import annotations

from pathlib import Path

from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX
from vllm_omni.diffusion.catalog.hub import CheckConfigs, HubAccess, ModelFolder, download
from vllm_omni.diffusion.data import LoadFormat
from vllm_omni.errors import ConfigError

_PACKAGE = Path(__file__).parents[2]
DEMO_MODEL_PATH = _PACKAGE / "demo_model"
EMBEDDED_MODELS = {"demo": DEMO_MODEL_PATH, "demo-video": _PACKAGE / "demo_video"}
"""Models that the package carries, by name."""


def local_path(model: str) -> Path:
    """Folder of an embedded model, else `model` as a path, whether it exists or not."""
    return EMBEDDED_MODELS.get(model) or Path(model).expanduser()


def find_folder(model: str, load_format: LoadFormat, access: HubAccess, check: CheckConfigs) -> ModelFolder:
    """Local folder of `model`: an embedded model, a folder, or a `download`. Raises ConfigError if there is none."""
    path = local_path(model)
    if path.is_dir() or model in EMBEDDED_MODELS:
        if access.revision is not None:
            raise ConfigError(f"--revision {access.revision} is for hub models; {model!r} is a folder, which has none")
        folder = ModelFolder(path)
    elif model.startswith((".", "/", "~")) or model.count("/") > 1:  # no name that the hub could have
        raise ConfigError(f"model {model!r}: there is no such folder")
    else:
        folder = download(model, load_format, access, check)
    if not (folder.path / MODEL_INDEX).is_file():
        raise ConfigError(f"model {model!r} is not in the diffusers layout: it has no model_index.json")
    return folder
