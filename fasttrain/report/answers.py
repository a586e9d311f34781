"""The page's parts that come from the network's answers to labeled images, and from the images it was trained on."""

from collections.abc import Sequence

import numpy as np

from fasttrain.evaluation import metrics
from fasttrain.evaluation.metrics import BINS, NAMES, Scores
from fasttrain.evaluation.predictions import Predictions
from fasttrain.report.charts import reliability_chart
from fasttrain.report.diagnosis import Diagnosis
from fasttrain.report.markup import Child, Html, cell, element, join, name, shorten, table
from fasttrain.report.overview import score_text
from fasttrain.report.thumbnails import Thumbnails, jpeg_uri
from fasttrain.show_batch import Seen

MOST_PAIRS, PER_PAIR = 12, 5
MOST_IMAGES = 24  # mistakes, and uncertain images
_MOST_CLASSES = 2000  # rows of the table
_NAME = 40  # characters of a class's name on a card
_SEEN_SIDE, _FEW = 160, 80  # pixels; images with fewer are shown without smoothing


def score_tiles(scores: Scores) -> Html:
    found = [(NAMES[key], score_text(key, value)) for key in NAMES if (value := getattr(scores, key)) is not None]
    return element(
        "dl", [element("div", element("dt", title), element("dd", text)) for title, text in found], class_="tiles"
    )


def calibration(diagnosis: Diagnosis, scores: Scores) -> Html:
    """The reliability diagram, and what it says."""
    found = diagnosis.reliability
    chart = reliability_chart(
        np.nan_to_num(found.confidence).tolist(), np.nan_to_num(found.accuracy).tolist(), found.images.tolist()
    )
    sure, right = float(diagnosis.confidence.mean()), scores.top1
    tendency = "too sure" if sure > right + 0.005 else "not sure enough" if sure < right - 0.005 else "well calibrated"
    error = scores.calibration_error if scores.calibration_error is not None else found.error
    text = (
        f"The answers are {sure:.1%} sure on average, and {right:.1%} of them are right: on the whole the network is "
        f"{tendency}. The expected calibration error over {BINS} bins is {error:.2%}."
    )
    legend = (
        "Bars: how many of the images in each bin of confidence are right; the dashed line is where a network that is "
        "as right as it is sure would be. Gray bars: how many images each bin has."
    )
    return element(
        "div",
        element("figure", element("figcaption", "Reliability diagram"), chart),
        element("div", element("p", text), element("p", legend, class_="soft")),
        class_="split",
    )


def per_class(scores: Scores, diagnosis: Diagnosis, classes: Sequence[str]) -> Html:
    """Each class's recall and precision, and what it is most often taken for; the worst classes first."""
    found = scores.per_class
    if found is None:
        return Html("")
    taken: dict[int, tuple[int, int]] = {}
    wrong = diagnosis.answers != diagnosis.labels
    pairs, counts = np.unique(diagnosis.labels[wrong] * len(classes) + diagnosis.answers[wrong], return_counts=True)
    for position in np.argsort(counts, kind="stable").tolist():  # the most frequent last
        label, answer = divmod(int(pairs[position]), len(classes))
        taken[label] = answer, int(counts[position])
    order = sorted(
        range(len(classes)), key=lambda number: (np.nan_to_num(found.recall[number], nan=2), classes[number])
    )
    rows = []
    for number in order[:_MOST_CLASSES]:
        recall, precision, count = float(found.recall[number]), float(found.precision[number]), int(found.count[number])
        f1 = 2 * precision * recall / (precision + recall) if precision + recall > 0 else float("nan")
        other = taken.get(number)
        rows.append(
            (
                cell(name(classes[number]), shorten(classes[number]), kind="head"),
                cell(count, float(count)),
                cell([_share(recall), _meter(recall)], _key(recall)),
                cell([_share(precision), _meter(precision)], _key(precision)),
                cell(_share(f1), _key(f1)),
                cell(
                    [name(classes[other[0]]), f" ({other[1]})"] if other else "", other[1] if other else "", kind="wide"
                ),
            )
        )
    heads = ("class", "images", "recall", "precision", "F1", "most often taken for (images)")
    left_out = len(order) - len(rows)
    return join(
        element("p", "The classes with the lowest recall come first. Recall: the share of a class's images that are "
                "answered right. Precision: the share of the answers with a class that are right. ",
                element("span", "A click on a title sorts.", class_="screen"), class_="soft"),
        table(heads, rows, title="Classes", right=range(1, 5), sortable=True),
        element("p", f"{left_out:,} classes with a higher recall are left out.", class_="soft") if left_out else None,
    )  # fmt: skip


def _share(value: float) -> str:
    return "—" if np.isnan(value) else f"{value:.1%}"


def _key(value: float) -> float | str:
    return "" if np.isnan(value) else value


def _meter(value: float) -> Html | None:
    """A small bar next to a share."""
    if np.isnan(value):
        return None
    parts = [element("rect", width=56, height=8, rx=2, class_="all")]
    if value > 0:
        parts.append(element("rect", width=round(56 * value, 1), height=8, rx=2, class_="part"))
    return element("svg", *parts, viewBox="0 0 56 8", class_="meter", aria_hidden="true")


def confused_pairs(diagnosis: Diagnosis, predicted: Predictions, thumbnails: Thumbnails) -> Html:
    """The pairs of classes that are taken for each other most often, with the surest of these answers."""
    if not diagnosis.pairs:
        return element("p", "No image is taken for another class.")
    classes, of_class = predicted.classes, np.bincount(diagnosis.labels, minlength=len(predicted.classes))
    items = []
    for pair in diagnosis.pairs:
        numbers = pair.images[:PER_PAIR]
        thumbnails.load(numbers)
        label, answer = str(classes[pair.label]), str(classes[pair.answer])
        pictures = [
            element(
                "span",
                thumbnails.picture(
                    number, f"{shorten(label, _NAME)} taken for {shorten(answer, _NAME)}: {_file(predicted, number)}"
                ),
                element("small", percent_of(diagnosis.confidence[number])),
                title=_file(predicted, number),
            )
            for number in numbers
        ]
        count = f": {len(pair.images)} of {of_class[pair.label]} images"
        text = element("p", element("b", name(label, _NAME)), " taken for ", element("b", name(answer, _NAME)), count)
        items.append(element("li", text, element("div", *pictures, class_="strip")))
    intro = f"Up to {PER_PAIR} images of each pair, the surest answers first, with the answer's probability."
    return join(element("p", intro, class_="soft"), element("ul", *items, class_="pairs"))


def mistakes(diagnosis: Diagnosis, predicted: Predictions, thumbnails: Thumbnails) -> Html:
    """The wrong answers that the network is surest of."""
    if not diagnosis.mistakes:
        return element("p", "All answers are right.")
    intro = "Wrong answers with the highest probability. Images with a wrong label stand out here."
    return join(
        element("p", intro, class_="soft"), _cards(diagnosis.mistakes, diagnosis, predicted, thumbnails, second=False)
    )


def uncertain(diagnosis: Diagnosis, predicted: Predictions, thumbnails: Thumbnails) -> Html:
    """The images with the smallest margins."""
    intro = "Images with the smallest margin between the probabilities of the first and the second answer."
    return join(
        element("p", intro, class_="soft"), _cards(diagnosis.uncertain, diagnosis, predicted, thumbnails, second=True)
    )


def _cards(
    numbers: Sequence[int], diagnosis: Diagnosis, predicted: Predictions, thumbnails: Thumbnails, *, second: bool
) -> Html:
    thumbnails.load(numbers)
    items = []
    for number in numbers:
        label, answer = (str(predicted.classes[each[number]]) for each in (diagnosis.labels, diagnosis.answers))
        right = diagnosis.labels[number] == diagnosis.answers[number]
        lines: list[Child] = ["label ", element("b", name(label, _NAME)), element("br"), "answer "]
        lines += [element("b", name(answer, _NAME), class_="right" if right else "wrong")]
        lines += [f" {percent_of(diagnosis.confidence[number])}"]
        if second:
            other = int(diagnosis.seconds[number])
            lines += [element("br"), "second ", name(str(predicted.classes[other]), _NAME)]
            lines += [f" {percent_of(float(predicted.probs[number, other]))}"]
        said = f"{_file(predicted, number)}: label {shorten(label, _NAME)}, answer {shorten(answer, _NAME)}"
        path = element("span", name(str(predicted.ids[number])), class_="path")
        items.append(element("li", thumbnails.picture(number, said), *lines, path))
    return element("ul", *items, class_="cards")


def percent_of(probability: float) -> str:
    return f"{probability:.1%}" if probability < 0.9995 else f"{probability:.3%}"


def _file(predicted: Predictions, number: int) -> str:
    return shorten(str(predicted.ids[number]))


def batch(images: Sequence[Seen], views: int) -> Html:
    """Images of a batch as the network saw them."""
    items = []
    for image in images:
        uri, width, height = jpeg_uri(image.pixels, _SEEN_SIDE)
        lines: list[Child] = []
        for share, label in image.labels:
            lines += [element("br") if lines else None, f"{share:.2f} " if share < 1 else None, name(label, _NAME)]
        said = " and ".join(f"{share:.2f} {shorten(label, _NAME)}" for share, label in image.labels)
        picture = element(
            "img", src=uri, width=width, height=height, alt=said, class_="thumb" if width > _FEW else "thumb pixels"
        )
        items.append(element("li", picture, *lines))
    intro = "Images of the first step, as the network saw them: cropped, flipped, augmented and mixed. "
    intro += "Below each, its label; where two images are mixed, both with their shares. "
    intro += f"The {views} views of an image follow each other." if views > 1 else ""
    return join(element("p", intro, class_="soft"), element("ul", *items, class_="cards"))


def scores_of(predicted: Predictions) -> Scores:
    assert predicted.labels is not None
    return metrics.scores(predicted.probs, predicted.labels)
