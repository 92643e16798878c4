from __future__ import annotations

import csv
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgrpo.rollout.engine import Engine
from mgrpo.tasks.arithmetic import make_problems
from mgrpo.types import Rollouts

RECORDS = [{"prompt": p.prompt, "answer": p.answer} for p in make_problems(8, operands=(2, 3), seed=9)]


def write_csv(path, records):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(records)


def write_folder(path, records):
    path.mkdir()
    WRITERS["jsonl"](path / "a.jsonl", records[:3])
    write_csv(path / "b.csv", records[3:])


WRITERS = {
    "jsonl": lambda path, records: path.write_text("".join(json.dumps(r) + "\n" for r in records)),
    "json": lambda path, records: path.write_text(json.dumps({"data": records})),
    "parquet": lambda path, records: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path),
    "csv": write_csv,
    "folder": write_folder,
}


def assert_sound(trainer, rows):
    """Finite numbers everywhere, and weights that moved."""
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, int | float))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(torch.isfinite(w).all() for w in trainer.momentum.weights.values())
    assert max(row["grad_norm"] for row in rows) > 0


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_of_data_trains_alike(small, trained, weights_of, tmp_path, form):
    weights, rows = [], []
    for name in ("jsonl", form):
        path = tmp_path / f"{name}-data.{name}" if name != "folder" else tmp_path / "data"
        WRITERS[name](path, RECORDS)
        trainer, metrics = trained(small({"data.train": str(path)}), 2)
        weights.append(weights_of(trainer))
        rows.append(metrics)
    assert_sound(trainer, metrics)
    assert rows[0] == rows[1] and rows[0][0]["vote_accuracy"] > 0
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_other_keys(small, trained, tmp_path):
    path = tmp_path / "train.jsonl"
    WRITERS["jsonl"](path, [{"question": r["prompt"], "solution": r["answer"]} for r in RECORDS])
    options = {"data.train": str(path), "data.prompt_key": "question", "data.answer_key": "solution"}
    _, (row,) = trained(small(options), 1)
    assert row["vote_accuracy"] > 0


def test_a_llama_with_grouped_heads_and_a_head_of_its_own(small, trained, llama):
    config = small({"model.path": str(llama), "answer.extract": r"regex:(\d)", "optim.lr": 1e-3})
    trainer, rows = trained(config, 4)
    assert_sound(trainer, rows)
    assert trainer.model.config.model_type == "llama"
    head, embedding = trainer.model.lm_head.weight, trainer.model.model.embed_tokens.weight
    assert head.data_ptr() != embedding.data_ptr()
    start = type(trainer.model).from_pretrained(llama)
    assert not torch.equal(head, start.lm_head.weight) and not torch.equal(embedding, start.model.embed_tokens.weight)
    assert not torch.equal(trainer.momentum.weights["lm_head.weight"], start.lm_head.weight)


def test_overlong_prompts_are_dropped_and_counted(small, trained, launch, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    long = {"prompt": "+".join(["11"] * 80) + "=", "answer": "80"}
    WRITERS["jsonl"](path, [long, *RECORDS, long])
    options = {"data.train": str(path), "data.overlong": "drop"}
    trainer, rows = trained(small(options), 2)
    assert_sound(trainer, rows)
    assert len(trainer.data) == 8 and trainer.data.num_overlong == 2
    assert launch(options, "--dry-run") == 0
    assert "8 (2 overlong dropped), longest 9 tokens" in " ".join(capsys.readouterr().out.split())
    assert launch(options | {"data.overlong": "error"}) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "prompts must have at most 232 tokens, got 2 of 10 longer ones, the first train.jsonl:1 with 240." in text


class Scripted(Engine):
    """An engine that writes given texts, and keeps the prompts that it was asked."""

    has_model_logprobs = False

    def __init__(self, loaded, policy, momentum):
        self.tokenizer, self.texts, self.prompts = loaded.tokenizer, {"policy": policy, "momentum": momentum}, []

    def update_weights(self, weights, tag):
        pass

    def generate(self, prompts, n, sampling, tag):
        self.prompts.append([self.tokenizer.decode(ids) for ids in prompts])
        rows = [[*self.tokenizer.encode(t), self.tokenizer.eos_token_id] for t in self.texts[tag.source]] * len(prompts)
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return Rollouts(
            tokens=tokens,
            lengths=lengths,
            logprobs=torch.zeros(tokens.shape),
            truncated=torch.zeros(len(rows), dtype=torch.bool),
            num_per_prompt=n,
            tag=tag,
        )


@pytest.fixture(scope="module")
def writer(tmp_path_factory, make_llama):
    """Folder of a random model whose tokenizer knows every printable character, with a chat template."""
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    folder = tmp_path_factory.mktemp("models") / "writer"
    make_llama(folder, fast, seed=1)
    return folder


# Five ways to write each answer: 1/2 three times, another number, and nothing that counts.
WRITTEN = {
    "boxed": [r"so \boxed{\frac{1}{2}}", r"\boxed{3} no, \boxed{0.5}", r"\boxed{7}", "1/2", r"\boxed{\dfrac12}"],
    "hash": ["... #### 1/2", "#### 3\n#### 0.5", "#### 7", "1/2", r"#### \frac{1}{2}"],
    "last-number": ["it is 3, no, 1/2", "hence 0.5.", "7", "none", "x = 0.50"],
    r"regex:<(.*?)>": ["<3> <1/2>", "<0.5>", "<7>", "1/2", r"<\frac{1}{2}>"],
}


@pytest.mark.parametrize("extract", WRITTEN)
def test_extraction_and_equivalence_through_the_whole_step(small, trained, tmp_path, writer, extract):
    texts = WRITTEN[extract]
    truth = {"boxed": r"Half, so \boxed{1/2}", "hash": "2/4\n#### 1/2"}.get(extract, "1/2")
    path = tmp_path / "train.jsonl"
    WRITERS["jsonl"](path, [{"prompt": f"What is {i}/{2 * i}?", "answer": truth} for i in range(1, 5)])
    options = {
        "model.path": str(writer),
        "data.train": str(path),
        "answer.extract": extract,
        "answer.equivalence": "math",
        "rollout.num_policy": 4,
        "rollout.num_momentum": 1,
        "filter.applies_to": "none",
        "rollout.max_new_tokens": 40,
        "optim.micro_batch_tokens": 4096,
        "log.samples": 1,
        "eval.every": 1,
    }
    trainer, _ = trained(small(options), 0, make_engine=lambda loaded, _: Scripted(loaded, texts[:4], texts[4:]))
    result = trainer.train_step()
    row, samples = result.metrics, result.samples
    trainer.close()
    assert_sound(trainer, [row])
    assert [s["reward"] for s in samples] == [1, 1, 0, 0, 1]
    assert [s["answer"] is None for s in samples] == [False, False, False, True, False]
    signs = [math.copysign(1, s["advantage"]) if s["advantage"] else 0 for s in samples]
    assert signs == [1, 1, -1, -1, 0]
    assert row["reward_mean"] == 0.5 and row["vote_accuracy"] == 1 and row["unparseable_share"] == 0.2
    assert row["majority_share"] == pytest.approx(0.6) and row["distinct_answers"] == 2


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    ("template", "prompt", "seen"),
    [
        (None, "1+1?", "1+1?"),
        (r"Q: {prompt}\nA:", "1+1?", "Q: 1+1?\nA:"),
        ("chat", "1+1?", "[user] 1+1?\n[assistant] "),
        (None, CHAT, "[system] Be brief.\n[user] 1+1?\n[assistant] "),
        ("chat", CHAT, "[system] Be brief.\n[user] 1+1?\n[assistant] "),
    ],
)
def test_templates_reach_the_engine(small, trained, tmp_path, writer, template, prompt, seen):
    path = tmp_path / "train.jsonl"
    WRITERS["jsonl"](path, [{"prompt": prompt}] * 4)
    options = {
        "model.path": str(writer),
        "data.train": str(path),
        "data.template": template,
        "answer.extract": "last-number",
    }
    texts = ["2", "3", "2", "4", "2", "3"]
    trainer, rows = trained(small(options), 1, make_engine=lambda loaded, _: Scripted(loaded, texts[:4], texts[4:]))
    assert_sound(trainer, rows)
    assert trainer.engine.prompts == [[seen] * 4] * 2


def test_bf16_forward_passes(small, trained, weights_of):
    options = {"optim.lr": 1e-3}
    trainer, rows = trained(small(options | {"model.dtype": "bf16"}), 3)
    assert_sound(trainer, rows)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in trainer.engine.model.parameters())
    _, exact = trained(small(options), 3)
    # Rounding shows between trainer and engine, but no more than rounding.
    assert max(row["logprob_gap"] for row in exact) < 1e-5 < 1e-4 < rows[0]["logprob_gap"] < 0.05
    assert rows[0]["tis_mean"] == pytest.approx(1, abs=0.05)


def test_gradient_checkpointing_recomputes_in_the_update_alone_and_changes_no_bit(small, trained, weights_of):
    updates, scores, weights = [], [], []
    for checkpointing in (False, True):
        trainer, _ = trained(small({"model.gradient_checkpointing": checkpointing, "objective.kl_coef": 0.0}), 0)
        layer, calls = trainer.model.model.layers[0], []
        layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        rows = list(trainer.train(2))
        assert_sound(trainer, rows)
        updates.append(calls.count(True))
        scores.append(calls.count(False))
        weights.append(weights_of(trainer))
        engine = trainer.engine.model
        assert not any(module.training for module in engine.modules())
    assert updates[1] == 2 * updates[0] > 0 and scores[1] == scores[0] > 0
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


MOMENTUM_STORAGE = ["fp32", "bf16-stochastic", "bf16-kahan"]


@pytest.mark.parametrize("dtype", MOMENTUM_STORAGE)
@pytest.mark.parametrize("device", ["same", "cpu"])
def test_momentum_storage_follows_the_policy(small, trained, dtype, device):
    options = {"momentum.dtype": dtype, "momentum.device": device, "momentum.decay": 0.9, "optim.lr": 1e-3}
    trainer, _ = trained(small(options), 0)
    policies = [{n: p.detach().double().clone() for n, p in trainer.model.named_parameters()}]
    for row in trainer.train(3):
        assert_sound(trainer, [row])
        policies.append({n: p.detach().double().clone() for n, p in trainer.model.named_parameters()})
    assert all(w.device.type == "cpu" for w in trainer.momentum.weights.values())
    distance = change = 0.0
    for name, weight in trainer.momentum.weights.items():
        expected = policies[0][name]
        for policy in policies[1:]:
            expected = 0.9 * expected + 0.1 * policy[name]
        total = weight.double()
        if trainer.momentum.compensation:
            total = total + trainer.momentum.compensation[name].double()
        distance += (total - expected).sum().abs().item()
        change += (expected - policies[0][name]).abs().sum().item()
    # Sums: stochastic rounding is right on average only.
    assert distance < (0.05 if dtype == "bf16-stochastic" else 1e-3) * change


EASY = {"data.train": "arithmetic:24:2-3:0", "rollout.temperature": 1.2}
# Options that change what a run computes: base options, then values that must all lead elsewhere.
AXES = {
    "objective.reward": ({}, ["majority", "soft", "labels", "self-certainty", "entropy"]),
    "objective.advantage": ({}, ["std", "mean", "leave-one-out", "sign"]),
    "objective.advantage_over": ({}, ["trained", "all"]),
    "objective.reduce": ({}, ["token-mean", "sequence-mean-token-mean", "constant"]),
    "objective.ratio": ({}, ["token", "sequence"]),
    "objective.clip_low": ({}, [0.2, 0.001]),
    "objective.clip_high": ({}, [0.2, 0.001]),
    "objective.dual_clip": ({"objective.clip_low": 1.0}, [None, 1.001]),
    "objective.kl": ({"objective.kl_coef": 0.1, "objective.kl_reference": "initial"}, ["k1", "k2", "k3"]),
    "objective.kl_coef": ({"objective.kl_reference": "initial"}, [0.0, 0.1, 0.2]),
    "objective.kl_reference": ({"objective.kl_coef": 0.1}, ["initial", "momentum"]),
    "objective.tis_cap": ({}, [2.0, 0.5]),
    "objective.momentum_in_loss": ({}, [False, True]),
    "objective.entropy_coef": ({}, [0.0, 0.01]),
    "objective.kl_cov": ({}, [0.0, 0.2]),
    "objective.kl_cov_coef": ({"objective.kl_cov": 0.2}, [1.0, 2.0]),
    "vote.rule": (EASY, ["majority", "self-certainty"]),
    "vote.pool": (EASY, ["both", "policy", "momentum"]),
    "vote.momentum_weight": ({}, [1, 4]),
    "vote.min_share": (EASY, [0.0, 0.6]),
    "vote.min_margin": (EASY, [0.0, 0.4]),
    "vote.num_train": ({}, [None, 2]),
    "filter.k": ({}, [0.0, 0.75]),
    "filter.scope": ({"filter.k": 0.1}, ["batch", "prompt"]),
    "filter.applies_to": ({"filter.k": 0.0}, ["vote-and-loss", "loss", "none"]),
    "filter.two_sided": ({"filter.k": 0.0}, [False, True]),
    "filter.entropy": ({"filter.k": 0.1, "filter.scope": "batch"}, ["mean", "sum"]),
    "filter.score": ({"filter.k": 0.1, "momentum.decay": 1.0}, ["policy", "source"]),
    "rollout.truncated": ({"rollout.max_new_tokens": 22, "objective.reward": "entropy"}, ["train", "mask"]),
    "rollout.temperature": ({}, [1.0, 1.5]),
    "rollout.top_p": ({}, [1.0, 0.9]),
    "momentum.decay": ({}, [0.9, 0.99]),
    "momentum.schedule": ({}, ["constant", "cosine"]),
    "momentum.final_decay": ({"momentum.schedule": "cosine"}, [0.9999, 0.999]),
    "momentum.every": ({}, [1, 2]),
    "momentum.dtype": ({}, MOMENTUM_STORAGE),
    "optim.schedule": ({}, ["constant", "cosine"]),
    "optim.warmup_ratio": ({}, [0.0, 0.5]),
    "optim.weight_decay": ({}, [0.0, 0.1]),
    "optim.beta1": ({}, [0.9, 0.5]),
    "optim.beta2": ({}, [0.999, 0.5]),
    "optim.grad_clip": ({"optim.beta1": 0.5}, [1.0, 0.01]),
    "optim.num_minibatches": ({}, [1, 2]),
    "optim.num_epochs": ({}, [1, 2]),
    "model.dtype": ({}, ["fp32", "bf16"]),
    "answer.extract": ({}, [r"regex:#(\d\d)", "last-number", r"regex:=(\d)"]),
    "seed": ({}, [0, 1]),
}
# Votes disagree, ratios leave 1, and momentum leaves the policy.
RESTLESS = {
    "data.train": "arithmetic:24:3-4:0",
    "rollout.max_new_tokens": 28,
    "rollout.temperature": 1.4,
    "optim.lr": 2e-3,
    "optim.num_epochs": 2,
    "momentum.decay": 0.8,
}


@pytest.mark.parametrize("name", AXES)
def test_every_option_trains_and_leads_elsewhere(small, trained, weights_of, name):
    base, values = AXES[name]
    ends = []
    for value in values:
        trainer, rows = trained(small(RESTLESS | base | {name: value}), 3)
        assert_sound(trainer, rows)
        ends.append(torch.cat([w.flatten().float() for w in weights_of(trainer).values()]))
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert not torch.equal(one, other), values


# Options that change memory and time only.
@pytest.mark.parametrize(
    ("name", "value", "tolerance"),
    [
        ("momentum.device", "cpu", 0.0),
        ("log.samples", 2, 0.0),
        ("log.kl_initial_every", 1, 0.0),
        ("checkpoint.every", 1, 0.0),
        ("model.attn_implementation", "eager", 1e-4),
        ("optim.micro_batch_tokens", 200, 1e-4),
    ],
)
def test_options_of_memory_and_logging_change_no_result(small, trained, weights_of, name, value, tolerance):
    ends = [weights_of(trained(small(changes), 2)[0]) for changes in ({}, {name: value})]
    for key in ends[0]:
        assert (ends[0][key] - ends[1][key]).abs().max() <= tolerance, key
