"""Write the tables of scripts/results/README.md from the results in that folder: python scripts/readme_tables.py

The text between `<!-- NAME -->` and `<!-- end -->` is made from all results NAME-*.json (`fasttrain bench NAME
--json`), each under a line that says where and when it was measured. `<!-- gpu -->` is made from gpu/*.json, which
scripts/gpu/slot.py writes.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OWN = "fasttrain"
Rows = list[dict[str, Any]]


def by_case(rows: Rows) -> dict[str, Rows]:
    """The rows of each case, in their order."""
    cases: dict[str, Rows] = {}
    for row in rows:
        cases.setdefault(f"{row['work']} {row['case']}", []).append(row)
    return cases


def grid(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def kernels(rows: Rows) -> str:
    """One line per case: fasttrain's milliseconds, and how many times as long each other contender takes; also for the
    time of the kernels on the GPU alone, where it was measured."""
    lines = []
    for case, (own, *others) in by_case(rows).items():
        ratios = [f"{row['contender']} {row['seconds'] / own['seconds']:.1f}x{_on_gpu(row, own)}" for row in others]
        on_gpu = f" (GPU {own['gpu_seconds'] * 1e3:.3f})" if "gpu_seconds" in own else ""
        lines.append(
            [case, f"{own['seconds'] * 1e3:.{1 if own['seconds'] > 1e-3 else 3}f} ms{on_gpu}", ", ".join(ratios)]
        )
    return grid(["work", OWN, "others"], lines)


def _on_gpu(row: dict[str, Any], own: dict[str, Any]) -> str:
    both = row.get("gpu_seconds"), own.get("gpu_seconds")
    return f" (GPU {both[0] / both[1]:.1f}x)" if all(both) else ""


def pipeline(rows: Rows) -> str:
    """One line per case: images per second of each loader; and below, where measured, the stages' microseconds."""
    whole = by_case([row for row in rows if row["work"] == "pipeline"])
    stages = by_case([row for row in rows if row["work"] == "stages"])
    grids = [_column_per_contender(whole, _rate, "batch")]
    if stages:
        grids.append(_column_per_contender(stages, lambda row: f"{row['us_per_image']:.0f} µs", "time per image"))
    return "\n\n".join(grids)


def _rate(row: dict[str, Any]) -> str:
    """Images per second, with the slowest and the fastest round."""
    slowest, fastest = (row["images"] / row[key] for key in ("most", "least"))
    return f"{row['images_per_s']:.0f} img/s ({slowest:.0f} … {fastest:.0f})"


def _column_per_contender(cases: dict[str, Rows], cell: Any, title: str) -> str:
    names = [row["contender"] for row in max(cases.values(), key=len)]  # a case may lack a contender
    lines = []
    for rows in cases.values():
        cells = {row["contender"]: cell(row) for row in rows}
        lines.append([rows[0]["case"], *(cells.get(name, "") for name in names)])
    return grid([title, *names], lines)


def contenders(rows: Rows) -> str:
    """One row per contender: its time with the spread, its rate and other figures; then the comparison with the fastest
    peer."""
    titles = {"eta": "η", "host_ms": "host, ms", "peak_gib": "memory, GiB"}
    extra = [key for key in titles if any(key in row for row in rows)]
    rates = any(row["images"] for row in rows)
    lines, best = [], []
    for case, inside in by_case(rows).items():
        own = inside[0]["seconds"]
        if "best_peer" in inside[0]:
            ratio = f"{inside[0]['x_best_peer']:.2f} times as fast as the fastest peer, {inside[0]['best_peer']}"
            best.append(f"{case.partition(' ')[2]}: {ratio}")
        digits = 1 if own > 0.01 else 2
        for number, row in enumerate(inside):
            middle, least, most = (f"{row[key] * 1e3:.{digits}f}" for key in ("seconds", "least", "most"))
            spread = f"{middle} ({least} … {most})"
            rate = [f"{row['images_per_s']:.0f}" if row["images"] else ""] if rates else []
            more = [f"{row[key]:.2f}" if key in row else "" for key in extra]
            title = "" if number else case.partition(" ")[2]
            lines.append([title, row["contender"], spread, *rate, f"{row['seconds'] / own:.2f}", *more])
    head = [
        "",
        "contender",
        "ms per step",
        *(["img/s"] if rates else []),
        f"time / {OWN}'s",
        *(titles[key] for key in extra),
    ]
    return "\n\n".join([grid(head, lines), *best])


def save(rows: Rows) -> str:
    """One line per network: seconds of a save."""
    lines = []
    for row in rows:
        medians = {name: f"{statistics.median(times):.2f} s" for name, times in row["seconds"].items()}
        cells = [medians[name] for name in ("held", "written by the thread", "torch.save")]
        lines.append([f"`{row['arch']}`", f"{row['bytes'] / 1e6:.0f} MB", *cells])
    return grid(["network", "checkpoint", "loop waits", "thread writes", "`torch.save`"], lines)


def ablation(rows: Rows) -> str:
    """One line per step: top-1, and its gain over the step that it is compared with."""
    lines = []
    for row in rows:
        lines.append([*_score_and_gain(row), row.get("beside", "")])
    return grid(["recipe", "top-1, %", "gain, points", "compared with"], lines)


def seeds(rows: Rows) -> str:
    """One line per arm of scripts/seeds.py: its score, and its gain over the first."""
    return grid(["settings", "score, %", "gain, points"], [_score_and_gain(row) for row in rows])


def _score_and_gain(row: dict[str, Any]) -> list[str]:
    """The title, score and gain of an entry of scripts/paired.py, each with its interval."""
    score = f"{100 * row['mean']:.1f} ± {100 * row['interval']:.1f}"
    gain = f"{100 * row['gain']:+.1f} ± {100 * row['gain_interval']:.1f}" if "gain" in row else ""
    return [row["title"], score, gain]


def loop(rows: Rows) -> str:
    """One row per batch size: milliseconds of the host."""
    titles = {
        "allowed_ms": "a step at 2,500 img/s",
        "main_thread_ms": "main thread, without the network",
        "dali_run_ms": "of which DALI's run",
        "stage_ms": "labels, mix parameters",
        "step_ms": "step of one parameter",
        "source_ms": "draws, in another thread",
    }
    lines = [[str(row["batch"]), *(f"{row[key]:.2f} ms" for key in titles)] for row in rows]
    return grid(["batch", *titles.values()], lines)


def containers(rows: Rows) -> str:
    """One line per kind of pack: its size, how fast it is made, and what it changes."""
    titles = ["", "320 photographs", "VIPriors", "packed", "Pillow alone", "difference, of 255", "crops enlarged"]
    lines = []
    for row in rows:
        keys = ("images_per_s", "pillow_images_per_s")
        packed, pillow = (f"{row[key]:.0f} img/s" if key in row else "" for key in keys)
        mean, most = row.get("mean_difference"), row.get("max_difference")
        difference = "" if mean is None else f"{mean:.2f}, at most {most:.0f}"
        crops = f"{row['enlarged_share']:.0%}, {row['enlarged_factor']:.2f} times"
        sizes = [f"{row['mb']:.1f} MB", f"{row['gb_of_vipriors']:.1f} GB"]
        lines.append([row["kind"], *sizes, packed, pillow, difference, crops])
    return grid(titles, lines)


def traffic(rows: Rows) -> str:
    """One line per network: what its step moves per image, and the share of each kind of operation."""
    kinds = list(rows[0]["shares"])
    lines = []
    for row in rows:
        amounts = [f"{row['mib_an_image']:.0f} MiB", f"{row['gmac_an_image']:.0f} GMAC"]
        lines.append([f"`{row['arch']}`", *amounts, *(f"{row['shares'][kind]:.0%}" for kind in kinds)])
    return grid(["per image, forward and backward", "moved", "computed", *kinds], lines)


def decoders(rows: Rows) -> str:
    """One row per decoder, as `fasttrain doctor --gpu` tried it."""
    lines = []
    for row in rows:
        if row["status"]:
            lines.append([f"`{row['kind']}`", "", "", "", f"ended: {row['reason'] or row['status']}"])
            continue
        same = "yes" if row["same"] else "**no**"
        lines.append([f"`{row['kind']}`", f"{row['images_per_s']:.0f}", same, f"{row['mean']:.3f}", f"{row['most']}"])
    return grid(["decoder", "img/s", "same pixels each time", "mean difference to `cpu`, of 255", "largest"], lines)


def main_job(rows: Rows) -> str:
    """The rate of a run by its log, without the first log point, which includes compilation."""
    rates = [row["images_per_s"] for row in rows[1:]]
    spread = f"{statistics.median(rates):.0f} ({min(rates):.0f} … {max(rates):.0f})"
    memory = rows[-1]["memory_gib"]
    cells = [str(rows[-1]["step"]), spread, "" if memory is None else f"{memory:.1f}"]
    return grid(["steps", "img/s in the log", "memory, GiB"], [cells])


def tests(rows: Rows) -> str:
    """One row per test file."""
    return grid(
        ["tests", "passed", "failed", "skipped", "seconds"],
        [[f"`{row['file']}`", *(str(row[key]) for key in ("passed", "failed", "skipped", "seconds"))] for row in rows],
    )


def proof(rows: Rows) -> str:
    """One row per model."""
    lines = []
    for row in rows:
        views, epochs = row.get("top1_16_views"), row["epochs"] or ""
        best = [f"{100 * row['top1']:.1f}", f"{row['seconds']:.0f} s"] if "top1" in row else ["", ""]
        lines.append([row["model"], str(epochs), *best, f"{100 * views:.1f}" if views is not None else ""])
    return grid(["model", "epochs", "best top-1, %", "reached after", "with 16 views, %"], lines)


def plain(rows: Rows) -> str:
    """One row per result, one column per value."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return grid(names, [[_short(row.get(name)) for name in names] for row in rows])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)[:200].replace("|", "/")


TABLES = {
    "kernels": kernels,
    "pipeline": pipeline,
    "packs": pipeline,
    "containers": containers,
    "step": contenders,
    "host": contenders,
    "train": contenders,
    "ablation": ablation,
    "noise": ablation,
    "long-tail": seeds,
    "small-data": seeds,
    "tuned": seeds,
    "save": save,
    "loop": loop,
    "traffic": traffic,
}
# For the parts of scripts/gpu/slot.py, by the start of their names.
GPU_PARTS = {**TABLES, "decoders": decoders, "main": main_job, "tests": tests, "proof": proof}


def caption(results: dict[str, Any]) -> str:
    """One line that says where, how often and when something was measured; empty where the results do not say."""
    if "device" not in results:
        return ""
    clocks = results.get("clocks_mhz") or {}
    settings = results.get("settings", {})
    rounds = {row["n"] for row in results["rows"] if "n" in row}
    facts = [
        results.get("title", ""),
        {"top1": "top-1", "balanced_accuracy": "balanced accuracy"}.get(results.get("score", ""), ""),
        f"seeds: {len(results['seeds'])}" if "seeds" in results else "",
        results["device"],
        " and ".join(f"{name} {mhz:.0f} MHz" for name, mhz in clocks.items() if name in ("cpu", "sm")),
        results["processor"] if results.get("processor") not in (None, results["device"]) else "",
        f"workers: {settings['workers']}" if "workers" in settings else "",
        f"torch threads: {results['threads']}" if "threads" in results else "",
        f"torch {results['versions']['torch']}" if "torch" in results.get("versions", {}) else "",
        f"label noise {results['label_noise']:.0%}" if results.get("label_noise") is not None else "",
        f"medians of {min(rounds)} rounds" if rounds else "",
        results.get("date", ""),
        f"commit {results['commit']}" if results.get("commit") else "",
    ]
    return f"*{', '.join(filter(None, facts))}*\n\n"


def tables(name: str, results: Path) -> str:
    """All tables of a name, each under its caption; empty where there are no results."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob(f"{name}-*.json"))]
    return "\n\n".join(caption(result) + TABLES[name](result["rows"]) for result in found)


def part(name: str, result: dict[str, Any], remark: str = "") -> str:
    """The table of a part of scripts/gpu/slot.py, under its name and caption."""
    table = GPU_PARTS.get(name.split("-")[0], plain)
    return f"**{name}**{remark}  \n{caption(result)}{table(result['rows'])}"


def gpu(results: Path) -> str:
    """All parts that were measured on GPUs."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "gpu").glob("*.json"))]
    return "\n\n".join(part(name, result) for parts in found for name, result in parts.items())


def write(readme: Path, results: Path) -> None:
    """Put the tables in their places. Raises SystemExit where results do not have exactly one place."""
    text = readme.read_text(encoding="utf-8")
    for name in [*TABLES, "gpu"]:
        table = gpu(results) if name == "gpu" else tables(name, results)
        if not table:
            continue
        place = re.compile(rf"(<!-- {name} -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
        count = len(place.findall(text))
        if count != 1:
            raise SystemExit(f"{readme.name} must have one place for the table {name!r}, not {count}")
        start, end = place.search(text).span(2)  # type: ignore[union-attr]  # there is one
        text = f"{text[:start]}{table}\n{text[end:]}"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(ROOT / "scripts" / "results" / "README.md", ROOT / "scripts" / "results")
