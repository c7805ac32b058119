"""One HTML file with everything inside: no script, no font and no image comes from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING

from rfdarts_fast.report.figures import rendered
from rfdarts_fast.runs.config import require_package

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Section:
    """A box of the page.

    Attributes:
        title, note: texts above.
        table: rows of texts; the first is the row's name.
        heading: names of the table's columns.
        figures: by name.
        folded: shown on a click only.
    """

    title: str
    note: str = ""
    table: Sequence[Sequence[object]] = ()
    heading: Sequence[str] = ()
    figures: dict[str, Figure] = field(default_factory=dict)
    folded: bool = False

    @property
    def images(self) -> dict[str, str]:
        return {
            name: base64.b64encode(rendered(figure, "svg")).decode() for name, figure in self.figures.items()
        }


def page(title: str, note: str, sections: Sequence[Section]) -> str:
    """The HTML text; whatever the values, they are text in it. Needs the extra `report`."""
    jinja2 = require_package("html", "jinja2", "report")
    template = files("rfdarts_fast.report").joinpath("page.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(template).render(title=title, note=note, sections=sections)
