"""Folders with the files of /proc and of cgroups, as a process in a container would see them."""

from __future__ import annotations

from pathlib import Path

V2 = "31 23 0:26 {inner} {mount} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 32 0:29 {inner} {mount} rw,nosuid - cgroup cgroup rw,{controllers}"


def machine(root: Path, memberships: list[str], mounts: list[str], files: dict[str, str]) -> Path:
    """A folder with the files of /proc and of the cgroups that a process would see."""
    folder = root / "proc/self"
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in memberships))
    (folder / "mountinfo").write_text("".join(f"{line}\n" for line in ["21 1 8:1 / / rw - ext4 /dev/sda1 rw", *mounts]))
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def v2(root: Path, files: dict[str, str], *, path: str = "/", inner: str = "/", mount: str = "/sys/fs/cgroup") -> Path:
    full = {f"{mount.lstrip('/')}/{name}": text for name, text in files.items()}
    return machine(root, [f"0::{path}"], [V2.format(inner=inner, mount=mount.replace(" ", "\\040"))], full)


def v1(
    root: Path, files: dict[str, str], *, path: str = "/", inner: str = "/", controllers: str = "cpu,cpuacct"
) -> Path:
    mount = f"/sys/fs/cgroup/{controllers}"
    full = {f"{mount.lstrip('/')}/{name}": text for name, text in files.items()}
    members = [f"5:memory:{path}/other", f"3:{controllers}:{path}", "0::/"]
    mounts = [V1.format(inner=inner, mount=mount, controllers=controllers)]
    mounts += [V1.format(inner="/", mount="/sys/fs/cgroup/memory", controllers="memory")]
    return machine(root, members, mounts, full)
