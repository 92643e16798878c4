"""Names of an earlier release."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from mgrpo.moved import MOVED

HOSTS = ("integrations.trl", "integrations.verl", "integrations.openrlhf")


@pytest.mark.parametrize("old", [name for name in MOVED if not name.startswith(HOSTS)])
def test_an_old_module_warns_and_has_its_names(old):
    sys.modules.pop(f"mgrpo.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"mgrpo.{old} has moved to mgrpo."):
        module = importlib.import_module(f"mgrpo.{old}")
    for place in MOVED[old].split():
        found = importlib.import_module(f"mgrpo.{place}")
        name = next(name for name in vars(found) if not name.startswith("_") and name != "annotations")
        assert hasattr(module, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_public_names_of_an_earlier_release_are_those_of_today():
    code = (
        "from mgrpo.judging import judge, Judgement; from mgrpo.answers import AnswerChecker\n"
        "from mgrpo.config import Config, ConfigError; from mgrpo.run import Exit, run\n"
        "import mgrpo.algorithm.credit as c, mgrpo.grading as g\n"
        "assert (judge, Judgement, AnswerChecker) == (c.assign_credit, c.Credit, g.AnswerChecker)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mgrpo.judging has moved to mgrpo.algorithm.credit." in done.stderr
