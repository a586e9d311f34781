"""Untrusted files: whatever their bytes, a reader returns a valid value, or raises an error of one printable line that
names the file. It executes nothing, touches nothing outside the folder, and needs little time and memory."""

import fcntl
import io
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as to_safetensors

from fasttrain import prepare, recipes
from fasttrain import train as training
from fasttrain.checkpoints import checkpoint, meta
from fasttrain.checkpoints.init_weights import initialize
from fasttrain.checkpoints.resume import check_compatible, step_of
from fasttrain.checkpoints.run_dir import lock, newest, open_run
from fasttrain.cli.main import main
from fasttrain.config import toml
from fasttrain.config.schema import DataConfig, InitConfig, MachineConfig, MixConfig, OptimConfig, Recipe
from fasttrain.data import pack, place_files, quarantine
from fasttrain.data import scan as dataset
from fasttrain.data.headers import read_header
from fasttrain.data.index import Index, require_classes
from fasttrain.data.open_data import open_data, open_splits
from fasttrain.data.stores.pack import open_pack
from fasttrain.data.subset import make
from fasttrain.distributed.ranks import Ranks, ranks
from fasttrain.evaluation import predictions, submission
from fasttrain.losses.cross_entropy import CrossEntropy
from fasttrain.models import Classifier
from fasttrain.prepare import resolve_auto
from fasttrain.training import optim
from fasttrain.training.meter import Meter
from fasttrain.training.state import State
from fasttrain.utils.errors import CommandError, UserError
from fasttrain.utils.files import read_json_object
from fasttrain.utils.text import printable

T = TypeVar("T")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # from PIL, numpy and torch

GB = 1 << 30
# Texts that harm a terminal, a shell, a path or a decoder that trusts them.
HOSTILE = "\x1b[2J\n\u202e\x9b31m$(touch planted);`touch planted`"
TEXTS = ["", HOSTILE, "\0", "\ud800", "\udcff", "../../outside/victim.txt", "/", ".", "5", "nan", "\u2028", "a" * 5000]
NUMBERS = [-1, 0, 1, 2, 2**31, 2**63, 10**30, -0.5, 0.5, 1.5, 1e308, math.inf, -math.inf, math.nan]


class _TimeUp(BaseException):
    """Not an Exception, because readers may catch those."""


@contextmanager
def limits(seconds: float = 20, memory: int = 4 * GB) -> Iterator[None]:
    """Fail the test where the block needs more time. More address space raises MemoryError in the block."""

    def on_alarm(*_: object) -> None:
        raise _TimeUp

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, on_alarm)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    try:
        yield
    except _TimeUp:
        pytest.fail(f"not done within {seconds} s")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def outcome(read: Callable[[], T], name: str, **limited: Any) -> tuple[bool, T | None]:
    """Whether a reader accepts a file, and the value that it returns. Fails the test where it raises anything but a
    CommandError of one printable line that contains `name`."""
    try:
        with limits(**limited):
            return True, read()
    except CommandError as error:
        assert str(error).isprintable() and str(error), f"not one printable line: {str(error)!r}"
        assert name in str(error), f"does not name {name!r}: {error}"
        return False, None


def assert_refused(read: Callable[[], object], name: str, **limited: Any) -> None:
    accepted, value = outcome(read, name, **limited)
    assert not accepted, f"read as {value!r}"


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch, capfd):
    """Runs the test in an empty folder. Checks that files outside it did not change, that no payload was executed, and
    that the output is printable."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "victim.txt").write_text("years of work")
    monkeypatch.chdir(inside)
    yield
    assert not list(tmp_path.rglob("planted*")), "a payload was executed"
    assert tree(outside) == {"victim.txt"} and (outside / "victim.txt").read_text() == "years of work"
    output = "".join(capfd.readouterr())
    print(output, end="")
    assert all(c.isprintable() or c in "\r\n" for c in output), f"unescaped on the terminal: {output!r}"


def tree(folder: Path) -> set[str]:
    """Everything in a folder, by relative path."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


class Bomb:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, ("touch planted",)


PICKLE = pickle.dumps(Bomb())


# ---- inputs


def put(path: Path, content: "str | bytes | Callable[[], str | bytes]") -> None:
    """Write a file. Large contents are functions, which are called only in the tests that need them."""
    content = content() if callable(content) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def nest(opening: str, closing: str = "", depth: int = 100_000) -> str:
    return opening * depth + closing * depth


# Any JSON value. Values that often break readers are more frequent.
any_json = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=4), inner,
                                                               max_size=3),
    max_leaves=6,
)  # fmt: skip


def mutations(*samples: bytes, tokens: tuple[bytes, ...] = ()) -> st.SearchStrategy[bytes]:
    """One of the samples with bits flipped, truncated, spliced with another one, or with a token inserted."""
    inserts = (*tokens, b"\0", b"\xff\xfe", b"\x1b[2J", "\u202e".encode(), b"\n", PICKLE)

    def mutate(seed: int) -> bytes:
        draw = random.Random(seed)
        content = bytearray(draw.choice(samples))
        for _ in range(draw.randint(1, 4)):
            position = draw.randrange(len(content) + 1)
            kind = draw.choice(["flip", "byte", "cut", "splice", "token", "drop"])
            if kind == "flip" and position < len(content):
                content[position] ^= 1 << draw.randrange(8)
            elif kind == "byte" and position < len(content):
                content[position] = draw.randrange(256)
            elif kind == "cut" and draw.random() < 0.5:
                del content[position:]
            elif kind == "splice":
                other = draw.choice(samples)
                start = draw.randrange(len(other) + 1)
                content[position : position + draw.randrange(64)] = other[start : start + draw.randrange(64)]
            elif kind == "token":
                content[position : position + draw.choice([0, 0, 1, 8])] = draw.choice(inserts)
            elif kind == "drop":
                del content[position : position + draw.randrange(16)]
        return bytes(content)

    return st.integers(0, 2**48).map(mutate)


def fuzz(reader: str, count: int, inputs: st.SearchStrategy[T], check: Callable[[T], object]) -> None:
    """Run a check on at least `count` inputs, the same ones in every run."""
    seen = 0

    @settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def check_one(value: T) -> None:
        nonlocal seen
        seen += 1
        check(value)

    check_one()
    print(f"{reader}: {seen} inputs")
    assert seen >= count


# ---- special files

SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link-to-dev-zero": lambda path: path.symlink_to("/dev/zero"),
    "link-to-itself": lambda path: path.symlink_to(path.name),
    "broken-link": lambda path: path.symlink_to("nowhere"),
}
# By reader: the name of its file, the function, and whether it must refuse special files or may ignore them.
READERS: dict[str, tuple[str, Callable[[Path], object], bool]] = {
    "recipe": ("x.toml", lambda path: recipes.by_name(str(path)), True),
    "predictions": ("x.npz", predictions.load, True),
    "predictions to overwrite": ("x.npz", predictions.check_overwritable, False),
    "submission": ("x.csv", lambda path: submission.read(path, submission.HEADER), True),
    "submission to overwrite": ("x.csv", submission.check_overwritable, False),
    "checkpoint": ("meta.json", lambda path: checkpoint.load(path.parent), True),
    "checkpoint's meta.json": ("meta.json", lambda path: checkpoint.verify(path.parent), True),
    "checkpoint, archived or not": ("meta.json", lambda path: meta.holds(path.parent, "archived", True), False),
    "quarantine": ("restore.json", lambda path: quarantine.restore(path.parent, path.parent.parent), True),
    "quarantine to add to": ("restore.json", lambda path: quarantine.quarantine("/nowhere", ["a"], path.parent), True),
    "set": ("cut.json", lambda path: place_files.is_finished(path.parent, "cut.json", {"fasttrain_cut": 1}), True),
    "demo set": ("demo.json", read_json_object, False),
    "list of missing files": (
        "set.missing.txt",
        lambda path: place_files._refuse_missing(path, {"/nowhere": None}),
        True,
    ),
    "pack": ("x.safetensors", lambda path: open_pack(path), True),
    "index cache": ("x.npy", lambda path: dataset._load_sizes(path, 2), False),
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("reader", READERS)
def test_special_files_do_not_block_readers(reader, special):
    name, read, must_refuse = READERS[reader]
    path = Path("its folder", name).absolute()
    path.parent.mkdir()
    SPECIAL[special](path)
    named = name if reader not in ("checkpoint", "quarantine to add to", "set") else "its folder"
    if reader == "list of missing files" and special == "broken-link":
        must_refuse = True
    accepted, value = outcome(lambda: read(path), named, seconds=2)
    assert not (accepted and must_refuse), f"read as {value!r}"
    assert not (path.parent / "nowhere").exists(), "written through a link"


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", ["model.safetensors", "train.safetensors"])
def test_special_files_for_tensors_do_not_block(ckpt, name, special):
    (ckpt / name).unlink()
    SPECIAL[special](ckpt / name)
    assert_refused(lambda: checkpoint.verify(ckpt), name, seconds=2)


@pytest.mark.parametrize("special", SPECIAL)
def test_the_newest_checkpoint_is_found_where_last_is_a_special_file(special, ckpt):
    SPECIAL[special](ckpt.parent.parent / "last")
    accepted, path = outcome(lambda: newest(ckpt.parent.parent), "")
    assert accepted and path is not None and path.name == ckpt.name


# ---- recipes

RECIPE = Recipe(
    name="small",
    arch="test_resnet",
    image_size=8,
    batch_size=4,
    epochs=1,
    losses=(CrossEntropy(),),
    optim=OptimConfig(warmup_epochs=0.0),
    mix=MixConfig(cutmix=0.0),
    machine=MachineConfig(device="cpu", workers=1),
)
HEAD = 'arch = "test_resnet"\n'
QUOTED = json.dumps(HOSTILE, ensure_ascii=True)


def dotted(table: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of all settings in a table of tables."""
    keys = []
    for key, value in table.items():
        keys += dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return keys


KEYS = dotted(toml.to_dict(RECIPE))


@pytest.mark.parametrize(
    "content",
    {
        "empty": "",
        "not UTF-8": b"\xff\xfea\0r\0",
        "a pickle": PICKLE,
        "NUL": "arch = 'a\0b'",
        "lists in lists": "arch = " + nest("[", "]"),
        "lists in lists, slightly too deep": "arch = " + nest("[", "]", 800),
        "tables in tables": "arch = " + nest("{a=", "}"),
        "a key of many parts": "a." * 100_000 + "a = 1",
        "a table of many parts": "[" + "a." * 100_000 + "a]",
        "10 MB of keys": lambda: "\n".join(f"k{number} = 1" for number in range(700_000)),
        "an integer of 5000 digits": HEAD + "epochs = " + "9" * 5000,
        "a hexadecimal of 5000 digits": HEAD + "epochs = 0x" + "f" * 5000,
        "a hexadecimal for a text": "arch = 0x" + "f" * 5000,
        "a hexadecimal of 5000 digits in a list": HEAD + "data.train = [0x" + "f" * 5000 + "]",
        "a hexadecimal for a number": HEAD + "optim.lr = 0x" + "f" * 5000,
        "an integer beyond floats": HEAD + "optim.lr = 1" + "0" * 400,
        "an integer beyond floats in a loss": HEAD + "losses.cross_entropy.weight = 1" + "0" * 400,
        "1e400": HEAD + "optim.lr = 1e400",
        "nan": HEAD + "optim.momentum = nan",
        "a duplicate key": HEAD + HEAD,
        "a date": HEAD + "epochs = 2020-01-01",
        "an invalid date": HEAD + "epochs = 2020-13-77",
        "true for a number": HEAD + "epochs = true",
        "a list for a table": HEAD + "optim = [1]",
        "a list for the table of losses": HEAD + "losses = [1]",
        "a number for a loss": HEAD + "losses.cross_entropy = 1",
        "a hostile key": HEAD + QUOTED + " = 1",
        "a hostile loss": HEAD + f"losses.{QUOTED}.weight = 1",
        "a hostile value": HEAD + f"epochs = {QUOTED}",
        "a hostile policy": HEAD + f"augment.autoaugment = {QUOTED}",
        "a key of a class": HEAD + "__class__ = 1",
        "a key of a loss's class": HEAD + "losses.cross_entropy.fine_tunes = true",
        "an unclosed text": 'arch = """' + "x" * 1_000_000,
        "a control character": f"arch = '{HOSTILE}'",
    }.items(),
    ids=lambda item: item[0],
)
def test_invalid_recipes_are_refused(content):
    put(Path("hostile.toml"), content[1])
    assert_refused(lambda: recipes.by_name("hostile.toml"), "hostile.toml")


@pytest.mark.parametrize("name", ["../../outside/run", "/abs", "..", ".", "a/../../b", "a\0b", HOSTILE])
def test_a_recipe_name_cannot_lead_outside_the_folder_of_runs(name):
    """Without --out the run's folder is runs/<name>."""
    Path("hostile.toml").write_text(f"{HEAD}name = {json.dumps(name)}\n")
    assert_refused(lambda: recipes.by_name("hostile.toml"), "hostile.toml")


@pytest.mark.parametrize("name", [f"{HOSTILE.replace('/', '')}.toml", "a\0b.toml", "x" * 5000 + ".toml"])
def test_recipe_file_names_are_escaped(name):
    assert_refused(lambda: recipes.by_name(name), printable(name))
    with suppress(OSError, ValueError):  # the name is invalid for a file
        Path(name).write_text("arch = 1")
        assert_refused(lambda: recipes.by_name(name), printable(name))


def test_a_printed_recipe_is_escaped():
    """`fasttrain recipes FILE.toml` prints untrusted text."""
    Path("hostile.toml").write_text(f"{HEAD}data.val = {json.dumps(HOSTILE)}\n")
    result = CliRunner().invoke(main, ["recipes", "hostile.toml"])
    assert result.exit_code == 0 and all(c.isprintable() or c == "\n" for c in result.output)
    assert toml.from_toml(result.output).data.val == HOSTILE


@pytest.mark.parametrize(
    "setting",
    [
        "epochs=" + "9" * 5000,
        "epochs=0x" + "f" * 5000,
        "optim.lr=1" + "0" * 400,
        "epochs=" + nest("["),
        "a." * 50_000 + "a=1",
        "epochs=" + "{" + "a." * 50_000 + "a=1}",
        HOSTILE,
        f"epochs={HOSTILE}",
        f"{HOSTILE}=1",
        f"optim.{HOSTILE}=1",
        "=",
        "epochs",
        "name.x=1",
        "losses=1",
    ],
    ids=lambda setting: ascii(setting[:20]),
)
def test_invalid_settings_are_refused(setting):
    assert_refused(lambda: toml.override(RECIPE, setting), "--set")


def test_fuzzed_recipes_are_read_or_refused():
    texts = [toml.to_toml(recipe).encode() for recipe in (RECIPE, *recipes.RECIPES.values())]
    literals = st.sampled_from(
        ["1", "-1", "true", "nan", "-inf", "1e400", "[]", "{}", "[1, 2]", '["a"]', "''", QUOTED, "0x" + "f" * 300,
         "1" + "0" * 400, "9" * 5000, "2020-01-01", "{weight = 1}", "{cross_entropy = {}}", '"imagenet"', "0.5"]
    )  # fmt: skip
    keys = [*KEYS, *toml.to_dict(RECIPE), "losses.triplet", "losses.arcface.scale", "losses"]
    keys += [QUOTED, "__init__", "optim.lr.x"]
    structured = st.lists(st.tuples(st.sampled_from(keys), literals), max_size=3).map(
        lambda rows: "".join(f"{key} = {value}\n" for key, value in [("arch", '"test_resnet"'), *rows]).encode()
    )

    def check(content: bytes) -> None:
        Path("x.toml").write_bytes(content)
        accepted, recipe = outcome(lambda: recipes.by_name("x.toml"), "x.toml")
        if accepted:
            assert recipe is not None and toml.from_toml(toml.to_toml(recipe)) == recipe and recipe.peak_lr > 0

    fuzz("recipes.by_name", 300, structured | mutations(*texts, tokens=(b"0x" + b"f" * 300, b"[", b"1e400")), check)


def test_fuzzed_settings_are_accepted_or_refused():
    keys = st.sampled_from([*KEYS, "optim", "losses", "no.such", "", HOSTILE]) | st.text(max_size=5)
    values = st.sampled_from(
        ["1", "0.5", "nan", "[1]", "{}", "9" * 5000, "0x" + "f" * 5000, "[" * 2000, "'a'", HOSTILE]
    )
    texts = st.tuples(keys, st.sampled_from(["=", " = ", ""]), values | st.text(max_size=9)).map("".join)

    def check(setting: str) -> None:
        accepted, recipe = outcome(lambda: toml.override(RECIPE, setting), "--set")
        if accepted:
            assert recipe is not None and toml.from_dict(toml.to_dict(recipe), "again") == recipe

    fuzz("toml.override", 200, texts, check)


# ---- checkpoints


@pytest.fixture(scope="module")
def network() -> Classifier:
    torch.manual_seed(0)
    return Classifier.of(RECIPE, 2)


SCALER = torch.amp.GradScaler("cpu", enabled=False)
META = {
    "recipe": toml.to_dict(RECIPE),
    "classes": ["a", "b"],
    "data": "0" * 64,
    "sizes": "0" * 64,
    "best": 0.5,
    "epoch_steps": 2,
    "world": 1,
    "shift": 0,
    "rewinds": 0,
    "streak": 0,
    "meters": [{"loss": [0.0, 0.0]}],
    "logged": {"cross_entropy": []},
}


@pytest.fixture(scope="module")
def saved_run(network, tmp_path_factory) -> Path:
    """A run's folder with one checkpoint, as fasttrain writes it, without the links `last` and `best`."""
    out = tmp_path_factory.mktemp("saved") / "run"
    snapshot = checkpoint.Snapshot().take(State(network, optim.sgd(network, RECIPE.optim), SCALER))
    checkpoint.save(out, 1, snapshot, improved=True, keep=1, meta=META)
    (out / "last").unlink()
    (out / "best").unlink()
    return out


@pytest.fixture
def ckpt(saved_run) -> Path:
    """A copy of the checkpoint of `saved_run`, which a test may damage."""
    return shutil.copytree(saved_run, Path("run").absolute()) / "checkpoints" / "step-00000001"


def forge(path: Path, model: bytes | None = None, train: bytes | None = None, **changes: Any) -> None:
    """Change a checkpoint and update its hashes, as an attacker would. A change to `...` removes the key."""
    meta = json.loads((path / "meta.json").read_text())
    for name, content in (("model.safetensors", model), ("train.safetensors", train)):
        if content is not None:
            (path / name).write_bytes(content)
            meta["sha256"][name] = sha256(content).hexdigest()
    meta |= changes
    meta = {key: value for key, value in meta.items() if value is not ... and key != "checksum"}
    checksum = sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (path / "meta.json").write_text(json.dumps(meta | {"checksum": checksum}))


@pytest.mark.parametrize(
    "content",
    {
        "empty": "",
        "a pickle": PICKLE,
        "not UTF-8": b"\xff",
        "a text": '"format"',
        "a number": "2",
        "lists in lists": nest("["),
        "tables in tables": nest('{"a":'),
        "a number of 5000 digits": '{"format": ' + "9" * 5000 + "}",
        "a format of texts": json.dumps(
            {"format": HOSTILE, "sha256": {"model.safetensors": "", "train.safetensors": ""}}
        ),
        "hashes in a list": '{"format": 3, "sha256": []}',
        "a hash that is a number": '{"format": 3, "sha256": {"model.safetensors": 1, "train.safetensors": 1}}',
        "a hash that is a list": '{"format": 3, "sha256": {"model.safetensors": [], "train.safetensors": {}}}',
        "100 MB of lists": lambda: '{"a": [' + "[]," * 33_000_000,
        "100 MB of spaces": lambda: b" " * 100_000_000,
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.verify], ids=["load", "verify"])
def test_invalid_meta_files_are_refused(ckpt, read, content):
    put((ckpt / "meta.json"), content[1])
    assert_refused(lambda: read(ckpt), ckpt.name, memory=GB)
    with limits(memory=GB):
        assert meta.holds(ckpt, "archived", True) is False


# Invalid values, by key of meta.json; `...` stands for a missing key.
INVALID_META: dict[str, list[Any]] = {
    "step": ["5", -1, 1.5, True, None, [], {}, math.inf, math.nan, HOSTILE, ...],
    "recipe": ["x", 5, None, [], ["a"], {}, {"arch": 5}, {"arch": HOSTILE}, {"arch": "../../x"}, {HOSTILE: 1}, [[1, 2]],
               ...],
    "classes": ["ab", 2, None, {}, {"a": 1, "b": 2}, [], [1, 2], ["a", None], ["a", "a"], [["a"], ["b"]], ...],
    "data": [None, 5, [], {}, ...],
    "best": ["0.5", True, [], {}, math.nan, math.inf, ...],
    "epoch_steps": ["5", 0, -1, 1.5, None, True, 10**30, ...],
    "world": ["5", 0, -1, None, ...],
    "shift": ["5", -1, None, 10**30, ...],
    "rewinds": ["5", -1, None, ...],
    "streak": ["5", -1, None, ...],
    "archived": ["true", 1, None, ...],
    "meters": ["x", 5, None, {}, [[]], [[[0.0], [0.0]]], [{"loss": ["a", "b"]}], [{"loss": [0.0]}], [{"loss": 0}],
               [{"loss": [0, math.nan]}], [None], ...],
    "logged": ["x", 5, None, [], {"cross_entropy": 5}, {"cross_entropy": ["a"]}, {"cross_entropy": None}, ...],
    "scaler": ["x", 5, None, [], {"scale": "1"}, ...],
}  # fmt: skip
INVALID_META_PAIRS = [(key, value) for key, values in INVALID_META.items() for value in values]


@pytest.fixture(scope="module")
def train_index(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("images")
    for number in range(8):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "ab"[number % 2] / f"{number}.png")
    return dataset.scan(folder, progress=False)


@pytest.fixture(scope="module")
def single_rank() -> Iterator[Ranks]:
    with ranks("cpu") as rank:
        yield rank


@pytest.fixture
def resume(ckpt, train_index, single_rank, network, monkeypatch) -> Callable[[], object]:
    """A function that resumes from the checkpoint, as `fasttrain run` does."""
    recipe = resolve_auto(RECIPE, torch.device("cpu"))
    forge(ckpt, recipe=toml.to_dict(recipe), data=train_index.fingerprint(), sizes=train_index.fingerprint_of_sizes())
    monkeypatch.setattr(Classifier, "of", lambda recipe, classes: network)  # built once, for speed
    monkeypatch.setattr(prepare, "check_input_shape", lambda *_: None)
    return lambda: training.train(recipe, ckpt.parent.parent, train_index, None, single_rank, ckpt)


def test_an_undamaged_checkpoint_is_resumed_from(ckpt, resume):
    """The tests of refusals below rely on this."""
    assert outcome(resume, "")[0]
    assert checkpoint.network(ckpt)[2] == ["a", "b"]


@pytest.mark.parametrize(
    ("key", "value"), INVALID_META_PAIRS, ids=[f"{key}={ascii(value)[:30]}" for key, value in INVALID_META_PAIRS]
)
def test_a_run_does_not_resume_from_invalid_meta_values(ckpt, resume, key, value):
    forge(ckpt, **{key: value})
    assert_refused(resume, ckpt.name)


INVALID_NETWORK_PAIRS = [(key, value) for key, value in INVALID_META_PAIRS if key in ("recipe", "classes")]


@pytest.mark.parametrize(
    ("key", "value"), INVALID_NETWORK_PAIRS, ids=[f"{key}={ascii(value)[:30]}" for key, value in INVALID_NETWORK_PAIRS]
)
def test_a_network_is_not_built_from_invalid_meta_values(ckpt, network, key, value):
    forge(ckpt, **{key: value})
    unknown_arch = isinstance(value, dict) and value.get("arch") in (HOSTILE, "../../x")
    assert_refused(lambda: checkpoint.network(ckpt), "timm" if unknown_arch else ckpt.name)
    if not unknown_arch:
        assert_refused(lambda: initialize(network, InitConfig(str(ckpt)), "test_resnet", ["a", "b"]), ckpt.name)


def test_a_network_larger_than_its_file_is_not_built(ckpt):
    """A class name takes a few bytes, and the weights of its class take thousands."""
    recipe = toml.to_dict(replace(RECIPE, arch="resnet50"))
    forge(ckpt, recipe=recipe, classes=[f"{number:06}" for number in range(400_000)])
    assert_refused(lambda: checkpoint.network(ckpt), ckpt.name, memory=GB)


@pytest.mark.parametrize("arch", ["test_resnet." + HOSTILE, HOSTILE, "local-dir:/", "hf-hub:a/b", "\ud800", "a\0b"])
def test_the_network_name_of_a_checkpoint_is_escaped(ckpt, network, arch):
    forge(ckpt, recipe=toml.to_dict(replace(RECIPE, arch=arch)))
    assert_refused(lambda: checkpoint.network(ckpt), "timm")
    assert_refused(lambda: initialize(network, InitConfig(str(ckpt)), "test_resnet", ["a", "b"]), ckpt.name)


@pytest.mark.parametrize("names", [[HOSTILE, "b"], ["\ud800", "b"], ["\udcff", "b"], ["a\0", "b"], ["a", "x" * 99_999]])
def test_class_names_of_a_checkpoint_are_escaped(ckpt, names):
    """Any text can be a class name, so these are read. The errors about other classes quote them escaped."""
    forge(ckpt, classes=names)
    accepted, loaded = outcome(lambda: checkpoint.network(ckpt), ckpt.name)
    if not accepted:
        return
    assert loaded is not None and loaded[2] == names
    assert_refused(lambda: require_classes(loaded[2], "ours", ["a"], "theirs"), "theirs")
    run_fingerprint = {**META, "classes": ["a", "b"]}
    assert_refused(lambda: check_compatible(checkpoint.load(ckpt), run_fingerprint, ()), ckpt.name)


def test_the_recipe_of_a_checkpoint_is_escaped(ckpt):
    recipe = toml.to_dict(RECIPE) | {HOSTILE: 1, "\ud800": {"\ud800": "\ud800"}, "seed": HOSTILE}
    forge(ckpt, recipe=recipe)
    assert_refused(lambda: checkpoint.network(ckpt), ckpt.name)
    assert_refused(lambda: check_compatible(checkpoint.load(ckpt), META, ()), ckpt.name)


@pytest.mark.parametrize("depth", range(100, 1000, 75))
def test_deeply_nested_recipes_are_refused(ckpt, depth):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        nested = json.loads(opening * depth + ("1" if closing == "}" else "") + closing * depth)
        forge(ckpt, recipe=toml.to_dict(RECIPE) | {"epochs": nested})
        assert_refused(lambda: checkpoint.network(ckpt), ckpt.name)
        assert_refused(lambda: check_compatible(checkpoint.load(ckpt), META, ()), ckpt.name)


def header(content: object, tail: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file with this header, which may be invalid."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + tail


def tensor(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TENSORS: dict[str, bytes] = {
    "empty": b"",
    "a pickle": PICKLE,
    "a zip": b"PK\x03\x04" + bytes(60),
    "a header of terabytes": header(b"{}", size=1 << 43),
    "a header of 2^64 - 1 bytes": header(b"{}", size=2**64 - 1),
    "an empty header": header(b""),
    "a header that is a list": header([]),
    "a header too deep": header(nest("[").encode()),
    "a header of hostile text": header(HOSTILE.encode()),
    "a tensor of terabytes": header({"a": tensor(shape=[1 << 40], offsets=[0, 1 << 42])}),
    "a shape that overflows": header({"a": tensor(shape=[1 << 33, 1 << 33])}, bytes(4)),
    "a negative shape": header({"a": tensor(shape=[-1])}, bytes(4)),
    "a shape of texts": header({"a": tensor(shape=["1"])}, bytes(4)),
    "reversed offsets": header({"a": tensor(offsets=[4, 0])}, bytes(4)),
    "overlapping tensors": header({"a": tensor(), "b": tensor()}, bytes(4)),
    "a hostile dtype": header({"a": tensor(dtype=HOSTILE)}, bytes(4)),
    "a hostile name of a number": header({HOSTILE: 5}, bytes(4)),
    "a hostile name with wrong offsets": header({HOSTILE: tensor(offsets=[1, 5])}, bytes(5)),
    "metadata of the wrong type": header({"__metadata__": {"a": 5}}),
    "bytes outside of all tensors": header({"a": tensor()}, bytes(400)),
}


@pytest.mark.parametrize("victim", ["model", "train"])
@pytest.mark.parametrize("content", TENSORS)
def test_invalid_tensor_files_are_refused(ckpt, content, victim):
    forge(ckpt, **{victim: TENSORS[content]})
    assert_refused(lambda: checkpoint.load(ckpt), f"{victim}.safetensors")


def test_tensor_metadata_is_ignored(ckpt, network):
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    forge(ckpt, model=to_safetensors(weights, {"a": HOSTILE, "__reduce__": "os.system", "format": "pickle"}))
    assert outcome(lambda: checkpoint.network(ckpt), ckpt.name)[0]


ONE = torch.zeros(1)
FOREIGN_TENSORS: dict[str, dict[str, torch.Tensor]] = {
    "none": {},
    "a hostile name": {HOSTILE: ONE},
    "unprintable characters": {"\N{REPLACEMENT CHARACTER}\u2029": ONE},
    "an empty name": {"": ONE},
    "dots": {"..": ONE, "backbone.": ONE, ".weight": ONE},
    "a module's attribute": {"__class__": ONE, "backbone.forward": ONE, "_extra_state": ONE},
}


@pytest.mark.parametrize("content", FOREIGN_TENSORS)
def test_tensor_names_of_another_network_are_escaped(ckpt, network, content):
    foreign = FOREIGN_TENSORS[content]
    for tensors in (foreign, {**network.state_dict(), **foreign, "zz\n\x1b[31m": ONE}):
        forge(
            ckpt,
            model=to_safetensors(
                {name: values.clone(memory_format=torch.contiguous_format) for name, values in tensors.items()}
            ),
        )
        saved = checkpoint.load(ckpt)
        assert_refused(partial(checkpoint.restore_model, saved, network), ckpt.name)
        assert_refused(lambda: initialize(network, InitConfig(str(ckpt)), "test_resnet", ["a", "b"]), ckpt.name)


@pytest.mark.parametrize(
    "shape", [(0,), (7,), (1,), (), (2, 2, 2)], ids=["empty", "other", "one", "scalar", "more dimensions"]
)
def test_momentum_of_the_wrong_shape_is_refused(ckpt, network, shape):
    """A single number would be broadcast to all of the parameter."""
    names = [name for name, _ in network.named_parameters()]
    forge(ckpt, train=to_safetensors({f"momentum.{name}": torch.zeros(shape) for name in names}))
    saved = checkpoint.load(ckpt)
    assert_refused(
        lambda: checkpoint.restore(saved, State(network, optim.sgd(network, RECIPE.optim), SCALER)),
        ckpt.name,
    )


@pytest.mark.parametrize(
    "state", [{"scale": 1.0}, {"scale": "x"}, {"scale": HOSTILE, "growth_factor": [], "backoff_factor": None}]
)
def test_an_invalid_scaler_state_is_refused(ckpt, network, state):
    forge(ckpt, scaler=state)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    target = State(network, optim.sgd(network, RECIPE.optim), scaler)
    assert_refused(lambda: checkpoint.restore(checkpoint.load(ckpt), target), ckpt.name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", HOSTILE, "\ud800", "/dev/zero", "/proc/self/mem", "loop/x"])
def test_paths_that_are_not_checkpoints_are_refused(network, name):
    """An untrusted recipe may set init.weights to any path."""
    Path("loop").symlink_to("loop")
    assert_refused(lambda: checkpoint.find(Path(name)), "is no checkpoint")
    assert_refused(lambda: initialize(network, InitConfig(name), "test_resnet", ["a"]), "is no checkpoint")


def test_pruning_does_not_follow_links(ckpt, tmp_path):
    checkpoints = ckpt.parent
    for name in ("step-00000000", ".step-00000000.1.partial"):
        (checkpoints / name).symlink_to(tmp_path / "outside")
    (checkpoints.parent / "best").symlink_to("best")
    checkpoint._prune(checkpoints.parent, 1)  # `sandbox` checks the files outside


def test_a_recipe_is_not_written_through_a_link(tmp_path):
    """An untrusted run folder may have links where a run writes."""
    Path("run").mkdir()
    Path("run", "recipe.toml").symlink_to(tmp_path / "outside" / "victim.txt")
    with suppress(UserError):
        open_run(Path("run"), "auto", "arch = 1")


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    Path("run").mkdir()
    Path("run", ".lock").symlink_to(victim)

    def take() -> None:
        with lock(Path("run")):
            pass

    assert_refused(take, "run")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("content", [HOSTILE.encode(), b"\xff\xff", b"\0" * 100, b""])
def test_the_holder_of_a_lock_is_escaped(content):
    Path("run").mkdir()
    with Path("run", ".lock").open("w+b") as file:
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)

        def take() -> None:
            with lock(Path("run").absolute()):
                pass

        assert_refused(take, "run")


def test_fuzzed_meta_files_are_read_or_refused(ckpt):
    valid = (ckpt / "meta.json").read_bytes()

    def check(content: bytes) -> None:
        (ckpt / "meta.json").write_bytes(content)
        accepted, loaded = outcome(lambda: checkpoint.verify(ckpt), ckpt.name)
        assert not accepted or isinstance(loaded, dict)

    tokens = (b"1e400", b"NaN", b"[[[", b'{"format": 3}', b'\\ud800"', b"9" * 5000)
    fuzz("checkpoint.verify", 200, mutations(valid, tokens=tokens), check)


def test_fuzzed_meta_values_are_read_or_refused(ckpt, network, single_rank, monkeypatch):
    """The hashes are right, so that the content is read."""
    valid = json.loads((ckpt / "meta.json").read_text())
    monkeypatch.setattr(Classifier, "of", lambda recipe, classes: network)  # built once, for speed
    sgd = optim.sgd(network, RECIPE.optim)
    meter = Meter(["loss"], torch.device("cpu"), 1)
    keys = [key for key in valid if key not in ("format", "sha256", "versions", "checksum")]
    recipe_changes = st.tuples(
        st.just("recipe"), st.dictionaries(st.sampled_from([*valid["recipe"], "x"]), any_json)
    ).map(lambda pair: (pair[0], valid["recipe"] | pair[1]))

    def restore() -> None:
        saved = checkpoint.load(ckpt)
        check_compatible(saved, META, ["classes", "data", "seed"])
        checkpoint.restore(saved, State(network, sgd, SCALER))
        meter.restore(saved.meta["meters"], saved.meta["streak"], single_rank)
        assert step_of(saved.meta, 2) >= 0 and all(map(math.isfinite, meter.sums + meter.shares))

    def check(changes: list[tuple[str, Any]]) -> None:
        (ckpt / "meta.json").write_text(json.dumps(valid))
        forge(ckpt, **dict(changes))
        accepted, loaded = outcome(lambda: checkpoint.network(ckpt), ckpt.name)
        if accepted:
            assert loaded is not None and isinstance(loaded[1], Recipe) and all(type(name) is str for name in loaded[2])
        outcome(restore, ckpt.name)
        accepted, line = outcome(lambda: initialize(network, InitConfig(str(ckpt)), "test_resnet", ["a"]), ckpt.name)
        assert not accepted or (line and line.isprintable())

    fuzz("checkpoint.network", 120, st.lists(st.tuples(st.sampled_from(keys), any_json) | recipe_changes, min_size=1,
                                             max_size=2), check)  # fmt: skip


def test_fuzzed_tensor_files_are_read_or_refused(ckpt):
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]
    tensors = {f"t{number}": torch.ones(2, number + 1).to(dtype) for number, dtype in enumerate(dtypes)}
    valid = to_safetensors(tensors, {"a": HOSTILE})
    dtype_names = st.sampled_from(
        ["F32", "F64", "BOOL", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "U64", "x", "I8", ""]
    )
    integers = st.sampled_from([0, 1, 2, 4, 8, -1, 2**32, 2**62, 2**64]) | st.integers(0, 9)
    shapes = st.lists(integers, max_size=3)
    rows = st.builds(tensor, dtype_names, shapes, st.lists(integers, min_size=2, max_size=2)) | any_json
    headers = st.dictionaries(
        st.sampled_from(["a", HOSTILE, "__metadata__", ""]) | st.text(max_size=3), rows, max_size=3
    )
    structured = st.builds(
        lambda content, tail: header(content, bytes(tail)), headers, st.sampled_from([0, 1, 4, 8, 16])
    )

    forge(ckpt, train=valid)

    def check(content: bytes) -> None:
        forge(ckpt, model=content)
        accepted, saved = outcome(lambda: checkpoint.load(ckpt), "model.safetensors")
        if accepted:
            assert saved is not None and all(isinstance(value, torch.Tensor) for value in saved.model.values())

    fuzz("safetensors", 300, structured | mutations(valid), check)


# ---- files of weights to start from


def pth(content: object) -> bytes:
    """A file as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def repacked(content: bytes, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """A zip with every member replaced by change(name, content)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


PTH = pth({"fc.weight": torch.zeros(2, 3)})
WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "a pickle": PICKLE,
    "a pickle in a zip": pth({"a": Bomb()}),
    "a pickle for a tensor": repacked(PTH, lambda name, old: PICKLE if name.endswith("data.pkl") else old),
    "compressed": repacked(PTH, lambda name, old: old, zipfile.ZIP_DEFLATED),
    "a tensor without bytes": repacked(PTH, lambda name, old: b"" if "/data/" in name else old),
    "an empty pickle": repacked(PTH, lambda name, old: b"" if name.endswith("data.pkl") else old),
    "lists in lists": pth(json.loads(nest("[", "]", 400))),
    "a list": pth([1, 2]),
    "a hostile name": pth({HOSTILE: torch.zeros(1)}),
    "a number for a name": pth({5: torch.zeros(1)}),
    "a class": pth(torch.nn.Linear(1, 1)),
    "terabytes": pth({"a": torch.zeros(1).expand(1 << 40)}),
    "a sparse tensor": pth({"a": torch.sparse_coo_tensor(torch.zeros(2, 0), torch.zeros(0), (1 << 30, 1 << 30))}),
    "text for a pickle": repacked(PTH, lambda name, old: HOSTILE.encode() if name.endswith("data.pkl") else old),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("content", WEIGHTS)
def test_invalid_weights_are_refused(network, content, suffix):
    path = Path("hostile" + suffix)
    path.write_bytes(WEIGHTS[content])
    assert_refused(lambda: initialize(network, InitConfig(str(path)), "test_resnet", ["a", "b"]), path.name)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", ["hostile.pth", "hostile.safetensors"])
def test_special_files_for_weights_do_not_block(network, name, special):
    SPECIAL[special](Path(name))
    assert_refused(lambda: initialize(network, InitConfig(name), "test_resnet", ["a", "b"]), name, seconds=2)


def test_fuzzed_weights_are_read_or_refused(network):
    weights = {name: tensor.contiguous() for name, tensor in network.backbone.state_dict().items()}
    valid = pth({name: weights[name] for name in list(weights)[:3]})

    # A valid zip with a mutated pickle: in a mutated zip, the zip's checksums find the damage first.
    pickles = mutations(zipfile.ZipFile(io.BytesIO(valid)).read("archive/data.pkl"), tokens=(b"cos\nsystem\n",))
    zips = pickles.map(lambda new: repacked(valid, lambda name, old: new if name.endswith(".pkl") else old))

    def check(content: bytes) -> None:
        Path("x.pth").write_bytes(content)
        init = InitConfig("x.pth")
        accepted, line = outcome(lambda: initialize(network, init, "test_resnet", ["a", "b"]), "x.pth")
        assert not accepted or (line and line.isprintable())

    fuzz("init_weights.initialize", 200, zips | mutations(valid), check)


# ---- probabilities; evaluation/test_ensemble.py tests damaged bytes


def npy(descr: object = "'<f4'", shape: str = "(1, 2)", data: bytes = b"", order: str = "False") -> bytes:
    """An array file with this header, which may be invalid."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


VALID_ARRAYS = {
    "ids": np.array(["a"]),
    "classes": np.array(["x", "y"]),
    "probs": np.array([[0.5, 0.5]], np.float32),
}


def npz(**members: bytes | np.ndarray) -> bytes:
    """A valid file of probabilities, with these members added or replaced by arrays or by raw bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, member in {**VALID_ARRAYS, **members}.items():
            if isinstance(member, np.ndarray):
                content = io.BytesIO()
                np.save(content, member, allow_pickle=True)
                member = content.getvalue()
            archive.writestr(f"{name}.npy", member)
    return buffer.getvalue()


def nested_zip(entries: int, size: int) -> bytes:
    """A zip whose stored entries each contain all entries after them. Unpacked they are much larger than the file."""
    content, central = bytes(size), b""
    offsets: list[tuple[bytes, int, int, int]] = []  # from the end
    for number in reversed(range(entries)):
        name = f"probs_{number + 1}.npy".encode()
        check = zlib.crc32(content)
        local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0, check, len(content), len(content), len(name), 0)
        offsets.append((name, check, len(content), len(content) + len(local) + len(name)))
        content = local + name + content
    for name, check, length, from_end in offsets:
        fields = (0x02014B50, 20, 20, 0, 0, 0, 0, check, length, length, len(name), 0, 0, 0, 0, 0)
        central += struct.pack("<IHHHHHHIIIHHHHHII", *fields, len(content) - from_end) + name
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, entries, entries, len(central), len(content), 0)
    return content + central + end


@pytest.mark.parametrize(
    "content",
    {
        "an array of pickles": npz(ids=np.array([Bomb()], object)),
        "a pickle for an array": npz(ids=PICKLE),
        "a pickle next to the arrays": npz(extra=np.array([Bomb()], object), ids=np.array([1])),
        "a pickle": PICKLE,
        "terabytes": npz(probs=npy(shape="(1000000000000, 2)")),
        "a shape that overflows": npz(probs=npy(shape="(4611686018427387904, 4)")),
        "a negative shape": npz(probs=npy(shape="(-1, -2)")),
        "texts of gigabytes": npz(ids=npy("'<U1000000000'", "(1,)")),
        "a shape of texts": npz(probs=npy(shape="('a',)")),
        "code as a header": npz(probs=npy("__import__('os').system('touch planted')")),
        "a header too deep": npz(probs=npy("(" * 50 + ")" * 50)),
        "invalid code points": npz(ids=npy("'<U1'", "(1,)", struct.pack("<I", 0x7FFFFFFF))),
        "lone surrogates": npz(ids=npy("'<U1'", "(1,)", struct.pack("<I", 0xD800))),
        "invalid code points in classes": npz(classes=npy("'<U1'", "(2,)", struct.pack("<II", 1 << 30, 1))),
        "structures for texts": npz(ids=np.zeros(1, [("a", "<U4")])),
        "infinities": npz(probs=np.array([[np.inf, 0]], np.float32)),
    }.items(),
    ids=lambda item: item[0],
)
def test_invalid_probabilities_are_refused(content):
    Path("hostile.npz").write_bytes(content[1])
    assert_refused(lambda: predictions.load(Path("hostile.npz")), "hostile.npz")
    outcome(lambda: predictions.check_overwritable(Path("hostile.npz")), "hostile.npz")


def test_a_small_file_of_probabilities_does_not_take_much_memory():
    """Zip entries may overlap, so that many entries share the same bytes."""
    content = nested_zip(200, 1 << 20)
    Path("hostile.npz").write_bytes(content)
    with zipfile.ZipFile("hostile.npz") as archive:
        assert sum(entry.file_size for entry in archive.infolist()) > 150 * len(content), "entries do not overlap"
    tracemalloc.start()
    try:
        assert_refused(lambda: predictions.load(Path("hostile.npz")), "hostile.npz")
        assert tracemalloc.get_traced_memory()[1] < 10 * len(content)
    finally:
        tracemalloc.stop()


def test_names_of_probability_files_are_escaped():
    for name in ("\x1b[31m\n.npz", "\u202e.npz", os.fsdecode(b"\xff.npz")):
        Path(name).write_bytes(npz(ids=np.array([1])))
        assert_refused(partial(predictions.load, Path(name)), printable(name))


def test_fuzzed_arrays_are_read_or_refused():
    """Arrays of any type and shape in a valid zip. Those that are read can be printed, averaged and submitted."""
    descrs = st.sampled_from(["'<f4'", "'<U1'", "'<U3'", "'>U2'", "'<i8'", "'|O'", "'<f8'", "'|V8'", "'|S4'", "'>f4'"])
    shapes = st.sampled_from(["(1, 2)", "(1,)", "(2,)", "()", "(0,)", "(2, 1)", "(1, 2, 1)", "(99999999999,)", "(-1,)"])
    halves = np.array([[0.5, 0.5]], np.float32).tobytes()
    data = st.sampled_from([halves, b"", PICKLE, struct.pack("<II", 0xD800, 97), struct.pack("<II", 27, 10)])
    arrays = st.builds(npy, descrs, shapes, data | st.binary(max_size=16), st.sampled_from(["False", "True", "0"]))
    names = st.sampled_from(["ids", "classes", "probs", "labels", "probs_224", "probs_0", "probs_٣", "../../x"])

    def check(members: dict[str, bytes]) -> None:
        Path("x.npz").write_bytes(npz(**members))
        accepted, loaded = outcome(lambda: predictions.load(Path("x.npz")), "x.npz")
        if accepted:
            assert loaded is not None and loaded.probs.shape == (1, 2) and abs(float(loaded.probs.sum()) - 1) < 0.01
            assert all(printable(name).isprintable() for name in (*loaded.ids.tolist(), *loaded.classes.tolist()))
            submission.write(Path("x.csv"), loaded.ids.tolist(), [0])

    fuzz("predictions.load", 250, st.dictionaries(names, arrays, min_size=1, max_size=3), check)


# ---- submissions and labels


@pytest.mark.parametrize(
    "content",
    {
        "a pickle": PICKLE,
        "not UTF-8": b"Image IDs,Predictions\n\xff,1\n",
        "NUL": "Image IDs,Predictions\n\0,\0\n",
        "a giant field": lambda: 'Image IDs,Predictions\n"' + "x" * 30_000_000,
        "a giant header": lambda: "x" * 30_000_000,
        "a row of many cells": "Image IDs,Predictions\n" + "," * 10_000_000,
        "an unclosed quote": 'Image IDs,Predictions\n"a,1\nb,2\n',
        "a hostile name twice": f'Image IDs,Predictions\n"{HOSTILE}",1\n"{HOSTILE}",1\n',
        "a hostile class": f'Image IDs,Predictions\na,"{HOSTILE}"\n',
        "a class of 5000 digits": "Image IDs,Predictions\na," + "9" * 5000,
        "digits of another script": "Image IDs,Predictions\na,٣\n",
        "a superscript": "Image IDs,Predictions\na,²\n",
        "a class below 0": "Image IDs,Predictions\na,-1\n",
        "a byte order mark": "\ufeffImage IDs,Predictions\na,1\n",
        "another header": f"{HOSTILE},Predictions\na,1\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_invalid_submissions_are_refused(content):
    put(Path("hostile.csv"), content[1])
    assert_refused(lambda: submission.read(Path("hostile.csv"), submission.HEADER), "hostile.csv", memory=GB)


def test_fuzzed_submissions_are_read_or_refused():
    cells = st.sampled_from(["a", "b", "0", "1", "-1", "1e9", "٣", '"', HOSTILE, "\0", "x" * 200_000]) | st.text(
        max_size=5
    )
    rows = st.lists(st.lists(cells, max_size=3).map(",".join), max_size=4)
    ends = st.sampled_from(["\n", "\r\n", "\r"])
    texts = st.builds(lambda rows, end: end.join(["Image IDs,Predictions", *rows]), rows, ends)
    structured = texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    mutated = mutations(b'Image IDs,Predictions\na.jpg,1\n"b ""c"".jpg",22\n', tokens=(b'"', b",", b"\r", b"9" * 20))

    def check(content: bytes) -> None:
        Path("x.csv").write_bytes(content)
        accepted, rows = outcome(lambda: submission.read(Path("x.csv"), submission.HEADER), "x.csv")
        if accepted:
            assert rows is not None and all(type(label) is int and 0 <= label < 10**9 for label in rows.values())
        outcome(lambda: submission.check_overwritable(Path("x.csv")), "x.csv")

    fuzz("submission.read", 300, structured | mutated, check)


# ---- quarantines


def manifest(*rows: tuple[str | bytes, str | bytes]) -> str:
    """A restore.json of rows (path in the quarantine, original path)."""
    hex_rows = [(os.fsencode(to).hex(), os.fsencode(source).hex()) for to, source in rows]
    return json.dumps({"moves": [{"to": "", "from": "", "to_bytes": t, "from_bytes": s} for t, s in hex_rows]})


@pytest.fixture
def quarantine_dir() -> Path:
    """A quarantine of the file set/a/1.png; the folder set/a exists."""
    folder = Path("aside").absolute()
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.png").write_text("image")
    Path("set", "a").mkdir(parents=True)
    (folder / "restore.json").write_text(manifest(("a/1.png", str(Path("set/a/1.png").absolute()))))
    return folder


def test_an_undamaged_quarantine_is_restored(quarantine_dir):
    """The tests of refusals below rely on this."""
    assert quarantine.restore(quarantine_dir, quarantine_dir.absolute().parent) == 1
    assert Path("set/a/1.png").read_text() == "image" and not quarantine_dir.exists()


@pytest.mark.parametrize(
    "row",
    {
        "a path outside": ("../../outside/victim.txt", "set/a/x.png"),
        "a path outside, deeper": ("a/../../../outside/victim.txt", "set/a/x.png"),
        "an absolute path": ("/etc/hostname", "set/a/x.png"),
        "an empty path": ("", "set/whole"),
        "the quarantine itself": (".", "set/whole"),
        "a folder": ("a", "set/whole"),
        "the list itself": ("restore.json", "set/a/x.png"),
        "NUL": ("a/\0.png", "set/a/x.png"),
        "through a link": ("link/victim.txt", "set/a/x.png"),
        "through a link, deeper": ("a/deeper/victim.txt", "set/a/x.png"),
        "NUL in the original path": ("a/1.png", "set/a/\0.png"),
        "a relative original path": ("a/1.png", b"set/a/1.png"),
        "an original path with ..": ("a/1.png", "set/a/../../../outside/1.png"),
        "a hidden original file": ("a/1.png", "set/a/.bashrc"),
        "a hidden original folder": ("a/1.png", "set/.ssh/1.png"),
        "another original name": ("a/1.png", "set/a/other.png"),
    }.items(),
    ids=lambda item: item[0],
)
def test_restore_moves_only_quarantined_files_and_only_to_their_original_paths(quarantine_dir, tmp_path, row):
    """Only visible files in visible folders are ever quarantined, under their path relative to the folder of images."""
    _, (to, source) = row
    (quarantine_dir / "link").symlink_to(tmp_path / "outside")
    (quarantine_dir / "a" / "deeper").symlink_to(tmp_path / "outside")
    absolute = source if isinstance(source, bytes) else os.path.join(os.getcwd(), source)
    (quarantine_dir / "restore.json").write_text(manifest((to, absolute)))
    before = tree(Path())
    assert_refused(lambda: quarantine.restore(quarantine_dir, quarantine_dir.absolute().parent), "aside")
    assert tree(Path()) == before


@pytest.mark.parametrize(
    "content",
    {
        "empty": "",
        "a pickle": PICKLE,
        "lists in lists": nest("["),
        "tables in tables": nest('{"moves":'),
        "a number of 5000 digits": '{"moves": ' + "9" * 5000 + "}",
        "no moves": "{}",
        "moves in a table": '{"moves": {"a": 1}}',
        "moves in a text": '{"moves": "abc"}',
        "moves of lists": '{"moves": [[]]}',
        "moves of the wrong type": '{"moves": [{"to_bytes": 5, "from_bytes": []}]}',
        "moves that are not hexadecimal": '{"moves": [{"to_bytes": "zz", "from_bytes": "zz"}]}',
        "a list": "[]",
        "100 MB of lists": lambda: '{"moves": [' + "[]," * 33_000_000,
    }.items(),
    ids=lambda item: item[0],
)
def test_invalid_restore_lists_are_refused(quarantine_dir, content):
    put((quarantine_dir / "restore.json"), content[1])
    assert_refused(lambda: quarantine.restore(quarantine_dir, quarantine_dir.absolute().parent), "aside", memory=GB)
    assert_refused(lambda: quarantine.quarantine("set", ["a/1.png"], quarantine_dir), "aside", memory=GB)


def test_names_in_a_quarantine_are_escaped(quarantine_dir):
    """A bad file may have any name. The error names it where it cannot be moved back."""
    name = HOSTILE.replace("/", "") + ".png"
    (quarantine_dir / "a" / name).write_text("image")
    occupied = Path("set", "a", name).absolute()
    occupied.write_text("another")
    (quarantine_dir / "restore.json").write_text(manifest((f"a/{name}", str(occupied))))
    assert_refused(lambda: quarantine.restore(quarantine_dir, quarantine_dir.absolute().parent), "aside")
    assert occupied.read_text() == "another"


def test_fuzzed_restore_lists_are_followed_or_refused(tmp_path, monkeypatch):
    """Nothing outside of the quarantine and of the folder of images is moved."""
    base = Path.cwd()
    folder, quarantined = base / "set", base / "aside"
    original_move, moved = quarantine._move, []

    def move(source: str, to: str) -> None:
        moved.append((source, to))
        # Mutated paths may lead anywhere on this machine.
        if os.path.realpath(to).startswith(str(base)) and os.path.realpath(source).startswith(str(base)):
            original_move(source, to)

    monkeypatch.setattr(quarantine, "_move", move)
    inside = ["a/1.png", "a/2.png", "b/1.png", "a/1.png.again"]
    tos = st.sampled_from([*inside, "", ".", "..", "a", "a/", "a//1.png", "./a/1.png", "link/victim.txt", "../x", "\0"])
    froms = st.sampled_from([*(f"{folder}/{path}" for path in inside), f"{folder}/a/../b", f"{base}", "/", "x", "\0"])
    valid = manifest(*((path, f"{folder}/{path}") for path in inside[:3])).encode()
    structured = st.lists(st.tuples(tos, froms), max_size=3).map(lambda rows: manifest(*rows).encode())
    any_moves = any_json.map(lambda moves: json.dumps({"moves": moves}).encode())
    row = st.fixed_dictionaries({"to_bytes": any_json | st.just("612f312e706e67"), "from_bytes": any_json})
    any_rows = st.lists(row, max_size=2).map(lambda rows: json.dumps({"moves": rows}).encode())

    def check(content: bytes) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(quarantined, ignore_errors=True)
        (folder / "a").mkdir(parents=True)
        for path in inside[:3]:
            (quarantined / path).parent.mkdir(parents=True, exist_ok=True)
            (quarantined / path).write_text(path)
        (quarantined / "link").symlink_to(tmp_path / "outside")
        (quarantined / "restore.json").write_bytes(content)
        moved.clear()
        outcome(lambda: quarantine.restore(quarantined, quarantined.absolute().parent), "aside")
        for source, to in moved:
            path = os.path.relpath(source, quarantined)
            assert path in inside and os.path.normpath(to) == to and to.endswith("/" + path.removesuffix(".again")), to

    fuzz("quarantine.restore", 200, structured | mutations(valid) | any_moves | any_rows, check)


# ---- sets of images that are copied or linked

STAMP = {"fasttrain_cut": 1, "seed": 0}
OTHER_STAMPS = {
    "a pickle": PICKLE,
    "lists in lists": nest("[").encode(),
    "tables in tables": nest('{"a":').encode(),
    "a number of 5000 digits": b"9" * 5000,
    "another format": b'{"fasttrain_cut": 2}',
    "not UTF-8": b"\xff",
}


@pytest.mark.parametrize("content", OTHER_STAMPS)
@pytest.mark.parametrize("folder", ["out", "out.partial"])
def test_a_set_with_another_stamp_is_refused(folder, content):
    Path(folder).mkdir()
    Path(folder, "cut.json").write_bytes(OTHER_STAMPS[content])
    Path(folder, "another").write_text("years of work")
    assert_refused(lambda: place_files.is_finished(Path("out"), "cut.json", STAMP), "out")
    with limits():
        assert read_json_object(Path(folder, "cut.json")) != STAMP


def test_fuzzed_stamps_are_recognized_or_refused():
    Path("out").mkdir()

    def check(content: bytes) -> None:
        Path("out", "cut.json").write_bytes(content)
        accepted, finished = outcome(lambda: place_files.is_finished(Path("out"), "cut.json", STAMP), "out")
        assert not accepted or (finished is True and json.loads(content) == STAMP)

    texts = any_json.map(lambda value: json.dumps(value).encode())
    mutated = mutations(json.dumps(STAMP).encode(), tokens=(b"[" * 5000, b"1e400"))
    fuzz("place_files.is_finished", 150, texts | mutated, check)


@pytest.mark.parametrize("link", ["cut.json.part", "cut.json", "train", "train/a", "."])
def test_a_set_is_not_placed_through_links(tmp_path, train_index, link):
    """A partial folder may contain links to other folders."""
    outside, partial = tmp_path / "outside", Path("out.partial")
    if link == ".":
        partial.symlink_to(outside)
    else:
        (partial / link).parent.mkdir(parents=True)
        (partial / link).symlink_to(outside / "victim.txt" if "json" in link else outside)
    sources = {f"train/{id_}": path for id_, path in zip(train_index.ids, train_index.paths, strict=True)}
    outcome(lambda: place_files.place(Path("out"), sources, {}, "cut.json", STAMP, link=False, progress=False), "out")
    assert not Path("out").is_symlink()


def test_names_of_missing_sources_are_escaped():
    sources = {f"train/{number}": f"/nowhere/{HOSTILE}{number}" for number in range(5)}
    assert_refused(
        lambda: place_files.place(Path("out"), sources, {}, "cut.json", STAMP, link=False, progress=False),
        "out.missing.txt",
    )


# ---- images and the cache of their sizes


def encode_image(kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (17, 16), (200, 100, 50)).save(content, kind, **options)
    return content.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with this header, which may be invalid, and with chunks before its empty data."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", size), *chunks, (b"IDAT", b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def tiff(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A TIFF of one directory of entries (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", following)


HOSTILE_IMAGES = {
    "empty": b"",
    "a pickle": PICKLE,
    "a script": b"#!/bin/sh\ntouch planted\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 5\n%%EndComments\n(planted) (w) file\n",
    "PNG of width 0": png(0, 5),
    "PNG of height 0": png(7, 0),
    "PNG of 2^31 - 1 pixels a side": png(2**31 - 1, 2**31 - 1),
    "PNG of 2^32 - 1 pixels in a row": png(2**32 - 1, 1),
    "PNG that unpacks to 1 GB": png(7, 5, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)) * 1)),
    "PNG with a chunk of 4 GB": b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xffIHDR",
    "GIF of 65535 pixels a side": b"GIF89a\xff\xff\xff\xff\0\0\0;",
    "BMP of negative size": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, -7, -5, 1, 24, 0, 0, 0, 0, 0, 0),
    "BMP of 2^31 rows": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    "TIFF of 2^32 - 1 pixels": tiff((256, 4, 1, 2**32 - 1), (257, 4, 1, 1)),
    "TIFF whose directory links to itself": tiff((256, 4, 1, 7), (257, 4, 1, 5), following=8),
    "TIFF of terabytes": tiff((256, 4, 1, 7), (257, 4, 1, 5), (273, 4, 2**32 - 1, 8)),
    "TIFF with a text as width": tiff((256, 2, 4, 7), (257, 4, 1, 5)),
    "TIFF with a text as orientation": tiff((256, 4, 1, 7), (257, 4, 1, 5), (274, 2, 4, 0x41414141)),
}


def folder_of(content: bytes, name: str = "1.png") -> Path:
    """A folder of classes in which the file a/NAME has this content."""
    folder = Path("images")
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / "0.png").write_bytes(VALID_PNG)
    (folder / "a" / name).write_bytes(content)
    return folder


VALID_PNG = encode_image("PNG")


def scan_both_ways(folder: Path, name: str) -> None:
    """Check that a file has a size that training can use, or is refused by name; with keep_unreadable it has size 0."""
    accepted, index = outcome(lambda: dataset.scan(folder, progress=False, keep_unreadable=True), name)
    assert accepted and index is not None and index.sizes.dtype == np.int32
    size = index.sizes[index.ids.index(f"a/{name}")]
    assert (size == 0).all() or (size > 0).all(), size
    accepted, index = outcome(lambda: dataset.scan(folder, progress=False), printable(name))
    assert accepted == bool(size[0])
    assert index is None or (index.sizes > 0).all()


@pytest.mark.parametrize("content", HOSTILE_IMAGES)
def test_hostile_images_have_a_size_or_none(content):
    scan_both_ways(folder_of(HOSTILE_IMAGES[content]), "1.png")


def test_fuzzed_images_have_a_size_or_none():
    samples = [VALID_PNG, *map(encode_image, ("JPEG", "BMP", "TIFF", "WEBP", "GIF"))]
    samples += [encode_image("TIFF", big_tiff=True), *map(encode_image, ("PPM", "JPEG2000"))]
    samples += [encode_image("ICO", sizes=[(16, 16)])]
    samples += [HOSTILE_IMAGES["PostScript"], HOSTILE_IMAGES["TIFF with a text as orientation"]]

    def check(content: bytes) -> None:
        path = Path("1.png").absolute()
        path.write_bytes(content)
        accepted, header = outcome(lambda: read_header(str(path)), "")
        assert accepted and header is not None
        assert header[:2] == (0, 0) if header.problem else min(header[:2]) > 0

    fuzz("headers.read_header", 400, mutations(*samples, tokens=(b"\xff\xff\xff\xff", b"\0\0\0\0")), check)


def test_names_of_classes_and_images_are_escaped(tmp_path):
    name = HOSTILE.replace("/", "")
    folder = folder_of(b"no image", f"{name}.png")
    scan_both_ways(folder, f"{name}.png")
    (folder / name).mkdir()
    assert_refused(lambda: dataset.scan(folder, progress=False), printable(name))
    (folder / name).rmdir()
    (folder / name).symlink_to(tmp_path / "outside")
    (folder / os.fsdecode(b"\xff\n")).mkdir()
    assert_refused(lambda: dataset.scan(folder, progress=False), printable(os.fsdecode(b"\xff\n")))


def test_links_pipes_and_devices_among_images_are_skipped(tmp_path):
    folder = folder_of(VALID_PNG)
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "zero.png").symlink_to("/dev/zero")
    (folder / "a" / "out.png").symlink_to(tmp_path / "outside" / "victim.txt")
    (folder / "a" / "loop.png").symlink_to("loop.png")
    (folder / "c").symlink_to("/")
    (folder / "d").symlink_to("d")
    os.mkfifo(folder / "e")
    for read in (dataset.scan, dataset.scan_unlabeled):
        accepted, index = outcome(partial(read, folder, progress=False), "")
        assert accepted and index is not None and index.ids == ("a/0.png", "a/1.png", "b/0.png")
    accepted, _ = outcome(lambda: make(folder, 1, 0, Path("small"), progress=False), "")
    assert accepted and all(
        path.is_dir() or path.name in ("0.png", "1.png", "cut.json") for path in Path("small").rglob("*")
    )


CACHES = {
    "empty": b"",
    "pickles": npy("'|O'", "(2, 2)", PICKLE),
    "a pickle": PICKLE,
    "terabytes": npy("'<i4'", "(1000000000000, 2)"),
    "a shape that overflows": npy("'<i4'", "(4611686018427387904, 4)"),
    "code": npy("__import__('os').system('touch planted')"),
    "unclosed": npy("'<i4", "((("),
    "too deep": npy("(" * 40, "(2, 2)"),
    "a text": b"\x93NUMPY\x01\x00" + struct.pack("<H", 4) + b"'a'\n",
    "a shape of texts": npy("'<i4'", "('2', 2)"),
    "a structured type": npy("[('a', '<i4', (999999999,))]", "(2, 2)"),
    "a negative size": npy("'<i4'", "(2, 2)", struct.pack("<4i", -1, 5, 7, 5)),
    "a width of 0": npy("'<i4'", "(2, 2)", struct.pack("<4i", 5, 0, 7, 5)),
    "another count": npy("'<i4'", "(3, 2)", bytes(24)),
    "another type": npy("'<i8'", "(2, 2)", bytes(32)),
}


@pytest.mark.parametrize("content", CACHES)
def test_invalid_caches_are_ignored(content):
    Path("x.npy").write_bytes(CACHES[content])
    accepted, sizes = outcome(lambda: dataset._load_sizes(Path("x.npy"), 2), "")
    assert accepted and sizes is None


def test_fuzzed_caches_are_read_or_ignored():
    valid = npy("'<i4'", "(2, 2)", struct.pack("<4i", 5, 7, 0, 0))
    descrs = st.sampled_from(
        ["'<i4'", "'>i4'", "'|O'", "'<U9'", "[]", "[('a', '<i4')]", "None", "'<i4", "()", "(1, 2)"]
    )
    shapes = st.sampled_from(
        ["(2, 2)", "(-2, 2)", "(2,)", "2", "(2, 2, 1)", "(9999999999, 2)", "('a',)", "((2,),)", "("]
    )
    orders = st.sampled_from(["True", "False", "1", "[]"])
    structured = st.builds(npy, descrs, shapes, st.binary(max_size=20), orders)

    def check(content: bytes) -> None:
        Path("x.npy").write_bytes(content)
        accepted, sizes = outcome(lambda: dataset._load_sizes(Path("x.npy"), 2), "")
        assert accepted
        if sizes is not None:
            assert sizes.shape == (2, 2) and sizes.dtype == np.int32
            assert all((row == 0).all() or (row > 0).all() for row in sizes), sizes

    fuzz("dataset._load_sizes", 300, structured | mutations(valid, tokens=(b"(", b"9" * 20, b"'")), check)


# ---- printable text


@pytest.mark.parametrize("name", [*TEXTS, "\U0010ffff", "\udfff\udc80", "a\ud800\udc00b"], ids=ascii)
def test_any_text_becomes_printable(name):
    assert printable(name).isprintable()
    assert printable(Path(name)).isprintable()


def test_missing_data_folders_of_a_recipe_are_escaped():
    for name in (HOSTILE, "a\0b", "x" * 5000, "\ud800"):
        assert_refused(partial(open_data, DataConfig(train=(name,))), printable(name))


def test_fuzzed_packs_are_read_or_refused(tmp_path):
    """What is read has content for each image."""
    images = folder_of(encode_image("PNG"))
    samples = []
    for kind in ("same", "raw"):
        path = tmp_path / f"{kind}.safetensors"
        encoding = pack.Encoding(kind)
        pack.make(open_splits(str(images)), path, encoding, workers=1, progress=False, say=lambda line: None)
        samples.append(path.read_bytes())

    def check(content: bytes) -> None:
        path = Path("1.safetensors").absolute()
        path.write_bytes(content)
        accepted, indices = outcome(lambda: open_pack(path), path.name)
        for index in (indices or {}).values() if accepted else ():
            for number in range(len(index)):
                expected = (*index.sizes[number].tolist(), 3) if not index.encoded else None
                assert index.store is not None
                assert expected in (None, index.store.content(number).shape)

    fuzz("open_pack", 400, mutations(*samples, tokens=(b"9" * 20, b"-1", b"null", b'"', b"{", b"[")), check)
