"""Chat messages in every form that data sets have, brought to `role` and `content`, without the answer at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mgrpo.inputs import InputError, check_unicode, name_type

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bard", "bing", "claude"), "assistant"),
    "system": "system",
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
TEXT_PARTS = ("text", "input_text", "output_text")
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


def _read_message(message: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """One message; other fields are kept, but for nulls, with which columnar formats fill what a message lacks."""
    present = {name: value for name, value in message.items() if value is not None}
    role = next((present.pop(name) for name in ROLE_KEYS if name in present), None)
    content = next((present.pop(name) for name in CONTENT_KEYS if name in present), None)
    if isinstance(role, str):
        check_unicode(role, f"{key!r} role", where)
        role = ROLES.get(role.strip().lower(), role)
        content = "" if content is None and role == "assistant" else content  # of a turn that only calls tools
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
                f"{where}: each part of a content of {key!r} must be text, got {found}. Leave out images and other "
                "parts that are no text."
            )
        texts.append(text)
    return "".join(texts)


def leave_off_answer(messages: Messages, where: str) -> Messages:
    """The messages without the assistant's turns at the end; the same object where there are none.

    Raises:
        InputError: nothing is left that could be answered.

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
    """Whether a message is the model's."""
    return ROLES.get(str(message.get("role")).strip().lower()) == "assistant"
