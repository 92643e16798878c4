"""Writes the tables of docs/scale.md: `python -m bench.scale`.

The memory of presets is that of `--dry-run`, from the published config.json of their models; the seconds of a step are
those of bench/training/cost_model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers import Qwen3Config

from bench.training.cost_model import Hardware, assumptions, table
from mgrpo.config import Config
from mgrpo.inputs import read_bytes
from mgrpo.models.adapter_folder import choose_config
from mgrpo.models.size import count_trained
from mgrpo.presets import make_preset
from mgrpo.run.memory import Job
from mgrpo.run.plan import measure, memory_rows
from mgrpo.run.remedies import Limits, memory_problems

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
LONGEST_PROMPT = 1024  # tokens

_COMMON = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
_4B = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728} | _COMMON
_0_6B = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072} | _COMMON
# Preset: its model's config.json, GPUs, and the memory of each.
PRESETS = {
    "mgrpo_qwen3_4b_math": (_4B, 8, "80GB"),
    "mgrpo_qwen3_4b_lora": (_4B, 1, "80GB"),
    "mgrpo_qwen3_0_6b": (_0_6B, 1, "24GB"),
}


def planned(name: str) -> tuple[Config, Job, Limits]:
    """A preset with what its dry run plans for."""
    numbers, ranks, memory = PRESETS[name]
    config = make_preset(name)
    config = replace(config, distributed=replace(config.distributed, processes=ranks))
    model = Qwen3Config(**numbers)  # pyright: ignore[reportArgumentType]
    size = measure(config, model, ranks)
    assert size is not None
    adapter = None
    if lora := choose_config(config.model.path, config.lora):
        adapter = count_trained(model, lora, trust_remote_code=False)
    limits = Limits(device=read_bytes(memory), host=None, on_gpu=True)
    longest = LONGEST_PROMPT + config.rollout.max_new_tokens
    return config, Job(size=size, longest=longest, ranks=ranks, device_memory=limits.device, adapter=adapter), limits


def memory_table(name: str) -> Iterator[str]:
    """The memory of one rank of a preset, in Markdown; raises ValueError if it does not fit."""
    config, job, limits = planned(name)
    if problems := memory_problems(config, job, limits):
        raise ValueError(f"{name}: {problems}")
    yield from ("| part | memory of a rank | |", "|---|---|---|")
    for row in memory_rows(config, job, limits):
        yield "| " + " | ".join(row) + " |"


def tables() -> dict[str, list[str]]:
    """Each table of the page by name."""
    hardware = Hardware()
    found = {f"memory of {name}": list(memory_table(name)) for name in PRESETS}
    return found | {"seconds of a step": list(table(hardware)), "assumptions": list(assumptions(hardware))}


def make_page(page: str) -> str:
    """The page with new tables, each between two comments."""
    for name, rows in tables().items():
        start, end = f"<!-- {name}, written by python -m bench.scale -->", "<!-- end -->"
        before, found, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{PAGE} must have a place for the table '{name}'")
        page = "\n".join([before + start, "", *rows, "", end + after])
    return page


if __name__ == "__main__":
    PAGE.write_text(make_page(PAGE.read_text()))
