"""Runs training steps and what surrounds them: log, collapse monitor, checkpoints, signals, report."""

from __future__ import annotations

import json
import math
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from mgrpo.config import Config, to_dict
from mgrpo.data.load import describe_data
from mgrpo.distributed.ending import begin, claim, end_together, ending
from mgrpo.distributed.world import ALONE, World
from mgrpo.errors import EngineError, Exit, Interrupted, StaleWeightsError
from mgrpo.observe.catalogue import require_known
from mgrpo.observe.collapse import Monitor
from mgrpo.observe.console import Progress
from mgrpo.observe.trackers import make_trackers, to_json
from mgrpo.process.disk import storage_errors, write_aside
from mgrpo.process.signals import Interrupt
from mgrpo.process.threads import limit_threads
from mgrpo.run import checkpoint
from mgrpo.run.directory import directory_of, held, next_start, require_shared
from mgrpo.run.preflight import refuse_machine, rehearse
from mgrpo.run.resume import check_resumable, resume, resumed_config
from mgrpo.training.observers import StepResult
from mgrpo.training.schedule import is_due
from mgrpo.training.trainer import Trainer
from mgrpo.types import Metrics

MAX_FAULTS = 20
INTERRUPTED = "interrupted before the first step"


def run(config: Config, world: World = ALONE) -> Exit:
    """Trains from step 0, or from the newest checkpoint, to the last step; returns the exit code.

    With several processes it is collective; any error is raised as Ended.
    """
    run_dir, interrupt = directory_of(config), Interrupt()
    limit_threads(config.threads, sharing=world.local_size)
    try:
        with ExitStack() as stack:
            stack.enter_context(storage_errors())
            _take_directory(config, world, run_dir, stack, interrupt)
            closing = stack.enter_context(ExitStack())  # before it the first error is told to the other processes
            stack.enter_context(ending(world, run_dir))
            stack.enter_context(storage_errors())
            require_shared(run_dir, world)
            trainer = Trainer(config, world=world)
            closing.callback(trainer.close)
            rehearse(trainer, run_dir)
            outcome = _train(trainer, run_dir, interrupt)
            _end(world, run_dir, outcome, interrupt)
            return outcome
    except Interrupted:
        print(f"{INTERRUPTED}; start with --resume --run-dir {run_dir}")
        return Exit.INTERRUPTED
    except Exception as error:
        if world.size == 1 and (line := next_start(run_dir, getattr(error, "exit_code", Exit.ERROR))):
            error.add_note(line)
        raise


def _take_directory(config: Config, world: World, run_dir: Path, stack: ExitStack, interrupt: Interrupt) -> None:
    """Checks the machine and the options and locks the run directory, on rank 0 for all; handles signals from here."""
    error = None
    try:
        if world.is_first:
            refuse_machine(config, run_dir)
        stack.enter_context(interrupt.handled())
        if world.is_first:
            stack.enter_context(held(run_dir))
            if config.resume and (before := resumed_config(run_dir)):
                check_resumable(config, before)
    except Exception as failure:
        error = failure
    end_together(world, error)
    begin(world, run_dir)


def _end(world: World, run_dir: Path, outcome: Exit, interrupt: Interrupt) -> None:
    """Leaves the exit code in the run directory and waits for rank 0, which may still write a checkpoint."""
    if world.size == 1:
        return
    interrupt.finish()  # a launcher ends the others once the first of them is gone
    if world.is_first:
        claim(run_dir, outcome, rank=0)
    world.barrier()


def _train(trainer: Trainer, run_dir: Path, interrupt: Interrupt) -> Exit:
    """Takes the steps, shows and saves them; returns the exit code."""
    config, world = trainer.config, trainer.world
    rows = resume(trainer, run_dir) if config.resume else []
    if world.is_first:
        write_aside(run_dir / "config.json", json.dumps(to_dict(config), indent=1))
    last_step = min(config.stop_after or config.steps, config.steps)
    outcome, stop, checker = Exit.DONE, trainer.grader.stop, trainer.grader.checker
    with (
        Session(trainer, run_dir, rows) as session,
        Progress(config, run_dir, trainer.step, last_step, stop.texts if stop else ()) as progress,
        ending(world, run_dir),  # here too: a checkpoint in progress delays the end of the session
    ):
        for message in describe_data(trainer.data):
            progress.note(message)
        interrupt.defer()
        checker.watch = progress.show_grouping
        while outcome is Exit.DONE and trainer.step < last_step:
            try:
                result = session.take_step()
            except EngineError as error:
                # The end of a job may stop its vLLM servers first; the last step is already saved.
                if world.size > 1 or not interrupt.asked or isinstance(error, StaleWeightsError):
                    raise
                outcome = Exit.INTERRUPTED
                break
            if world.is_first:
                progress.show(result.metrics)
                if result.samples:
                    write_samples(result.samples, run_dir, trainer.step)
                    progress.show_samples(result.samples)
            asked = world.any(interrupt.asked)
            decision = session.decide(result.metrics, last_step, interrupted=asked)
            if decision["rollback"]:
                message = session.roll_back(Path(decision["rollback"]))
                progress.rewind(trainer.step, f"{message}: {'; '.join(decision['alarm'])}")
                continue
            outcome = Exit(decision["outcome"])
            if decision["save"]:
                session.save()
        session.writer.wait()
        report = _write_report(run_dir) if session.rows else None
        progress.end(outcome, session.writer.saved or trainer.step, report)
    return outcome


def _write_report(run_dir: Path) -> Path:
    """Imports matplotlib only now, so that no start waits half a second for it."""
    from mgrpo.observe.report import write_report

    return write_report([run_dir])


def _outcome(trainer: Trainer, row: Metrics, interrupted: bool) -> Exit:
    """The exit code with which the run ends after this step, DONE if it continues."""
    if trainer.learner.nonfinite_in_row >= trainer.config.optim.max_nonfinite:
        return Exit.NON_FINITE
    if row["alarm"] and trainer.config.monitor.on_collapse != "warn":
        return Exit.COLLAPSE
    return Exit.INTERRUPTED if interrupted else Exit.DONE


class Session:
    """Takes the steps of a run, logs their metrics, saves checkpoints and rolls back.

    With several processes every rank calls its methods; rank 0 alone keeps rows and decides, all write checkpoints.

    As a context manager, it waits at its end for the checkpoint in progress and closes the trackers.
    """

    def __init__(self, trainer: Trainer, run_dir: Path, rows: list[Metrics]):
        self.trainer, self.run_dir, self.rows = trainer, run_dir, rows
        self.config = trainer.config
        self.first_step = trainer.step  # of this process
        self.monitor = make_monitor(self.config, rows)
        self.trackers = make_trackers(self.config, run_dir, trainer.step) if trainer.world.is_first else []
        c = self.config
        self.writer = checkpoint.Writer(
            run_dir, background=c.checkpoint.background, world=trainer.world, timeout_s=c.distributed.timeout_s
        )
        self.checkpoint_s: float | None = None  # seconds that the last step's checkpoint delayed training
        if self.config.monitor.on_collapse == "rollback" and trainer.step == 0:
            self.save()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.trainer.world.is_first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        with ExitStack() as stack:
            for tracker in self.trackers:
                stack.callback(tracker.close)
            self.writer.__exit__(*error)

    def take_step(self) -> StepResult:
        """Takes one step, passes its metrics to the monitor and logs them."""
        self.writer.check()
        before = self.trainer.step
        try:
            result = self.trainer.train_step()
        except StaleWeightsError:
            raise
        except EngineError as error:
            if before == self.first_step or self.trainer.world.size > 1:  # others may be in the middle of the step
                raise
            raise self._saved(error) from error
        if self.is_first:
            self._log(result)
        if self.trainer.world.any(result.engine_error is not None):
            raise self._saved(result.engine_error or EngineError("The rollout engine of another rank has failed."))
        return result

    def _log(self, result: StepResult) -> None:
        """Passes the metrics of a step to the monitor and the trackers, and writes down a fault."""
        row = result.metrics
        row["alarm"], row["time_checkpoint_s"] = self.monitor.observe(row) or None, self.checkpoint_s
        self.checkpoint_s = None
        require_known(row)
        for tracker in self.trackers:
            tracker.log(row)
        self.rows.append(row)
        if result.fault:
            write_fault(self.run_dir, result.fault)

    def decide(self, row: Metrics, last_step: int, *, interrupted: bool) -> dict[str, Any]:
        """What follows the step, by rank 0: path of the checkpoint to go back to, or exit code and whether to save."""
        return self.trainer.world.broadcast(self._decide(row, last_step, interrupted) if self.is_first else None)

    def _decide(self, row: Metrics, last_step: int, interrupted: bool) -> dict[str, Any]:
        trainer, config = self.trainer, self.config
        if row["alarm"] and config.monitor.on_collapse == "rollback" and (found := self._good_checkpoint()):
            return {"rollback": str(found), "alarm": row["alarm"]}
        step, is_last = trainer.step, trainer.step == last_step
        outcome = _outcome(trainer, row, interrupted and not is_last)
        is_saved = bool(outcome) or is_last or is_due(config.checkpoint.every, step, last_step)
        return {"rollback": None, "outcome": int(outcome), "save": is_saved}

    def _saved(self, error: EngineError) -> EngineError:
        """Saves the state after the last whole step and returns the engine's error with a note of it."""
        self.save()
        self.writer.wait()
        return EngineError(f"{error} Step {self.trainer.step} is saved.")

    def save(self) -> None:
        """Starts a checkpoint of this step."""
        start, c, step = time.perf_counter(), self.config.checkpoint, self.trainer.step
        # Taking the state is collective with several processes, so that no thread may do it.
        aside = c.background or self.trainer.world.size > 1
        write = self.trainer.snapshot() if aside else self.trainer.save
        # A checkpoint in progress is not listed yet, and would not count among the best.
        self.writer.wait()
        best = self._best(step) if self.is_first else []
        self.writer.save(step, write, keep_last=c.keep_last, best=best)
        self.checkpoint_s = time.perf_counter() - start

    def _best(self, step: int) -> list[int]:
        """Steps of the checkpoints that are kept, with one of `step`, beside the last ones."""
        steps = [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(self.run_dir)]
        steps = sorted({*steps, step})
        best = best_steps(self.rows, steps, self.monitor, self.config.checkpoint.keep_best)
        if self.config.monitor.on_collapse == "rollback":
            # The newest good checkpoint, and those that turn out good if later steps raise no alarm.
            good = self.monitor.good_before()
            best += [s for s in steps if s <= good][-1:] + [s for s in steps if s > good]
        return best

    def _good_checkpoint(self) -> Path | None:
        """The last good checkpoint; None if there is none or no rollback is left."""
        self.writer.wait()
        found, _ = checkpoint.newest_valid(self.run_dir, up_to=self.monitor.good_before())
        return found if self.trainer.state.rollbacks < self.config.monitor.max_rollbacks else None

    def roll_back(self, folder: Path) -> str:
        """Restores a checkpoint and returns a message.

        Weights, momentum, optimiser and metrics are those of the checkpoint. The sampler keeps its position, so that
        the prompts since then are not drawn again before the next epoch.
        """
        trainer = self.trainer
        alarm_step = trainer.step
        trainer.roll_back(folder)
        trainer.world.barrier()  # every rank has read it before others are deleted
        if self.is_first:
            self._forget()
        self.save()  # so that a run that is killed now does not repeat the steps
        most = self.config.monitor.max_rollbacks
        return f"rollback {trainer.state.rollbacks} of {most}, from step {alarm_step} to {trainer.step}"

    def _forget(self) -> None:
        """Deletes checkpoints and rows of the steps that a rollback has undone."""
        step = self.trainer.step
        for folder in reversed(checkpoint.list_checkpoints(self.run_dir)):
            if checkpoint.step_of(folder) > step:
                shutil.rmtree(folder)
        dropped = [row for row in self.rows if row["step"] > step]
        self.rows[:] = [row for row in self.rows if row["step"] <= step]
        with (self.run_dir / "rolled_back.jsonl").open("a") as file:
            file.writelines(to_json(row) + "\n" for row in dropped)
        for tracker in self.trackers:
            tracker.rewind(self.rows)
        self.monitor = make_monitor(self.config, self.rows)


def make_monitor(config: Config, rows: list[Metrics]) -> Monitor:
    """A monitor that has observed the rows."""
    monitor = Monitor(config.monitor, num_prompts=config.rollout.num_prompts)
    for row in rows:
        monitor.observe(row)
    return monitor


def write_fault(run_dir: Path, fault: dict[str, Any]) -> None:
    """Writes the details of a non-finite step to faults/step_N.json, for the first 20 such steps."""
    folder = run_dir / "faults"
    folder.mkdir(exist_ok=True)
    if len(list(folder.iterdir())) < MAX_FAULTS:
        write_aside(folder / f"step_{fault['step']}.json", json.dumps(_spelled(fault), indent=1))


def _spelled(value: Any) -> Any:
    """The value with NaN and infinity as text, because JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: _spelled(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_spelled(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def best_steps(rows: list[Metrics], steps: list[int], monitor: Monitor, keep: int) -> list[int]:
    """Steps of the best checkpoints: by accuracy on the eval set, or without one the newest good ones."""
    accuracy = {
        row["step"]: row["probe_accuracy_policy"] for row in rows if row.get("probe_accuracy_policy") is not None
    }
    if accuracy:
        evaluated = [step for step in steps if step in accuracy]
        return sorted(evaluated, key=lambda step: (accuracy[step], step))[-keep:] if keep else []
    good = monitor.good_before()
    return [step for step in steps if step <= good][-keep:] if keep else []


def write_samples(samples: list[dict[str, Any]], run_dir: Path, step: int) -> None:
    """Writes sampled rollouts of a step to samples/step_N.parquet."""
    import pyarrow
    import pyarrow.parquet

    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(samples), folder / f"step_{step}.parquet")
