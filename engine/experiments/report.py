"""The page of an experiment: one HTML file with everything in it, no scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from models.images import open_image
from models.interface import IMAGE

THUMBNAIL = 128  # pixels of the longer side

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: left; font-variant-numeric: tabular-nums; }
td:nth-child(n+3) { white-space: nowrap; }
thead th { border-bottom: 2px solid #555; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption, caption { color: #444; text-align: left; }
.questions { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; padding: 0; }
.questions li { list-style: none; border: 1px solid #ccc; border-radius: .4rem; padding: .7rem; }
.questions img { image-rendering: auto; margin-right: .3rem; }
.questions p { margin: .4rem 0; overflow-wrap: anywhere; white-space: pre-line; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .7rem; margin: 0; }
dt { color: #444; }
dd { margin: 0; overflow-wrap: anywhere; }
.right { color: #00543b; font-weight: 600; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$settings</p>
<h2>Scores</h2>
$table
$questions
<h2>Pictures</h2>
$pictures
</body>
</html>
""")


def page(
    name: str,
    model: str,
    options: Mapping[str, int],
    rows: Sequence[Mapping[str, str]],
    asked: Mapping[str, Sequence[tuple[Any, Mapping[str, str]]]],
    pictures: Mapping[Path, str],
) -> str:
    """The page as text.

    rows: of the table. asked: by task, questions and their answers by way to ask. pictures: PNG files, what they show.
    """
    settings = ", ".join(f"{key} {value}" for key, value in options.items())
    return PAGE.substitute(
        title=escape(f"{name}: {model}"),
        settings=escape(f"Model {model}; {settings}. Multimodal Task Vectors, arXiv 2406.15334."),
        table=_table(rows, int(options["seeds"])),
        questions="".join(_questions(task, some) for task, some in asked.items() if some),
        pictures="\n".join(_figure(path, said) for path, said in pictures.items()),
    )


def _table(rows: Sequence[Mapping[str, str]], seeds: int) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in rows[0])
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    spread = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed, with 95% intervals"
    scored = "Accuracy is of an answer's first token (open answers: the VQA accuracy), exact of the whole string."
    return (
        f"<table><caption>{spread}. {scored}</caption><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    )


def _questions(task: str, asked: Sequence[tuple[Any, Mapping[str, str]]]) -> str:
    items = "\n".join(_question(question, answers) for question, answers in asked)
    head = f"<h2>Held-out questions: {escape(task)}</h2>\n<p>What each way writes; right answers are marked.</p>"
    return f'{head}\n<ul class="questions">\n{items}\n</ul>\n'


def _question(question: Any, answers: Mapping[str, str]) -> str:
    """A question about pictures, or a pair of words; an answer that is right is marked, and says so."""
    images, right = getattr(question, "images", ()), getattr(question, "answer", "") or getattr(question, "output", "")
    text = getattr(question, "text", "") or getattr(question, "input", "")
    shown = "".join(_thumbnail(image, index) for index, image in enumerate(images))
    known = {one.strip() for one in (right, *getattr(question, "answers", ()))}
    lines = [f"<dt>answer</dt><dd>{escape(right.strip())}</dd>"]
    for way, answer in answers.items():
        mark = ' class="right"' if answer in known else ""
        lines.append(f"<dt>{escape(way)}</dt><dd{mark}>{escape(answer) or '(nothing)'}{' ✓' if mark else ''}</dd>")
    return f"<li>{shown}<p>{escape(text.replace(IMAGE, '').strip())}</p><dl>{''.join(lines)}</dl></li>"


def _thumbnail(image: Any, index: int) -> str:
    small = open_image(image, index)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return _image(buffer.getvalue(), f"picture {index + 1} of the question", f' width="{small.width}"')


def _figure(path: Path, said: str) -> str:
    return f"<figure>{_image(path.read_bytes(), said)}<figcaption>{escape(said)}</figcaption></figure>"


def _image(png: bytes, said: str, more: str = "") -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(said)}"{more}>'
