"""From a run's configuration to prompts as token ids, checked against the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from mgrpo.config import AnswerConfig, Config
from mgrpo.data import Dataset, make_dataset
from mgrpo.grading.extract import make_extractor
from mgrpo.policy import LoadedModel, Tokenizer
from mgrpo.records import InputError, Record, read_records


def load_prompts(config: Config, loaded: LoadedModel | Tokenizer, source: str) -> Dataset:
    """Loads `source` with the options of `config`, record by record; every prompt leaves room for a whole response."""
    room = loaded.context_length - config.rollout.max_new_tokens
    if room < 1:
        raise InputError(
            f"data: --rollout.max-new-tokens must be below the model's context of {loaded.context_length} tokens, "
            f"got {config.rollout.max_new_tokens}."
        )
    records = read_records(
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


def read_answers(records: Iterable[Record], config: AnswerConfig) -> Iterator[Record]:
    r"""Takes the true answer out of a worked solution, where data sets keep it in \boxed{} or after ####."""
    extract = make_extractor(config.extract) if config.extract in ("boxed", "hash") else None
    for record in records:
        if extract is None or record.answer is None:
            yield record
        else:
            yield replace(record, answer=extract(record.answer) or record.answer)


def require_answers(data: Dataset, what: str) -> None:
    """Raises InputError unless every prompt has a true answer."""
    missing = sum(prompt.answer is None for prompt in data.prompts)
    if missing:
        raise InputError(f"data: {what} needs the true answer of every prompt, {missing} of {len(data)} have none.")
