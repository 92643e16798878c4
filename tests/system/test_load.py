"""A long run on much data: memory, files, processes and threads stay what they were."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mgrpo.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def resident_mib() -> float:
    """Memory of this process that is in use; what was freed goes back to the system first, or its holes are counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def held(run_dir: Path) -> tuple[int, int, int]:
    """Open files, workers of the answer checker and threads.

    Neither files of a checkpoint that is being written, as on a slow disk it is for long, nor children that other
    libraries have started, or tests before this one.
    """
    files = [file for file in map(target, Path("/proc/self/fd").iterdir()) if f"{run_dir}/checkpoints" not in file]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    workers = [child for child in children if b"grading/worker.py" in command_of(child)]
    return len(files), len(workers), threading.active_count()


def target(descriptor: Path) -> str:
    """What an open file is called; the folder of descriptors itself is gone by then."""
    try:
        return os.readlink(descriptor)
    except FileNotFoundError:
        return ""


def command_of(child: str) -> bytes:
    """Command line of a process, empty for one that has ended."""
    try:
        return Path(f"/proc/{child}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


HANGING = (r"9^{9^{9^{9}}}", r"9^{9^{9^{8}}}")


@pytest.mark.fault("100,000 prompts and 200 steps, workers of the answer checker killed on the way")
@pytest.mark.slow
def test_nothing_grows_over_two_hundred_steps(launch, tmp_path, monkeypatch):
    """From step 50, when every buffer has been used, to step 200: 2 % of memory, and nothing else.

    The answers are planted: two notations of one formula, another one at each step, so that a worker has to compare
    them; it is killed at steps 73 and 143, and hangs at step 113.
    """
    data = tmp_path / "data.jsonl"
    with data.open("w") as file:
        for i in range(100_000):
            file.write(
                json.dumps({"prompt": f"{i % 100:02d}+{i // 100 % 100:02d}=", "id": i, "text": "x" * 200}) + "\n"
            )
    seen: dict[int, tuple[float, tuple[int, int, int]]] = {}
    workers, checkers, turns = [], [], itertools.count()
    answers = [("0x+1", "1+0*x")]
    step = Trainer.train_step

    def plant(spec):
        return lambda text: answers[0][next(turns) % 2]

    def watch(trainer):
        number = trainer.step + 1
        answers[0] = HANGING if number == 113 else (f"{number}x+1", f"1+{number}*x")
        result = step(trainer)
        (worker,) = trainer.grader.checker.worker_pids or [None]
        if worker not in workers:
            workers.append(worker)
        if number in (73, 143):
            os.kill(worker, signal.SIGKILL)
        if number % 10 == 0:
            seen[number] = resident_mib(), held(tmp_path / "run")
        checkers[:] = [trainer.grader.checker]
        assert result.metrics["distinct_answers"] == (2 if number == 113 else 1)
        return result

    monkeypatch.setattr(Trainer, "train_step", watch)
    monkeypatch.setattr("mgrpo.training.grader.make_extractor", plant)
    options = {"steps": 200, "data.train": str(data), "checkpoint.every": 25, "log.backends": ("tensorboard",)}
    options |= {"monitor.retention_every": 10, "rollout.num_prompts": 8, "rollout.max_new_tokens": 8}
    options |= {"answer.equivalence": "math", "answer.timeout_s": 1, "answer.workers": 1, "monitor.on_collapse": "warn"}
    before, others = resident_mib(), held(tmp_path)[1]
    assert launch(options) == 0
    early, late = seen[50], seen[200]
    print(f"{before:.0f} MiB before, {early[0]:.0f} at step 50, {late[0]:.0f} at step 200, {late[1]}")
    assert late[0] < 1.02 * early[0]
    assert {seen[number][1] for number in range(50, 201, 10)} == {early[1]}
    assert early[1][1] - others == 1
    assert early[0] - before < 400
    assert [type(worker) for worker in workers] == [int, int, type(None), int, int]
    assert (checkers[0].timeouts, checkers[0].failures, checkers[0].worker_pids) == (1, 0, [])


LOAD = """
import dataclasses, gc, json, sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from mgrpo.models import load as policy
from mgrpo.presets import make_preset
from mgrpo.data.load import load_prompts

def mebibytes(key):
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith(key))

words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
config = make_preset("mgrpo_arithmetic")
config = dataclasses.replace(config, data=dataclasses.replace(config.data, template="Q: {prompt} A:", overlong="drop"))
room = config.rollout.max_new_tokens + int(sys.argv[2])
loaded = policy.Tokenizer(tokenizer=fast, eos_ids=(1,), pad_id=1, context_length=room, model_config=None)
before = mebibytes("VmRSS")
data = load_prompts(config, loaded, sys.argv[1])
held = sum(map(sys.getsizeof, data.prompts)) + sum(sys.getsizeof(p.text) + sys.getsizeof(p.ids) for p in data.prompts)
print(len(data), data.num_overlong, held >> 20, mebibytes("VmHWM") - before)
"""


@pytest.mark.fault("100,000 prompts of 2,000 characters: no second copy in memory")
@pytest.mark.parametrize(("room", "kept"), [(100, 100_000), (4, 10)])
def test_loading_takes_the_memory_of_the_prompts_that_are_kept(tmp_path, room, kept):
    """200 MB of text, rendered through a template, of which all or ten prompts fit."""
    data = tmp_path / "data.jsonl"
    with data.open("w") as file:
        for i in range(100_000):
            text = "y" * (2000 if i % 10_000 == 0 else 500)
            file.write(json.dumps({"prompt": text if i % 10_000 == 0 else f"{text} " * 3 + text}) + "\n")
    done = subprocess.run([sys.executable, "-c", LOAD, data, str(room)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    num, dropped, held, grown = map(int, done.stdout.split())
    print(f"{num} prompts hold {held} MiB, the peak is {grown} MiB above the start")
    assert (num, dropped) == (kept, 100_000 - kept)
    assert grown < 1.15 * held + 40
