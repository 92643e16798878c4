from __future__ import annotations

import base64
import io
import json
import re

import pytest
from matplotlib.image import imread

from mgrpo.errors import InputError
from mgrpo.observe.plots import draw_figures
from mgrpo.observe.report import read_run, write_report
from mgrpo.report import main


def make_row(step: int) -> dict:
    return {
        "step": step,
        "reward_mean": 0.5 + step / 100,
        "vote_accuracy": 0.9 - step / 100,
        "token_entropy": 1 / step,
        "probe_accuracy_policy": {1: 0.25, 4: 0.75, 6: 0.5}.get(step),
        "step_s": 1.0,
    }


def make_run(folder, rows=None, config=None):
    folder.mkdir(parents=True)
    rows = [make_row(step) for step in range(1, 7)] if rows is None else rows
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(config or {"preset": "toy", "steps": 9, "seed": 41}))
    return folder


def table_row(page: str, name: str) -> list[str]:
    row = re.search(rf"<tr><td>{name}</td>(.*?)</tr>", page)
    assert row, name
    return [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?>(.*?)</td>", row[1])]


def test_table_has_first_best_and_last_values(tmp_path):
    page = write_report([make_run(tmp_path / "run")]).read_text()
    assert table_row(page, "eval accuracy, policy") == ["0.25", "0.75 step 4", "0.5"]
    assert table_row(page, "reward") == ["0.51", "0.56 step 6", "0.56"]
    assert table_row(page, "token entropy, nats") == ["1", "", "0.1667"]
    assert table_row(page, "seconds a step") == ["1", "1 step 1", "1"]
    assert "gradient norm" not in page
    assert "preset <b>toy</b>" in page and "steps <b>6 of 9</b>" in page and "seed <b>41</b>" in page
    assert "model <b>unknown</b>" in page


def test_page_is_self_contained_and_holds_the_plots(tmp_path):
    run = make_run(tmp_path / "run")
    report = write_report([run])
    assert report == run / "report.html"
    page = report.read_text()
    sources = re.findall(r'(?:src|href)="(.*?)"', page)
    figures = draw_figures([read_run(run, name="run")])
    files = {path.stem: path.read_bytes() for path in (run / "plots").glob("*.png")}
    assert files.keys() == figures.keys() == {"reward", "entropy", "momentum", "time"}
    embedded = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    assert embedded == [files[name] for name in figures]
    for name, figure in figures.items():
        width, height = (figure.get_size_inches() * figure.dpi).round()
        assert imread(io.BytesIO(files[name])).shape[:2] == (height, width)


def test_everything_from_a_run_is_escaped(tmp_path):
    rows = [make_row(1), make_row(2) | {"alarm": ["answers are '<b>99</b>'", "too & long"]}]
    rows += [make_row(3) | {"alarm": "one <i>string</i>"}, make_row(4) | {"alarm": []}]
    config = {"preset": "<script>x</script>", "data": {"train": "a&b.jsonl"}}
    page = write_report([make_run(tmp_path / "r<u>n", rows, config)]).read_text()
    for raw in ("<b>99", "<script>x", "<i>string", "r<u>n", "a&b"):
        assert raw not in page
    assert page.count("<li>") == 3
    assert "<li>step 2: answers are &#x27;&lt;b&gt;99&lt;/b&gt;&#x27;</li><li>step 2: too &amp; long</li>" in page
    assert "<li>step 3: one &lt;i&gt;string&lt;/i&gt;</li>" in page
    assert "<h1>Run r&lt;u&gt;n</h1>" in page
    assert "&quot;preset&quot;: &quot;&lt;script&gt;x&lt;/script&gt;&quot;" in page


def test_many_alarms_are_counted(tmp_path):
    rows = [make_row(step) | {"alarm": ["bad"]} for step in range(1, 26)]
    page = write_report([make_run(tmp_path / "run", rows)]).read_text()
    assert page.count("<li>") == 20 and "and 5 more" in page


def test_no_alarm_no_box(tmp_path):
    assert "<b>Alarms</b>" not in write_report([make_run(tmp_path / "run")]).read_text()


def test_several_runs_share_a_page_beside_them(tmp_path):
    report = write_report([make_run(tmp_path / "lr" / name) for name in ("high", "low")])
    assert report == tmp_path / "lr" / "report" / "report.html"
    page = report.read_text()
    assert "<h2>high</h2>" in page and "<h2>low</h2>" in page and "<h1>2 runs</h1>" in page


def test_runs_of_one_name_are_told_apart_and_out_is_used(tmp_path):
    folders = [make_run(tmp_path / name / "run") for name in ("a", "b")]
    report = write_report([*folders, folders[0]], tmp_path / "new" / "out")
    assert report == tmp_path / "new" / "out" / "report.html"
    page = report.read_text()
    assert re.findall("<h2>(./run)</h2>", page) == ["a/run", "b/run"]


def test_cut_last_line_and_rewritten_steps(tmp_path):
    run = make_run(tmp_path / "run", [make_row(1), make_row(2), make_row(1) | {"reward_mean": 0.125}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 3, "rew')
    assert [(row["step"], row["reward_mean"]) for row in read_run(run, name="run").rows] == [(1, 0.125), (2, 0.52)]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (b'{"step": 1}\n{"step":\n{"step": 3}\n', r"metrics\.jsonl:2: not valid JSON"),
        (b'{"step": 1}\n\xff\xfe\n{"step": 3}\n', r"metrics\.jsonl:2: not valid JSON"),
        (b'{"step": 1}\n[1]\n', r"metrics\.jsonl:2: must be an object with an integer `step`, got \[1\]"),
        (b'{"loss": 1}\n', r"metrics\.jsonl:1: must be an object with an integer `step`"),
        (b'{"step": true}\n', r"metrics\.jsonl:1: must be an object with an integer `step`"),
        (b"", r"metrics\.jsonl: must hold at least one step, got none"),
        (b'{"st', r"metrics\.jsonl: must hold at least one step, got none"),
    ],
)
def test_damaged_metrics_are_refused(tmp_path, metrics, message):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(metrics)
    with pytest.raises(InputError, match=message):
        write_report([run])


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one run directory, got none"):
        write_report([])
    with pytest.raises(InputError, match=r"run directory must exist, got .*nowhere"):
        write_report([tmp_path / "nowhere"])
    run = make_run(tmp_path / "run")
    for text, message in (("{", r"config\.json: not valid JSON"), ("[1]", r"config\.json: must hold an object")):
        (run / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            write_report([run])
    (run / "config.json").unlink()
    assert "preset <b>unknown</b>" in write_report([run]).read_text()
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics\.jsonl: metrics must be readable, got: No such file"):
        write_report([run])


def test_command_line(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "run directory must exist" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([str(run), "--out", str(tmp_path / "file")]) == 6
    assert "could not be written" in capsys.readouterr().err
