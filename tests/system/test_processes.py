"""What the command that starts several processes says."""

from __future__ import annotations

import pytest
from small_training import make_flags

from mgrpo.errors import Exit
from mgrpo.train import main


@pytest.mark.parametrize("code", [Exit.DONE, Exit.ERROR, Exit.ENGINE, Exit.STORAGE, Exit.COLLAPSE, Exit.BAD_INPUT])
@pytest.mark.parametrize("is_saved", [True, False])
def test_it_says_that_it_starts_and_how_to_go_on(tmp_path, monkeypatch, capsys, code, is_saved):
    run_dir = tmp_path / "run"

    def start(command, processes, folder, *, max_restarts):
        assert capsys.readouterr().out == "Starting 3 processes ...\n"
        if is_saved:
            (folder / "checkpoints" / "step_2").mkdir(parents=True)
        return code

    monkeypatch.setattr("mgrpo.run.processes.start_workers", start)
    assert main(make_flags(run_dir, {"distributed.processes": 3})) == code
    hint = f"continue with --resume --run-dir {run_dir}\n"
    assert capsys.readouterr().err == (hint if is_saved and code in (1, 5, 6) else "")
