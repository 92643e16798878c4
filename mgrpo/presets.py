"""Presets: each function returns a whole configuration and has the name of the method that it reproduces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mgrpo.config import (
    AnswerConfig,
    Config,
    DataConfig,
    DistributedConfig,
    EngineConfig,
    EvalConfig,
    FilterConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    MomentumConfig,
    ObjectiveConfig,
    OptimConfig,
    RolloutConfig,
    VoteConfig,
)
from mgrpo.errors import ConfigError
from mgrpo.inputs import nearest


def mgrpo_arithmetic() -> Config:
    """M-GRPO as in the paper, on the built-in task: 12 policy and 4 momentum rollouts vote together."""
    return Config(
        preset="mgrpo_arithmetic",
        steps=300,
        model=ModelConfig(path="builtin:arithmetic"),
        data=DataConfig(train="arithmetic:8192:3-7:0", probe="arithmetic:250:3-7:1000003"),
        answer=AnswerConfig(extract=r"regex:#(\d\d)", equivalence="exact"),
        rollout=RolloutConfig(num_prompts=16, num_policy=12, num_momentum=4, temperature=1.0, max_new_tokens=64),
        momentum=MomentumConfig(decay=0.99),
        filter=FilterConfig(k=0.75, scope="prompt"),
        objective=ObjectiveConfig(kl_coef=0.0, kl_reference="none"),
        optim=OptimConfig(lr=2e-4, schedule="constant", warmup_ratio=0.0),
        eval=EvalConfig(every=25, samples=4),
        log=LogConfig(kl_initial_every=25),
    )


def anchored() -> Config:
    """M-GRPO with votes of a slow momentum model alone: 8 policy rollouts train, 8 momentum rollouts vote."""
    base = mgrpo_arithmetic()
    return replace(
        base,
        preset="anchored",
        rollout=replace(base.rollout, num_policy=8, num_momentum=8),
        momentum=MomentumConfig(decay=0.999),
        vote=VoteConfig(pool="momentum"),
    )


def arithmetic() -> Config:
    """The built-in task with the settings that were stable in the study."""
    return replace(anchored(), preset="arithmetic")


def srt() -> Config:
    """SRT (arXiv 2505.21444) on the built-in task: only the policy votes, without an anchor."""
    base = mgrpo_arithmetic()
    return replace(
        base,
        preset="srt",
        rollout=replace(base.rollout, num_policy=16, num_momentum=0),
        filter=FilterConfig(applies_to="none"),
    )


def ttrl() -> Config:
    """TTRL (arXiv 2504.16084) on the built-in task: 64 rollouts vote, 32 of them train."""
    base = srt()
    return replace(
        base, preset="ttrl", rollout=replace(base.rollout, num_prompts=4, num_policy=64), vote=VoteConfig(num_train=32)
    )


def corewarding2() -> Config:
    """Co-rewarding-II (arXiv 2508.00410) on the built-in task: only momentum votes, cosine momentum schedule."""
    base = mgrpo_arithmetic()
    return replace(
        base,
        preset="corewarding2",
        rollout=replace(base.rollout, num_policy=8, num_momentum=8),
        momentum=MomentumConfig(decay=0.99, schedule="cosine", final_decay=0.9999),
        filter=FilterConfig(applies_to="none"),
        vote=VoteConfig(pool="momentum"),
    )


def intuitor() -> Config:
    """Intuitor (arXiv 2505.19590) on the built-in task: the reward is the policy's own self-certainty."""
    return _single_model("intuitor", ObjectiveConfig(reward="self-certainty"))


def rent() -> Config:
    """RENT (arXiv 2505.22660) on the built-in task: the reward is the policy's negative entropy."""
    return _single_model("rent", ObjectiveConfig(reward="entropy"))


def grpo_labels() -> Config:
    """GRPO with true labels on the built-in task, an upper bound."""
    return _single_model("grpo_labels", ObjectiveConfig(reward="labels"))


def _single_model(name: str, objective: ObjectiveConfig) -> Config:
    """The SRT preset with another reward."""
    return replace(srt(), preset=name, objective=replace(objective, kl_coef=0.0, kl_reference="none"))


def mgrpo_qwen3_4b_math() -> Config:
    """M-GRPO (arXiv 2512.13070) with the paper's values: Qwen3-4B-Base on unlabelled MATH, on all GPUs of a node."""
    return Config(
        preset="mgrpo_qwen3_4b_math",
        steps=937,
        model=ModelConfig(path="Qwen/Qwen3-4B-Base", dtype="bf16", gradient_checkpointing=True),
        data=DataConfig(
            train="DigitalLearningGmbH/MATH-lighteval",
            prompt_key="problem",
            answer_key="solution",
            template="{prompt}\\nReason step by step, and put the final answer within \\boxed{}.\\n",
            overlong="drop",
        ),
        answer=AnswerConfig(extract="boxed", equivalence="math"),
        rollout=RolloutConfig(
            num_prompts=8, num_policy=24, num_momentum=8, temperature=1.1, max_new_tokens=3072, truncated="train"
        ),
        engine=EngineConfig(batch_size=64),
        momentum=MomentumConfig(decay=0.99),
        filter=FilterConfig(k=0.75, scope="batch"),
        objective=ObjectiveConfig(kl_coef=0.005, kl_reference="initial"),
        optim=OptimConfig(lr=1e-6, schedule="cosine", warmup_ratio=0.1),
        eval=EvalConfig(every=50, samples=8),
        distributed=DistributedConfig(processes="auto"),
    )


def mgrpo_qwen3_0_6b() -> Config:
    """The same on Qwen3-0.6B-Base, for one GPU of 24 GB."""
    base = mgrpo_qwen3_4b_math()
    return replace(
        base,
        preset="mgrpo_qwen3_0_6b",
        model=replace(base.model, path="Qwen/Qwen3-0.6B-Base"),
        engine=EngineConfig(batch_size=16),
        optim=replace(base.optim, micro_batch_tokens=8192),
        distributed=DistributedConfig(),
    )


def mgrpo_qwen3_4b_lora() -> Config:
    """The same with LoRA, for one GPU of 80 GB; ten times the rate, as adapters need."""
    base = mgrpo_qwen3_4b_math()
    return replace(
        base,
        preset="mgrpo_qwen3_4b_lora",
        lora=LoraConfig(rank=32),
        optim=replace(base.optim, lr=1e-5),
        distributed=DistributedConfig(),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__: preset
    for preset in (
        arithmetic,
        anchored,
        mgrpo_arithmetic,
        srt,
        ttrl,
        corewarding2,
        intuitor,
        rent,
        grpo_labels,
        mgrpo_qwen3_4b_math,
        mgrpo_qwen3_4b_lora,
        mgrpo_qwen3_0_6b,
    )
}


def make_preset(name: str) -> Config:
    """Builds a preset by name; raises ConfigError with the nearest name for an unknown one."""
    if name not in PRESETS:
        near = nearest(name, PRESETS)
        hint = f" Did you mean {near}?" if near else ""
        raise ConfigError([f"config: PRESET must be one of {', '.join(PRESETS)}, got {name}.{hint}"])
    return PRESETS[name]()
