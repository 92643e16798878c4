"""MGRPOTrainer in stock TRL: rollouts of both models, votes, filter, momentum, checkpoints."""

from __future__ import annotations

import inspect
import shutil
from types import SimpleNamespace

import pytest
import torch
from small_run import BASE, problems, small_args

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from mgrpo.integrations.trl import MGRPOTrainer  # noqa: E402
from mgrpo.integrations.trl.trainer import Rollout, majority_vote, momentum_rollouts_at  # noqa: E402


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rollouts(answers, entropies=None):
    entropies = entropies or [1.0] * len(answers)
    return [
        Rollout(answer=answer, entropy=h, mean_entropy=h, length=3, truncated=False)
        for answer, h in zip(answers, entropies, strict=True)
    ]


def test_it_trains_with_no_reward_function(make_trainer):
    trainer = make_trainer()
    before = weights_of(trainer)
    trainer.train()
    assert not same(weights_of(trainer), before)
    first, second = trainer.state.log_history[:2]
    assert {"mgrpo/majority_share", "mgrpo/vote_agreement", "mgrpo/pruned_share", "mgrpo/vote_accuracy"} <= first.keys()
    assert first["mgrpo/vote_accuracy"] > 0.5 and 0 < first["reward"] <= 1
    assert first["reward"] == first["rewards/majority_vote/mean"] == pytest.approx(first["mgrpo/reward_mean"])
    assert second["grad_norm"] > 0


def test_momentum_is_the_average_of_the_policies(make_trainer):
    trainer = make_trainer(max_steps=3, momentum_decay=0.75)
    expected = {name: p.double() for name, p in weights_of(trainer).items()}
    step = trainer.momentum.on_step_end

    def follow(*args, **kwargs):
        for name, parameter in weights_of(trainer).items():
            expected[name] = 0.75 * expected[name] + 0.25 * parameter.double()
        return step(*args, **kwargs)

    trainer.momentum.on_step_end = follow
    trainer.train()
    for name, weight in trainer.momentum.started.weights.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-8)


def test_momentum_rollouts_come_from_the_momentum_weights_and_no_gradient_reaches_them(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=3, momentum_decay=1.0, learning_rate=0.01)
    initial, seen = weights_of(trainer), []
    generate = GRPOTrainer._generate_single_turn

    def watch(self, prompt_ids, images, fields, num_generations):
        seen.append((len(prompt_ids), num_generations, same(weights_of(self), initial)))
        return generate(self, prompt_ids, images, fields, num_generations)

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", watch)
    batches = []
    compute = GRPOTrainer._compute_loss
    monkeypatch.setattr(
        GRPOTrainer, "_compute_loss", lambda self, m, inputs: (batches.append(inputs), compute(self, m, inputs))[1]
    )
    trainer.train()
    assert seen == [(8, 2, True), (16, 4, True), (8, 2, True), (16, 4, False), (8, 2, True), (16, 4, False)]
    assert [len(batch["completion_ids"]) for batch in batches] == [16, 16, 16]
    assert same(trainer.momentum.started.weights, initial)


def test_labels_move_no_weight(make_trainer):
    rows = problems()
    trained = []
    for answers in ([row["answer"] for row in rows], [row["answer"] for row in rows[::-1]], None):
        data = [{"prompt": row["prompt"]} for row in rows]
        if answers:
            data = [row | {"answer": answer} for row, answer in zip(data, answers, strict=True)]
        trainer = make_trainer(data)
        trainer.train()
        trained.append(trainer)
    logs = [trainer.state.log_history[0] for trainer in trained]
    assert logs[0]["mgrpo/vote_accuracy"] != logs[1]["mgrpo/vote_accuracy"] and "mgrpo/vote_accuracy" not in logs[2]
    assert all(same(weights_of(trained[0]), weights_of(other)) for other in trained[1:])


def test_labels_are_read_as_the_trainer_reads_them(make_trainer):
    """Whatever their format, type and depth; a key that names no column is refused."""
    rows = problems()
    trainer = make_trainer(rows)
    trainer.model.train()
    for label in (r"So \boxed{5}.", "five\n#### 5", 5, 5.0, ["4", "5"], [5]):
        label = trainer.read_label({"answer": label})
        credit = trainer.assign_credit(rollouts([*"5556"] * 4), rollouts(["5", "7"] * 4), [label] * 16)
        assert credit.metrics["vote_accuracy"] == 1.0
    assert trainer.read_label({}) is None and trainer.read_label({"answer": None}) is None
    deep = [{"prompt": row["prompt"], "truth": {"value": f"is {row['answer']}."}} for row in rows]
    other = make_trainer(deep, data_answer_key="truth.value", answer_label_extract="last-number")
    assert other.read_label(deep[0]) == rows[0]["answer"]
    with pytest.raises(ValueError, match=r"data_answer_key must name a column, got 'trut'.*Did you mean 'truth'\?"):
        make_trainer(deep, data_answer_key="trut")


def test_a_dropped_trajectory_neither_votes_nor_trains(make_trainer, monkeypatch):
    """The policy's second rollout of the first prompt is far too sure; with it 7 would win, without it the tie goes to
    the earliest."""
    trainer = make_trainer(filter_scope="prompt", num_generations=4, num_momentum_generations=2)
    describe, calls = MGRPOTrainer._describe, []

    def invent(self, prompts, responses):
        real = describe(self, prompts, responses)
        calls.append(len(real))
        if len(real) == 16:  # the policy's, 4 a prompt
            return rollouts(["1", "7", "7", "2", *"1112" * 3], [1.0, 1e-4, 1.05, 1.1, *[1.0, 1.1, 1.2, 1.3] * 3])
        return rollouts(["1", "7"] + ["1", "1"] * 3, [1.0, 1.2] * 4)

    monkeypatch.setattr(MGRPOTrainer, "_describe", invent)
    trainer.model.train()
    trainer.momentum.start(trainer.model)
    output = trainer._generate_and_score_completions([row for row in problems(4) for _ in range(4)])
    assert calls == [16, 8]
    lengths = output["completion_mask"].sum(1)
    assert lengths[1] == 0 and (lengths[[0, *range(2, 16)]] > 0).all()
    assert output["num_items_in_batch"] == lengths.sum()
    expected = [2 / 3**0.5, 0.0, -(3**-0.5), -(3**-0.5), *[0.5, 0.5, 0.5, -1.5] * 3]
    torch.testing.assert_close(output["advantages"], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert [*trainer._logs["advantages"]] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("pool", "label"), [("both", "5"), ("policy", "5"), ("momentum", "6")])
def test_the_pool_decides_who_elects(make_trainer, pool, label):
    trainer = make_trainer(vote_pool=pool, filter_applies_to="none")
    trainer.model.train()
    credit = trainer.assign_credit(rollouts([*"5556"] * 4), rollouts(["6", "7"] * 4), [None] * 16).credit
    assert credit.labels == [label] * 4
    assert credit.rewards[0, :4].tolist() == [float(answer == label) for answer in "5556"]


def test_further_rewards_are_added_with_their_weights(make_trainer):
    def place(completions, **_):
        return [float(i % 3 + i / 8) for i in range(len(completions))]

    trainer = make_trainer(reward_funcs=place, reward_weights=[2.0, 0.1], filter_applies_to="none")
    assert trainer.reward_func_names == ["majority_vote", "place"]
    trainer.train()
    row = trainer.state.log_history[0]
    by_function = 2 * row["rewards/majority_vote/mean"] + 0.1 * row["rewards/place/mean"]
    assert row["reward"] == pytest.approx(by_function, rel=1e-5)
    assert trainer._advantage.view(4, 4).sum(1).abs().max() < 1e-4
    assert trainer._advantage.unique().numel() > 8  # a vote alone has two values a prompt


def test_advantages_without_deviation(make_trainer):
    trainer = make_trainer(scale_rewards="none", filter_applies_to="none")
    assert trainer.recipe.objective.advantage == "mean"
    trainer.train()
    assert {round(float(4 * value)) - 4 * float(value) for value in trainer._advantage} == {0.0}


def test_evaluation_asks_the_policy_alone(make_trainer):
    from datasets import Dataset

    trainer = make_trainer(per_device_eval_batch_size=8, vote_pool="momentum")
    trainer.train()
    trainer.eval_dataset = Dataset.from_list(problems(4))
    found = trainer.evaluate()
    assert 0.2 < found["eval_mgrpo/accuracy"] <= 1
    assert "eval_mgrpo/vote_agreement" not in found and "eval_mgrpo/token_entropy_momentum" not in found


@pytest.mark.parametrize("dtype", ["fp32", "bf16-kahan", "bf16-stochastic"])
def test_resumed_it_is_the_straight_run(make_trainer, tmp_path, dtype):
    options = {
        "max_steps": 4,
        "momentum_dtype": dtype,
        "momentum_decay": 0.9,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    straight = make_trainer(output_dir=str(tmp_path / "straight"), **options)
    straight.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert same(weights_of(resumed), weights_of(straight))
    assert same(resumed.momentum.started.weights, straight.momentum.started.weights)
    if dtype == "bf16-kahan":
        assert same(resumed.momentum.started.compensation, straight.momentum.started.compensation)
    logs = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (straight, resumed)]
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_a_checkpoint_holds_the_momentum_model_in_fp32(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "momentum.safetensors")
    assert same(saved, trainer.momentum.started.weights)
    assert not list((tmp_path / "checkpoint-2").glob(".*"))
    trainer.save_momentum_model(tmp_path / "momentum")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "momentum")
    assert same(dict(loaded.named_parameters()), trainer.momentum.started.weights)


def test_clashing_generation_values_do_not_stop_a_save(make_args, tmp_path, caplog):
    """transformers loads a model with them and saves none; TRL's checkpoints and the momentum model are written."""
    folder = shutil.copytree(BASE, tmp_path / "base")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.7, "top_p": 0.9}')
    args = make_args(save_strategy="steps", save_steps=1, max_steps=1, output_dir=str(tmp_path / "out"))
    trainer = MGRPOTrainer(str(folder), None, args, train_dataset=Dataset.from_list(problems()))
    assert "generation_config is saved without temperature, top_p" in caplog.text
    trainer.train()
    trainer.save_momentum_model(tmp_path / "momentum")
    trainer.checker.close()
    for saved in (tmp_path / "out" / "checkpoint-1", tmp_path / "momentum"):
        assert AutoModelForCausalLM.from_pretrained(saved).generation_config.eos_token_id in (1, [1])


def test_a_checkpoint_without_its_momentum_model_is_refused(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=2).train()
    path = tmp_path / "checkpoint-2" / "momentum.safetensors"
    with pytest.raises(ValueError, match=r"momentum.safetensors must hold the 48 tensors .* got 24, of which .*/lost"):
        make_trainer(max_steps=3, momentum_dtype="bf16-kahan").train(resume_from_checkpoint=str(path.parent))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"momentum.safetensors must exist to resume, it does not"):
        make_trainer(max_steps=3).train(resume_from_checkpoint=str(path.parent))


def test_a_policy_that_is_not_finite_never_reaches_the_momentum_model(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.add_callback(poison := Poison())
    with pytest.raises(FloatingPointError, match="policy must be finite, got NaN or infinity after step 2"):
        trainer.train()
    assert poison.step == 2
    assert all(weight.isfinite().all() for weight in trainer.momentum.started.weights.values())


class Poison(__import__("transformers").TrainerCallback):
    """Makes one weight NaN in the second optimiser step."""

    step = 0

    def on_optimizer_step(self, args, state, control, model=None, **_):
        self.step += 1
        if self.step == 2:
            next(iter(model.parameters())).data.view(-1)[3] = float("nan")


def test_logits_that_are_not_finite_are_dropped_and_counted_and_never_all(make_trainer):
    trainer = make_trainer()
    trainer.model.train()
    nan = float("nan")
    credit = trainer.assign_credit(rollouts(["7"] * 16, [nan, *[1.0] * 15]), rollouts(["7"] * 8), [None] * 16)
    assert credit.metrics["nonfinite_share"] == 1 / 24 and not credit.credit.keep[0, 0]
    with pytest.raises(FloatingPointError, match="the policy's logits must be finite, none is"):
        trainer.assign_credit(rollouts(["7"] * 16, [nan] * 16), rollouts(["7"] * 8, [nan] * 8), [None] * 16)


def test_frozen_weights_are_the_policys_own(make_trainer):
    trainer = make_trainer()
    frozen = [name for name, _ in trainer.model.named_parameters() if "layers.0" in name]
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    trainer.train()
    assert not set(frozen) & trainer.momentum.started.weights.keys()
    full = trainer.momentum.full_state_dict()
    assert all(torch.equal(full[name], dict(trainer.model.named_parameters())[name]) for name in frozen)


def test_collapse_is_told_and_stops_where_asked(make_trainer, caplog):
    trainer = make_trainer(max_steps=30, monitor_on_collapse="stop")
    trainer.model.train()
    spread = ["12", "34", "56", "78"]
    for step in range(30):
        trainer.state.global_step = step
        answers = ["99"] * 16 if step > 12 else [answer for answer in spread for _ in range(4)]
        credit = trainer.assign_credit(rollouts(answers), rollouts(answers[::2]), [None] * 16)
        trainer._take(credit)
        if trainer.control.should_training_stop:
            break
    assert 13 < step < 25
    assert "of the answers to different prompts are '99'" in caplog.text


class FakeVllm:
    """Stands for VLLMGeneration: notes what it was given, and answers every prompt with the same text."""

    def __init__(self, model, processing_class, **options):
        self.model, self.tokenizer, self.options = model, processing_class, options
        self.held, self.calls = None, []

    def sync_weights(self):
        self.held = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.calls.append("sync")

    def generate(self, prompts, images, num_generations, profiler=None):
        self.calls.append((len(prompts), num_generations, self.held))
        response = [*self.tokenizer.encode("#42"), self.tokenizer.eos_token_id]
        return prompts, [response] * len(prompts), [[[-0.5]] * len(response)] * len(prompts), None


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_an_engine_of_its_own_gets_both_models_in_turn(make_trainer, monkeypatch, mode):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FakeVllm)
    FakeVllm.vllm_client = SimpleNamespace(
        get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}}
    )
    trainer = make_trainer(
        use_vllm=True,
        vllm_mode=mode,
        vllm_importance_sampling_correction=False,  # the invented log-probs are far from the policy's
        momentum_decay=1.0,
        learning_rate=0.01,
    )
    initial = weights_of(trainer)
    monkeypatch.setattr(  # all agree with one another, so only an invented advantage moves the weights
        "mgrpo.integrations.trl.trainer.group_advantage", lambda total, *_: torch.linspace(-1, 1, 16).view(4, 4)
    )
    trainer.train()
    calls = trainer.vllm_generation.calls
    assert [call if call == "sync" else call[:2] for call in calls] == ["sync", (8, 2), "sync", (16, 4)] * 2
    held = [call[2] for call in calls if call != "sync"]
    assert [same(weights, initial) for weights in held] == [True, True, True, False]
    assert trainer.state.log_history[0]["mgrpo/vote_agreement"] == 1


def test_importance_weights_know_nothing_of_momentum_rollouts(make_trainer, monkeypatch):
    """TRL masks whole sequences whose log-prob is far from the engine's; a vote is no such sequence."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", FakeVllm)
    trainer = make_trainer(use_vllm=True, vllm_mode="colocate", max_steps=1)
    assert trainer.args.vllm_importance_sampling_mode == "sequence_mask"
    batches, compute = [], GRPOTrainer._compute_loss
    monkeypatch.setattr(
        GRPOTrainer, "_compute_loss", lambda self, m, inputs: (batches.append(inputs), compute(self, m, inputs))[1]
    )
    trainer.train()
    assert batches[0]["importance_sampling_ratio"].shape == (16, 1)  # 4 policy rollouts of 4 prompts
    assert trainer.state.log_history[0]["mgrpo/vote_agreement"] == 1  # and the other 8 have voted


def test_rollouts_are_spread_evenly_over_a_group():
    for num_policy in range(1, 9):
        for num_momentum in range(1, 9):
            counts = [momentum_rollouts_at(row, num_policy, num_momentum) for row in range(num_policy)]
            assert sum(counts) == num_momentum and max(counts) - min(counts) <= 1
            assert counts == [
                momentum_rollouts_at(row + num_policy, num_policy, num_momentum) for row in range(num_policy)
            ]
            for part in range(1, num_policy + 1):
                if num_policy % part == 0 and part * num_momentum % num_policy == 0:
                    shares = {sum(counts[i : i + part]) for i in range(0, num_policy, part)}
                    assert shares == {part * num_momentum // num_policy}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter_k": -1.0}, r"filter_k must be in \[0, inf\), got -1.0"),
        ({"momentum_decay": 1.5}, r"momentum_decay must be in \[0, 1\], got 1.5"),
        ({"momentum_dtype": "bf16"}, r"momentum_dtype must be .*got 'bf16'"),
        ({"vote_pool": "all"}, r"vote_pool must be .*got 'all'"),
        (
            {"vote_pool": "momentum", "num_momentum_generations": 0},
            "needs num_momentum_generations of at least 1, got 0",
        ),
        ({"scale_rewards": "batch"}, r"scale_rewards must be one of \('group', 'none'\), got 'batch'"),
        ({"objective_reward": "labels"}, r"objective_reward must be one of \('majority', 'soft'\), got 'labels'"),
        ({"monitor_on_collapse": "rollback"}, r"monitor_on_collapse must be one of \('warn', 'stop'\)"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"MGRPOConfig: .*{message}"):
        small_args(tmp_path, **changes)


def test_groups_that_processes_can_not_share_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mgrpo.integrations.trl.config.MGRPOConfig.world_size", property(lambda self: 2))
    odd = {"per_device_train_batch_size": 2, "num_momentum_generations": 3}
    with pytest.raises(ValueError, match=r"every process must have whole momentum rollouts: .* = 6 must be a multiple"):
        small_args(tmp_path, **odd)
    # A whole group on each process is no problem, however many vote.
    assert small_args(tmp_path, **odd | {"per_device_train_batch_size": 4}).num_momentum_generations == 3


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_rollouts_of_several_turns_are_refused(make_args, name):
    with pytest.raises(ValueError, match=f"MGRPOTrainer: {name} must be None"):
        MGRPOTrainer(BASE, args=make_args(), train_dataset=None, **{name: [print]})


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="args must be an MGRPOConfig, got GRPOConfig"):
        MGRPOTrainer(BASE, args=trl.GRPOConfig(str(tmp_path), use_cpu=True, per_device_train_batch_size=8))


def test_the_vote_among_trls_functions_says_nothing_alone():
    assert majority_vote(completions=["a", "b"], prompts=["p", "p"]) == [0.0, 0.0]


# Contracts: what of TRL the trainer relies on.

CONTRACTS = {
    "_generate": ["prompts"],
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
    "_tokenize_prompts": ["prompts"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["inputs"],
    "_save_checkpoint": ["model", "trial"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_contract_method(name):
    assert [*inspect.signature(getattr(GRPOTrainer, name)).parameters][1:] == CONTRACTS[name]


def test_contract_scoring():
    known = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
    assert [*inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters][:7] == known


def test_contract_constructor():
    assert [*inspect.signature(GRPOTrainer.__init__).parameters][1:4] == ["model", "reward_funcs", "args"]


def test_contract_attributes_of_the_source():
    source = inspect.getsource(GRPOTrainer)
    for name in ("_last_loaded_step", "num_generations_eval", "reward_weights", "_tokenizer", "eos_token_ids", "_dist"):
        assert f"self.{name}" in source, name
    assert "mask.sum()" in source and '"num_items_in_batch": num_items_in_batch' in source
    assert inspect.getsource(GRPOTrainer._generate).count("return prompt_ids, completion_ids, tool_mask") == 1
