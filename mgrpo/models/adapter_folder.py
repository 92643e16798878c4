"""Folders of LoRA adapters in peft's layout: which base they are of, and what is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgrpo.config import LoraConfig, flag
from mgrpo.errors import ConfigError, InputError, whole
from mgrpo.models.files import ADAPTER, BUILTIN, silence

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig

ALL_LINEAR = "all-linear"
# What an adapter may set: sizes, scales and places of plain LoRA. Everything else changes what an adapter computes.
_SIZES = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"}
_PLACES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
# What has no effect on a trained adapter; dropout is not used, because log-probs must be those of the rollouts.
_HISTORY = {"lora_dropout", "init_lora_weights", "inference_mode", "task_type", "auto_mapping", "peft_version"}
_ALLOWED = _SIZES | _PLACES | _HISTORY | {"peft_type", "base_model_name_or_path"}


def is_adapter(path: str) -> bool:
    """Whether a path is the folder of an adapter."""
    return (Path(path) / ADAPTER).is_file()


def base_of(path: str) -> str:
    """The path or hub id of a model's weights: the path itself, or the base of an adapter's folder.

    Raises:
        InputError: the folder names no base, or one that does not exist.
    """
    if not is_adapter(path):
        return path
    where = f"model: base_model_name_or_path of {Path(path) / ADAPTER}"
    base = json.loads((Path(path) / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{where} must name the base model, got {base!r}. Write its folder or hub id there.")
    is_hub_id = base.count("/") <= 1 and not base.startswith(("/", ".", "~"))
    if not base.startswith(BUILTIN) and not Path(base).is_dir() and not is_hub_id:
        raise InputError(f"{where} must be a folder or hub id, {base} does not exist. Write the base's place there.")
    if is_adapter(base):
        raise InputError(f"{where} must be a whole model, {base} holds an adapter. Merge it first: mgrpo.export.")
    return base


def name_of_base(path: str) -> str:
    """The name by which an adapter's folder finds its base from any directory."""
    base = base_of(path)
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def read_config(path: str) -> PeftConfig:
    """The configuration of an adapter's folder; raises InputError for more than plain LoRA."""
    require_peft(f"--model.path {path}, an adapter,")
    from peft import LoraConfig, PeftConfig

    file = Path(path) / ADAPTER
    try:
        with silence():
            config = PeftConfig.from_pretrained(path)
    except Exception as error:  # of a file that peft does not understand
        raise InputError(f"model: {file} must hold what peft reads, got: {whole(error)}.") from error
    if not isinstance(config, LoraConfig):
        raise InputError(f"model: {file} must describe a LoRA adapter, got peft_type {config.peft_type}.")
    plain, found = LoraConfig().to_dict(), config.to_dict()
    extra = sorted(name for name in plain.keys() - _ALLOWED if found[name] != plain[name])
    if config.init_lora_weights not in (True, False, "gaussian"):
        extra.append(f"init_lora_weights {config.init_lora_weights}")  # which changes the base
    if extra:
        raise InputError(f"model: {file} must describe plain LoRA, got {', '.join(extra)}. Merge it with peft first.")
    return config


def choose_config(path: str, lora: LoraConfig) -> PeftConfig | None:
    """The adapter of a run: that of the folder `path`, or the one that the options describe; None for neither.

    Raises:
        ConfigError: peft is not installed, or an option contradicts the folder or lacks a rank.
        InputError: the folder cannot be used.
    """
    given = {"rank": lora.rank or None, "alpha": lora.alpha, "targets": lora.targets}
    if is_adapter(path):
        config = read_config(path)
        _refuse_others(path, config, given)
        config.lora_dropout, config.inference_mode = 0.0, False
        return config
    if not lora.rank:
        if extra := [flag(f"lora.{name}") for name, value in given.items() if value is not None]:
            needs = "needs" if len(extra) == 1 else "need"
            raise ConfigError([f"config: {' and '.join(extra)} {needs} --lora.rank of at least 1, got 0."])
        return None
    require_peft("--lora.rank")
    from peft import LoraConfig as PeftConfig

    targets = lora.targets or (ALL_LINEAR,)
    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=name_of_base(path),
    )


def _refuse_others(path: str, config: PeftConfig, given: dict[str, Any]) -> None:
    """Raises ConfigError for each given option that differs from the folder's adapter."""
    modules = config.target_modules or ()
    targets = (modules,) if isinstance(modules, str) else tuple(sorted(modules))
    saved = {"rank": config.r, "alpha": config.lora_alpha, "targets": targets}
    wanted = given | {"targets": given["targets"] and tuple(sorted(given["targets"]))}
    problems = [
        f"config: --lora.{name} must be {_spell(saved[name])}, as in {Path(path) / ADAPTER}, got {_spell(value)}. "
        "Leave it out."
        for name, value in wanted.items()
        if value is not None and value != saved[name]
    ]
    if problems:
        raise ConfigError(problems)


def _spell(value: Any) -> str:
    """A value as on the command line."""
    return " ".join(value) if isinstance(value, tuple) else str(value)


def require_peft(what: str) -> None:
    """Raises ConfigError if peft is not installed."""
    if find_spec("peft") is None:
        raise ConfigError([f"config: {what} needs the package peft, it is not installed. pip install mgrpo[lora]."])
