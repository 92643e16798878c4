"""Accuracy of a model on labelled prompts: `python -m mgrpo.evaluate --model.path P --data.probe P --samples K`.

Letters: B prompts, k sampled responses a prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.markup import escape
from rich.table import Table

from mgrpo.config import (
    AnswerConfig,
    DataConfig,
    EngineConfig,
    HomePath,
    ModelConfig,
    RolloutConfig,
    flag,
    stop_problems,
)
from mgrpo.config.option import fields_of, option, range_problems
from mgrpo.config.run import engine_problems
from mgrpo.data.load import check_records, describe_data, load_dataset
from mgrpo.data.prompts import Dataset
from mgrpo.errors import ConfigError, EngineError, InputError
from mgrpo.evaluation.evaluate import Evaluation, evaluate
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.inputs import Problems
from mgrpo.models.files import quiet_transformers, running
from mgrpo.models.load import LoadedModel, load_model
from mgrpo.models.tokenizer import load_tokenizer
from mgrpo.observe.console import GroupingLine
from mgrpo.process.command_line import read_command_line
from mgrpo.process.display import make_console
from mgrpo.process.output import protect_output
from mgrpo.process.threads import limit_threads
from mgrpo.rollout.build import start_engine
from mgrpo.rollout.parity import check_samples
from mgrpo.rollout.stop import make_stop
from mgrpo.types import Sampling, WeightTag

# At most half of the model's context.
MAX_NEW_TOKENS = 2048
# Flags of the first release, whose options are now in the groups of mgrpo.train.
RENAMED = {
    "data": "data.probe",
    **{name: f"data.{name}" for name in ("prompt_key", "answer_key", "split", "template", "template_args", "overlong")},
    **{name: f"answer.{name}" for name in ("extract", "label_extract", "equivalence", "workers")},
    **{name: f"rollout.{name}" for name in ("temperature", "top_p", "max_new_tokens", "stop")},
    "batch_size": "engine.batch_size",
}
# Options of these groups that belong to training; a value other than the default is an error.
TRAINING = ("data.train", *(f"rollout.{name}" for name in ("num_prompts", "num_policy", "num_momentum")))
TRAINING += ("rollout.truncated", "rollout.parity_every", "rollout.ahead", "engine.tensor_parallel")


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """Prints greedy accuracy, avg@K, maj@K and pass@K of a model with standard errors over prompts.

    The prompts are those of --data.probe. The groups of flags are those of mgrpo.train; --data.train, the numbers of
    rollouts and other options of training must be left out.
    """

    samples: int = option(8, least=1)
    """K, the number of sampled responses a prompt."""
    seed: int = option(0, least=0, below=2**31)
    """Seed of the samples."""
    limit: int | None = option(None, least=1)
    """Evaluate only the first LIMIT records."""
    out: HomePath | None = None
    """JSON file for the result and these settings; None writes nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    # Below the usual training temperature of 1, but with the variety that maj@K and pass@K need.
    rollout: RolloutConfig = field(
        default_factory=lambda: RolloutConfig(temperature=0.8, max_new_tokens=MAX_NEW_TOKENS)
    )
    engine: EngineConfig = field(default_factory=EngineConfig)


def parse(arguments: Sequence[str]) -> EvaluateArgs:
    """Parses the flags; raises ConfigError with every problem."""
    line = read_command_line(
        EvaluateArgs, arguments, command="evaluate", prog="python -m mgrpo.evaluate", renamed=RENAMED
    )
    assert line.options
    if line.problems:
        raise ConfigError(line.with_others(_problems(line.options)))
    return line.options


def _problems(args: EvaluateArgs) -> list[str]:
    """A message for each value that is out of range or contradicts another."""
    usual = {name: value for name, value, _ in fields_of(EvaluateArgs())}
    problems = range_problems(args) + stop_problems(args.rollout.stop) + engine_problems(args.engine)
    problems += [
        f"config: {flag(name)} must be left out, it belongs to training, got {value}."
        for name, value, _ in fields_of(args)
        if name in TRAINING and value != usual[name]
    ]
    if args.data.probe is None:
        problems.append("config: --data.probe must name the labelled prompts, got none.")
    if len(args.engine.servers) > 1 or args.engine.placement == "two-engines":
        problems.append("config: --engine.placement must be one-engine, or server with one server.")
    if args.out is not None and (args.out.is_dir() or not args.out.absolute().parent.is_dir()):
        problems.append(f"config: --out must be a file in an existing folder, got {args.out}. Make the folder first.")
    return [f"evaluate: {problem.removeprefix('config: ')}" for problem in problems]


def run(args: EvaluateArgs) -> Evaluation:
    """Loads model and data and evaluates; raises InputError or ConfigError for bad input."""
    _refuse_inputs(args)
    extract = make_extractor(args.answer.extract)
    loaded = load_model(args.model)
    stop = make_stop(args.rollout.stop, args.data.template, loaded.tokenizer)
    max_new_tokens = args.rollout.max_new_tokens
    if max_new_tokens == MAX_NEW_TOKENS:
        max_new_tokens = min(max_new_tokens, loaded.context_length // 2)
    dataset = _load_data(args, loaded, max_new_tokens)
    if stop and args.rollout.stop is None:
        note = f"responses end at {stop.texts[0]!r}, by --data.template; --rollout.stop '' turns it off."
        print(f"evaluate: {note}", file=sys.stderr)
    longest = max(len(prompt.ids) for prompt in dataset.prompts) + max_new_tokens
    sampling = Sampling(
        temperature=args.rollout.temperature, top_p=args.rollout.top_p, max_new_tokens=max_new_tokens, seed=args.seed
    )
    tag, answer = WeightTag("policy", 0), args.answer
    with (
        contextlib.closing(start_engine(loaded, args.engine, stop=stop, max_length=longest)) as engine,
        AnswerChecker(mode=answer.equivalence, timeout_s=answer.timeout_s, num_workers=answer.workers) as checker,
    ):
        engine.update_weights(loaded.model.state_dict(), tag)
        with running(args.model.path, "generate a token"):  # reports a model that cannot
            engine.generate([dataset.prompts[0].ids], 1, Sampling(max_new_tokens=1), tag)
        checker.watch = GroupingLine(make_console(stderr=True))
        check = partial(check_samples, engine, loaded, [prompt.ids for prompt in dataset.prompts], sampling)
        about = {"samples": args.samples, "tag": tag, "stop": stop, "check": check}
        return evaluate(engine, loaded, dataset, extract, checker, sampling, **about)


def _refuse_inputs(args: EvaluateArgs) -> None:
    """Raises ConfigError with all that is wrong with options, tokenizer and, if anything is, also with the data."""
    problems = Problems(_problems(args))
    problems.attempt(lambda: make_extractor(args.answer.extract))
    problems.attempt(lambda: load_tokenizer(args.model))
    if problems and (probe := args.data.probe):
        problems.attempt(lambda: check_records(probe, args.data, args.answer, need_answer=True))
    if problems:
        raise ConfigError(problems)


def _load_data(args: EvaluateArgs, loaded: LoadedModel, max_new_tokens: int) -> Dataset:
    """Loads the labelled prompts and prints warnings about them to stderr."""
    room, source = loaded.context_length - max_new_tokens, str(args.data.probe)
    dataset = load_dataset(
        source, args.data, args.answer, loaded, max_prompt_tokens=room, need_answer=True, limit=args.limit
    )
    for message in describe_data(dataset):
        print(f"evaluate: {message}", file=sys.stderr)
    if dataset.num_overlong:
        print(f"evaluate: {dataset.num_overlong} overlong prompts were left out.", file=sys.stderr)
    return dataset


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """A result as data for JSON; NaN becomes None."""
    data = dataclasses.asdict(evaluation)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in data.items()}


def make_table(evaluation: Evaluation, title: str) -> Table:
    """A result as a table for the terminal."""
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
    """Runs the command line and returns its exit code.

    It is 0, 2 for bad input, 5 for an engine whose log-probs differ from the model's, or 6 if --out cannot be written.
    """
    protect_output()
    quiet_transformers()
    limit_threads()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        args = parse(arguments)
        evaluation = run(args)
    except (InputError, ConfigError, EngineError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    make_console().print(make_table(evaluation, f"{args.model.path} on {args.data.probe}"))
    if evaluation.unparseable_share > 0.5:
        print(
            "Most responses have no answer: check --answer.extract, --data.template and --rollout.max-new-tokens.",
            file=sys.stderr,
        )
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
