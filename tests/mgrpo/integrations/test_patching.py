"""Names in other packages that lead to our functions for a while."""

from __future__ import annotations

import sys
import tomllib
import types
from pathlib import Path

import pytest

from mgrpo.integrations import UnsupportedVersion, patch_kernels
from mgrpo.integrations.patching import Patch, Replacement, replace_everywhere
from mgrpo.integrations.versions import SUPPORTED, require


@pytest.fixture
def package(monkeypatch) -> types.ModuleType:
    """A package `other` whose module `other.math` has `double`, which `other.user` has imported by name."""
    names = ("other", "other.math", "other.user")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def double(value, times=2):
        return value * times

    class Holder:
        @staticmethod
        def halve(value):
            return value / 2

    modules["other"].math, modules["other"].user = modules["other.math"], modules["other.user"]
    modules["other.math"].double = modules["other.user"].double = modules["other.user"].twice = double
    modules["other.math"].Holder = Holder
    Holder.__module__ = "other.math"
    return modules["other"]


def triple(value, times=3):
    return value * times


def test_every_name_of_a_function_is_replaced_and_given_back(package):
    double = package.math.double
    with Patch(replace_everywhere(double, triple, "other")) as patch:
        assert package.math.double(2) == package.user.double(2) == package.user.twice(2) == 6
    assert package.math.double is package.user.double is package.user.twice is double
    patch.undo()
    assert package.math.double is double


def test_names_are_given_back_when_the_block_fails(package):
    with pytest.raises(ZeroDivisionError), Patch([Replacement(package.math, "double", triple)]):
        assert package.math.double(2) == 6
        _ = 1 / 0
    assert package.math.double(2) == 4


def test_a_module_that_imported_the_name_meanwhile_gets_it_back_too(package):
    with Patch([Replacement(package.math, "double", triple)]):
        package.user.double = package.math.double  # as `from other.math import double` does
    assert package.user.double(2) == 4


def test_a_static_method_stays_one(package):
    with Patch([Replacement(package.math.Holder, "halve", staticmethod(lambda value: value))]):
        assert package.math.Holder().halve(4) == 4
    assert package.math.Holder().halve(4) == 2
    assert isinstance(vars(package.math.Holder)["halve"], staticmethod)


def test_a_name_that_is_gone_or_takes_other_arguments_changes_nothing(package):
    known = Replacement(package.math, "double", triple)
    with pytest.raises(AttributeError, match=r"other.math must have 'quadruple', got none"):
        Patch([known, Replacement(package.math, "quadruple", triple)])
    with pytest.raises(TypeError, match=r"other.math.double must take \['value'\], got also \['times'\]"):
        Patch([known, Replacement(package.math, "double", lambda value: value)])
    assert package.math.double(2) == 4


def test_versions_outside_the_range_are_refused(monkeypatch):
    found = {"trl": "1.17.0", "verl": "0.9.1"}

    def version(name):
        if name not in found:
            raise __import__("importlib.metadata").metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    with pytest.raises(
        UnsupportedVersion, match=r"trl must be >=1.16,<1.17, got 1.17.0. pip install 'trl>=1.16,<1.17'"
    ):
        require("trl")
    with pytest.raises(UnsupportedVersion, match=r"openrlhf>=0.11,<0.12 must be installed, got none"):
        require("openrlhf")
    assert require("verl") == "0.9.1"
    found["trl"] = "1.16.3"
    assert require("trl") == "1.16.3"
    assert issubclass(UnsupportedVersion, ImportError)


def test_other_packages_have_no_kernels_to_patch():
    with pytest.raises(ValueError, match=rf"package must be one of \['openrlhf', 'trl', 'verl'\], got {__name__}"):
        patch_kernels(sys.modules[__name__])
    assert set(SUPPORTED) == {"openrlhf", "trl", "verl"}


def test_the_extras_ask_for_the_versions_that_are_supported():
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for package in ("trl", "verl"):
        assert f"{package}{SUPPORTED[package]}" in extras[package]
