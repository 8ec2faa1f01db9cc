"""Download of models from the Hugging Face hub. No torch here."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vllm_omni.diffusion.catalog.folder_files import DEFAULTS_FILE, MODEL_INDEX, TEA_CACHE_FILE, names_in, read_object
from vllm_omni.diffusion.catalog.model_index import read_components
from vllm_omni.diffusion.catalog.weight_files import choose_all, has_weights, read_shards, safetensors_files
from vllm_omni.diffusion.data import LoadFormat, OmniDiffusionConfig
from vllm_omni.errors import ConfigError
from vllm_omni.logs.bars import HiddenBar

CONFIG_SUFFIXES = (".json", ".txt", ".jinja", ".model")
"""Suffixes of a component's files that hold no weights."""


@dataclass(frozen=True)
class HubAccess:
    """Settings of a download: revision and variant of the model, folder, token, and whether to show a bar."""

    revision: str | None = None
    download_dir: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    variant: str | None = None
    progress_bar: bool = True
    unread: frozenset[str] = frozenset()
    """Components whose weights are not read from the model: their weight files are not needed."""

    @staticmethod
    def of(config: OmniDiffusionConfig) -> HubAccess:
        return HubAccess(
            config.revision,
            config.download_dir,
            config.hf_token,
            config.variant,
            config.progress_bar,
            frozenset(config.transformer_files),
        )


DEFAULT_ACCESS = HubAccess()


class ModelFolder(NamedTuple):
    """A folder with a model, and why it is not up to date."""

    path: Path
    hub_failure: str = ""
    """Reason for using an earlier download of a hub model; empty for any other folder."""


CheckConfigs = Callable[[Path], object]
"""Function that raises ConfigError if the model, a folder with all configs but maybe no weights, is not supported."""


def download(model: str, load_format: LoadFormat, access: HubAccess, check: CheckConfigs) -> ModelFolder:
    """Download the files of a hub model that are loaded, and no others; without weights for `dummy`.

    Fetches the configs first, and weights only if `check` accepts the configs. If the hub cannot be reached, returns an
    earlier download, without `check`. Raises ConfigError if there is none, if the hub refuses, and if the repository
    lacks files that are needed.
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
    """Fetch the needed ones of the repository's files `names`. Raises ConfigError, and errors of the hub's client."""
    from huggingface_hub import hf_hub_download, snapshot_download

    repository: dict[str, Any] = {"repo_id": model, "revision": access.revision, "cache_dir": access.download_dir}
    repository |= {"token": access.token, "tqdm_class": None if access.progress_bar else HiddenBar}
    if MODEL_INDEX not in names:
        raise ConfigError(f"model {model!r} is not in the diffusers layout: it has no {MODEL_INDEX}")

    def read(name: str) -> dict[str, Any]:
        folder = Path(hf_hub_download(filename=name, **repository)).parents[name.count("/")]
        return read_object(folder, name)

    needed = needed_files(names, load_format, access, read)
    return Path(snapshot_download(allow_patterns=[glob.escape(name) for name in needed], **repository))


def needed_files(
    names: Iterable[str], load_format: LoadFormat, access: HubAccess, read: Callable[[str], dict[str, Any]]
) -> list[str]:
    """Configs among `names`, and a set of weights for each component that is read. Raises ConfigError for missing
    weights."""
    present = set(names)
    components = read_components(read(MODEL_INDEX))
    needed = {name for name in (MODEL_INDEX, DEFAULTS_FILE, TEA_CACHE_FILE) if name in present}
    folders: dict[str, list[str]] = {component: [] for component in components}
    for name in present:
        component, _, file = name.partition("/")
        if component in folders:
            folders[component].append(file)
            # The index of a set of weights is added below, for the chosen set only.
            if file.endswith(CONFIG_SUFFIXES) and ".index" not in file and ("/" not in file or file.endswith(".jinja")):
                needed.add(name)
    if load_format == "auto":
        for component, chosen in choose_all(components, folders, access.variant, access.unread).items():
            files = set(chosen.files)
            if chosen.index is not None:
                place = f"{component}/{chosen.index}"
                files = {chosen.index, *read_shards(read(place), place, folders[component])}
            needed |= {f"{component}/{file}" for file in files}
    return sorted(needed)


def _earlier_download(model: str, load_format: LoadFormat, access: HubAccess, error: Exception) -> ModelFolder:
    """Folder of an earlier download, used after the hub's `error`. Raises ConfigError if it lacks files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository: dict[str, Any] = {"repo_id": model, "revision": access.revision, "cache_dir": access.download_dir}
    try:
        # No other files: the checks below name those that are missing.
        path = Path(snapshot_download(allow_patterns=[MODEL_INDEX], local_files_only=True, **repository))
    except (LocalEntryNotFoundError, OSError):
        raise ConfigError(_explain(model, access, error)) from error
    folder = ModelFolder(path, _explain(model, access, error))
    with hub_reason(*folder):
        if load_format == "auto":
            for name, component in read_components(read_object(path, MODEL_INDEX)).items():
                # `model_check` reports a missing folder.
                if name in access.unread or not (path / name).is_dir():
                    continue
                if has_weights(component, names_in(path, name)):
                    safetensors_files(path / name, access.variant, component.stems)
    return folder


@contextmanager
def hub_reason(path: Path, hub_failure: str) -> Iterator[None]:
    """Add `hub_failure` (see `ModelFolder`) to a ConfigError about the files in `path`."""
    try:
        yield
    except ConfigError as error:
        if not hub_failure:
            raise
        raise ConfigError(f"{hub_failure}; the earlier download in {path} cannot take its place: {error}") from error


def _explain(model: str, access: HubAccess, error: Exception) -> str:
    """Error line for the user, with our flags, which the hub's own messages do not know."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"model {model!r} is gated: accept its terms at the hub, then give a token by --hf-token or HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"model {model!r} is neither a folder, 'demo', 'demo-video', nor a model that the hub shows; a private one "
            "needs a token by --hf-token or HF_TOKEN that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"--revision takes a branch, tag or commit of {model!r}, got {access.revision!r}"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "--hf-token without a value takes the token of `hf auth login`, and there is none"
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    is_local = isinstance(error, OSError) and error.filename is not None
    if is_local and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"--download-dir takes a folder that can be written, got {access.download_dir!r}: {reason}"
    return f"model {model!r} is neither a folder, 'demo', 'demo-video', nor a hub model: {reason}"
