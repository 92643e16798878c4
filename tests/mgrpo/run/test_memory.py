"""The memory of a rank: against hand-computed numbers, against what autograd keeps, and what a dry run says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import ARCHITECTURES, tiny_model
from transformers import MambaConfig, Qwen3Config

from bench.scale import LONGEST_PROMPT, PRESETS, planned
from mgrpo.config import Config, LoraConfig
from mgrpo.inputs import read_bytes
from mgrpo.models.measure import ModelSize, measure_size
from mgrpo.models.plain import plain_hidden
from mgrpo.presets import make_preset
from mgrpo.run.memory import plan_memory
from mgrpo.run.plan import OPS
from mgrpo.run.preflight import num_processes
from mgrpo.run.remedies import Limits, device_remedies, memory_problems
from mgrpo.tasks.arithmetic import make_tokenizer

GIB, GB = 2**30, 10**9
QWEN3_4B = PRESETS["mgrpo_qwen3_4b_math"][0]
GPU = Limits(device=80 * GB, host=None, on_gpu=True)


@pytest.fixture(scope="module")
def big():
    """The plan of the preset on 8 GPUs."""
    return planned("mgrpo_qwen3_4b_math")


def alone(big, ranks=1):
    """The preset on fewer GPUs."""
    config, job, _ = big
    return replace(config, distributed=replace(config.distributed, processes=ranks)), replace(job, ranks=ranks)


def parts_of(config, job):
    return {part.name: part.num_bytes for part in plan_memory(config, job).parts}


def found(parts, start):
    """The bytes of the one part whose name begins so."""
    (size,) = (size for name, size in parts.items() if name.startswith(start))
    return size


def test_qwen3_4b_has_its_published_size(big):
    size = big[1].size
    assert size.parameters == 36 * size.layer + size.embedding + 2560 == 4_022_468_096
    # q, k, v, o; gate, up, down; norms of the layer, of q and of k.
    matrices = 2560 * 128 * (32 + 8 + 8) + 32 * 128 * 2560 + 3 * 2560 * 9728
    assert size.layer == matrices + 2 * 2560 + 2 * 128 and size.layers == 36 * size.layer
    assert size.embedding == size.head == 151936 * 2560 and size.tied and size.has_plain_head
    assert size.cache_numbers == 2 * 36 * 8 * 128
    assert sum(a * b for _, a, b in size.matrices) == 36 * matrices
    assert size.activations is not None and size.activations.hidden == 2 * 2560
    assert size.activations.largest == 2 * 9728


def test_memory_of_a_rank_by_hand(big):
    config, job, _ = big
    parts, p = parts_of(config, job), job.size.parameters
    assert (
        found(parts, "weights (fp32)") == found(parts, "gradients (fp32)") == found(parts, "momentum model") == p // 2
    )
    assert found(parts, "AdamW") == p and found(parts, "initial weights (bf16)") == p // 4
    assert found(parts, "engine: weights (bf16)") == 2 * p
    assert found(parts, "engine: KV cache") == 2 * 73728 * (LONGEST_PROMPT + 3072) * 64
    assert found(parts, "FSDP: two layers and gradient") == 8 * job.size.layer
    assert found(parts, "FSDP: norm and head and gradient") == 6 * (151936 * 2560 + 2560)
    kept = job.size.activations
    inputs = 37 * 16384 * 2 * 2560
    assert found(parts, "activations") == inputs + 16384 * kept.per_token // 36
    plain = replace(config, model=replace(config.model, gradient_checkpointing=False))
    assert found(parts_of(plain, job), "activations") == 16384 * kept.per_token > 10 * found(parts, "activations")


def test_an_adapter_alone_is_trained_and_the_frozen_weights_are_shared(big):
    config, job = alone(big)
    config = replace(config, lora=LoraConfig(rank=16), objective=replace(config.objective, kl_reference="initial"))
    parts, p = parts_of(config, replace(job, adapter=1000)), job.size.parameters
    assert found(parts, "frozen weights (bf16)") == 2 * p
    assert found(parts, "weights (fp32)") == found(parts, "gradients (fp32)") == found(parts, "momentum model") == 4000
    assert found(parts, "AdamW") == 8000 and found(parts, "copy of a checkpoint") == 16000
    assert not [name for name in parts if name.startswith(("initial", "engine: weights", "layers cast", "head"))]


def test_adapters_and_frozen_weights_are_divided_too(big):
    config, job, _ = big
    parts, p = parts_of(replace(config, lora=LoraConfig(rank=16)), replace(job, adapter=8000)), job.size.parameters
    assert found(parts, "frozen weights (bf16)") == 2 * p // job.ranks
    assert found(parts, "weights (fp32)") == found(parts, "gradients (fp32)") == 4000
    assert found(parts, "copy of a checkpoint") == 16 * 8000  # of all ranks
    assert found(parts, "engine: weights (bf16)") == 2 * p
    assert found(parts, "FSDP: two layers") == 4 * job.size.layer  # without a gradient


def test_the_sum_is_what_is_held_always_and_the_largest_phase(big):
    config, job, _ = big

    def held(config):
        parts = [part for part in plan_memory(config, job).parts if not part.on_host]
        phases = ("always", "rollout", "score", "update")
        return [sum(part.num_bytes for part in parts if part.phase == phase) for phase in phases]

    always, rollout, score, update = held(config)
    assert plan_memory(config, job).device == always + rollout > always + max(score, update)
    plain = replace(config, model=replace(config.model, gradient_checkpointing=False))
    always, rollout, score, update = held(plain)
    assert plan_memory(plain, job).device == always + update > always + rollout


@pytest.mark.parametrize(
    ("group", "options", "changes"),
    [
        ("optim", {"offload": True}, {"AdamW": (0, 8)}),
        ("momentum", {"device": "cpu"}, {"momentum model": (0, 4)}),
        ("momentum", {"dtype": "bf16-stochastic"}, {"momentum model": (2, 0)}),
        ("momentum", {"dtype": "bf16-kahan"}, {"momentum model": (4, 0)}),
    ],
)
def test_options_move_or_shrink_a_part(big, group, options, changes):
    """Bytes a parameter on the device and on the host."""
    config, job = alone(big)
    config = replace(config, **{group: replace(getattr(config, group), **options)})
    for start, (device, host) in changes.items():
        (part,) = (part for part in plan_memory(config, job).parts if part.name.startswith(start))
        assert part.num_bytes == (device + host) * job.size.parameters and part.on_host == (host > 0)


def test_replicas_share_nothing(big):
    config, job, _ = big
    twice = replace(config, distributed=replace(config.distributed, processes=8, replicate=2))
    assert found(parts_of(twice, job), "AdamW") == 2 * found(parts_of(config, job), "AdamW")


def test_vllm_takes_its_share_of_the_gpu(big):
    config, job, _ = big
    config = replace(config, engine=replace(config.engine, name="vllm", gpu_memory=0.25, sleep=True))
    memory = plan_memory(config, job)
    share = sum(part.num_bytes for part in memory.parts if part.name.startswith("vLLM") and not part.on_host)
    assert share == 20 * GB
    assert all(part.phase == "rollout" for part in memory.parts if part.name.startswith("vLLM") and not part.on_host)
    elsewhere = replace(config, engine=replace(config.engine, placement="server", servers=("http://a:1",)))
    assert not any(part.name.startswith("vLLM") for part in plan_memory(elsewhere, job).parts)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("autocast", [False, True])
def test_activations_are_those_that_autograd_keeps(architecture, autocast):
    """Of a real pass over rows of 64 tokens, by storage; the plan may count a mask and repeated heads, no less."""
    model = tiny_model(architecture)
    attention = model.config._attn_implementation
    size = measure_size(model.config, attention=attention, autocast=autocast, half=False, trust_remote_code=False)
    assert size is not None and size.activations is not None
    assert size.parameters == sum(p.numel() for p in model.parameters())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        shape = tensor.shape
        if storage.data_ptr() not in weights and (not autocast or 64 in shape or 256 in shape):
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(2, 24, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = plain_hidden(model.get_decoder(), ids)
    real = sum(storage.nbytes() for storage in kept.values())
    pairs = 4 * 64 * 64 * size.activations.per_token_pair * (attention == "eager")
    counted = 256 * size.activations.per_token + pairs
    assert hidden.nbytes == 256 * size.activations.hidden
    assert 0.98 * real < counted < 1.25 * real


def test_models_without_a_plain_decoder_have_no_activations_or_no_size():
    tiny = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    size = measure_size(MambaConfig(**tiny), attention="eager", autocast=False, half=False, trust_remote_code=False)
    assert isinstance(size, ModelSize) and size.cache_numbers == 0 and size.parameters > 0
    wrong = Qwen3Config(hidden_size=16, num_attention_heads=0)
    assert measure_size(wrong, attention="sdpa", autocast=False, half=False, trust_remote_code=False) is None


def test_the_start_counts_where_many_ranks_divide_the_state(big):
    """Every rank loads the whole model, and a copy for the engine, before the weights are divided."""
    config, job = alone(big, 64)
    config = replace(
        config, engine=replace(config.engine, batch_size=1), optim=replace(config.optim, micro_batch_tokens=1)
    )
    config = replace(config, momentum=replace(config.momentum, device="cpu"))
    memory = plan_memory(config, job)
    assert memory.device == 8 * job.size.parameters
    assert memory.host(64) == 64 * 4 * job.size.parameters
    engine = replace(config.engine, name="vllm", placement="server", servers=("http://a:1",))
    by_rows = plan_memory(replace(config, engine=engine), job)
    assert not any(part.phase == "start" for part in by_rows.parts)
    # Rank 0 alone holds a checkpoint: two ranks hold it once, and 4 bytes of the momentum model.
    assert plan_memory(config, replace(job, ranks=2)).host(2) == pytest.approx((16 + 4) * job.size.parameters)


def test_what_does_not_fit_is_refused_with_two_remedies_and_what_they_save(big):
    config, job = alone(big)
    (problem,) = memory_problems(config, job, GPU)
    needed = plan_memory(config, job).device
    assert problem.startswith(f"memory: a rank must fit into the GPU's 74.5 GiB, got {needed / GIB:.1f} GiB. --")
    remedies = problem.partition("GiB. ")[2].rstrip(".").split(", ")
    assert len(remedies) == 2
    ranks = int(remedies[0].removeprefix("--distributed.processes ").split()[0])
    fits = plan_memory(*alone(big, ranks)).device
    assert fits <= 80 * GB < plan_memory(*alone(big, ranks // 2)).device
    assert remedies[0].endswith(f" saves {(needed - fits) / GIB:.1f} GiB")
    offloaded = replace(config, optim=replace(config.optim, offload=True))
    saved = needed - plan_memory(offloaded, job).device
    assert remedies[1] == f"--optim.offload saves {saved / GIB:.1f} GiB" and saved == 8 * job.size.parameters


def test_no_remedy_is_refused_for_the_number_of_ranks(big):
    """Also where `auto` or a launcher gives it, which the options do not say."""
    config, job, _ = big

    def flags(config, job):
        return [remedy.flag for remedy in device_remedies(config, job, GPU)]

    assert "--optim.offload" in flags(*alone(big))
    for processes in ("auto", None):
        found = flags(replace(config, distributed=replace(config.distributed, processes=processes)), job)
        assert "--optim.offload" not in found and "--momentum.device cpu" in found


def test_a_plan_counts_processes_for_a_gpu_that_need_not_be_here():
    config = make_preset("mgrpo_qwen3_4b_math")
    planned = replace(config, model=replace(config.model, device="cuda"), dry_run=True, dry_run_memory="80GB")
    assert config.distributed.processes == "auto"
    assert num_processes(planned) == max(torch.cuda.device_count(), 1)


def test_a_remedy_that_is_enough_comes_before_one_that_is_not(big):
    config, job, _ = big
    need = plan_memory(config, job).device
    limits = replace(GPU, device=need - GIB)
    (problem,) = memory_problems(config, job, limits)
    assert "--engine.batch-size 32 saves 18.1 GiB, --momentum.device cpu saves 1.9 GiB." in problem
    assert memory_problems(config, job, replace(GPU, device=need)) == []
    (problem,) = memory_problems(config, job, replace(GPU, device=GIB))
    assert problem.endswith(", neither is enough alone.")


def test_the_host_of_many_ranks_is_checked_too(big):
    config, job = alone(big)
    everything = replace(GPU, device=None)
    host = plan_memory(config, job).host(1)
    assert host == 16 * job.size.parameters  # of a checkpoint
    assert memory_problems(config, job, replace(everything, host=host)) == []
    (problem,) = memory_problems(config, job, replace(everything, host=host - 1))
    saved = 12 * job.size.parameters / GIB  # what remains is the model while it is loaded
    assert problem.endswith(f"got {host / GIB:.1f} GiB. --checkpoint.no-background saves {saved:.1f} GiB.")
    config, job, _ = big
    host = plan_memory(config, job).host(8)
    assert host == 8 * 4 * job.size.parameters
    (problem,) = memory_problems(config, job, replace(everything, host=host - 1))
    assert problem.startswith("memory: the host's part of 8 ranks must fit into its ")
    assert f"--distributed.processes 4 saves {(host - 16 * job.size.parameters) / GIB:.1f} GiB" in problem


def test_without_a_gpu_the_ranks_share_the_host(big):
    config, job = big[0], replace(big[1], on_gpu=False)
    memory = plan_memory(config, job)
    host = Limits(device=memory.of_all(8), host=None, on_gpu=False)
    assert memory_problems(config, job, host) == []
    (problem,) = memory_problems(config, job, replace(host, device=host.device - 1))
    assert "the run must fit into the host's" in problem and "--optim.offload" not in problem


@pytest.mark.parametrize(
    ("text", "number"),
    [("80GiB", 80 * GIB), ("80 GB", 80 * GB), ("1.5MiB", 3 << 19), ("7", 7), ("2kB", None), ("0", None), ("-1", None)],
)
def test_numbers_of_bytes(altered, text, number):
    assert read_bytes(text) == number
    options = {"dry_run": True, "dry_run_memory": text}
    if number:
        altered(Config(), options)
    else:
        with pytest.raises(ValueError, match="--dry-run-memory must be a number of bytes"):
            altered(Config(), options)


@pytest.fixture
def folder(tmp_path):
    """A folder with the configuration of Qwen3-4B and a tokenizer, without weights."""
    folder = tmp_path / "model"
    Qwen3Config(**QWEN3_4B, eos_token_id=1, architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_dry_run_needs_no_weights_and_starts_no_process(launch, folder, capsys):
    options = {"model.path": folder, "model.dtype": "bf16", "dry_run_memory": "80GB"}
    assert launch(options | {"distributed.processes": 8}, "--dry-run") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "memory of each of 8 ranks" in text and "parameters │ 4,022,468,096" in text
    assert f"The model is not loaded and tried: {folder} has no weights, which are not checked." in text
    assert launch(options | {"dry_run_memory": "40GB"}, "--dry-run") == 2
    assert "memory: a rank must fit into the GPU's 37.3 GiB, got " in capsys.readouterr().err


def test_a_dry_run_without_a_gpu_plans_for_the_host(launch, folder, capsys, monkeypatch):
    monkeypatch.setattr("mgrpo.run.plan.host_memory", lambda: type("Host", (), {"total": 10 * GIB, "free": GIB}))
    assert launch({"model.path": folder, "model.device": "cpu"}, "--dry-run") == 2
    assert "memory: the run must fit into the host's 10.0 GiB, got " in " ".join(capsys.readouterr().err.split())


def test_a_plan_for_another_machine_is_not_tried(launch, capsys, monkeypatch):
    monkeypatch.setattr("mgrpo.train.try_start", lambda config: pytest.fail("tried"))
    assert launch({"dry_run_memory": "24GB"}, "--dry-run") == 0
    assert "not loaded and tried: the plan is for another device." in capsys.readouterr().out
    assert launch({"distributed.processes": 2}, "--dry-run") == 0
    assert "not loaded and tried: the plan is for 2 processes." in capsys.readouterr().out
    assert launch({"dry_run_memory": "24GB"}) == 2
    assert "--dry-run-memory needs --dry-run." in capsys.readouterr().err


def test_a_plan_for_a_gpu_has_the_kernels_of_a_gpu(launch, capsys):
    gpu = {"dry_run_memory": "24GB"}
    for options, backend in (
        (gpu, "reference"),  # no kernel has been verified on a GPU
        (gpu | {"model.device": "cuda:1"}, "reference"),
        (gpu | {"kernels.backend": "cuda"}, "cuda"),
        (gpu | {"model.device": "cpu"}, "cpu"),
    ):
        assert launch(options, "--dry-run") == 0, options
        table = " ".join(capsys.readouterr().out.split())
        assert all(f"│ {op} │ {backend} │" in table for op in OPS), options
    assert launch(gpu | {"kernels.backend": "cpu"}, "--dry-run") == 2
    assert "--kernels.backend must be a backend for cuda tensors, got 'cpu'" in capsys.readouterr().err
    assert launch(gpu | {"model.device": "gpu"}, "--dry-run") == 2
    assert "--model.device must be auto, cpu or cuda[:N], got gpu." in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_where_they_are_meant_to_run(name):
    config, job, limits = planned(name)
    assert make_preset(name).model.path.startswith("Qwen/Qwen3-")
    assert memory_problems(config, job, limits) == []
    memory = plan_memory(config, job)
    assert memory.device < 0.95 * limits.device  # room for a GPU's context and its allocator
