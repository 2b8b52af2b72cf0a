"""A page of effects: one HTML file with its numbers and the script that shows them, and no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from engine.artifacts import write_whole

HEIGHT = 720  # pixels, in a notebook


@dataclass(frozen=True, repr=False)
class Page:
    """What `Effects.show` makes: shows itself in a notebook, in a frame that reaches nothing outside it.

    html: all of the page.

    >>> effects = engine.Effects(torch.rand(9, 2, 3), clean=torch.zeros(9))
    >>> effects.show(resamples=999).save("effects.html")
    """

    html: str

    def __repr__(self) -> str:
        return f"Page of {len(self.html) / 1000:.0f} kB: save(path), or display it in a notebook"

    def save(self, path: str | Path) -> None:
        """Write the page to one file, whole or not at all. Raises OSError if it cannot be written."""
        write_whole(path, self.html)

    def _repr_html_(self) -> str:
        frame = f'width="100%" height="{HEIGHT}" style="border: 0; background: #fff" title="effects"'
        return f'<iframe sandbox="allow-scripts" {frame} srcdoc="{escape(self.html)}"></iframe>'


def page(title: str, data: Mapping[str, Any]) -> Page:
    """page.html with the title and the numbers put in. Both may hold any text: what is not ASCII, or would end the
    script that holds the numbers, is written as its code point.
    """
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    numbers = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # in JSON these occur in strings alone
        numbers = numbers.replace(character, f"\\u{ord(character):04x}")
    return Page(template.substitute(title=markup(title), data=numbers))


def markup(text: str) -> str:
    """A text as HTML that shows it: in ASCII, whatever it holds."""
    return escape(text).encode("ascii", "xmlcharrefreplace").decode()
