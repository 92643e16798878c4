"""Families of models: how each is decoded, what none may do, and that nothing depends on training mode."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import EOS, PAD, VOCABULARY, loaded, same_bits, snapshot
from helpers import tiny_model as plain_model
from transformers import BertConfig, BertLMHeadModel, FalconConfig, MixtralConfig, RwkvConfig, RwkvForCausalLM

from bench.models import TABLE, read_table, try_all
from bench.training.families import tiny_config, tiny_model
from mgrpo.config import KernelsConfig, ModelConfig
from mgrpo.errors import EngineError, InputError, ParityError
from mgrpo.evaluate import main
from mgrpo.models.determinism import make_deterministic
from mgrpo.models.forward import Forward
from mgrpo.models.load import load_model
from mgrpo.models.save import save_model
from mgrpo.rollout.decoding import Padded, Recomputed, Unpadded
from mgrpo.rollout.decoding_trial import choose_way
from mgrpo.rollout.parity import BOUNDS, check_parity
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.tasks.arithmetic import make_tokenizer
from mgrpo.training.trainer import Trainer
from mgrpo.types import Sampling, WeightTag, join

PROMPTS = [[7, 9, 4, 11], [5, 3], [6, 12, 8, 20, 13, 15, 9], [8, 8, 3, 4]]
SHAPE = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, pad_token_id=PAD, eos_token_id=EOS)
# One of each way, and hybrids of attention and a state.
WAYS = {
    "jamba": Padded,
    "lfm2": Padded,
    "mamba2": Padded,
    "qwen3_next": Padded,
    "bart": Unpadded,
    "mamba": Unpadded,
    "roberta": Unpadded,
    "recurrent_gemma": Recomputed,
    "rwkv": Recomputed,
}


@pytest.mark.slow
def test_the_listed_families_train():
    """Every family of transformers that builds at a tiny size."""
    outcomes = list(try_all())
    trained = {outcome.family: outcome.way.lower() for outcome in outcomes if outcome.trains}
    expected = read_table(TABLE.read_text())
    lost = {outcome.family: outcome.reason for outcome in outcomes if outcome.family in expected and not outcome.trains}
    assert not lost
    assert trained == expected, "python -m bench.models writes docs/models.md"
    num_built = sum(outcome.built for outcome in outcomes)
    assert num_built >= 160 and len(trained) >= 0.9 * num_built
    assert all(" ".join(outcome.reason.split()) == outcome.reason for outcome in outcomes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WAYS)
def test_samples_are_the_models_own(family, dtype):
    """Of prompts of unequal length, and responses that end at different times."""
    model = tiny_model(tiny_config(family, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2), gain=4)
    make_deterministic(model, gradient_checkpointing=False)
    engine = TransformersEngine(model, eos_ids=range(60), pad_id=PAD, dtype=dtype, batch_size=7)
    assert engine.way is WAYS[family]
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    rollouts = engine.generate(PROMPTS, 3, Sampling(max_new_tokens=12, seed=1), WeightTag("policy", 0))
    assert len(rollouts.lengths.unique()) > 3
    forward = Forward(loaded(model, dtype=dtype), temperature=1.0, kernels=KernelsConfig(), micro_batch_tokens=64)
    difference = (forward.run(model, join(PROMPTS, rollouts, None)).logprob - rollouts.logprobs)[rollouts.mask]
    assert difference.abs().mean() <= (1e-5 if dtype == torch.float32 else BOUNDS[dtype] / 2)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_attention_that_looks_ahead_is_refused(is_decoder):
    heads = dict(num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**SHAPE, **heads, is_decoder=is_decoder)).eval()
    if is_decoder:
        assert choose_way(model, PAD) is Padded
        return
    with pytest.raises(
        EngineError, match=r"BertLMHeadModel must be causal, .* by 0\.\d+ of their size.*is_decoder: true"
    ):
        choose_way(model, PAD)


def test_a_model_that_wants_more_than_token_ids_is_refused():
    model = plain_model("llama")
    model.forward = None
    with pytest.raises(EngineError, match="LlamaForCausalLM must give logits for token ids alone, got TypeError"):
        choose_way(model, PAD)


def test_what_a_forward_pass_raises_is_told_whole():
    model = plain_model("llama")

    def forward(*_, **__):
        raise RuntimeError("must have one of:\n - images\n - sounds\n")

    model.forward = forward
    with pytest.raises(EngineError, match=r"token ids alone, got must have one of: - images - sounds\.$"):
        choose_way(model, PAD)


def test_choosing_draws_nothing_and_changes_nothing():
    model = plain_model("qwen3")
    state, before = torch.get_rng_state(), snapshot(model.state_dict())
    assert choose_way(model, PAD) is Padded
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(model.state_dict(), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rwkv_leaves_its_weights_alone(checkpointing):
    """Of more layers than it rescales at once."""
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(**SHAPE | dict(num_hidden_layers=5), context_length=64, rescale_every=2))
    assert_scaled(copy.deepcopy(model).eval())
    make_deterministic(model, gradient_checkpointing=checkpointing)
    before = snapshot(model.state_dict())
    engine = TransformersEngine(model, eos_ids=[EOS], pad_id=PAD, dtype=torch.float32, batch_size=8)
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    engine.generate(PROMPTS, 2, Sampling(max_new_tokens=3), WeightTag("policy", 0))
    model(input_ids=torch.tensor(PROMPTS[:1]), use_cache=False)
    assert same_bits(model.state_dict(), before)
    assert model.config.rescale_every == 2


def assert_scaled(model) -> None:
    """The trap is there: a plain forward pass of this version of transformers writes its weights."""
    with pytest.raises(EngineError, match="RwkvForCausalLM must not write its weights"):
        choose_way(model, PAD)


NOISY = {
    "mixtral": MixtralConfig(
        **SHAPE, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, router_jitter_noise=0.3
    ),
    "falcon": FalconConfig(**SHAPE, num_attention_heads=2, hidden_dropout=0.4, attention_dropout=0.4),
    "bart": tiny_config("bart", pad_token_id=PAD, eos_token_id=EOS),
    "phimoe": tiny_config("phimoe", pad_token_id=PAD, eos_token_id=EOS),
}
NOISY["phimoe"].input_jitter_noise = NOISY["phimoe"].router_jitter_noise = 0.3
NOISY["bart"].decoder_layerdrop = NOISY["bart"].dropout = 0.5


@pytest.mark.parametrize("family", NOISY)
def test_checkpointing_adds_no_noise_and_still_recomputes(family):
    quiet = tiny_model(NOISY[family])
    noisy, ids = copy.deepcopy(quiet), torch.tensor([[5, 9, 7, 11, 6]])
    make_deterministic(quiet, gradient_checkpointing=False)
    make_deterministic(noisy, gradient_checkpointing=True)
    calls = []
    layer = next(m for m in noisy.modules() if getattr(m, "gradient_checkpointing", False) and m is not noisy)
    next(m for m in layer.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(lambda *_: calls.append(1))
    first, second = (noisy(input_ids=ids, use_cache=False).logits for _ in range(2))
    expected = quiet(input_ids=ids, use_cache=False).logits
    assert torch.equal(first, second) and torch.equal(first, expected)
    before = len(calls)
    for logits in (first, expected):
        logits.logsumexp(-1).sum().backward()
    assert len(calls) > before
    for (name, own), other in zip(noisy.named_parameters(), quiet.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_one_with_a_noisy_router(small, trained, tmp_path, checkpointing):
    tokenizer = make_tokenizer()
    config = copy.deepcopy(NOISY["mixtral"])
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    model = tiny_model(config, gain=3)
    save_model(tmp_path, model, model.state_dict(), tokenizer)
    options = {"model.path": str(tmp_path), "model.gradient_checkpointing": checkpointing, "model.device": "cpu"}
    options |= {"answer.extract": "regex:(.)", "answer.equivalence": "exact"}
    _, (row,) = trained(small(options), 1)
    assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert row["parity_policy"] < 1e-6 and row["parity_momentum"] < 1e-6


def test_a_model_without_checkpointing_is_refused_in_a_line(tmp_path):
    model, tokenizer = tiny_model(tiny_config("ctrl", pad_token_id=PAD, eos_token_id=EOS)), make_tokenizer()
    save_model(tmp_path, model, model.state_dict(), tokenizer)
    with pytest.raises(InputError, match=r"--model\.gradient-checkpointing needs a model that has it, CTRLLMHeadModel"):
        load_model(ModelConfig(path=str(tmp_path), device="cpu", gradient_checkpointing=True))


class Forgetful(Padded):
    """A way that is wrong from the second token on, as a model is with a state that the trial does not meet."""

    def advance(self, token: torch.Tensor) -> None:
        self.position = self.position.clamp_max(1)
        super().advance(token)


@pytest.mark.parametrize("source", ["policy", "momentum"])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_wrong_way_ends_the_run(small, monkeypatch, top_p, source):
    monkeypatch.setattr("mgrpo.rollout.transformers.choose_way", lambda *_: Forgetful)
    if source == "momentum":
        right = TransformersEngine.generate
        monkeypatch.setattr(
            TransformersEngine,
            "generate",
            lambda self, *a: right(vars(self).update(way={"policy": Padded}.get(a[-1].source, Forgetful)) or self, *a),
        )
    trainer = Trainer(small({"rollout.top_p": top_p}))
    with pytest.raises(ParityError, match=rf"differ by .*not its plain forward pass, .* of {source} version 0\."):
        trainer.train_step()
    trainer.close()


def test_a_wrong_way_ends_an_evaluation(monkeypatch, capsys):
    flags = [
        "--data.probe",
        "arithmetic:6:2-3:0",
        "--samples",
        "2",
        "--model.device",
        "cpu",
        "--rollout.max-new-tokens",
        "12",
    ]
    assert main(flags) == 0
    monkeypatch.setattr("mgrpo.rollout.transformers.choose_way", lambda *_: Forgetful)
    capsys.readouterr()
    assert main(flags) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not its plain forward pass" in line


@pytest.mark.parametrize(("top_p", "above", "passes"), [(1.0, 0.01, False), (0.5, 0.69, True), (0.5, 0.70, False)])
def test_nucleus_sampling_adds_no_more_than_its_mass(top_p, above, passes):
    engine, mask = torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)
    options = {"dtype": torch.float32, "tag": WeightTag("policy", 3), "shared": True, "top_p": top_p}
    for difference in (above, *([] if passes else [-0.01])):
        if passes:
            assert check_parity(engine + difference, engine, mask, **options) == 0.0
        else:
            with pytest.raises(ParityError, match="policy version 3"):
                check_parity(engine + difference, engine, mask, **options)


def test_what_is_not_finite_is_left_to_other_checks():
    engine, mask = torch.full((1, 3), -1.0), torch.ones(1, 3, dtype=torch.bool)
    trainer = torch.tensor([[-1.0, torch.nan, -torch.inf]])
    assert check_parity(engine, trainer, mask, dtype=torch.float32, tag=WeightTag("policy", 0), shared=True) == 0.0
