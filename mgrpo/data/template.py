"""Renders records through a template, or through the tokenizer's chat template and its arguments."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from typing import Any

from mgrpo.data.records import Record
from mgrpo.errors import InputError
from mgrpo.inputs import check_unicode, list_names, nearest

PLACEHOLDER = "{prompt}"
# Variables of a template besides the arguments of apply_chat_template and the special tokens.
_OWN = ("messages", "bos_token", "eos_token", "raise_exception", "strftime_now")


def check_template(template: str | None, source: str) -> str | None:
    """Returns the template with its newlines; raises InputError unless it has one placeholder."""
    if template is None or template == "chat":
        return template
    check_unicode(template, "template", source)
    if template.count(PLACEHOLDER) != 1:
        raise InputError(
            f"{source}: template must hold {PLACEHOLDER} exactly once or be 'chat', got {template!r}. "
            "Correct --data.template."
        )
    return template.replace("\\n", "\n")


def read_arguments(given: Sequence[str], tokenizer: Any, source: str) -> dict[str, Any]:
    """Arguments of the tokenizer's chat template.

    Args:
        given: each `KEY=VALUE`; a value is parsed as JSON (true, null, 5, "5", [1]), or else is text.
        tokenizer: a transformers tokenizer.
        source: name of the data in messages.

    Raises:
        InputError: an argument has no `=`, is given twice, or is not read by the template.

    """
    arguments: dict[str, Any] = {}
    known = _variables(tokenizer) if given and tokenizer.chat_template else None
    for item in given:
        key, equals, value = item.partition("=")
        if not (equals and key.isidentifier()) or key in arguments:
            expected = "given once" if key in arguments else "KEY=VALUE"
            raise InputError(f"{source}: each of --data.template-args must be {expected}, got {item!r}. Correct it.")
        if known is not None and key not in known:
            close = nearest(key, known)
            hint = f" Did you mean {close}?" if close else f" It reads {list_names(sorted(known))}."
            raise InputError(
                f"{source}: --data.template-args must name variables that the tokenizer's chat template reads, "
                f"got {key!r}.{hint} Correct or remove it."
            )
        check_unicode(value, "--data.template-args", source)
        arguments[key] = _read_value(value)
    return arguments


def _read_value(text: str) -> Any:
    """The value of JSON text, else the text; True, False and None are read too."""
    text = {"True": "true", "False": "false", "None": "null"}.get(text, text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _variables(tokenizer: Any) -> set[str]:
    """Variables of the chat template that a caller may set."""
    from jinja2 import Environment, TemplateError, meta

    text = tokenizer.get_chat_template()
    own = {*inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map, *_OWN}
    # Tags of transformers that plain Jinja does not know.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
    try:
        names = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))
    except TemplateError:
        names = set(re.findall(r"[A-Za-z_]\w*", text))
    return names - own


def render(record: Record, tokenizer: Any, template: str | None, arguments: dict[str, Any]) -> tuple[str, bool]:
    """Returns the text that the model reads, and whether a chat template wrote its special tokens into it."""
    prompt = record.prompt
    if isinstance(prompt, str) and template != "chat":
        if arguments:
            raise InputError(
                f"{record.origin}: --data.template-args must come with a chat template, got a prompt of text without "
                "one. Set --data.template chat or leave them out."
            )
        return (prompt if template is None else template.replace(PLACEHOLDER, prompt)), False
    if template not in (None, "chat"):
        raise InputError(
            f"{record.origin}: template must be 'chat' for chat messages, got {template!r}. Set --data.template chat."
        )
    if not tokenizer.chat_template:
        raise InputError(
            f"{record.origin}: tokenizer must have a chat template, got none. "
            "Use an instruct model's tokenizer or a --data.template with {prompt} and prompts of text."
        )
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments), True
    except (TemplateError, TypeError, ValueError) as error:
        message = f"{record.origin}: the tokenizer's chat template refused the messages: {error}. Correct the record."
        raise InputError(message) from error
