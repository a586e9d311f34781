"""The packages that fasttrain requires, and those that its extras add, by the metadata of its installation. Nothing is
imported, and nothing outside the standard library is used: packages may be missing."""

import json
import re
import shlex
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fasttrain.utils.versions import installed

# As setuptools writes it: `moto[s3,server]>=5; extra == "test"`.
_LINE = re.compile(r"""([\w.-]+)(\[[\w,-]+\])? *([^;]*?) *(?:; *extra == ["']([\w-]+)["'])?""")


@dataclass(frozen=True)
class Requirement:
    """A required package. specifier: the accepted versions, such as `<2.5,>=2.2`. text: what pip takes. extra: the
    extra of fasttrain that needs it; empty for what fasttrain itself needs."""

    name: str
    specifier: str
    text: str
    extra: str

    @property
    def problem(self) -> str:
        """What is wrong with the installed version; empty where it is accepted."""
        version = installed(self.name)
        if version is None:
            return f"{self.name} is not installed"
        return "" if accepts(self.specifier, version) else f"{self.name} {version} is installed, not {self.specifier}"


def requirements() -> list[Requirement] | None:
    """All requirements, in the order of setup.py; None where fasttrain is not installed, but runs from its folder."""
    try:
        lines = metadata.requires("fasttrain") or []
    except metadata.PackageNotFoundError:
        return None
    parsed = [match.groups(default="") for match in map(_LINE.fullmatch, lines) if match]
    return [Requirement(name, spec, f"{name}{extras}{spec}", extra) for name, extras, spec, extra in parsed]


def accepts(specifier: str, version: str) -> bool:
    """Whether a version is in the range of a specifier like `<2.5,>=2.2`. Other operators than these accept all."""
    number = _number(version)
    for part in specifier.split(","):
        bound = _number(part.lstrip("<>= "))
        if (part.startswith(">=") and number < bound) or (part.startswith("<") and part[1] != "=" and number >= bound):
            return False
    return True


def _number(version: str) -> tuple[int, ...]:
    """`2.10.0+cu128` as (2, 10): zeros at the end count for nothing."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, re.sub(r"(\.0+)+$", "", match[0]).split("."))) if match else ()


def pip_install(required: list[Requirement]) -> str:
    """The command that installs packages by their names."""
    return shlex.join(["pip", "install", *dict.fromkeys(requirement.text for requirement in required)])


def checkout() -> str | None:
    """The folder that fasttrain is installed from, as an argument for pip: `.` where it is the current folder. None
    where that folder is gone, or where fasttrain is installed from a wheel."""
    folders = [Path(__file__).resolve().parents[2]]  # of an editable installation
    try:
        origin = json.loads(metadata.distribution("fasttrain").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        origin = {}
    if "dir_info" in origin:
        folders.append(Path(unquote(urlsplit(origin["url"]).path)))
    for folder in folders:
        if (folder / "setup.py").is_file() and (folder / "fasttrain").is_dir():
            return "." if folder == Path.cwd() else str(folder)
    return None
