"""Accuracy of a model on labelled prompts: `python -m mgrpo.evaluate --model.path P --data P --samples K`.

Letters: B prompts, k sampled responses a prompt.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mgrpo.config import AnswerConfig, HomePath, HomeText, ModelConfig, stop_problems
from mgrpo.data.load import answers_of, describe_data, read_answers, require_embedded
from mgrpo.data.prompts import make_dataset
from mgrpo.data.records import load_records
from mgrpo.errors import ConfigError, EngineError, InputError
from mgrpo.evaluation.evaluate import Evaluation, evaluate
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.models.files import quiet_transformers, running
from mgrpo.models.load import load_model
from mgrpo.observe.console import GroupingLine
from mgrpo.process.output import protect_output
from mgrpo.process.threads import limit_threads
from mgrpo.rollout.samples import check_samples
from mgrpo.rollout.stop import make_stop
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.types import Sampling, WeightTag

MAX_DEFAULT_NEW_TOKENS = 2048
# Groups of flags of mgrpo.train whose names this command has alone.
_TRAIN_FLAG = re.compile(r"--(?:data|answer|rollout)\.")


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """Prints greedy accuracy, avg@K, maj@K and pass@K of a model with standard errors over prompts."""

    data: HomeText
    """Labelled prompts, in any form that `mgrpo.train --data.train` takes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model: any transformers folder, a run's checkpoints/step_N/policy and momentum among them."""
    samples: int = 8
    """K, sampled responses a prompt."""
    prompt_key: str = "prompt"
    """Key of the prompt in a record; `a.b` is the key `b` of the object `a`."""
    answer_key: str = "answer"
    """Key of the true answer in a record, likewise."""
    split: str = "train"
    """Split of a hub data set, of a saved DatasetDict, or of a folder whose files are named by splits."""
    template: str | None = None
    """None takes prompts as they are, `chat` the tokenizer's chat template; else a text that holds `{prompt}`."""
    template_args: tuple[str, ...] = ()
    """KEY=VALUE ... for the chat template, such as `enable_thinking=false`."""
    extract: str = "boxed"
    """`boxed` (last \\boxed{} with content), `hash` (after the last ####), `last-number`, `regex:PATTERN` (last match,
    group 1). What stands before the end of a thought (`</think>`) is not read."""
    label_extract: str = "auto"
    """How the true answer is read from a label: `auto` (last box, else the line after ####, else what "the answer
    is" at its end, else the label itself), `plain` (the label itself), `boxed`, `hash`, `last-number`,
    `regex:PATTERN`."""
    equivalence: Literal["math", "exact"] = "math"
    """`math` decides by math-verify in worker processes, `exact` by normalised text alone."""
    workers: int | None = None
    """Processes that compare answers; as many as this process may use cores, at most 8, when None."""
    temperature: float = 0.8
    """Of the samples. Below the usual training temperature of 1, yet with the variety that maj@K and pass@K need."""
    top_p: float = 1.0
    """Nucleus sampling of the samples; 1 is off."""
    max_new_tokens: int | None = None
    """Longest response in tokens; half of the model's context, at most 2048, when None."""
    stop: tuple[str, ...] | None = None
    """Texts that end a response, the first of them; `\\n` stands for a newline. The answer is read from what is before.
    None takes the label ahead of the prompt in a `template` of text, as '\\nQuestion:'; '' is none."""
    seed: int = 0
    """Seed of the samples."""
    limit: int | None = None
    """Take only the first LIMIT records."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with prompts that leave no room for a response in the model's context."""
    batch_size: int = 256
    """Most sequences decoded together; bounds the KV cache."""
    out: HomePath | None = None
    """JSON file for the result and these settings; nothing is written when None."""


def _check(args: EvaluateArgs) -> None:
    """Raises ConfigError with every value out of range."""
    counts = ("samples", "max_new_tokens", "limit", "batch_size", "workers")
    requirements = [
        *((name, getattr(args, name) is None or getattr(args, name) >= 1, "at least 1") for name in counts),
        ("temperature", 0 < args.temperature < math.inf, "above 0 and finite"),
        ("top_p", 0 < args.top_p <= 1, "in (0, 1]"),
        ("seed", 0 <= args.seed < 2**31, "in [0, 2^31)"),
    ]
    problems = [
        f"evaluate: --{name.replace('_', '-')} must be {expected}, got {getattr(args, name)}."
        for name, valid, expected in requirements
        if not valid
    ]
    problems += stop_problems(args.stop, "evaluate: --stop")
    if args.out is not None and (args.out.is_dir() or not args.out.absolute().parent.is_dir()):
        problems.append(f"evaluate: --out must be a file in an existing folder, got {args.out}. Make the folder first.")
    if problems:
        raise ConfigError(problems)


def run(args: EvaluateArgs) -> Evaluation:
    """Loads everything that `args` names and evaluates; raises InputError or ConfigError for bad input."""
    _check(args)
    answer = AnswerConfig(extract=args.extract, label_extract=args.label_extract, equivalence=args.equivalence)
    extract = make_extractor(answer.extract)
    records = load_records(
        args.data, prompt_key=args.prompt_key, answer_key=args.answer_key, split=args.split, need_answer=True
    )
    loaded = load_model(args.model)
    stop = make_stop(args.stop, args.template, loaded.tokenizer)
    max_new_tokens = args.max_new_tokens or min(loaded.context_length // 2, MAX_DEFAULT_NEW_TOKENS)
    dataset = make_dataset(
        read_answers(records[: args.limit], answers_of(args.data, answer)),
        loaded.tokenizer,
        template=args.template,
        max_prompt_tokens=loaded.context_length - max_new_tokens,
        overlong=args.overlong,
        source=args.data,
        template_args=args.template_args,
    )
    if stop and args.stop is None:
        print(
            f"evaluate: responses end at {stop.texts[0]!r}, by --template; --stop '' lets them go on.", file=sys.stderr
        )
    for message in describe_data(dataset):
        print(f"evaluate: {message}", file=sys.stderr)
    require_embedded(dataset, loaded, args.data)
    if dataset.num_overlong:
        print(f"evaluate: {dataset.num_overlong} overlong prompts were left out.", file=sys.stderr)
    engine = TransformersEngine(
        loaded.model,
        eos_ids=loaded.eos_ids,
        pad_id=loaded.pad_id,
        dtype=loaded.dtype,
        batch_size=args.batch_size,
        stop=stop,
    )
    tag = WeightTag("policy", 0)
    engine.update_weights(loaded.model.state_dict(), tag)
    with running(args.model.path, "generate a token"):
        first = [dataset.prompts[0].ids]
        engine.generate(first, 1, Sampling(max_new_tokens=1), tag)
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p, max_new_tokens=max_new_tokens, seed=args.seed)
    with AnswerChecker(mode=answer.equivalence, num_workers=args.workers) as checker:
        checker.watch = GroupingLine(Console(stderr=True))
        check = partial(check_samples, engine, loaded, [prompt.ids for prompt in dataset.prompts], sampling)
        about = {"samples": args.samples, "tag": tag, "stop": stop, "check": check}
        return evaluate(engine, loaded, dataset, extract, checker, sampling, **about)


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Turns a result into JSON-able data; NaN becomes None."""
    data = dataclasses.asdict(evaluation)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in data.items()}


def make_table(evaluation: Evaluation, title: str) -> Table:
    """Lays a result out for the terminal."""
    e, k = evaluation, evaluation.samples
    table = Table(
        title=escape(title), caption=f"{e.num_prompts} prompts, {k} samples each, ± standard error over prompts"
    )
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("±", justify="right")
    rows: list[tuple[str, float | None, float | None]] = [
        ("greedy", e.greedy, e.greedy_se),
        (f"avg@{k}", e.avg_at_k, e.avg_at_k_se),
        (f"maj@{k}", e.maj_at_k, e.maj_at_k_se),
        (f"pass@{k}", e.pass_at_k, e.pass_at_k_se),
        *((f"pass@{j}, unbiased", share, None) for j, share in e.pass_at.items() if 1 < j < k),
        ("without answer", e.unparseable_share, None),
        ("truncated", e.truncated_share, None),
    ]
    for name, value, error in rows:
        if value is not None:
            table.add_row(name, f"{value:.3f}", "" if error is None or math.isnan(error) else f"{error:.3f}")
    table.add_row("mean length, tokens", f"{e.mean_length:.1f}", "")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, or 2 for bad input, 5 for a model that the engine can not decode rightly, and 6
    where --out can not be written.
    """
    protect_output()
    quiet_transformers()
    limit_threads()
    args = tyro.cli(EvaluateArgs, args=argv, prog="python -m mgrpo.evaluate")
    try:
        evaluation = run(args)
    except (InputError, ConfigError) as error:
        print(_TRAIN_FLAG.sub("--", str(error)), file=sys.stderr)
        return 2
    except EngineError as error:
        print(error, file=sys.stderr)
        return 5
    Console().print(make_table(evaluation, f"{args.model.path} on {args.data}"))
    if evaluation.unparseable_share > 0.5:
        print("Most responses hold no answer: check --extract, --template and --max-new-tokens.", file=sys.stderr)
    if args.out is not None:
        settings = {k: v for k, v in dataclasses.asdict(args).items() if k != "out"}
        try:
            args.out.write_text(json.dumps({"evaluation": to_dict(evaluation), "settings": settings}, indent=2) + "\n")
        except OSError as error:
            print(f"evaluate: {args.out} could not be written: {error}.", file=sys.stderr)
            return 6
    return 0


if __name__ == "__main__":
    sys.exit(main())
