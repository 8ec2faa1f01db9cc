"""Bodies of `POST /v1/videos`: the fields with pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic_core import PydanticCustomError

from vllm_omni.entrypoints.openai.requests.multipart import Part
from vllm_omni.entrypoints.openai.requests.picture_body import PictureBody
from vllm_omni.entrypoints.openai.schema.videos import REFERENCE_FIELDS, VideoRequest, reference_url
from vllm_omni.errors import InvalidRequestError

_REFUSED = dict.fromkeys(
    (
        *("mask", "video_reference", "audio_reference", "control_reference"),
        *("source_video", "source_audio", "video_noise_mask", "audio_noise_mask"),
    ),
    "no model here takes one; a video begins with the picture input_reference",
)
_FIELD = re.compile(rf"({'|'.join(REFERENCE_FIELDS)})((\[\w{{0,16}}\]){{0,2}})", re.ASCII)


def _urls(body: VideoRequest) -> Sequence[str]:
    given = {name: urls for name in REFERENCE_FIELDS if (urls := getattr(body, name))}
    if len(given) > 1:
        raise InvalidRequestError(
            f"{' and '.join(given)} are names of the same: give one of them", param=next(iter(given))
        )
    return next(iter(given.values()), ())


def _url_of(part: Part) -> str:
    """URL in the text of a part such as `input_reference`, `input_reference[]` or `input_reference[image_url]`."""
    matched = _FIELD.fullmatch(part.name)
    assert matched
    name, text = matched[1], part.data.decode("ascii")
    key = re.sub(r"^\[\d*\](?=\[|$)", "", matched[2]).strip("[]")  # without the number of the picture
    try:
        return reference_url({key: text} if key else text)
    except PydanticCustomError as error:
        raise InvalidRequestError(f"{name}: {error.message()}, got {part.name}", param=name) from error


VIDEO_BODY = PictureBody(
    VideoRequest,
    picture_field=_FIELD,
    picture_names="input_reference",
    text_fields=VideoRequest.model_fields.keys() - {*REFERENCE_FIELDS, *_REFUSED},
    refused=_REFUSED,
    urls=_urls,
    url_of=_url_of,
)
