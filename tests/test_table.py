"""Tables and pictures of run folders, against hand-made ones; half-finished ones too."""

import csv
import io
import json
from dataclasses import asdict

import plot
import pytest
import runs as run_folders
import table

from core.config import Config


def make_run(logs, accuracy=None, status="done", memory_mb=100.0, epoch_s=2.0, selection_s=0.5, name=None, **flags):
    """Writes a run folder whose summary has these figures."""
    cfg = Config(**{"model_name": "mobilenetv2", "rho": None, "num_betti_batches": None, **flags})
    folder = logs / (name or f"run{len(list(logs.glob('*')))}")
    folder.mkdir(parents=True)
    config = {**asdict(cfg), "num_classes": 10, "weights_provenance": {"source": "none"}}
    (folder / "config.json").write_text(json.dumps(config))
    summary = {
        "status": status, "accuracy": accuracy, "peak_memory_bytes_measured": memory_mb * 1e6, "epoch_s": epoch_s,
        "selection_s": selection_s, "protocol": "validation", "weights": "none", "memory_device": "CPU:0",
    }  # fmt: skip
    if status:
        (folder / "summary.json").write_text(json.dumps(summary))
    epochs = ["epoch,train_loss,train_accuracy,val_loss,val_accuracy,seconds,learning_rate"]
    epochs += [f"{epoch},{2 / epoch},0.5,{2 / epoch},{0.2 * epoch},1.5,0.01" for epoch in (1, 2, 3)]
    (folder / "metrics.csv").write_text("\n".join(epochs) + "\n")
    layers = [
        {"path": f"layer{i}", "betti_1": float(i), "score": i * 1e-4, "selected": i > 8} for i in range(10)
    ] if cfg.rho else []  # fmt: skip
    (folder / "selection.json").write_text(json.dumps({"layers": layers}))
    return folder


def adabet(logs, accuracy, seed, rho=0.1, **others):
    return make_run(
        logs, accuracy, train_type="act_norm_betti_train", rho=rho, num_betti_batches=4, seed=seed, **others
    )


def full(logs, accuracy, seed, **others):
    return make_run(logs, accuracy, train_type="full_training", seed=seed, memory_mb=400.0, epoch_s=5.0, **others)


@pytest.fixture
def logs(tmp_path):
    """Two networks; AdaBet on both with three seeds, full training lacking here and there."""
    logs = tmp_path / "logs"
    for seed, accuracy in enumerate((80.0, 82.0, 84.0)):
        adabet(logs, accuracy, seed, memory_mb=100.0 + seed)
        adabet(logs, accuracy - 50, seed, model_name="resnet50")
    full(logs, 70.0, 0)
    full(logs, 71.0, 1)
    full(logs, None, 2, status=None)  # killed
    return logs


def rows_of(capsys, title):
    """The rows of one of the Markdown tables on stdout, as lists of cells."""
    text = capsys.readouterr().out
    block = text.split(f"### {title}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]


def test_accuracy_is_mean_and_sd_with_the_best_in_bold(logs, capsys):
    assert table.main([str(logs)]) == 0
    head, _, *rows = rows_of(capsys, "Accuracy (%)")
    assert head == ["model", "data set", "act_norm_betti_train rho=0.1", "full_training"]
    assert rows == [
        ["resnet50", "digits", "**32.00 ± 2.00**", "no run"],
        ["mobilenetv2", "digits", "**82.00 ± 2.00**", "70.50 ± 0.71 (2 of 3 seeds: 1 unfinished)"],
        ["mean", "1 of 2 rows, those complete", "82.00", "70.50"],
    ]


@pytest.mark.parametrize(
    "title, cells",
    [("Peak memory of a training step, measured (MB)", ["101.0", "400.0"]), ("Time per epoch (s)", ["2.00", "5.00"]),
     ("Selection time (s)", ["0.50", "0.50"])],
)  # fmt: skip
def test_table_has_all_metrics(logs, capsys, title, cells):
    assert table.main([str(logs)]) == 0
    *_, row, means = rows_of(capsys, title)
    assert [text.split(" (")[0] for text in row[2:]] == cells and means[2:] == cells


def test_out_has_tidy_csv_markdown_and_latex(logs, tmp_path, capsys):
    assert table.main([str(logs), "--out", str(tmp_path / "out" / "here")]) == 0
    out = tmp_path / "out" / "here"
    assert {path.name for path in out.iterdir()} == {"table.csv", "table.md", "table.tex"}
    assert (out / "table.md").read_text() == capsys.readouterr().out
    cells = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [(c["model_name"], c["train_type"], c["rho"], c["runs"]) for c in cells] == [
        ("resnet50", "act_norm_betti_train", "0.1", "3"), ("resnet50", "full_training", "", "0"),
        ("mobilenetv2", "act_norm_betti_train", "0.1", "3"), ("mobilenetv2", "full_training", "", "2"),
    ]  # fmt: skip
    assert float(cells[2]["accuracy_percent_mean"]) == 82 and float(cells[2]["accuracy_percent_sd"]) == 2
    assert float(cells[2]["peak_memory_bytes_mean"]) == 101e6 and cells[1]["accuracy_percent_mean"] == ""
    assert [c["best"] for c in cells] == ["1", "0", "1", "0"]
    tex = (out / "table.tex").read_text()
    assert r"\textbf{82.00 $\pm$ 2.00}" in tex and r"act\_norm\_betti\_train rho=0.1" in tex
    assert all(tex.count(f"\\begin{{{name}}}") == tex.count(f"\\end{{{name}}}") == 4 for name in ("table", "tabular"))


def test_runs_with_other_flags_are_never_averaged(logs, capsys):
    full(logs, 90.0, 0, num_epochs=40)
    assert table.main([str(logs)]) == 0
    head, _, *rows = rows_of(capsys, "Accuracy (%)")
    assert head[3:] == ["full_training, num_epochs=10", "full_training, num_epochs=40"]
    assert rows[1][3:] == ["70.50 ± 0.71 (2 of 3 seeds: 1 unfinished)", "**90.00** (1 of 3 seeds)"]


def test_notes_name_unlike_columns_and_repeated_seeds(tmp_path, capsys):
    logs = tmp_path / "logs"
    adabet(logs, 80.0, 0, num_epochs=5)
    full(logs, 70.0, 0)
    full(logs, 72.0, 0)
    assert table.main([str(logs)]) == 0
    out = capsys.readouterr().out
    assert "mobilenetv2 on digits: runs differ in num_epochs (10, 5)." in out
    assert "1 repeated runs of a seed are left out" in out and "| **80.00** | 72.00 |" in out


def test_broken_and_foreign_folders_are_reported(logs, capsys):
    broken = make_run(logs, 99.0, train_type="full_training", name="broken")
    (broken / "config.json").write_text('{"model_name":')
    (logs / "notes").mkdir()
    diverged = full(logs, None, 3, status="diverged", model_name="resnet50")
    make_run(logs, None, train_type="full_training", select_only=True, seed=9)
    assert table.main([str(logs)]) == 0
    out = capsys.readouterr().out
    assert f"{broken} is left out: it has no readable config.json" in out and "notes" not in out
    assert f"Not finished (diverged): {diverged}" in out and "no result: 1 diverged" in out
    assert "seeds 0, 1, 2, 3." in out


def test_run_that_failed_without_folder_is_listed(logs, capsys):
    arguments = ["--model_name", "mobilenetv2", "--dataset_name", "stanford_dogs", "--train_type", "full_training"]
    (logs / "sweep").mkdir()
    (logs / "sweep" / "lost.json").write_text(json.dumps({"arguments": arguments}))
    assert table.main([str(logs)]) == 0
    *_, row, _ = rows_of(capsys, "Accuracy (%)")
    assert row == ["mobilenetv2", "stanford_dogs", "no run", "no result: 1 failed"]


@pytest.mark.parametrize("make", [lambda path: path, lambda path: path / "none"])
def test_no_runs_is_an_error(make, tmp_path, capsys):
    assert table.main([str(make(tmp_path))]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_several_folders_and_a_single_run(logs, tmp_path):
    more = adabet(tmp_path / "more", 86.0, 3)
    found, notes = run_folders.read([str(logs), str(more)])
    assert len(found) == 10 and notes == []


# ---------------------------------------------------------------- pictures


@pytest.fixture
def no_measuring(monkeypatch):
    monkeypatch.setattr(plot, "inference_peak_bytes", lambda config: 60e6)


@pytest.mark.slow
def test_all_plots_of_unfinished_logs_are_drawn(logs, tmp_path, capsys, no_measuring):
    adabet(logs, 88.0, 0, rho=0.3)
    out = tmp_path / "plots"
    assert plot.main([str(logs), "--out", str(out)]) == 0
    made = {path.name for path in out.iterdir()}
    for stem in ("profile_resnet50_digits_act_norm_betti_train_rho0.1", "memory_digits", "tradeoff_mobilenetv2_digits",
                 "rho_mobilenetv2_digits", "curves_mobilenetv2_digits", "curves_resnet50_digits"):  # fmt: skip
        assert {f"{stem}.png", f"{stem}.pdf"} <= made
    assert all(path.stat().st_size > 5000 for path in out.iterdir())
    assert "not finished (unfinished)" in capsys.readouterr().err


def test_memory_plot_shows_the_summaries(logs, no_measuring):
    (_, figure), = plot.memory(run_folders.read([str(logs)])[0])  # fmt: skip
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["mobilenetv2"]  # resnet50 lacks full training
    assert [bar.get_height() for bar in axis.patches] == [60, 101, 400]
    plot.plt.close(figure)


def test_tradeoff_plot_shows_means(logs):
    figure = dict(plot.tradeoff(run_folders.read([str(logs)])[0]))["tradeoff_mobilenetv2_digits"]
    points = {tuple(line.get_xydata()[0]) for line in figure.axes[0].lines if line.get_marker() in plot.MARKERS}
    assert points == {(101, 82), (400, 70.5)}
    plot.plt.close(figure)


def test_missing_runs_are_reported(tmp_path, capsys):
    logs = tmp_path / "logs"
    full(logs, 70.0, 0)
    assert plot.main([str(logs), "--out", str(tmp_path / "plots"), "--only", "rho"]) == 1
    assert "no picture rho" in capsys.readouterr().err
    assert plot.main([str(logs), "--out", str(tmp_path / "plots"), "--only", "cake"]) == 2


def test_pareto_front():
    assert plot.pareto([(3, 5), (1, 2), (2, 1), (2, 4), (4, 5), (1, 1)]) == [(1, 2), (2, 4), (3, 5)]
    assert plot.pareto([]) == []
