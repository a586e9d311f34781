"""The Python API: `fit` trains like `fasttrain run`, and returns a `Run`; `load` opens one that is there.

Both are also `fasttrain.fit` and `fasttrain.load`. They read no command line, and write only the run's folder, caches,
and what trackers keep. What is wrong is raised: `UserError` for arguments, settings and files, `RunError` where
training cannot go on, and `Stopped` after a signal. Their messages name options as the command line does: `--lr` is
`lr`.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fasttrain.checkpoints import checkpoint, meta
from fasttrain.config.schema import Recipe
from fasttrain.data.index import Index
from fasttrain.data.open_data import open_labeled, open_unlabeled
from fasttrain.data.scan import Limits
from fasttrain.distributed.ranks import ranks
from fasttrain.evaluation import metrics
from fasttrain.evaluation.metrics import Scores
from fasttrain.evaluation.predictions import Predictions
from fasttrain.export import export
from fasttrain.export.parity import Parity
from fasttrain.launch import open_run_data, recipe_of, train_run
from fasttrain.predict import predict
from fasttrain.prepare import resolve_auto
from fasttrain.report import page
from fasttrain.report.run_log import read_log
from fasttrain.report.runs import read_recipe
from fasttrain.utils.errors import UserError
from fasttrain.utils.progress_bar import in_notebook

if TYPE_CHECKING:
    import pandas

PathName = str | os.PathLike[str]
Device = Literal["auto", "cpu", "cuda"]


def fit(
    arch: str | None = None,
    *,
    recipe: PathName | Recipe | None = None,
    data: PathName | Iterable[PathName] | None = None,
    val: PathName | None = None,
    out: PathName | None = None,
    loss: str | None = None,
    init: PathName | None = None,
    epochs: int | None = None,
    budget: str | None = None,
    until: str | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    settings: Mapping[str, object] | None = None,
    on_bad: str | None = None,
    links: str | None = None,
    device: Device | None = None,
    workers: int | None = None,
    compile: bool | None = None,
    track: str | Iterable[str] | None = None,
    resume: PathName = "auto",
) -> "Run":
    """Train a network, and return its run.

    The arguments are the options of `fasttrain run`, with the same defaults: `fit("resnet50", data="DIR", epochs=5)` is
    `fasttrain run --arch resnet50 --data DIR --epochs 5`.

    arch: timm's name of a network; recipe: a recipe, its name or its TOML file, instead. data: folders or files of
    training images; none: the demo set. out: the run's folder; by default runs/<recipe>. budget, until: a time such as
    "2h" or "18:30" instead of epochs. settings: other settings by name, such as {"optim.weight_decay": 5e-5}, as in
    --set. track: trackers such as "wandb:PROJECT". resume: "auto" resumes a run that is in the folder already, and
    returns it where it is complete; "never" starts over and renames the old folder; or a checkpoint to resume from.
    --folds, --fold and --dry-run are for the command only.

    Under torchrun every rank calls this with the same arguments.
    """
    if not isinstance(compile, bool | None):
        raise UserError(f"compile must be True, False or None, not {compile!r}")
    for name, text in (("arch", arch), ("loss", loss), ("budget", budget), ("until", until)):
        if not isinstance(text, str | None):
            raise UserError(f"{name} must be a string, not {text!r}")
    chosen, _ = recipe_of(
        arch=arch,
        recipe_name=recipe if isinstance(recipe, Recipe) else _name(recipe),
        loss=loss,
        init=_name(init),
        data=[os.fspath(each) for each in ([data] if isinstance(data, str | os.PathLike) else data or ())],
        val=_name(val),
        on_bad=on_bad,
        links=links,
        epochs=epochs,
        budget=budget,
        until=until,
        batch_size=batch_size,
        image_size=image_size,
        lr=lr,
        seed=seed,
        settings=(settings or {}).items(),
        device=device,
        workers=workers,
        compiled=compile,
        track=[track] if isinstance(track, str) else track or (),
    )
    folder = Path(out or Path("runs", chosen.name))
    with ranks(chosen.machine.device, chosen.machine.hang_timeout) as rank:
        chosen = resolve_auto(chosen, rank.device)
        train_run(chosen, folder, open_run_data(chosen, folder, rank), os.fspath(resume), rank)
    return Run(folder.absolute())


def load(path: PathName) -> "Run":
    """Open a run's folder. Raises UserError where it holds no run with a recipe and a checkpoint."""
    run = Run(Path(path).absolute())
    checkpoint.find(run.path)
    read_recipe(run.path)
    return run


def _name(path: PathName | None) -> str | None:
    return None if path is None else os.fspath(path)


@dataclass(frozen=True)
class Run:
    """A run in its folder `path`. Everything is read from the files when it is asked for."""

    path: Path

    @property
    def recipe(self) -> Recipe:
        """All settings of the run."""
        return read_recipe(self.path)[0]

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the network's outputs."""
        return list(self._meta()["classes"])

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the best checkpoint on the validation images, by name: `top1`, `top5`, `log_loss`, … Empty
        where the run has no validation images."""
        return dict(self._meta().get("scores") or {})

    @property
    def log(self) -> "pandas.DataFrame | list[dict[str, Any]]":
        """The log's training and evaluation lines, without those of steps that were done again after the run resumed
        from before them. A DataFrame where pandas is installed, with columns such as `terms.cross_entropy`; otherwise a
        list of dicts."""
        rows = [row for row in read_log(self.path) if row["event"] in ("train", "eval")]
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.json_normalize(rows)

    def evaluate(self, data: PathName, *, device: Device = "auto", **options: Any) -> Scores:
        """The scores of the best checkpoint on labeled images, a folder or a file as in `fit`. options: those of
        `fasttrain.predict.predict`, such as views="report" or batch_size=128."""
        predicted = self._predict(lambda recipe, classes: self._labeled(data, recipe, classes), device, options)
        assert predicted.labels is not None
        return metrics.scores(predicted.probs, predicted.labels)

    def predict(self, images: PathName, *, device: Device = "auto", **options: Any) -> Predictions:
        """The best checkpoint's probabilities for all images in a folder and its folders, or in a file. options: those
        of `fasttrain.predict.predict`, such as views="report" or batch_size=128."""
        return self._predict(
            lambda recipe, _: open_unlabeled(os.fspath(images), Limits.of(recipe.data)), device, options
        )

    def export(self, to: PathName, **options: Any) -> Parity:
        """Write the best checkpoint's network to a file for other programs, and return how it compares. options: those
        of `fasttrain.export.export.export`, such as takes_pixels=True."""
        return export.export(self.path, Path(to), **options)

    def report(self, out: PathName) -> Path:
        """Write the run's report, one HTML file, and return its path."""
        page.write(Path(out), page.build([self.path]))
        return Path(out)

    def show(self) -> None:
        """Show the run's report: in a notebook below the cell; elsewhere write it to report.html in the run's folder,
        and print its path."""
        if not in_notebook():
            print(self.report(self.path / "report.html"))
            return
        from html import escape

        from IPython.display import display

        frame = '<iframe srcdoc="{}" style="width: 100%; height: 48rem; border: 0" sandbox="allow-scripts"></iframe>'
        display({"text/html": frame.format(escape(page.build([self.path])))}, raw=True)

    def _labeled(self, data: PathName, recipe: Recipe, classes: list[str]) -> Index:
        return open_labeled(os.fspath(data), classes, self.path, Limits.of(recipe.data))

    def _predict(self, open_index: Any, device: Device, options: dict[str, Any]) -> Predictions:
        with ranks(device) as rank:
            predicted = predict(self.path, open_index, rank, **options)
        if predicted is None:
            raise UserError("only rank 0 has predictions; make them without torchrun")
        return predicted

    def _meta(self) -> dict[str, Any]:
        return meta.read(checkpoint.find(self.path))
