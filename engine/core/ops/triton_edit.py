"""The edit as a Triton kernel. For each row r and head h with mask[r, h], and each token t and dimension d:

    z[r, t, h, d] = values[r, t, h, d]                      "replace"
    z[r, t, h, d] = z[r, t, h, d] + values[r, t, h, d]      "add", rounded once to z's dtype
    z[r, t, h, d] = z[r, t, h, d] * values[r, t, h, d]      "scale", likewise

It reads nothing it does not change: a program whose head is off ends at its mask, "replace" never loads z.

Triton's interpreter (TRITON_INTERPRET=1 before this module is imported) runs it on the CPU.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.core.patches import Mode
from models.shapes import Bool, Float

INTERPRETED: bool = triton.knobs.runtime.interpret  # read where the kernel is decorated, too
TILE = 1024  # elements of z a program holds: one warp's registers hold them all


def edit_heads(
    z: Float[Tensor, "rows tokens heads head_dim"],
    mask: Bool[Tensor, "rows heads"],
    values: Float[Tensor, "shared_or_rows shared_or_tokens heads head_dim"],
    mode: Mode,
) -> Float[Tensor, "rows tokens heads head_dim"]:
    """Writes to z; a program for each row and head, over a few tokens at a time."""
    n_rows, n_tokens, n_heads, head_dim = z.shape
    if not z.numel():
        return z
    block_d = triton.next_power_of_2(head_dim)
    block_t = min(triton.next_power_of_2(n_tokens), max(1, TILE // block_d))
    with torch.cuda.device_of(z):  # Triton launches on the current device, which need not be that of this layer
        _edit_heads[(n_rows * n_heads, triton.cdiv(n_tokens, block_t))](
            z,
            mask,
            values,
            n_tokens,
            n_heads,
            head_dim,
            *z.stride(),
            *mask.stride(),
            values.stride(0) if len(values) > 1 else 0,
            values.stride(1) if values.shape[1] > 1 else 0,
            *values.stride()[2:],
            ADD=mode == "add",
            SCALE=mode == "scale",
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=1,
        )
    return z


@triton.jit
@no_type_check  # compiled from its source: nothing may wrap it
def _edit_heads(
    z,
    mask,
    values,
    n_tokens,
    n_heads,
    head_dim,
    z_row,
    z_token,
    z_head,
    z_dim,
    mask_row,
    mask_head,
    values_row,
    values_token,
    values_head,
    values_dim,
    ADD: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Offsets in int64: a packed sequence may hold more than 2^31 elements.
    r = (tl.program_id(0) // n_heads).to(tl.int64)
    h = (tl.program_id(0) % n_heads).to(tl.int64)
    if not tl.load(mask + r * mask_row + h * mask_head):
        return
    t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    inside = (t < n_tokens) & (d < head_dim)  # [BLOCK_T, BLOCK_D]
    here = z + r * z_row + t * z_token + h * z_head + d * z_dim
    there = values + r * values_row + t * values_token + h * values_head + d * values_dim
    new = tl.load(there, mask=inside)  # [BLOCK_T, BLOCK_D]
    # In float32, as torch computes half precision: a sum or product of two, rounded twice, is as if rounded once.
    if ADD:
        new = tl.load(here, mask=inside).to(tl.float32) + new.to(tl.float32)
    if SCALE:
        new = tl.load(here, mask=inside).to(tl.float32) * new.to(tl.float32)
    tl.store(here, new.to(z.dtype.element_ty), mask=inside)
