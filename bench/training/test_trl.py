"""The log-prob phase of a GRPO step in TRL, with its own functions and with ours: V = 151936."""

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.harness.compare import interleave
from bench.harness.measure import with_memory
from mgrpo.integrations import patch_kernels
from mgrpo.tasks.arithmetic import make_tokenizer

trl = pytest.importorskip("trl")

VOCABULARY, HIDDEN = 151936, 1024
ROWS, PROMPT, RESPONSE = 4, 64, 64
ROUNDS = 3


@pytest.mark.cpu_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_trl(benchmark, tmp_path, dtype):
    """4 sequences of 64 prompt and 64 response tokens: log-probs and entropies of the responses, loss, backward.

    The model is one layer under a head of Qwen3's vocabulary, so that the head, which the kernels replace, dominates.
    """
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = Qwen3Config(vocab_size=VOCABULARY, pad_token_id=tokenizer.pad_token_id, **sizes)
    model = Qwen3ForCausalLM(config).to(dtype)
    args = trl.GRPOConfig(
        str(tmp_path), per_device_train_batch_size=ROWS, num_generations=2, use_cpu=True, bf16=False, report_to=[]
    )
    trainer = trl.GRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args,
        train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 8),
        processing_class=tokenizer,
    )
    ids = torch.randint(VOCABULARY, (ROWS, PROMPT + RESPONSE))
    mask = torch.ones_like(ids)
    upstream = torch.linspace(-1, 1, ROWS * RESPONSE).view(ROWS, RESPONSE)
    results = {}

    def phase(name: str) -> None:
        logprob, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, RESPONSE, compute_entropy=True
        )
        ((logprob + 0.01 * entropy) * upstream).sum().backward()
        results[name] = (logprob.detach(), entropy.detach())
        for parameter in trainer.model.parameters():
            parameter.grad = None

    def ours() -> None:
        with patch_kernels(trl):
            phase("ours")

    def stock() -> None:
        phase("stock")

    peaks = {call.__name__: with_memory(call)[1].peak / 2**20 for call in (ours, stock)}
    seconds = {}

    def run() -> None:
        seconds.update(interleave({"ours": ours, "stock": stock}, rounds=ROUNDS))

    benchmark.pedantic(run, rounds=1)
    for one, other in zip(results["ours"], results["stock"], strict=True):
        torch.testing.assert_close(one, other.float(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-2)
    ratio = seconds["stock"] / seconds["ours"]
    print(
        f"\n{dtype}: ours {seconds['ours']:.2f} s and {peaks['ours']:.0f} MiB, TRL {seconds['stock']:.2f} s and "
        f"{peaks['stock']:.0f} MiB over what was resident: {ratio:.1f}x faster"
    )
    benchmark.extra_info |= {"ratio": ratio, "peak_mib": peaks, "seconds": seconds}
