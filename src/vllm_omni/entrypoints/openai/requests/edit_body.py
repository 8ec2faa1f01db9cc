"""Bodies of `POST /v1/images/edits`: the fields with pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vllm_omni.entrypoints.openai.requests.multipart import Part
from vllm_omni.entrypoints.openai.requests.picture_body import PictureBody
from vllm_omni.entrypoints.openai.schema.images import ImageEditRequest
from vllm_omni.errors import InvalidRequestError

_REFUSED = dict.fromkeys(("mask", "markup"), "no model here takes one; say in the prompt what to change")


def _urls(body: ImageEditRequest) -> Sequence[str]:
    if body.images and body.image:
        raise InvalidRequestError("image and images are two names of the same: give one of them", param="image")
    return body.image or [image["image_url"] for image in body.images or ()]


def _url_of(part: Part) -> str:
    return part.data.decode("ascii")


EDIT_BODY = PictureBody(
    ImageEditRequest,
    picture_field=re.compile(r"image(\[\d{0,3}\])?"),
    picture_names="image or image[]",
    text_fields=ImageEditRequest.model_fields.keys() - {"images", *_REFUSED},
    refused=_REFUSED,
    urls=_urls,
    url_of=_url_of,
)
