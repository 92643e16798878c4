"""Models that are loaded by rows: the same model as from the whole files, or refused as that would be."""

from __future__ import annotations

import pytest
import torch
from helpers import ARCHITECTURES, tiny_model
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig
from transformers import MixtralForCausalLM as Mixtral

from mgrpo.config import LoraConfig, ModelConfig
from mgrpo.errors import InputError
from mgrpo.models.load import load_model, load_weights
from mgrpo.models.rows import open_tensors
from mgrpo.tasks.arithmetic import make_tokenizer

IDS = torch.arange(2, 12)[None]
SMALL = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 1}


def make(architecture):
    if architecture == "mamba":
        return MambaForCausalLM(MambaConfig(**SMALL, state_size=4)).eval()
    if architecture == "mixtral":  # whose experts are several tensors in files and one in the model
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None}
        return Mixtral(MixtralConfig(**SMALL, **heads, intermediate_size=16, num_local_experts=2)).eval()
    return tiny_model(architecture)


@pytest.fixture
def saved(tmp_path):
    """Saves a model with a tokenizer; returns the folder."""

    def save(model, **options):
        model.save_pretrained(tmp_path, **options)
        make_tokenizer().save_pretrained(tmp_path)
        return tmp_path

    return save


def load(folder, **options):
    return load_model(ModelConfig(path=str(folder), device="cpu"), **options)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_make_the_model_that_the_whole_files_make(saved, architecture, dtype):
    folder = saved(make(architecture).to(dtype), max_shard_size="8KB")  # several files
    whole, empty = load(folder), load(folder, by_rows=True)
    assert empty.files is not None and whole.files is None
    empty.fill()
    own, expected = empty.model.state_dict(), whole.model.state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
    assert all(p.dtype == torch.float32 for p in empty.model.parameters())
    buffers = dict(whole.model.named_buffers())
    assert {name: torch.equal(b, buffers[name]) for name, b in empty.model.named_buffers()} == dict.fromkeys(
        buffers, True
    )
    assert len(list(empty.model.parameters())) == len(list(whole.model.parameters()))  # ties
    assert torch.equal(empty.model(IDS).logits, whole.model(IDS).logits)
    for name in ("generation_config", "config"):
        found = getattr(empty.model, name).to_dict()
        assert found == getattr(whole.model, name).to_dict(), name


def test_files_with_other_names_are_read_whole(saved):
    folder = saved(make("mixtral"))
    loaded = load(folder, by_rows=True)
    assert loaded.files is None
    assert torch.equal(loaded.model(IDS).logits, load(folder).model(IDS).logits)


def test_a_decoder_without_its_head_is_refused_as_ever(saved):
    folder = saved(tiny_model("llama").model)
    with pytest.raises(InputError, match=r"it lacks lm_head\.weight"):
        load(folder, by_rows=True)


def test_another_shape_is_refused_as_ever(saved):
    folder = saved(tiny_model("llama"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.norm.weight": torch.ones(17)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"of the shapes that its config.json describes, got model\.norm\.weight"):
        load(folder, by_rows=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weights_are_named(saved, value):
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value
    loaded = load(saved(model), by_rows=True)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight of .* must be finite"):
        loaded.fill()


def test_no_weights_are_refused_as_ever(saved):
    folder = saved(tiny_model("llama"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load(folder, by_rows=True)


def test_the_base_of_an_adapter_is_empty_and_the_adapter_is_not(saved):
    folder = saved(tiny_model("llama"))
    whole, empty = (
        load(folder, lora=LoraConfig(rank=2), seed=3),
        load(folder, lora=LoraConfig(rank=2), seed=3, by_rows=True),
    )
    assert whole.adapter and empty.adapter
    assert empty.adapter.cast_base(torch.bfloat16, empty=True)
    for (name, one), (_, other) in zip(whole.weights().items(), empty.weights().items(), strict=True):
        assert torch.equal(one, other) and other.dtype == torch.float32, name
    empty.fill()
    base = empty.adapter.base_weights()
    for name, weight in whole.adapter.base_weights().items():
        assert torch.equal(base[name], weight.bfloat16()), name


def test_slices_of_files_are_read_where_the_names_are_the_models(saved):
    model = tiny_model("qwen3")
    folder = saved(model)
    names = {name for name, _ in model.named_parameters()}
    for given, kind in ((names, "slices"), ((), "whole"), ({*names, "another"}, "whole")):
        found = load_weights(folder, given)
        assert isinstance(found["model.norm.weight"], torch.Tensor) == (kind == "whole")
        assert all(torch.equal(found[name][1:3], weight[1:3]) for name, weight in model.named_parameters())


def test_scalars_are_read_at_once(tmp_path):
    save_file({"step": torch.tensor(3.0), "rows": torch.arange(6.0)}, tmp_path / "a.safetensors")
    found = open_tensors(tmp_path / "a.safetensors")
    assert float(found["step"]) == 3 and found["rows"][2:4].tolist() == [2, 3]
