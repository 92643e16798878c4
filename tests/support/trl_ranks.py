"""One process of a run of MGRPOTrainer whose rollouts are the same on any number of processes.

RANK=0 WORLD_SIZE=2 ... python trl_ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from small_run import BASE, problems, small_args
from trl import GRPOTrainer

from mgrpo.integrations.trl import MGRPOTrainer

ROWS = 12  # 3 prompts of 4: two processes share the second one's rollouts


def invent(self, prompt_ids, images, fields, num_generations):
    """Responses that depend on the prompt, its number and the model's turn, and on no process."""
    first = self.accelerator.process_index * len(prompt_ids)
    responses = []
    for row, prompt in enumerate(prompt_ids):
        number = (first + row) % num_generations
        answer = (sum(prompt) + (number * number + 3 * num_generations) % 5) % 7
        text = f"1{number}#0{answer}"
        responses.append([*self.processing_class.encode(text), self.processing_class.eos_token_id])
    return responses, None


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    GRPOTrainer._generate_single_turn = invent
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args = small_args(
        folder,
        per_device_train_batch_size=ROWS // world,
        max_steps=2,
        filter_scope="prompt",
        seed=3,
        optim="sgd",
        learning_rate=0.1,
    )
    trainer = MGRPOTrainer(BASE, args=args, train_dataset=Dataset.from_list(problems()))
    credits, take = [], MGRPOTrainer._take

    def note(self, of_groups):
        credit = of_groups.credit
        credits.append({"answers": credit.answers, "labels": credit.labels, "keep": credit.keep.tolist()})
        credits[-1] |= {"rewards": credit.rewards.tolist(), "accuracy": of_groups.metrics["accuracy"]}
        take(self, of_groups)

    MGRPOTrainer._take = note
    trainer.train()
    weights = {name: weight.double().sum().item() for name, weight in trainer.model.named_parameters()}
    momentum = {name: weight.double().sum().item() for name, weight in trainer.momentum.started.weights.items()}
    advantage = trainer._advantage.tolist()
    loss = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    found = {"credits": credits, "weights": weights, "momentum": momentum, "advantage": advantage, "loss": loss}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
