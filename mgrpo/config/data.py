"""Options of the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mgrpo.config.option import HomeText


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts. Labels are used for metrics only (and for reward `labels`)."""

    train: HomeText = "arithmetic:8192:3-7:0"
    """.jsonl, .json, .parquet, .csv, .tsv or .arrow file, text also as .gz; a folder of them or of `save_to_disk`; a
    hub id, `ID:NAME` for one of its configurations; or `arithmetic:NUM:OPERANDS:SEED`."""
    probe: HomeText | None = None
    """The eval set: labelled prompts for evaluation during training, in the same forms as `train`."""
    prompt_key: str = "prompt"
    """Key of the prompt in a record: text, or a list of chat messages. `a.b` is the key `b` of the object `a`."""
    answer_key: str | None = None
    """Key of the true answer in a record, in the same form. None is `answer`, which may be missing; a given key that no
    record has is an error."""
    split: str = "train"
    """Split of a hub data set, of a saved DatasetDict, or of a folder whose files are named by splits."""
    template: str | None = None
    """Template of a prompt: None leaves prompts as they are, `chat` is the tokenizer's chat template; else a text that
    holds `{prompt}`."""
    template_args: tuple[str, ...] = ()
    """KEY=VALUE ... for the chat template, such as `enable_thinking=false`."""
    overlong: Literal["error", "drop"] = "error"
    """Treatment of prompts that leave no room for a response in the model's context. They are never cut."""
