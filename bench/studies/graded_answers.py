"""Compares our grades of published graded answers: `python -m bench.studies.graded_answers [FOLDER]`.

FOLDER holds `gsm8k_graded_solutions.jsonl`, `qwen25_math_graded_samples.jsonl` and `math500_test.jsonl`, or some of
them; the default is $MGRPO_DATA, else a folder of data beside the repository. The sets are not part of the repository.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor

GSM8K_SPEC = r"regex:A: *(.*)"


@dataclass(frozen=True, kw_only=True)
class Graded:
    """A model's answer, the true one, and the published grade."""

    place: str
    answer: str | None
    truth: str | None
    correct: bool


def find_data() -> Path:
    """The folder of the graded sets, which may not exist."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("MGRPO_DATA") or beside)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_gsm8k(folder: Path) -> Iterator[Graded]:
    """Solutions of four models, with the answer after "A:"."""
    extract = make_extractor(GSM8K_SPEC)
    for number, row in enumerate(_read_lines(folder / "gsm8k_graded_solutions.jsonl")):
        truth = extract(row["ground_truth"])
        for solution in row["solutions"]:
            yield Graded(
                place=f"question {number}, {solution['model']}",
                answer=extract(solution["text"]),
                truth=truth,
                correct=solution["published_correct"],
            )


def read_math_samples(folder: Path) -> Iterator[Graded]:
    """Eight samples a question, with the answer in a box."""
    extract = make_extractor("boxed")
    for row in _read_lines(folder / "qwen25_math_graded_samples.jsonl"):
        for number, sample in enumerate(row["samples"]):
            yield Graded(
                place=f"idx {row['idx']}, sample {number}",
                answer=extract(sample["text"]),
                truth=row["answer"],
                correct=sample["published_correct"],
            )


def read_math500(folder: Path) -> Iterator[Graded]:
    """Worked solutions, with the true answer in a box."""
    extract = make_extractor("boxed")
    for row in _read_lines(folder / "math500_test.jsonl"):
        yield Graded(place=row["unique_id"], answer=extract(row["solution"]), truth=row["answer"], correct=True)


SETS: dict[str, Callable[[Path], Iterator[Graded]]] = {
    "gsm8k_graded_solutions": read_gsm8k,
    "qwen25_math_graded_samples": read_math_samples,
    "math500_test": read_math500,
}


def grade(answers: list[Graded], checker: AnswerChecker, num_threads: int) -> list[Graded]:
    """The answers whose grade differs from the published one."""
    with ThreadPoolExecutor(num_threads) as threads:
        verdicts = threads.map(lambda each: checker.is_correct(each.answer, each.truth), answers)
        return [each for each, verdict in zip(answers, verdicts, strict=True) if verdict != each.correct]


def main() -> int:
    """Grades every existing set and prints a line for each."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else find_data()
    cores = len(os.sched_getaffinity(0))
    print(f"{'set':28s} {'graded alike':>14s} {'s':>8s} {'s, CPU':>8s}  on {cores} cores")
    for name, read in SETS.items():
        if not (folder / f"{name}.jsonl").exists():
            print(f"{name:28s} is not in {folder}")
            continue
        start, used = time.perf_counter(), _processor_time()
        with AnswerChecker(num_workers=cores) as checker:
            answers = list(read(folder))
            others = grade(answers, checker, cores)
        alike = f"{len(answers) - len(others)} of {len(answers)}"
        print(f"{name:28s} {alike:>14s} {time.perf_counter() - start:8.1f} {_processor_time() - used:8.1f}")
        for each in others:
            print(f"    {each.place}: {each.answer!r} against {each.truth!r} is published as {each.correct}")
    return 0


def _processor_time() -> float:
    """CPU seconds of this process and of its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    sys.exit(main())
