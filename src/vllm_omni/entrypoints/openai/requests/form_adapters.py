"""LoRA adapters in a form: `lora` in JSON, by the keys of one adapter, or by lists as the OpenAI SDK sends them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

from vllm_omni.entrypoints.openai.quotes import quote
from vllm_omni.errors import InvalidRequestError

_KEY = re.compile(r"lora\[([^\[\]]+)\]")
_LIST = re.compile(r"lora\[\](?:\[(name|scale)\])?")
_MAX_NAME = 64


class _AdapterKeys(dict[str, str]):
    """Values of `lora[name]` and `lora[scale]`, by key."""


class _AdapterLists(defaultdict[str, list[Any]]):
    """Values of `lora[][name]` and `lora[][scale]` by key, and the objects of `lora[]` by an empty key."""


class _NumberText(str):
    """Text of a number in JSON."""

    __slots__ = ()


def is_adapter_field(name: str) -> bool:
    """Whether a form's field of this name is for `set_adapter`."""
    return name == "lora" or name.startswith("lora[")


def set_adapter(fields: dict[str, Any], name: str, value: str) -> None:
    """Store the value of `lora`, `lora[key]`, `lora[]` or `lora[][key]`; `join_adapters` follows when the form ends.

    An empty value is absent; in `lora[][key]` it keeps its place, because the order counts. Raises
    InvalidRequestError for a second value where one is taken, for two of these forms in one request, and for other
    names.
    """
    in_list, key = _LIST.fullmatch(name), _KEY.fullmatch(name)
    if not value and not (in_list and in_list[1]):
        return
    if name != "lora" and not in_list and not key:
        raise InvalidRequestError(
            "lora takes lora[name] and lora[scale] for one adapter, lora[][name] and lora[][scale] or JSON for "
            f"several, got a field {quote(name[:_MAX_NAME])}",
            param="lora",
        )
    known = fields.setdefault("lora", _AdapterLists(list) if in_list else _AdapterKeys() if key else None)
    if in_list and isinstance(known, _AdapterLists) and not (known and (in_list[1] is None) != ("" in known)):
        known[in_list[1] or ""].append(value if in_list[1] else _adapters_of(value, several=False))
    elif key and isinstance(known, _AdapterKeys) and key[1] not in known:
        known[key[1]] = value
    elif name == "lora" and known is None:
        fields["lora"] = _adapters_of(value)
    else:
        raise InvalidRequestError(
            "lora takes its JSON once, one form of a list, or lora[name] and lora[scale] once each, got another "
            f"{quote(name[:_MAX_NAME])}",
            param="lora",
        )


def join_adapters(fields: dict[str, Any]) -> None:
    """Make a list of adapters from the lists of their names and scales, at the end of the form.

    Raises InvalidRequestError if only some have a scale: the SDK sends no empty scale for the others.
    """
    if not isinstance(lists := fields.get("lora"), _AdapterLists):
        return
    if "" in lists:
        fields["lora"] = lists[""]
        return
    names, scales = lists["name"], lists["scale"]
    if scales and len(names) != len(scales):
        raise InvalidRequestError(
            f"lora takes lora[][scale] for each lora[][name] or for none, got {len(names)} names and {len(scales)} "
            'scales; JSON tells whose they are: [{"name": "ink"}, {"name": "fast", "scale": 0.5}]',
            param="lora",
        )
    pairs = [pair for pair in zip(names, scales or [""] * len(names)) if any(pair)]
    fields["lora"] = [{"name": name, "scale": scale} for name, scale in pairs] or None


def _adapters_of(text: str, several: bool = True) -> Any:
    """An adapter, or with `several` also a list, in JSON. Numbers stay text, as in `lora[key]`."""
    try:
        value = json.loads(text, parse_int=_NumberText, parse_float=_NumberText, parse_constant=_NumberText)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict | list if several else dict):
        place, or_list = ("lora", ", or a list of them") if several else ("lora[]", "")
        raise InvalidRequestError(
            f'{place} takes a JSON object such as {{"name": "ink", "scale": 0.8}}{or_list}, got {quote(text)}',
            param="lora",
        )
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict) and isinstance(name := item.get("name"), _NumberText):
            raise InvalidRequestError(f"the name of an adapter takes a string, got {name[:_MAX_NAME]}", param="lora")
    return value
