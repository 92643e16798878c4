"""Tiny models and hand-made trajectories for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mgrpo.models.load import LoadedModel
from mgrpo.types import TrajectoryBatch

VOCABULARY, PAD, EOS = 24, 0, 1
# Untied with grouped heads; tied; tied with learned positions; softcapped with a sliding window; head with a bias.
ARCHITECTURES = ("llama", "qwen3", "gpt2", "gemma2", "phi")


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random causal LM of two layers whose logits are peaked enough to be told apart."""
    torch.manual_seed(seed)
    common = dict(vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, initializer_range=0.3)
    shape = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, **shape, tie_word_embeddings=False))
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, **shape, head_dim=8, tie_word_embeddings=True))
    elif architecture == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(**common, n_embd=16, n_layer=2, n_head=2, n_positions=128, scale_attn_by_inverse_layer_idx=True)
        )
    elif architecture == "gemma2":
        caps = dict(final_logit_softcapping=2.0, attn_logit_softcapping=5.0, sliding_window=6)
        model = Gemma2ForCausalLM(Gemma2Config(**common, **shape, head_dim=8, **caps, attn_implementation="eager"))
    else:
        shape["num_key_value_heads"] = 2
        model = PhiForCausalLM(PhiConfig(**common, **shape, resid_pdrop=0.0))
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model.eval()


def loaded(model: PreTrainedModel, *, dtype: torch.dtype = torch.float32, pad_id: int = PAD) -> LoadedModel:
    """A model as `load_model` would return it, without a tokenizer."""
    return LoadedModel(model=model, tokenizer=None, eos_ids=(EOS,), pad_id=pad_id, context_length=128, dtype=dtype)


def padded(rows: Sequence[Sequence[float]], width: int | None = None, value: float = 0) -> torch.Tensor:
    """Rows of unequal length as one tensor."""
    width = max(map(len, rows)) if width is None else width
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def make_trajectories(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    num_policy: int,
    rollout_logprob: torch.Tensor | None = None,
) -> TrajectoryBatch:
    """Trajectories of given prompts [B] and responses [B * G]."""
    width = max(1, *map(len, responses))
    mask = torch.arange(width) < torch.tensor([len(r) for r in responses])[:, None]
    return TrajectoryBatch(
        prompts=list(prompts),
        tokens=padded(responses, width, PAD).long(),
        mask=mask,
        rollout_logprob=torch.zeros(mask.shape) if rollout_logprob is None else rollout_logprob,
        truncated=torch.zeros(len(prompts), len(responses) // len(prompts), dtype=torch.bool),
        num_policy=num_policy,
    )


def random_trajectories(
    lengths: Sequence[int], *, num_prompts: int, num_policy: int, vocabulary: int = VOCABULARY, seed: int = 0
) -> TrajectoryBatch:
    """Random tokens: prompts of 2, 5, 8, ... tokens, responses of the given lengths."""
    g = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(2, vocabulary, (length,), generator=g).tolist()

    return make_trajectories(
        [draw(2 + 3 * b) for b in range(num_prompts)], [draw(length) for length in lengths], num_policy=num_policy
    )


def one_by_one(
    model: PreTrainedModel, trajectories: TrajectoryBatch, temperature: float, rows: Sequence[int] | None = None
):
    """Log-prob, entropy and self-certainty [R, L] from a forward pass of each sequence alone."""
    shape = trajectories.mask.shape
    out = [torch.zeros(shape, dtype=model.dtype) for _ in range(3)]
    for row in range(len(trajectories.mask)) if rows is None else rows:
        prompt, response = list(trajectories.prompt(row)), trajectories.response(row)
        if not response:
            continue
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        logp = torch.log_softmax(logits, -1)
        values = (
            logp.gather(1, torch.tensor(response)[:, None])[:, 0],
            -(logp.exp() * logp).sum(-1),
            torch.logsumexp(logits, -1) - logits.mean(-1),
        )
        for target, value in zip(out, values, strict=True):
            target[row, : len(response)] = value
    return out


def snapshot(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies to compare with later."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors agree in names and every bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
