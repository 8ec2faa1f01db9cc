"""From the name of a model to its folder: the demo model, a local folder, or a download from the hub."""

from __future__ import annotations

from pathlib import Path

from vllm_omni.diffusion.catalog.folder_files import MODEL_INDEX
from vllm_omni.diffusion.catalog.hub import CheckConfigs, HubAccess, ModelFolder, download
from vllm_omni.diffusion.data import LoadFormat
from vllm_omni.errors import ConfigError

DEMO_MODEL = "demo"
DEMO_MODEL_PATH = Path(__file__).parents[2] / "demo_model"


def find_folder(model: str, load_format: LoadFormat, access: HubAccess, check: CheckConfigs) -> ModelFolder:
    """Local folder of `model`: `demo`, a folder, or else a `download`. Raises ConfigError if there is none."""
    path = DEMO_MODEL_PATH if model == DEMO_MODEL else Path(model).expanduser()
    if path.is_dir():
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
