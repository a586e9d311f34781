"""The command line as a user sees it: output, files, exit status, and a one-line message for each mistake."""

import json
import os
import shlex
import subprocess
import sys

import click
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from helpers import TINY, call
from PIL import Image

from fasttrain import __version__, recipes
from fasttrain.cli.main import main
from fasttrain.config import toml
from fasttrain.data.demo_set import CLASSES
from fasttrain.data.scan import cache_dir, scan
from fasttrain.evaluation import metrics, predictions


def test_help_imports_neither_torch_nor_dali_nor_timm():
    code = "import sys; from fasttrain.cli.main import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'timm', 'nvidia.dali', 'numpy', 'PIL') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]" and "--batch-size" in result.stdout


def commands(group=main, words=()):
    """Every command and group, as a tuple of words: ("bench", "step")."""
    for name, command in group.commands.items():
        yield (*words, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))


def test_every_command_has_help():
    names = list(commands())
    assert {("run",), ("bench",), ("bench", "step"), ("data", "check")} <= set(names)
    for *parents, name in names:
        assert f"\n  {name} " in call(*parents, "--help").output
        text = call(*parents, name, "--help").output
        assert text.startswith(f"Usage: main {' '.join((*parents, name))} ") and "\n\n  " in text


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--image-size", "--lr", "--seed"])
def test_help_says_where_the_default_comes_from(option):
    params = {param.opts[0]: param for param in main.commands["run"].params if isinstance(param, click.Option)}
    assert "Default:" in (params[option].help or "") and "the recipe's" in (params[option].help or "")


def test_run_trains_evaluates_and_resumes(demo_set, tmp_path):
    out, images = tmp_path / "my run", tmp_path / "my images"
    images.symlink_to(demo_set)
    first = call("run", *TINY, "--data", images, "--epochs", 1, "--out", out)
    assert "best top-1" in first.stdout and f"best checkpoint: {out}/best, last: {out}/last)" in first.stdout
    assert "no recipe for test_resnet: using the defaults" in first.stderr
    assert (out / "best" / "model.safetensors").is_file()
    recipe = recipes.by_name(str(out / "recipe.toml"))
    assert recipe.data.train == (str(images),) and recipe.precision == "fp32" and recipe.epochs == 1
    again = call("run", *TINY, "--data", images, "--epochs", 1, "--out", out)
    assert f"{500 // 50} steps" in again.stdout
    _, _, command = first.stdout.splitlines()[-1].partition("fasttrain ")
    scores = call(*shlex.split(command), "--device", "cpu").stdout
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    top1 = next(event["top1"] for event in logged if event["event"] == "eval")
    assert f"top-1 {top1:.2%}" in scores and "of 250 images" in scores


def test_the_recipe_of_a_run_reproduces_the_run(demo_set, tmp_path):
    call("run", *TINY, "--data", demo_set / "train", "--epochs", 1, "--seed", 5, "--out", tmp_path / "one")
    call("run", "--recipe", tmp_path / "one" / "recipe.toml", "--out", tmp_path / "two")
    hashes = [json.loads((tmp_path / run / "last" / "meta.json").read_text())["sha256"] for run in ("one", "two")]
    assert hashes[0] == hashes[1]


def test_run_without_data_trains_on_the_demo_set_and_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = call("run", "--arch", "tresnet_xl", "--device", "cpu", "--dry-run")
    assert "training on the demo set" in result.stderr and "fasttrain run --arch tresnet_xl --data DIR" in result.stderr
    assert "500 training images of 10 classes in " in result.stdout
    assert "75.81 M parameters" in result.stdout and "runs/demo-tresnet_xl" in result.stdout
    assert not (tmp_path / "runs").exists()
    assert len(scan(cache_dir() / "demo-1" / "train").classes) == len(CLASSES)


def test_dry_run_prints_what_a_run_would_do(demo_set, tmp_path):
    out = tmp_path / "out"
    args = [*TINY, "--data", demo_set, "--epochs", 3, "--set", "micro_batch=10", "--out", out, "--dry-run"]
    text = call("run", *args).stdout
    for part in ("50 = 1 ranks x 5 micro-batches x 10", "30 = 3 epochs x 10", "peak lr    0.0195312", "[10, 3, 32, 32]",
                 "logits [10, 10]", "MiB each", "micro_batch = 10"):  # fmt: skip
        assert part in text
    assert not out.exists()


def test_options_change_the_recipe(demo_set, tmp_path):
    text = call(
        "run", *TINY, "--data", demo_set / "train", "--val", demo_set / "val", "--lr", "0.3", "--seed", 9,
        "--workers", 3, "--compile", "--set", "optim.momentum=0.5", "--dry-run", "--out", tmp_path / "o",
    ).stdout  # fmt: skip
    recipe = toml.from_toml(text.split("\n\n" + "data ")[0])
    assert recipe.peak_lr == 0.3 and recipe.seed == 9 and recipe.machine.workers == 3
    assert recipe.machine.compile == "on" and recipe.optim.momentum == 0.5 and recipe.data.val == str(demo_set / "val")


def test_unusual_paths_are_kept_in_the_recipe(demo_set, tmp_path):
    odd = tmp_path / "\N{ROCKET} it's \"x\\"
    odd.mkdir()
    for split in ("train", "val"):
        (odd / split).symlink_to(demo_set / split)
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), odd / "w.pth")
    args = ["run", *TINY, "--data", odd, "--val", odd / "val", "--init", odd / "w.pth", "--out", odd / "o", "--dry-run"]
    recipe = toml.from_toml(call(*args).stdout.split("\n\n" + "data ")[0])
    assert recipe.init.weights == str(odd / "w.pth")
    assert (recipe.data.train, recipe.data.val) == ((str(odd),), str(odd / "val"))


@pytest.mark.parametrize("option", ["--data", "--init"])
def test_a_path_that_is_not_utf8_is_refused_before_the_run(option, demo_set, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.symlink_to(demo_set)
    result = call("run", *TINY, "--data", demo_set, option, odd, "--out", tmp_path / "o", status=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert len(errors) == 1 and "caf\\xe9 is not UTF-8" in errors[0] and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a network with --arch"),
        (["--arch", "tresnet_x"], "tresnet_xl"),
        (["--arch", "resnet18", "--recipe", "x"], "--recipe excludes --arch and --loss"),
        (["--recipe", "x", "--loss", "ce"], "--recipe excludes --arch and --loss"),
        (["--arch", "test_resnet", "--loss", "ce+arcface"], "arcface does not converge from random weights"),
        (["--arch", "test_resnet", "--loss", "ce+triplet", "--init", "nowhere"], "nowhere is no checkpoint"),
        (["--arch", "test_resnet", "--loss", "ce+triplet", "--batch-size", "25"], "25 is not a multiple of images_per"),
        (["--recipe", "bag_of_tricks/distillation", "--batch-size", "9"], "distillation needs a teacher"),
        (["--recipe", "nothing"], "no recipe 'nothing'"),
        (["--recipe", "nothing.toml"], "cannot read the recipe nothing.toml"),
        (["--arch", "test_resnet", "--data", "nowhere"], "no such folder"),
        (["--arch", "test_resnet", "--val", "nowhere"], "--val without --data"),
        (["--arch", "test_resnet", "--set", "epoch=3"], "did you mean 'epochs'?"),
        (["--arch", "test_resnet", "--lr", "-1"], "--lr: optim.lr must be above 0"),
        (["--arch", "test_resnet", "--batch-size", "501"], "500 images are fewer than one batch of 501"),
        (["--arch", "test_resnet", "--resume", "nowhere"], "nowhere is no checkpoint"),
    ],
)
def test_mistakes_get_one_line_and_status_2(args, message, demo_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache_dir().mkdir(parents=True)
    (cache_dir() / "demo-1").symlink_to(demo_set)  # the arguments name no images
    result = call("run", *args, status=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in result.output


def test_a_missing_gpu_is_reported(demo_set, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("run", "--arch", "test_resnet", "--data", demo_set, "--device", "cuda", status=2)
    assert "torch sees no GPU" in result.stderr


def test_a_damaged_image_ends_the_run_and_is_named(demo_set, tmp_path):
    import shutil

    shutil.copytree(demo_set / "train", tmp_path / "train")
    victim = sorted((tmp_path / "train").rglob("*.jpg"))[123]
    victim.write_bytes(victim.read_bytes()[:900])
    result = call("run", *TINY, "--data", tmp_path / "train", "--epochs", 1, "--out", tmp_path / "o", status=1)
    assert str(victim) in result.stderr and "Traceback" not in result.output


def test_recipes_are_listed_and_printed():
    listing = call("recipes").stdout
    assert all(name in listing for name in recipes.RECIPES)
    printed = call("recipes", "deepblueai/tresnet_xl-ce").stdout
    assert toml.from_toml(printed) == recipes.RECIPES["deepblueai/tresnet_xl-ce"]


def test_show_draws_the_batch_of_a_step(demo_set, tmp_path):
    args = ["show", "--arch", "test_resnet", "--data", demo_set / "train", "--set", "image_size=48"]
    for name, step in (("a.png", 0), ("b.png", 0), ("c.png", 1)):
        call(*args, "--set", "batch_size=12", "--step", step, "--out", tmp_path / name)
    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png")]
    assert pictures[0] == pictures[1] != pictures[2]
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 8 * 48 and image.height > 2 * 48
    assert "there are 90 epochs of 3 steps" in call(*args, "--step", 99, status=2).stderr
    assert "name a file that ends in .png" in call(*args, "--out", tmp_path / "a.jpg", status=2).stderr


@pytest.fixture(scope="module")
def trained(demo_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    call("run", *TINY, "--data", demo_set, "--epochs", 1, "--out", out, "--set", "ema.decay=0.5")
    return out


def test_a_second_stage_starts_from_the_first(trained, demo_set, tmp_path):
    args = [*TINY, "--data", demo_set, "--epochs", 1, "--init", trained]
    arcface = call("run", *args, "--loss", "ce+arcface", "--out", tmp_path / "a")
    assert "init: " in arcface.stderr and "starting random: cosine.weight" in arcface.stderr
    triplet = call("run", *args, "--batch-size", 20, "--loss", "ce+triplet", "--out", tmp_path / "t")
    assert "batches of 5 classes x 4 images; 480 of 500 images per epoch" in triplet.stderr
    recipe = recipes.by_name(str(tmp_path / "t" / "recipe.toml"))
    assert recipe.name == "test_resnet-ce+triplet" and recipe.init.weights == str(trained)
    # `eval` takes its weights without the second head.
    assert "of 250 images" in call("eval", tmp_path / "a", "--data", demo_set, "--device", "cpu").stdout


def test_eval_predict_ensemble_and_score_work_together(trained, demo_set, tmp_path):
    val = demo_set / "val"
    common = ["--device", "cpu", "--views", "report", "--sizes", "24,32"]
    result = call(
        "eval", trained, "--data", val, *common, "--out", tmp_path / "a.npz", "--confusion", tmp_path / "c.png"
    )
    lines = result.stdout.splitlines()
    assert lines[0].startswith("   24 px: top-1 ") and lines[1].startswith("   32 px: top-1 ")
    assert lines[2].startswith("   fused: top-1 ") and "of 250 images" in lines[2]
    assert "worst classes:" in lines and "most confused:" in lines
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 300
    call("eval", trained, "--data", val, "--device", "cpu", "--raw", "--out", tmp_path / "b.npz")
    call("predict", trained, "--images", val, *common, "--out", tmp_path / "p.npz")
    with_labels, without = (predictions.load(tmp_path / name) for name in ("a.npz", "p.npz"))
    assert without.labels is None and with_labels.ids.tolist() == without.ids.tolist()
    np.testing.assert_array_equal(with_labels.probs, without.probs)
    assert with_labels.labels is not None
    expected = metrics.scores(with_labels.probs, with_labels.labels)
    assert f"fused: top-1 {expected.top1:.2%}, top-5 {expected.top5:.2%}" in lines[2]

    files = [tmp_path / "a.npz", tmp_path / "b.npz"]
    fused = call("ensemble", *files, "--out", tmp_path / "f.npz", "--submission", tmp_path / "s.csv", status=2)
    assert "two images are called" in fused.stderr  # 000.jpg of two classes
    top1s = [
        f"top-1 {metrics.scores(p.probs, p.labels).top1:.2%}"
        for p in map(predictions.load, files)
        if p.labels is not None
    ]
    text = call("ensemble", *files, "--fit", files[0], "--fit", files[1], "--out", tmp_path / "f.npz").stdout
    assert all(top1 in text for top1 in top1s) and "weight " in text and "100.0%" in text
    weighted = call("ensemble", *files, "--weights", "3,1", "--out", tmp_path / "f.npz").stdout
    assert "weight 0.750" in weighted and "fused: top-1" in weighted
    one, two = (predictions.load(path).probs for path in files)
    np.testing.assert_allclose(predictions.load(tmp_path / "f.npz").probs, 0.75 * one + 0.25 * two, atol=1e-6)

    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(val.rglob("*.jpg"))[::10]):
        (flat / f"img_{number}.JPEG").write_bytes(path.read_bytes())
    call("predict", trained, "--images", flat, "--device", "cpu", "--out", tmp_path / "flat.npz")
    call("ensemble", tmp_path / "flat.npz", "--submission", tmp_path / "s.csv")
    labels = [f"img_{number}.JPEG,{number * 10 // 25}" for number in range(25)]
    (tmp_path / "labels.csv").write_text("Image IDs,Labels\n" + "\n".join(labels) + "\n")
    top1 = call("score", tmp_path / "s.csv", "--labels", tmp_path / "labels.csv").stdout
    loaded = predictions.load(tmp_path / "flat.npz")
    ids = loaded.ids.tolist()
    hits = [int(loaded.probs[ids.index(f"img_{n}.JPEG")].argmax()) == n * 10 // 25 for n in range(25)]
    assert top1 == f"top-1 {np.mean(hits):.4f} of 25 images\n"


def test_eval_uses_averaged_weights_by_default(trained, demo_set):
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    logged = next(event for event in log if event["event"] == "eval")
    for option, top1 in (([], logged["ema"]["top1"]), (["--raw"], logged["top1"])):
        assert f"top-1 {top1:.2%}" in call("eval", trained, "--data", demo_set, "--device", "cpu", *option).stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["eval", "RUN", "--data", "SET", "--out", "p.csv"], "end the name in .npz"),
        (["eval", "RUN", "--data", "SET", "--sizes", "a"], "--sizes a: give numbers of pixels with commas"),
        (["eval", "RUN", "--data", "SET", "--sizes", "2"], "--sizes 2"),
        (["eval", "RUN", "--data", "SET", "--confusion", "c.jpg"], "name a file that ends in .png"),
        (["predict", "RUN", "--images", "RUN", "--out", "p.npz"], "there is no image in"),
        (["predict", "nothing", "--images", "SET", "--out", "p.npz"], "is no checkpoint"),
        (["ensemble", "nothing.npz"], "cannot read nothing.npz"),
        (["ensemble", "nothing.npz", "--weights", "1,2"], "--weights 1,2: give 1 numbers"),
        (["ensemble", "nothing.npz", "--weights", "0"], "not all 0"),
        (["ensemble", "a.npz", "--fit", "a.npz", "--fit", "b.npz"], "--fit is given 2 times for 1 files"),
        (["ensemble", "a.npz", "--fit", "a.npz", "--weights", "1"], "exclude each other"),
        (["score", "nothing.csv", "--labels", "nothing.csv"], "cannot read nothing.csv"),
    ],
)
def test_mistakes_of_the_other_commands_get_one_line(trained, demo_set, tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    names = {"RUN": str(trained), "SET": str(demo_set)}
    result = call(*[names.get(word, word) for word in command], status=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert len(errors) == 1 and message in errors[0] and not list(tmp_path.iterdir())


def test_data_demo_makes_the_set_once(tmp_path):
    assert "made" in call("data", "demo", tmp_path / "set").stdout
    assert "already there" in call("data", "demo", tmp_path / "set").stdout
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    assert "is not empty" in call("data", "demo", tmp_path / "mine", status=2).stderr


def test_data_cut_draws_a_set_that_trains(demo_set, tmp_path):
    args = ["data", "cut", demo_set / "train", "--per-class", 6, "--val-per-class", 2, "--out", tmp_path / "cut"]
    assert "made" in call(*args).stdout and "60 train, 20 val images" in call(*args).stdout
    assert "already there" in call(*args).stdout
    assert "60 training images of 10 classes in " in call("run", *TINY, "--data", tmp_path / "cut", "--dry-run").stdout
    assert "has 50 images and the subset needs 51" in call(*args[:3], "--per-class", 50, "--val-per-class", 1,
                                                        "--out", tmp_path / "more", status=2).stderr  # fmt: skip


def test_data_check_names_bad_files_and_moves_them_to_quarantine_and_back(demo_set, tmp_path):
    import shutil

    for cls in ("cross-checks-blue", "disc-stripes-red"):
        shutil.copytree(demo_set / "val" / cls, tmp_path / "set" / cls)
    result = call("data", "check", tmp_path / "set", "--workers", 1)
    assert "bad: none" in result.stdout and "50 images read" in result.stdout
    victim = tmp_path / "set" / "disc-stripes-red" / "055.jpg"
    victim.write_bytes(victim.read_bytes()[:-2])
    args = ["data", "check", tmp_path / "set", "--workers", 1, "--out", tmp_path / "r.json"]
    result = call(*args, "--quarantine", tmp_path / "set aside", status=1)
    assert "BAD   disc-stripes-red/055.jpg: truncated: no end-of-image marker" in result.stdout
    assert "moved 1 files to" in result.stdout and not victim.exists()
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(finding["path"], finding["kind"]) for finding in report["findings"]] == [
        ("disc-stripes-red/055.jpg", "truncated")
    ]
    back = call(*shlex.split(result.stdout.splitlines()[-1].partition("fasttrain ")[2]))
    assert "moved 1 files back" in back.stdout and victim.exists()


def test_data_vipriors_reports_missing_files(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "imagenet" / part).mkdir(parents=True)
    args = ["data", "vipriors", "--imagenet", tmp_path / "imagenet", "--out", tmp_path / "out"]
    line = call(*args, status=2).stderr.strip().splitlines()[-1]
    assert "150000 of 150000 source files are missing" in line and "out.missing.txt" in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_eval_refuses_other_classes_and_folders_without_a_checkpoint(demo_set, tmp_path):
    call("run", *TINY, "--data", demo_set / "train", "--epochs", 1, "--out", tmp_path / "o")
    other = tmp_path / "other"
    for name in ("ape", "zebra"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(other / name / "a.jpg")
    assert "class 'ape' (and 1 more)" in call("eval", tmp_path / "o", "--data", other, status=2).stderr
    assert "is no checkpoint" in call("eval", tmp_path, "--data", other, status=2).stderr


def test_doctor_reports_every_part():
    result = CliRunner().invoke(main, ["doctor"])
    for part in ("Python", "torch", "torchvision", "timm", "DALI"):
        assert f"ok    {part}" in result.stdout
    assert result.exit_code == 0


@pytest.mark.parametrize("module", ["torch", "nvidia.dali", "timm"])
def test_a_missing_package_is_reported_in_one_line(module, tmp_path):
    """The package cannot be imported, as on a machine that is not fully set up."""
    code = f"import sys; sys.modules[{module!r}] = None\nfrom fasttrain.cli.main import main\n"
    code += "main(['show', '--arch', 'test_resnet', '--out', 'x.png'])"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    lines = [line for line in result.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert result.returncode == 1 and len(lines) == 1 and "fasttrain doctor" in lines[0]
    assert "Traceback" not in result.stderr and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (["eval", "RUN", "--data", "SET"], "a smaller --batch-size"),
        (["predict", "RUN", "--images", "SET", "--out", "p.npz"], "a smaller --batch-size"),
        (["bench", "step", "--arch", "test_resnet"], "a smaller --batch-size"),
        (["run", *TINY, "--data", "SET", "--epochs", "1"], "a smaller --set micro_batch=N"),
    ],
)
def test_out_of_memory_is_reported_in_one_line(trained, demo_set, tmp_path, monkeypatch, command, advice):
    import torch

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 GiB")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "to", fail)
    names = {"RUN": str(trained), "SET": str(demo_set)}
    result = call(*[names.get(word, word) for word in command], "--device", "cpu", status=1)
    errors = [line for line in result.stderr.splitlines() if line.startswith("fasttrain: ")]
    assert (
        len(errors) == 1 and "out of memory" in errors[0] and advice in errors[0] and "Traceback" not in result.output
    )


def test_python_m_fasttrain_is_the_same_command():
    result = subprocess.run(
        [sys.executable, "-m", "fasttrain", "--version"], capture_output=True, text=True, check=True
    )
    assert __version__ in result.stdout
