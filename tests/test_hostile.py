"""Files from strangers: whatever their bytes, each reader gives a valid value, or one printable line that names the
file. Nothing in them is executed, nothing outside is touched, and neither time nor memory runs out."""

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
from fasttrain.data import index as dataset
from fasttrain.data import place_files, quarantine
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

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what PIL, numpy and torch say of such files

GB = 1 << 30
# Texts that do something to a terminal, a shell, a path or a decoder that trusts them.
EVIL = "\x1b[2J\n\u202e\x9b31m$(touch planted);`touch planted`"
TEXTS = ["", EVIL, "\0", "\ud800", "\udcff", "../../outside/victim.txt", "/", ".", "5", "nan", "\u2028", "a" * 5000]
NUMBERS = [-1, 0, 1, 2, 2**31, 2**63, 10**30, -0.5, 0.5, 1.5, 1e308, math.inf, -math.inf, math.nan]


class _Hangs(BaseException):
    """Not an Exception: readers may catch those."""


@contextmanager
def limits(seconds: float = 20, memory: int = 4 * GB) -> Iterator[None]:
    """Fails where the block needs more time; more address space is a MemoryError in it."""

    def hangs(*_: object) -> None:
        raise _Hangs

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, hangs)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    try:
        yield
    except _Hangs:
        pytest.fail(f"not done within {seconds} s")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def outcome(read: Callable[[], T], name: str, **limited: Any) -> tuple[bool, T | None]:
    """Whether a reader takes a file, and what it then gives. Fails where it ends in any way but these two."""
    try:
        with limits(**limited):
            return True, read()
    except CommandError as error:
        assert str(error).isprintable() and str(error), f"not one printable line: {str(error)!r}"
        assert name in str(error), f"does not name {name!r}: {error}"
        return False, None


def refused(read: Callable[[], object], name: str, **limited: Any) -> None:
    took, value = outcome(read, name, **limited)
    assert not took, f"taken as {value!r}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, capfd):
    """Each test runs in a folder of its own. What lies outside stays as it was, and no payload has run."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "victim.txt").write_text("years of work")
    monkeypatch.chdir(inside)
    yield
    assert not list(tmp_path.rglob("planted*")), "a payload was executed"
    assert tree(outside) == {"victim.txt"} and (outside / "victim.txt").read_text() == "years of work"
    told = "".join(capfd.readouterr())
    print(told, end="")
    assert all(c.isprintable() or c in "\r\n" for c in told), f"unescaped on the terminal: {told!r}"


def tree(folder: Path) -> set[str]:
    return {str(each.relative_to(folder)) for each in folder.rglob("*")}


class Bomb:
    """Creates a file where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, ("touch planted",)


PICKLE = pickle.dumps(Bomb())


# ---- inputs


def put(path: Path, content: "str | bytes | Callable[[], str | bytes]") -> None:
    """Write a file. Contents that are large are functions, called only where they are needed."""
    made = content() if callable(content) else content
    path.write_bytes(made if isinstance(made, bytes) else made.encode("utf-8", "surrogatepass"))


def deep(opening: str, closing: str = "", depth: int = 100_000) -> str:
    return opening * depth + closing * depth


# Anything that JSON can say, with what readers trip over more often than chance would.
anything = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS) | st.text(max_size=4), inner,
                                                               max_size=3),
    max_leaves=6,
)  # fmt: skip


def mutations(*samples: bytes, tokens: tuple[bytes, ...] = ()) -> st.SearchStrategy[bytes]:
    """One of the samples with bits flipped, cut short, spliced with another, or with a token put in."""
    spare = (*tokens, b"\0", b"\xff\xfe", b"\x1b[2J", "\u202e".encode(), b"\n", PICKLE)

    def mutate(seed: int) -> bytes:
        draw = random.Random(seed)
        content = bytearray(draw.choice(samples))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(content) + 1)
            kind = draw.choice(["flip", "byte", "cut", "splice", "token", "drop"])
            if kind == "flip" and at < len(content):
                content[at] ^= 1 << draw.randrange(8)
            elif kind == "byte" and at < len(content):
                content[at] = draw.randrange(256)
            elif kind == "cut" and draw.random() < 0.5:
                del content[at:]
            elif kind == "splice":
                other = draw.choice(samples)
                start = draw.randrange(len(other) + 1)
                content[at : at + draw.randrange(64)] = other[start : start + draw.randrange(64)]
            elif kind == "token":
                content[at : at + draw.choice([0, 0, 1, 8])] = draw.choice(spare)
            elif kind == "drop":
                del content[at : at + draw.randrange(16)]
        return bytes(content)

    return st.integers(0, 2**48).map(mutate)


def fuzz(reader: str, count: int, inputs: st.SearchStrategy[T], check: Callable[[T], object]) -> None:
    """Put so many inputs through a check; the same ones each time."""
    seen = 0

    @settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def each(value: T) -> None:
        nonlocal seen
        seen += 1
        check(value)

    each()
    print(f"{reader}: {seen} inputs")
    assert seen >= count


# ---- what is no file

SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "link-to-dev-zero": lambda path: path.symlink_to("/dev/zero"),
    "link-to-itself": lambda path: path.symlink_to(path.name),
    "broken-link": lambda path: path.symlink_to("nowhere"),
}
# Each reader, with the name of the file that it reads and whether it has to refuse (others do without).
READERS: dict[str, tuple[str, Callable[[Path], object], bool]] = {
    "recipe": ("x.toml", lambda path: recipes.by_name(str(path)), True),
    "predictions": ("x.npz", predictions.load, True),
    "predictions to write over": ("x.npz", predictions.check_overwritable, False),
    "submission": ("x.csv", lambda path: submission.read(path, submission.HEADER), True),
    "submission to write over": ("x.csv", submission.check_overwritable, False),
    "checkpoint": ("meta.json", lambda path: checkpoint.load(path.parent), True),
    "checkpoint's meta.json": ("meta.json", lambda path: checkpoint.verify(path.parent), True),
    "checkpoint, archived or not": ("meta.json", lambda path: meta.holds(path.parent, "archived", True), False),
    "quarantine": ("restore.json", lambda path: quarantine.restore(path.parent, path.parent.parent), True),
    "quarantine to add to": ("restore.json", lambda path: quarantine.quarantine("/nowhere", ["a"], path.parent), True),
    "set": ("cut.json", lambda path: place_files.finished(path.parent, "cut.json", {"fasttrain_cut": 1}), True),
    "demo set": ("demo.json", read_json_object, False),
    "list of missing files": (
        "set.missing.txt",
        lambda path: place_files._refuse_missing(path, {"/nowhere": None}),
        True,
    ),
    "index cache": ("x.npy", lambda path: dataset._load_sizes(path, 2), False),
}


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_not_waited_for(reader, special):
    name, read, must_refuse = READERS[reader]
    path = Path("its folder", name).absolute()
    path.parent.mkdir()
    SPECIAL[special](path)
    names = name if reader not in ("checkpoint", "quarantine to add to", "set") else "its folder"
    if reader == "list of missing files" and special == "broken-link":
        must_refuse = True
    took, value = outcome(lambda: read(path), names, seconds=2)
    assert not (took and must_refuse), f"taken as {value!r}"
    assert not (path.parent / "nowhere").exists(), "written through a link"


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", ["model.safetensors", "train.safetensors"])
def test_tensors_that_are_no_files_are_not_waited_for(whole, name, special):
    (whole / name).unlink()
    SPECIAL[special](whole / name)
    refused(lambda: checkpoint.verify(whole), name, seconds=2)


@pytest.mark.parametrize("special", SPECIAL)
def test_a_run_whose_link_to_the_last_checkpoint_is_none_still_has_its_newest(special, whole):
    SPECIAL[special](whole.parent.parent / "last")
    took, found = outcome(lambda: newest(whole.parent.parent), "")
    assert took and found is not None and found.name == whole.name


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
QUOTED = json.dumps(EVIL, ensure_ascii=True)


def dotted(table: dict[str, Any], prefix: str = "") -> list[str]:
    keys = [
        dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key] for key, value in table.items()
    ]
    return [each for some in keys for each in some]


KEYS = dotted(toml.to_dict(RECIPE))


@pytest.mark.parametrize(
    "content",
    {
        "empty": "",
        "not UTF-8": b"\xff\xfea\0r\0",
        "a pickle": PICKLE,
        "NUL": "arch = 'a\0b'",
        "lists in lists": "arch = " + deep("[", "]"),
        "lists in lists, just too deep": "arch = " + deep("[", "]", 800),
        "tables in tables": "arch = " + deep("{a=", "}"),
        "a key of many parts": "a." * 100_000 + "a = 1",
        "a table of many parts": "[" + "a." * 100_000 + "a]",
        "10 MB of keys": lambda: "\n".join(f"k{number} = 1" for number in range(700_000)),
        "a whole number of 5000 digits": HEAD + "epochs = " + "9" * 5000,
        "a hexadecimal of 5000 digits": HEAD + "epochs = 0x" + "f" * 5000,
        "a hexadecimal where a text belongs": "arch = 0x" + "f" * 5000,
        "a hexadecimal of 5000 digits in a list": HEAD + "data.train = [0x" + "f" * 5000 + "]",
        "a hexadecimal where a number belongs": HEAD + "optim.lr = 0x" + "f" * 5000,
        "a whole number beyond floats": HEAD + "optim.lr = 1" + "0" * 400,
        "a whole number beyond floats in a loss": HEAD + "losses.cross_entropy.weight = 1" + "0" * 400,
        "1e400": HEAD + "optim.lr = 1e400",
        "nan": HEAD + "optim.momentum = nan",
        "a duplicate key": HEAD + HEAD,
        "a date": HEAD + "epochs = 2020-01-01",
        "a date that is none": HEAD + "epochs = 2020-13-77",
        "true for a number": HEAD + "epochs = true",
        "a list for a table": HEAD + "optim = [1]",
        "a table of losses that is a list": HEAD + "losses = [1]",
        "a loss that is a number": HEAD + "losses.cross_entropy = 1",
        "an evil key": HEAD + QUOTED + " = 1",
        "an evil loss": HEAD + f"losses.{QUOTED}.weight = 1",
        "an evil value": HEAD + f"epochs = {QUOTED}",
        "an evil policy": HEAD + f"augment.autoaugment = {QUOTED}",
        "a key of a class": HEAD + "__class__ = 1",
        "a key of a loss's class": HEAD + "losses.cross_entropy.fine_tunes = true",
        "an unclosed text": 'arch = """' + "x" * 1_000_000,
        "a control character": f"arch = '{EVIL}'",
    }.items(),
    ids=lambda item: item[0],
)
def test_recipes_that_are_none_are_refused(content):
    put(Path("evil.toml"), content[1])
    refused(lambda: recipes.by_name("evil.toml"), "evil.toml")


@pytest.mark.parametrize("name", ["../../outside/run", "/abs", "..", ".", "a/../../b", "a\0b", EVIL])
def test_a_recipes_name_leads_to_no_folder_outside(name):
    """The run's folder is runs/<name> where no other is given."""
    Path("evil.toml").write_text(f"{HEAD}name = {json.dumps(name)}\n")
    refused(lambda: recipes.by_name("evil.toml"), "evil.toml")


@pytest.mark.parametrize("name", [f"{EVIL.replace('/', '')}.toml", "a\0b.toml", "x" * 5000 + ".toml"])
def test_names_of_recipes_are_escaped(name):
    refused(lambda: recipes.by_name(name), printable(name))
    with suppress(OSError, ValueError):  # those that a file cannot have
        Path(name).write_text("arch = 1")
        refused(lambda: recipes.by_name(name), printable(name))


def test_a_recipe_is_shown_escaped():
    """`fasttrain recipes FILE.toml` prints a stranger's texts."""
    Path("evil.toml").write_text(f"{HEAD}data.val = {json.dumps(EVIL)}\n")
    said = CliRunner().invoke(main, ["recipes", "evil.toml"])
    assert said.exit_code == 0 and all(c.isprintable() or c == "\n" for c in said.output)
    assert toml.from_toml(said.output).data.val == EVIL


@pytest.mark.parametrize(
    "setting",
    [
        "epochs=" + "9" * 5000,
        "epochs=0x" + "f" * 5000,
        "optim.lr=1" + "0" * 400,
        "epochs=" + deep("["),
        "a." * 50_000 + "a=1",
        "epochs=" + "{" + "a." * 50_000 + "a=1}",
        EVIL,
        f"epochs={EVIL}",
        f"{EVIL}=1",
        f"optim.{EVIL}=1",
        "=",
        "epochs",
        "name.x=1",
        "losses=1",
    ],
    ids=lambda setting: ascii(setting[:20]),
)
def test_settings_that_are_none_are_refused(setting):
    refused(lambda: toml.override(RECIPE, setting), "--set")


def test_any_recipe_is_read_or_refused():
    tree, texts = (
        toml.to_dict(RECIPE),
        [toml.to_toml(each).encode() for each in (RECIPE, *recipes.RECIPES.values())],
    )
    literals = st.sampled_from(
        ["1", "-1", "true", "nan", "-inf", "1e400", "[]", "{}", "[1, 2]", '["a"]', "''", QUOTED, "0x" + "f" * 300,
         "1" + "0" * 400, "9" * 5000, "2020-01-01", "{weight = 1}", "{cross_entropy = {}}", '"imagenet"', "0.5"]
    )  # fmt: skip
    named = [*KEYS, *tree, "losses.triplet", "losses.arcface.scale", "losses", QUOTED, "__init__", "optim.lr.x"]
    structured = st.lists(st.tuples(st.sampled_from(named), literals), max_size=3).map(
        lambda rows: "".join(f"{key} = {value}\n" for key, value in [("arch", '"test_resnet"'), *rows]).encode()
    )

    def check(content: bytes) -> None:
        Path("x.toml").write_bytes(content)
        took, recipe = outcome(lambda: recipes.by_name("x.toml"), "x.toml")
        if took:
            assert recipe is not None and toml.from_toml(toml.to_toml(recipe)) == recipe and recipe.peak_lr > 0

    fuzz("recipes.by_name", 300, structured | mutations(*texts, tokens=(b"0x" + b"f" * 300, b"[", b"1e400")), check)


def test_any_setting_is_taken_or_refused():
    keys = st.sampled_from([*KEYS, "optim", "losses", "no.such", "", EVIL]) | st.text(max_size=5)
    values = st.sampled_from(["1", "0.5", "nan", "[1]", "{}", "9" * 5000, "0x" + "f" * 5000, "[" * 2000, "'a'", EVIL])
    texts = st.tuples(keys, st.sampled_from(["=", " = ", ""]), values | st.text(max_size=9)).map("".join)

    def check(setting: str) -> None:
        took, recipe = outcome(lambda: toml.override(RECIPE, setting), "--set")
        if took:
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
def written(network, tmp_path_factory) -> Path:
    """A run's folder with one checkpoint, as fasttrain writes it, but for `last` and `best`."""
    out = tmp_path_factory.mktemp("written") / "run"
    snapshot = checkpoint.Snapshot().take(State(network, optim.sgd(network, RECIPE.optim), SCALER))
    checkpoint.save(out, 1, snapshot, improved=True, keep=1, meta=META)
    (out / "last").unlink()
    (out / "best").unlink()
    return out


@pytest.fixture
def whole(written) -> Path:
    """That checkpoint, to be damaged."""
    return shutil.copytree(written, Path("run").absolute()) / "checkpoints" / "step-00000001"


def forge(path: Path, model: bytes | None = None, train: bytes | None = None, **changes: Any) -> None:
    """Change a checkpoint and make its hashes right again, as whoever damages it on purpose would."""
    meta = json.loads((path / "meta.json").read_text())
    for name, content in (("model.safetensors", model), ("train.safetensors", train)):
        if content is not None:
            (path / name).write_bytes(content)
            meta["sha256"][name] = sha256(content).hexdigest()
    meta |= changes
    meta = {key: each for key, each in meta.items() if each is not ... and key != "checksum"}
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
        "lists in lists": deep("["),
        "tables in tables": deep('{"a":'),
        "a number of 5000 digits": '{"format": ' + "9" * 5000 + "}",
        "a format of texts": json.dumps({"format": EVIL, "sha256": {"model.safetensors": "", "train.safetensors": ""}}),
        "hashes in a list": '{"format": 3, "sha256": []}',
        "a hash that is a number": '{"format": 3, "sha256": {"model.safetensors": 1, "train.safetensors": 1}}',
        "a hash that is a list": '{"format": 3, "sha256": {"model.safetensors": [], "train.safetensors": {}}}',
        "100 MB of lists": lambda: '{"a": [' + "[]," * 33_000_000,
        "100 MB of nothing": lambda: b" " * 100_000_000,
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.verify], ids=["load", "verify"])
def test_a_meta_file_that_is_none_is_refused(whole, read, content):
    put((whole / "meta.json"), content[1])
    refused(lambda: read(whole), whole.name, memory=GB)
    with limits(memory=GB):
        assert meta.holds(whole, "archived", True) is False


# Values that a key of meta.json must not have.
WRONG: dict[str, list[Any]] = {
    "step": ["5", -1, 1.5, True, None, [], {}, math.inf, math.nan, EVIL, ...],
    "recipe": ["x", 5, None, [], ["a"], {}, {"arch": 5}, {"arch": EVIL}, {"arch": "../../x"}, {EVIL: 1}, [[1, 2]], ...],
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
WRONG_PAIRS = [(key, value) for key, values in WRONG.items() for value in values]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dataset.Index:
    folder = tmp_path_factory.mktemp("images")
    for number in range(8):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "ab"[number % 2] / f"{number}.png")
    return dataset.scan(folder, progress=False)


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    with ranks("cpu") as one:
        yield one


@pytest.fixture
def resume(whole, images, alone, network, monkeypatch) -> Callable[[], object]:
    """Go on from the checkpoint, as `run` does."""
    settled = resolve_auto(RECIPE, torch.device("cpu"))
    forge(whole, recipe=toml.to_dict(settled), data=images.fingerprint(), sizes=images.fingerprint_of_sizes())
    monkeypatch.setattr(Classifier, "of", lambda recipe, classes: network)  # built once, for speed
    monkeypatch.setattr(prepare, "check_input_shape", lambda *_: None)
    return lambda: training.train(settled, whole.parent.parent, images, None, alone, whole)


def test_a_checkpoint_that_is_whole_is_gone_on_from(whole, resume):
    """Without which the refusals below would tell nothing."""
    assert outcome(resume, "")[0]
    assert checkpoint.network(whole)[2] == ["a", "b"]


@pytest.mark.parametrize(
    ("key", "value"), WRONG_PAIRS, ids=[f"{key}={ascii(value)[:30]}" for key, value in WRONG_PAIRS]
)
def test_a_run_does_not_go_on_from_values_of_other_kinds(whole, resume, key, value):
    forge(whole, **{key: value})
    refused(resume, whole.name)


NEEDED = [(key, value) for key, value in WRONG_PAIRS if key in ("recipe", "classes")]


@pytest.mark.parametrize(("key", "value"), NEEDED, ids=[f"{key}={ascii(value)[:30]}" for key, value in NEEDED])
def test_a_network_is_not_made_from_values_of_other_kinds(whole, network, key, value):
    forge(whole, **{key: value})
    unnamed = isinstance(value, dict) and value.get("arch") in (EVIL, "../../x")
    refused(lambda: checkpoint.network(whole), "timm" if unnamed else whole.name)
    if not unnamed:
        refused(lambda: initialize(network, InitConfig(str(whole)), "test_resnet", ["a", "b"]), whole.name)


def test_no_network_is_made_that_is_larger_than_its_file(whole):
    """A class name takes some bytes and its weights thousands."""
    big = toml.to_dict(replace(RECIPE, arch="resnet50"))
    forge(whole, recipe=big, classes=[f"{number:06}" for number in range(400_000)])
    refused(lambda: checkpoint.network(whole), whole.name, memory=GB)


@pytest.mark.parametrize("arch", ["test_resnet." + EVIL, EVIL, "local-dir:/", "hf-hub:a/b", "\ud800", "a\0b"])
def test_a_checkpoints_network_is_shown_escaped(whole, network, arch):
    forge(whole, recipe=toml.to_dict(replace(RECIPE, arch=arch)))
    refused(lambda: checkpoint.network(whole), "timm")
    refused(lambda: initialize(network, InitConfig(str(whole)), "test_resnet", ["a", "b"]), whole.name)


@pytest.mark.parametrize("names", [[EVIL, "b"], ["\ud800", "b"], ["\udcff", "b"], ["a\0", "b"], ["a", "x" * 99_999]])
def test_evil_names_of_classes_are_shown_escaped(whole, names):
    """Any texts can be names of classes, so these are read, and told apart from a folder's."""
    forge(whole, classes=names)
    took, found = outcome(lambda: checkpoint.network(whole), whole.name)
    if not took:
        return
    assert found is not None and found[2] == names
    refused(lambda: dataset.require_classes(found[2], "ours", ["a"], "theirs"), "theirs")
    run_fingerprint = {**META, "classes": ["a", "b"]}
    refused(lambda: check_compatible(checkpoint.load(whole), run_fingerprint, ()), whole.name)


def test_a_recipe_of_a_checkpoint_is_shown_escaped(whole):
    recipe = toml.to_dict(RECIPE) | {EVIL: 1, "\ud800": {"\ud800": "\ud800"}, "seed": EVIL}
    forge(whole, recipe=recipe)
    refused(lambda: checkpoint.network(whole), whole.name)
    refused(lambda: check_compatible(checkpoint.load(whole), META, ()), whole.name)


@pytest.mark.parametrize("depth", range(100, 1000, 75))
def test_recipes_as_deep_as_json_allows_are_refused(whole, depth):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        nested = json.loads(opening * depth + ("1" if closing == "}" else "") + closing * depth)
        forge(whole, recipe=toml.to_dict(RECIPE) | {"epochs": nested})
        refused(lambda: checkpoint.network(whole), whole.name)
        refused(lambda: check_compatible(checkpoint.load(whole), META, ()), whole.name)


def header(content: object, tail: bytes = b"", size: int | None = None) -> bytes:
    """A safetensors file of any header."""
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
    "a header of nothing": header(b""),
    "a header that is a list": header([]),
    "a header too deep": header(deep("[").encode()),
    "a header of evil text": header(EVIL.encode()),
    "a tensor of terabytes": header({"a": tensor(shape=[1 << 40], offsets=[0, 1 << 42])}),
    "a shape that overflows": header({"a": tensor(shape=[1 << 33, 1 << 33])}, bytes(4)),
    "a negative shape": header({"a": tensor(shape=[-1])}, bytes(4)),
    "a shape of texts": header({"a": tensor(shape=["1"])}, bytes(4)),
    "offsets the wrong way": header({"a": tensor(offsets=[4, 0])}, bytes(4)),
    "overlapping tensors": header({"a": tensor(), "b": tensor()}, bytes(4)),
    "an evil dtype": header({"a": tensor(dtype=EVIL)}, bytes(4)),
    "an evil name of what is none": header({EVIL: 5}, bytes(4)),
    "an evil name out of place": header({EVIL: tensor(offsets=[1, 5])}, bytes(5)),
    "metadata of other kinds": header({"__metadata__": {"a": 5}}),
    "bytes that belong to none": header({"a": tensor()}, bytes(400)),
}


@pytest.mark.parametrize("victim", ["model", "train"])
@pytest.mark.parametrize("content", TENSORS)
def test_tensors_that_are_none_are_refused(whole, content, victim):
    forge(whole, **{victim: TENSORS[content]})
    refused(lambda: checkpoint.load(whole), f"{victim}.safetensors")


def test_metadata_of_tensors_is_not_looked_at(whole, network):
    plain = {name: each.contiguous() for name, each in network.state_dict().items()}
    forge(whole, model=to_safetensors(plain, {"a": EVIL, "__reduce__": "os.system", "format": "pickle"}))
    assert outcome(lambda: checkpoint.network(whole), whole.name)[0]


ONE = torch.zeros(1)
MISFITS: dict[str, dict[str, torch.Tensor]] = {
    "none": {},
    "an evil name": {EVIL: ONE},
    "a lone surrogate's name": {"\N{REPLACEMENT CHARACTER}\u2029": ONE},
    "no name": {"": ONE},
    "dots": {"..": ONE, "backbone.": ONE, ".weight": ONE},
    "a module's attribute": {"__class__": ONE, "backbone.forward": ONE, "_extra_state": ONE},
}


@pytest.mark.parametrize("content", MISFITS)
def test_tensors_of_another_network_are_shown_escaped(whole, network, content):
    for tensors in (MISFITS[content], {**network.state_dict(), **MISFITS[content], "zz\n\x1b[31m": ONE}):
        forge(
            whole,
            model=to_safetensors(
                {name: each.clone(memory_format=torch.contiguous_format) for name, each in tensors.items()}
            ),
        )
        saved = checkpoint.load(whole)
        refused(partial(checkpoint.restore_model, saved, network), whole.name)
        refused(lambda: initialize(network, InitConfig(str(whole)), "test_resnet", ["a", "b"]), whole.name)


@pytest.mark.parametrize(
    "shape", [(0,), (7,), (1,), (), (2, 2, 2)], ids=["empty", "other", "one", "scalar", "more dimensions"]
)
def test_momentum_of_other_shapes_is_refused(whole, network, shape):
    """One number would be spread over the whole parameter."""
    names = [name for name, _ in network.named_parameters()]
    forge(whole, train=to_safetensors({f"momentum.{name}": torch.zeros(shape) for name in names}))
    saved = checkpoint.load(whole)
    refused(
        lambda: checkpoint.restore(saved, State(network, optim.sgd(network, RECIPE.optim), SCALER)),
        whole.name,
    )


@pytest.mark.parametrize(
    "state", [{"scale": 1.0}, {"scale": "x"}, {"scale": EVIL, "growth_factor": [], "backoff_factor": None}]
)
def test_a_scalers_state_of_other_kinds_is_refused(whole, network, state):
    forge(whole, scaler=state)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    to = State(network, optim.sgd(network, RECIPE.optim), scaler)
    refused(lambda: checkpoint.restore(checkpoint.load(whole), to), whole.name)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", EVIL, "\ud800", "/dev/zero", "/proc/self/mem", "loop/x"])
def test_paths_that_lead_to_no_checkpoint_are_refused(network, name):
    """A stranger's recipe may name any to start from."""
    Path("loop").symlink_to("loop")
    refused(lambda: checkpoint.find(Path(name)), "is no checkpoint")
    refused(lambda: initialize(network, InitConfig(name), "test_resnet", ["a"]), "is no checkpoint")


def test_pruning_removes_nothing_through_links(whole, tmp_path):
    home = whole.parent
    for name in ("step-00000000", ".step-00000000.1.partial"):
        (home / name).symlink_to(tmp_path / "outside")
    (home.parent / "best").symlink_to("best")
    checkpoint._prune(home.parent, 1)  # the fixture looks at what is outside


def test_a_recipe_is_not_written_through_a_link(tmp_path):
    """A stranger's run folder may have links where a run would write."""
    Path("run").mkdir()
    Path("run", "recipe.toml").symlink_to(tmp_path / "outside" / "victim.txt")
    with suppress(UserError):
        open_run(Path("run"), "auto", "arch = 1")


@pytest.mark.parametrize("content", [EVIL.encode(), b"\xff\xff", b"\0" * 100, b""])
def test_the_holder_of_a_lock_is_shown_escaped(content):
    with Path(".run.lock").open("w+b") as file:
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)

        def take() -> None:
            with lock(Path("run").absolute()):
                pass

        refused(take, "run")


def test_any_meta_file_is_read_or_refused(whole):
    """Bytes first, then values under keys that readers look for; hashes right, so that the content counts."""
    valid = (whole / "meta.json").read_bytes()

    def check_bytes(content: bytes) -> None:
        (whole / "meta.json").write_bytes(content)
        took, meta = outcome(lambda: checkpoint.verify(whole), whole.name)
        assert not took or isinstance(meta, dict)

    tokens = (b"1e400", b"NaN", b"[[[", b'{"format": 3}', b'\\ud800"', b"9" * 5000)
    fuzz("checkpoint.verify", 200, mutations(valid, tokens=tokens), check_bytes)


def test_any_meta_value_is_read_or_refused(whole, network, alone, monkeypatch):
    valid = json.loads((whole / "meta.json").read_text())
    monkeypatch.setattr(Classifier, "of", lambda recipe, classes: network)  # built once, for speed
    sgd = optim.sgd(network, RECIPE.optim)
    meter = Meter(["loss"], torch.device("cpu"), 1)
    keys = [key for key in valid if key not in ("format", "sha256", "versions", "checksum")]
    deeper = st.tuples(st.just("recipe"), st.dictionaries(st.sampled_from([*valid["recipe"], "x"]), anything)).map(
        lambda pair: (pair[0], valid["recipe"] | pair[1])
    )

    def go_on() -> None:
        saved = checkpoint.load(whole)
        check_compatible(saved, META, ["classes", "data", "seed"])
        checkpoint.restore(saved, State(network, sgd, SCALER))
        meter.restore(saved.meta["meters"], saved.meta["streak"], alone)
        assert step_of(saved.meta, 2) >= 0 and all(map(math.isfinite, meter.sums + meter.shares))

    def check(changes: list[tuple[str, Any]]) -> None:
        (whole / "meta.json").write_text(json.dumps(valid))
        forge(whole, **dict(changes))
        took, found = outcome(lambda: checkpoint.network(whole), whole.name)
        if took:
            assert found is not None and isinstance(found[1], Recipe) and all(type(each) is str for each in found[2])
        outcome(go_on, whole.name)
        took, line = outcome(lambda: initialize(network, InitConfig(str(whole)), "test_resnet", ["a"]), whole.name)
        assert not took or (line and line.isprintable())

    fuzz("checkpoint.network", 120, st.lists(st.tuples(st.sampled_from(keys), anything) | deeper, min_size=1,
                                             max_size=2), check)  # fmt: skip


def test_any_tensors_are_read_or_refused(whole):
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]
    valid = to_safetensors({f"t{at}": torch.ones(2, at + 1).to(kind) for at, kind in enumerate(kinds)}, {"a": EVIL})
    dtypes = st.sampled_from(["F32", "F64", "BOOL", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "U64", "x", "I8", ""])
    whole_numbers = st.sampled_from([0, 1, 2, 4, 8, -1, 2**32, 2**62, 2**64]) | st.integers(0, 9)
    shapes = st.lists(whole_numbers, max_size=3)
    rows = st.builds(tensor, dtypes, shapes, st.lists(whole_numbers, min_size=2, max_size=2)) | anything
    table = st.dictionaries(st.sampled_from(["a", EVIL, "__metadata__", ""]) | st.text(max_size=3), rows, max_size=3)
    structured = st.builds(lambda rows, tail: header(rows, bytes(tail)), table, st.sampled_from([0, 1, 4, 8, 16]))

    forge(whole, train=valid)

    def check(content: bytes) -> None:
        forge(whole, model=content)
        took, saved = outcome(lambda: checkpoint.load(whole), "model.safetensors")
        if took:
            assert saved is not None and all(isinstance(each, torch.Tensor) for each in saved.model.values())

    fuzz("safetensors", 300, structured | mutations(valid), check)


# ---- files of weights to start from


def pth(content: object) -> bytes:
    packed = io.BytesIO()
    torch.save(content, packed)
    return packed.getvalue()


def repacked(content: bytes, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    """A zip with every member changed."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return packed.getvalue()


PTH = pth({"fc.weight": torch.zeros(2, 3)})
WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "a pickle": PICKLE,
    "a pickle in a zip": pth({"a": Bomb()}),
    "a pickle for a tensor": repacked(PTH, lambda name, old: PICKLE if name.endswith("data.pkl") else old),
    "compressed": repacked(PTH, lambda name, old: old, zipfile.ZIP_DEFLATED),
    "a tensor without its bytes": repacked(PTH, lambda name, old: b"" if "/data/" in name else old),
    "no pickle": repacked(PTH, lambda name, old: b"" if name.endswith("data.pkl") else old),
    "lists in lists": pth(json.loads(deep("[", "]", 400))),
    "a list": pth([1, 2]),
    "an evil name": pth({EVIL: torch.zeros(1)}),
    "a number for a name": pth({5: torch.zeros(1)}),
    "a class": pth(torch.nn.Linear(1, 1)),
    "terabytes": pth({"a": torch.zeros(1).expand(1 << 40)}),
    "a sparse tensor": pth({"a": torch.sparse_coo_tensor(torch.zeros(2, 0), torch.zeros(0), (1 << 30, 1 << 30))}),
    "evil text for a pickle": repacked(PTH, lambda name, old: EVIL.encode() if name.endswith("data.pkl") else old),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("content", WEIGHTS)
def test_weights_that_are_none_are_refused(network, content, suffix):
    path = Path("evil" + suffix)
    path.write_bytes(WEIGHTS[content])
    refused(lambda: initialize(network, InitConfig(str(path)), "test_resnet", ["a", "b"]), path.name)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", ["evil.pth", "evil.safetensors"])
def test_weights_that_are_no_files_are_not_waited_for(network, name, special):
    SPECIAL[special](Path(name))
    refused(lambda: initialize(network, InitConfig(name), "test_resnet", ["a", "b"]), name, seconds=2)


def test_any_weights_are_read_or_refused(network):
    whole = {name: each.contiguous() for name, each in network.backbone.state_dict().items()}
    few = {name: whole[name] for name in list(whole)[:3]}

    def inside(content: bytes) -> st.SearchStrategy[bytes]:
        """A sound zip, whose own checksums would else find the damage first."""
        members = mutations(zipfile.ZipFile(io.BytesIO(content)).read("archive/data.pkl"), tokens=(b"cos\nsystem\n",))
        return members.map(lambda new: repacked(content, lambda name, old: new if name.endswith(".pkl") else old))

    def check(content: bytes) -> None:
        Path("x.pth").write_bytes(content)
        init = InitConfig("x.pth")
        took, line = outcome(lambda: initialize(network, init, "test_resnet", ["a", "b"]), "x.pth")
        assert not took or (line and line.isprintable())

    small = pth(few)
    fuzz("initial.initialize", 200, inside(small) | mutations(small), check)


# ---- probabilities; tests/test_ensemble.py has the damage to bytes


def npy(descr: object = "'<f4'", shape: str = "(1, 2)", data: bytes = b"", order: str = "False") -> bytes:
    """An array file of any header."""
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


GOOD = {
    "ids": np.array(["a"]),
    "classes": np.array(["x", "y"]),
    "probs": np.array([[0.5, 0.5]], np.float32),
}


def npz(**members: bytes | np.ndarray) -> bytes:
    """A file of probabilities that is good but for the members given, which are arrays or any bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, each in {**GOOD, **members}.items():
            if isinstance(each, np.ndarray):
                content = io.BytesIO()
                np.save(content, each, allow_pickle=True)
                each = content.getvalue()
            archive.writestr(f"{name}.npy", each)
    return packed.getvalue()


def nested_zip(entries: int, size: int) -> bytes:
    """Stored entries of which each holds all that follow: together they are much longer than the file."""
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
        "a pickle beside the arrays": npz(extra=np.array([Bomb()], object), ids=np.array([1])),
        "a pickle": PICKLE,
        "terabytes": npz(probs=npy(shape="(1000000000000, 2)")),
        "a shape that overflows": npz(probs=npy(shape="(4611686018427387904, 4)")),
        "a negative shape": npz(probs=npy(shape="(-1, -2)")),
        "texts of gigabytes": npz(ids=npy("'<U1000000000'", "(1,)")),
        "a shape of texts": npz(probs=npy(shape="('a',)")),
        "code as a header": npz(probs=npy("__import__('os').system('touch planted')")),
        "a header too deep": npz(probs=npy("(" * 50 + ")" * 50)),
        "letters that there are none of": npz(ids=npy("'<U1'", "(1,)", struct.pack("<I", 0x7FFFFFFF))),
        "lone surrogates": npz(ids=npy("'<U1'", "(1,)", struct.pack("<I", 0xD800))),
        "classes of letters that there are none of": npz(classes=npy("'<U1'", "(2,)", struct.pack("<II", 1 << 30, 1))),
        "a structure for texts": npz(ids=np.zeros(1, [("a", "<U4")])),
        "infinities": npz(probs=np.array([[np.inf, 0]], np.float32)),
    }.items(),
    ids=lambda item: item[0],
)
def test_probabilities_that_are_none_are_refused(content):
    Path("evil.npz").write_bytes(content[1])
    refused(lambda: predictions.load(Path("evil.npz")), "evil.npz")
    outcome(lambda: predictions.check_overwritable(Path("evil.npz")), "evil.npz")


def test_a_small_file_of_probabilities_does_not_take_much_memory():
    """Zip entries may overlap, and then many stand for the same bytes."""
    content = nested_zip(200, 1 << 20)
    Path("evil.npz").write_bytes(content)
    with zipfile.ZipFile("evil.npz") as archive:
        assert sum(each.file_size for each in archive.infolist()) > 150 * len(content), "the test makes no such file"
    tracemalloc.start()
    try:
        refused(lambda: predictions.load(Path("evil.npz")), "evil.npz")
        assert tracemalloc.get_traced_memory()[1] < 10 * len(content)
    finally:
        tracemalloc.stop()


def test_names_of_probabilities_are_escaped():
    for name in ("\x1b[31m\n.npz", "\u202e.npz", os.fsdecode(b"\xff.npz")):
        Path(name).write_bytes(npz(ids=np.array([1])))
        refused(partial(predictions.load, Path(name)), printable(name))


def test_any_arrays_are_read_or_refused():
    """Of any types and shapes, in an archive that is sound; what is read can be shown, fused and handed in."""
    descrs = st.sampled_from(["'<f4'", "'<U1'", "'<U3'", "'>U2'", "'<i8'", "'|O'", "'<f8'", "'|V8'", "'|S4'", "'>f4'"])
    shapes = st.sampled_from(["(1, 2)", "(1,)", "(2,)", "()", "(0,)", "(2, 1)", "(1, 2, 1)", "(99999999999,)", "(-1,)"])
    halves = np.array([[0.5, 0.5]], np.float32).tobytes()
    data = st.sampled_from([halves, b"", PICKLE, struct.pack("<II", 0xD800, 97), struct.pack("<II", 27, 10)])
    arrays = st.builds(npy, descrs, shapes, data | st.binary(max_size=16), st.sampled_from(["False", "True", "0"]))
    names = st.sampled_from(["ids", "classes", "probs", "labels", "probs_224", "probs_0", "probs_٣", "../../x"])

    def check(members: dict[str, bytes]) -> None:
        Path("x.npz").write_bytes(npz(**members))
        took, found = outcome(lambda: predictions.load(Path("x.npz")), "x.npz")
        if took:
            assert found is not None and found.probs.shape == (1, 2) and abs(float(found.probs.sum()) - 1) < 0.01
            assert all(printable(each).isprintable() for each in (*found.ids.tolist(), *found.classes.tolist()))
            submission.write(Path("x.csv"), found.ids.tolist(), [0])

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
        "a row of many": "Image IDs,Predictions\n" + "," * 10_000_000,
        "an unclosed quote": 'Image IDs,Predictions\n"a,1\nb,2\n',
        "an evil name twice": f'Image IDs,Predictions\n"{EVIL}",1\n"{EVIL}",1\n',
        "an evil class": f'Image IDs,Predictions\na,"{EVIL}"\n',
        "a class of 5000 digits": "Image IDs,Predictions\na," + "9" * 5000,
        "digits of another script": "Image IDs,Predictions\na,٣\n",
        "a superscript": "Image IDs,Predictions\na,²\n",
        "a class below 0": "Image IDs,Predictions\na,-1\n",
        "a byte order mark": "\ufeffImage IDs,Predictions\na,1\n",
        "another header": f"{EVIL},Predictions\na,1\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_submissions_that_are_none_are_refused(content):
    put(Path("evil.csv"), content[1])
    refused(lambda: submission.read(Path("evil.csv"), submission.HEADER), "evil.csv", memory=GB)


def test_any_submission_is_read_or_refused():
    cells = st.sampled_from(["a", "b", "0", "1", "-1", "1e9", "٣", '"', EVIL, "\0", "x" * 200_000]) | st.text(
        max_size=5
    )
    rows = st.lists(st.lists(cells, max_size=3).map(",".join), max_size=4)
    ends = st.sampled_from(["\n", "\r\n", "\r"])
    texts = st.builds(lambda rows, end: end.join(["Image IDs,Predictions", *rows]), rows, ends)
    structured = texts.map(lambda text: text.encode("utf-8", "surrogatepass"))
    mutated = mutations(b'Image IDs,Predictions\na.jpg,1\n"b ""c"".jpg",22\n', tokens=(b'"', b",", b"\r", b"9" * 20))

    def check(content: bytes) -> None:
        Path("x.csv").write_bytes(content)
        took, found = outcome(lambda: submission.read(Path("x.csv"), submission.HEADER), "x.csv")
        if took:
            assert found is not None and all(type(each) is int and 0 <= each < 10**9 for each in found.values())
        outcome(lambda: submission.check_overwritable(Path("x.csv")), "x.csv")

    fuzz("submission.read", 300, structured | mutated, check)


# ---- quarantines


def manifest(*rows: tuple[str | bytes, str | bytes]) -> str:
    """A restore.json of rows of where a file is and where it was."""
    hexed = [(os.fsencode(to).hex(), os.fsencode(source).hex()) for to, source in rows]
    return json.dumps({"moves": [{"to": "", "from": "", "to_bytes": to, "from_bytes": at} for to, at in hexed]})


@pytest.fixture
def aside() -> Path:
    """A quarantine of one file, and the folder that it came from."""
    place_ = Path("aside").absolute()
    (place_ / "a").mkdir(parents=True)
    (place_ / "a" / "1.png").write_text("image")
    Path("set", "a").mkdir(parents=True)
    (place_ / "restore.json").write_text(manifest(("a/1.png", str(Path("set/a/1.png").absolute()))))
    return place_


def test_a_quarantine_that_is_whole_is_restored(aside):
    """Without which the refusals below would tell nothing."""
    assert (
        quarantine.restore(aside, aside.absolute().parent) == 1
        and Path("set/a/1.png").read_text() == "image"
        and not aside.exists()
    )


@pytest.mark.parametrize(
    "row",
    {
        "a path out of it": ("../../outside/victim.txt", "set/a/x.png"),
        "a path out of it, later": ("a/../../../outside/victim.txt", "set/a/x.png"),
        "an absolute path in it": ("/etc/hostname", "set/a/x.png"),
        "nothing": ("", "set/whole"),
        "itself": (".", "set/whole"),
        "a folder in it": ("a", "set/whole"),
        "its own list": ("restore.json", "set/a/x.png"),
        "NUL in it": ("a/\0.png", "set/a/x.png"),
        "through a link": ("link/victim.txt", "set/a/x.png"),
        "through a link, later": ("a/deeper/victim.txt", "set/a/x.png"),
        "NUL before": ("a/1.png", "set/a/\0.png"),
        "a relative path before": ("a/1.png", b"set/a/1.png"),
        "a path that climbs before": ("a/1.png", "set/a/../../../outside/1.png"),
        "a hidden file before": ("a/1.png", "set/a/.bashrc"),
        "a hidden folder before": ("a/1.png", "set/.ssh/1.png"),
        "another name before": ("a/1.png", "set/a/other.png"),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_quarantine_moves_nothing_but_what_it_holds_to_where_it_was(aside, tmp_path, row):
    """Only visible files in visible folders are ever quarantined, and by their path in the folder."""
    _, (to, source) = row
    (aside / "link").symlink_to(tmp_path / "outside")
    (aside / "a" / "deeper").symlink_to(tmp_path / "outside")
    absolute = source if isinstance(source, bytes) else os.path.join(os.getcwd(), source)
    (aside / "restore.json").write_text(manifest((to, absolute)))
    before = tree(Path())
    refused(lambda: quarantine.restore(aside, aside.absolute().parent), "aside")
    assert tree(Path()) == before


@pytest.mark.parametrize(
    "content",
    {
        "empty": "",
        "a pickle": PICKLE,
        "lists in lists": deep("["),
        "tables in tables": deep('{"moves":'),
        "a number of 5000 digits": '{"moves": ' + "9" * 5000 + "}",
        "no moves": "{}",
        "moves in a table": '{"moves": {"a": 1}}',
        "moves in a text": '{"moves": "abc"}',
        "moves of lists": '{"moves": [[]]}',
        "moves of other kinds": '{"moves": [{"to_bytes": 5, "from_bytes": []}]}',
        "moves that are not hexadecimal": '{"moves": [{"to_bytes": "zz", "from_bytes": "zz"}]}',
        "a list": "[]",
        "100 MB of lists": lambda: '{"moves": [' + "[]," * 33_000_000,
    }.items(),
    ids=lambda item: item[0],
)
def test_a_list_of_moves_that_is_none_is_refused(aside, content):
    put((aside / "restore.json"), content[1])
    refused(lambda: quarantine.restore(aside, aside.absolute().parent), "aside", memory=GB)
    refused(lambda: quarantine.quarantine("set", ["a/1.png"], aside), "aside", memory=GB)


def test_evil_names_in_a_quarantine_are_shown_escaped(aside):
    """A file of any name may have been bad; where it cannot go back, it is named."""
    name = EVIL.replace("/", "") + ".png"
    (aside / "a" / name).write_text("image")
    taken = Path("set", "a", name).absolute()
    taken.write_text("another")
    (aside / "restore.json").write_text(manifest((f"a/{name}", str(taken))))
    refused(lambda: quarantine.restore(aside, aside.absolute().parent), "aside")
    assert taken.read_text() == "another"


def test_any_list_of_moves_is_followed_or_refused(tmp_path, monkeypatch):
    """Nothing outside of the quarantine and of the folder of images is moved."""
    base = Path.cwd()
    folder, held = base / "set", base / "aside"
    real, moved = quarantine._move, []

    def move(source: str, to: str) -> None:
        moved.append((source, to))
        # Mutated paths may lead anywhere on this machine.
        if os.path.realpath(to).startswith(str(base)) and os.path.realpath(source).startswith(str(base)):
            real(source, to)

    monkeypatch.setattr(quarantine, "_move", move)
    inside = ["a/1.png", "a/2.png", "b/1.png", "a/1.png.again"]
    tos = st.sampled_from([*inside, "", ".", "..", "a", "a/", "a//1.png", "./a/1.png", "link/victim.txt", "../x", "\0"])
    froms = st.sampled_from([*(f"{folder}/{each}" for each in inside), f"{folder}/a/../b", f"{base}", "/", "x", "\0"])
    valid = manifest(*((each, f"{folder}/{each}") for each in inside[:3])).encode()
    structured = st.lists(st.tuples(tos, froms), max_size=3).map(lambda rows: manifest(*rows).encode())
    other = st.builds(lambda each: json.dumps({"moves": each}).encode(), anything)
    rows = st.lists(
        st.fixed_dictionaries({"to_bytes": anything | st.just("612f312e706e67"), "from_bytes": anything}), max_size=2
    )

    def check(content: bytes) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(held, ignore_errors=True)
        (folder / "a").mkdir(parents=True)
        for each in inside[:3]:
            (held / each).parent.mkdir(parents=True, exist_ok=True)
            (held / each).write_text(each)
        (held / "link").symlink_to(tmp_path / "outside")
        (held / "restore.json").write_bytes(content)
        moved.clear()
        outcome(lambda: quarantine.restore(held, held.absolute().parent), "aside")
        for source, to in moved:
            path = os.path.relpath(source, held)
            assert path in inside and os.path.normpath(to) == to and to.endswith("/" + path.removesuffix(".again")), to

    fuzz("quarantine.restore", 200, structured | mutations(valid) | other | rows.map(
        lambda each: json.dumps({"moves": each}).encode()), check)  # fmt: skip


# ---- sets that are placed

STAMP = {"fasttrain_cut": 1, "seed": 0}
MARKS = {
    "a pickle": PICKLE,
    "lists in lists": deep("[").encode(),
    "tables in tables": deep('{"a":').encode(),
    "a number of 5000 digits": b"9" * 5000,
    "another's": b'{"fasttrain_cut": 2}',
    "not UTF-8": b"\xff",
}


@pytest.mark.parametrize("content", MARKS)
@pytest.mark.parametrize("folder", ["out", "out.partial"])
def test_a_set_of_another_mark_is_refused(folder, content):
    Path(folder).mkdir()
    Path(folder, "cut.json").write_bytes(MARKS[content])
    Path(folder, "another").write_text("years of work")
    refused(lambda: place_files.finished(Path("out"), "cut.json", STAMP), "out")
    with limits():
        assert read_json_object(Path(folder, "cut.json")) != STAMP


def test_any_mark_is_known_or_refused():
    Path("out").mkdir()

    def check(content: bytes) -> None:
        Path("out", "cut.json").write_bytes(content)
        took, known = outcome(lambda: place_files.finished(Path("out"), "cut.json", STAMP), "out")
        assert not took or (known is True and json.loads(content) == STAMP)

    texts = anything.map(lambda each: json.dumps(each).encode())
    fuzz("place.finished", 150, texts | mutations(json.dumps(STAMP).encode(), tokens=(b"[" * 5000, b"1e400")), check)


@pytest.mark.parametrize("link", ["cut.json.part", "cut.json", "train", "train/a", "."])
def test_a_set_is_not_placed_through_links(tmp_path, images, link):
    """What an interrupted call left, and anybody could have: links to elsewhere."""
    outside, partial = tmp_path / "outside", Path("out.partial")
    if link == ".":
        partial.symlink_to(outside)
    else:
        (partial / link).parent.mkdir(parents=True)
        (partial / link).symlink_to(outside / "victim.txt" if "json" in link else outside)
    sources = {f"train/{each}": path for each, path in zip(images.ids, images.paths, strict=True)}
    outcome(lambda: place_files.place(Path("out"), sources, {}, "cut.json", STAMP, link=False, progress=False), "out")
    assert not Path("out").is_symlink()


def test_sources_of_evil_names_are_shown_escaped():
    sources = {f"train/{number}": f"/nowhere/{EVIL}{number}" for number in range(5)}
    refused(
        lambda: place_files.place(Path("out"), sources, {}, "cut.json", STAMP, link=False, progress=False),
        "out.missing.txt",
    )


# ---- images and the cache of their sizes


def picture(kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (17, 16), (200, 100, 50)).save(content, kind, **options)
    return content.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of any header, with chunks before its empty data."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", size), *chunks, (b"IDAT", b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def tiff(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A TIFF of one directory of entries (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *each) for each in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", following)


PICTURES = {
    "empty": b"",
    "a pickle": PICKLE,
    "a script": b"#!/bin/sh\ntouch planted\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 7 5\n%%EndComments\n(planted) (w) file\n",
    "PNG of no width": png(0, 5),
    "PNG of no height": png(7, 0),
    "PNG of 2^31 - 1 pixels a side": png(2**31 - 1, 2**31 - 1),
    "PNG of 2^32 - 1 pixels in a row": png(2**32 - 1, 1),
    "PNG that unpacks to 1 GB": png(7, 5, (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)) * 1)),
    "PNG with a chunk of 4 GB": b"\x89PNG\r\n\x1a\n" + b"\xff\xff\xff\xffIHDR",
    "GIF of 65535 pixels a side": b"GIF89a\xff\xff\xff\xff\0\0\0;",
    "BMP below 0": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, -7, -5, 1, 24, 0, 0, 0, 0, 0, 0),
    "BMP of 2^31 rows": b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    "TIFF of 2^32 - 1 pixels": tiff((256, 4, 1, 2**32 - 1), (257, 4, 1, 1)),
    "TIFF whose directory is its own next": tiff((256, 4, 1, 7), (257, 4, 1, 5), following=8),
    "TIFF of terabytes": tiff((256, 4, 1, 7), (257, 4, 1, 5), (273, 4, 2**32 - 1, 8)),
    "TIFF whose width is a text": tiff((256, 2, 4, 7), (257, 4, 1, 5)),
    "TIFF turned by a text": tiff((256, 4, 1, 7), (257, 4, 1, 5), (274, 2, 4, 0x41414141)),
}


def folder_of(content: bytes, name: str = "1.png") -> Path:
    """Class folders, one image of which holds the content."""
    folder = Path("images")
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / "0.png").write_bytes(GOOD_PNG)
    (folder / "a" / name).write_bytes(content)
    return folder


GOOD_PNG = picture("PNG")


def scan_both_ways(folder: Path, name: str) -> None:
    """A file has a size that training can use, or is refused by name; where it may stay, it has none."""
    took, kept = outcome(lambda: dataset.scan(folder, progress=False, keep_unreadable=True), name)
    assert took and kept is not None and kept.sizes.dtype == np.int32
    size = kept.sizes[kept.ids.index(f"a/{name}")]
    assert (size == 0).all() or (size > 0).all(), size
    took, index = outcome(lambda: dataset.scan(folder, progress=False), printable(name))
    assert took == bool(size[0])
    assert index is None or (index.sizes > 0).all()


@pytest.mark.parametrize("content", PICTURES)
def test_images_of_any_header_have_a_size_or_none(content):
    scan_both_ways(folder_of(PICTURES[content]), "1.png")


def test_any_image_has_a_size_or_none(monkeypatch):
    samples = [GOOD_PNG, picture("JPEG"), picture("BMP"), picture("TIFF"), picture("WEBP"), picture("GIF")]
    samples += [picture("TIFF", big_tiff=True), picture("PPM"), picture("JPEG2000"), picture("ICO", sizes=[(16, 16)])]
    samples += [PICTURES["PostScript"], PICTURES["TIFF turned by a text"]]

    def check(content: bytes) -> None:
        path = Path("1.png").absolute()
        path.write_bytes(content)
        took, sizes = outcome(lambda: dataset._read_sizes([str(path)], False), "")
        assert took and sizes is not None and ((sizes == 0).all() or (sizes > 0).all())

    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # fewer threads to start for each image
    fuzz("dataset.scan", 400, mutations(*samples, tokens=(b"\xff\xff\xff\xff", b"\0\0\0\0")), check)


def test_names_of_classes_and_images_are_shown_escaped(tmp_path):
    name = EVIL.replace("/", "")
    folder = folder_of(b"no image", f"{name}.png")
    scan_both_ways(folder, f"{name}.png")
    (folder / name).mkdir()
    refused(lambda: dataset.scan(folder, progress=False), printable(name))
    (folder / name).rmdir()
    (folder / name).symlink_to(tmp_path / "outside")
    (folder / os.fsdecode(b"\xff\n")).mkdir()
    refused(lambda: dataset.scan(folder, progress=False), printable(os.fsdecode(b"\xff\n")))


def test_links_pipes_and_devices_among_images_are_left_out(tmp_path):
    folder = folder_of(GOOD_PNG)
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "zero.png").symlink_to("/dev/zero")
    (folder / "a" / "out.png").symlink_to(tmp_path / "outside" / "victim.txt")
    (folder / "a" / "loop.png").symlink_to("loop.png")
    (folder / "c").symlink_to("/")
    (folder / "d").symlink_to("d")
    os.mkfifo(folder / "e")
    for read in (dataset.scan, dataset.scan_unlabelled):
        took, index = outcome(partial(read, folder, progress=False), "")
        assert took and index is not None and index.ids == ("a/0.png", "a/1.png", "b/0.png")
    took, _ = outcome(lambda: make(folder, 1, 0, Path("small"), progress=False), "")
    assert took and all(
        each.is_dir() or each.name in ("0.png", "1.png", "cut.json") for each in Path("small").rglob("*")
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
    "a type of its own": npy("[('a', '<i4', (999999999,))]", "(2, 2)"),
    "sizes below 0": npy("'<i4'", "(2, 2)", struct.pack("<4i", -1, 5, 7, 5)),
    "a width of 0": npy("'<i4'", "(2, 2)", struct.pack("<4i", 5, 0, 7, 5)),
    "another count": npy("'<i4'", "(3, 2)", bytes(24)),
    "another type": npy("'<i8'", "(2, 2)", bytes(32)),
}


@pytest.mark.parametrize("content", CACHES)
def test_a_cache_that_is_none_is_passed_over(content):
    Path("x.npy").write_bytes(CACHES[content])
    took, found = outcome(lambda: dataset._load_sizes(Path("x.npy"), 2), "")
    assert took and found is None


def test_any_cache_is_read_or_passed_over():
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
        took, found = outcome(lambda: dataset._load_sizes(Path("x.npy"), 2), "")
        assert took
        if found is not None:
            assert found.shape == (2, 2) and found.dtype == np.int32
            assert all((row == 0).all() or (row > 0).all() for row in found), found

    fuzz("dataset._load_sizes", 300, structured | mutations(valid, tokens=(b"(", b"9" * 20, b"'")), check)


# ---- what is shown


@pytest.mark.parametrize("name", [*TEXTS, "\U0010ffff", "\udfff\udc80", "a\ud800\udc00b"], ids=ascii)
def test_any_text_can_be_shown(name):
    assert printable(name).isprintable()
    assert printable(Path(name)).isprintable()


def test_data_from_a_recipe_that_is_nowhere_is_shown_escaped():
    for name in (EVIL, "a\0b", "x" * 5000, "\ud800"):
        refused(partial(dataset.open_data, DataConfig(train=(name,))), printable(name))
