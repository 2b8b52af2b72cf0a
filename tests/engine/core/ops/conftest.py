"""The kernel's module, compiled where there is a GPU, else under Triton's interpreter."""

import importlib
import sys

import pytest
import torch

import engine.core.ops

KERNEL = "engine.core.ops.triton_edit"


def forget():
    sys.modules.pop(KERNEL, None)
    vars(engine.core.ops).pop("triton_edit", None)


@pytest.fixture
def unimported():
    """As if nobody had asked for the kernel yet, before and after."""
    forget()
    yield
    forget()


@pytest.fixture
def triton_edit(unimported, monkeypatch):
    """For one test: Triton reads the variable as the kernel is decorated, and never again."""
    pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")
    monkeypatch.setenv("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
    return importlib.import_module(KERNEL)


@pytest.fixture
def impl(request):
    """An implementation by its name, "triton" made to run here."""
    if request.param == "triton":
        request.getfixturevalue("triton_edit")
    return request.param
