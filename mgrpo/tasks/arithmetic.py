"""The built-in task: chained two-digit additions and subtractions modulo 100, graded by the number of operands.

A prompt is `51-38+61=`; a worked response copies the operands and writes every partial result,
`51-38=13;13+61=74#74`, and the answer follows the `#`. Everything runs offline: problems are generated
from a seed, the tokenizer has one token a character, and the base model is small enough to ship.

`python -m mgrpo.tasks.arithmetic base --out DIR` makes the shipped base model from scratch (about 10 minutes on
2 cores); `python -m mgrpo.tasks.arithmetic export --out FILE.jsonl` writes problems for other trainers.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mgrpo.config import HomePath
from mgrpo.process.output import protect_output
from mgrpo.process.threads import limit_threads

CHARACTERS = "0123456789+-=;#"
PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem: `prompt` as the model reads it, and the true `answer` of two digits."""

    prompt: str
    answer: str
    operands: int


def make_problem(rng: random.Random, operands: int) -> Problem:
    """Draws one problem with the given number of operands (2 or more)."""
    total = rng.randrange(100)
    prompt = f"{total:02d}"
    for _ in range(operands - 1):
        sign, value = rng.choice("+-"), rng.randrange(100)
        prompt += f"{sign}{value:02d}"
        total = (total + value if sign == "+" else total - value) % 100
    return Problem(prompt=prompt + "=", answer=f"{total:02d}", operands=operands)


def make_problems(num: int, *, operands: tuple[int, ...], seed: int) -> list[Problem]:
    """Draws `num` problems with the operand counts in turn, so that every level has the same share."""
    rng = random.Random(seed)
    problems = [make_problem(rng, operands[i % len(operands)]) for i in range(num)]
    rng.shuffle(problems)
    return problems


def demonstrate(problem: Problem, rng: random.Random, *, error_rate: float, copy_operands: bool = True) -> str:
    """Writes a worked response whose partial results are each wrong with probability `error_rate` and used further."""
    terms = problem.prompt[:-1]
    total, steps = int(terms[:2]), []
    for i in range(2, len(terms), 3):
        sign, value = terms[i], int(terms[i + 1 : i + 3])
        result = (total + value if sign == "+" else total - value) % 100
        if rng.random() < error_rate:
            result = (result + rng.randrange(1, 100)) % 100
        steps.append(f"{total:02d}{sign}{value:02d}={result:02d}" if copy_operands else f"{result:02d}")
        total = result
    return ";".join(steps) + f"#{total:02d}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer, with one token a character, `<pad>` and `<eos>`."""
    vocab = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_max_length=256, padding_side="left"
    )


def make_model(seed: int = 0, head_dim: int = 24) -> Qwen3ForCausalLM:
    """Builds a randomly initialised Qwen3 of 2 layers and width 96, with a quarter of a million parameters.

    Some engines do not support a head width of 24; `builtin:arithmetic32` has 32.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=2 + len(CHARACTERS),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


@dataclass(frozen=True, kw_only=True)
class BaseArgs:
    """Trains the base model from scratch on flawed demonstrations and saves it with its tokenizer."""

    out: HomePath
    """Folder to write."""
    operands: tuple[int, ...] = (2, 3, 4, 5)
    """Operand counts of the demonstrations."""
    error_rate: float = 0.08
    """Probability that a partial result of a demonstration is wrong."""
    copy_operands: bool = True
    """Whether demonstrations copy the operands beside each partial result."""
    guess: tuple[int, ...] = ()
    """Operand counts whose demonstrations are guesses: a random answer without partial results."""
    steps: int = 2500
    """Optimiser steps."""
    batch: int = 192
    """Demonstrations a step."""
    lr: float = 3e-3
    """Peak AdamW learning rate; linear warm-up over 100 steps, then cosine to zero."""
    head_dim: int = 24
    """Width of an attention head; the shipped models have 24 and 32."""
    seed: int = 0
    """Seed of weights and demonstrations."""


def make_base(args: BaseArgs) -> None:
    """Trains and saves the base model described by `args`."""
    tokenizer, model = make_tokenizer(), make_model(args.seed, args.head_dim)
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    warmup, schedules = 100, torch.optim.lr_scheduler
    rising = schedules.LinearLR(optimizer, 1e-3, total_iters=warmup)
    falling = schedules.CosineAnnealingLR(optimizer, max(args.steps - warmup, 1))
    schedule = schedules.SequentialLR(optimizer, [rising, falling], [warmup])
    start = time.perf_counter()
    for step in range(args.steps):
        rows = []
        for i in range(args.batch):
            problem = make_problem(rng, args.operands[i % len(args.operands)])
            if problem.operands in args.guess:
                response = f"#{rng.randrange(100):02d}"
            else:
                response = demonstrate(problem, rng, error_rate=args.error_rate, copy_operands=args.copy_operands)
            rows.append((tokenizer.encode(problem.prompt), [*tokenizer.encode(response), tokenizer.eos_token_id]))
        width = max(len(prompt) + len(response) for prompt, response in rows)
        tokens = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in rows])
        labels = torch.tensor([[-100] * len(p) + r + [-100] * (width - len(p) - len(r)) for p, r in rows])
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Writes problems as JSONL records with the keys `prompt`, `answer` and `operands`."""

    out: HomePath
    """File to write."""
    num: int = 4096
    """Number of problems."""
    operands: tuple[int, ...] = (3, 4, 5, 6, 7)
    """Operand counts, each with the same share."""
    seed: int = 0
    """Seed of the problems."""


def export(args: ExportArgs) -> None:
    """Writes the problems described by `args`."""
    problems = make_problems(args.num, operands=args.operands, seed=args.seed)
    args.out.write_text("".join(json.dumps(vars(problem)) + "\n" for problem in problems))


def main() -> None:
    """Runs the `base` or the `export` command."""
    protect_output()
    limit_threads()
    args = tyro.cli(
        Annotated[BaseArgs, tyro.conf.subcommand("base")] | Annotated[ExportArgs, tyro.conf.subcommand("export")],
        description=__doc__,
    )
    make_base(args) if isinstance(args, BaseArgs) else export(args)


if __name__ == "__main__":
    main()
