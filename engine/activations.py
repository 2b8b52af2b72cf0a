"""What the heads output: z captured at chosen tokens, and its mean over many prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from engine.checking import check_once
from engine.intervention import read_patch
from engine.planning import MAX_TOKENS
from engine.prefix import Prefix, as_prefix
from engine.progress import track
from engine.runner import segment
from models import Model, PromptLike
from models.shapes import Float


def capture(
    model: Model, prompts: Iterable[PromptLike], positions: int | Sequence[int] = -1, *, progress: bool = False
) -> Float[Tensor, "prompts ..."]:
    """z, what every head outputs before W_O, at one token of each prompt (default the last) or at several.

    Returns Float[N, L, H, D] in the model's dtype, or Float[N, P, L, H, D] if `positions` is a list of P. Raises
    ValueError for no prompts or an empty one, IndexError for a position outside a prompt.

    >>> engine.capture(model, ["Q: hot\\nA:", "Q: big\\nA:"]).shape[0]
    2
    """
    one = isinstance(positions, int)
    at = read_patch(model.shape, None, None, positions).positions
    chunks = list(_stream(model, prompts, at, progress))
    if not chunks:
        raise ValueError("no prompts were given")
    z = torch.cat(chunks)
    return z[:, 0] if one else z


def mean_activations(
    model: Model, prompts: Iterable[PromptLike], *, progress: bool = True
) -> Float[Tensor, "layers heads head_dim"]:
    """Mean over prompts of z at the last token: the values a task vector carries.

    Streamed: memory does not grow with the number of prompts. Summed in float64, returned in float32.
    Raises ValueError for no prompts, an empty one, or a model whose activations are not finite.

    Source: Multimodal Task Vectors (arXiv 2406.15334), section 3.1.

    >>> means = engine.mean_activations(model, ["Q: hot\\nA:", "Q: big\\nA:"], progress=False)
    """
    total, count = None, 0
    for z in _stream(model, prompts, (-1,), progress):
        summed = z[:, 0].double().sum(dim=0)
        total = summed if total is None else total + summed
        count += len(z)
    if total is None:
        raise ValueError("no prompts were given")
    if not total.isfinite().all():
        raise ValueError(f"{model.name} gives NaN or infinite activations on these prompts")
    return (total / count).float()


def _stream(
    model: Model, prompts: Iterable[PromptLike], positions: tuple[int, ...], progress: bool
) -> Iterator[Float[Tensor, "some positions layers heads head_dim"]]:
    """Z of a few prompts at a time: as many as one forward takes."""
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, got one string")
    few: list[tuple[Prefix, list[int]]] = []  # prompts, and the positions wanted of each
    for one in track(prompts, "activations", progress):
        prompt = as_prefix(model, one)
        n_tokens = len(prompt.tokens)
        outside = [p for p in positions if not -n_tokens <= p < n_tokens]
        if outside:
            raise IndexError(f"position {outside[0]} lies outside the prompt, which has {n_tokens} tokens")
        at = [p % n_tokens for p in positions]
        full = sum(len(p.tokens) for p, _ in few) + n_tokens > MAX_TOKENS
        unlike = few and n_tokens - min(at) != len(few[0][0].tokens) - min(few[0][1])
        alone = prompt.prompt.inputs or (few and few[0][0].prompt.inputs)
        if few and (full or unlike or alone or model.packing_refused):
            yield _capture(model, few)
            few = []
        few.append((prompt, at))
    if few:
        yield _capture(model, few)


@torch.no_grad()
def _capture(
    model: Model, few: list[tuple[Prefix, list[int]]]
) -> Float[Tensor, "some positions layers heads head_dim"]:
    """One forward. Prompts are packed with one unpatched row each, from the first wanted position on."""
    check_once(model, few[0][0])
    if model.packing_refused and len(few) > 1:
        return torch.cat([_capture(model, [one]) for one in few])
    plain = bool(model.packing_refused or few[0][0].prompt.inputs)
    starts = [0 if plain else min(at) for _, at in few]
    where = torch.tensor([[p - s for p in at] for (_, at), s in zip(few, starts, strict=True)], device=model.device)
    prompt = torch.arange(len(few), device=model.device)[:, None]
    kept: list[Tensor] = []

    def keep(layer: int, z: Tensor) -> Tensor:
        kept.append(z[prompt, where])  # [prompts, positions, H, D]
        return z

    if plain:
        model.forward(few[0][0].tokens[None], keep, inputs=few[0][0].prompt.inputs)
    else:
        segments = [segment(p, s, 1) for (p, _), s in zip(few, starts, strict=True)]
        model.pack(segments, keep, logits=False)
    return torch.stack(kept, dim=2)
