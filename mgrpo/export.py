"""Writes the trained model of a run as a whole one, adapters merged: `python -m mgrpo.export RUN_DIR --out DIR`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from mgrpo.config import HomePath, ModelConfig
from mgrpo.errors import CheckpointError, ConfigError, InputError, StorageError
from mgrpo.models.adapter_folder import is_adapter
from mgrpo.models.files import quiet_transformers
from mgrpo.models.load import load_model
from mgrpo.models.save import save_model, saving
from mgrpo.process.command_line import read_command_line
from mgrpo.process.output import protect_output
from mgrpo.run.checkpoint import newest_valid, verify_checkpoint


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Writes a model of a run in the transformers layout; an adapter is merged into its base: W + scale B A."""

    source: tyro.conf.Positional[HomePath]
    """A run directory, of which the newest valid checkpoint is taken; a checkpoint; or the folder of an adapter."""
    out: HomePath
    """Folder to write; it must be new or empty."""
    momentum: bool = False
    """The momentum model instead of the policy."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the written weights; the merge itself is in fp32."""
    trust_remote_code: bool = False
    """Allow a model folder to run its own code."""


def find_model(source: Path, *, momentum: bool) -> Path:
    """The folder of the model that is meant.

    Raises:
        CheckpointError: the checkpoint is damaged.
        InputError: there is no checkpoint, or the folder of an adapter has no momentum model.
    """
    if is_adapter(str(source)):
        if momentum:
            raise InputError(f"export: --momentum needs a run or a checkpoint, {source} is one adapter. Leave it out.")
        return source
    name = "momentum" if momentum else "policy"
    if (source / name).is_dir():
        verify_checkpoint(source)
        return source / name
    folder, complaints = newest_valid(source)
    for complaint in complaints.values():
        print(f"export: skipped {complaint}", file=sys.stderr)
    if folder is None:
        raise InputError(f"export: {source} must be a run with a checkpoint, a checkpoint or an adapter, it is none.")
    return folder / name


def export(args: ExportArgs) -> Path:
    """Loads, merges and writes; returns the folder of the model that was read."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"export: --out must be a new or empty folder, got {args.out}.")
    folder = find_model(args.source, momentum=args.momentum)
    loaded = load_model(ModelConfig(path=str(folder), device="cpu", trust_remote_code=args.trust_remote_code))
    model = loaded.model.to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)  # pyright: ignore
    with saving(args.out):
        save_model(args.out, model, model.state_dict(), loaded.tokenizer)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 2 for bad input, or 6 if the model cannot be written."""
    protect_output()
    quiet_transformers()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        args = read_command_line(ExportArgs, arguments, command="export", prog="python -m mgrpo.export").require()
        print(f"{export(args)} as a whole model in {args.out}")
    except (CheckpointError, ConfigError, InputError, StorageError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
