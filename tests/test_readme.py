"""The README's example does what it says, with a shorter search."""

import re
from pathlib import Path

import pytest

import engine

README = Path(__file__).parents[1] / "README.md"


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    assert "count=100" in code
    assert "steps=100" in code
    exec(code.replace("count=100", "count=4").replace("steps=100", "steps=2"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_questions_run(tmp_path, monkeypatch, smollm2):
    monkeypatch.chdir(tmp_path)
    code = next(code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "paths(" in code)
    found = {"engine": engine, "tasks": engine.tasks, "model": smollm2}
    exec(code.replace("count=20", "count=2"), found)
    assert (tmp_path / "trace.html").stat().st_size > 1000
    assert found["curve"].faithfulness[-1] == 1


def test_shows_the_two_commands():
    text = README.read_text()
    assert "make demo" in text
    assert "make test" in text
