"""HTML and SVG that cannot be broken by what is put into them: all text is escaped, elements are built as values."""

import html
from collections.abc import Container, Iterable
from typing import Any

from fasttrain.utils.text import printable

_VOID = {"meta", "br", "img", "col"}
_LONGEST = 72  # characters of a name


class Html(str):
    """Markup, which is put into other markup as it is."""

    __slots__ = ()


Child = str | int | None | Iterable["Child"]


def element(name: str, *children: Child, **attributes: Any) -> Html:
    """An element. Strings are escaped, Html is not; None is left out. attributes: a trailing underscore is dropped and
    others become hyphens; None and False are left out, True stands for an attribute without a value."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_attribute(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """Markup of several parts, one after another."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, str | int):
            parts.append(html.escape(_clean(str(child)), quote=True))
        elif child is not None:
            parts.append(str(join(*child)))
    return Html("".join(parts))


def _attribute(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return html.escape(_clean(text), quote=True)


def _clean(text: str) -> str:
    """Text without what may not stand in a page, however it came here: halves of surrogate pairs and control
    characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else printable(c) for c in text)


def shorten(text: str, most: int = _LONGEST) -> str:
    """Text that is safe to show, on one line, with its middle left out where it is long."""
    text = printable(text[: 4 * most] + "…" + text[-4 * most :] if len(text) > 8 * most else text)
    if len(text) <= most:
        return text
    return f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def name(text: str, most: int = _LONGEST) -> Html:
    """An untrusted name: shortened, and kept from changing the direction of the text around it."""
    return element("bdi", shorten(text, most))


def table(
    head: Iterable[Child],
    rows: Iterable[Iterable[Html]],
    *,
    title: str,
    right: Container[int] = (),
    sortable: bool = False,
) -> Html:
    """A table in a box of its own, which scrolls where the table is too wide. rows: of cells, see `cell`. title: for
    readers who do not see it. right: the columns of numbers, which are aligned at the right."""
    headers = [
        element("th", text, scope="col", class_="n" if column in right else None) for column, text in enumerate(head)
    ]
    body = element("tbody", *(element("tr", *cells) for cells in rows))
    whole = element("table", element("thead", element("tr", *headers)), body, class_="sortable" if sortable else None)
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=title)


def cell(content: Child, value: float | str | None = None, kind: str | None = "n") -> Html:
    """A table's cell. value: what the column is sorted by, where it is not the text; empty where it is not known. kind:
    the class; `n` for numbers, `head` for the head of a row."""
    key = value if isinstance(value, str) or value is None else f"{value:.9g}"
    if kind == "head":
        return element("th", content, scope="row", data_sort=key)
    return element("td", content, data_sort=key, class_=kind)
