"""Write README.md's tables anew from the results under scripts/results: python scripts/readme_tables.py"""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent


def kernels(path: Path) -> str:
    """A line a case: each contender's milliseconds, and how many times the project's own that is."""
    cases: dict[str, list[dict]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        cases.setdefault(f"{row['work']} {row['case']}", []).append(row)
    lines = ["| work | fasttrain | others |", "| --- | --- | --- |"]
    for case, (own, *others) in cases.items():
        told = [f"{each['contender']} {each['seconds'] / own['seconds']:.1f}x" for each in others]
        lines.append(f"| {case} | {own['seconds'] * 1e3:.1f} ms | {', '.join(told)} |")
    return "\n".join(lines)


def pipeline(path: Path) -> str:
    """A line a policy: images a second of each loader."""
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    names = list(results[0]["images_per_s"])
    lines = [f"| AutoAugment | {' | '.join(names)} | fasttrain to timm |", "| --- " * (len(names) + 2) + "|"]
    for each in results:
        middle = [f"{statistics.median(each['images_per_s'][name]):.0f} img/s" for name in names]
        lines.append(f"| {each['autoaugment']} | {' | '.join(middle)} | {each['ratio']:.2f} |")
    return "\n".join(lines)


def save(path: Path) -> str:
    """A line a network: seconds of a save."""
    lines = ["| network | checkpoint | loop waits | thread writes | `torch.save` |", "| --- | --- | --- | --- | --- |"]
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        told = {name: f"{statistics.median(each):.2f} s" for name, each in row["seconds"].items()}
        times = f"{told['held']} | {told['written by the thread']} | {told['torch.save']}"
        lines.append(f"| `{row['arch']}` | {row['bytes'] / 1e6:.0f} MB | {times} |")
    return "\n".join(lines)


def ablation(path: Path) -> str:
    """A line a step: top-1, and what the step adds to the one that it is compared with."""
    lines = ["| recipe | top-1, % | gain, points | compared with |", "| --- | --- | --- | --- |"]
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        top1 = f"{100 * row['mean']:.1f} ± {100 * row['interval']:.1f}"
        gain = f"{100 * row['gain']:+.1f} ± {100 * row['gain_interval']:.1f}" if "gain" in row else ""
        lines.append(f"| {row['title']} | {top1} | {gain} | {row.get('beside', '')} |")
    return "\n".join(lines)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, table in (("kernels", kernels), ("pipeline", pipeline), ("ablation", ablation), ("save", save)):
        made = table(ROOT / "scripts" / "results" / f"{name}-cpu.json")
        found = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = found.subn(lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"README.md must have one place for the table {name!r}")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
