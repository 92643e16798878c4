"""From a run's configuration to prompts as token ids, checked against the model."""

from __future__ import annotations

from dataclasses import replace

from mgrpo.answers import make_extractor
from mgrpo.config import AnswerConfig, Config
from mgrpo.data import Dataset, make_dataset
from mgrpo.policy import LoadedModel, Tokenizer
from mgrpo.records import InputError, Record, load_records


def load_prompts(config: Config, loaded: LoadedModel | Tokenizer, source: str) -> Dataset:
    """Loads `source` with the options of `config`; every prompt leaves room for a whole response."""
    room = loaded.context_length - config.rollout.max_new_tokens
    if room < 1:
        raise InputError(
            f"data: --rollout.max-new-tokens must be below the model's context of {loaded.context_length} tokens, "
            f"got {config.rollout.max_new_tokens}."
        )
    records = load_records(
        source, prompt_key=config.data.prompt_key, answer_key=config.data.answer_key, split=config.data.split
    )
    return make_dataset(
        read_answers(records, config.answer),
        loaded.tokenizer,
        template=config.data.template,
        max_prompt_tokens=room,
        overlong=config.data.overlong,
        source=source,
    )


def read_answers(records: list[Record], config: AnswerConfig) -> list[Record]:
    r"""Takes the true answer out of a worked solution, where data sets keep it in \boxed{} or after ####."""
    if config.extract not in ("boxed", "hash"):
        return records
    extract = make_extractor(config.extract)
    return [
        replace(record, answer=extract(record.answer) or record.answer) if record.answer is not None else record
        for record in records
    ]


def require_answers(data: Dataset, what: str) -> None:
    """Raises InputError unless every prompt has a true answer."""
    missing = sum(prompt.answer is None for prompt in data.prompts)
    if missing:
        raise InputError(f"data: {what} needs the true answer of every prompt, {missing} of {len(data)} have none.")
