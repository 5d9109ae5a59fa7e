"""One HTML page of tables, figures and texts that needs nothing but itself. Nothing here runs a model."""

import base64
import dataclasses
import io
import re
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from typing import NamedTuple

import jinja2
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imread

TEXT_COLUMNS = ("method", "model", "cell", "command")


class Cell(NamedTuple):
    """What stands in a field of a table, and its classes.

    >>> Cell("96.4", "best").text
    '96.4'
    """

    text: str
    style: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of strings with a caption; `folded` ones show when asked to.

    >>> table = Table("scores", [{"method": "a", "f1 %": "7.10 ± 0.2"}, {"method": "b", "f1 %": "10.00"}], ranked=["f1 %"])
    >>> [[cell.style for cell in row] for row in table.body]
    [['left', 'second'], ['left', 'best']]
    """

    caption: str
    rows: Sequence[Mapping[str, str]]
    ranked: Collection[str] = ()  # columns in which the highest number is marked as best, the next as second
    unranked: Collection[str] = ()  # methods that are not among them
    folded: bool = False

    @property
    def head(self) -> list[Cell]:
        return [
            Cell(column, "left" if column in TEXT_COLUMNS else "") for column in (self.rows[0] if self.rows else ())
        ]

    @property
    def body(self) -> list[list[Cell]]:
        marks = {column: self._marks(column) for column in self.ranked}
        return [
            [
                Cell(text, "left" if column in TEXT_COLUMNS else marks.get(column, {}).get(i, ""))
                for column, text in row.items()
            ]
            for i, row in enumerate(self.rows)
        ]

    def _marks(self, column: str) -> dict[int, str]:
        """{row: "best" or "second"}; equal numbers share a mark."""
        found = {i: re.match(r"-?\d+(\.\d+)?", row[column]) for i, row in enumerate(self.rows)}
        numbers = {
            i: float(match.group())
            for i, match in found.items()
            if match and self.rows[i].get("method") not in self.unranked
        }
        names = dict(zip(sorted(set(numbers.values()), reverse=True), ("best", "second"), strict=False))
        return {i: names.get(number, "") for i, number in numbers.items()}


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as it stands in a file, such as a config, shown when asked to.

    >>> Text("config.yaml", "rounds: 3").content
    'rounds: 3'
    """

    caption: str
    content: str


@dataclasses.dataclass(frozen=True)
class Section:
    """What a page says of one run.

    >>> Section("digits").figures
    {}
    """

    title: str
    remarks: Sequence[str] = ()
    tables: Sequence[Table] = ()
    # by name, or the bytes of a PNG, with their captions
    figures: Mapping[str, tuple[Figure | bytes, str]] = dataclasses.field(default_factory=dict)
    texts: Sequence[Text] = ()


def render(title: str, sections: Sequence[Section]) -> str:
    """The page; it opens from a file, without a network, and has no scripts.

    Args:
        title: of the page.
        sections: one after the other.

    >>> section = Section("a & b", ["20 clients"], [Table("scores", [{"method": "FedKD", "f1 %": "70"}], ranked=["f1 %"])])
    >>> html = render("a & b", [section])
    >>> "a &amp; b" in html, '<td class="best">70</td>' in html, "http" in html
    (True, True, False)
    """
    template = resources.files("fedkd_jax").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    drawn = [
        {**vars(section), "figures": [_image(figure, caption) for figure, caption in section.figures.values()]}
        for section in sections
    ]
    return environment.from_string(template).render(title=title, sections=drawn)


def _image(figure: Figure | bytes, caption: str) -> dict[str, str | int]:
    """A figure as the address of an image, which keeps the names within one SVG apart from another's."""
    if isinstance(figure, bytes):  # drawn with 150 pixels an inch
        height, width = (round(pixels * 96 / 150) for pixels in imread(io.BytesIO(figure)).shape[:2])
        uri = f"data:image/png;base64,{base64.b64encode(figure).decode()}"
        return {"uri": uri, "caption": caption, "width": width, "height": height}
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "fedkd_jax"}):  # the same bytes each time
        figure.savefig(out, format="svg", metadata={"Date": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    uri = f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"
    return {"uri": uri, "caption": caption, "width": width, "height": height}
