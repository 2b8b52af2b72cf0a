"""A forward with composed weights: one merge for all samples, or weights of each sample's own."""

from __future__ import annotations

from threading import RLock
from typing import Any, get_args

import torch
from torch import Tensor, nn

from engine.weights.kept import ReadApart
from engine.weights.looking import layout_of, widened
from engine.weights.merging import held
from engine.weights.parameters import Blocks, root_of
from engine.weights.products import Way
from engine.weights.reading import check_independent, read_composition, read_inputs
from engine.weights.running import run
from engine.weights.vectors import TaskVectors
from models import Model
from models.shapes import Float

_lock = RLock()


def forward(
    model: nn.Module | Model,
    inputs: Any,
    vectors: TaskVectors,
    coefficients: Float[Tensor, "*batch vectors blocks"],
    *,
    blocks: Blocks = "parameter",
    way: Way = "auto",
) -> Any:
    """What the model gives with weights theta_0 + sum_t c[t, block] tau_t: one such model, or one for each sample.

    model:        any module, or a model of `models.load`; it is left as it was.
    inputs:       a tensor, or the arguments of its forward by name. With weights for each sample, the first dimension
                  of every tensor is samples.
    vectors:      of `engine.weights.task_vectors`, on the model's device and in its dtypes.
    coefficients: [T, blocks], or [batch, T, blocks] for weights of each sample's own; `vectors.blocks(blocks)` names
                  the blocks. Gradients flow to them, and to inputs, none to the model's own weights.
    blocks:       what shares a coefficient: "parameter" (default; tied ones are one), "layer", "model".
    way:          how products with weights of each sample's own are computed: "merge", tile by tile for a few samples
                  at a time; "wide", with all vectors unmerged; "low_rank", for vectors that are; "auto" (default), of
                  these the one of the fewest multiplications.

    No memory grows with samples times weights. Linear layers, convolutions, embeddings and layer norms have forms of
    their own; what else is small runs under `torch.vmap`, and any other module sample by sample: recurrences,
    `nn.MultiheadAttention`, experts and whatever else picks rows by data, or writes to its weights. Which of these a
    model needs is found when it is first met, by forwards of two and of three samples, and compared with
    `engine.weights.naive`; that, and one merge, take one more set of weights. What Python reads of a tensor and decides
    by (`.tolist()`, `if x.any()`) is not seen: a model must not choose its samples' rows so for the whole batch.
    Cached keys and values are not kept (`use_cache=False`). One call at a time; other threads must not run the model
    meanwhile.

    Returns what the model returns. Raises, before anything runs, TypeError or ValueError for what does not fit, batch
    norm that is training, autocast, a way that the vectors do not have; UnsupportedModelError for quantised weights,
    and for a model that gives one number for the whole batch, or whose samples are in none or several dimensions of an
    output that is not the same for all. Warns if all of a model must run sample by sample.

    Source: Knowledge Composition using Task Vectors with Learned Anisotropic Scaling (arXiv 2407.02880), by block; with
    coefficients of each sample's own, Variational Task Vector Composition (arXiv 2509.18208).

    >>> vectors = engine.weights.task_vectors(base := torch.nn.Linear(2, 3), torch.nn.Linear(2, 3))
    >>> engine.weights.forward(base, torch.ones(4, 2), vectors, torch.rand(4, 1, 2)).shape
    torch.Size([4, 3])
    """
    composition = read_composition(model, vectors, coefficients, blocks)
    _check_way(way, vectors)
    module, several = root_of(model), composition.coefficients.ndim == 3
    args, named = read_inputs(model, inputs, len(composition.coefficients) if several else None)
    if several:
        check_independent(module)
    with _lock, torch.compiler.set_stance("force_eager"):
        if not several or len(composition.coefficients) == 1:
            with held(module, composition.sample(0) if several else composition):
                return module(*args, **named)
        layout = layout_of(module, args, named, composition, way)
        while True:
            try:
                return run(module, args, named, composition, layout, way)
            except ReadApart as error:
                layout = widened(module, args, named, composition, way, layout, error.name)


def _check_way(way: Any, vectors: TaskVectors) -> None:
    if way not in get_args(Way):
        raise ValueError(f"way must be one of {get_args(Way)}, got {way!r}")
    if way == "low_rank" and not vectors.factors:
        raise ValueError("way 'low_rank' is for vectors of low rank, got whole ones: expected vectors.low_rank(rank)")
    if way == "wide" and vectors.factors:
        raise ValueError("way 'wide' is for whole vectors, got some of low rank: expected way 'low_rank' or 'merge'")
