"""Text from files and users, made safe to print."""

import os


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that is safe to print, whatever bytes it has."""
    try:
        text = os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and no path can
        text = str(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
