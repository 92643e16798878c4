"""Finds the decoder families of transformers that train with the embedded engine: `python -m bench.models`.

Each family is a tiny random model (bench/training/families.py) in a folder, with which the trainer takes two steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.training.families import FAMILIES, tiny_config, tiny_model
from mgrpo.config import (
    AnswerConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    MonitorConfig,
    RolloutConfig,
)
from mgrpo.errors import EngineError, InputError
from mgrpo.models.files import quiet_transformers
from mgrpo.rollout.decoding import WAYS
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "models.md"
SPECIAL = {"<s>": "bos_token", "</s>": "eos_token", "<pad>": "pad_token"}
PROMPTS = ("1+1", "What is 2+3?", "Add 12 and 33.", "4+5=")
STEPS = 2
# Scale of the matrices, because fresh weights give nearly flat logits.
GAIN = 3.0
# Largest deviation from 1 of the mean importance weight between engine and trainer, in fp32.
MAX_TIS_ERROR = 1e-3
MAX_REASON = 240  # characters


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one family."""

    family: str
    built: bool
    way: str = ""  # way of decoding, if the family trains
    gap: float = 0.0  # between engine and trainer, nats a token
    reason: str = ""  # of a failure

    @property
    def trains(self) -> bool:
        """Whether every step succeeded with correct rollouts."""
        return self.built and not self.reason


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{role: token for token, role in SPECIAL.items()}, model_max_length=128
    )


def make_config(model: Path, data: Path) -> Config:
    """Two steps on a few prompts of unequal length."""
    return Config(
        preset="models",
        steps=STEPS,
        data=DataConfig(train=str(data)),
        model=ModelConfig(
            path=str(model),
            device="cpu",
        ),
        rollout=RolloutConfig(num_prompts=3, num_policy=2, num_momentum=2, max_new_tokens=6),
        answer=AnswerConfig(extract="regex:(.)", equivalence="exact"),
        monitor=MonitorConfig(retention_every=0),
        eval=EvalConfig(every=0),
        checkpoint=CheckpointConfig(every=0),
        log=LogConfig(backends=(), kl_initial_every=0),
    )


def try_family(family: str, folder: Path, tokenizer: PreTrainedTokenizerFast, data: Path) -> Outcome:
    """Builds, saves, loads and trains a family."""
    roles = ("pad_token_id", "eos_token_id", "bos_token_id")
    try:
        model = tiny_model(tiny_config(family, **{role: getattr(tokenizer, role) for role in roles}), gain=GAIN)
        model.save_pretrained(folder / family)
    except Exception as error:
        return Outcome(family=family, built=False, reason=_one_line(error))
    tokenizer.save_pretrained(folder / family)
    try:
        trainer = Trainer(make_config(folder / family, data))
    except (InputError, EngineError) as error:
        return Outcome(family=family, built=True, reason=_one_line(error))
    try:
        rows = list(trainer.train(STEPS))
        assert isinstance(trainer.engine, TransformersEngine)
        way = trainer.engine.way.__name__
    except Exception as error:
        return Outcome(family=family, built=True, reason=_one_line(error))
    finally:
        trainer.close()
    return Outcome(family=family, built=True, way=way, gap=max(row["logprob_gap"] for row in rows), reason=_fault(rows))


def _fault(rows: Sequence[dict[str, Any]]) -> str:
    """The first fault in the metrics of a finished run; "" if there is none."""
    for row in rows:
        if row["nonfinite_steps"]:
            return "its loss or gradient is not finite"
        if row["tis_mean"] is None or row["parity_policy"] is None:
            return "no trajectory trained"
        if not abs(row["tis_mean"] - 1) <= MAX_TIS_ERROR:
            return f"tis_mean is {row['tis_mean']:.3f} at step {row['step']}"
    return ""


def _shorten(text: str) -> str:
    """A reason, cut at MAX_REASON characters."""
    return text if len(text) <= MAX_REASON else text[:MAX_REASON].rpartition(" ")[0] + " ..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def try_all(families: Sequence[str] = FAMILIES) -> Iterator[Outcome]:
    """Tries the families, one after the other."""
    quiet_transformers()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    tokenizer = make_tokenizer()
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = Path(folder) / "data.jsonl"
            data.write_text("".join(json.dumps({"prompt": prompt, "answer": "2"}) + "\n" for prompt in PROMPTS))
            for family in families:
                with contextlib.redirect_stderr(io.StringIO()):
                    outcome = try_family(family, Path(folder), tokenizer, data)
                shutil.rmtree(Path(folder) / family, ignore_errors=True)
                yield replace(outcome, reason=_shorten(outcome.reason.replace(f"{folder}/", "")))
    finally:
        transformers.logging.set_verbosity(verbosity)


HEAD = """# Models

This page lists the model families of transformers that can be trained. `python -m bench.models` writes it; a test
trains every family again and fails where one no longer trains.

Each family of transformers {version} that AutoModelForCausalLM knows was built as a random model of a few thousand
weights on a CPU in fp32, saved, loaded, and trained for {steps} steps with the embedded engine. A family counts as
trained if every step has a finite loss, the engine's log-probs equal the trainer's, and the mean importance weight is
within {error:g} of 1. Of {num_built} families that could be built, {num_trained} train ({share:.0%}).
[rollouts.md](rollouts.md#ways-of-decoding) explains the ways of decoding. Random weights do not show how well a model
learns.
"""


def render(outcomes: Sequence[Outcome]) -> str:
    """The document."""
    trained, built = [o for o in outcomes if o.trains], [o for o in outcomes if o.built]
    text = HEAD.format(
        version=transformers.__version__,
        steps=STEPS,
        error=MAX_TIS_ERROR,
        num_built=len(built),
        num_trained=len(trained),
        share=len(trained) / len(built),
    )
    ways = {way.__name__: [o.family for o in trained if o.way == way.__name__] for way in WAYS}
    text += "\n## Train\n\n| way | families |\n|---|---|\n"
    text += "".join(f"| {way.lower()} | {', '.join(families)} |\n" for way, families in ways.items())
    for title, chosen in (
        ("Do not train", [o for o in built if not o.trains]),
        ("No tiny model could be built", [o for o in outcomes if not o.built]),
    ):
        text += f"\n## {title}\n\n| family | reason |\n|---|---|\n"
        text += "".join(f"| {o.family} | {o.reason.replace('|', '/')} |\n" for o in chosen)
    return text


def read_table(text: str) -> dict[str, str]:
    """Way of decoding of each trainable family, from the document."""
    part = text.partition("## Train\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")][1:]
    return {family: way for way, families in rows for family in families.split(", ")}


def main(argv: Sequence[str] | None = None) -> int:
    """Tries the given families; without any, tries all and writes the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="try only these, and do not write the document")
    chosen = parser.parse_args(argv).families
    torch.set_num_threads(1)
    outcomes, start = [], time.process_time()
    for outcome in try_all(chosen or FAMILIES):
        outcomes.append(outcome)
        print(f"{outcome.family:24}{outcome.way or '-':12}{outcome.gap:9.1e}  {outcome.reason}", flush=True)
    num_trained, num_built = sum(o.trains for o in outcomes), sum(o.built for o in outcomes)
    print(f"{num_trained} of {num_built} train, {time.process_time() - start:.0f} s of processor time")
    if not chosen:
        TABLE.write_text(render(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
