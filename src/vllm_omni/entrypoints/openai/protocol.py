"""The JSON that goes in and out, as OpenAI's image API has it plus our extensions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from vllm_omni.diffusion.intake import MAX_PROMPT_CHARACTERS

MAX_INPUT_IMAGES = 16

OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]
ReportedQuality = Literal["low", "medium", "high", "xhigh", "max"]


class _NullMeansAbsent:
    """Marks a field whose `null` was dropped before validation, so that the schema says that it is accepted."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [handler(core), {"type": "null"}]}


_NULLABLE = _NullMeansAbsent()

_URLS = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_INPUT_IMAGES}


def _listed(value: Any) -> Any:
    """One URL as a list of one."""
    return [value] if isinstance(value, str) else value


def at_most(most: int) -> BeforeValidator:
    """Refuses a list or an object of more entries by its length: pydantic makes an error for each one first."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            raise PydanticCustomError("too_long", "takes at most {most} entries", {"most": most})
        return value

    return BeforeValidator(check)


_FEW_KEYS = at_most(8)


class LoRA(BaseModel):
    """An adapter by its name; no request brings a path."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    scale: float | None = None
    """None: 1."""


class ImageOptions(BaseModel):
    """What every request for pictures may say of them.

    `null` is the same as absent. Unknown fields are ignored, and named in the header `x-omni-ignored-fields`.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10), _NULLABLE] = 1
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})$"), _NULLABLE] = "auto"
    """`auto` (the model's own) or `WIDTHxHEIGHT` in pixels."""
    output_format: Annotated[OutputFormat, _NULLABLE] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100), _NULLABLE] = 100
    """Quality of jpeg and webp in percent; png is lossless and takes only 100."""
    background: Annotated[Literal["auto", "opaque", "transparent"], _NULLABLE] = "auto"
    stream: Annotated[bool, _NULLABLE] = False

    # Accepted for compatibility, without effect on the picture.
    quality: Annotated[Quality, _NULLABLE] = "auto"
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["low", "auto"] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    user: str | None = None
    safety_identifier: str | None = None

    # Extensions.
    height: Annotated[int, Field(ge=1, le=999_999)] | None = None
    """With `width`, another way to say `size`."""
    width: Annotated[int, Field(ge=1, le=999_999)] | None = None
    num_outputs_per_prompt: Annotated[int, Field(ge=1, le=10)] | None = None
    """Another name of `n`."""
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    """How far an edited picture may go from its input; of models that take it."""
    cfg_normalization: bool | float | None = None
    cfg_truncation: float | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    """Picture i of `n` uses `seed + i`."""
    cache: bool | None = None
    """False: compute every block, although the server has a step cache."""
    max_sequence_length: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt accepted, in tokens."""
    lora: Annotated[LoRA, _FEW_KEYS] | None = None
    """An adapter that the server was started with."""
    priority: Annotated[int, _NULLABLE] = 0
    """Smaller runs earlier."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class ImageGenerationRequest(ImageOptions):
    """Body of `POST /v1/images/generations`."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
    response_format: Annotated[Literal["b64_json", "url"], _NULLABLE] = "b64_json"
    partial_images: Annotated[int, Field(ge=0, le=3), _NULLABLE] = 0


class ImageEditRequest(ImageGenerationRequest):
    """Body of `POST /v1/images/edits`; in a form the pictures are the files `image` or `image[]`."""

    images: (
        Annotated[
            list[Annotated[dict[Literal["image_url"], str], Field(min_length=1), _FEW_KEYS]],
            Field(min_length=1, max_length=MAX_INPUT_IMAGES),
            at_most(MAX_INPUT_IMAGES),
        ]
        | None
    ) = None
    """Of JSON bodies: `{"image_url": "data:image/png;base64,..."}` each, or a URL of an allowed host."""
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
    """Of JSON bodies, instead of `images`: the URL alone, or several."""
    mask: Any = None
    """Not available."""
    markup: Any = None
    """Not available."""

    # Accepted for compatibility, without effect on the picture.
    input_fidelity: Literal["high", "low"] | None = None


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of `model` for a route that reads its bodies itself; models in it stand where they are used."""
    schema = model.model_json_schema()
    inner = schema.pop("$defs", {})

    def written_out(node: Any) -> Any:
        if isinstance(node, dict):
            name = node.get("$ref", "").rpartition("/")[2]
            return inner[name] if name else {key: written_out(value) for key, value in node.items()}
        return [written_out(item) for item in node] if isinstance(node, list) else node

    return {name: written_out(value) for name, value in schema.items()}


def json_request_body(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI calls a `requestBody`, of such a route that takes JSON alone."""
    return {"required": True, "content": {"application/json": {"schema": body_schema(model)}}}


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer that is not a success."""

    error: ErrorBody


class TokenDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens of the prompt, and latent patches of the pictures."""

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
    timings: dict[str, float]
    """Seconds: `queue`, `text_encode`, `denoise`, `vae_decode`, `media_encode`, `total`; `computed_steps` and
    `cached_steps`, in which a step of which one guidance branch of two came from the cache counts half each."""
    safety_identifier: str | None = None
    data: list[ImageData]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vllm-omni"
    served_by: Literal["packed", "diffusers"]
    """Our packed transformer of the model's family, or diffusers' own pipeline."""
    parent: str | None = None
    """Of an adapter: the model that it is for."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoRACard(BaseModel):
    id: str
    object: Literal["lora"] = "lora"


class LoRAList(BaseModel):
    object: Literal["list"] = "list"
    data: list[LoRACard]


class StatusResponse(BaseModel):
    status: str


class VersionResponse(BaseModel):
    version: str
