"""The worked notebook runs from its first cell to its last, and is as short as it promises."""

import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "walkthrough.ipynb"


@pytest.mark.filterwarnings("ignore")  # Jupyter's own
def test_runs(tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(notebook.cells) < 20
    for cell in notebook.cells:
        cell.get("outputs", []).clear()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    lines = [line for output in outputs for line in output.get("text", "").splitlines()]
    without, steered = (
        next(re.findall(r"0\.\d\d|1\.00", line) for line in lines if line.startswith(start) and "to" in line)
        for start in ("without", "added after layer")
    )
    assert float(steered[1]) > float(without[2])  # the intervals of the two accuracies lie apart
