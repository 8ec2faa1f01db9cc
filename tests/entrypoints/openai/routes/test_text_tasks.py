"""Text tasks of chat front ends: answered with empty text, without the device."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from testbed.live_server import FAKE_EDIT_INFO, MODEL_NAME, LiveServer, live_server
from tests.entrypoints.openai.routes.test_chat_completions import CHAT, PHOTO, chunks_of, says, shows, text
from tests.entrypoints.openai.routes.test_probes_and_metrics import read_metrics

HISTORY = "### Chat History:\n<chat_history>\nUSER: a red apple\nASSISTANT: \n</chat_history>"
COUNTER = "vllm_omni:chat_text_tasks_total"
USER_TASKS = {
    "title": f"### Task:\nGenerate a concise title summarizing the chat history.\n{HISTORY}",
    "tags": f"### Task:\nGenerate 1-3 broad tags categorizing the main themes of the chat history.\n{HISTORY}",
    "follow-ups": f"### Task:\nSuggest 3-5 relevant follow-up questions or prompts.\n{HISTORY}",
    "queries": f"### Task:\nAnalyze the chat history to determine the necessity of generating queries.\n{HISTORY}",
    "image prompt": f"### Task:\nGenerate a detailed prompt for am image generation task.\n{HISTORY}",
    "autocompletion": "### Task:\nYou are an autocompletion system. Continue the text in `<text>`.\n<text>a</text>",
    "emoji": "Your task is to reflect the speaker's likely facial expression through a fitting emoji. Message: ```a```",
    "merge": 'You have been provided with a set of responses from various models to the latest user query: "a"',
    "librechat": "Provide a concise, 5-word-or-less title for the conversation, using title case conventions.",
    "librechat structured": "Analyze this conversation and provide:\n1. The detected language of the conversation",
    "a long history": "### Task:\nGenerate a concise title.\n" + "word " * 10_000,
}
TOOLS = [
    {"role": "system", "content": "Available Tools: []\n\nYour task is to choose the correct tool(s)."},
    says('History:\nUSER: """a"""\nQuery: b'),
]
TASKS: dict[str, list[dict[str, Any]]] = {name: [says(words)] for name, words in USER_TASKS.items()}
TASKS |= {"tools": TOOLS, "a text part": [says([text(USER_TASKS["title"])])], "a blank first": [says("\n### Task:\nx")]}
PICTURES: dict[str, list[dict[str, Any]]] = {
    "words inside": [says("a poster that says ### Task: Generate")],
    "other heading": [says("### Tasks on a whiteboard")],
    "an earlier task": [*TASKS["title"], says("a red apple")],
    "retrieved text": [
        says("### Task:\nRespond to the user query using the provided context.\n<context></context>\na")
    ],
    "tools of a person": [TOOLS[0], says("a red apple")],
    "a query without tools": [says("Query: a red apple")],
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_gets_empty_text_and_no_picture(server: LiveServer, http: httpx.Client, name: str) -> None:
    num_prompts, counted = len(server.device.prompts), read_metrics(server)[COUNTER]
    body = {"model": MODEL_NAME, "messages": TASKS[name], "max_completion_tokens": 50}
    response = http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ""}},
    ]
    assert answer["usage"] == {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert answer["ignored_fields"] == ["max_completion_tokens"]
    assert response.headers["x-omni-ignored-fields"] == "max_completion_tokens"
    assert len(server.device.prompts) == num_prompts
    assert read_metrics(server)[COUNTER] == counted + 1


@pytest.mark.parametrize("name", PICTURES)
def test_a_prompt_gets_its_picture(server: LiveServer, http: httpx.Client, name: str) -> None:
    counted = read_metrics(server)[COUNTER]
    answer = http.post(CHAT, json={"messages": PICTURES[name]}).json()
    assert len(answer["choices"][0]["message"]["images"]) == 1
    assert read_metrics(server)[COUNTER] == counted


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_task(sdk: openai.OpenAI, http: httpx.Client, include_usage: bool) -> None:
    body = {"messages": TASKS["title"], "stream": True, "stream_options": {"include_usage": include_usage}, "a": 1}
    response = http.post(CHAT, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    shown, stopped, *usage = chunks_of(response)
    assert shown["choices"] == [
        {"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": ""}},
    ]
    assert stopped["choices"] == [{"index": 0, "finish_reason": "stop", "delta": {}}]
    assert stopped["ignored_fields"] == ["a"]
    assert [chunk["usage"]["total_tokens"] for chunk in usage] == [0] * include_usage
    stream: Any = sdk.chat.completions.create(model=MODEL_NAME, messages=TASKS["title"], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ""


def test_a_task_is_checked_like_any_request(http: httpx.Client) -> None:
    wrong = {"model": "gpt-9", "messages": TASKS["title"]}
    assert http.post(CHAT, json=wrong).status_code == 404
    assert http.post(CHAT, json={"seed": "x", "messages": TASKS["title"]}).status_code == 400


def test_a_busy_device_does_not_delay_a_task() -> None:
    with live_server(max_num_queued_reqs=1) as running:
        running.call(running.device.pause)
        body = {"messages": [says("x")], "stream": True}
        with httpx.stream("POST", running.url + CHAT, json=body):
            assert httpx.post(running.url + CHAT, json={"messages": TASKS["title"]}).status_code == 200
        running.call(running.device.resume)


def test_a_model_that_edits_needs_no_picture_for_a_task() -> None:
    with live_server(info=FAKE_EDIT_INFO) as running, httpx.Client(base_url=running.url) as client:
        assert client.post(CHAT, json={"messages": TASKS["title"]}).json()["usage"]["total_tokens"] == 0
        with_picture = [says([text(USER_TASKS["title"]), shows(PHOTO)])]
        assert len(client.post(CHAT, json={"messages": with_picture}).json()["choices"][0]["message"]["images"]) == 1


def test_tasks_can_be_generated() -> None:
    with live_server(settings={"chat_text_tasks": "generate"}) as running:
        answer = httpx.post(running.url + CHAT, json={"messages": TASKS["title"]}).json()
        assert len(answer["choices"][0]["message"]["images"]) == 1
        assert read_metrics(running)[COUNTER] == 0
