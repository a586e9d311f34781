"""The Python API: the same runs as the command line's, without its arguments and output."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, call, events, weights

import fasttrain
from fasttrain.evaluation import predictions
from fasttrain.utils.errors import UserError

SMALL = {"image_size": 32, "batch_size": 50, "device": "cpu"}


@pytest.fixture(scope="module")
def fitted(demo_set, tmp_path_factory) -> "fasttrain.Run":
    out = tmp_path_factory.mktemp("api") / "run"
    return fasttrain.fit("test_resnet", data=demo_set, epochs=2, out=out, **SMALL)


def test_fit_is_the_command(fitted, demo_set, tmp_path):
    options = ["--image-size", "32", "--batch-size", "50", "--device", "cpu", "--epochs", "2"]
    call("run", "--arch", "test_resnet", "--data", demo_set, *options, "--out", tmp_path / "run")
    ours, theirs = weights(fitted.path), weights(tmp_path / "run")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_scores_and_log_are_those_of_the_run(fitted):
    pytest.importorskip("pandas")
    logged = events(fitted.path)
    (last,) = [row for row in logged if row["event"] == "eval"][-1:]
    assert max(row["top1"] for row in logged if row["event"] == "eval") == fitted.scores["top1"]
    table = fitted.log
    assert table[table.event == "eval"].log_loss.iloc[-1] == last["log_loss"]
    assert len(table[table.event == "train"]) == sum(row["event"] == "train" for row in logged)
    assert table["terms.cross_entropy"].notna().sum() == (table.event == "train").sum()


def test_the_log_is_a_list_without_pandas(fitted, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert [row["event"] for row in fitted.log].count("eval") == 2


def test_predictions_and_scores_are_those_of_the_commands(fitted, demo_set, tmp_path):
    call("eval", fitted.path, "--data", demo_set, "--out", tmp_path / "val.npz")
    expected = predictions.load(tmp_path / "val.npz")
    found = fitted.predict(demo_set / "val", device="cpu")
    assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.probs, expected.probs)
    assert found.answers[7] == expected.classes[expected.probs[7].argmax()]
    assert fitted.evaluate(demo_set, device="cpu").top1 == np.mean(expected.probs.argmax(1) == expected.labels)


def test_a_run_is_resumed_and_opened_again(fitted, demo_set):
    again = fasttrain.fit("test_resnet", data=demo_set, epochs=2, out=fitted.path, **SMALL)
    assert again == fitted == fasttrain.load(str(fitted.path))
    assert events(fitted.path)[-1]["event"] == "end" and again.recipe.epochs == 2
    assert again.classes == sorted(again.classes)
    with pytest.raises(UserError, match="is not a run's folder"):
        fasttrain.load(fitted.path / "best")
    for options in ({"device": "tpu"}, {"interpolation": "lanczos"}, {"workers": -3}, {"views": "all"}):
        with pytest.raises(UserError, match=r"must be|choose"):
            fitted.evaluate(demo_set, **{"device": "cpu", **options})


def test_settings_and_recipes_are_taken(demo_set, tmp_path):
    settings = {"augment.crop_area": (0.5, 1.0), "losses.cross_entropy.smoothing": 0.0, "mix.cutmix": 0}
    settings["optim.lr"] = np.float64(0.2)
    run = fasttrain.fit(
        "test_resnet", data=[demo_set], epochs=np.int64(1), out=tmp_path / "a", settings=settings, **SMALL
    )
    recipe = run.recipe
    assert recipe.augment.crop_area == (0.5, 1.0) and recipe.losses[0].smoothing == 0 and recipe.mix.cutmix == 0
    again = fasttrain.fit(recipe=recipe, out=tmp_path / "b")
    ours, theirs = weights(run.path), weights(again.path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "name a network"),
        ({"arch": "resnet5"}, "has no network 'resnet5'; did you mean"),
        ({"arch": "test_resnet", "epochs": 0}, "epochs must be 1 or more, not 0"),
        ({"arch": "test_resnet", "settings": {"optim.lrr": 1}}, "no key 'optim.lrr'; did you mean 'optim.lr'"),
        ({"arch": "test_resnet", "data": "/nowhere"}, "no such folder: /nowhere"),
        ({"arch": "test_resnet", "epochs": 1, "budget": "2h"}, "exclude each other"),
        ({"arch": "test_resnet", "device": "tpu"}, "device must be one of auto, cpu, cuda"),
        ({"arch": "test_resnet", "loss": "hinge"}, "--loss must be one of ce"),
        ({"arch": "test_resnet", "compile": "off"}, "compile must be True, False or None, not 'off'"),
        ({"arch": "test_resnet", "budget": 5}, "budget must be a string, not 5"),
    ],
)
def test_wrong_arguments_raise_what_the_command_prints(demo_set, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        fasttrain.fit(out=tmp_path / "run", **{"data": demo_set, **arguments})
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no checkpoint and holds none"):
        fasttrain.load(tmp_path)


def test_importing_fasttrain_imports_neither_torch_nor_dali():
    code = "import sys, fasttrain; assert not {'torch', 'nvidia.dali', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        fasttrain.fitt  # noqa: B018
    assert {"fit", "load", "Recipe"} <= set(dir(fasttrain))


def test_nothing_is_left_behind(demo_set, tmp_path, monkeypatch):
    """Neither the command line's arguments nor the current folder, the environment or signal handlers matter."""
    import signal

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook", "--epochs", "99"])
    before = dict(os.environ), {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    fasttrain.fit("test_resnet", data=demo_set, epochs=1, out="here", **SMALL)
    assert before == (dict(os.environ), {number: signal.getsignal(number) for number in before[1]})
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "scripts" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    kernel = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=kernel).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(str(output) for output in outputs)
    assert "<iframe srcdoc=" in text and "'top1'" in text and list(tmp_path.rglob("export/model.safetensors"))
    assert not any(output.output_type == "error" for output in outputs)
    printed = "".join(output["text"] for output in outputs if output.output_type == "stream")
    assert "step 20 of" not in printed and "Warning" not in printed, "a bar instead of lines, and nothing that worries"
