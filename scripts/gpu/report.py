"""Combine the results of the slots: python3 scripts/gpu/report.py PARTS OUT

Writes OUT/gpu.json, all figures by the name of their part; OUT/gpu.md, their tables; and OUT/logs.tar.gz. Includes the
partial results of parts that were stopped.
"""

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from readme_tables import part

UNFINISHED = ".unfinished"


def gather(parts: Path, out: Path) -> None:
    """Combine every NAME.json and NAME.unfinished.json in `parts`."""
    results: dict[str, Any] = {}
    text = ["# One GPU", ""]
    for path in sorted(parts.glob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # the part was stopped while it wrote the file
            continue
        name = path.stem.removesuffix(UNFINISHED)
        unfinished = path.stem.endswith(UNFINISHED)
        results[name] = result | ({"unfinished": True} if unfinished else {})
        text += [part(name, result, ", unfinished" if unfinished else ""), ""]
    (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text("\n".join(text), encoding="utf-8")
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        for log in sorted(parts.glob("*.log")):
            archive.add(log, log.name)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python3 scripts/gpu/report.py PARTS OUT")
    gather(Path(sys.argv[1]), Path(sys.argv[2]))
