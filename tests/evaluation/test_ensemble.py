"""Files of probabilities, ensembles, submissions and their scores."""

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import call
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from fasttrain.evaluation import metrics, predictions, submission
from fasttrain.evaluation.ensemble import agreement, fuse, greedy_weights, load_members
from fasttrain.evaluation.predictions import Predictions
from fasttrain.utils.errors import UserError


def predictions_of(seed=0, count=40, classes=7, labels=True) -> Predictions:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(classes), count).astype(np.float32)
    ids = np.array([f"img_{number}.JPEG" for number in range(count)])
    names = np.array([f"n{number:02}" for number in range(classes)])
    return Predictions(ids, names, probs, np.random.default_rng(9).integers(classes, size=count) if labels else None)


def test_save_and_load_round_trip(tmp_path):
    for labels in (True, False):
        ours = replace(
            predictions_of(labels=labels), per_size={224: predictions_of(1).probs, 320: predictions_of(2).probs}
        )
        predictions.save(ours, tmp_path / "p.npz")
        theirs = predictions.load(tmp_path / "p.npz")
        for name in ("ids", "classes", "probs", "labels"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert theirs.per_size.keys() == {224, 320}
        np.testing.assert_array_equal(theirs.per_size[320], ours.per_size[320])
    with np.load(tmp_path / "p.npz", allow_pickle=False) as plain:
        assert set(plain.files) == {"ids", "classes", "probs", "probs_224", "probs_320"}


def test_scores_equal_scikit_learn():
    saved = predictions_of(count=300, classes=12)
    assert saved.labels is not None
    ours = metrics.scores(saved.probs, saved.labels)
    assert ours.top1 == pytest.approx(accuracy_score(saved.labels, saved.probs.argmax(1)))
    assert ours.top5 == pytest.approx(top_k_accuracy_score(saved.labels, saved.probs, k=5))
    assert metrics.scores(np.full((3, 6), np.nan, np.float32), np.array([0, 2, 5]))[:4] == (0.0, 0.0, 3, 3)
    equal = np.full((4, 6), 1 / 6, np.float32)
    assert metrics.scores(equal, np.array([0, 1, 4, 5]))[:4] == (0.25, 0.75, 4, 0)


def archive(**arrays) -> bytes:
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    return packed.getvalue()


GOOD = {"ids": np.array(["a"]), "classes": np.array(["x", "y"]), "probs": np.array([[0.5, 0.5]], np.float32)}


def compressed() -> bytes:
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **GOOD)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no probabilities"),
        (b"not a zip", "holds no probabilities"),
        (archive(**GOOD)[:-30], "holds no probabilities"),
        (compressed(), "it is compressed"),
        (archive(**{**GOOD, "ids": np.array(["a"], object)}), "pickle"),
        (archive(ids=GOOD["ids"], classes=GOOD["classes"]), "no array 'probs'"),
        (archive(**{**GOOD, "probs": np.array([[0.5, 0.6]], np.float32)}), "sum to 1"),
        (archive(**{**GOOD, "probs": np.array([[np.nan, 1]], np.float32)}), "sum to 1"),
        (archive(**{**GOOD, "probs": np.array([[-1, 2]], np.float32)}), "sum to 1"),
        (archive(**{**GOOD, "probs": np.array([[0.5, 0.5]])}), "float64"),
        (archive(**{**GOOD, "probs": np.ones((2, 2), np.float32) / 2}), r"not float32 \[1, 2\]"),
        (archive(**GOOD, labels=np.array([2])), "'labels' names classes"),
        (archive(**GOOD, labels=np.array([-1])), "'labels' names classes"),
        (archive(**GOOD, labels=np.array([0.0])), "'labels' is float64"),
        (archive(**{**GOOD, "classes": np.array(["x", "x"])}), "'classes' has an entry twice"),
        (archive(**{**GOOD, "ids": np.array([1])}), "'ids' is not a list of strings"),
    ],
)
def test_invalid_files_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        predictions.load(tmp_path / "p.npz")
    assert "p.npz" in str(caught.value) and "\n" not in str(caught.value)


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_damaged_files_give_one_line_or_valid_probabilities(tmp_path_factory, data):
    """With any bytes changed, load returns valid probabilities or raises a one-line UserError, never another error."""

    def damaged(content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed[: data.draw(st.integers(1, len(changed)))])

    valid = archive(**GOOD, labels=np.array([1]))
    path = tmp_path_factory.mktemp("fuzz") / "p.npz"
    if data.draw(st.booleans()):
        path.write_bytes(damaged(valid))
    else:  # inside a valid zip, since otherwise its checksums would find the damage first
        with zipfile.ZipFile(io.BytesIO(valid)) as source, zipfile.ZipFile(path, "w") as packed:
            target = data.draw(st.sampled_from(source.namelist()))
            for name in source.namelist():
                content = source.read(name)
                packed.writestr(name, damaged(content) if name == target else content)
    try:
        loaded = predictions.load(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert loaded.probs.shape == (1, 2)


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.npz").write_bytes(b"years of work")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    (tmp_path / "thesis.csv").write_text("years,of work\n")
    for name in ("thesis.npz", "other.npz"):
        with pytest.raises(UserError, match="name another file"):
            predictions.save(predictions_of(), tmp_path / name)
    with pytest.raises(UserError, match="name another file"):
        submission.write(tmp_path / "thesis.csv", ["a"], [1])
    with pytest.raises(UserError, match=r"end the name in \.npz"):
        predictions.save(predictions_of(), tmp_path / "p.csv")
    assert (tmp_path / "thesis.npz").read_bytes() == b"years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.npz", "thesis.csv", "thesis.npz"]


# ---- fusing


@given(st.integers(1, 7), st.integers(0, 1000), st.data())
@settings(max_examples=40, deadline=None)
def test_fuse_equals_numpy_in_any_order_of_members(count, seed, data):
    members = [predictions_of(seed + number).probs for number in range(count)]
    weights = data.draw(st.none() | st.lists(st.floats(0.01, 9), min_size=count, max_size=count))
    fused = fuse(members, weights)
    expected = np.average(np.stack(members).astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(fused, expected, rtol=1e-6)
    order = data.draw(st.permutations(range(count)))
    again = fuse([members[n] for n in order], None if weights is None else [weights[n] for n in order])
    np.testing.assert_array_equal(again, fused)


def test_fuse_takes_more_rows_than_one_chunk():
    members = [predictions_of(seed, count=5000).probs for seed in (0, 1)]
    np.testing.assert_allclose(fuse(members), (members[0] + members[1]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: replace(p, ids=p.ids[::-1]),
            r"ids differ: number 0 is 'img_39\.JPEG' in \S*b\.npz and 'img_0\.JPEG'",
        ),
        (lambda p: replace(p, classes=np.array([*p.classes[:-1], "zebra"])), "classes differ: number 6 is 'zebra'"),
        (
            lambda p: replace(p, ids=p.ids[:-1], probs=p.probs[:-1], labels=p.labels[:-1]),
            "ids differ: number 39 is missing in",
        ),
        (lambda p: replace(p, labels=(p.labels + 1) % 7), "labels differ: number 0"),
        (lambda p: replace(p, labels=None), "has no labels"),
    ],
)
def test_different_members_are_refused_with_the_first_difference(tmp_path, change, message):
    predictions.save(predictions_of(0), tmp_path / "a.npz")
    predictions.save(change(predictions_of(1)), tmp_path / "b.npz")
    with pytest.raises(UserError, match=message):
        load_members([tmp_path / "a.npz", tmp_path / "b.npz"])


def test_greedy_weights_leave_out_noise():
    """Two models with independent errors, and noise: the fit is at least as good as each member and as the mean."""
    rng = np.random.default_rng(3)
    labels = rng.integers(5, size=2000)
    truth = np.eye(5, dtype=np.float32)[labels]

    def model(strength: float, seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).dirichlet(np.ones(5), 2000)
        return (strength * truth + (1 - strength) * noise).astype(np.float32)

    members = [model(0.25, 1), model(0.25, 2), model(0.0, 3)]
    weights = greedy_weights(members, labels)
    assert sum(weights) == pytest.approx(1) and weights[2] < 0.1 and min(weights[:2]) > 0.2

    def top1(probs) -> float:
        return metrics.scores(probs, labels).top1

    assert top1(fuse(members, weights)) >= max(top1(fuse(members)), *map(top1, members))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_weights_equal_a_naive_loop(seed):
    """Each round tries every member and adds the best one; the best round counts."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=60)
    members = [rng.dirichlet(np.ones(3), 60).astype(np.float32) for _ in range(3)]
    chosen: list[int] = []
    best: float = -1.0
    best_chosen: list[int] = []
    for _ in range(50):
        results = []
        for number in range(3):
            mean = np.mean([members[n].astype(np.float64) for n in [*chosen, number]], axis=0)
            right = [float(mean[row].argmax() == label) for row, label in enumerate(labels)]
            likelihood = np.mean([np.log(mean[row, label]) for row, label in enumerate(labels)])
            results.append((float(np.mean(right)), likelihood))
        chosen = [*chosen, max(range(3), key=lambda number: results[number])]
        if results[chosen[-1]][0] > best + 1e-12:
            best, best_chosen = results[chosen[-1]][0], list(chosen)
    expected = [best_chosen.count(number) / len(best_chosen) for number in range(3)]
    assert greedy_weights(members, labels) == pytest.approx(expected)


def test_agreement_is_the_share_of_equal_predictions():
    members = [predictions_of(seed).probs for seed in range(3)]
    shares = agreement(members)
    for a in range(3):
        for b in range(3):
            assert shares[a, b] == pytest.approx(accuracy_score(members[a].argmax(1), members[b].argmax(1)))


# ---- submissions


def official_score(labels, submission_) -> float:
    """The challenge's scorer, from its description: it matches rows by id and skips missing ones."""
    truth, predicted = (
        {row.split(",")[0]: int(row.split(",")[1]) for row in path.read_text().splitlines()[1:]}
        for path in (labels, submission_)
    )
    hits = [truth[name] == predicted[name] for name in truth if name in predicted]
    return sum(hits) / len(hits)


def test_submission_has_the_challenge_format_and_score(tmp_path):
    ids = [f"imgs/img_{number}.JPEG" for number in range(12)]
    submission.write(tmp_path / "s.csv", ids, list(range(12)))
    lines = (tmp_path / "s.csv").read_bytes().decode().split("\n")
    assert lines[0] == "Image IDs,Predictions" and lines[1] == "img_0.JPEG,0" and lines[2] == "img_1.JPEG,1"
    assert lines[3] == "img_10.JPEG,10" and lines[-1] == "" and len(lines) == 14
    (tmp_path / "labels.csv").write_text("Image IDs,Labels\n" + "".join(f"img_{n}.JPEG,{n // 2}\n" for n in range(24)))
    with pytest.raises(UserError, match=r"lacks image 'img_12\.JPEG' \(and 11 more\)"):
        submission.score(tmp_path / "s.csv", tmp_path / "labels.csv")
    submission.write(
        tmp_path / "s.csv", [f"img_{n}.JPEG" for n in range(24)], [n // 2 if n % 3 else 0 for n in range(24)]
    )
    ours = submission.score(tmp_path / "s.csv", tmp_path / "labels.csv")
    assert ours == (pytest.approx(official_score(tmp_path / "labels.csv", tmp_path / "s.csv")), 24)


@pytest.mark.parametrize("first", ["", "Image IDs,Labels\n", "a,0\n"])
def test_submission_needs_its_header(tmp_path, first):
    """Without the header the first image would be lost. A file of labels is not a submission."""
    (tmp_path / "s.csv").write_text(first + "a,0\nb,1\n")
    (tmp_path / "labels.csv").write_text("Image IDs,Labels\na,0\nb,1\n")
    with pytest.raises(UserError, match="line 1 must be the header Image IDs,Predictions"):
        submission.score(tmp_path / "s.csv", tmp_path / "labels.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,0\nb,1\na,1\n", "line 4: 'a' is listed a second time"),
        ("a,0\nb,1\nc,1\n", "has the unknown image 'c'"),
        ("a,0\nb,-1\n", "'-1' is not a class"),
        ("a,0\nb,1.0\n", "is not a class"),
        ("a,0\nb\n", "line 3: a row is an id and a class, not 1 values"),
        ("a,0\n", "lacks image 'b'"),
        ("a,0\nb,99999999999999999999\n", "is not a class"),
    ],
)
def test_wrong_submissions_are_refused(tmp_path, rows, message):
    (tmp_path / "s.csv").write_text("Image IDs,Predictions\n" + rows)
    (tmp_path / "labels.csv").write_text("Image IDs,Labels\na,0\nb,1\n")
    with pytest.raises(UserError, match=message):
        submission.score(tmp_path / "s.csv", tmp_path / "labels.csv")


def test_a_byte_order_mark_and_names_that_look_alike_are_named(tmp_path):
    (tmp_path / "labels.csv").write_text("Image IDs,Labels\ncaf\u00e9.jpg,0\n")
    (tmp_path / "s.csv").write_text("Image IDs,Predictions\ncafe\u0301.jpg,0\n")
    with pytest.raises(UserError, match=r"lacks image .*; 'cafe\\u0301\.jpg' looks alike"):
        submission.score(tmp_path / "s.csv", tmp_path / "labels.csv")
    (tmp_path / "s.csv").write_text("Image IDs,Predictions\ncaf\u00e9.jpg,0\n", encoding="utf-8-sig")
    with pytest.raises(UserError, match="starts with a byte order mark, as spreadsheets write it"):
        submission.score(tmp_path / "s.csv", tmp_path / "labels.csv")


def test_a_class_that_the_labels_lack_is_a_wrong_prediction(tmp_path):
    """Labels of some of the images need not include the highest class."""
    (tmp_path / "s.csv").write_text("Image IDs,Predictions\na,0\nb,2\n")
    (tmp_path / "labels.csv").write_text("Image IDs,Labels\na,0\nb,1\n")
    assert submission.score(tmp_path / "s.csv", tmp_path / "labels.csv") == (0.5, 2)


def test_ids_with_the_same_file_name_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"two images are called 'x\.jpg'"):
        submission.write(tmp_path / "s.csv", ["a/x.jpg", "b/x.jpg"], [0, 1])


def test_duplicate_zip_entries_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as packed, pytest.warns(UserWarning, match="Duplicate"):
        packed.writestr("probs.npy", b"x")
        packed.writestr("probs.npy", b"x")
    with pytest.raises(UserError, match="holds no probabilities"):
        predictions.load(tmp_path / "p.npz")


def file_of(path: Path, ids: list[str], classes: list[str], chosen: list[int]) -> Path:
    probs = np.full((len(ids), len(classes)), 0.5 / (len(classes) - 1), np.float32)
    probs[np.arange(len(ids)), chosen] = 0.5
    predictions.save(Predictions(np.array(ids), np.array(classes), probs), path)
    return path


def test_a_submission_writes_the_numbers_that_name_the_classes(tmp_path):
    """As text, 10 comes before 2."""
    file = file_of(tmp_path / "a.npz", ["x.jpg", "y.jpg"], ["0", "10", "2"], [1, 2])
    call("ensemble", file, "--submission", tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text().splitlines()[1:] == ["x.jpg,10", "y.jpg,2"]


def test_nothing_is_written_where_a_submission_or_an_input_forbids_it(tmp_path):
    file = file_of(tmp_path / "a.npz", ["a/x.jpg", "b/x.jpg"], ["a", "b"], [1, 0])
    before = file.read_bytes()
    assert "is one of the files to average" in call("ensemble", file, "--out", file, status=2).output
    out = tmp_path / "fused.npz"
    line = call("ensemble", file, "--out", out, "--submission", tmp_path / "s.csv", status=2).output
    assert "two images are called 'x.jpg'" in line
    assert file.read_bytes() == before and not out.exists()
    assert "between 0 and 1e9" in call("ensemble", file, file, "--weights", "1e308,1e308", status=2).output
