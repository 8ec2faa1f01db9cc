"""Checks of a tokenizer's files: for missing ones, the libraries silently build an empty tokenizer. No torch at
import."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_omni.diffusion.catalog.folder_files import names_in, open_file, read_object
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.field_values import shown

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
SETTINGS = "tokenizer_config.json"
ADDED = "added_tokens.json"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
MAX_IDS = 2**31
OBJECTS = ("special_tokens_map.json", ADDED, CHAT_TEMPLATES[1])
"""Further files that hold a JSON object."""
SENTENCE_PIECES = "tokenizer.model"
"""Vocabulary that transformers reads for classes that name only `TOKENIZER_FILE`."""


@dataclass(frozen=True)
class TokenizerNeeds:
    """Requirements that a model has for its tokenizer."""

    tokens: tuple[str, ...] = ()
    """Special tokens that the model's prompts contain."""
    num_ids: int | None = None
    """Number of rows of the text encoder's embedding; None: unknown."""


def check_tokenizer(root: Path, component: str, class_name: str, needs: TokenizerNeeds = TokenizerNeeds()) -> None:
    """Raise ConfigError, with the reason, for broken files of a tokenizer, or one that lacks the `needs`."""
    names = names_in(root, component)
    objects = {name: read_object(root, f"{component}/{name}") for name in OBJECTS if name in names}
    settings = read_settings(root, component) if SETTINGS in names else {}
    vocabulary = _read_vocabulary(root, component, class_name, names)
    if vocabulary is None:
        return
    added = {
        token["content"]: int(number) if number.isdecimal() else number
        for number, token in (settings.get("added_tokens_decoder") or {}).items()
        if isinstance(token, dict) and isinstance(token.get("content"), str)
    }
    ids = vocabulary | objects.get(ADDED, {}) | added
    if missing := [token for token in needs.tokens if token not in ids]:
        raise ConfigError(f"{component}/ lacks the token {missing[0]!r}, which the model's prompts consist of")
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < (needs.num_ids or MAX_IDS):
            raise ConfigError(
                f"{component}/ has the token {token!r} with the id {shown(number)}; the text encoder's vocab_size "
                f"allows 0 to {(needs.num_ids or MAX_IDS) - 1}"
            )


def read_settings(root: Path, component: str) -> dict[str, Any]:
    """JSON of a tokenizer_config.json. Raises ConfigError for values with which no tokenizer can be built."""
    place = f"{component}/{SETTINGS}"
    settings = read_object(root, place)
    for key, kind, accepted in (("tokenizer_class", str, "a text"), ("added_tokens_decoder", dict, "a JSON object")):
        if not isinstance(value := settings.get(key), kind | None):
            raise ConfigError(f"{place}: {key} takes {accepted}, got {shown(value)}")
    limit = settings.get("model_max_length")
    is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if limit is not None and not (is_number and limit >= 1):
        raise ConfigError(f"{place}: model_max_length takes a number from 1, got {shown(limit)}")
    return settings


def check_chat_template(root: Path, component: str) -> None:
    """Raise ConfigError if the tokenizer in the folder `component` has no chat template."""
    names = names_in(root, component)
    settings = read_settings(root, component) if SETTINGS in names else {}
    if not settings.get("chat_template") and not set(CHAT_TEMPLATES) & set(names):
        raise ConfigError(
            f"{component}/ has no chat template, neither {CHAT_TEMPLATES[0]} nor in {SETTINGS}; prompts need it"
        )


def _read_vocabulary(root: Path, component: str, class_name: str, names: list[str]) -> dict[str, int] | None:
    """Token -> id. None: only the tokenizer's own class can read the format, or there is no vocabulary."""
    from tokenizers import Tokenizer  # a library in Rust, without torch
    from tokenizers.models import BPE

    if TOKENIZER_FILE in names:
        file = _readable(root, f"{component}/{TOKENIZER_FILE}")
        read_object(root, f"{component}/{TOKENIZER_FILE}")
        try:
            return dict(Tokenizer.from_file(file).get_vocab())
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"cannot read {component}/{TOKENIZER_FILE}: it is no tokenizer: {error}") from error
    if VOCABULARY in names:
        if MERGES not in names:
            raise ConfigError(f"{component}/ lacks {MERGES}, which {VOCABULARY} needs")
        vocabulary = read_object(root, f"{component}/{VOCABULARY}")
        if not vocabulary or not all(type(number) is int and number >= 0 for number in vocabulary.values()):
            raise ConfigError(f"cannot read {component}/{VOCABULARY}: it must map tokens to numbers from 0")
        files = [_readable(root, f"{component}/{name}") for name in (VOCABULARY, MERGES)]
        try:
            BPE(*BPE.read_file(*files))
        except Exception as error:  # as above
            raise ConfigError(f"cannot read {component}/{MERGES} with {VOCABULARY}: {error}") from error
        return vocabulary
    others = _other_vocabularies(class_name)
    if others is None:
        return None
    for name in others:
        if name in names:
            _readable(root, f"{component}/{name}")
            return None
    accepted = [TOKENIZER_FILE, f"{VOCABULARY} with {MERGES}", *others]
    raise ConfigError(f"{component}/ has no vocabulary of a {class_name}: neither {', nor '.join(accepted)}")


def _other_vocabularies(class_name: str) -> tuple[str, ...] | None:
    """Names of a class's vocabulary files in other formats, such as SentencePiece's; None: its tokens are bytes."""
    import transformers  # late, because it imports torch: only if the usual files are missing

    cls: Any = getattr(transformers, class_name, None)
    is_tokenizer = inspect.isclass(cls) and issubclass(cls, transformers.PreTrainedTokenizerBase)
    if not is_tokenizer:
        return ()
    named: set[str] = set(cls.vocab_files_names.values())
    if not named:
        return None
    if named == {TOKENIZER_FILE}:
        return (SENTENCE_PIECES,)
    return tuple(sorted(named - {TOKENIZER_FILE, VOCABULARY, MERGES}))


def _readable(root: Path, name: str) -> str:
    """Path of a file that is not empty. Raises ConfigError for other files."""
    with open_file(root, name) as stream:
        if not stream.read(1):
            raise ConfigError(f"cannot read {name}: it is empty")
    return str(root / name)
