"""Put the results of scripts/gpu_suite.sh together: python scripts/gpu_suite_report.py OUT

Writes OUT/gpu.json, all figures by the name of their part, and OUT/gpu.md, their tables.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from readme_tables import TABLES, caption


def main(out: Path) -> None:
    """Over every NAME-*.json in `out` that a table is known for, and the closing line of the tests."""
    everything, text = {}, ["# One GPU", ""]
    log = out / "tests.log"
    if log.exists():
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"])[-1]
        text += [f"Tests: {last}", ""]
        everything["tests"] = {"closing_line": last}
    for path in sorted(out.glob("*-*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        everything[path.stem] = told
        name = path.stem.split("-")[0]
        made = TABLES[name](told["rows"]) if name in TABLES else f"```\n{json.dumps(told['rows'], indent=1)}\n```"
        text += [f"## {path.stem}", "", caption(told) + made, ""]
    (out / "gpu.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python scripts/gpu_suite_report.py OUT")
    main(Path(sys.argv[1]))
