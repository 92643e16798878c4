from __future__ import annotations

import pytest
import torch

import mgrpo_kernels as K
from mgrpo import doctor
from mgrpo.doctor import Check, KernelResult, Op, check_kernel, check_needed, main, make_ops, measure_roof

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    for name, size in {"T": 32, "D": 8, "V": 2048, "HEAD_V": 256, "EMA_SIZE": 1000, "ROOF_BYTES": 2**16}.items():
        monkeypatch.setattr(doctor, name, size)


def test_every_public_op_agrees_with_fp64(small):
    ops = make_ops(CPU)
    assert set(ops) == {name for name in K.__all__ if name[0].islower() and name != "backends"}
    for name, op in ops.items():
        result = check_kernel(name, op, "reference", 1.0)
        assert result.problem is None, result
        assert result.error < 1e-5
        assert (result.roof_share is None) == name.startswith("linear_")


def scale(factor: float) -> Op:
    """Doubles its input; in fp32 the result is off by `factor`."""
    return Op(
        {"x": torch.linspace(-8, 8, 1000)}, lambda x, _: [x["x"] * (2 if x["x"].dtype == torch.float64 else factor)]
    )


def test_a_wrong_kernel_is_found():
    assert check_kernel("scale", scale(2.0), "reference", 1.0).problem is None
    wrong = check_kernel("scale", scale(2.01), "reference", 1.0)
    assert wrong.error == pytest.approx(0.005, rel=1e-3)  # 8 * 0.01 / 16
    assert wrong.problem == "error must be at most 3.5e-04"


def test_one_wrong_output_of_two_is_found():
    def give(inputs, backend):
        return [inputs["x"], inputs["x"] * (1 if inputs["x"].dtype == torch.float64 else 0.5)]

    assert check_kernel("give", Op({"x": torch.ones(4)}, give), "reference", 1.0).error == 0.5


@pytest.mark.parametrize("nan_first", [True, False])
def test_nan_is_a_wrong_result(nan_first):
    def give(inputs, backend):
        poisoned = inputs["x"] * (1 if inputs["x"].dtype == torch.float64 else torch.nan)
        return [poisoned, inputs["x"]] if nan_first else [inputs["x"], poisoned]

    assert check_kernel("give", Op({"x": torch.ones(4)}, give), "reference", 1.0).problem


def test_a_kernel_that_raises_says_why():
    def fail(inputs, backend):
        raise ValueError("scale: x must be wide.\nMore.")

    result = check_kernel("scale", Op({"x": torch.ones(2)}, fail), "reference", 1.0)
    assert result == KernelResult("scale", "reference", None, None, None, "scale: x must be wide. More")


def test_an_op_in_place_is_compared_after_one_call():
    def halve(inputs, backend):
        return [inputs["x"].mul_(0.5)]

    op = Op({"x": torch.linspace(0, 8, 1000)}, halve)
    assert check_kernel("halve", op, "reference", 1.0).error == 0
    assert op.inputs["x"][-1] == 8


def test_roof_share_counts_every_input_and_output_once(monkeypatch):
    monkeypatch.setattr(doctor, "measure_times", lambda call, device: [1e-6, 2e-6, 2e-6, 2e-6, 9.0])
    result = check_kernel("scale", scale(2.0), "reference", gb_per_s=8.0)
    assert result.time_ms == pytest.approx(2e-3)
    assert result.roof_share == pytest.approx(0.5)  # 8000 bytes in 2 us of 8 GB/s


def test_roof_takes_the_fastest_of_copy_and_sum(small, monkeypatch):
    times = iter([[4.0, 2.0], [6.0, 8.0]])
    monkeypatch.setattr(doctor, "measure_times", lambda call, device: next(times))
    assert measure_roof(CPU) == pytest.approx(2**16 / 1e9)
    times = iter([[4.0, 2.0], [6.0, 2.0]])
    assert measure_roof(CPU) == pytest.approx(1.5 * 2**16 / 1e9)


def test_needed_things_are_tried():
    checks = {check.name: check for check in check_needed()}
    assert checks["engine transformers"].works, checks
    assert checks["answer checker"] == Check("answer checker", True, "math-verify compares in a worker process")


def test_a_failing_need_is_reported(monkeypatch):
    monkeypatch.setattr("mgrpo.grading.checker.AnswerChecker.equivalent", lambda *_: False)
    monkeypatch.setattr(doctor, "load_model", lambda _: 1 / 0)
    checks = {check.name: check for check in check_needed()}
    assert checks["answer checker"].detail.startswith("RuntimeError: math-verify did not find")
    assert checks["base builtin:arithmetic"] == Check(
        "base builtin:arithmetic", False, "ZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize(
    ("works", "factor", "code", "verdict"),
    [
        (True, 2.0, 0, "Everything that training needs works."),
        (False, 2.0, 1, "Something that training needs fails."),
        (True, 3.0, 1, "Something that training needs fails."),
    ],
)
def test_exit_code_and_printed_findings(small, monkeypatch, capsys, works, factor, code, verdict):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor, "check_needed", lambda: [Check("engine", works, "4 tokens [generated]")])
    monkeypatch.setattr(doctor, "make_ops", lambda device: {"scale": scale(factor)})
    reference = K.backends()["reference"]
    states = {"reference": reference, "cpu": reference._replace(available=False, reason="no compiler")}
    monkeypatch.setattr(K, "backends", lambda: states)
    assert main(["--device", "cpu"]) == code
    printed = capsys.readouterr().out
    assert verdict in printed and "4 tokens [generated]" in printed and torch.__version__ in printed
    assert "no compiler" in printed
    assert ("error must be at most" in printed) == (factor == 3.0)


def test_a_bad_device_exits_with_2(capsys):
    assert main(["--device", "abacus"]) == 2
    assert "doctor: --device must be auto, cpu or cuda[:N], got abacus." in capsys.readouterr().err
