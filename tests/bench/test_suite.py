"""The suite on a tiny shape: what is measured, what is left out, and that it says so."""

import csv
import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import __main__ as command
from bench import machine, report, suite
from bench.cells import Cell
from bench.limits import Rates
from bench.providers import PROVIDERS, ours
from bench.records import Record, Results, load, to_json
from bench.shapes import SHAPES, make, weights_bytes
from bench.suite import Settings, fill_in, grid, run

FAST = Settings(rounds=2, memory=0)
CELL = Cell("rollouts", "tiny", 9, 4, "float32", "cpu")


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    monkeypatch.setattr(suite, "measure_rates", lambda *_: Rates(1e11, 1e10))


def found(results):
    return {record.provider: record for record in results.records}


def test_a_cell():
    records = found(run([CELL], ["packed", "naive", "hooks", "hooks-batch"], FAST, progress=False))
    assert set(records) == {"packed", "naive", "hooks", "hooks-batch", "one stock forward", "one forward"}
    packed, hooks = records["packed"], records["hooks"]
    assert all(record.status == "measured" and len(record.seconds) == 2 for record in records.values())
    assert (packed.rows_run, packed.computed, hooks.rows_run, hooks.computed) == (4, 3.0, 2, 9.0)
    assert packed.rows_per_second == pytest.approx(4 / packed.median)
    assert packed.percent_of_floor == pytest.approx(100 * packed.floor / packed.median)
    assert hooks.speedup["hooks"]["median"] == 1
    assert set(packed.cost) == {"one stock forward", "one forward"}


def test_a_wrong_provider_is_not_timed(monkeypatch):
    timed = []

    def wrong(self, prompt, heads, values):
        timed.append(len(heads))
        return torch.ones(len(heads), 97)

    monkeypatch.setattr(PROVIDERS["packed"], "patch", wrong)
    records = found(run([CELL], ["packed", "naive"], FAST, progress=False))
    assert records["packed"].status == "wrong"
    assert records["packed"].apart > 0.1
    assert f"{records['packed'].apart:.1e}" in records["packed"].reason
    assert records["packed"].seconds == []
    assert timed == [4]
    assert records["naive"].status == "measured"


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (torch.full((4, 97), float("nan")), "wrong"),
        (torch.zeros(3, 97), "failed"),
        (torch.zeros(4, 96), "failed"),
    ],
)
def test_neither_is_one_that_answers_nonsense(monkeypatch, answer, status):
    monkeypatch.setattr(PROVIDERS["packed"], "patch", lambda *_: answer)
    results = run([CELL], ["packed"], FAST, progress=False)
    assert found(results)["packed"].status == status
    assert found(results)["packed"].seconds == []
    assert ": NaN" not in to_json(results)


def test_neither_is_one_that_does_not_patch_a_last_row(monkeypatch):
    right = ours.Packed.patch

    def wrong(self, prompt, heads, values):
        heads = heads.clone()
        heads[-1] = False
        return right(self, prompt, heads, values)

    monkeypatch.setattr(PROVIDERS["packed"], "patch", wrong)
    assert found(run([CELL], ["packed"], FAST, progress=False))["packed"].status == "wrong"


def test_what_raises_is_reported_and_the_rest_measured(monkeypatch):
    def broken(*_):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(PROVIDERS["hooks"], "patch", broken)
    records = found(run([CELL], ["hooks", "packed"], FAST, progress=False))
    assert (records["hooks"].status, records["hooks"].reason) == ("failed", "RuntimeError: no luck")
    assert records["packed"].status == "measured"


def test_what_would_not_fit_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(suite, "free_bytes", lambda _: 10 * weights_bytes("tiny", torch.float32))
    big = Cell("rollouts", "tiny", 2000, 32, "float32", "cpu")
    records = found(run([big], ["hooks-batch"], FAST, progress=False))
    assert records["hooks-batch"].status == "skipped"
    assert "GiB" in records["hooks-batch"].reason


def test_a_model_that_would_not_fit_is_not_made(monkeypatch):
    monkeypatch.setattr(suite, "free_bytes", lambda _: weights_bytes("8b", torch.float32))
    monkeypatch.setattr(suite, "make", lambda *_: pytest.fail("it was made"))
    cell = Cell("rollouts", "8b", 9, 4, "float32", "cpu")
    (record,) = run([cell], ["packed"], FAST, progress=False).records
    assert (record.status, record.reason) == ("skipped", "the weights take 29.9 GiB, 29.9 are free")


def test_what_would_take_too_long_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(suite, "measure_rates", lambda *_: Rates(1e4, 1e10))
    (record,) = run([CELL], ["hooks"], FAST, progress=False).records
    assert record.status == "skipped"
    assert "a call would take at least" in record.reason


def test_the_rows_a_loop_ran_are_scaled_but_not_what_it_does_once():
    record = Record("search", "hooks", "tiny", 9, 32, "float32", "cpu", "huggingface", rows_run=2, floor=4.0)
    fill_in(record, [1.0, 2.0, 3.0], fixed=0.5)
    assert record.seconds == [0.5 + 16 * s for s in (0.5, 1.5, 2.5)]
    assert record.percent_of_floor == 100 * 4.0 / 24.5
    whole = Record("search", "packed", "tiny", 9, 32, "float32", "cpu", "huggingface", rows_run=32)
    fill_in(whole, [1.0, 2.0, 3.0], fixed=0.5)
    assert whole.seconds == [1.0, 2.0, 3.0]


def test_the_grid_is_a_cross():
    cells = grid({"rollouts": ([512, 32], [8, 1]), "sweep": ([512, 32], [8, 1])}, ["tiny"], ["float32"], ["cpu"])
    sizes = [(c.case, c.tokens, c.rows) for c in cells]
    assert sizes == [
        ("rollouts", 512, 8),
        ("rollouts", 32, 8),
        ("rollouts", 512, 1),
        ("sweep", 512, 8),
        ("sweep", 32, 8),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_are_made_in_their_dtype_the_same_each_time(dtype):
    hf, again = make("tiny", dtype), make("tiny", dtype)
    assert hf.dtype == dtype
    assert all(a.equal(b) for a, b in zip(hf.parameters(), again.parameters(), strict=True))
    assert sum(p.nbytes for p in hf.parameters()) == weights_bytes("tiny", dtype)
    assert hf(torch.arange(9)[None]).logits.isfinite().all()


def test_a_shape_is_the_transformers_model_of_its_config():
    hf = make("tiny")
    other = type(hf)(hf.config).eval()
    other.load_state_dict(hf.state_dict())
    ids = torch.arange(9)[None]
    assert other(ids).logits.equal(hf(ids).logits)


def test_tied_weights_stay_tied():
    assert weights_bytes("135m", torch.float32) == 4 * 134_515_008  # SmolLM2-135M's own number
    assert [name for name, fields in SHAPES.items() if fields["tie_word_embeddings"]] == ["135m", "1b"]


def test_rates_are_measured():
    found = machine.measure_rates("cpu", torch.float32, repeats=1)
    assert 1e8 < found.flops < 1e15
    assert 1e8 < found.bandwidth < 1e13


def test_unknown_shape():
    with pytest.raises(ValueError, match="135m"):
        make("7b")


class TestCommand:
    """`python -m bench`."""

    def invoke(self, *options):
        return CliRunner().invoke(command.app, list(options), catch_exceptions=False)

    def test_quick(self, tmp_path):
        """From the command line to the files, peak memory in a child included."""
        options = ["--quick", "--shapes", "tiny", "--tokens", "9", "--rows", "4", "--rounds", "2"]
        options += ["--providers", "packed,naive,hooks", "--out", str(tmp_path)]
        ran = self.invoke(*options)
        assert ran.exit_code == 0
        line = json.loads(ran.stdout.splitlines()[-1])
        whole = load(tmp_path / "bench.json")
        assert len(line["records"]) == len(whole.records)
        assert {"cpu", "threads", "torch", "transformers", "commit"} <= set(line["machine"])
        assert {r.case for r in whole.records} == set(command.QUICK)
        assert all(r.status == "measured" for r in whole.records)
        assert all(r.memory is not None for r in whole.records if r.case == "rollouts")
        assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
        with open(tmp_path / "bench.csv") as file:
            assert len(list(csv.DictReader(file))) == len(whole.records)
        assert "head sweep" in ran.stdout

    def test_compare(self, tmp_path):
        options = ["--shapes", "tiny", "--cases", "reused", "--tokens", "9", "--rows", "4", "--rounds", "2"]
        options += ["--providers", "packed", "--no-memory", "--out", str(tmp_path)]
        assert self.invoke(*options).exit_code == 0
        again = self.invoke(*options, "--compare", str(tmp_path / "bench.json"))
        assert again.exit_code == 0
        assert "too few" in again.stdout
        assert "packed" in again.stdout

    @pytest.mark.parametrize(
        ("option", "value", "said"),
        [
            ("--cases", "rollout", "rollouts"),
            ("--providers", "us", "packed"),
            ("--shapes", "7b", "8b"),
            ("--tokens", "many", "positive integers"),
            ("--rows", "0", "positive integers"),
            ("--dtype", "int8", "bfloat16"),
            ("--backend", "jax", "nnsight"),
            ("--rounds", "0", "at least 1"),
            ("--compare", "missing.json", "missing.json"),
        ],
    )
    def test_wrong_options_are_said_before_anything_runs(self, monkeypatch, option, value, said):
        monkeypatch.setattr(command, "run_suite", lambda *_: pytest.fail("it ran"))
        ran = CliRunner().invoke(command.app, [option, value])
        assert ran.exit_code == 2
        assert said in ran.output.replace("\n", " ")

    def test_help_lists_the_rest(self):
        shown = self.invoke("--help").output
        assert all(name in shown for name in ("search", "exactness", "families", "--quick", "--compare"))
        assert "memory-child" not in shown


def test_what_was_left_out_is_a_line_each_with_its_cells():
    def skipped(case, tokens, reason):
        return Record(
            case, "hooks", "tiny", tokens, 4, "float32", "cpu", "huggingface", status="skipped", reason=reason
        )

    records = [skipped("rollouts", 9, "too long"), skipped("rollouts", 5, "too long"), skipped("reused", 9, "too big")]
    table = report.left_out(Results({}, [], {}, records))
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    shown = console.file.getvalue()
    assert "rollouts: 9 x 4, 5 x 4" in shown
    assert "reused: 9 x 4" in shown
    assert table.row_count == 2
    assert report.left_out(Results({}, [], {}, [])) is None
