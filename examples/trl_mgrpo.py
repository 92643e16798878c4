"""M-GRPO in stock TRL on the built-in task, with mgrpo_kernels: `python examples/trl_mgrpo.py --max-steps 100`.

For your own model and data, replace `model` and `load`; every option of TRL's GRPOConfig works too.
"""

import argparse

import torch
import trl
from datasets import Dataset

from mgrpo.integrations import patch_kernels
from mgrpo.integrations.trl import MGRPOConfig, MGRPOTrainer
from mgrpo.models.tokenizer import resolve_path
from mgrpo.tasks.arithmetic import make_problems


def load(count: int, seed: int) -> Dataset:
    """Prompts of the built-in task; the column `answer` is used for metrics only and may be missing."""
    problems = make_problems(count, operands=(3, 4, 5, 6, 7), seed=seed)
    return Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems])


def main() -> None:
    """Trains, evaluates and saves the momentum model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/trl")
    options = parser.parse_args()
    args = MGRPOConfig(
        output_dir=options.out,
        max_steps=options.max_steps,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        seed=options.seed,
        per_device_train_batch_size=8 * options.prompts,
        per_device_eval_batch_size=256,
        num_generations=8,
        num_momentum_generations=8,
        num_generations_eval=1,
        momentum_decay=0.999,
        vote_pool="momentum",
        filter_scope="prompt",
        answer_extract=r"regex:#(\d\d)",
        answer_equivalence="exact",
        max_completion_length=64,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = MGRPOTrainer(
        model=resolve_path("builtin:arithmetic"),
        args=args,
        train_dataset=load(8192, seed=0),
        eval_dataset=load(256, seed=1000003),
    )
    with patch_kernels(trl):
        trainer.train()
        print(f"accuracy after {options.max_steps} steps: {trainer.evaluate()['eval_mgrpo/accuracy']:.3f}")
    trainer.save_momentum_model(f"{options.out}/momentum")


if __name__ == "__main__":
    main()
