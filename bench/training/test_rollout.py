"""Rollouts of the arithmetic base model: the embedded engine against transformers' generate."""

import pytest
import torch

from bench.harness.compare import interleave
from mgrpo.config import ModelConfig
from mgrpo.models.load import load_model
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.tasks.arithmetic import make_problems
from mgrpo.types import Sampling, WeightTag

NUM_PROMPTS, SAMPLES, MAX_NEW_TOKENS = 16, 16, 64


@pytest.fixture(scope="module")
def loaded():
    return load_model(ModelConfig(path="builtin:arithmetic", device="cpu"))


def test_rollout(benchmark, loaded):
    """Tokens/s of 16 prompts x 16 samples: ours, generate on the whole batch, generate prompt by prompt."""
    tokenizer, model = loaded.tokenizer, loaded.model
    texts = [problem.prompt for problem in make_problems(NUM_PROMPTS, operands=(3, 4, 5, 6, 7), seed=0)]
    prompts = [tokenizer.encode(text) for text in texts]
    engine = TransformersEngine(
        model, eos_ids=loaded.eos_ids, pad_id=loaded.pad_id, dtype=torch.float32, batch_size=NUM_PROMPTS * SAMPLES
    )
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    options = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "max_new_tokens": MAX_NEW_TOKENS,
        "num_return_sequences": SAMPLES,
    }
    tokens: dict[str, int] = {}

    def ours() -> None:
        sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, seed=0)
        tokens["ours"] = int(engine.generate(prompts, SAMPLES, sampling, WeightTag("policy", 0)).lengths.sum())

    def count(output: torch.Tensor, width: int) -> int:
        """Generated tokens up to and including the first EOS."""
        new = output[:, width:]
        ended = (new == tokenizer.eos_token_id).cumsum(1)
        return int((ended - (new == tokenizer.eos_token_id).long() == 0).sum())

    def whole_batch() -> None:
        torch.manual_seed(0)
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        tokens["generate, whole batch"] = count(model.generate(**batch, **options), batch.input_ids.shape[1])

    def by_prompt() -> None:
        torch.manual_seed(0)
        total = 0
        for text in texts:
            batch = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            total += count(model.generate(**batch, **options), batch.input_ids.shape[1])
        tokens["generate, prompt by prompt"] = total

    candidates = {"ours": ours, "generate, whole batch": whole_batch, "generate, prompt by prompt": by_prompt}
    seconds = interleave(candidates, rounds=5)
    rates = {name: tokens[name] / seconds[name] for name in candidates}
    for name, rate in rates.items():
        print(f"\n{name:28s} {rate:8,.0f} tokens/s  {rates['ours'] / rate:5.2f}x", end="")
    benchmark.extra_info |= {f"{name}, tokens/s": round(rate) for name, rate in rates.items()}
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    assert rates["ours"] >= 3 * rates["generate, prompt by prompt"]
