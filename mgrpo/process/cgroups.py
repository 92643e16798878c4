"""The cgroups of this process, of version 1 and 2, whose files hold its limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cgroup_folders(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The folders of each cgroup of this process and of each parent.

    Args:
        controller: of version 1, such as `cpu` or `memory`; version 2 has one tree for all.
        root: folder that contains /proc and the mounts.
    """
    memberships = dict(_memberships(root))
    for kind, controllers, inner, mount in _mounts(root):
        if kind == "cgroup2":
            path = memberships.get("")
        else:
            path = memberships.get(controller) if controller in controllers else None
        if path is None:
            continue
        folder = root / mount.lstrip("/")
        # A container sees only the part `inner` of the tree; the limit of the rest is at the mount itself.
        below = PurePosixPath(path)
        parts = below.relative_to(inner).parts if below.is_relative_to(inner) else ()
        for depth in range(len(parts) + 1 if ".." not in parts else 1):
            yield folder.joinpath(*parts[:depth])


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """Controller and path of each cgroup of this process; the controller is "" in version 2."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, str]]:
    """Version, options, path inside the tree and mount point of each mounted cgroup tree."""
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(), after.split() or [""]
        if kind in ("cgroup", "cgroup2"):
            inner, mount = (_unescaped(field) for field in fields[3:5])
            yield kind, rest[-1].split(","), inner, mount


def _unescaped(field: str) -> str:
    """A field of mountinfo with its octal escapes replaced."""
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def read_text(path: Path) -> str:
    """A file's text, empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
