"""Parquet and Arrow files: the images that the datasets library writes; files that are wrong are named."""

import io
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import CPU, TINY, call, tiny
from PIL import Image

from fasttrain.config.schema import DataConfig
from fasttrain.data.open_data import open_data, open_labeled, open_unlabeled
from fasttrain.data.scan import cache_dir, scan
from fasttrain.pipelines.plan import Plan
from fasttrain.pipelines.train_loader import batches
from fasttrain.utils.errors import UserError

datasets.disable_progress_bars()


def dataset_of(folder: Path, names: list[str]) -> datasets.Dataset:
    """The images of a folder of class folders as datasets holds them. names: of the classes, in any order."""
    files = sorted(folder.rglob("*.jpg"), key=lambda path: path.name[::-1])
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": str(path.relative_to(folder))} for path in files],
        "label": [names.index(path.parent.name) for path in files],
        "note": ["x"] * len(files),
    }  # fmt: skip
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), "note": datasets.Value("string")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


@pytest.fixture(scope="module")
def stored(demo_set, tmp_path_factory) -> dict[str, Path]:
    """The demo set in each form, by name."""
    root, names = tmp_path_factory.mktemp("arrow"), [path.name for path in sorted((demo_set / "train").iterdir())][::-1]
    train, val = dataset_of(demo_set / "train", names), dataset_of(demo_set / "val", names)
    datasets.DatasetDict({"train": train, "validation": val}).save_to_disk(root / "saved", max_shard_size="400KB")
    (root / "hub" / "data").mkdir(parents=True)
    for number in range(2):
        train.shard(2, number).to_parquet(root / "hub" / "data" / f"train-0000{number}-of-00002.parquet")
    val.to_parquet(root / "hub" / "data" / "validation-00000-of-00001.parquet")
    pattern = root / "hub" / "data" / "train-*.parquet"
    return {"saved": root / "saved", "hub": root / "hub", "pattern": pattern}


def data_of(path: object):
    return open_data(DataConfig(train=(str(path),)))


def test_a_saved_folder_has_the_images_of_the_folder(demo_set, stored):
    """`save_to_disk` drops the folders of the paths, so the ids differ."""
    for index, split in zip(data_of(stored["saved"]), ("train", "val"), strict=True):
        folder = scan(demo_set / split)
        assert index.classes == folder.classes and np.array_equal(index.labels, folder.labels)
        ours = {index.store.content(number).tobytes(): label for number, label in enumerate(index.labels.tolist())}
        assert ours == {
            Path(path).read_bytes(): label for path, label in zip(folder.paths, folder.labels.tolist(), strict=True)
        }


@pytest.mark.parametrize("form", ["hub", "pattern"])
def test_it_has_the_batches_of_the_folder(demo_set, stored, form):
    """Byte for byte; ids, labels, sizes and so the fingerprints are equal."""
    (index, val), folder = data_of(stored[form]), scan(demo_set / "train")
    assert index.fingerprint() == folder.fingerprint()
    assert index.fingerprint_of_sizes() == folder.fingerprint_of_sizes()
    assert form == "pattern" or val.fingerprint() == scan(demo_set / "val").fingerprint()
    plan = Plan.of(tiny(), folder)
    for a, b in zip(
        batches(plan, index, CPU.device, 1, stop_step=2), batches(plan, folder, CPU.device, 1, stop_step=2), strict=True
    ):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.indices, b.indices)


def test_the_library_reads_the_same_images(stored):
    index, _ = data_of(stored["hub"])
    loaded = datasets.load_dataset("parquet", data_files=str(stored["pattern"]), split="train")
    names = loaded.features["label"].names
    for row in loaded.select(range(0, 500, 9)).cast_column("image", datasets.Image(decode=False)):
        number = index.ids.index(row["image"]["path"])
        assert index.store.content(number).tobytes() == row["image"]["bytes"]
        assert index.classes[index.labels[number]] == names[row["label"]]


def test_parquet_files_are_copied_once(stored, monkeypatch):
    first, _ = data_of(stored["hub"])
    copies = list((cache_dir() / "arrow").iterdir())
    assert len(copies) == 3
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", None)
    second, _ = data_of(stored["hub"])
    assert np.array_equal(first.store.content(7), second.store.content(7))


def jpeg(color: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (color, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def parquet(path: Path, **columns) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_files_of_other_libraries(tmp_path):
    """Binary columns without a schema of datasets, and labels as text or numbers."""
    kinds = {"image": pyarrow.large_binary(), "img": pyarrow.binary()}
    for (name, kind), labels in zip(kinds.items(), (["yak", "ape", "yak"], [10, 9, 10]), strict=True):
        path = parquet(tmp_path / f"{name}.parquet", **{name: pyarrow.array([jpeg()] * 3, kind), "cls": labels})
        index, _ = data_of(path)
        assert index.classes == tuple(sorted({str(label) for label in labels}))
        assert [index.classes[label] for label in index.labels] == sorted(str(label) for label in labels)
        assert index.sizes.tolist() == [[6, 8]] * 3 and index.ids[0] == f"{name}-000000{1 if name == 'image' else 0}"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0, 1]}, "one column must hold the bytes of images; found none"),
        ({"a": [{"bytes": b"x"}] * 2, "b": [{"bytes": b"x"}] * 2}, "found a, b"),
        ({"image": [jpeg()] * 2}, r"row 0 has no label"),
        ({"image": [jpeg()] * 2, "label": [1, -1]}, r"row 1 has no label"),
        ({"image": [jpeg()] * 2, "label": [1, None]}, r"row 1 has no label"),
        ({"image": [jpeg()] * 2, "label": [1.0, 2.0]}, "the labels in label are double; store integers or text"),
        ({"image": pyarrow.array([], pyarrow.binary()), "label": [1][:0]}, "holds no images"),
        ({"image": [jpeg()] * 2, "label": [3, 3]}, r"only one label \(3\)"),
        ({"image": [{"bytes": jpeg()}, {"bytes": None}], "label": [1, 2]}, "row 1 has no bytes of an image"),
        ({"image": [jpeg(), b"text"], "label": [1, 2]}, r"cannot use the image .*\.parquet:1: it has no header"),
    ],
)
def test_wrong_tables_are_refused_in_one_line(tmp_path, columns, message):
    with pytest.raises(UserError, match=message) as error:
        data_of(parquet(tmp_path / "t.parquet", **columns))
    assert str(error.value).isprintable()


def test_names_of_classes_from_untrusted_files(tmp_path):
    table = pyarrow.table({"image": [jpeg()] * 2, "label": [0, 1]})
    for names in ("x", [1, 2], ["a", "a"], None):
        info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        text = str(info).replace("'", '"').replace("None", "null")
        pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": text}), tmp_path / "t.parquet")
        if names is None:
            assert data_of(tmp_path / "t.parquet")[0].classes == ("0", "1")
        else:
            with pytest.raises(UserError, match="names of its classes are not a list of different texts"):
                data_of(tmp_path / "t.parquet")


def test_damaged_files_are_refused_or_read(stored, tmp_path):
    """Whatever bytes change, there is one line or an index whose content lies in the file."""
    rng = np.random.default_rng(0)
    sources = [next(stored["saved"].glob("validation/*.arrow")), next(stored["hub"].glob("data/val*.parquet"))]
    refused = 0
    for number in range(60):
        source = sources[number % 2]
        data = bytearray(source.read_bytes())
        if number < 6:
            data = data[: len(data) * number // 6]
        else:
            for place in rng.integers(len(data) - 8, size=2 if number % 4 < 2 else 1):
                place = int(place) if number % 3 else int(rng.integers(2000))
                data[place : place + 8] = rng.bytes(8)
        path = tmp_path / f"{number}{source.suffix}"
        path.write_bytes(data)
        try:
            index = open_unlabeled(str(path))
        except UserError as error:
            assert str(error).isprintable()
            refused += 1
        else:
            assert sum(len(index.store.content(each)) for each in range(len(index))) <= len(data)
    assert refused > 10


def test_a_saved_folder_may_only_name_files_in_it(stored, tmp_path):
    shutil.copytree(stored["saved"] / "train", tmp_path / "set")
    state = tmp_path / "set" / "state.json"
    first = next((tmp_path / "set").glob("*.arrow")).name
    state.write_text(state.read_text().replace(first, f"../../{first}"))
    with pytest.raises(UserError, match=r"state\.json does not name the data files next to it"):
        data_of(tmp_path / "set")


def test_a_disk_that_is_too_small_is_named(stored, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match=r"do not fit into .*; set XDG_CACHE_HOME"):
        data_of(stored["hub"])
    assert not list((cache_dir() / "arrow").iterdir())


def test_a_missing_pyarrow_is_named(stored, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install pyarrow"):
        data_of(stored["hub"])


def test_a_folder_of_classes_with_a_parquet_file_next_to_it_stays_a_folder(demo_set, tmp_path):
    (tmp_path / "train").symlink_to(demo_set / "train")
    parquet(tmp_path / "train-metadata.parquet", image=[jpeg()], label=[1])
    assert len(data_of(tmp_path)[0]) == 500


def test_images_without_labels_can_be_predicted(demo_set, tmp_path):
    path = parquet(tmp_path / "test.parquet", image=[{"bytes": jpeg(), "path": f"{name}.jpg"} for name in "ba"])
    index = open_unlabeled(str(path))
    assert index.ids == ("a.jpg", "b.jpg") and index.labels.tolist() == [-1, -1]
    labeled = parquet(tmp_path / "t.parquet", image=[jpeg()] * 2, label=["ape", "yak"])
    assert open_labeled(str(labeled), ["ape", "cat", "yak"], "run").labels.tolist() == [0, 2]


def test_splits_are_not_mixed(stored, tmp_path):
    with pytest.raises(UserError, match="has files of the splits train and val; name those of one"):
        data_of(stored["hub"] / "data" / "*.parquet")
    for name, split in (("a", "train"), ("b", "train")):
        (tmp_path / name).mkdir()
        parquet(tmp_path / name / f"{split}-0.parquet", image=[jpeg()] * 2, label=[1, 2])
    with pytest.raises(UserError, match=r"has files of train in .*a and .*b; name the folder to use"):
        data_of(tmp_path)


def test_a_test_split_is_not_scored_by_mistake(tmp_path):
    for split, colors, labels in (("train", (0, 60), [1, 2]), ("test", (120, 180), [-1, -1])):
        parquet(tmp_path / f"{split}-0.parquet", image=list(map(jpeg, colors)), label=labels)
    with pytest.raises(UserError, match="has the splits train, test, and no val; name a file"):
        open_labeled(str(tmp_path), ["1", "2"], "run")
    with pytest.raises(UserError, match="row 0 has no label"):
        open_labeled(str(tmp_path / "test-0.parquet"), ["1", "2"], "run")
    assert "4 images read" in call("data", "check", tmp_path).stdout


def test_images_without_names_are_unpacked_with_the_ending_of_their_kind(tmp_path):
    path = parquet(tmp_path / "t.parquet", image=[jpeg()] * 2, label=["ape", "yak"])
    call("data", "pack", path, "--out", tmp_path / "p.safetensors", "--workers", 1)
    call("data", "unpack", tmp_path / "p.safetensors", "--out", tmp_path / "back")
    assert len(scan(tmp_path / "back")) == 2


@pytest.mark.slow
def test_commands_take_them(demo_set, stored, tmp_path):
    out = tmp_path / "run"
    result = call("run", *TINY, "--data", stored["hub"], "--epochs", 1, "--out", out)
    assert f"500 training images of 10 classes in {stored['hub']} (train); 250 validation images" in result.stderr
    of_files = call("eval", out, "--device", "cpu", "--data", stored["saved"]).stdout
    assert of_files == call("eval", out, "--device", "cpu", "--data", demo_set).stdout
    assert "750 images read" in call("data", "check", stored["hub"]).stdout
    packed = call("data", "pack", stored["saved"], "--out", tmp_path / "p.safetensors", "--workers", 1)
    assert "750 images" in packed.stdout
