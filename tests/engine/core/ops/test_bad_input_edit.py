"""What cannot be edited is refused, by name; an implementation asked for is used or refused, never changed."""

import sys

import pytest
import torch

from engine.core.ops import edit_heads


def arguments(**other):
    good = dict(
        z=torch.zeros(3, 2, 4, 5),
        mask=torch.ones(3, 4, dtype=torch.bool),
        values=torch.ones(1, 4, 5),
        mode="replace",
        impl="auto",
    )
    return good | other


@pytest.mark.parametrize(
    ("other", "error", "says"),
    [
        (dict(mode="swap"), ValueError, r"mode must be one of \('replace', 'add', 'scale'\), got 'swap'"),
        (dict(impl="cuda"), ValueError, r"impl must be one of \('auto', .*\), got 'cuda'"),
        (dict(z=torch.zeros(3, 4, 5)), ValueError, r"z must have shape .*, got \[3, 4, 5\]"),
        (dict(mask=torch.ones(4, 3, dtype=torch.bool)), ValueError, r"mask must have shape \[3, 4\], got \[4, 3\]"),
        (dict(values=torch.ones(2, 4, 5)), ValueError, r"\[1, 4, 5\] or \[3, 4, 5\], .* got \[2, 4, 5\]"),
        (dict(values=torch.ones(3, 3, 4, 5)), ValueError, r"an axis of 2 tokens after rows, got \[3, 3, 4, 5\]"),
        (dict(values=torch.ones(2, 2, 4, 5)), ValueError, r"values must have shape .*, got \[2, 2, 4, 5\]"),
        (dict(values=torch.ones(1, 1, 2, 4, 5)), ValueError, r"values must have shape .*, got \[1, 1, 2, 4, 5\]"),
        (dict(values=torch.ones(4, 5)), ValueError, r"values must have shape .*, got \[4, 5\]"),
        (dict(mask=torch.ones(3, 4)), TypeError, "bool mask, got torch.float32, torch.float32 and torch.float32"),
        (dict(values=torch.ones(1, 4, 5).half()), TypeError, "one floating-point dtype .* torch.float16"),
        (dict(z=torch.zeros(3, 2, 4, 5).long(), values=torch.ones(1, 4, 5).long()), TypeError, "torch.int64"),
        (dict(values=torch.ones(1, 4, 5, device="meta")), ValueError, "one device, got z on cpu, .* values on meta"),
        (dict(values=torch.ones(1, 4, 5).requires_grad_(), impl="triton"), ValueError, "records no gradients"),
        (dict(z=torch.zeros(3, 2, 4, 5).requires_grad_(), impl="triton"), ValueError, "records no gradients"),
        (
            dict(z=torch.zeros(3, 2, 4, 5).double(), values=torch.ones(1, 4, 5).double(), impl="triton"),
            TypeError,
            "torch.float32, got z of torch.float64",
        ),
    ],
)
def test_refused(other, error, says):
    given = arguments(**other)
    before = given["z"].detach().clone()
    with pytest.raises(error, match=says):
        edit_heads(**given)
    assert torch.equal(given["z"].detach(), before)


def test_triton_is_not_installed(unimported, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        edit_heads(**arguments(impl="triton"))


def test_triton_on_the_cpu(unimported, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="runs on a GPU, got z on cpu"):
        edit_heads(**arguments(impl="triton"))
