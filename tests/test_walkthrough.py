"""The worked notebooks run from their first cells to their last, and say what they promise."""

import re
from pathlib import Path

import nbformat
import pytest

DOCS = Path(__file__).parents[1] / "docs"


def run(name, folder, **fewer):
    """Text and pictures of all cells, run; fewer: numbers in place of those that stand there."""
    from nbclient import NotebookClient

    notebook = nbformat.read(DOCS / name, as_version=4)
    assert len(notebook.cells) < 25
    for cell in notebook.cells:
        cell.get("outputs", []).clear()
        for key, number in fewer.items():
            cell.source = re.sub(rf"\b{key}=\d+", f"{key}={number}", cell.source)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return [line for output in outputs for line in output.get("text", "").splitlines()], pictures


@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_walkthrough(tmp_path):
    lines, pictures = run("walkthrough.ipynb", tmp_path, count=8)
    assert pictures == 2
    without, steered = (
        next(re.findall(r"0\.\d\d|1\.00", line) for line in lines if line.startswith(start) and "to" in line)
        for start in ("without", "added after layer")
    )
    assert float(steered[1]) > float(without[2])  # the intervals of the two accuracies lie apart


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_circuits(tmp_path):
    lines, pictures = run("circuits.ipynb", tmp_path, count=4)
    assert pictures == 3
    cut = {line[:3].strip(): float(line.split(":")[1]) for line in lines if re.match(r"(IO|S1|S2) +about", line)}
    assert cut["IO"] < min(cut["S1"], -1)  # the name that is said must be seen, the other's first place need not
    heads = [re.findall(r"\((\d+), \d+\)", line) for line in lines if line.startswith(("write", "tell"))]
    assert min(map(int, heads[1])) < max(map(int, heads[0]))  # queries are told by earlier heads
    table = [line.split() for line in lines if re.fullmatch(r" *[\d.]+ +\d+ +-?[\d.]+ +-?[\d.]+", line)]
    assert (len(table), table[-1][1:2], float(table[-1][-1])) == (10, ["270"], 1.0)
