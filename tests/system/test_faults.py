"""Faults injected into a run: what was saved stays, what was lost is taken again with the same bits."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import small_config

import mgrpo
from mgrpo.errors import Exit, InputError, StorageError
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.worker import EquivalenceWorker
from mgrpo.models.load import load_model, load_weights
from mgrpo.process.disk import list_checkpoints, step_of
from mgrpo.run.checkpoint import Writer, newest_valid, save_checkpoint, sweep
from mgrpo.run.loop import write_fault
from mgrpo.training import learner
from mgrpo.training.grader import Grader
from mgrpo.training.passes import Passes
from mgrpo.training.state import copy_tensors, optimizer_tensors
from mgrpo.training.trainer import Trainer

WEIGHTS = ("policy/model.safetensors", "momentum/model.safetensors", "optimizer.safetensors")
SUPPORT = Path(__file__).parents[1] / "support"
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{Path(mgrpo.__file__).parents[1]}:{SUPPORT}", "OMP_NUM_THREADS": "1"}


def weights(run_dir, step):
    """Bytes of everything in a checkpoint that the next step depends on."""
    folder = run_dir / "checkpoints" / f"step_{step}"
    state = json.loads((folder / "state.json").read_text())
    del state["rng"]  # of the process
    return state, [(folder / name).read_bytes() for name in WEIGHTS]


def steps_saved(run_dir):
    return [step_of(folder) for folder in list_checkpoints(run_dir)]


# ---- checkpoints

# A process saves step 2 over and over, killed at a later operation on files each time, until nothing kills it.
KILLED_SAVES = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import safetensors.torch, transformers.modeling_utils
import mgrpo.training.state
from small_training import small_config
from mgrpo.run.checkpoint import newest_valid, save_checkpoint, sweep
from mgrpo.process.disk import step_of
from mgrpo.training.trainer import Trainer

run_dir, replaces = Path(sys.argv[1]), sys.argv[2] == "replaces"
trainer = Trainer(small_config({}))
trainer.train_step()
save_checkpoint(run_dir, 1, trainer.save)
if replaces:
    save_checkpoint(run_dir, 2, trainer.save)
trainer.train_step()

class Boundaries:
    def __init__(self, last):
        self.seen, self.last = 0, last
    def __call__(self, event, arguments):
        if event.split(".")[0] in ("open", "os", "shutil") and any(str(run_dir) in str(a) for a in arguments):
            self.cross()
    def cross(self):
        self.seen += 1
        if self.seen == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
    def around(self, function):
        def call(*args, **options):
            self.cross()
            result = function(*args, **options)
            self.cross()
            return result
        return call

found = []
for last in range(1, 1000):
    pid = os.fork()
    if not pid:
        boundaries = Boundaries(last)
        os.fsync = boundaries.around(os.fsync)
        for module in (mgrpo.training.state, transformers.modeling_utils):
            name = "save_file" if module is mgrpo.training.state else "safe_save_file"
            setattr(module, name, boundaries.around(getattr(module, name)))
        sys.addaudithook(boundaries)
        save_checkpoint(run_dir, 2, trainer.save)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    sweep(run_dir)
    left = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    newest, complaints = newest_valid(run_dir)
    assert not complaints and newest is not None, (last, complaints)
    assert left in (["step_1"], ["step_1", "step_2"]), (last, left)
    assert "step_2" in left or not replaces, last
    found.append(step_of(newest))
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    if not replaces and found[-1] == 2:
        import shutil
        shutil.rmtree(run_dir / "checkpoints" / "step_2")
print(len(found), found[-1])
"""


@pytest.mark.fault("kill -9 at every file boundary of a save")
@pytest.mark.parametrize("where", ["new", "replaces"])
def test_a_save_killed_anywhere_leaves_a_sound_checkpoint(tmp_path, where):
    """Whatever is left verifies; the save that nobody kills succeeds in the same place."""
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path), where]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    boundaries, newest = map(int, done.stdout.split()[-2:])
    assert boundaries > 40
    assert newest == 2


@pytest.mark.fault("kill -9 in the middle of a step")
def test_a_run_killed_within_a_step_resumes_to_the_same_bits(launch, resume, command_line, tmp_path, rows_of):
    options = {"steps": 5, "checkpoint.every": 2}
    assert launch(options, run_dir=tmp_path / "straight") == 0
    code = (
        "import os, signal, sys; from mgrpo.training.passes import Passes; from mgrpo.train import main\n"
        "run = Passes.run\n"
        "def die(self, batch):\n"
        "    if batch.step == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return run(self, batch)\n"
        "Passes.run = die; main(sys.argv[1:])"
    )
    flags = [*command_line(tmp_path / "run", options), "--threads", "1"]
    done = subprocess.run([sys.executable, "-c", code, *flags], env=ENVIRONMENT, capture_output=True, timeout=900)
    assert done.returncode == -signal.SIGKILL
    assert len(rows_of(tmp_path / "run")) == 3
    assert resume() == 0
    assert weights(tmp_path / "run", 5) == weights(tmp_path / "straight", 5)
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")


@pytest.mark.fault("kill -9 of a run again and again")
@pytest.mark.long
def test_a_run_killed_at_any_time_ends_with_the_same_bits(launch, resume, command_line, tmp_path, rows_of):
    """Killed twelve times, at moments that know nothing of what the run is doing."""
    options = {"steps": 40, "checkpoint.every": 3}
    assert launch(options, run_dir=tmp_path / "straight") == 0
    flags, run_dir = [*command_line(tmp_path / "run", options), "--threads", "1"], tmp_path / "run"
    killed, reached = 0, []
    for attempt in range(40):
        command = [sys.executable, "-m", "mgrpo.train", *flags]
        if (run_dir / "config.json").exists():
            command = [sys.executable, "-m", "mgrpo.train", "--run-dir", str(run_dir), "--resume"]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        metrics = run_dir / "metrics.jsonl"
        before = metrics.read_text() if metrics.exists() else ""
        if killed < 12:
            deadline = time.monotonic() + 120
            # A resumed run cuts the rows back to its checkpoint, so their number changes first of all.
            while process.poll() is None and time.monotonic() < deadline:
                now = metrics.read_text() if metrics.exists() else ""
                if now != before and now.count("\n") > (0 if killed else -1):
                    break
                time.sleep(0.01)
            time.sleep(0.137 * attempt % 0.7)
            process.kill()
        _, errors = process.communicate(timeout=900)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
        killed += 1
        reached.append(len(metrics.read_text().splitlines()) if metrics.exists() else 0)
    assert killed >= 5 and len(set(reached)) >= 4, reached
    assert weights(run_dir, 40) == weights(tmp_path / "straight", 40)
    assert rows_of(run_dir) == rows_of(tmp_path / "straight")


@pytest.mark.fault("disk full under a checkpoint (the kernel refuses the bytes)")
def test_files_that_may_not_grow_cost_one_checkpoint(resume, launch, command_line, tmp_path):
    """A limit of the process on the size of files stands for the full disk: every writer gets its error."""
    options = {"steps": 4, "checkpoint.every": 2}
    assert launch(options, "--stop-after", "2") == 0
    command = [sys.executable, "-m", "mgrpo.train", "--run-dir", str(tmp_path / "run"), "--resume"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, preexec_fn=limit)
    assert done.returncode == Exit.STORAGE, done.stderr
    assert "step_4 could not be written" in " ".join(done.stderr.split())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_2"]
    assert resume() == 0
    assert launch(options, run_dir=tmp_path / "straight") == 0
    assert weights(tmp_path / "run", 4) == weights(tmp_path / "straight", 4)


@pytest.mark.fault("directory that may not be written")
def test_a_directory_turned_read_only_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, lambda folder: (folder / "a").write_text("1"))
    (tmp_path / "checkpoints").chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.chmod(tmp_path, 0o755)
        for parent in list(tmp_path.parents)[:-1]:
            os.chmod(parent, parent.stat().st_mode | 0o111)
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(StorageError, match=r"step_2 could not be written: .*Permission denied"):
            save_checkpoint(tmp_path, 2, lambda folder: (folder / "a").write_text("2"))
    finally:
        os.seteuid(user)
    (tmp_path / "checkpoints").chmod(0o755)
    assert newest_valid(tmp_path) == (tmp_path / "checkpoints" / "step_1", {})


@pytest.mark.fault("one byte flipped, or the end missing, in any file of a checkpoint")
@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_every_damaged_file_is_named_and_the_one_before_used(small, trained, tmp_path, damage):
    trainer, _ = trained(small(), 1)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, trainer.save)
    older, newer = list_checkpoints(tmp_path)
    files = sorted(path for path in newer.rglob("*") if path.is_file())
    assert len(files) >= 9
    for path in files:
        content = path.read_bytes()
        broken = bytearray(content)
        broken[len(content) // 2] ^= 4
        path.write_bytes(bytes(broken) if damage == "flipped" else content[:-1])
        found, complaints = newest_valid(tmp_path)
        assert found == older, path
        assert str(path) in complaints[newer] or path.name == "manifest.json"
        path.write_bytes(content)
    assert newest_valid(tmp_path) == (newer, {})


@pytest.mark.fault("pickle planted in a checkpoint")
def test_a_planted_pickle_is_never_read(launch, resume, tmp_path):
    """A file that no manifest names does nothing, beside the weights or, where those are gone, in their place."""
    assert launch({"steps": 2}, "--stop-after", "1") == 0
    import pickle

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    folder = tmp_path / "run" / "checkpoints" / "step_1"
    for place in ("policy/pytorch_model.bin", "momentum/pytorch_model.bin", "optimizer.pt", "state.pkl"):
        (folder / place).write_bytes(pickle.dumps(Trap()))
    assert resume("--stop-after", "1") == 0
    for source in ("policy", "momentum"):
        (folder / source / "model.safetensors").unlink()
        with pytest.raises(InputError, match="safetensors"):
            load_weights(folder / source)
    assert resume() == Exit.BAD_INPUT
    assert not (tmp_path / "sprung").exists()


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(small, trained, tmp_path, monkeypatch):
    """What a power cut leaves can not be tested; the order of flushing and renaming can."""
    trainer, done = trained(small(), 1)[0], []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda old, new: (done.append("renamed"), rename(old, new))[1])
    folder = save_checkpoint(tmp_path, 1, trainer.save)
    flushed, after = done[: done.index("renamed")], done[done.index("renamed") + 1 :]
    inside = {str(path.relative_to(folder)) for path in folder.rglob("*")} | {"."}
    assert {os.path.relpath(path, folder.with_name(".step_1.tmp")) for path in flushed} == inside
    assert after == [str(folder.parent)]


# ---- checkpoints in the background


def test_training_goes_on_while_a_checkpoint_is_written(small, trained, tmp_path):
    """What is written is the state of its step, policy and momentum alike, however late the disk is."""
    trainer, _ = trained(small({"optim.lr": 1e-3, "momentum.decay": 0.5}), 2)
    trainer.save(tmp_path / "expected")
    may_write, write = threading.Event(), trainer.snapshot()

    def late(folder):
        assert may_write.wait(60)
        write(folder)

    with Writer(tmp_path) as writer:
        writer.save(2, late, keep_last=2, best=[])
        trainer.train_step()
        assert writer.saved is None and not list_checkpoints(tmp_path)
        may_write.set()
    assert writer.saved == 2
    for name in WEIGHTS:
        saved = load_file(tmp_path / "checkpoints" / "step_2" / name)
        expected = load_file(tmp_path / "expected" / name)
        assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved), name
    trainer.save(tmp_path / "after")
    assert (tmp_path / "after" / WEIGHTS[0]).read_bytes() != (tmp_path / "expected" / WEIGHTS[0]).read_bytes()


@pytest.mark.fault("disk full under a tokenizer")
def test_a_tokenizer_that_can_not_be_written_is_a_full_disk(small, trained, tmp_path, monkeypatch):
    """The tokenizers' library raises a bare Exception."""
    trainer, _ = trained(small(), 1)
    save_checkpoint(tmp_path, 1, trainer.save)
    tokenizer = trainer.loaded.tokenizer

    def to_full_disk(folder):
        tokenizer.backend_tokenizer.save("/dev/full")

    monkeypatch.setattr(tokenizer, "save_pretrained", to_full_disk)
    with pytest.raises(StorageError, match=r"step_2 could not be written: No space left on device"):
        save_checkpoint(tmp_path, 2, trainer.save)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_1"]


@pytest.mark.fault("disk full under a checkpoint, found at the next step")
def test_a_failed_checkpoint_ends_the_run_at_the_next_step(launch, tmp_path, rows_of, monkeypatch):
    """And not at the next checkpoint, which may be hours away."""
    from mgrpo.run.loop import Session

    def fail(trainer):
        def write(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return write

    take_step = Session.take_step

    def after_the_thread(session):
        if pending := session.writer._pending:
            pending.exception(30)
        return take_step(session)

    monkeypatch.setattr(Trainer, "snapshot", fail)
    monkeypatch.setattr(Session, "take_step", after_the_thread)
    assert launch({"steps": 9, "checkpoint.every": 4}) == Exit.STORAGE
    assert len(rows_of(tmp_path / "run")) == 4


@pytest.mark.fault("disk full under a checkpoint in the background")
def test_an_error_of_the_thread_reaches_the_run(tmp_path):
    def fail(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(folder):
        save_file({"a": torch.ones(3)}, folder / "a.safetensors")

    writer = Writer(tmp_path)
    writer.save(1, fail, keep_last=1, best=[])
    deadline = time.monotonic() + 30
    with pytest.raises(StorageError, match="step_1 could not be written"):
        while time.monotonic() < deadline:
            writer.check()
            time.sleep(0.01)
    writer.save(2, write, keep_last=1, best=[])
    writer.save(3, fail, keep_last=1, best=[])
    with pytest.raises(StorageError, match="step_3"):
        writer.save(4, write, keep_last=1, best=[])
    with pytest.raises(StorageError, match="step_5"), writer:
        writer.save(5, fail, keep_last=1, best=[])
    assert steps_saved(tmp_path) == [2] and writer.saved == 2
    with pytest.raises(KeyError) as raised, Writer(tmp_path) as writer:
        writer.save(6, fail, keep_last=1, best=[])
        raise KeyError("of the run itself")
    assert "step_6 could not be written" in raised.value.__notes__[0]


def test_checkpoints_without_a_copy_are_the_same(launch, tmp_path, monkeypatch):
    """Without the background nothing is copied, and training waits."""
    assert launch({"steps": 4, "checkpoint.every": 2}, run_dir=tmp_path / "thread") == 0
    monkeypatch.delattr("mgrpo.training.state.copy_tensors")
    flag = "--checkpoint.no-background"
    assert launch({"steps": 4, "checkpoint.every": 2}, flag, run_dir=tmp_path / "none") == 0
    assert weights(tmp_path / "thread", 4) == weights(tmp_path / "none", 4)
    assert steps_saved(tmp_path / "thread") == steps_saved(tmp_path / "none") == [2, 4]


def test_copies_share_what_the_originals_share():
    weight = torch.arange(6.0).view(2, 3)
    tensors = {"embedding": weight, "head": weight, "turned": weight.t(), "part": weight[:1], "none": torch.empty(0)}
    copies = copy_tensors(tensors)
    assert all(torch.equal(copies[name], tensor) for name, tensor in tensors.items())
    assert copies["embedding"] is copies["head"]
    weight.zero_()
    assert copies["turned"].sum() == copies["head"].sum() == 15
    assert copies["part"].sum() == 3


def test_a_half_replaced_checkpoint_comes_back(tmp_path):
    """The run died between moving the old one away and moving the new one in."""
    final = save_checkpoint(tmp_path, 7, lambda folder: (folder / "a").write_text("old"))
    final.rename(final.with_name(".step_7.old"))
    sweep(tmp_path)
    assert newest_valid(tmp_path) == (final, {})
    shutil.copytree(final, final.with_name(".step_7.old"))
    sweep(tmp_path)
    assert [path.name for path in final.parent.iterdir()] == ["step_7"]


# ---- what changes under a run


@pytest.mark.fault("data file changed under the run")
def test_a_data_file_that_changes_is_read_once(launch, resume, tmp_path, rows_of, monkeypatch, capsys):
    """The run goes on with what it read at its start; a resumed run refuses the other file."""
    data, lines = tmp_path / "data.jsonl", [json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(10, 34)]
    data.write_text("".join(lines))
    options = {"steps": 3, "data.train": str(data), "checkpoint.every": 2}
    assert launch(options, run_dir=tmp_path / "straight") == 0
    judge = Grader.assign_credit

    def change(self, batch, logprobs):
        if batch.step == 2:
            data.write_text("".join(reversed(lines)))
        return judge(self, batch, logprobs)

    monkeypatch.setattr(Grader, "assign_credit", change)
    assert launch(options | {"steps": 4}, "--stop-after", "3") == 0
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")
    capsys.readouterr()
    assert resume() == Exit.BAD_INPUT
    assert "--data.train must hold the prompts that" in capsys.readouterr().err


@pytest.mark.fault("clock jumping back")
def test_a_clock_that_jumps_back_changes_nothing(launch, tmp_path, rows_of, monkeypatch):
    options = {"steps": 3, "checkpoint.every": 1, "log.backends": ("tensorboard",)}
    assert launch(options, run_dir=tmp_path / "straight") == 0
    now = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    assert launch(options) == 0
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "straight")
    assert weights(tmp_path / "run", 3) == weights(tmp_path / "straight", 3)


# ---- numbers


@pytest.mark.parametrize("where", ["loss", "gradient", "old log-prob", "rollout log-prob", "reward"])
@pytest.mark.fault("numbers that are not finite")
def test_a_number_that_is_not_finite_moves_nothing_and_is_written_down(
    small, trained, weights_of, monkeypatch, tmp_path, where
):
    """One bad step of three: weights and momentum stay, the optimiser too, and what is needed to look is kept."""
    config = small({"optim.lr": 1e-3, "steps": 3})
    trainer, _ = trained(config, 1)
    before, moments = weights_of(trainer), copy_tensors(trainer_moments(trainer))
    plant(where, trainer, monkeypatch)
    result = trainer.train_step()
    monkeypatch.undo()
    assert result.metrics["nonfinite_steps"] == trainer.learner.nonfinite_in_row == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer).items())
    assert all(torch.equal(tensor, moments[name]) for name, tensor in trainer_moments(trainer).items())
    fault = result.fault
    assert fault is not None and fault["step"] == 2
    write_fault(tmp_path, fault)
    written = json.loads((tmp_path / "faults" / "step_2.json").read_text(), parse_constant=pytest.fail)
    assert len(written["trajectories"]) == len(fault["trajectories"])
    suspects = [entry for entry in fault["trajectories"] if not entry["finite"]]
    assert suspects == fault["trajectories"][: len(suspects)]
    assert bool(suspects) == (where not in ("loss", "gradient"))
    assert all(entry["prompt"] and entry["response"] and entry["tokens"] for entry in fault["trajectories"])
    result = trainer.train_step()
    assert result.metrics["nonfinite_steps"] == 1 and trainer.learner.nonfinite_in_row == 0 and result.fault is None
    assert not all(torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer).items())
    assert all(tensor.isfinite().all() for tensor in weights_of(trainer).values())


def trainer_moments(trainer):
    return optimizer_tensors(trainer.learner.optimizer, trainer.learner.names)


def plant(where, trainer, monkeypatch):
    """Puts one NaN or infinity into the next step."""
    if where == "loss":
        loss = learner.micro_batch_loss

        def bad_loss(*args, **options):
            result = loss(*args, **options)
            return result._replace(loss=result.loss * math.nan)

        monkeypatch.setattr(learner, "micro_batch_loss", bad_loss)
    elif where == "gradient":
        parameter = trainer.model.model.norm.weight
        hook = parameter.register_hook(lambda grad: grad * math.inf)
        step = trainer.train_step
        monkeypatch.setattr(trainer, "train_step", lambda: (step(), hook.remove())[0])
    elif where == "old log-prob":
        run = trainer.passes.run

        def bad_run(batch):
            logprobs = run(batch)
            logprobs.old[by_policy(batch.trajectories), 0] = math.nan
            return logprobs

        monkeypatch.setattr(trainer.passes, "run", bad_run)
    elif where == "rollout log-prob":
        roll_out = trainer.generator.roll_out

        def bad_roll_out(*args):
            trajectories = roll_out(*args)
            trajectories.rollout_logprob[by_policy(trajectories), 0] = -math.inf
            return trajectories

        monkeypatch.setattr(trainer.generator, "roll_out", bad_roll_out)
    else:
        assign = trainer.grader.assign_credit

        def bad_credit(*args):
            outcome = assign(*args)
            outcome.advantage[0, 0] = outcome.rewards[0, 0] = math.nan
            outcome.trains[0, 0] = True
            return outcome

        monkeypatch.setattr(trainer.grader, "assign_credit", bad_credit)


def by_policy(trajectories):
    """The trajectories that train, and the policy's others."""
    return ~trajectories.is_momentum.flatten()


@pytest.mark.parametrize("row", ["one", "all"])
@pytest.mark.fault("logits that are not finite")
def test_a_model_whose_logits_are_not_finite_moves_nothing(small, trained, weights_of, row):
    """The filter drops such trajectories, so that nothing of them reaches the loss; they are counted all the same."""
    trainer, _ = trained(small({"optim.lr": 1e-3, "steps": 3}), 1)
    before, moments = weights_of(trainer), copy_tensors(trainer_moments(trainer))
    decoder = trainer.model.get_decoder()

    def spoil(module, args, kwargs, output):
        output.last_hidden_state[0 if row == "one" else slice(None)] = math.nan
        return output

    hook = decoder.register_forward_hook(spoil, with_kwargs=True)
    result = trainer.train_step()
    hook.remove()
    assert result.metrics["nonfinite_steps"] == trainer.learner.nonfinite_in_row == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(trainer).items())
    assert all(torch.equal(tensor, moments[name]) for name, tensor in trainer_moments(trainer).items())
    suspects = [entry["finite"] for entry in result.fault["trajectories"]].count(False)
    assert suspects == (1 if row == "one" else 24)
    assert trainer.train_step().metrics["nonfinite_steps"] == 1 and trainer.learner.nonfinite_in_row == 0


@pytest.mark.fault("weights that are not finite")
def test_a_model_that_is_lost_stops_the_run(launch, tmp_path, rows_of, monkeypatch):
    def spoil(self, batch, run=Passes.run):
        self.loaded.model.model.norm.weight.data.fill_(math.nan)
        return run(self, batch)

    monkeypatch.setattr(Passes, "run", spoil)
    assert launch({"steps": 9, "optim.max_nonfinite": 3}) == Exit.NON_FINITE
    assert [row["nonfinite_steps"] for row in rows_of(tmp_path / "run")] == [1, 2, 3]
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_3" / WEIGHTS[1])
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.fault("numbers that stay not finite")
def test_steps_that_are_not_finite_in_a_row_stop_the_run(launch, tmp_path, rows_of, monkeypatch):
    def bad_run(self, batch, run=Passes.run):
        logprobs = run(self, batch)
        logprobs.old.fill_(math.nan)
        return logprobs

    monkeypatch.setattr(Passes, "run", bad_run)
    assert launch({"steps": 9, "optim.max_nonfinite": 3}) == Exit.NON_FINITE
    rows = rows_of(tmp_path / "run")
    assert [row["nonfinite_steps"] for row in rows] == [1, 2, 3]
    written = sorted(path.name for path in (tmp_path / "run" / "faults").iterdir())
    assert written == ["step_1.json", "step_2.json", "step_3.json"]
    start = load_model(small_config().model).model.state_dict()
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_3" / WEIGHTS[1])
    assert all(torch.equal(start[name], tensor) for name, tensor in saved.items())


# ---- the answer checker


@pytest.mark.fault("worker of the answer checker stopped, and so silent")
def test_a_stopped_worker_is_replaced_and_changes_no_verdict():
    worker = EquivalenceWorker(timeout_s=20.0, hang_s=1.0)
    try:
        assert worker.compare("a+b", "b+a")
        assert worker.pid is not None
        stopped = worker.pid
        os.kill(stopped, signal.SIGSTOP)
        start = time.monotonic()
        assert worker.compare("x+1", "1+x")
        assert 0.9 < time.monotonic() - start < 60
        assert worker.pid != stopped
    finally:
        worker.close()


@pytest.mark.fault("worker of the answer checker killed in the middle of a pair")
def test_a_worker_killed_at_work_is_asked_again():
    """The verdict is that of an undisturbed comparison, which takes about a second here."""
    pair = ("(x+y+z)^{9}", r"(z+y+x)^{9}+0*\sin(x)")
    with AnswerChecker(timeout_s=60.0) as checker:
        expected = checker.equivalent(*pair)
    with AnswerChecker(timeout_s=60.0) as checker:
        checker.equivalent("a+b", "b+a")
        (pid,) = checker.worker_pids
        killer = threading.Timer(0.005, lambda: os.kill(pid, signal.SIGKILL))
        killer.start()
        assert checker.equivalent(*pair) == expected
        killer.join()
        assert checker.equivalent("x+2", "2+x")
        assert checker.worker_pids != [pid] and (checker.timeouts, checker.failures) == (0, 0)


@pytest.mark.fault("busy machine around the answer checker")
def test_a_busy_machine_changes_no_verdict():
    """A worker that gets a small share of a processor needs long by the clock, and its limit is not the clock."""
    with AnswerChecker(timeout_s=1.0) as checker:
        checker.equivalent("a+b", "b+a")
        (pid,) = checker.worker_pids
        os.sched_setaffinity(pid, {min(os.sched_getaffinity(0))})
        resting = threading.Event()

        def throttle():
            while not resting.is_set():
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.1)
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.005)

        thread = threading.Thread(target=throttle)
        thread.start()
        try:
            start = time.monotonic()
            assert checker.equivalent(r"\frac{x^{2}-1}{x-1}+\sqrt{8}", r"x+1+2\sqrt{2}")
            took = time.monotonic() - start
        finally:
            resting.set()
            thread.join()
        print(f"{took:.1f} s by the clock")
        assert checker.timeouts == 0 and checker.worker_pids == [pid]
        assert took > 0.5
