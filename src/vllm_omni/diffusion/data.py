"""Configuration: frozen dataclasses that check their values when they are made. No torch here.

A wrong value raises ConfigError with the flag or field, the value that it got and the values that it takes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from vllm_omni.errors import ConfigError, InvalidRequestError, NotAvailableError
from vllm_omni.foreign.class_decorators import convert_keywords
from vllm_omni.foreign.keywords import convert_degrees, convert_settings
from vllm_omni.foreign.keywords import logger as logger  # scripts of the public vllm-omni package import it from here
from vllm_omni.inputs.adapter_files import served_files
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams, own_adapter
from vllm_omni.inputs.field_values import WrongValueError, coerce, field_types, shown
from vllm_omni.inputs.foreign_params import without_aliases

if TYPE_CHECKING:
    from vllm_omni.diffusion.compute.cache.config import StepCacheConfig

CacheBackend = Literal["none", "tea_cache", "cache_dit"]
"""Names of step caches. To register one, add its name here and its module `compute/cache/NAME.py`."""
SchedulingPolicy = Literal["fair", "fcfs"]
ExecutorBackend = Literal["mp", "ray", "uni"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
Quantization = Literal["fp8"]
TextEncoderQuantization = Literal["int8", "fp8"]
AttentionBackendName = Literal["sdpa", "torch_varlen", "cudnn", "vllm_flash"]
LoadFormat = Literal["auto", "dummy"]
KernelsName = Literal["auto", "torch", "triton"]
ALIASES: Mapping[str, Mapping[str, str]] = {
    "dtype": {"half": "float16", "float": "float32"},
    "load_format": {"safetensors": "auto"},
}
"""Field -> vLLM's other names of its values -> our names."""

TRANSFORMER_FILES = {"transformer": "transformer_file", "transformer_2": "transformer_file_2"}
"""Component of a model folder -> field with a file that has its weights in place of the folder's files."""
MAX_LORAS = 8
"""Adapters for which the device has slots unless `max_loras` says otherwise; also the most of one request."""
MAX_CPU_LORAS = 32
"""Adapters that host memory keeps unless `max_cpu_loras` says otherwise."""


@convert_keywords(convert_degrees, ConfigError)
@dataclass(frozen=True)
class DiffusionParallelConfig:
    """Number of devices that share the work, by axis; from the outermost: data, cfg, ring, ulysses, tensor."""

    ulysses_degree: int = 1
    ring_degree: int = 1
    cfg_parallel_size: int = 1
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    vae_patch_parallel_size: int = 1
    """Ranks of a replica that share one VAE decode; adds no devices."""
    text_encoder_tp_size: int = 1
    """Ranks of a replica that share the text encoder; adds no devices."""

    def __post_init__(self) -> None:
        fit_fields(self, str)
        for f in fields(self):
            require_at_least(1, getattr(self, f.name), f.name)
        for name in ("vae_patch_parallel_size", "text_encoder_tp_size"):
            value = getattr(self, name)
            if self.replica_size % value:
                raise ConfigError(
                    f"{flag_of(name)} must divide the ranks of a replica, {self._replica_written_out()} = "
                    f"{self.replica_size}, got {value}"
                )

    @property
    def replica_size(self) -> int:
        """Number of ranks that hold one copy of the model together."""
        return self.cfg_parallel_size * self.ring_degree * self.ulysses_degree * self.tensor_parallel_size

    @property
    def world_size(self) -> int:
        return self.data_parallel_size * self.replica_size

    def written_out(self) -> str:
        """Product of the degrees that gives the world size, as text."""
        return f"data {self.data_parallel_size} x {self._replica_written_out()} = {self.world_size}"

    def _replica_written_out(self) -> str:
        return (
            f"cfg {self.cfg_parallel_size} x ring {self.ring_degree} x ulysses {self.ulysses_degree} "
            f"x tensor {self.tensor_parallel_size}"
        )


STEP_CACHES = {name: f"vllm_omni.diffusion.compute.cache.{name}" for name in get_args(CacheBackend) if name != "none"}
"""Step cache -> its module, whose `CONFIG_CLASS` is a StepCacheConfig."""


def step_cache_config_class(backend: str) -> type[StepCacheConfig]:
    """Settings of a step cache, imported when first asked for; `backend` is a key of STEP_CACHES."""
    config_class: type[StepCacheConfig] = import_module(STEP_CACHES[backend]).CONFIG_CLASS
    return config_class


def parse_cache_config(backend: str, values: Mapping[str, Any]) -> StepCacheConfig | None:
    """Checked settings of a step cache, from the keys of `--cache-config`; None for `none`. Raises ConfigError."""
    if backend == "none":
        if values:
            raise ConfigError(f"--cache-config {dict(values)!r} needs --cache-backend {' or '.join(STEP_CACHES)}")
        return None
    require(backend in STEP_CACHES, "--cache-backend", backend, f"one of {', '.join(('none', *STEP_CACHES))}")
    cls = step_cache_config_class(backend)
    aliases = cls.key_aliases()
    for name, ours in aliases.items():
        if name in values and ours in values:
            raise ConfigError(f"--cache-config: give {name} or {ours}, which mean the same: got both")
    values = {aliases.get(name, name): value for name, value in values.items()}
    accepted = [f.name for f in fields(cls)]
    if unknown := set(values) - set(accepted):
        raise ConfigError(
            f"--cache-config: unknown keys {sorted(map(str, unknown))} for {backend}, "
            f"accepted are {', '.join(accepted)}"
        )
    return cls(**values)


def fit_fields(config: Any, name_of: Callable[[str], str]) -> None:
    """Convert the fields of a new frozen dataclass to plain values of their annotated types. Raises ConfigError."""
    cls: Any = type(config)
    for name, kind in field_types(cls).items():
        value = getattr(config, name)
        try:
            plain = coerce(value, kind)
        except WrongValueError as error:
            got = shown(value) if name not in _SECRETS else type(value).__name__
            raise ConfigError(f"{name_of(name)} takes {error}, got {got}") from error
        object.__setattr__(config, name, plain)


_SECRETS = ("hf_token",)
"""Fields whose values error messages do not repeat."""


def require(condition: bool, name: str, got: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} takes {expected}, got {shown(got)}")


def require_at_least(least: int, value: float, name: str) -> None:
    """Raise ConfigError for a number below `least`, and for an infinite one."""
    kind = "an integer" if isinstance(value, int) else "a finite number"
    require(least <= value < math.inf, name, value, f"{kind} of at least {least}")


@convert_keywords(convert_settings, ConfigError)
@dataclass(frozen=True)
class OmniDiffusionConfig:
    """Settings of the engine; those of the HTTP server are `ServerSettings` and `HttpOptions`."""

    model: str
    """A folder in the diffusers layout, a hub name, `demo` or `demo-video`."""
    parallel: DiffusionParallelConfig = DiffusionParallelConfig()
    cache_backend: str = "none"
    """A step cache of `CacheBackend`, or `none`."""
    cache_config: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the step cache by key; `cache` is their checked form."""
    enable_cpu_offload: bool = False
    """Keep the text encoder, the transformer and the VAE in host memory; each comes to the device in its turn."""
    enable_layerwise_offload: bool = False
    """Keep blocks in host memory, and copy each to the device while the one before it computes."""
    weight_sharding: bool = False
    """Whether the ranks that share a sequence keep a part of each block each, and gather the blocks as they run."""
    resident_layers: int | None = None
    """With layerwise offload: blocks of the transformer that stay on the device; None: as many as its memory has room
    for."""
    gpu_memory_utilization: float = 0.92
    """Share of a GPU's memory that the server may take, above 0 and at most 1."""
    transformer_file: str | None = None
    """A safetensors or GGUF file with the transformer's weights, in place of those in the model folder."""
    transformer_file_2: str | None = None
    """The same for the second transformer of a model that has two."""
    text_encoder_quantization: TextEncoderQuantization | None = None
    """Type in which the text encoder's weights are kept; products are computed in `dtype`. None: `dtype`."""
    enable_sleep_mode: bool = False
    """Whether clients may put the server to sleep over HTTP."""
    lora_modules: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters that requests may name: name -> path of a safetensors file, or of a folder with one."""
    lora_defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Adapter -> sampling parameters for requests that name it and do not give them."""
    lora_dirs: tuple[str, ...] = ()
    """Folders whose adapters requests may name: each is loaded when it is first named."""
    max_loras: int | None = None
    """Most adapters on the device; None: 8, and more while they take little of the memory that was free at start."""
    max_cpu_loras: int | None = None
    """Most adapters in host memory, those on the device included; None: 32, or twice `max_loras` if that is more."""
    enable_lora_loading: bool = False
    """Whether clients may load and unload adapters over HTTP."""
    vae_use_slicing: bool = False
    """Decode pictures one at a time, not as a batch (less memory)."""
    vae_use_tiling: bool = False
    """Decode a picture in overlapping tiles (less memory for large pictures)."""
    overlap_decode: bool = False
    """On a GPU: run a decode in parallel with the next step of other requests instead of before it."""
    device: DeviceChoice = "auto"
    """`auto`: CUDA if this machine has it, else the CPU."""
    dtype: DType = "auto"
    """`auto`: bfloat16 on CUDA, float32 on CPU."""
    load_format: LoadFormat = "auto"
    """`auto`: safetensors files; `dummy`: random weights, made on the device, for a folder without weight files."""
    quantization: Quantization | None = None
    """Type of the matrix products in the transformer's blocks, weights and activations; None: `dtype`."""
    attention_backend: AttentionBackendName | None = None
    """Attention kernel; None: the fastest one that runs on this device, measured at start."""
    enforce_eager: bool = False
    """On a GPU: neither compile the transformer's blocks nor capture small steps as CUDA graphs."""
    kernels: KernelsName = "auto"
    """Implementation of the transformer's fused elementwise operations and norms, and of the norms in Z-Image's VAE.
    `auto`: Triton on CUDA, PyTorch on a CPU."""
    distributed_executor_backend: ExecutorBackend = "mp"
    scheduling_policy: SchedulingPolicy = "fair"
    max_num_seqs: int = 16
    """Most requests that advance in one step."""
    max_batch_tokens: int | None = None
    """Most tokens (all branches) of one step; None: measured at start. A larger request runs alone."""
    max_num_queued_reqs: int = 256
    """Most requests (pictures) queued or running; further ones get status 429."""
    max_queue_seconds: float = 3600.0
    """Most work queued or running, in seconds at the measured speed; more gets status 429. Infinite: no limit."""
    max_pixels: int | None = None
    """Most pixels of a picture; None: four times the model's default size, at least 1024 x 1024. A step is never
    interrupted, so the largest picture determines how long other requests may wait for a step."""
    max_inference_steps: int = 200
    max_num_frames: int | None = None
    """Most frames of a video; None: the model's default."""
    default_sampling_params: Mapping[str, Any] = field(default_factory=dict)
    max_worker_restarts: int = 3
    """Restarts allowed within ten minutes before the engine gives up."""
    variant: str | None = None
    """Variant of the weight files to read, such as `fp16`; None: the files without variant."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; None: main."""
    download_dir: str | None = None
    """Folder for downloads; None: the hub's cache."""
    hf_token: str | bool | None = field(default=None, repr=False)
    """Token for private and gated hub models. True: the token of `hf auth login`, which must exist; False: none; None:
    the variable HF_TOKEN or else the token of `hf auth login`, if any."""
    progress_bar: bool = True
    """Show bars on standard error while a hub model is downloaded and while weights are loaded."""

    def __post_init__(self) -> None:
        self._write_as_text()
        for name, aliases in ALIASES.items():
            value = getattr(self, name)
            if isinstance(value, str) and value in aliases:
                object.__setattr__(self, name, aliases[value])
        fit_fields(self, flag_of)
        for name, path in self.lora_modules.items():
            good = isinstance(name, str) and isinstance(path, str) and bool(name and path)
            require(good, "--lora-modules", {name: path}, "names and paths of adapters")
        self._check_adapters()
        if not self.model:
            raise ConfigError("model must be a folder, a hub name, 'demo' or 'demo-video', got an empty string")
        for name in ("revision", "download_dir"):
            require(getattr(self, name) != "", flag_of(name), "", "a string that is not empty")
        if self.variant is not None and self.load_format == "dummy":
            raise ConfigError(
                f"--variant {self.variant} has no effect with --load-format dummy, which reads no weight file"
            )
        good = self.variant is None or re.fullmatch(r"[A-Za-z0-9_-]+", self.variant) is not None
        require(good, "--variant", self.variant, "a name of letters, digits, - and _, such as fp16")
        if isinstance(self.hf_token, str) and not re.fullmatch(r"[!-~]+", self.hf_token):
            raise ConfigError("--hf-token takes a token of ASCII characters without spaces, got something else")
        for name in ("max_num_seqs", "max_num_queued_reqs", "max_inference_steps"):
            require_at_least(1, getattr(self, name), flag_of(name))
        require_at_least(0, self.max_worker_restarts, "--max-worker-restarts")
        share = self.gpu_memory_utilization
        require(0 < share <= 1, "--gpu-memory-utilization", share, "a number above 0 and at most 1")
        self._check_transformer_files()
        self._check_offload()
        for name in ("max_batch_tokens", "max_pixels", "max_num_frames"):
            value = getattr(self, name)
            require(value is None or value >= 1, flag_of(name), value, "an integer of at least 1")
        require(self.max_queue_seconds > 0, "--max-queue-seconds", self.max_queue_seconds, "a number above 0")
        object.__setattr__(self, "default_sampling_params", _fit_sampling_params(self.default_sampling_params))
        cache = parse_cache_config(self.cache_backend, self.cache_config)
        if cache is not None:
            names = [cache.key_aliases().get(name, name) for name in self.cache_config]
            object.__setattr__(self, "cache_config", {name: getattr(cache, name) for name in names})
        if self.distributed_executor_backend == "uni" and self.parallel.world_size > 1:
            raise ConfigError(
                "--distributed-executor-backend uni runs the model in this process, on one device; "
                f"{self.parallel.written_out()} devices take mp"
            )
        if self.overlap_decode and (ranks := self.parallel.vae_patch_parallel_size) > 1:
            raise ConfigError(
                f"--overlap-decode decodes on one device; --vae-patch-parallel-size {ranks} has ranks exchange tiles "
                "while others exchange a step's tokens"
            )
        if self.distributed_executor_backend == "ray":
            raise NotAvailableError("--distributed-executor-backend ray: not available yet, mp and uni are")

    def _check_transformer_files(self) -> None:
        for name in TRANSFORMER_FILES.values():
            value = getattr(self, name)
            require(value != "", flag_of(name), "", "a path")
            if value is not None and self.load_format == "dummy":
                raise ConfigError(
                    f"{flag_of(name)} {value} has no effect with --load-format dummy, which reads no weight file"
                )
        if self.quantization is not None and self.has_gguf:
            raise ConfigError(
                f"--quantization {self.quantization} or a GGUF file, whose weights stay as they are stored, got both"
            )

    def _check_offload(self) -> None:
        if self.enable_cpu_offload and self.enable_layerwise_offload:
            raise ConfigError("--enable-cpu-offload or --enable-layerwise-offload, got both")
        for name in ("enable_cpu_offload", "enable_layerwise_offload"):
            if getattr(self, name) and self.weight_sharding:
                raise ConfigError(f"{flag_of(name)} or --weight-sharding, got both")
        if self.weight_sharding and self.parallel.ring_degree * self.parallel.ulysses_degree == 1:
            raise ConfigError(
                "--weight-sharding divides blocks among the ranks of --usp and --ring, one of which must be more than "
                f"1, got {self.parallel.written_out()}"
            )
        if self.resident_layers is None:
            return
        require_at_least(0, self.resident_layers, "--resident-layers")
        if not self.enable_layerwise_offload:
            raise ConfigError(f"--resident-layers {self.resident_layers} needs --enable-layerwise-offload")

    def _check_adapters(self) -> None:
        defaults = {}
        for adapter, values in self.lora_defaults.items():
            good = isinstance(adapter, str) and isinstance(values, Mapping)
            require(good, "--lora-modules", {adapter: values}, "defaults as names and values of sampling parameters")
            defaults[adapter] = fit_adapter_defaults(adapter, values, "--lora-modules")
            known = adapter in self.lora_modules or bool(self.lora_dirs)
            require(known, "--lora-modules", adapter, f"defaults of served adapters ({', '.join(self.lora_modules)})")
        object.__setattr__(self, "lora_defaults", defaults)
        for name in ("max_loras", "max_cpu_loras"):
            value = getattr(self, name)
            require(value is None or value >= 1, flag_of(name), value, "an integer of at least 1")
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.num_device_loras:
            raise ConfigError(
                f"--max-cpu-loras takes at least --max-loras ({self.num_device_loras}), got {self.max_cpu_loras}"
            )

    @property
    def num_device_loras(self) -> int:
        """Adapters for which the device always has a slot."""
        return MAX_LORAS if self.max_loras is None else self.max_loras

    @property
    def num_host_loras(self) -> int:
        """Adapters for which host memory has a place, those on the device included."""
        return max(MAX_CPU_LORAS, 2 * self.num_device_loras) if self.max_cpu_loras is None else self.max_cpu_loras

    def _write_as_text(self) -> None:
        """Replace values of scripts by strings: PyTorch's dtypes, and `Path` objects."""
        cls = type(self.dtype)
        if (cls.__module__, cls.__name__) == ("torch", "dtype"):  # not compared with the class: no PyTorch here
            object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        for name in ("model", "download_dir", *TRANSFORMER_FILES.values()):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        if isinstance(self.lora_modules, Mapping):
            paths = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in self.lora_modules.items()}
            object.__setattr__(self, "lora_modules", paths)
        if isinstance(self.lora_dirs, list | tuple):
            folders = [os.fspath(each) if isinstance(each, os.PathLike) else each for each in self.lora_dirs]
            object.__setattr__(self, "lora_dirs", tuple(folders))

    @property
    def cache(self) -> StepCacheConfig | None:
        """Checked settings of the step cache; None without one."""
        return parse_cache_config(self.cache_backend, self.cache_config)

    @property
    def transformer_files(self) -> dict[str, str]:
        """Absolute paths of the files with weights of transformers, by component of the model folder."""
        given = {component: getattr(self, name) for component, name in TRANSFORMER_FILES.items()}
        return {
            component: os.path.abspath(os.path.expanduser(file))
            for component, file in given.items()
            if file is not None
        }

    @property
    def has_gguf(self) -> bool:
        """Whether a transformer's weights are in a GGUF file."""
        return any(file.lower().endswith(".gguf") for file in self.transformer_files.values())

    def with_adapter_files(self) -> OmniDiffusionConfig:
        """Config with the file of each served adapter in place of the path given, so that later changes of links and
        folders have no effect on its name, and with absolute folders. Raises ConfigError for a path without an adapter
        and for a folder that is none.
        """
        for folder in self.lora_dirs:
            require(os.path.isdir(folder), "--lora-dir", folder, "folders that exist")
        folders = tuple(os.path.abspath(folder) for folder in self.lora_dirs)
        return replace(self, lora_modules=served_files(self.lora_modules), lora_dirs=folders)

    def for_worker(self, path: str) -> OmniDiffusionConfig:
        """Config for a worker: with the model's folder in place of its hub name, absolute paths, and without token."""
        files: dict[str, Any] = {TRANSFORMER_FILES[name]: file for name, file in self.transformer_files.items()}
        return replace(self, model=path, revision=None, download_dir=None, hf_token=None, **files)


def flag_of(name: str) -> str:
    """Name of a config field for users: its command-line flag, or its keyword if it has no flag."""
    return _NAMES.get(name, "--" + name.replace("_", "-"))


_NAMES = {
    "ulysses_degree": "--usp",
    "ring_degree": "--ring",
    "model": "model",
    "parallel": "parallel_config",
    "progress_bar": "progress_bar",
    "lora_dirs": "--lora-dir",
}


DEFAULT_PARAMS = sorted(
    {"negative_prompt"} | {f.name for f in fields(OmniDiffusionSamplingParams) if f.default is None}
)
"""Sampling parameters that may have other defaults; a field whose default is not None needs none."""


def fit_adapter_defaults(name: str, values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Sampling parameters that an adapter brings, converted to plain values. Raises ConfigError.

    place: where they were given, for the error.
    """
    accepted = [each for each in DEFAULT_PARAMS if not each.startswith("lora_")]
    return _fit_sampling_params(values, f"{place}: defaults of the LoRA adapter {shown(name)}", accepted)


def _fit_sampling_params(
    values: Mapping[str, Any], place: str = "--default-sampling-params", accepted: Sequence[str] = ()
) -> dict[str, Any]:
    """Default sampling parameters, converted to plain values of their types. Raises ConfigError.

    place: where they were given. accepted: their names; empty: `DEFAULT_PARAMS`.
    """
    accepted = accepted or DEFAULT_PARAMS
    try:
        values = without_aliases(values)
    except InvalidRequestError as error:
        raise ConfigError(f"{place}: {error}") from error
    if unknown := set(values) - set(accepted):
        raise ConfigError(f"{place}: unknown keys {sorted(map(str, unknown))}, accepted are {', '.join(accepted)}")
    kinds = {**field_types(OmniDiffusionSamplingParams), "negative_prompt": str | None}
    plain = {}
    for name, value in values.items():
        try:
            plain[name] = coerce(_lora_requests(value) if name == "lora_request" else value, kinds[name])
        except WrongValueError as error:
            raise ConfigError(f"{place}: {name} takes {error}, got {shown(value)}") from error
    return plain


def _lora_requests(value: Any) -> Any:
    """LoRARequests from mappings, one or a list of them."""
    return [_lora_request(item) for item in value] if isinstance(value, list | tuple) else _lora_request(value)


def _lora_request(value: Any) -> Any:
    """LoRARequest from a mapping, the form that it has in JSON and in a worker; other values are returned unchanged."""
    if not isinstance(value, Mapping):
        return own_adapter(value)
    try:
        return LoRARequest(**value)
    except (TypeError, InvalidRequestError):  # an unknown field, or no name
        raise WrongValueError('an adapter, as {"name": ..., "scale": ...}') from None
