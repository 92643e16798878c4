"""Loading models: what is refused, what is set, and lending weights."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import same_bits, snapshot, tiny_model
from transformers import AutoConfig, OPTConfig, OPTForCausalLM, PretrainedConfig

from mgrpo.config import KernelsConfig, ModelConfig, MomentumConfig
from mgrpo.data.prompts import InputError
from mgrpo.errors import ConfigError
from mgrpo.models.device import pick_device
from mgrpo.models.load import load_model, load_weights
from mgrpo.models.momentum import Momentum, borrowed_weights
from mgrpo.models.save import save_model
from mgrpo.models.tokenizer import context_length, load_tokenizer, resolve_path
from mgrpo.tasks.arithmetic import make_model, make_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A saved model with its tokenizer."""
    model = make_model()
    save_model(tmp_path / "model", model, model.state_dict(), make_tokenizer())
    return tmp_path / "model"


def edit(path, **changes) -> None:
    """Changes keys of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def config(folder, **options) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", **options)


def test_builtin_model_loads():
    loaded = load_model(ModelConfig(path="builtin:arithmetic", device="cpu"))
    assert loaded.eos_ids == (1,)
    assert loaded.pad_id == 0
    assert loaded.context_length == 256
    assert loaded.dtype == torch.float32
    assert not loaded.model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer.encode("1+2=") == [3, 12, 4, 14]


def test_unknown_builtin_lists_the_shipped_ones():
    with pytest.raises(
        InputError,
        match=r"one of \['builtin:arithmetic', 'builtin:arithmetic32'\], a folder or a hub id, got builtin:nope",
    ):
        load_model(ModelConfig(path="builtin:nope"))
    assert resolve_path("some/folder") == "some/folder"


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match="must be a model folder or a reachable hub id"):
        load_model(config(tmp_path))


def test_a_model_without_eos_is_refused(folder):
    edit(folder / "config.json", eos_token_id=None)
    edit(folder / "tokenizer_config.json", eos_token=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match="must have an EOS token, got none"):
        load_model(config(folder))


def test_eos_ids_are_gathered_from_every_file(folder):
    edit(folder / "config.json", eos_token_id=[5, 7])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5]}))
    assert load_tokenizer(config(folder)).eos_ids == (1, 5, 7, 9)


def test_eos_of_the_tokenizer_is_enough_and_pads(folder):
    edit(folder / "config.json", eos_token_id=None, pad_token_id=None)
    edit(folder / "tokenizer_config.json", pad_token=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer = load_tokenizer(config(folder))
    assert tokenizer.eos_ids == (1,)
    assert tokenizer.pad_id == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weights_are_named(folder, value):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"model\.norm\.weight .* must be finite"):
        load_model(config(folder))


def test_device_names():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"must be auto, cpu or cuda\[:N\], got quantum"):
        pick_device("quantum")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ConfigError, match="got cuda:1 where torch sees no GPU"):
            pick_device("cuda:1")


def test_context_length_goes_by_many_names():
    assert context_length(tiny_model("gpt2").config) == 128
    assert context_length(tiny_model("llama").config) == 128
    assert context_length(PretrainedConfig(n_positions=77)) == 77
    assert context_length(AutoConfig.for_model("bloom")) == 2**31


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_master_weights_are_fp32_whatever_the_folder_holds(folder, dtype):
    model = make_model()
    model.to(dtype).save_pretrained(folder)
    loaded = load_model(config(folder, dtype="bf16"))
    assert loaded.dtype == torch.bfloat16
    for name, weight in loaded.model.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.get_parameter(name).float())


def opt_model() -> OPTForCausalLM:
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=17,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            dropout=0.5,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


@pytest.mark.parametrize(
    "architecture",
    ["gpt2", "opt"],
)
def test_dropout_is_off_even_while_checkpointing(tmp_path, architecture):
    model = opt_model() if architecture == "opt" else tiny_model("gpt2")
    assert architecture == "opt" or model.config.resid_pdrop == 0.1
    save_model(tmp_path, model, model.state_dict(), make_tokenizer())
    loaded = load_model(config(tmp_path, gradient_checkpointing=True)).model
    assert loaded.training and loaded.is_gradient_checkpointing
    ids = torch.arange(2, 12)[None]
    assert torch.equal(loaded(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits)


def other_weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() + 1 for name, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_borrowed_weights_compute_and_go_back(architecture):
    model, other = tiny_model(architecture), tiny_model(architecture, seed=1)
    ids = torch.arange(2, 9)[None]
    own = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = snapshot(model.state_dict())
    with torch.no_grad():
        own_logits, expected = model(ids).logits, other(ids).logits
        with borrowed_weights(model, other.state_dict()):
            assert torch.equal(model(ids).logits, expected)
            for name, p in model.named_parameters():
                assert p.data_ptr() == other.get_parameter(name).data_ptr()
        assert torch.equal(model(ids).logits, own_logits)
    assert not torch.equal(own_logits, expected)
    assert same_bits(model.state_dict(), before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == own


def test_borrowed_weights_go_back_after_an_exception():
    model = tiny_model("llama")
    before = snapshot(model.state_dict())
    with pytest.raises(ZeroDivisionError), borrowed_weights(model, other_weights(model)):
        raise ZeroDivisionError
    assert same_bits(model.state_dict(), before)
    incomplete = other_weights(model)
    incomplete.popitem()
    with pytest.raises(KeyError), borrowed_weights(model, incomplete):
        pass
    assert same_bits(model.state_dict(), before)


def test_borrowed_weights_are_cast_and_not_written():
    model = tiny_model("llama")
    lent = {name: weight.bfloat16() for name, weight in other_weights(model).items()}
    before = snapshot(lent)
    with borrowed_weights(model, lent):
        for name, p in model.named_parameters():
            assert p.dtype == torch.float32
            assert torch.equal(p, lent[name].float())
    assert same_bits(lent, before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16-kahan"])
def test_momentum_weights_are_saved_and_read_bit_for_bit(tmp_path, dtype):
    model = tiny_model("qwen3")
    momentum = Momentum(model, MomentumConfig(decay=0.5, dtype=dtype), seed=0, kernels=KernelsConfig())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7)
    momentum.update(0, 1)
    save_model(tmp_path, model, momentum.state_dict(), make_tokenizer())
    assert same_bits(snapshot(load_weights(tmp_path)), {n: w.float() for n, w in momentum.weights.items()})
