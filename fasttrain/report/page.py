"""`build`: one page about runs, in one file that loads nothing from elsewhere."""

import base64
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fasttrain import __version__
from fasttrain.data.index import Index
from fasttrain.distributed.ranks import ranks
from fasttrain.evaluation.metrics import NAMES, Scores, better
from fasttrain.evaluation.predictions import Predictions
from fasttrain.pipelines.plan import Plan
from fasttrain.report import answers, overview
from fasttrain.report.diagnosis import diagnose
from fasttrain.report.markup import Child, Html, element, join, name, shorten
from fasttrain.report.runs import (
    DEFAULTS,
    Images,
    Options,
    RunFolder,
    own_images,
    predictions_of,
    read_runs,
    val_changed,
)
from fasttrain.report.thumbnails import Thumbnails
from fasttrain.show_batch import seen
from fasttrain.utils.errors import CommandError, UserError
from fasttrain.utils.files import opened, replacing, require_writable_folder
from fasttrain.utils.text import printable

GENERATOR = "fasttrain report"
_MARK = f'<meta name="generator" content="{GENERATOR}">'
_MOST_SEEN = 12  # images of the batch
_NAME = 48  # characters of a run's name


class Evaluated(NamedTuple):
    """A run's answers to the images of an index."""

    images: Index
    predicted: Predictions
    scores: Scores


def build(runs: Sequence[Path], *, data: str | None = None, options: Options = DEFAULTS) -> str:
    """A page about runs, as HTML.

    runs: their folders. data: labeled images, as in `eval`; None: the validation images of the best run's recipe, where
    they are there. What cannot be shown is said on the page. Raises UserError where a folder holds no run, or `data`
    cannot be used.
    """
    with ranks(options.device):
        pass  # raises for a device that this machine does not have
    found = read_runs(runs)
    evaluated: dict[str, Evaluated] = {}
    if data is not None:
        evaluated = {run.name: _evaluate(run, data, None, options) for run in found}
    best = _best(found, {key: each.scores for key, each in evaluated.items()})
    own = own_images(best)
    missing = ""
    if data is None:
        result = _evaluate_own(best, own, options)
        if isinstance(result, Evaluated):
            evaluated[best.name] = result
        else:
            missing = result
            print(f"without answers to validation images: {printable(missing)}", file=sys.stderr)
    body = _body(found, best, own, evaluated, missing, on_common=data is not None)
    return _document(_title(found), body)


def _evaluate(run: RunFolder, data: str | None, val: Index | None, options: Options) -> Evaluated:
    print(f"evaluating {run.name}", file=sys.stderr)
    index, predicted = predictions_of(run, data, val, options)
    return Evaluated(index, predicted, answers.scores_of(predicted))


def _evaluate_own(run: RunFolder, images: Images, options: Options) -> "Evaluated | str":
    """A run's answers to its own validation images, or why there are none."""
    if images.val is None:
        return images.no_val
    if run.checkpoint is None:
        return "the run has no checkpoint that can be read"
    try:
        return _evaluate(run, None, images.val, options)
    except CommandError as error:
        return str(error)


def _best(runs: Sequence[RunFolder], scores: dict[str, Scores]) -> RunFolder:
    """The run with the best score by its criterion: over common images where there are scores of them, else by the
    log."""
    best, best_score = runs[0], None
    criterion = runs[0].recipe.evaluation.best
    for run in runs:
        logged = run.best_scores()
        score = getattr(scores[run.name], criterion) if scores else logged[1].get(criterion) if logged else None
        if better(score, best_score, criterion):
            best, best_score = run, score
    return best


def _title(runs: Sequence[RunFolder]) -> str:
    return shorten(runs[0].name, _NAME) if len(runs) == 1 else f"{len(runs)} runs"


def _body(
    runs: Sequence[RunFolder],
    best: RunFolder,
    images: Images,
    evaluated: dict[str, Evaluated],
    missing: str,
    *,
    on_common: bool,
) -> Html:
    several = len(runs) > 1
    names = [name(run.name, _NAME) for run in runs]
    best_name = name(best.name, _NAME)
    shown = evaluated.get(best.name)
    val_images = len(images.val) if images.val is not None else None
    sections: list[tuple[str, str, Html]] = []
    if several:
        scores = {key: each.scores.to_dict() for key, each in evaluated.items()} if on_common else {}
        source = "Scores: of each run's best evaluation in its log, on its own validation images."
        if on_common and shown:
            source = f"Scores: of the best checkpoints, on the same {len(shown.images):,} images."
        table = overview.runs_table(runs, names, scores)
        sections.append(("runs", "The runs side by side", join(element("p", source, class_="soft"), table)))
        sections.append(("differences", "Settings that differ", overview.differences(runs, names)))
    else:
        about = join(overview.facts(best, val_images), element("h3", "Settings that differ from the defaults"))
        sections.append(("about", "What was trained", join(about, overview.settings(best))))
    sections.append(("curves", "Curves", overview.curves(runs, names)))
    if shown:
        sections += _answers(best, shown, own_val=not on_common)
    else:
        text = join("Not shown: per-class scores, calibration, confusions and mistakes. ", shorten(missing, 400))
        sections.append(("answers", "Answers to validation images", element("p", text, class_="note")))
    sections.append(("batch", "A batch as the network saw it", _batch(best, images)))
    if several:
        parts = []
        for run, run_name in zip(runs, names, strict=True):
            about = join(overview.facts(run, val_images if run is best else None), overview.settings(run))
            parts.append(element("details", element("summary", run_name), about, open=run is best))
        sections.append(("about", "What was trained", join(*parts)))
    events = [
        join(element("h3", text) if several else None, overview.events(run))
        for run, text in zip(runs, names, strict=True)
    ]
    sections.append(("events", "Events", join(*events)))

    notes = [
        element("p", element("b", run_name, ": ") if several else None, f"Missing: {shorten(line, 400)}", class_="note")
        for run, run_name in zip(runs, names, strict=True)
        for line in run.missing
    ]
    if several:
        by = NAMES[runs[0].recipe.evaluation.best]
        about_best = element(
            "p", "Sections about images are of ", element("b", best_name), f", the best of the {len(runs)} runs by "
            f"{by}. For another run, make a page of it alone.", class_="lead",
        )  # fmt: skip
        head = join(element("h1", f"{len(runs)} runs"), about_best)
    else:
        head = join(element("h1", best_name), overview.sentence(best), overview.tiles(best))
    links = [element("a", title, href=f"#{key}") for key, title, _ in sections]
    header = element("header", head, *notes, element("nav", *links, aria_label="Sections"))
    body = [element("section", element("h2", title), content, id=key) for key, title, content in sections]
    made_by = f"Made by fasttrain {__version__}. This page is one file and loads nothing from elsewhere."
    return join(header, element("main", *body), element("footer", made_by))


def _answers(run: RunFolder, shown: Evaluated, *, own_val: bool) -> list[tuple[str, str, Html]]:
    """The sections about the answers of a run's best checkpoint."""
    index, predicted, scores = shown
    assert predicted.labels is not None
    found = diagnose(predicted.probs, predicted.labels, pairs=answers.MOST_PAIRS, images=answers.MOST_IMAGES)
    thumbnails = Thumbnails(index)
    classes = [str(each) for each in predicted.classes]
    step = run.meta.get("step")
    images = f"the run's own {len(index):,} validation images" if own_val else f"the {len(index):,} images of --data"
    after = f", after step {step:,}, " if isinstance(step, int) else " "
    intro: list[Child] = [element("b", name(run.name, _NAME)), f": its best checkpoint{after}on {images}."]
    parts: list[Child] = [element("p", *intro), answers.score_tiles(scores)]
    if own_val and val_changed(run, index):
        text = "These images differ from those that the run was validated on, so the scores differ from the log's."
        parts.append(element("p", text, class_="note"))
    return [
        ("answers", "Scores and calibration", join(*parts, answers.calibration(found, scores))),
        ("classes", "Classes", answers.per_class(scores, found, classes)),
        ("pairs", "Most confused pairs", answers.confused_pairs(found, predicted, thumbnails)),
        ("mistakes", "Most confident mistakes", answers.mistakes(found, predicted, thumbnails)),
        ("uncertain", "Least certain images", answers.uncertain(found, predicted, thumbnails)),
    ]


def _batch(run: RunFolder, images: Images) -> Html:
    """The first batch of a run, or why it cannot be drawn."""
    if images.train is None:
        return element("p", f"Not shown: {shorten(images.no_train, 400)}", class_="note")
    try:
        plan = Plan.of(run.recipe, images.train)
        return answers.batch(seen(plan, images.train, 0, max(1, _MOST_SEEN // plan.views_total)), plan.views_total)
    except CommandError as error:
        return element("p", f"Not shown: {shorten(str(error), 400)}", class_="note")


def _document(title: str, body: Html) -> str:
    """The whole file. Its policy allows this style sheet and this script, and pictures that are part of the page."""
    folder = Path(__file__).parent
    style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = join(
        element("meta", charset="utf-8"),
        Html(_MARK),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title} – fasttrain"),
        element("style", Html(style)),
    )
    whole = element("html", element("head", head), element("body", body, element("script", Html(script))), lang="en")
    return f"<!doctype html>\n{whole}\n"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def check_overwritable(path: Path) -> None:
    """Raises UserError where `path` does not end in .html, has no folder that can be written to, or exists and is no
    page made by `build`."""
    if path.suffix != ".html":
        raise UserError(f"{printable(path)}: a report is an HTML page; end the name in .html")
    require_writable_folder(path)
    if not path.exists():
        return
    try:
        with opened(path) as file:
            ours = _MARK.encode() in file.read(2048)
    except OSError:
        ours = False
    if not ours:
        raise UserError(f"{printable(path)} exists and is not a page made by fasttrain; name another file")


def write(path: Path, page: str) -> None:
    """Write a page atomically. Raises UserError like `check_overwritable`, RunError where it cannot be written."""
    check_overwritable(path)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
