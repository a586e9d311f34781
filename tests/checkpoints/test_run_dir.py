"""A run's folder: its lock, copies of it, and which checkpoint a path names."""

import errno
import fcntl
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import call, events, part_of, run, tiny

from fasttrain.checkpoints import checkpoint
from fasttrain.checkpoints.run_dir import lock, open_run
from fasttrain.config.schema import CheckpointConfig, ResumeConfig
from fasttrain.data.index import Index
from fasttrain.utils.errors import UserError


@pytest.fixture(scope="module")
def index(demo_set):
    return part_of(demo_set, 4)


@pytest.fixture(scope="module")
def trained(index, tmp_path_factory):
    """A run of two epochs, whose best checkpoint is its first."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(tiny(checkpoint=CheckpointConfig(keep=5)), out, index)
    first, _ = sorted((out / "checkpoints").iterdir())
    checkpoint.set_link(out / "best", first)
    return out


def test_a_run_folder_may_be_a_mount_point_whose_parent_is_read_only(tmp_path, monkeypatch):
    """As root any folder can be written to, so the system call is made to fail."""
    out = tmp_path / "mount"
    out.mkdir()
    os_open = os.open

    def refusing(path, flags, *args, **settings):
        if flags & os.O_CREAT and Path(path).parent != out:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return os_open(path, flags, *args, **settings)

    monkeypatch.setattr(os, "open", refusing)
    with lock(out):
        assert [path.parent for path in tmp_path.rglob(".lock")] == [out]


def test_a_folder_under_two_names_is_one_folder(tmp_path):
    """Two mounts of a folder have different paths, but the same files."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with lock(tmp_path / "a"):
        os.link(tmp_path / "a" / ".lock", tmp_path / "b" / ".lock")
        with pytest.raises(UserError, match="another run is writing"), lock(tmp_path / "b"):
            pass


def test_a_file_system_that_cannot_lock_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock(tmp_path / "run"):
        pass
    assert "cannot be locked" in capsys.readouterr().err


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="holds none"), lock(tmp_path / "run"):
        open_run(tmp_path / "run", str(tmp_path / "nothing"), "")
    assert not list(tmp_path.iterdir())


def test_never_moves_the_old_run_and_keeps_the_lock(tmp_path, trained):
    out = tmp_path / "run"
    shutil.copytree(trained, out, symlinks=True)
    with lock(out):
        open_run(out, "never", "")
        assert {path.name for path in out.iterdir()} == {".lock", "recipe.toml"}
        assert checkpoint.find(tmp_path / "run.1") == (tmp_path / "run.1/checkpoints/step-00000002").resolve()
        with pytest.raises(UserError, match="another run is writing"), lock(out):
            pass


def test_resuming_from_a_run_takes_its_last_checkpoint_and_says_so(tmp_path, trained, index, capsys):
    assert checkpoint.find(trained).name == "step-00000002"
    out = tmp_path / "other"
    run(tiny(epochs=3, resume=ResumeConfig(allow=("epochs",))), out, index, resume=str(trained))
    assert events(out)[0]["step"] == 4
    assert f"resuming after step 4 of 6, from {trained / 'checkpoints/step-00000004'}" in capsys.readouterr().err


@pytest.mark.parametrize("with_checkpoints", [True, False])
def test_a_copy_that_followed_links_goes_on(tmp_path, trained, index, with_checkpoints):
    out = tmp_path / "copy"
    shutil.copytree(trained, out)
    assert not (out / "last").is_symlink()
    if not with_checkpoints:
        shutil.rmtree(out / "checkpoints")
    run(tiny(epochs=3, resume=ResumeConfig(allow=("epochs",)), checkpoint=CheckpointConfig(keep=5)), out, index)
    assert (out / "last").readlink() == Path("checkpoints/step-00000006")
    assert (out / "best").is_symlink()
    steps = {path.name for path in (out / "checkpoints").iterdir()}
    assert steps == {f"step-0000000{step}" for step in (2, 4, 6)}


def test_a_run_whose_recipe_is_lost_goes_on(tmp_path, trained, index):
    out = tmp_path / "copy"
    shutil.copytree(trained, out, symlinks=True)
    (out / "recipe.toml").unlink()
    run(tiny(checkpoint=CheckpointConfig(keep=5)), out, index)
    assert (out / "recipe.toml").read_text() == (trained / "recipe.toml").read_text()


def test_a_run_folder_among_the_class_folders_is_refused(demo_set, tmp_path, monkeypatch):
    """It would count as a class when the run resumes."""
    data = tmp_path / "data"
    shutil.copytree(demo_set / "train", data)
    monkeypatch.chdir(data)
    line = call("run", "--arch", "test_resnet", "--device", "cpu", "--epochs", 1, "--data", ".", status=2).output
    assert "the run's folder runs/test_resnet" in line and "inside the images' folder" in line
    assert not Path("runs").exists()


def test_a_class_whose_output_moves_is_refused_even_if_classes_may_differ(tmp_path, trained, index):
    """Renaming a class changes the order of the outputs."""
    out = tmp_path / "run"
    shutil.copytree(trained, out, symlinks=True)
    names = [*index.classes[1:], "zzz"]
    renamed = Index(index.paths, index.ids, (index.labels - 1) % 10, index.sizes, tuple(names))
    recipe = tiny(epochs=3, resume=ResumeConfig(allow=("epochs", "classes", "data")))
    with pytest.raises(UserError, match=f"'{names[0]}' was output 1 and would be 0"):
        run(recipe, out, renamed)
    same_order = replace(index, classes=("aaa", *index.classes[1:]))
    run(recipe, out, same_order)
