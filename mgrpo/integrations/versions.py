"""Supported versions of other trainers."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet

from mgrpo.errors import UnsupportedVersion

# From the version that the contract tests run with up to the next that may change a hook.
SUPPORTED = {
    "trl": ">=1.16,<1.17",
    "verl": ">=0.9.1,<0.10",
    "openrlhf": ">=0.11,<0.12",
}


def require(package: str) -> str:
    """The version of an installed package, if it is supported.

    Args:
        package: name of the distribution.

    Raises:
        UnsupportedVersion: the package is missing or its version is not accepted.
    """
    specifier = SUPPORTED[package]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedVersion(
            f"mgrpo.integrations: {package}{specifier} must be installed, got none. pip install 'mgrpo[{package}]'."
        ) from error
    if not SpecifierSet(specifier).contains(version, prereleases=True):
        raise UnsupportedVersion(
            f"mgrpo.integrations: {package} must be {specifier}, got {version}. pip install '{package}{specifier}'."
        )
    return version
