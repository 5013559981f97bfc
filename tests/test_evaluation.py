"""`--evaluate`: saved models on the test split, from a run folder or a file."""

import csv
import io
import json

import keras
import numpy as np
import pytest
from own_layers import NormalizedConv
from test_main import run_of, tiny  # noqa: F401

from main import main
from run import evaluation

FEW = ["--limit_train", "160", "--limit_test", "40"]


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def finished(tiny, tmp_path):  # noqa: F811
    assert tiny("--run_name", "rho0.1", "--save_model", "--num_epochs", "1") == 0
    return tmp_path / "logs" / "rho0.1"


@pytest.mark.slow
def test_run_folder_is_evaluated_on_its_own_data(finished, tmp_path, capsys):
    summary = json.loads((finished / "summary.json").read_text())
    record = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps(record | {"resume": True}))  # as a resumed run has it
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for folder in ("rho0.1_evaluation", "rho0.1_evaluation_2"):
        capsys.readouterr()
        assert main(["--evaluate", str(finished)]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out == [f"Accuracy (%): {summary['accuracy']:.2f}", "Images: 40", f"Folder: {finished.parent / folder}"]
        record = json.loads((finished.parent / folder / "evaluation.json").read_text())
        assert record["accuracy"] == summary["accuracy"] and record["images"] == 40
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}

    folder = finished.parent / "rho0.1_evaluation"
    classes, confusion = table(folder / "per_class.csv"), table(folder / "confusion.csv")
    assert [row["class"] for row in classes] == [row["true class"] for row in confusion] == list("0123456789")
    counts = np.array([[int(count) for name, count in row.items() if name != "true class"] for row in confusion])
    assert counts.sum(axis=1).tolist() == [int(row["images"]) for row in classes] and counts.sum() == 40
    assert counts.diagonal().tolist() == [int(row["correct"]) for row in classes]
    assert 100 * counts.trace() / 40 == summary["accuracy"]
    assert float(classes[0]["accuracy"]) == 100 * counts[0, 0] / counts[0].sum()
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")


def own_model(num_classes=10, name="mine"):
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.GlobalAveragePooling2D()(NormalizedConv(4, name="block")(inputs))
    return keras.Model(inputs, keras.layers.Dense(num_classes, activation="softmax")(x), name=name)


def evaluate(path, tmp_path, data_dir, *more):
    return main(
        ["--evaluate", str(path), "--custom_objects", "own_layers:NormalizedConv", *FEW, "--data_dir", data_dir,
         "--log_dir", str(tmp_path / "logs"), *more]
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("preprocessing", ["none", "unit"])
def test_file_is_evaluated_as_plain_keras_predicts(preprocessing, tmp_path, data_dir):
    import data
    from core.config import Config

    model = own_model()
    model.save(tmp_path / "my net.keras")
    flags = [] if preprocessing == "none" else ["--preprocessing", preprocessing]
    assert evaluate(tmp_path / "my net.keras", tmp_path, data_dir, *flags) == 0
    run, records = run_of(tmp_path / "logs")
    assert run.name == "my_net_evaluation"
    images = data.load(Config(limit_train=160, limit_test=40, data_dir=data_dir, input_size=16))
    batch, labels = (np.concatenate(parts) for parts in zip(*images.test_batches().as_numpy_iterator()))
    predicted = model.predict(batch / (255 if preprocessing == "unit" else 1), verbose=0).argmax(axis=1)
    assert records["evaluation.json"]["accuracy"] == 100 * np.mean(predicted == labels)
    for row, name in zip(table(run / "confusion.csv"), range(10), strict=True):
        expected = np.bincount(predicted[labels == name], minlength=10)
        assert [int(row[f"predicted {other}"]) for other in range(10)] == expected.tolist()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--evaluate", "{tmp}/none"], "the folder of a run, with its config.json"),
        (["--evaluate", "{tmp}/none.keras"], "there is no such file"),
        (["--evaluate", "{tmp}/bare"], "without model.keras; train it with --save_model"),
        (["--evaluate", "{tmp}/five.keras"], "one output per class, (None, 10) for digits. Received: (None, 5)"),
        (["--evaluate", "{tmp}/ten.keras", "--model_name", "vgg16"], "--model_name too"),
        (["--evaluate", "{tmp}/ten.keras", "--weights", "none"], "--weights too"),
        (["--evaluate", "{tmp}/ten.keras", "--resume", "{tmp}/bare"], "--resume too"),
        (["--evaluate", "{tmp}/ten.keras", "--input_size", "32"], "must be the 16 pixels"),
    ],
)
def test_bad_evaluations_give_one_line_and_write_nothing(argv, says, tmp_path, data_dir, capsys):
    own_model(5).save(tmp_path / "five.keras")
    own_model().save(tmp_path / "ten.keras")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"dataset_name": "digits"}))
    _, path, *more = [word.replace("{tmp}", str(tmp_path)) for word in argv]
    assert evaluate(path, tmp_path, data_dir, *more) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err, err
    assert not (tmp_path / "logs").exists()


def test_outputs_that_are_not_finite_are_an_error(tmp_path, data_dir, capsys, monkeypatch):
    own_model().save(tmp_path / "ten.keras")
    monkeypatch.setattr(keras.Model, "predict_on_batch", lambda self, batch: np.full((len(batch), 10), np.nan))
    assert evaluate(tmp_path / "ten.keras", tmp_path, data_dir) == 1
    assert "must be finite" in capsys.readouterr().err


def test_class_without_images_has_no_accuracy():
    picture = evaluation.picture(np.array([[2, 1], [0, 0]]), ["cat", "dog"], "two classes")
    picture.savefig(file := io.BytesIO(), format="png")
    assert file.getvalue().startswith(b"\x89PNG")
