"""Loads models: any causal LM that transformers can load."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from mgrpo.config import LoraConfig, ModelConfig
from mgrpo.errors import CheckpointError, InputError
from mgrpo.models.adapter import POLICY, Adapter, plain_state_dict
from mgrpo.models.adapter_folder import base_of, choose_config, is_adapter, read_config
from mgrpo.models.determinism import make_deterministic
from mgrpo.models.device import pick_device
from mgrpo.models.files import (
    CONFIG,
    GENERATION,
    reading,
    refuse_lost,
    silence,
)
from mgrpo.models.plain import head_and_embedding
from mgrpo.models.rows import empty_model, fill_rows, find_files, match, open_tensors, refuse_nonfinite
from mgrpo.models.save import make_savable, save_model
from mgrpo.models.tokenizer import (
    Tokenizer,
    load_tokenizer,
    resolve_path,
)

# Special tokens that a tokenizer may add to a prompt.
SPECIAL_TOKENS = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A causal LM with fp32 weights, its tokenizer and its special tokens.

    With an adapter, only that is trained and saved. With `files`, the weights are empty until `fill`.
    """

    model: PreTrainedModel
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    context_length: int
    dtype: torch.dtype  # of forward passes and rollouts
    adapter: Adapter | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    files: Mapping[str, Any] | None = None  # the tensors to be read, by the names of the state dict

    def fill(self) -> None:
        """Reads this rank's rows of a model that was loaded by rows and has been sharded since."""
        if self.files is not None:
            fill_rows(plain_state_dict(self.model, keep_vars=True), self.files, "the model's files")

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the policy; tied weights are one object."""
        return dict(self.adapter.weights(POLICY)) if self.adapter else self.model.state_dict(keep_vars=True)

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Writes weights as a model in the transformers layout, or as an adapter in peft's."""
        if self.adapter is None:
            save_model(folder, self.model, weights, self.tokenizer)
        else:
            self.adapter.save(folder, weights)
            self.tokenizer.save_pretrained(folder)

    def read(self, folder: Path, *, trust_remote_code: bool = False) -> Mapping[str, Any]:
        """What `save` wrote, as `load_weights`; raises CheckpointError where only one of both is an adapter."""
        if is_adapter(str(folder)) != (self.adapter is not None):
            held, trained = ("a whole model", "an adapter") if self.adapter else ("an adapter", "all weights")
            remedy = "Leave --lora.* out." if self.adapter else "Set --lora.rank as in that run."
            raise CheckpointError(f"resume: {folder} holds {held}, this run trains {trained}. {remedy}")
        if self.adapter:
            return self.adapter.read(folder)
        names = {name for name, _ in self.model.named_parameters()}
        return load_weights(folder, names, trust_remote_code=trust_remote_code)


def load_model(
    config: ModelConfig, lora: LoraConfig | None = None, *, seed: int = 0, by_rows: bool = False
) -> LoadedModel:
    """Loads tokenizer and model.

    Args:
        config: the model, or an adapter, which is loaded into its base.
        lora: the adapter to train. None trains none: the adapter that `config` names is merged into its base.
        seed: of a new adapter.
        by_rows: leave the weights empty and on the CPU, for `LoadedModel.fill`, if the files name them as the model
            does; of other files the whole model is read.

    Raises:
        ConfigError: the model cannot have the adapter, or the options of the adapter contradict its folder.
        InputError: the folder cannot be used.
    """
    tokenizer = load_tokenizer(config)
    adapter = (
        choose_config(config.path, lora) if lora else read_config(config.path) if is_adapter(config.path) else None
    )
    base = resolve_path(base_of(config.path))
    name = config.path if base == resolve_path(config.path) else base
    options: dict[str, Any] = {"attention": config.attn_implementation, "trust_remote_code": config.trust_remote_code}
    found = _model_and_files(base, name, tokenizer, **options) if by_rows else None
    model, files = found or (_read_model(base, name, **options), None)
    _check_ids(model, tokenizer, config.path)
    _prepare(model, config)
    device = pick_device(config.device)
    if files is None:
        for key, tensor in model.state_dict().items():
            refuse_nonfinite(key, tensor, config.path)
        torch.nn.Module.to(model, device)
    folder = Path(config.path) if is_adapter(config.path) else None
    held = Adapter(model, adapter, seed=seed, folder=folder, trained=lora is not None) if adapter else None
    if held and lora is None:
        held.merge()
        held = None
    return LoadedModel(
        model=model,
        tokenizer=tokenizer.tokenizer,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        context_length=min(tokenizer.context_length, _num_positions(model)),
        dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32,
        adapter=held,
        device=device,
        files=files,
    )


def _prepare(model: PreTrainedModel, config: ModelConfig) -> None:
    """Makes a model savable, with a line on what is dropped, and its passes deterministic."""
    if dropped := make_savable(model):
        print(
            f"model: {GENERATION} of {config.path} is saved without {', '.join(dropped)}: its values contradict one "
            "another, and transformers does not write them.",
            file=sys.stderr,
        )
    try:
        make_deterministic(model, gradient_checkpointing=config.gradient_checkpointing)
    except ValueError as error:
        raise InputError(
            f"model: --model.gradient-checkpointing needs a model that has it, {type(model).__name__} has not. "
            "Leave it out."
        ) from error


def _model_and_files(
    base: str, name: str, tokenizer: Tokenizer, *, attention: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """An empty model and its tensors in the files; None if the files name them otherwise."""
    with silence(), reading(name, CONFIG):
        config = copy.deepcopy(tokenizer.model_config)
        model = _with_attention(
            attention,
            lambda attention: empty_model(base, config, attention=attention, trust_remote_code=trust_remote_code),
        )
        files = match(open_tensors(*find_files(base)), model.state_dict(keep_vars=True))
    return None if files is None else (model, files)


def _with_attention(attention: str | None, load: Callable[[str | None], Any]) -> Any:
    """Loads with an implementation of attention; a family that has no sdpa, or no attention at all, takes eager."""
    try:
        return load(attention)
    except ValueError as error:
        if attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        return load("eager")


def _read_model(path: str | Path, name: str, *, attention: str | None = None, **options: Any) -> PreTrainedModel:
    """Reads a model in fp32, of which no parameter is missing; `name` is that of the folder in messages."""
    read: Any = AutoModelForCausalLM.from_pretrained
    # refuse_lost reports in one line what transformers logs as a table.
    with silence(), reading(name, CONFIG, unless=(OSError, ValueError, RuntimeError, ImportError, SafetensorError)):
        model, loading = _with_attention(
            attention,
            lambda attention: read(
                path,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                attn_implementation=attention,
                **options,
            ),
        )
    refuse_lost(loading, name)
    return model


def num_embeddings(model: PreTrainedModel) -> int | None:
    """Rows of the input embedding, the bound of token ids; None if the model does not give it."""
    weight = head_and_embedding(model)[1]
    return None if weight is None else len(weight)


def _check_ids(model: PreTrainedModel, tokenizer: Tokenizer, path: str) -> None:
    """Raises InputError for a special token without a row in the embedding."""
    special = {f"{name}_token": getattr(tokenizer.tokenizer, f"{name}_token_id", None) for name in SPECIAL_TOKENS}
    special |= {"pad": tokenizer.pad_id} | {"EOS token": max(tokenizer.eos_ids)}
    rows = num_embeddings(model)
    for name, token in special.items():
        if rows is not None and token is not None and token >= rows:
            raise InputError(
                f"model: {name} of {path} must be below {rows}, the rows of its embedding, got {token}. "
                "Resize the embedding, or take the tokenizer that the model was made with."
            )
    if rows is not None and max(tokenizer.tokenizer.all_special_ids, default=0) >= rows:
        print(
            f"model: some special tokens of {path} have no row in its embedding: no prompt may hold them.",
            file=sys.stderr,
        )


def _num_positions(model: torch.nn.Module) -> int:
    """Rows of the model's position embedding that are usable; RoBERTa and its kin begin after the padding's row."""
    rows = [
        len(module.weight) - module.padding_idx - 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, torch.nn.Embedding)
        and module.padding_idx is not None
    ]
    return min(rows, default=2**31)


def load_weights(folder: Path, names: Collection[str] = (), *, trust_remote_code: bool = False) -> Mapping[str, Any]:
    """The parameters of a saved model: slices of its files if these hold all `names`, else whole tensors in fp32."""
    if names:
        with reading(str(folder)):
            tensors = open_tensors(*find_files(folder))
        if tensors.keys() >= set(names):
            return tensors
    return dict(_read_model(folder, str(folder), trust_remote_code=trust_remote_code).named_parameters())
