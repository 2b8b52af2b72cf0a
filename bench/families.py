"""Is every family exact? Tiny random models: strategies against naive in float32, against float64 in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

import engine
import models
from engine import naive
from engine.core.planning import Strategy
from engine.progress import track
from models import Model, lens, nnsight_backend, tiny
from models.opening import Backend

STRATEGIES = tuple(s for s in get_args(Strategy) if s not in ("auto", "naive"))
LIMIT = 1e-5
BACKENDS = get_args(Backend)
HEAD = """# Families, backends, strategies

Made by `python -m bench families --write docs/families.md`. Tiny random models with the real layouts, prompts longer
than every window, positions `-1` and `[-3, -1]`, replace and add; image-text families with one and three pictures.
Each cell: the largest absolute logit difference to `engine.naive` in float32 and, in brackets, the largest distance to
a float64 run in bfloat16 as a share of the naive bfloat16 forward's (the float64 run is plain transformers').
`auto` takes the first strategy from the left that is not refused; `nan`: the backend does not run it in bfloat16.
"""


@dataclass(frozen=True)
class Cell:
    """One strategy on one family, by one backend.

    difference: largest absolute logit difference to naive in float32, over prompts, positions and modes.
    bf16:       largest distance to float64 in bfloat16, as a share of the naive bfloat16 forward's.
    refused:    why the strategy is not offered; empty if it is.
    """

    family: str
    backend: str
    strategy: str
    difference: float = 0.0
    bf16: float = 0.0
    refused: str = ""

    @property
    def exact(self) -> bool:
        return not self.refused and self.difference <= LIMIT and self.bf16 <= 2

    def __str__(self) -> str:
        return "refused" if self.refused else f"{self.difference:.0e} ({self.bf16:.2f})"


def measure(families: list[str] | None = None, backends: Sequence[str] = BACKENDS) -> list[Cell]:
    """Cells of the families given; default all."""
    every = [(family, backend) for family in families or [*tiny.TEXT, *tiny.IMAGE_TEXT] for backend in backends]
    return [cell for one in track(every, "families", True) for cell in cells(*one)]


def cells(family: str, backend: str = "huggingface") -> Iterator[Cell]:
    """Every strategy on a family; a backend that does not know the family refuses all."""
    double = wrapped(family, torch.float64)
    try:
        single = wrapped(family, torch.float32, backend)
    except models.UnsupportedModelError as error:
        yield from (Cell(family, backend, strategy, refused=str(error)) for strategy in STRATEGIES)
        return
    try:
        half = wrapped(family, torch.bfloat16, backend)
    except models.UnsupportedModelError:
        half = None
    for strategy in STRATEGIES:
        try:
            differences = [_difference(single, strategy, request) for request in requests(single)]
            ratios = [_half(half, double, strategy, request) for request in requests(half, short=True)] if half else []
            yield Cell(family, backend, strategy, max(differences), max(ratios, default=float("nan")))
        except models.UnsupportedModelError as error:
            yield Cell(family, backend, strategy, refused=str(error).split(": ", 1)[1])


def wrapped(family: str, dtype: torch.dtype = torch.float32, backend: str = "huggingface") -> Model:
    """A tiny model of the family, with its processor if it sees images."""
    hf = tiny.tiny(family).to(dtype)
    if dtype == torch.float64:
        hf.set_experts_implementation("eager")  # grouped products know no float64
    processor = tiny.tiny_processor(family) if family in tiny.IMAGE_TEXT else None
    tokenizer = None if processor else tiny.tiny_tokenizer()
    if backend == "huggingface":
        return models.wrap(hf, tokenizer, processor=processor, name=family)
    module = lens if backend == "transformer_lens" else nnsight_backend
    return module.from_huggingface(hf, tokenizer, processor=processor, name=family)


def requests(model: Model, short: bool = False) -> Iterator[dict[str, Any]]:
    """What is asked of every family: odd lengths beyond every window, several positions, both modes, images."""
    random, noise = torch.Generator().manual_seed(0), np.random.default_rng(0)
    shape = model.shape
    heads = torch.rand(4, shape.n_layers, shape.n_heads, generator=random) < 0.4
    heads[2:, : shape.n_layers // 2] = False  # rows that may come in later
    values = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random)
    if getattr(model, "processor", None) is None:
        prompts: list[Any] = [torch.randint(97, (n,), generator=random).tolist() for n in (3, 29)]
    else:
        pictures = [Image.fromarray(noise.integers(0, 255, (28, 28, 3), dtype=np.uint8)) for _ in range(4)]
        shot = f"Q: {models.IMAGE} which?\nA: red\n"
        prompts = [
            models.Prompt(shot * n + f"{models.IMAGE} Q: this one?\nA:", tuple(pictures[: n + 1])) for n in (0, 2)
        ]
    for prompt in prompts[-1:] if short else prompts:
        for positions in ([-1],) if short else ([-1], [-3, -1]):
            for mode in ("replace",) if short else ("replace", "add"):
                yield dict(prompt=prompt, heads=heads, values=values, positions=positions, mode=mode)


def _difference(model: Model, strategy: str, request: dict[str, Any]) -> float:
    got = engine.patch(model, strategy=strategy, **request)  # type: ignore[arg-type]
    return (got - naive.patch(model, **request)).abs().max().item()


def _half(half: Model, double: Model, strategy: str, request: dict[str, Any]) -> float:
    truth = naive.patch(double, **request)
    got = engine.patch(half, strategy=strategy, **request)  # type: ignore[arg-type]
    return ((got - truth).abs().max() / (naive.patch(half, **request) - truth).abs().max()).item()


def markdown(found: list[Cell]) -> str:
    """The table of the documentation."""
    rows = ["| family | backend | " + " | ".join(STRATEGIES) + " |", "|---" * (len(STRATEGIES) + 2) + "|"]
    for family, backend in dict.fromkeys((cell.family, cell.backend) for cell in found):
        row = [str(cell) for cell in found if (cell.family, cell.backend) == (family, backend)]
        rows.append(f"| {family} | {backend} | " + " | ".join(row) + " |")
    refused: dict[str, list[str]] = {}
    for cell in found:
        if cell.refused:
            refused.setdefault(cell.refused, []).append(f"{cell.family} ({cell.backend})")
    why = [f"- {', '.join(dict.fromkeys(who))}: {reason}." for reason, who in refused.items()]
    return "\n".join([HEAD, *rows, "", "## Refused, and why", "", *why]) + "\n"
