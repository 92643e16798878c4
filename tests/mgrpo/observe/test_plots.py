from __future__ import annotations

import pytest

from mgrpo.observe.plots import Run, draw_figures, points, running_mean


def make_row(step: int) -> dict:
    return {
        "step": step,
        "reward_mean": 0.5 + step / 100,
        "vote_accuracy": 0.9 - step / 100,
        "token_entropy": None if step == 2 else 1 / step,
        "probe_accuracy_policy": {1: 0.25, 4: 0.75, 6: 0.5}.get(step),
        "step_s": 1.0,
        "time_rollout_s": 0.6,
        "time_rollout_policy_s": 0.4,
        "time_publish_s": 0.08,
        "time_update_s": 0.3,
        "time_ema_s": 0.05,
    }


def make_run(rows=None, name="run"):
    return Run(name=name, rows=[make_row(step) for step in range(1, 7)] if rows is None else rows, config={})


def line_values(figure, label):
    (line,) = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def test_lines_hold_the_values_and_skip_gaps():
    rows = [make_row(step) | {"kl": float("nan"), "loss": True} for step in range(1, 7)]
    run = make_run(rows)
    figures = draw_figures([run])
    assert "optimisation" not in figures
    assert line_values(figures["entropy"], "token entropy") == ([1, 3, 4, 5, 6], [1, 1 / 3, 1 / 4, 1 / 5, 1 / 6])
    assert line_values(figures["reward"], "eval accuracy, policy") == ([1, 4, 6], [0.25, 0.75, 0.5])
    assert points(run, "absent") == ([], [])


def test_long_lines_are_smoothed():
    rows = [{"step": step, "loss": float(step % 2)} for step in range(60)]
    figure = draw_figures([make_run(rows)])["optimisation"]
    raw, smooth = figure.axes[0].get_lines()
    assert raw.get_ydata().tolist() == [row["loss"] for row in rows]
    assert smooth.get_ydata()[1:4] == pytest.approx([1 / 3, 2 / 3, 1 / 3])
    assert running_mean([4.0] * 50) == pytest.approx([4.0] * 50)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("norm", "scale"), [(0.0, "linear"), (0.5, "log")])
def test_a_gradient_that_is_always_zero_is_drawn_without_a_logarithm(norm, scale):
    figure = draw_figures([make_run([make_row(step) | {"grad_norm": norm} for step in range(1, 7)])])["optimisation"]
    assert [axes.get_yscale() for axes in figure.axes if axes.get_lines()] == [scale]
    assert [list(line.get_ydata()) for axes in figure.axes for line in axes.get_lines()] == [[norm] * 6]


def test_the_first_alarm_is_marked():
    rows = [make_row(step) | {"alarm": ["bad"] if step > 3 else []} for step in range(1, 7)]
    figure = draw_figures([make_run(rows)])["reward"]
    assert line_values(figure, "first alarm")[0] == [4, 4]


def test_phases_add_up_without_counting_inner_ones_twice():
    figure = draw_figures([make_run()])["time"]
    axes = figure.axes[0]
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["rollout policy", "update", "rollout", "publish", "ema"]
    top = [area.get_paths()[0].get_extents().y1 for area in axes.collections]
    assert top == pytest.approx([0.4, 0.65, 0.77, 0.85, 0.9])


def test_several_runs_share_panels_and_a_legend():
    figure = draw_figures([make_run(name="high"), make_run(name="low")])["reward"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["high", "low"]
    titles = {axes.get_title(loc="left"): len(axes.get_lines()) for axes in figure.axes if axes.axison}
    assert titles == {"share: reward": 2, "share: vote accuracy": 2, "share: eval accuracy, policy": 2}
    colours = [line.get_color() for line in figure.axes[0].get_lines()]
    assert colours == [handle.get_color() for handle in figure.legends[0].legend_handles]
