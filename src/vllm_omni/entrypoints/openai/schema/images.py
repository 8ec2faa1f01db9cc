"""Request and response bodies of OpenAI's image API, with our extensions."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from vllm_omni.diffusion.control.request_builder import MAX_PROMPT_CHARACTERS
from vllm_omni.entrypoints.openai.settings import ResponseFormat

MAX_INPUT_IMAGES = 16
RANDOM_SEED = -1
"""Value of `seed` that means a random seed, as on other image servers."""

OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]
ReportedQuality = Literal["low", "medium", "high", "xhigh", "max"]

_OUTPUT_FORMAT_ALIASES = {"jpg": "jpeg"}
_SIZE = r"^([aA][uU][tT][oO]| *[1-9][0-9]{0,5} *[xX*\u00d7] *[1-9][0-9]{0,5} *)$"
NUMBER_PATTERN = r"[0-9]{1,30}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,2})?"
"""Number of at least 0 in a string."""
_NUMBER = re.compile(rf" *-?{NUMBER_PATTERN} *")


def _lower_case(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _canonical_format(value: Any) -> Any:
    name = _lower_case(value)
    return _OUTPUT_FORMAT_ALIASES.get(name, name) if isinstance(name, str) else name


def _canonical_size(size: str) -> str:
    """`auto` or `WIDTHxHEIGHT`, from any spelling that `_SIZE` matches."""
    return size.lower().replace(" ", "").replace("*", "x").replace("\u00d7", "x")


def number_in(value: Any) -> Any:
    """The number in a string, which OpenAI's clients send; other values stay, and the field's type refuses them."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


ANY_CASE = BeforeValidator(_lower_case)
"""Accepts words in any case; responses and the schema have lower case."""
_FORMAT = (
    BeforeValidator(_canonical_format),
    WithJsonSchema({"type": "string", "enum": ["png", "jpeg", "webp", *_OUTPUT_FORMAT_ALIASES]}),
)

_URLS = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_INPUT_IMAGES}


def _listed(value: Any) -> Any:
    """A single URL as a list."""
    return [value] if isinstance(value, str) else value


def at_most(most: int) -> BeforeValidator:
    """Validator that refuses a list or an object by its length: pydantic would first make an error for each entry."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            raise PydanticCustomError("too_long", "takes at most {most} entries", {"most": most})
        return value

    return BeforeValidator(check)


FEW_KEYS = at_most(8)
UNION_TAGS = ("[one]", "[several]")
"""Words that pydantic puts into the place of an error, for the two forms of a field."""


def _number_or_flag(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate a number or a flag with one error for both: pydantic's own would name `bool` as part of the field."""
    try:
        return validate(value)
    except ValidationError as error:
        is_infinite = any(part["type"] == "finite_number" for part in error.errors())
        number = "a finite number" if is_infinite else "a number"
        raise PydanticCustomError("number_or_flag", "takes {number}, true or false", {"number": number}) from error


def without_absent(body: dict[str, Any], keep_empty: Collection[str] = ()) -> dict[str, Any]:
    """`body` without absent fields: `null` and `""` mean that a field is absent.

    keep_empty: fields for which `""` has a meaning or is an error.
    """
    return {name: value for name, value in body.items() if value is not None and (value != "" or name in keep_empty)}


class RequestBody(BaseModel):
    """Base of the request bodies: a field that is `null` is absent, and an optional field that is `""`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    empty_has_meaning: ClassVar[frozenset[str]] = frozenset()
    """Optional fields for which `""` is a value."""

    @classmethod
    def keep_empty(cls) -> frozenset[str]:
        """Fields whose `""` is not absence: see `without_absent`."""
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return cls.empty_has_meaning | required

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, body: Any) -> Any:
        return without_absent(body, cls.keep_empty()) if isinstance(body, dict) else body

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """JSON schema in which optional fields may be `null` or `""`."""
        schema = handler.resolve_ref_schema(handler(core))
        for name, field in schema["properties"].items():
            if name not in schema.get("required", ()):
                absent = [None] if name in cls.empty_has_meaning else [None, ""]
                values = [option for option in field.pop("anyOf", [{}]) if option != {"type": "null"}]
                kind = {key: field.pop(key) for key in list(field) if key not in _ABOUT_A_FIELD}
                field["anyOf"] = [*(kind | option for option in values if kind | option), {"enum": absent}]
        return schema


_ABOUT_A_FIELD = ("title", "description", "default", "examples")
"""Keywords of a property's schema that do not restrict its value."""


class LoRAField(RequestBody):
    """An adapter by its name; a request cannot give a path."""

    model_config = ConfigDict(extra="forbid", title="LoRA")

    name: Annotated[str, Field(min_length=1)]
    scale: float | None = None
    """Factor of the adapter's change of the model; null: 1."""


_OneAdapter = Annotated[LoRAField, FEW_KEYS, Tag(UNION_TAGS[0])]
_SeveralAdapters = Annotated[list[Annotated[LoRAField, FEW_KEYS]], FEW_KEYS, Tag(UNION_TAGS[1])]


def _adapter_form(value: Any) -> str:
    return UNION_TAGS[isinstance(value, list)]


class GenerationOptions(RequestBody):
    """Fields of every request for pictures and for videos.

    Unknown fields are ignored; `ignored_fields` of the response and the header `x-omni-ignored-fields` name them.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    empty_has_meaning = frozenset({"negative_prompt"})

    model: str | None = None
    """A name from `/v1/models`; if absent, the served model."""
    n: Annotated[int, Field(ge=1, le=10)] = 1
    """Number of pictures or videos."""
    size: Annotated[str, Field(pattern=_SIZE), AfterValidator(_canonical_size)] = "auto"
    """`auto` (the model's own) or `WIDTHxHEIGHT` in pixels."""
    background: Annotated[Literal["auto", "opaque", "transparent"], ANY_CASE] = "auto"

    # Accepted for compatibility, without effect on the result.
    quality: Annotated[Quality, ANY_CASE] = "auto"
    style: Annotated[Literal["vivid", "natural"], ANY_CASE] | None = None
    moderation: Annotated[Literal["low", "auto"], ANY_CASE] | None = None
    complexity: Annotated[Literal["low", "medium", "high"], ANY_CASE] | None = None
    user: str | None = None
    safety_identifier: str | None = None

    # Extensions.
    height: Annotated[int, Field(ge=1, le=999_999)] | None = None
    """Height in pixels; `height` and `width` together are another form of `size`."""
    width: Annotated[int, Field(ge=1, le=999_999)] | None = None
    num_outputs_per_prompt: Annotated[int, Field(ge=1, le=10)] | None = None
    """Another name of `n`."""
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)] | None = None
    """Description of what the picture should not show. Guidance needs a negative prompt, which may be empty."""
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """Strength of the guidance, for models such as Z-Image."""
    true_cfg_scale: float | None = None
    """Strength of the guidance, for models such as Qwen-Image."""
    guidance_scale_2: float | None = None
    """`guidance_scale` of the steps of a model's second transformer (Wan 2.2); null: the same."""
    flow_shift: float | None = None
    """Shift of the noise schedule towards its noisy end; null: the model's own, which may follow from the size."""
    shift: float | None = None
    """Another name of `flow_shift`."""
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    """Strength of the change of an edited picture, for models that have this parameter."""
    cfg_normalization: Annotated[bool | float, WrapValidator(_number_or_flag)] | None = None
    cfg_truncation: float | None = None
    seed: Annotated[int, Field(ge=RANDOM_SEED)] | None = None
    """Seed of the first picture; picture i uses `seed + i`. -1: a random seed."""
    cache: bool | None = None
    """False: do not use the server's step cache; compute every block."""
    max_sequence_length: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt accepted, in tokens."""
    lora: Annotated[_OneAdapter | _SeveralAdapters, Discriminator(_adapter_form)] | None = None
    """An adapter of `/v1/loras`, or a list of them, whose changes add up."""
    priority: int = 0
    """Requests with a smaller number run earlier."""


class StreamOptions(GenerationOptions):
    """Fields of every request whose answer may be a stream."""

    stream: bool = False
    """Answer with server-sent events."""


class ImageOptions(StreamOptions):
    """Fields of every request for pictures."""

    output_format: Annotated[OutputFormat, *_FORMAT] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    """Quality of jpeg and webp in percent; png is lossless and takes only 100."""
    num_frames: Annotated[int, Field(ge=1)] | None = None
    """Number of frames: 1, which is a picture."""
    seconds: Annotated[float, Field(ge=0), BeforeValidator(number_in)] | None = None
    """Length from the first frame to the last one, instead of `num_frames`: 0, which is a picture."""


class ImageGenerationRequest(ImageOptions):
    """Body of `POST /v1/images/generations`."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
    """Description of the picture."""
    response_format: Annotated[ResponseFormat, ANY_CASE] | None = None
    """Form of the pictures; if absent, the server's default, usually `b64_json`. Streams carry `b64_json`."""
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    """Number of previews of each picture in a stream."""


class ImageEditRequest(ImageGenerationRequest):
    """Body of `POST /v1/images/edits`; in a form the pictures are the files `image` or `image[]`."""

    images: (
        Annotated[
            list[Annotated[dict[Literal["image_url"], str], Field(min_length=1), FEW_KEYS]],
            Field(min_length=1, max_length=MAX_INPUT_IMAGES),
            at_most(MAX_INPUT_IMAGES),
        ]
        | None
    ) = None
    """Pictures in JSON: objects `{"image_url": "data:image/png;base64,..."}`, or with a URL of an allowed host."""
    image: (
        Annotated[
            list[str],
            Field(min_length=1),
            at_most(MAX_INPUT_IMAGES),
            BeforeValidator(_listed),
            WithJsonSchema({"anyOf": [{"type": "string"}, _URLS]}),
        ]
        | None
    ) = None
    """Pictures in JSON, instead of `images`: a URL or base64 text, or a list of them."""
    mask: Any = None
    """Not available."""
    markup: Any = None
    """Not available."""

    # Accepted for compatibility, without effect on the picture.
    input_fidelity: Annotated[Literal["high", "low"], ANY_CASE] | None = None


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of `model` without references, for a route that reads its bodies itself."""
    schema = model.model_json_schema()
    inner = schema.pop("$defs", {})

    def written_out(node: Any) -> Any:
        if isinstance(node, dict):
            name = node.get("$ref", "").rpartition("/")[2]
            return inner[name] if name else {key: written_out(value) for key, value in node.items()}
        return [written_out(item) for item in node] if isinstance(node, list) else node

    return {name: written_out(value) for name, value in schema.items()}


def json_request_body(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's `requestBody` of a route that reads JSON itself. `example`: a complete body."""
    return {"required": True, "content": {"application/json": {"schema": body_schema(model), "example": example}}}


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every response that is not a success."""

    error: ErrorBody


class TokenDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Number of prompt tokens, and of latent patches of the pictures."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails
    output_tokens_details: TokenDetails


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesResponse(BaseModel):
    created: int
    background: Literal["opaque"]
    output_format: OutputFormat
    quality: ReportedQuality
    size: str
    usage: Usage
    timings: dict[str, float | bool]
    """Seconds: `queue`, `text_encode`, `denoise`, `vae_decode`, `media_encode`, `total`. Steps: `computed_steps` and
    `cached_steps`; a step counts half in each if one of its two guidance branches came from the cache. `vae_tiling`
    (true) only where a picture did not fit the memory whole and was decoded in tiles."""
    safety_identifier: str | None = None
    ignored_fields: list[str]
    """Fields of the request that had no effect."""
    data: list[ImageData]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vllm-omni"
    input_modalities: list[Literal["text", "image"]]
    """Media that requests may bring. An adapter has those of its model."""
    output_modalities: list[Literal["image", "video"]]
    """Media that the model makes: `image` by `/v1/images`, `video` by `/v1/videos`, and all of them in chats."""
    served_by: Literal["packed", "diffusers"]
    """`packed`: the family's packed transformer; `diffusers`: a pipeline of diffusers."""
    root: str | None = None
    """Path of an adapter's file within its `--lora-dir`, or else the file's name;
    that of a file such as `pytorch_lora_weights.safetensors` follows its folder's name."""
    parent: str | None = None
    """Name of the model, if this is an adapter."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoadResponse(BaseModel):
    server_load: int
    """Number of requests for pictures whose response is not complete yet."""


class StatusResponse(BaseModel):
    status: str


class VersionResponse(BaseModel):
    version: str
