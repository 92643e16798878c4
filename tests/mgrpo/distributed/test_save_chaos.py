from __future__ import annotations

import json

import pytest
from ranks import run_script


@pytest.mark.fault("kill -9 of a rank at every file of a save")
def test_a_rank_may_be_killed_at_every_file_of_a_save(tmp_path):
    run_script("save_chaos.py", 2, tmp_path)
    ends = json.loads((tmp_path / "found.json").read_text())
    assert ends.count("step_1") > 20 and ends.count("step_2") >= 2
