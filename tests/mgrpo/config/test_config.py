from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
import typing
from pathlib import Path

import pytest

import mgrpo.config
from mgrpo.config import Config, flag, from_dict, to_dict
from mgrpo.config.renamed import RENAMED, upgrade
from mgrpo.errors import ConfigError
from mgrpo.presets import PRESETS, make_preset
from mgrpo.train import main


def leaves(cls=Config, prefix=""):
    """Dotted name and type of every option."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


LEAVES = dict(leaves())
NUMBERS = [name for name, hint in LEAVES.items() if {hint, *typing.get_args(hint)} & {int, float}]


def problems_of(altered, config, changes):
    with pytest.raises(ConfigError) as caught:
        altered(config, changes)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_escapes_its_range(altered, name):
    for value in (math.nan, -math.inf):
        problems = problems_of(altered, Config(), {name: value})
        assert any(p.startswith(f"config: {flag(name)} must be in ") and p.endswith(f"got {value}.") for p in problems)


@pytest.mark.parametrize(
    ("name", "refused", "accepted"),
    [
        ("steps", [0, -1], [1]),
        ("seed", [-1, 2**31], [0, 2**31 - 1]),
        ("threads", [0], [1, None]),
        ("stop_after", [0], [1]),
        ("answer.timeout_s", [0], [0.1]),
        ("answer.workers", [0, 1025], [1, None]),
        ("rollout.num_prompts", [0], [1]),
        ("rollout.num_policy", [0], [2]),
        ("rollout.num_momentum", [-1], [0]),
        ("rollout.temperature", [0, -1, math.inf], [0.01, 3]),
        ("rollout.top_p", [0, 1.01], [0.01, 1]),
        ("rollout.max_new_tokens", [0], [1]),
        ("momentum.decay", [-0.01, 1.01], [0, 1]),
        ("momentum.final_decay", [-0.01, 1.01], [0, 1]),
        ("momentum.every", [0], [1]),
        ("filter.k", [-0.1, math.inf], [0, 3]),
        ("vote.momentum_weight", [0], [1, 9]),
        ("vote.min_share", [-0.1, 1.1], [0, 1]),
        ("vote.min_margin", [-0.1, 1.1], [0, 1]),
        ("vote.num_train", [0], [2, None]),
        ("objective.clip_low", [-0.1, 1.1], [0, 1]),
        ("objective.clip_high", [-0.1, math.inf], [0, 5]),
        ("objective.dual_clip", [1, 0.5], [1.1, None]),
        ("objective.kl_coef", [-0.1], [0]),
        ("objective.tis_cap", [0, -1], [0.5, math.inf]),
        ("objective.entropy_coef", [math.inf], [-0.1, 0.1]),
        ("objective.kl_cov", [-0.1, 1.1], [0, 1]),
        ("optim.lr", [-1e-9, math.inf], [0, 1e30]),
        ("optim.warmup_ratio", [-0.1, 1], [0, 0.99]),
        ("optim.beta1", [1], [0]),
        ("optim.beta2", [1], [0]),
        ("optim.grad_clip", [0], [1e-9, math.inf]),
        ("optim.num_minibatches", [0], [1]),
        ("optim.num_epochs", [0], [1]),
        ("optim.max_nonfinite", [0], [1]),
        ("checkpoint.every", [-1], [0]),
        ("checkpoint.keep_last", [0], [1]),
        ("eval.samples", [0], [1]),
        ("monitor.window", [0], [1]),
        ("monitor.length_change", [1], [1.01]),
    ],
)
def test_ranges_end_where_they_should(altered, name, refused, accepted):
    for value in refused:
        assert any(flag(name) in p for p in problems_of(altered, Config(), {name: value})), value
    for value in accepted:
        altered(Config(), {name: value})


COMBINATIONS = {
    "momentum pool": (
        {"vote.pool": "momentum", "rollout.num_momentum": 0},
        "--vote.pool momentum needs --rollout.num-mom",
    ),
    "momentum in loss": (
        {"objective.momentum_in_loss": True, "rollout.num_momentum": 0},
        "--objective.momentum-in-loss needs --rollout.num-momentum",
    ),
    "num train": ({"vote.num_train": 13}, "--vote.num-train must be at most --rollout.num-policy (12), got 13"),
    "one rollout": (
        {"rollout.num_policy": 1},
        "a prompt needs 2 rollouts to compare, got 1. Raise --rollout.num-policy.",
    ),
    "minibatches": ({"optim.num_minibatches": 17}, "--optim.num-minibatches must be at most 16"),
    "stop after": ({"steps": 5, "stop_after": 6}, "--stop-after must be at most --steps (5), got 6"),
    "kl": ({"objective.kl_reference": "none"}, "--objective.kl-coef above 0 needs --objective.kl-reference initial"),
    "replicate": (
        {"distributed.processes": 4, "distributed.replicate": 3},
        "--distributed.replicate must divide the number of processes (4), got 3",
    ),
    "tree": (
        {"distributed.processes": 5, "distributed.reduce": "tree"},
        "--distributed.reduce tree needs 1, 2, 4 or 8 processes, got 5",
    ),
    "resume": ({"resume": True}, "--resume needs --run-dir"),
    "offload": (
        {"optim.offload": True, "distributed.processes": 2},
        "--optim.offload needs one process, got 2.",
    ),
    "resume extend": ({"resume_extend": True}, "--resume-extend needs --resume"),
}


def test_ranks_of_an_engine_must_divide_those_of_the_run(altered):
    engine = {"engine.name": "vllm", "engine.tensor_parallel": 2}
    assert problems_of(altered, Config(), engine | {"distributed.processes": 3}) == [
        "config: --engine.tensor-parallel must divide the number of processes (3), got 2."
    ]
    assert altered(Config(), engine | {"distributed.processes": 4}).engine.tensor_parallel == 2
    (problem,) = problems_of(altered, Config(), {"engine.tensor_parallel": 2})
    assert problem == "config: --engine.tensor-parallel needs a vLLM engine that the run starts."


@pytest.mark.parametrize("case", COMBINATIONS)
def test_contradictions_are_reported(altered, case):
    changes, message = COMBINATIONS[case]
    problems = problems_of(altered, Config(), changes)
    assert len(problems) == 1 and problems[0].startswith("config: " + message)


def test_momentum_rollouts_can_be_the_second_to_compare(altered):
    altered(Config(), {"rollout.num_policy": 1, "objective.advantage_over": "all"})
    altered(Config(), {"rollout.num_policy": 1, "objective.momentum_in_loss": True})


def test_all_problems_come_at_once(altered):
    changes = {"optim.lr": -1.0, "rollout.temperature": 0.0, "steps": 5}
    for extra, _ in COMBINATIONS.values():
        changes |= {name: value for name, value in extra.items() if name not in ("resume", "steps")}
    changes |= {"rollout.num_momentum": 0, "resume": False}
    problems = problems_of(altered, Config(), changes)
    expected = [
        "--optim.lr",
        "--rollout.temperature",
        "--vote.pool",
        "--objective.momentum-in-loss",
        "--vote.num-train",
    ]
    expected += ["--optim.num-minibatches", "--stop-after", "--objective.kl-coef", "--resume-extend"]
    expected += ["must divide the number", "needs --distributed.replicate 1", "--optim.offload"]
    found = [next((name for name in expected if name in problem), problem) for problem in problems]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json(name):
    config = make_preset(name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_every_changed_field_survives_json(altered):
    changes = {
        "run_dir": "x",
        "steps": 7,
        "threads": 3,
        "stop_after": 6,
        "vote.num_train": 4,
        "objective.dual_clip": 3.0,
        "optim.grad_clip": math.inf,
        "log.backends": ("wandb", "trackio"),
        "data.probe": "y.csv",
        "data.template": "Q: {prompt}",
        "distributed.processes": "auto",
    }
    config = altered(Config(), changes)
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config and again.log.backends == ("wandb", "trackio")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stepz": 3}, "config: stepz is not a known key. Did you mean steps?"),
        ({"rollout": {"polcy": 3}}, "config: rollout.polcy is not a known key. Did you mean rollout.num_policy?"),
        ({"rollout": {"xyzzy": 3}}, "config: rollout.xyzzy is not a known key."),
    ],
)
def test_unknown_key_names_the_nearest(data, message):
    with pytest.raises(ConfigError) as caught:
        from_dict(data)
    assert caught.value.problems == [message]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "3"),
        ("steps", 3.0),
        ("steps", True),
        ("steps", None),
        ("optim.lr", "1e-3"),
        ("optim.lr", True),
        ("resume", 1),
        ("data.probe", 3),
        ("vote.num_train", 2.5),
        ("rollout.truncated", "cut"),
        ("rollout.truncated", None),
        ("log.backends", "tensorboard"),
        ("log.backends", ["mlflow"]),
        ("distributed.processes", "all"),
        ("distributed.processes", 2.0),
        ("model", 3),
        ("model", None),
    ],
)
def test_wrong_types_are_refused(name, value):
    group, _, key = name.rpartition(".")
    with pytest.raises(ConfigError, match=rf"config: {re.escape(name)} must be .*got .*{re.escape(repr(value)[1:-1])}"):
        from_dict({group: {key: value}} if group else {key: value})


def test_whole_numbers_are_floats_where_floats_are_wanted():
    config = from_dict({"optim": {"lr": 1}, "objective": {"dual_clip": 3}})
    assert type(config.optim.lr) is float and type(config.objective.dual_clip) is float


def documented_fields():
    """Docstring under every field of the option groups, by class and field."""
    found = {}
    files = Path(mgrpo.config.__file__).parent.glob("*.py")
    for node in [node for file in files for node in ast.parse(file.read_text()).body]:
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), node.name
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    found[node.name, field.target.id] = after.value.value if is_text else None
    return found


def test_every_option_has_a_docstring():
    documents = documented_fields()
    groups = {name for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
    missing = [key for key, text in documents.items() if not text and not (key[0] == "Config" and key[1] in groups)]
    assert len(documents) > 80 and not missing


def test_help_shows_every_option_with_its_documentation_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        main(["mgrpo_arithmetic", "--help"])
    assert end.value.code == 0
    text = re.sub(r"[\s│]", "", capsys.readouterr().out)
    documents = documented_fields()
    for name in LEAVES.keys() - {"preset"}:
        group, _, key = name.rpartition(".")
        cls = type(getattr(Config(), group)).__name__ if group else "Config"
        assert flag(name) in text, name
        assert re.sub(r"\s", "", documents[cls, key]) in text, name
    assert not re.search(r"--[a-z.]+_", text)
    for shown in ("(default:0.0002)", "(default:'regex:#(\\d\\d)')", "(default:12)"):
        assert shown in text


# What each preset is for, in the words of what it reproduces.
PRESET_VALUES = {
    "mgrpo_arithmetic": {
        "rollout.num_prompts": 16,
        "rollout.num_policy": 12,
        "rollout.num_momentum": 4,
        "rollout.temperature": 1.0,
        "optim.lr": 2e-4,
        "optim.schedule": "constant",
        "objective.kl_coef": 0.0,
        "momentum.decay": 0.99,
        "filter.k": 0.75,
        "filter.scope": "prompt",
        "data.train": "arithmetic:8192:3-7:0",
        "vote.pool": "both",
    },
    "mgrpo_qwen3_4b_math": {
        "model.path": "Qwen/Qwen3-4B-Base",
        "rollout.temperature": 1.1,
        "rollout.top_p": 1.0,
        "rollout.truncated": "train",
        "filter.k": 0.75,
        "filter.scope": "batch",
        "filter.entropy": "mean",
        "filter.score": "policy",
        "filter.applies_to": "vote-and-loss",
        "filter.two_sided": False,
        "vote.pool": "both",
        "vote.min_share": 0.0,
        "objective.reward": "majority",
        "objective.advantage": "std",
        "objective.clip_low": 0.2,
        "objective.clip_high": 0.2,
        "objective.kl": "k3",
        "objective.kl_coef": 0.005,
        "objective.kl_reference": "initial",
        "objective.reduce": "token-mean",
        "objective.ratio": "token",
        "objective.tis_cap": 2.0,
        "objective.momentum_in_loss": False,
        "optim.lr": 1e-6,
        "optim.schedule": "cosine",
        "optim.warmup_ratio": 0.1,
        "optim.grad_clip": 1.0,
        "optim.num_minibatches": 1,
        "optim.num_epochs": 1,
        "optim.max_nonfinite": 5,
        "momentum.decay": 0.99,
        "momentum.dtype": "fp32",
        "momentum.schedule": "constant",
        "distributed.processes": "auto",
    },
    "mgrpo_qwen3_0_6b": {
        "distributed.processes": None,
        "model.path": "Qwen/Qwen3-0.6B-Base",
        "model.gradient_checkpointing": True,
        "rollout.num_policy": 24,
        "rollout.num_momentum": 8,
        "rollout.max_new_tokens": 3072,
        "momentum.decay": 0.99,
        "optim.lr": 1e-6,
    },
    "mgrpo_qwen3_4b_lora": {"model.path": "Qwen/Qwen3-4B-Base", "lora.rank": 32, "optim.lr": 1e-5},
    "srt": {"rollout.num_momentum": 0, "filter.applies_to": "none", "objective.reward": "majority"},
    "ttrl": {"rollout.num_policy": 64, "vote.num_train": 32, "rollout.num_momentum": 0, "objective.reward": "majority"},
    "corewarding2": {
        "vote.pool": "momentum",
        "momentum.schedule": "cosine",
        "momentum.decay": 0.99,
        "momentum.final_decay": 0.9999,
    },
    "anchored": {"vote.pool": "momentum", "momentum.decay": 0.999, "rollout.num_policy": 8, "rollout.num_momentum": 8},
    "intuitor": {"objective.reward": "self-certainty", "rollout.num_momentum": 0},
    "rent": {"objective.reward": "entropy", "rollout.num_momentum": 0},
    "grpo_labels": {"objective.reward": "labels", "rollout.num_momentum": 0},
    "arithmetic": {"rollout.num_prompts": 16, "model.path": "builtin:arithmetic", "objective.reward": "majority"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_values(name):
    config = make_preset(name)
    for option, expected in PRESET_VALUES[name].items():
        value = config
        for part in option.split("."):
            value = getattr(value, part)
        assert value == expected, option
    assert config.preset == name == PRESETS[name].__name__
    assert PRESETS[name].__doc__


def test_the_paper_takes_a_quarter_of_its_rollouts_from_momentum():
    rollout = make_preset("mgrpo_qwen3_4b_math").rollout
    assert rollout.num_policy == 3 * rollout.num_momentum > 0


def test_unknown_preset_offers_the_nearest():
    with pytest.raises(
        ConfigError, match=r"PRESET must be one of arithmetic.*got corewarding\. Did you mean corewardi"
    ):
        make_preset("corewarding")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_option_fails_and_names_the_new_one(old, new, capsys):
    for spelled in (flag(old), "--" + old):
        assert main(["arithmetic", spelled, "1"]) == 2
        assert f"{flag(old)} is now {flag(new)}." in capsys.readouterr().err.replace(spelled, flag(old))
    group, name = old.split(".")
    with pytest.raises(ConfigError, match=f"config: {old} is not a known key. It is {new} now."):
        from_dict({group: {name: 1}})


def test_a_renamed_switch_that_is_turned_off_names_the_new_one(capsys):
    assert main(["arithmetic", "--rollout.no-sleep"]) == 2
    assert "--rollout.no-sleep is now --engine.sleep." in capsys.readouterr().err


def test_the_configuration_of_an_earlier_release_is_read():
    old = {"steps": 3, "rollout": {"prompts": 2, "policy": 5, "momentum": 1, "engine": "vllm", "timeout_s": 9.0}}
    config = from_dict(upgrade(old))
    assert (config.rollout.num_prompts, config.rollout.num_policy, config.rollout.num_momentum) == (2, 5, 1)
    assert (config.engine.name, config.engine.timeout_s, config.rollout.stop) == ("vllm", 9.0, ())
    assert "prompts" in old["rollout"] and upgrade(to_dict(config)) == to_dict(config)
