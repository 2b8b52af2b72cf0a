"""Docstrings of this project as Markdown: plain prose, lists of `name: meaning`, `>>>` examples."""

from __future__ import annotations

import re
import textwrap
from itertools import pairwise
from typing import Any

from griffe import Extension, Object

ENTRY = re.compile(r"([a-z_*][\w*]*(?:, [a-z_*][\w*]*)*): +(\S.*)")
SHAPE = re.compile(r"\b(?:Bool|Float|Int|Integer)\[[^\]\n]*\]")


class Plain(Extension):
    """Rewrites each docstring once, when its object is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Griffe hands over every function, class and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """A docstring's blocks, each by what it is."""
    first, _, rest = text.strip().partition("\n")
    blocks = re.split(r"\n\s*\n", f"{first}\n{textwrap.dedent(rest)}".strip())
    return "\n\n".join(block_of(block.rstrip()) for block in blocks)


def block_of(block: str) -> str:
    lines = block.split("\n")
    if lines[0].startswith(">>>"):
        return f"```pycon\n{block}\n```"
    if all(line.startswith("    ") for line in lines):
        return f"```text\n{textwrap.dedent(block)}\n```"
    # Prose may come before a list, in one block with it.
    start = next((n for n, line in enumerate(lines) if ENTRY.fullmatch(line)), None)
    if start is None or not all(ENTRY.fullmatch(line) or line.startswith(" ") for line in lines[start:]):
        return prose(block)
    entries: list[tuple[str, list[str]]] = []
    for line in lines[start:]:
        if found := ENTRY.fullmatch(line):
            entries.append((found[1], [found[2]]))
        else:
            entries[-1][1].append(line.strip())
    before = [prose("\n".join(lines[:start]))] if start else []
    return "\n\n".join([*before, *(f"`{name}`\n:   {meaning(said)}" for name, said in entries)])


def meaning(lines: list[str]) -> str:
    """What an entry says; lines that begin with a quoted name after a colon or semicolon are a list of its own."""
    parts = [[lines[0]]]
    for before, line in pairwise(lines):
        if line.startswith('"') and before.endswith((":", ";")):
            parts.append([line])
        else:
            parts[-1].append(line)
    if len(parts) < 3:
        return prose(" ".join(lines))
    first, *listed = (prose(" ".join(part)) for part in parts)
    return "\n".join([first, "", *(f"    - {part}" for part in listed)])


def prose(text: str) -> str:
    """Markdown would take its stars for emphasis and its shapes for links; what is quoted as code stays."""
    parts = re.split(r"(`[^`]*`)", text)
    for n, part in enumerate(parts[::2]):
        part = re.sub(r"([*<_])", r"\\\1", part)
        parts[2 * n] = SHAPE.sub(lambda found: f"`{found[0].replace(chr(92), '')}`", part)
    return "".join(parts)
