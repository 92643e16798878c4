"""Reads chat messages of any common layout as `role` and `content`, and leaves off the answer at the end."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mgrpo.errors import InputError
from mgrpo.inputs import check_unicode, name_type, parse_value

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bard", "bing", "claude"), "assistant"),
    "system": "system",
}
# Names of models and of their output, which some data use as the role.
_MODEL = re.compile(
    r"(?:gpt|chatgpt|claude|(?:meta-?)?llama|qwen|qwq|deepseek|gemini|gemma|mistral|mixtral|phi|kimi|glm|grok|copilot)"
    r"(?:[-_ .\d].*)?|o[134](?:[-_ .].*)?|.*assistant|llm"
    r"|chatbot|language[-_ ]model|agent|answer|response|completion|output|solution"
)
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
TEXT_PARTS = ("text", "input_text", "output_text")
# The start of a list or numpy array of messages that was printed as text.
_WRITTEN = re.compile(r"""\s*(?:array\()?\[\s*\{\s*(?P<q>['"])(?:role|from|content|value)(?P=q)\s*:""")
Messages = list[dict[str, Any]]


def read_messages(messages: Iterable[dict[str, Any]], key: str, where: str) -> Messages:
    """Messages with `role` and `content`, whose content is text.

    Args:
        messages: each with `role` and `content`, or with `from` and `value` (ShareGPT); a content is text or a list of
            parts of text, which are joined.
        key: key of the messages, for errors.
        where: place of the record, for errors.

    Raises:
        InputError: a message lacks role or content, or its content is not text.

    """
    return [_read_message(message, key, where) for message in messages]


def parse_messages(text: str, key: str, where: str) -> list[dict[str, Any]] | None:
    """Parses chat messages written as text, in JSON or as Python prints them, as in tables that cannot hold lists.

    Returns:
        None if the text does not look like such a list, or its objects are no messages.

    Raises:
        InputError: the text looks like messages and cannot be parsed.

    """
    if not (_WRITTEN.match(text) and text.rstrip().endswith(("]", ")"))):
        return None
    found = parse_value(text)
    if found is None:
        raise InputError(
            f"{where}: {key!r} must be text or a list of chat messages, got a list that was printed as text and cannot "
            f"be read back: {text[:60]!r}. Write the data as .jsonl or .parquet, which keep lists."
        )
    return found if is_chat(found) and any(k in m for m in found for k in CONTENT_KEYS) else None


def is_chat(value: Any) -> bool:
    """Whether a value is a list of objects with roles."""
    return bool(value) and isinstance(value, list) and all(isinstance(m, dict) and {*ROLE_KEYS} & {*m} for m in value)


def _read_message(message: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """One message with its other fields, except nulls, which columnar formats put in absent fields."""
    present = {name: value for name, value in message.items() if value is not None}
    role = next((present.pop(name) for name in ROLE_KEYS if name in present), None)
    content = next((present.pop(name) for name in CONTENT_KEYS if name in present), None)
    if isinstance(role, str):
        check_unicode(role, f"{key!r} role", where)
        role = _usual_role(role)
        content = "" if content is None and role == "assistant" else content  # a turn that only calls tools
    if isinstance(content, (list, dict)):
        content = _join_parts(content if isinstance(content, list) else [content], key, where)
    if not (isinstance(role, str) and isinstance(content, str)):
        raise InputError(
            f"{where}: each message of {key!r} must have a 'role' and a 'content' of text, "
            f"got {message!r:.80}. Correct the message."
        )
    return {"role": role, "content": content, **present}


def _join_parts(parts: list[Any], key: str, where: str) -> str:
    """The text of a content that is a list of parts."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            found = f"a part of type {kind!r:.40}" if kind not in TEXT_PARTS else f"a part with {name_type(text)}"
            raise InputError(
                f"{where}: each part of a content of {key!r} must be text, got {found}. Leave out images and "
                "other parts without text."
            )
        texts.append(text)
    return "".join(texts)


def leave_off_answer(messages: Messages, where: str) -> Messages:
    """The messages without the assistant's turns at the end; the same object where there are none.

    Raises:
        InputError: no message is left to answer.

    """
    end = len(messages)
    while end and _is_assistant(messages[end - 1]):
        end -= 1
    if end == len(messages):
        return messages
    if not any(str(message.get("content")).strip() for message in messages[:end] if message.get("role") != "system"):
        raise InputError(
            f"{where}: conversation must have a user's turn before the assistant's at its end, got none. "
            "Remove or complete the record."
        )
    return messages[:end]


def _is_assistant(message: dict[str, Any]) -> bool:
    """Whether a message is the assistant's."""
    return _usual_role(str(message.get("role"))) == "assistant"


def _usual_role(role: str) -> str:
    """The usual name of a role in chat templates; other roles are unchanged."""
    name = role.strip().lower()
    return ROLES.get(name) or ("assistant" if _MODEL.fullmatch(name) else role)
