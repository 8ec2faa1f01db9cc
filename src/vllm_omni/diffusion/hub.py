"""Models of the Hugging Face hub: from a name to a folder on this machine. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.data import LoadFormat, OmniDiffusionConfig
from vllm_omni.errors import ConfigError
from vllm_omni.logs.bars import HiddenBar

FILES = ("*.json", "*.txt", "*.jinja", "*.model")
WEIGHTS = ("*.safetensors",)
"""Safetensors only: a pickled checkpoint could run code while it loads."""


@dataclass(frozen=True)
class HubAccess:
    """Version of a hub model, folder for the download, token, and whether a bar shows the download."""

    revision: str | None = None
    download_dir: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    progress_bar: bool = True

    @staticmethod
    def of(config: OmniDiffusionConfig) -> HubAccess:
        return HubAccess(config.revision, config.download_dir, config.hf_token, config.progress_bar)


DEFAULT_ACCESS = HubAccess()


def download(model: str, load_format: LoadFormat, access: HubAccess) -> Path:
    """The folder of a hub model, downloaded if it is not there. With `dummy` without weights.

    Raises ConfigError when the hub does not give it and no earlier download holds it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The base class of failures of the connection depends on the release of the hub's client.
    http_error: Any = HfHubHTTPError.__bases__[0]
    patterns = [*FILES, *(WEIGHTS if load_format == "auto" else ())]
    try:
        return Path(
            snapshot_download(
                model,
                revision=access.revision,
                cache_dir=access.download_dir,
                token=access.token,
                allow_patterns=patterns,
                tqdm_class=None if access.progress_bar else HiddenBar,
            )
        )
    except (http_error, HFValidationError, OSError) as error:
        raise ConfigError(_explain(model, access, error)) from error


def _explain(model: str, access: HubAccess, error: Exception) -> str:
    """One line for the user; the hub's own messages name no flag of ours."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"model {model!r} is gated: accept its terms at the hub, then give a token by --hf-token or HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"model {model!r} is neither a folder, 'demo', nor a model that the hub shows; a private one needs a token "
            "by --hf-token or HF_TOKEN that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"--revision takes a branch, tag or commit of {model!r}, got {access.revision!r}"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "--hf-token without a value takes the token of `hf auth login`, and there is none"
    reason = (str(error) or type(error).__name__).splitlines()[0]
    is_local = isinstance(error, OSError) and error.filename is not None
    if is_local and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"--download-dir takes a folder that can be written, got {access.download_dir!r}: {reason}"
    return f"model {model!r} is neither a folder, 'demo', nor a hub model: {reason}"
