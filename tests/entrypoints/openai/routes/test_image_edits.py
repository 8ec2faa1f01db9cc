"""`POST /v1/images/edits` as the SDK and others send it, up to what reaches the device."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image, ImageOps

from testbed.live_server import FAKE_EDIT_INFO, MODEL_NAME, LiveServer, expected_picture, live_server
from testbed.tiny_models import photo
from vllm_omni.inputs.images import InputImage

EDITS = "/v1/images/edits"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(info=FAKE_EDIT_INFO) as running:
        yield running


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(file_of(image)).decode()


def pixels(data: str | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def newest(server: LiveServer) -> tuple[InputImage, ...]:
    """The pictures of the request that reached the device last."""
    return list(server.device.images.values())[-1]


PHOTO = photo(40, 30, 1)


def test_one_file_by_the_sdk(server: LiveServer, sdk: openai.OpenAI) -> None:
    answer = sdk.images.edit(image=("photo.png", file_of(PHOTO)), prompt="a b", extra_body={"seed": 5})
    assert answer.data is not None
    # The output has the size of the last picture's reference, which the fake model sets to 48x32.
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), expected_picture(5, 32, 48))
    (image,) = newest(server)
    np.testing.assert_array_equal(image.condition, np.asarray(PHOTO))
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.to_dict() == {"text_tokens": 2, "image_tokens": 6}
    assert answer.usage.total_tokens == 2 + 6 + 6


def test_several_files_and_every_field(server: LiveServer, sdk: openai.OpenAI) -> None:
    files = [io.BytesIO(file_of(PHOTO, "JPEG")), file_of(PHOTO, "WEBP", lossless=True), file_of(photo(8, 9, 2))]
    answer = sdk.images.edit(
        image=files,
        prompt="put them together",
        model=MODEL_NAME,
        n=2,
        size="64x32",
        output_format="webp",
        output_compression=80,
        background="auto",
        quality="high",
        input_fidelity="high",
        response_format="b64_json",
        user="me",
        safety_identifier="me too",
        extra_body={
            "seed": 2**40,
            "num_inference_steps": 3,
            "true_cfg_scale": 2.5,
            "negative_prompt": "",
            "priority": -1,
            "colour": {"hue": "red"},
        },
    )
    assert answer.data is not None
    assert [item.to_dict()["seed"] for item in answer.data] == [2**40, 2**40 + 1]
    assert [pixels(item.b64_json).shape for item in answer.data] == [(32, 64, 3)] * 2
    assert (answer.output_format, answer.quality) == ("webp", "high")
    images = newest(server)
    assert len(images) == 3
    np.testing.assert_array_equal(images[1].condition, np.asarray(PHOTO))
    np.testing.assert_array_equal(images[2].condition, np.asarray(photo(8, 9, 2)))


def test_fields_without_effect_are_named(http: httpx.Client) -> None:
    fields = {"prompt": "x", "true_cfg_scale": "3", "colour[hue]": "red", "seed": "", "n": "1", "partial_images": "2"}
    response = http.post(EDITS, files={"image": file_of(PHOTO)}, data=fields)
    assert response.status_code == 200
    assert response.headers["x-omni-ignored-fields"] == "colour,partial_images,true_cfg_scale"


def test_names_of_vllm_omni_for_size_and_n(http: httpx.Client) -> None:
    fields = {"prompt": "x", "seed": "8", "height": "64", "width": "128", "num_outputs_per_prompt": "2"}
    response = http.post(EDITS, files={"image": file_of(PHOTO)}, data=fields)
    assert "x-omni-ignored-fields" not in response.headers
    for item, seed in zip(response.json()["data"], (8, 9), strict=True):
        np.testing.assert_array_equal(pixels(item["b64_json"]), expected_picture(seed, height=64, width=128))


def test_a_stream_says_image_edit(sdk: openai.OpenAI) -> None:
    stream = sdk.images.edit(
        image=file_of(PHOTO), prompt="x", stream=True, partial_images=1, size="64x64", extra_body={"seed": 3}
    )
    partial, completed = list(stream)
    assert (partial.type, completed.type) == ("image_edit.partial_image", "image_edit.completed")
    np.testing.assert_array_equal(pixels(partial.b64_json), expected_picture(3, step=2))
    np.testing.assert_array_equal(pixels(completed.b64_json), expected_picture(3))


def test_pictures_as_urls_to_fetch(http: httpx.Client) -> None:
    answer = http.post(EDITS, files={"image": file_of(PHOTO)}, data={"prompt": "x", "response_format": "url"}).json()
    assert http.get(answer["data"][0]["url"]).headers["content-type"] == "image/png"


def test_json_with_data_urls(server: LiveServer, http: httpx.Client) -> None:
    images = [{"image_url": data_url(PHOTO)}, {"image_url": data_url(photo(8, 9, 2))}]
    response = http.post(EDITS, json={"prompt": "x", "images": images, "seed": 4, "n": None, "mask": None})
    assert response.status_code == 200, response.text
    np.testing.assert_array_equal(pixels(response.json()["data"][0]["b64_json"]), expected_picture(4, 32, 48))
    np.testing.assert_array_equal(newest(server)[1].condition, np.asarray(photo(8, 9, 2)))


@pytest.mark.parametrize("num_images", [1, 2])
def test_json_with_the_url_alone(server: LiveServer, http: httpx.Client, num_images: int) -> None:
    photos = [PHOTO, photo(8, 9, 2)][:num_images]
    urls = [data_url(image) for image in photos]
    response = http.post(EDITS, json={"prompt": "x", "image": urls if num_images > 1 else urls[0]})
    assert response.status_code == 200, response.text
    assert "x-omni-ignored-fields" not in response.headers
    for seen, sent in zip(newest(server), photos, strict=True):
        np.testing.assert_array_equal(seen.condition, np.asarray(sent))


@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_their_exif_says(server: LiveServer, sdk: openai.OpenAI, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = file_of(PHOTO, "PNG", exif=exif)
    sdk.images.edit(image=file, prompt="x")
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    (image,) = newest(server)
    np.testing.assert_array_equal(image.condition, np.asarray(wanted))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1"])
def test_whatever_the_mode_the_model_sees_rgb_on_white(server: LiveServer, sdk: openai.OpenAI, mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    if mode == "P":
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([0, 0, 0, 9, 9, 9])
        palette.paste(0, (0, 0, 2, 4))
        file = file_of(palette, transparency=1)
    else:
        file = file_of(image.convert(mode))
    sdk.images.edit(image=file, prompt="x")
    seen = newest(server)[0].condition
    assert seen.shape == (4, 4, 3)
    assert (seen[:, :2] == 0).all()
    assert (seen[:, 2:] == (255 if mode in ("RGBA", "LA", "P") else 0)).all()


def test_libre_chat_and_curl(http: httpx.Client) -> None:
    """Repeated `image[]`, every value a string, `auto` everywhere."""
    files = (("a.png", file_of(PHOTO), "image/png"), ("b.webp", file_of(PHOTO, "WEBP"), None))
    parts = [("image[]", file) for file in files]
    fields = {"prompt": "x", "model": MODEL_NAME, "size": "auto", "quality": "auto", "background": "auto", "n": "1"}
    assert http.post(EDITS, files=parts, data=fields).status_code == 200
    assert http.post(EDITS, files={"image[0]": file_of(PHOTO)}, data=fields).status_code == 200


def test_generations_say_where_to_go(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="use POST /v1/images/edits") as refused:
        sdk.images.generate(prompt="x")
    assert refused.value.param == "image"


def test_a_real_model_end_to_end(tiny_edit_model: Path) -> None:
    """From the SDK through the engine and back: the picture equals that of diffusers' pipeline."""
    from testbed import tiny_edit_models as oracle
    from testbed.runner_driver import make_request
    from tests.diffusion.compute.families.qwen_image.test_pictures import check

    pictures = [photo(90, 60, 1), photo(31, 70, 3)]
    with (
        live_server(model=tiny_edit_model, distributed_executor_backend="uni") as running,
        openai.OpenAI(api_key="none", base_url=f"{running.url}/v1", max_retries=0) as client,
    ):
        answer = client.images.edit(
            image=[file_of(picture) for picture in pictures],
            prompt="a red apple",
            extra_body={"seed": 7, "negative_prompt": "blue", "true_cfg_scale": 3, "num_inference_steps": 5},
        )
    assert answer.data is not None
    request = make_request("x", negative_prompt="blue", true_cfg_scale=3.0, seed=7, num_inference_steps=5)
    with torch.inference_mode(), oracle.small_pictures():
        wanted = oracle.draw(oracle.reference(tiny_edit_model), pictures, request)
    check(pixels(answer.data[0].b64_json), wanted)
