"""Models of the Hugging Face hub: from a name to a folder on this machine. No torch here."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vllm_omni.diffusion.catalog.folder_files import DEFAULTS_FILE, MODEL_INDEX, names_in, read_object
from vllm_omni.diffusion.catalog.model_index import read_components
from vllm_omni.diffusion.catalog.weight_files import choose_all, has_weights, read_weight_map, safetensors_files
from vllm_omni.diffusion.data import LoadFormat, OmniDiffusionConfig
from vllm_omni.errors import ConfigError
from vllm_omni.logs.bars import HiddenBar

CONFIG_SUFFIXES = (".json", ".txt", ".jinja", ".model")
"""Ends of the names of a component's files that hold no weights."""

ReadObject = Callable[[str], dict[str, Any]]
"""From the name of a file of the repository to the JSON object in it."""


@dataclass(frozen=True)
class HubAccess:
    """Version of a hub model, variant of its weights, folder for the download, token, and whether a bar shows it."""

    revision: str | None = None
    download_dir: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    variant: str | None = None
    progress_bar: bool = True

    @staticmethod
    def of(config: OmniDiffusionConfig) -> HubAccess:
        return HubAccess(config.revision, config.download_dir, config.hf_token, config.variant, config.progress_bar)


DEFAULT_ACCESS = HubAccess()


class ModelFolder(NamedTuple):
    """Folder with the files of a model."""

    path: Path
    hub_failure: str = ""
    """Reason why the folder is an earlier download of a hub model; empty for any other folder."""


CheckConfigs = Callable[[Path], object]
"""Raises ConfigError for a folder, with all configs and perhaps without weights, of a model that is not served."""


def download(model: str, load_format: LoadFormat, access: HubAccess, check: CheckConfigs) -> ModelFolder:
    """Folder of a hub model, with the files that are loaded and no others. With `dummy` without weights.

    The configs come first, and weights only when `check` accepts the configs. Where the hub cannot be asked, an earlier
    download is taken, without `check`. Raises ConfigError when there is none, when the hub refuses, and when the
    repository lacks files that are needed.
    """
    from huggingface_hub import HfApi, constants, errors

    # The base class of failures of the connection depends on the release of the hub's client.
    http_error: Any = errors.HfHubHTTPError.__bases__[0]
    failures = (http_error, errors.HFValidationError, OSError)
    try:
        # Ask for the commit first: that call fails at once without a hub, while the list of files retries for 30 s.
        revision = access.revision or constants.DEFAULT_REVISION
        commit = HfApi().model_info(model, revision=revision, token=access.token).sha
        names = HfApi().list_repo_files(model, revision=commit, token=access.token)
    except (errors.RevisionNotFoundError, errors.HFValidationError, errors.LocalTokenNotFoundError) as error:
        raise ConfigError(_explain(model, access, error)) from error
    except failures as error:
        return _earlier_download(model, load_format, access, error)

    def fetch(part: LoadFormat) -> Path:
        try:
            return _download(model, part, access, names)
        except failures as error:
            raise ConfigError(_explain(model, access, error)) from error

    if load_format != "dummy":
        check(fetch("dummy"))
    return ModelFolder(fetch(load_format))


def _download(model: str, load_format: LoadFormat, access: HubAccess, names: list[str]) -> Path:
    """Fetch what is needed of the repository's files `names`. Raises what the hub's client raises, and ConfigError."""
    from huggingface_hub import hf_hub_download, snapshot_download

    repository: dict[str, Any] = {
        "repo_id": model,
        "revision": access.revision,
        "cache_dir": access.download_dir,
        "token": access.token,
        "tqdm_class": None if access.progress_bar else HiddenBar,
    }
    if MODEL_INDEX not in names:
        raise ConfigError(f"model {model!r} is not in the diffusers layout: it has no {MODEL_INDEX}")

    def read(name: str) -> dict[str, Any]:
        folder = Path(hf_hub_download(filename=name, **repository)).parents[name.count("/")]
        return read_object(folder, name)

    needed = needed_files(names, load_format, access.variant, read)
    return Path(snapshot_download(allow_patterns=[glob.escape(name) for name in needed], **repository))


def needed_files(names: Iterable[str], load_format: LoadFormat, variant: str | None, read: ReadObject) -> list[str]:
    """Choose from the files `names` of a repository what is loaded: configs, and one set of weights a component.

    Raises ConfigError for a component whose weights are not there.
    """
    present = set(names)
    components = read_components(read(MODEL_INDEX))
    needed = {name for name in (MODEL_INDEX, DEFAULTS_FILE) if name in present}
    folders: dict[str, list[str]] = {component: [] for component in components}
    for name in present:
        component, _, file = name.partition("/")
        if component in folders:
            folders[component].append(file)
            # The index of a set of weights is added below, for the chosen set only.
            if file.endswith(CONFIG_SUFFIXES) and ".index" not in file and ("/" not in file or file.endswith(".jinja")):
                needed.add(name)
    if load_format == "auto":
        for component, chosen in choose_all(components, folders, variant).items():
            files = set(chosen.files)
            if chosen.index is not None:
                place = f"{component}/{chosen.index}"
                files = set(read_weight_map(read(place), place).values())
                if missing := sorted(files - set(folders[component])):
                    raise ConfigError(f"{component}/ lacks {', '.join(missing)}, which {chosen.index} names")
                files.add(chosen.index)
            needed |= {f"{component}/{file}" for file in files}
    return sorted(needed)


def _earlier_download(model: str, load_format: LoadFormat, access: HubAccess, error: Exception) -> ModelFolder:
    """Folder of an earlier download, after the hub gave `error`. Raises ConfigError where that is not enough."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(
            snapshot_download(
                model,
                revision=access.revision,
                cache_dir=access.download_dir,
                allow_patterns=[MODEL_INDEX],  # of the other files it is told below which one is missing
                local_files_only=True,
            )
        )
    except (LocalEntryNotFoundError, OSError):
        raise ConfigError(_explain(model, access, error)) from error
    folder = ModelFolder(path, _explain(model, access, error))
    with add_hub_failure(*folder):
        if load_format == "auto":
            for name, component in read_components(read_object(path, MODEL_INDEX)).items():
                # A missing folder is told by `model_check`.
                if (path / name).is_dir() and has_weights(component, names_in(path, name)):
                    safetensors_files(path / name, access.variant, component.stems)
    return folder


@contextmanager
def add_hub_failure(path: Path, hub_failure: str) -> Iterator[None]:
    """Add the reason why there is no fresh download to a ConfigError about the files in `path`. See `ModelFolder`."""
    try:
        yield
    except ConfigError as error:
        if not hub_failure:
            raise
        raise ConfigError(f"{hub_failure}; the earlier download in {path} cannot take its place: {error}") from error


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
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    is_local = isinstance(error, OSError) and error.filename is not None
    if is_local and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"--download-dir takes a folder that can be written, got {access.download_dir!r}: {reason}"
    return f"model {model!r} is neither a folder, 'demo', nor a hub model: {reason}"
