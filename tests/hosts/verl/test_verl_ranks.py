"""The momentum model where two processes share a model under FSDP2."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from small_verl import HERE, environment


def test_shards_are_averaged_exported_saved_and_restored_on_two_processes(tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "model")
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launch, str(HERE / "ranks_verl.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment(tmp_path),
    )
    assert result.returncode == 0, result.stderr[-5000:]
    # Two processes may write into one line.
    assert sorted(re.findall(r"SOUND \d", result.stdout)) == ["SOUND 0", "SOUND 1"]
    assert {path.name for path in (tmp_path / "actor").glob("momentum*")} == {
        "momentum_world_size_2_rank_0.safetensors",
        "momentum_world_size_2_rank_1.safetensors",
    }
