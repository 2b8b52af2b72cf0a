"""What is written is what is read."""

import csv
import io
import json

import pytest

from bench.records import Record, Results, load, save, to_csv, to_json

KEY = ("rollouts", "packed", "tiny", 9, 4, "float32", "cpu", "huggingface")
WHOLE = Record(
    *KEY, apart=1e-7, rows_run=4, seconds=[1.0, 2.0, 3.0], median=2.0, low=1.5, high=2.5, rows_per_second=2.0,
    computed=3.0, memory=1.25, prefill_floor=0.1, row_floor=0.2, floor=0.3, percent_of_floor=15.0,
    speedup={"hooks": {"median": 8.0, "low": 7.0, "high": 9.0}},
    cost={"one forward": {"median": 1.2, "low": 1.1, "high": 1.3}},
)  # fmt: skip
SKIPPED = Record(*KEY[:1], "hooks", *KEY[2:], status="skipped", reason="it would take, say, 7 s")


@pytest.fixture
def results():
    return Results({"cpu": "a"}, [{"flops": 1.0}], {"rounds": 3}, [WHOLE, SKIPPED])


def test_json_round_trip(results, tmp_path):
    save(tmp_path, results)
    assert load(tmp_path / "bench.json") == results
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.csv"}


def test_csv_round_trip(results):
    rows = list(csv.DictReader(io.StringIO(to_csv(results.records))))
    assert [row["provider"] for row in rows] == ["packed", "hooks"]
    assert float(rows[0]["median"]) == 2.0
    assert float(rows[0]["speedup hooks low"]) == 7.0
    assert rows[0]["speedup naive low"] == rows[1]["median"] == ""
    assert rows[1]["reason"] == "it would take, say, 7 s"


def test_the_line_is_one_and_leaves_out_samples(results):
    line = to_json(results, samples=False)
    assert "\n" not in line
    first, second = json.loads(line)["records"]
    assert "seconds" not in first
    assert first["median"] == 2.0
    assert first["speedup"]["hooks"]["high"] == 9.0
    assert second == {
        "case": "rollouts", "provider": "hooks", "shape": "tiny", "tokens": 9, "rows": 4, "dtype": "float32",
        "device": "cpu", "backend": "huggingface", "status": "skipped", "reason": "it would take, say, 7 s",
    }  # fmt: skip


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"machine": {}, "records": [{"case": 1}]}', "nonsense"])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="not what"):
        load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"bench\.json"):
        load(tmp_path / "bench.json")
