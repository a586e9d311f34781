"""The page's parts that come from settings and logs: what was trained, the curves, the events."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fasttrain.config import toml
from fasttrain.config.schema import Recipe
from fasttrain.evaluation.metrics import NAMES, better
from fasttrain.report import run_log
from fasttrain.report.charts import COLORS, DASHES, Mark, Series, figure, line_chart, percent
from fasttrain.report.markup import Child, Html, cell, element, join, name, shorten, table
from fasttrain.report.run_log import Row, curve, number, step_of
from fasttrain.report.runs import RunFolder, changed_settings, differing, setting
from fasttrain.training.log import describe

_MOST_TERMS = 16  # charts of losses' terms and stats
_MOST_EVENTS = 40  # of a kind that are listed, the first and the last ones
_VALUE = 160  # characters of a setting's value
_NO_EVENTS = ("train", "eval", "checkpoint", "batch")  # they are drawn, or say nothing to a reader


def score_text(criterion: str, value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.3f}" if criterion == "log_loss" else f"{value:.2%}"


def rate(run: RunFolder) -> float | None:
    """The median of the logged images per second; the first log point, which has the start in it, counts only if it is
    the only one."""
    rates = [value for _, value in curve(run.rows, "train", "images_per_s")]
    return statistics.median(rates[1:] or rates) if rates else None


def steps_done(run: RunFolder) -> int | None:
    return max((step for row in run.rows if (step := step_of(row)) is not None), default=None)


def started(run: RunFolder) -> Row:
    """The event that started the run's last command; empty where the log has none."""
    return next((row for row in reversed(run.rows) if row["event"] in ("start", "resume")), {"event": ""})


def tiles(run: RunFolder) -> Html:
    """The run's main figures."""
    best, found = run.best_scores(), list[tuple[str, str, str]]()
    if best:
        step, scores = best
        for criterion in dict.fromkeys((run.recipe.evaluation.best, "top1", "log_loss", "calibration_error")):
            if criterion in scores:
                found.append((f"best {NAMES[criterion]}" if not found else NAMES[criterion],
                              score_text(criterion, scores[criterion]), f"after step {step:,}"))  # fmt: skip
    if seconds := run_log.total(run.all_rows, "seconds"):
        found.append(("training time", describe(seconds), _commands(run)))
    if speed := rate(run):
        found.append(("throughput", f"{speed:,.0f} img/s", "median of the log"))
    if joules := run_log.total(run.all_rows, "joules"):
        found.append(("GPU energy", energy(joules), "by NVML's counter"))
    return _tiles(found)


def _tiles(found: Sequence[tuple[str, str, str]]) -> Html:
    if not found:
        return Html("")
    return element(
        "dl",
        [
            element("div", element("dt", title), element("dd", value, element("small", of)))
            for title, value, of in found
        ],
        class_="tiles",
    )


def energy(joules: float) -> str:
    return f"{joules / 3600:,.1f} Wh" if joules < 3.6e6 else f"{joules / 3.6e6:,.2f} kWh"


def _commands(run: RunFolder) -> str:
    count = sum(row["event"] in ("end", "stopped") and number(row.get("seconds")) is not None for row in run.all_rows)
    starts = sum(row["event"] in ("start", "resume") and "rewinds" not in row for row in run.all_rows)
    if starts > count:
        return f"of {count} of {starts} commands; others were killed"
    return "of one command" if count == 1 else f"of {count} commands"


def sentence(run: RunFolder) -> Html:
    """One sentence: what was trained, on what, how long."""
    start, done = started(run), steps_done(run)
    images, planned = number(start.get("images")), number(start.get("steps"))
    parts: list[Child] = [element("b", name(run.recipe.arch)), f" at {run.recipe.image_size} px"]
    if run.classes:
        parts.append(f", {len(run.classes):,} classes")
    if images:
        parts.append(f", {images:,.0f} training images")
    if done is not None:
        parts.append(f", {done:,} steps" + (f" of {planned:,.0f}" if planned and planned != done else ""))
    parts.append(f" of {run.recipe.batch_size} images")
    if hardware := _hardware(start):
        parts += [", on ", name(hardware)]
    return element("p", *parts, ".", class_="lead")


def _hardware(start: Row) -> str:
    """The GPUs or the CPU that a log's start names."""
    gpus = start.get("gpus")
    if isinstance(gpus, list) and gpus and all(isinstance(gpu, str) for gpu in gpus):
        kinds = dict.fromkeys(gpus)
        return ", ".join(f"{gpus.count(kind)} × {kind}" if gpus.count(kind) > 1 else kind for kind in kinds)
    device, cpu, world = start.get("device"), start.get("cpu"), number(start.get("world")) or 1
    if isinstance(device, str) and device != "cpu":
        return f"{world:.0f} × {device}" if world > 1 else device
    model = cpu.get("model") if isinstance(cpu, dict) else None
    return f"the CPU ({model})" if isinstance(model, str) else "the CPU" if device == "cpu" else ""


def facts(run: RunFolder, val_images: int | None) -> Html:
    """What a run was trained on, with what, and where."""
    start, data = started(run), run.recipe.data
    rows: list[tuple[str, Child]] = [("folder", element("span", name(str(run.folder), 160), class_="path"))]
    rows.append(("trained on", [[element("span", name(each, 160), class_="path"), element("br")] for each in data.train]
                 or "not in the recipe"))  # fmt: skip
    images = number(start.get("images"))
    counted = [f"{images:,.0f} training images"] if images is not None else []
    counted += [f"{val_images:,} validation images"] if val_images is not None else []
    counted += [f"{len(run.classes):,} classes"] if run.classes else []
    rows.append(("images", ", ".join(counted) or "not in the log"))
    if data.folds:
        rows.append(("validated on", f"fold {data.fold} of {data.folds} of the training images"))
    elif data.val:
        rows.append(("validated on", element("span", name(data.val, 160), class_="path")))
    cpu = start.get("cpu")
    machine = [hardware] if (hardware := _hardware(start)) else []
    if isinstance(cpu, dict) and isinstance(cpu.get("model"), str):
        cores = number(cpu.get("cores"))
        machine = [each for each in machine if not each.startswith("the CPU")]
        machine.append(f"CPU {cpu['model']}" + (f", {cores:.0f} cores" if cores else ""))
    if (world := number(start.get("world"))) and world > 1:
        machine.append(f"{world:.0f} ranks")
    if machine:
        rows.append(("hardware", name("; ".join(machine), 200)))
    versions = start.get("versions")
    if isinstance(versions, dict):
        listed = ", ".join(f"{key} {value}" for key, value in versions.items() if isinstance(value, str))
        rows.append(("versions", name(listed, 300)))
    rows.append(("precision", f"{run.recipe.precision}, compile {run.recipe.machine.compile}"))
    if (log := run.folder / run_log.LOG).is_file():
        written = datetime.fromtimestamp(log.stat().st_mtime, UTC)
        rows.append(("last logged", f"{written:%Y-%m-%d %H:%M} UTC"))
    return element("dl", [(element("dt", key), element("dd", value)) for key, value in rows], class_="facts")


def documentation(recipe: Recipe) -> dict[str, str]:
    """What each setting means, by dotted key."""
    parts: dict[str, Any] = {f"losses.{loss.name}.": type(loss) for loss in recipe.losses}
    parts |= {f"{part}.": type(value) for part, value in vars(recipe).items() if dataclasses.is_dataclass(value)}
    parts[""] = Recipe
    return {f"{part}{key}": text for part, cls in parts.items() for key, text in toml.field_docs(cls).items()}


def settings(run: RunFolder) -> Html:
    """The settings that differ from the defaults, and the whole recipe."""
    docs = documentation(run.recipe)
    changed = {key: pair for key, pair in changed_settings(run.recipe).items() if key not in ("data.train", "data.val")}
    rows = [
        (
            cell(element("code", shorten(key)), kind="head"),
            cell(name(setting(value), _VALUE), kind="value"),
            cell(name(setting(default), _VALUE), kind="value"),
            cell(docs.get(key), kind="doc"),
        )
        for key, (value, default) in changed.items()
    ]
    whole = element("details", element("summary", "The whole recipe.toml"), element("pre", run.recipe_text, dir="ltr"))
    if not rows:
        return join(element("p", "All settings have their defaults."), whole)
    return join(table(("setting", "this run", "default", "meaning"), rows, title="Settings"), whole)


def runs_table(runs: Sequence[RunFolder], names: Sequence[Html], evaluated: dict[str, dict[str, float]]) -> Html:
    """The runs side by side. evaluated: scores over common images by the run's name; else those of the log count."""
    of_runs = [(evaluated.get(run.name), run.best_scores()) for run in runs]
    scores = [found if found is not None else logged[1] if logged else {} for found, logged in of_runs]
    shown = [criterion for criterion in NAMES if any(criterion in each for each in scores)]
    counted = any(run_log.total(run.all_rows, "joules") is not None for run in runs)
    best: dict[str, float | None] = {}
    for criterion in shown:
        for each in scores:
            value = each.get(criterion)
            best[criterion] = value if better(value, best.get(criterion), criterion) else best.get(criterion)
    rows = []
    for run, run_name, (_, logged), own in zip(runs, names, of_runs, scores, strict=True):
        cells = [cell(run_name, run.name, kind="head")]
        for criterion in shown:
            value = own.get(criterion)
            text: Child = score_text(criterion, value)
            cells.append(cell(element("span", text, class_="best") if value == best[criterion] else text, _key(value)))
        step = logged[0] if logged else None
        seconds, speed = run_log.total(run.all_rows, "seconds"), rate(run)
        joules = run_log.total(run.all_rows, "joules")
        done = steps_done(run)
        cells.append(cell("—" if step is None else f"{step:,}", _key(step)))
        cells.append(cell("—" if done is None else f"{done:,}", _key(done)))
        cells.append(cell("—" if seconds is None else describe(seconds), _key(seconds)))
        cells.append(cell("—" if speed is None else f"{speed:,.0f}", _key(speed)))
        if counted:
            cells.append(cell("—" if joules is None else energy(joules), _key(joules)))
        rows.append(cells)
    heads = [*(NAMES[criterion] for criterion in shown), "best step", "steps", "time", "img/s"] + ["energy"] * counted
    return table(("run", *heads), rows, title="Runs", right=range(1, 1 + len(heads)), sortable=True)


def _key(value: float | None) -> float | str:
    return "" if value is None else float(value)


def differences(runs: Sequence[RunFolder], names: Sequence[Html]) -> Html:
    """The settings in which the runs differ."""
    docs: dict[str, str] = {}
    for run in runs:
        docs |= documentation(run.recipe)
    rows = [
        (
            cell(element("code", shorten(key)), kind="head"),
            *(cell(name(setting(value), _VALUE), kind="value") for value in values),
            cell(docs.get(key), kind="doc"),
        )
        for key, values in differing([run.recipe for run in runs]).items()
    ]
    if not rows:
        return element("p", "The runs have the same settings.")
    return table(("setting", *names, "meaning"), rows, title="Settings that differ")


def legend(names: Sequence[Html]) -> Html:
    """Which color is which run."""
    items = []
    for number_, text in enumerate(names):
        dash = DASHES[number_ // COLORS % len(DASHES)]
        line = element("line", x1=1, x2=25, y1=4, y2=4, class_=f"line c{number_ % COLORS}", stroke_dasharray=dash)
        items.append(element("li", element("svg", line, viewBox="0 0 26 8", aria_hidden="true"), text))
    return element("ul", *items, class_="legend")


def curves(runs: Sequence[RunFolder], names: Sequence[Html]) -> Html:
    """Losses, the learning rate and scores by step: the main ones, and the others in a folded part."""
    several = len(runs) > 1
    marks = [] if several else _marks(runs[0])

    def chart(title: Child, spoken: str, event: str, *keys: str, form: Any = figure, zero: bool = False) -> Html:
        series = [Series(run.name, curve(run.rows, event, *keys), color) for color, run in enumerate(runs)]
        return _figure(title, line_chart(spoken, series, y_format=form, zero=zero, marks=marks))

    def score(criterion: str) -> Html:
        form = figure if criterion == "log_loss" else percent
        series, below = [], Html("")
        for color, run in enumerate(runs):
            raw, averaged = curve(run.rows, "eval", criterion), curve(run.rows, "eval", "ema", criterion)
            if averaged and not several:
                series = [Series("averaged weights", averaged, 0), Series("raw weights", raw, 1)]
                below = legend([join("averaged weights"), join("raw weights")])
            else:
                series.append(Series(run.name, averaged or raw, color))
        title = f"{NAMES[criterion]}, validation"
        return _figure(title, line_chart(title, series, y_format=form, marks=marks), below)

    terms = run_log.names([row for run in runs for row in run.rows], "train", "terms")
    stats = run_log.names([row for run in runs for row in run.rows], "train", "stats")
    alone = len(terms) == 1 and all(
        curve(run.rows, "train", "terms", terms[0]) == curve(run.rows, "train", "loss") for run in runs
    )
    main = [chart("loss, training", "training loss", "train", "loss")]
    if not alone:
        main += [
            chart(["loss term ", name(term, 40)], f"loss term {shorten(term, 40)}", "train", "terms", term)
            for term in terms[:_MOST_TERMS]
        ]
    main += [score("top1"), score("log_loss"), chart("learning rate", "learning rate", "train", "lr", zero=True)]
    main += [score("calibration_error")]
    more = [score(criterion) for criterion in NAMES if criterion not in ("top1", "log_loss", "calibration_error")]
    more += [
        chart("images per second", "images per second", "train", "images_per_s", zero=True),
        chart("norm of the gradient", "norm of the gradient", "train", "grad_norm"),
        chart("GPU memory, GiB", "GPU memory in GiB", "train", "memory_gib"),
    ]
    more += [chart(name(stat, 40), shorten(stat, 40), "train", "stats", stat) for stat in stats[:_MOST_TERMS]]
    main, more = [each for each in main if each], [each for each in more if each]
    if not main and not more:
        return element("p", "The log has no curves.", class_="note")
    parts = [legend(names)] if several else []
    parts.append(element("div", *main, class_="charts"))
    if marks:
        parts.append(element("p", "Dotted vertical lines: where the run resumed or went back.", class_="soft"))
    if more:
        parts.append(
            element("details", element("summary", f"{len(more)} more curves"), element("div", *more, class_="charts"))
        )
    left_out = max(0, len(terms) - _MOST_TERMS) + max(0, len(stats) - _MOST_TERMS)
    if left_out:
        parts.append(element("p", f"{left_out} more terms are in the log.", class_="soft"))
    return join(*parts)


def _figure(title: Child, chart: Html, below: Html | None = None) -> Html:
    return element("figure", element("figcaption", title), chart, below or None) if chart else Html("")


def _marks(run: RunFolder) -> list[Mark]:
    return [
        Mark(step, _what(row)) for row in run.rows if run_log.starts_attempt(row) and (step := step_of(row) or 0) > 0
    ][-_MOST_EVENTS:]


def events(run: RunFolder) -> Html:
    """What happened in a run, besides training and evaluating; also in attempts that were abandoned."""
    kept = {id(row) for row in run.rows}
    kinds: dict[str, list[Row]] = {}
    for row in run.all_rows:
        if row["event"] not in _NO_EVENTS:
            kinds.setdefault(row["event"], []).append(row)
    half, cut, shown = _MOST_EVENTS // 2, dict[str, int](), set[int]()
    for kind, found in kinds.items():
        chosen = found if len(found) <= _MOST_EVENTS else [*found[:half], *found[-half:]]
        cut |= {kind: len(found) - len(chosen)} if len(chosen) < len(found) else {}
        shown |= {id(row) for row in chosen}
    rows: list[tuple[Html, ...]] = []
    for row in run.all_rows:
        if id(row) not in shown or len(rows) >= 10 * _MOST_EVENTS:
            continue
        step = step_of(row)
        abandoned = None if id(row) in kept else element("span", " (of an abandoned attempt)", class_="soft")
        rows.append(
            (
                cell("" if step is None else f"{step:,}", "" if step is None else float(step)),
                cell(name(row["event"].replace("_", " "), 30), kind=None),
                cell([name(_what(row), 400), abandoned], kind="wide"),
            )
        )
    parts = [table(("step", "event", "what"), rows, title="Events", right=(0,))]
    if cut:
        counts = ", ".join(f"{count} × {shorten(kind, 30)}" for kind, count in cut.items())
        parts.append(element("p", f"Left out: {counts}; log.jsonl has them.", class_="soft"))
    if run.damaged:
        text = f"{run.damaged} lines of log.jsonl cannot be read (cut in half, or no events) and are left out."
        parts.append(element("p", text, class_="note"))
    return join(*parts)


def _what(row: Row) -> str:
    """An event in words. Values may be of any type, since a log is untrusted."""
    kind = row["event"]
    match kind:
        case "start":
            return f"started; {row.get('steps') or 'as many as fit'} steps planned"
        case "resume" if "rewinds" in row:
            return f"went back to step {row.get('step')} after steps that were not finite (rewind {row['rewinds']})"
        case "resume":
            changed = row.get("changed")
            changes = f", with changes: {'; '.join(map(str, changed))}" if isinstance(changed, list) else ""
            return f"resumed after step {row.get('step')}{changes}"
        case "rewind":
            return f"went back to step {row.get('step')}"
        case "stopped":
            return f"stopped by {row.get('signal') or 'a signal'} and saved{_used(row)}"
        case "end":
            best = number(row.get("best"))
            return "complete" + (f"; best score {best:.4f}" if best is not None else "") + _used(row)
        case "note":
            return str(row.get("text"))
        case "skip":
            return f"{row.get('path')}: {row.get('reason')}; instead: {row.get('instead')}"
        case "not_finite":
            steps = row.get("steps")
            listed = (
                [str(each.get("step")) for each in steps if isinstance(each, dict)] if isinstance(steps, list) else []
            )
            more = ", …" if len(listed) > 10 else ""
            return f"loss or gradient not finite in step {', '.join(listed[:10])}{more}, which changed nothing"
        case "collapsed":
            return f"{row.get('loss')} has collapsed in epoch {row.get('epoch')}: its mean stayed at the margin"
        case "fitted":
            left = number(row.get("seconds_left"))
            return f"{row.get('steps')} steps fit into the time" + (f"; {describe(left)} were left" if left else "")
        case "save_failed":
            return f"a checkpoint could not be written: {row.get('reason')}"
    return json.dumps({key: value for key, value in row.items() if key not in ("event", "step")}, ensure_ascii=False)


def _used(row: Row) -> str:
    seconds, joules = number(row.get("seconds")), number(row.get("joules"))
    text = f"; {describe(seconds)}" if seconds is not None else ""
    return text + (f", {energy(joules)}" if joules is not None else "")
