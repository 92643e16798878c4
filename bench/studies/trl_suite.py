"""TRL's own GRPO tests with our kernels in its trainers: `python -m bench.studies.trl_suite CHECKOUT`.

CHECKOUT is a clone of TRL of about the installed version, because its tests are in no package. Instead of the hub's
tiny models and data set they get random models of the same architectures, from a separate cache. Every test runs twice,
with TRL's functions and with ours, and must pass with ours if it passes with TRL's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

OWNER = "trl-internal-testing"
SIZES = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 2048}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", {}),
    "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", EXPERTS),
    "tiny-LlamaForCausalLM-3.2": ("LlamaForCausalLM", {}),
    "tiny-MistralForCausalLM-0.2": ("MistralForCausalLM", {}),
    "tiny-Gemma2ForCausalLM": ("Gemma2ForCausalLM", {"head_dim": 8}),
    "tiny-Cohere2ForCausalLM": ("Cohere2ForCausalLM", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2ForSequenceClassification", {"num_labels": 1}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3ForSequenceClassification", {"num_labels": 1, "head_dim": 8}),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", {"num_labels": 1}),
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ["Beautiful is better", "Explicit is", "Simple is better", "Complex", "Flat is better than", "Sparse is"] * 3


def make_tokenizer() -> Any:
    """Bytes and a few special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHAT
    return made


def fill_cache(home: Path) -> None:
    """Writes every model as the hub's client would cache it."""
    import torch
    import transformers

    for name, (kind, extra) in MODELS.items():
        repository = home / "hub" / f"models--{OWNER}--{name}"
        folder = repository / "snapshots" / "0"
        if folder.is_dir():
            continue
        tokenizer = make_tokenizer()
        torch.manual_seed(0)
        architecture = getattr(transformers, kind)
        ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = architecture.config_class(**SIZES | ids | extra, eos_token_id=tokenizer.eos_token_id)
        architecture(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")


def load_dataset(path: str, config: str = "", split: str | None = None, streaming: bool = False, **_: Any) -> Any:
    """Prompts in the formats that the tests load."""
    from datasets import Dataset, DatasetDict

    if "prompt_only" not in config or "image" in path:
        raise ValueError(f"trl_suite: no stand-in for {path}, {config}.")
    chat = config.startswith("conversational")
    rows = [{"prompt": [{"role": "user", "content": text}] if chat else text} for text in PROMPTS]
    whole = Dataset.from_list(rows)
    found = DatasetDict(train=whole, test=whole.select(range(4))) if split is None else whole
    return found.to_iterable_dataset() if streaming else found


def none_available(name: str) -> Any:
    """Defines `is_..._available` functions that TRL no longer has."""
    if name.startswith("is_") and name.endswith("_available"):
        return lambda: False
    raise AttributeError(name)


def pytest_configure(config: Any) -> None:
    """Plugin of TRL's tests: replaces the data set, and with MGRPO_PATCHED the kernels."""
    import datasets
    import trl
    import trl.import_utils

    from mgrpo.integrations import patch_kernels

    # The tests may be of an older release with checks of optional packages that TRL has removed.
    sys.modules["trl.import_utils"].__dict__["__getattr__"] = none_available
    datasets.load_dataset = load_dataset
    if os.environ.get("MGRPO_PATCHED"):
        patch_kernels(trl)


def run(checkout: Path, work: Path, patched: bool) -> dict[str, str]:
    """Outcome by test."""
    report = work / f"{'ours' if patched else 'stock'}.xml"
    root = Path(__file__).parents[2]
    environment = os.environ | {"HF_HOME": str(work), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    environment |= {"MGRPO_PATCHED": "1"} if patched else {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.studies.trl_suite", "-p", "no:cacheprovider", "-x"]
    command[-1:] = ["--tb=no", f"--junitxml={report}", "tests/test_grpo_trainer.py"]
    # Without the checkout's package, which would hide the installed one.
    shutil.copytree(checkout / "tests", work / "tests", dirs_exist_ok=True)
    shutil.copy(checkout / "pyproject.toml", work)
    subprocess.run(command, cwd=work, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}.{case.get('name')}"] = kinds[0] if kinds else "passed"
    return outcomes


def main() -> None:
    """Runs both and compares."""
    checkout, work = Path(sys.argv[1]).resolve(), Path(sys.argv[2] if len(sys.argv) > 2 else "trl_suite").resolve()
    fill_cache(work)
    stock, ours = (run(checkout, work, patched) for patched in (False, True))
    for name, outcomes in (("TRL's functions", stock), ("ours", ours)):
        counts = {kind: list(outcomes.values()).count(kind) for kind in sorted(set(outcomes.values()))}
        print(f"{name}: {counts}")
    lost = [name for name, outcome in stock.items() if outcome == "passed" and ours.get(name) != "passed"]
    print(
        "\n".join(["passes on TRL's functions alone:", *lost]) if lost else "All that passed on TRL's passes on ours."
    )
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
