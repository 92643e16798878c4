"""Steps of training on several ranks: python step_checks.py SIZE PORT FOLDER.

Rank 0 writes what each scenario found to FOLDER/found.json; the test compares the numbers of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import EOS, PAD, random_trajectories
from ranks import main
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import Qwen3Config, Qwen3ForCausalLM

from mgrpo.algorithm.loss import Batch
from mgrpo.config import (
    Config,
    DistributedConfig,
    MomentumConfig,
    ObjectiveConfig,
    OptimConfig,
    RolloutConfig,
)
from mgrpo.distributed.sharding import local, shard_model, whole
from mgrpo.distributed.world import World
from mgrpo.errors import ConfigError
from mgrpo.models.determinism import make_deterministic
from mgrpo.models.forward import Forward
from mgrpo.models.load import LoadedModel
from mgrpo.models.momentum import Momentum
from mgrpo.observe.timer import Timer
from mgrpo.training.learner import Learner
from mgrpo.training.shared_checker import SharedChecker

VOCABULARY = 101  # of no number of ranks a multiple
# One long response among short ones, an empty one, and one of one token.
LENGTHS = (3, 40, 0, 6, 1, 7, 5, 9, 2, 4, 8, 3, 6, 2, 5, 4)
NUM_PROMPTS, GROUP = 4, 4


class Setting:
    """A learner on a small sharded model with random responses."""

    def __init__(
        self,
        world: World,
        *,
        reduce: str = "tree",
        tied: bool = True,
        checkpointing: bool = False,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ):
        torch.manual_seed(0)
        shape = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
        made = Qwen3Config(
            hidden_size=32, intermediate_size=48, **shape, **tokens, tie_word_embeddings=tied, initializer_range=0.2
        )
        self.world, self.model = world, Qwen3ForCausalLM(made)
        make_deterministic(self.model, gradient_checkpointing=checkpointing)
        momentum = options.pop("momentum", MomentumConfig(decay=0.9))
        self.config = Config(
            steps=5,
            distributed=DistributedConfig(reduce=reduce),
            rollout=RolloutConfig(num_prompts=NUM_PROMPTS, num_policy=2, num_momentum=2, max_new_tokens=48),
            optim=OptimConfig(
                lr=1e-2,
                weight_decay=0.1,
                grad_clip=0.3,
                schedule="constant",
                warmup_ratio=0.0,
                num_minibatches=2,
                **({"micro_batch_tokens": 64} | options),
            ),
            objective=ObjectiveConfig(kl_coef=0.0, kl_reference="none"),
            momentum=momentum,
        )
        loaded = LoadedModel(
            model=self.model, tokenizer=None, eos_ids=(EOS,), pad_id=PAD, context_length=128, dtype=dtype
        )
        kernels, tree = self.config.kernels, reduce == "tree"
        self.forward = Forward(
            loaded,
            temperature=1.1,
            kernels=kernels,
            micro_batch_tokens=self.config.optim.micro_batch_tokens,
            packed=self.config.optim.packing == "packed",
            world=world,
            tree=tree,
        )
        shard_model(self.model, world, dtype=dtype, tree=tree)
        self.momentum = Momentum(self.model, momentum, seed=3, kernels=kernels)
        self.learner = Learner(self.config, loaded, self.momentum, self.forward, Timer(), world)
        self.trajectories = random_trajectories(LENGTHS, num_prompts=NUM_PROMPTS, num_policy=2, vocabulary=VOCABULARY)
        draws = torch.Generator().manual_seed(4)
        old = self.forward.run(self.model, self.trajectories).logprob
        noise = 0.3 * torch.rand(old.shape, generator=draws) * self.trajectories.mask
        self.batch = Batch(
            mask=self.trajectories.mask,
            advantage=torch.randn(len(LENGTHS), generator=draws),
            old_logprob=old,
            rollout_logprob=old - noise,
            ref_logprob=None,
        )
        self.trains = torch.ones(NUM_PROMPTS, GROUP, dtype=torch.bool)

    def update(self) -> dict[str, Any]:
        return self.learner.update(self.trajectories, self.batch, self.trains).metrics

    def gradients(self) -> list[float]:
        """A part of each parameter's gradient after the last step."""
        return [x for p in self.model.parameters() for x in whole(p.grad).flatten()[-5:].tolist()]

    def digests(self) -> list[str]:
        """Of weights, momentum model, its compensation, and moments."""
        moments = [state[key] for state in self.learner.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        compensation = (self.momentum.compensation or {}).values()
        return [digest(t) for t in (self.model.parameters(), self.momentum.weights.values(), compensation, moments)]


def digest(tensors: Iterable[torch.Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(whole(tensor.detach()).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def steps(setting: Setting, count: int = 2) -> dict[str, Any]:
    """Digests, metrics and gradients after some updates, all ranks' norms being the same."""
    rows = [setting.update() for _ in range(count)]
    norms = setting.world.gather_json([row["grad_norm"] for row in rows])
    assert all(other == norms[0] for other in norms), norms
    return {"digests": setting.digests(), "metrics": rows, "gradients": setting.gradients()}


def check_tree(world: World) -> Any:
    """Tied: embedding, last norm and head in one group."""
    setting = Setting(world)
    found = steps(setting)
    assert setting.model.get_output_embeddings().weight is setting.model.get_input_embeddings().weight
    return found


def check_tree_untied(world: World) -> Any:
    return steps(Setting(world, tied=False))


def check_tree_packed(world: World) -> Any:
    return steps(Setting(world, packing="packed"))


def check_tree_activation_checkpointing(world: World) -> Any:
    return steps(Setting(world, checkpointing=True))


def check_default(world: World) -> Any:
    return steps(Setting(world, reduce="default"), 1)


def check_default_untied(world: World) -> Any:
    return steps(Setting(world, reduce="default", tied=False), 1)


def check_one_micro_batch_is_split(world: World) -> Any:
    return steps(Setting(world, reduce="default", micro_batch_tokens=4096), 1)


def check_default_replicated(world: World) -> Any:
    """On four ranks two copies, each in two shards: as one copy in four."""
    if world.size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        world = replace(world, replicate=2, mesh=mesh)
    setting = Setting(world, reduce="default")
    found = steps(setting, 2)
    with setting.momentum.swapped():
        found["under_momentum"] = setting.forward.run(setting.model, setting.trajectories).logprob.flatten().tolist()
    return found


def check_bf16_error(world: World) -> Any:
    """Relative error of the gradient against fp32; weights are gathered in bf16, gradients summed in fp32."""
    found: list[torch.Tensor] = []
    batch = Setting(world, reduce="default").batch
    for dtype in (torch.float32, torch.bfloat16):
        setting = Setting(world, reduce="default", dtype=dtype)
        setting.learner.backward(setting.trajectories, batch, torch.arange(len(LENGTHS)))
        grads = [p.grad for p in setting.model.parameters()]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
        found.append(torch.cat([whole(grad).flatten() for grad in grads if grad is not None]))
    return float((found[1] - found[0]).norm() / found[0].norm())


def check_tree_bf16(world: World) -> Any:
    return steps(Setting(world, dtype=torch.bfloat16))


def check_mutant_factor_on_the_root_alone(world: World) -> Any:
    setting = Setting(world, reduce="default")
    for module in setting.model.modules():
        if isinstance(module, FSDPModule) and module is not setting.model:
            module.set_gradient_divide_factor(float(world.size))
    return steps(setting, 1)


def check_momentum_storages(world: World) -> Any:
    """Scoring passes leave the groups as the EMA needs them."""
    found = {}
    for dtype in ("fp32", "bf16-kahan", "bf16-stochastic"):
        setting = Setting(world, momentum=MomentumConfig(decay=0.9, dtype=dtype))
        for _ in range(2):
            setting.update()
            setting.forward.run(setting.model, setting.trajectories)
        found[dtype] = setting.digests()
    return found


def check_scoring_under_momentum(world: World) -> Any:
    """Equals a model loaded with its weights; then the policy's own weights are back."""
    setting = Setting(world)
    setting.update()
    before, averaged = setting.digests(), {n: whole(w.detach()).clone() for n, w in setting.momentum.weights.items()}
    with setting.momentum.swapped():
        under = setting.forward.run(setting.model, setting.trajectories)
    assert setting.digests() == before
    own = setting.forward.run(setting.model, setting.trajectories)
    fresh = Setting(World())
    for name, parameter in fresh.model.named_parameters():
        parameter.data.copy_(averaged[name])
    expected = fresh.forward.run(fresh.model, fresh.trajectories)
    assert torch.equal(under.logprob, expected.logprob) and torch.equal(under.entropy, expected.entropy)
    assert not torch.equal(under.logprob, own.logprob)
    return [digest([own.logprob, own.entropy]), digest([under.logprob])]


def check_uneven_work(world: World) -> Any:
    """All rows that train in one prompt; a single one; none; none with a gradient."""
    found = {}
    for name, rows in {"one prompt": range(4, 8), "one row": [5], "none": []}.items():
        setting = Setting(world)
        setting.trains = torch.isin(torch.arange(len(LENGTHS)), torch.tensor(list(rows))).view(NUM_PROMPTS, GROUP)
        found[name] = steps(setting)
    setting = Setting(world)
    setting.batch = replace(setting.batch, advantage=torch.zeros(len(LENGTHS)))
    return found | {"no gradient": steps(setting)}


def check_a_step_that_is_not_finite_on_one_rank(world: World) -> Any:
    """No rank takes the step, whoever computes the row, and whoever holds the gradient."""
    found = []
    for rows in ([1, 11], [5, 9]):  # one in each minibatch
        setting = Setting(world)
        before = setting.digests()
        setting.batch.old_logprob[rows] = math.nan
        setting.batch.old_logprob.mul_(setting.trajectories.mask)
        setting.trains[:] = False
        setting.trains.view(-1)[rows] = True
        setting.update()
        assert setting.digests()[:3] == before[:3] and setting.learner.nonfinite_steps > 0
        found.append([setting.learner.nonfinite_steps, setting.learner.nonfinite_in_row])
    setting = Setting(world)
    before = setting.digests()
    hook = _Infinite(setting, rank=world.size - 1)
    setting.update()
    hook.remove()
    assert setting.digests()[:3] == before[:3] and setting.learner.nonfinite_steps == 2
    return found


class _Infinite:
    """Makes one shard's gradient infinite on one rank alone before the norm is taken."""

    def __init__(self, setting: Setting, rank: int):
        self.learner, self.clip = setting.learner, setting.learner.clip
        self.parameters, self.is_here = list(setting.model.parameters()), setting.world.rank == rank
        self.learner.clip = self

    def __call__(self) -> float:
        last = local(self.parameters[0].grad)
        if self.is_here:
            last[:1] = math.inf
        return self.clip()

    def remove(self) -> None:
        self.learner.clip = self.clip


def check_answers_are_compared_on_rank_0(world: World) -> Any:
    """And all ranks get the verdicts; no other has worker processes."""
    checker = SharedChecker(world, mode="math", timeout_s=20.0, num_workers=1)
    pairs = [("2*x", "x+x"), ("2*x", "x^2"), ("7", "7"), ("2*x", "x+x")]
    found = [[checker.equivalent(*pair) for pair in pairs], checker.group_classes([["x+1", "1+x", None, "2"]])]
    assert bool(checker.worker_pids) == world.is_first
    checker.close()
    assert world.gather_json(found) == [found] * world.size
    return found


def check_zz_a_model_with_a_scalar_weight_is_refused(world: World) -> Any:
    """The last: FSDP2 has already sharded the layers when it finds the weight."""
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    )
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(1.0)))
    try:
        shard_model(model, world, dtype=torch.float32, tree=True)
    except ConfigError as error:
        assert "Qwen3ForCausalLM cannot be sharded" in error.problems[0], error
        return True
    return False


def check_memory_is_shared(world: World) -> Any:
    """Bytes of weights, momentum model and moments on this rank, as a share of the whole."""
    setting = Setting(world)
    setting.update()

    def share(tensors: Iterable[torch.Tensor]) -> float:
        listed = list(tensors)
        return sum(local(t).nbytes for t in listed) / sum(t.numel() * t.element_size() for t in listed)

    moments = [state["exp_avg"] for state in setting.learner.optimizer.state.values()]
    shares = [share(t) for t in (setting.model.parameters(), setting.momentum.weights.values(), moments)]
    return world.gather_json(shares)


CHECKS: Mapping[str, Callable[[World], Any]] = {
    name.removeprefix("check_"): check for name, check in sorted(globals().items()) if name.startswith("check_")
}


def run(world: World, folder: Path) -> None:
    found = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check(world)
        except Exception:
            (folder / f"error{world.rank}.txt").write_text(f"{name}\n{traceback.format_exc()}")
            raise
    if world.is_first:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(run)
