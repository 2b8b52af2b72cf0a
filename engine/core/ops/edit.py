"""The edit itself: heads of z (units of any site) replaced, added to or scaled, row by row. Three ways, one meaning."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from engine.core.ops import fused, reference
from engine.core.patches import Mode
from models.shapes import Bool, Float

Impl: TypeAlias = Literal["auto", "reference", "torch", "triton"]
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def edit_heads(
    z: Float[Tensor, "rows tokens heads head_dim"],
    mask: Bool[Tensor, "rows heads"],
    values: Float[Tensor, "shared_or_rows *shared_or_tokens heads head_dim"],
    mode: Mode,
    impl: Impl = "auto",
) -> Float[Tensor, "rows tokens heads head_dim"]:
    """z[r, t, h] = values[r, t, h] where mask[r, h] ("replace"), or z + values ("add"), or z * values ("scale").

    z:      of any strides; written to, and returned. Where gradients are recorded a new tensor is returned instead.
    values: one set for all rows, or one a row; for all tokens, or one a token; of z's dtype, in which it is computed.
    impl:   "reference" (plain loops), "torch" (one `torch.where`) or "triton" (a kernel that reads nothing it does not
            change; GPUs, no gradients, no float64) are used as named, or refused. Default "auto": triton wherever it
            runs, else torch.

    Raises TypeError or ValueError naming what was given and what was expected; ImportError without Triton.

    >>> z = torch.zeros(1, 1, 2, 1)
    >>> edit_heads(z, torch.tensor([[True, False]]), torch.ones(1, 2, 1), "replace").flatten()
    tensor([1., 0.])
    """
    shape, values = list(values.shape), values[:, None] if values.ndim == 3 else values
    _check(z, mask, values, mode, impl, shape)
    recorded = torch.is_grad_enabled() and (z.requires_grad or values.requires_grad)
    if impl == "auto":
        runs = z.is_cuda and not recorded and z.dtype in TRITON_DTYPES and _triton_runs(z.device)
        impl = "triton" if runs else "torch"
    if impl == "reference":
        return reference.edit_heads(z.clone() if recorded else z, mask, values, mode)
    if impl == "torch":
        return fused.edit_heads(z, mask, values, mode, in_place=not recorded)
    if recorded:
        raise ValueError("impl='triton' writes to z and records no gradients: use 'torch', or torch.no_grad()")
    if z.dtype not in TRITON_DTYPES:
        raise TypeError(f"impl='triton' edits {', '.join(map(str, TRITON_DTYPES))}, got z of {z.dtype}")
    try:
        from engine.core.ops import triton_edit
    except ImportError as error:
        raise ImportError("impl='triton' needs Triton: pip install triton (torch's CUDA builds bring it)") from error
    if not (z.is_cuda or triton_edit.INTERPRETED):
        raise ValueError(f"impl='triton' runs on a GPU, got z on {z.device}; on the CPU only with TRITON_INTERPRET=1")
    return triton_edit.edit_heads(z, mask, values, mode)


def _check(z: Tensor, mask: Tensor, values: Tensor, mode: str, impl: str, given: list[int]) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
    if z.ndim != 4:
        raise ValueError(f"z must have shape [rows, tokens, heads, head_dim], got {list(z.shape)}")
    rows, tokens, heads, head_dim = z.shape
    if mask.shape != (rows, heads):
        raise ValueError(f"mask must have shape {[rows, heads]}, got {list(mask.shape)}")
    if values.shape[2:] != (heads, head_dim) or len(values) not in (1, rows) or values.shape[1] not in (1, tokens):
        expected = f"{[1, heads, head_dim]} or {[rows, heads, head_dim]}, or with an axis of {tokens} tokens after rows"
        raise ValueError(f"values must have shape {expected}, got {given}")
    if not z.is_floating_point() or mask.dtype != torch.bool or values.dtype != z.dtype:
        raise TypeError(
            "expected z and values of one floating-point dtype and a bool mask, "
            f"got {z.dtype}, {values.dtype} and {mask.dtype}"
        )
    if not z.device == mask.device == values.device:
        raise ValueError(
            f"expected one device, got z on {z.device}, mask on {mask.device} and values on {values.device}"
        )


@cache
def _triton_runs(device: torch.device) -> bool:
    """Whether Triton is installed and its kernel compiles for this GPU; tried once a device."""
    try:
        from engine.core.ops import triton_edit
    except ImportError:
        return False
    one = torch.zeros(1, 1, 1, 1, device=device)
    try:
        triton_edit.edit_heads(one, one[0, 0] == 0, one, "replace")
    except Exception as error:  # a GPU that Triton does not know, or no C compiler for its launcher
        warnings.warn(f"Triton does not run on {device}, torch edits the heads instead: {error}", stacklevel=3)
        return False
    return True
