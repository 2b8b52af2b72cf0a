"""The benchmarks of answers on a tiny model: their ways agree, their records are whole."""

import json

import pytest

from bench import answers, generation, positions
from engine import tasks
from tests.conftest import engine


def test_every_way_is_scored(model, monkeypatch, tmp_path):
    for name, size in (("EXAMPLES", 4), ("SHOTS", 1), ("ICL_SHOTS", 1), ("VALIDATION", 2), ("QUERIES", 3)):
        monkeypatch.setattr(answers, name, size)
    task = tasks.load("comparatives")
    records = list(answers.measure(model, task, 0, 2, answers.LOSSES))
    assert [record["way"] for record in records] == ["zero-shot", "1-shot", *["MTV"] * 9]
    assert all(0 <= record[by] <= 1 for record in records for by in answers.BY)
    assert {record.get("patched") for record in records} == {None, "prompt", "1", "all"}
    monkeypatch.setattr(answers.models, "load", lambda _: model)
    path = tmp_path / "answers.json"
    whole = answers.run(["comparatives"], 1, 2, answers.LOSSES, path)
    assert whole == json.loads(path.read_text()) == records
    monkeypatch.setattr(answers, "measure", lambda *_: pytest.fail("done already"))
    assert answers.run(["comparatives"], 1, 2, answers.LOSSES, path) == whole
    assert answers.table(whole).row_count == 11
    assert len(answers.markdown(whole).splitlines()) == 13


def test_rows_say_what_transformers_says(model):
    engine.generate(model, "abc", max_new_tokens=1)
    found = generation.measure(model, rows=3, n_prompt=20, n_new=5, rounds=2, shots=1)
    assert found["equal tokens"]
    assert found["different answers among the rows"] > 1
    assert found["transformers / ours"]["median"] > 0


def test_positions(model):
    found = positions.measure(model, rounds=1, shots=1)
    assert found["heads"] == 18
    assert all(value["median"] > 0 for key, value in found.items() if "loop / ours" in key)
