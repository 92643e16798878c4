"""Progress of a run on the console: one live line in a terminal, else a plain line every 10 seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from mgrpo.config import Config
from mgrpo.models.device import pick_backend, pick_device
from mgrpo.process.display import make_console
from mgrpo.types import Metrics
from mgrpo_kernels import backends

PLAIN_LINE_EVERY_S = 10.0


def _describe_grouping(done: int, total: int) -> str:
    """The progress of a long vote."""
    return f"comparing answers: {done} of {total} prompts"


class GroupingLine:
    """Shows the progress of a long vote without a live line: a changing line in a terminal, else one every 10 seconds.

    It is called with the numbers of finished and all prompts, from any thread.
    """

    def __init__(self, console: Console):
        self.console, self.last_s = console, -PLAIN_LINE_EVERY_S

    def __call__(self, done: int, total: int) -> None:
        """Shows the progress if it is due."""
        now, is_last = time.monotonic(), done == total
        if self.console.is_terminal:
            self.console.print(_describe_grouping(done, total), end="\n" if is_last else "\r", highlight=False)
        elif is_last or now - self.last_s > PLAIN_LINE_EVERY_S:
            self.console.print(_describe_grouping(done, total), highlight=False)
            self.last_s = now


class Progress:
    """Shows a run on the console, as a context manager; `show` takes the metrics of each step."""

    def __init__(self, config: Config, run_dir: Path, step: int, last_step: int, stop: Sequence[str] = ()):
        self.console = make_console()
        self.run_dir, self.last_step = run_dir, last_step
        self.live = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.live.add_task("", total=last_step, completed=step)
        self.start, self.first_step, self.last_line_s = time.monotonic(), step, -PLAIN_LINE_EVERY_S
        self.grouping_line = GroupingLine(self.console)
        self.alarmed = False
        r = config.rollout
        self.console.print(
            f"[bold]{config.preset}[/]  {escape(config.model.path)}  {r.num_prompts} prompts x "
            f"({r.num_policy} policy + {r.num_momentum} momentum) rollouts  ->  {escape(str(run_dir))}"
        )
        backend = pick_backend(config.kernels.backend, pick_device(config.model.device))
        self.console.print(f"kernels: {backend}, {backends()[backend].reason}", highlight=False)
        if stop and config.rollout.stop is None:
            texts = escape(", ".join(map(repr, stop)))
            self.console.print(f"responses end at {texts}, by --data.template; --rollout.stop '' turns it off")

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def show(self, row: Metrics) -> None:
        """Shows one step, its accuracy on the eval set, and an alarm when it starts."""
        text = (
            f"reward {row['reward_mean']:.3f}  vote share {row['majority_share']:.2f}  "
            f"entropy {row['token_entropy']:.3f}  top answer {row['top_answer_share']:.1%}  "
            f"{row['tokens_per_s']:,.0f} tok/s"
        )
        self.live.update(self.task, completed=row["step"], description=text)
        now = time.monotonic()
        if not self.console.is_terminal and (
            now - self.last_line_s > PLAIN_LINE_EVERY_S or row["step"] == self.last_step
        ):
            left = (now - self.start) / (row["step"] - self.first_step) * (self.last_step - row["step"])
            self.console.print(f"step {row['step']}/{self.last_step}  {text}  {left:.0f} s left", soft_wrap=True)
            self.last_line_s = now
        if row.get("probe_accuracy_policy") is not None:
            momentum = row.get("probe_accuracy_momentum")
            second = "" if momentum is None else f", momentum {momentum:.3f}"
            self.console.print(f"  eval set at step {row['step']}: policy {row['probe_accuracy_policy']:.3f}{second}")
        if row["alarm"] and not self.alarmed:
            self.console.print(f"[bold red]collapse alarm at step {row['step']}:[/] {escape('; '.join(row['alarm']))}")
        self.alarmed = bool(row["alarm"])

    def note(self, message: str) -> None:
        """Shows a message before the first step."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def show_grouping(self, done: int, total: int) -> None:
        """Shows the number of grouped prompts of a long vote; from any thread."""
        if self.console.is_terminal:
            self.live.update(self.task, description=_describe_grouping(done, total))
        else:
            self.grouping_line(done, total)

    def rewind(self, step: int, message: str) -> None:
        """Shows why the run continues from an earlier step."""
        self.console.print(f"[bold]{escape(message)}[/]", soft_wrap=True)
        self.start, self.first_step = time.monotonic(), step
        self.live.update(self.task, completed=step)

    def show_samples(self, samples: list[dict[str, Any]]) -> None:
        """Shows sampled rollouts as a table."""
        texts, title = (
            ("prompt", "source", "response", "answer", "pseudo_label"),
            f"rollouts of step {samples[0]['step']}",
        )
        table = Table(*texts, "reward", "entropy", "kept", title=title, title_justify="left")
        for sample in samples:
            table.add_row(
                *(escape(str(sample[key])) for key in texts),
                f"{sample['reward']:.2f}",
                f"{sample['entropy']:.3f}",
                "yes" if sample["kept"] else "pruned",
            )
        self.console.print(table)

    def end(self, outcome: int, saved: int, report: Path | None) -> None:
        """Shows how the run ended and the paths of its results."""
        self.live.stop()
        reasons = {
            0: "done",
            3: "stopped by the collapse monitor",
            4: "stopped: too many non-finite steps in a row. Start a new run with a lower --optim.lr",
            75: "interrupted; continue with --resume",
        }
        self.console.print(f"[bold]{reasons[outcome]}[/]: checkpoint of step {saved} in {escape(str(self.run_dir))}")
        if report:
            self.console.print(f"report: {escape(str(report))}", soft_wrap=True)
