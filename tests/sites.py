"""What tests of sites share: patches drawn at random, said to the engine and, row by row, to plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import engine
import models
from tests import plain

STRATEGIES = ("auto", "packed", "layered", "expanded", "batch", "naive")
MODES = ("replace", "add", "scale")
POSITIONS = (-1, [-3, -1], 0)
LIMIT = 1e-5
CORE = ("llama", "gpt2", "gemma2")


def having(*some: str, of: Sequence[str] = tuple(plain.LAYOUTS)) -> list[Any]:
    """Families and each of the sites they have; of those not in `some`, marked slow."""
    return [
        pytest.param(family, site, marks=[pytest.mark.slow] * (family not in some), id=f"{family}-{site}")
        for family in of
        for site in plain.LAYOUTS[family].sites()
    ]


def every(*some: str) -> list[Any]:
    return [pytest.param(family, marks=[pytest.mark.slow] * (family not in some)) for family in plain.LAYOUTS]


def halved(layer: int, x: Tensor) -> Tensor:
    """An edit: no site's own."""
    return x * (0.5 + 0.1 * layer)


class Family:
    """A tiny model, wrapped, and two of the same that the engine never sees."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32):
        self.name = name
        processor = models.tiny.tiny_processor(name) if name in models.tiny.IMAGE_TEXT else None
        tokenizer = None if processor else models.tiny.tiny_tokenizer()
        self.model = models.wrap(plain.made(name, dtype), tokenizer, processor=processor, name=name)
        self.same, self.double = plain.made(name, dtype), plain.made(name, torch.float64)
        self.sites = plain.LAYOUTS[name].sites()
        with torch.no_grad():
            found = plain.activations(self.same, name, [1, 2, 3], self.sites)
        self.n_layers = plain.n_layers(self.same, name)
        self._sizes = {site: x.shape[2:] for site, x in found.items()}

    def sizes(self, site: str, n_tokens: int) -> tuple[int, int, int]:
        """Layers, units, width."""
        units, width = self._sizes[site]
        return self.n_layers, units, n_tokens if site in ("scores", "pattern") else width


@dataclass
class Case:
    """One `engine.Patch` of R rows. values: [R or 1, P or 1, layers, units, width], or a number."""

    site: str
    units: Tensor
    values: Tensor | float
    positions: int | list[int]
    mode: str

    @property
    def record(self) -> Any:
        values = self.values
        if isinstance(values, Tensor) and values.shape[1] == 1:
            values = values[0, 0] if len(values) == 1 else values[:, 0]
        return engine.Patch(self.site, self.units, values, self.positions, self.mode)

    def of(self, row: int, n_tokens: int) -> list[plain.Change]:
        units, values = self.units[row if len(self.units) > 1 else 0], self.values
        if isinstance(values, Tensor):
            values = values[row if len(values) > 1 else 0]
        return plain.patched(self.site, units, values, listed(self.positions), self.mode)


@dataclass
class Out:
    """One `engine.Knockout`. heads: [R, layers, heads] or None; keys: a list, or one a row."""

    heads: Tensor | None
    keys: list[Any]
    positions: int | list[int]
    sizes: tuple[int, int] = (0, 0)

    @property
    def record(self) -> Any:
        return engine.Knockout(self.heads, self.keys, self.positions)

    def of(self, row: int, n_tokens: int) -> list[plain.Change]:
        heads = torch.ones(1, *self.sizes, dtype=torch.bool) if self.heads is None else self.heads
        keys = self.keys
        if isinstance(keys[0], list):
            keys = keys[row if len(keys) > 1 else 0]
        return plain.knocked_out(heads[row if len(heads) > 1 else 0], keys, listed(self.positions))


@dataclass
class Function:
    """One `engine.Edit`, of one row: the same for all."""

    site: str
    layers: list[int]
    function: Callable[[int, Tensor], Tensor]
    positions: int | list[int] = -1
    rows: int = 1

    @property
    def record(self) -> Any:
        return engine.Edit(self.site, self.layers, self.function, self.rows, self.positions)

    def of(self, row: int, n_tokens: int) -> list[plain.Change]:
        at = [p % n_tokens for p in listed(self.positions)]

        def one(layer: int) -> plain.Change:
            def change(x: Tensor) -> Tensor:
                return x.index_copy(0, torch.tensor(at), self.function(layer, x[None, at].clone())[0])

            return self.site, layer, change

        return [one(layer) for layer in self.layers]


def listed(positions: int | list[int]) -> list[int]:
    return positions if isinstance(positions, list) else [positions]


def draw(
    family: Family,
    site: str,
    random: torch.Generator,
    *,
    n_tokens: int,
    rows: int = 4,
    positions: int | list[int] = -1,
    mode: str = "replace",
    per_row: bool = False,
    per_position: bool = False,
) -> Case:
    """Some units of some layers in every row: of the last row none, of the one before none in the first half."""
    layers, units, width = family.sizes(site, n_tokens)
    mask = torch.rand(rows, layers, units, generator=random) < (0.7 if units == 1 else 0.4)
    mask[:, -1, 0] = True
    if rows > 1:
        mask[-2, : layers // 2] = False
        mask[-1] = False
    at = [p % n_tokens for p in listed(positions)]
    sizes = (rows if per_row else 1, len(at) if per_position else 1, layers, units, width)
    values = torch.randn(sizes, generator=random)
    if site == "pattern":
        values = weights(values, at if per_position else [min(at)])
        if mode == "scale":
            values = values * 5
    return Case(site, mask, values, positions, mode)


def weights(values: Tensor, at: Sequence[int]) -> Tensor:
    """Attention of tokens `at` over those up to themselves, from numbers [rows, positions, ..., tokens]."""
    tokens = torch.arange(values.shape[-1])
    later = torch.stack([tokens > token for token in at]).view(1, len(at), 1, 1, -1)
    return values.masked_fill(later, -torch.inf).softmax(-1)


def prompt(random: torch.Generator, n_tokens: int = 12) -> list[int]:
    return torch.randint(97, (n_tokens,), generator=random).tolist()


@torch.no_grad()
def oracle(hf: Any, name: str, ids: Sequence[int], cases: Sequence[Any], rows: int, **inputs: Tensor) -> Tensor:
    """One plain forward a row."""
    changes = [[change for case in cases for change in case.of(row, len(ids))] for row in range(rows)]
    return torch.stack([plain.logits(hf, name, ids, some, **inputs) for some in changes])


class Wanted:
    """What plain forwards say, in float64, and how far those in the model's own dtype are from it."""

    def __init__(self, family: Family, ids: Sequence[int], cases: Sequence[Any], rows: int, **inputs: Tensor):
        own = oracle(family.same, family.name, ids, cases, rows, **inputs)
        inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
        self.logits = oracle(family.double, family.name, ids, cases, rows, **inputs)
        self.rounding = (own.double() - self.logits).abs().max().item()

    def near(self, got: Tensor, *about: Any) -> None:
        assert got.shape == self.logits.shape, about
        off = (got.detach().double() - self.logits).abs().max().item()
        assert off <= LIMIT + self.rounding, (off, self.rounding, *about)


def exact(family: Family, ids: Any, cases: Sequence[Any], rows: int = 4, strategies: Sequence[str] = STRATEGIES) -> int:
    """Every strategy that is not refused, and naive, against plain forwards. Returns how many were not refused."""
    wanted = Wanted(family, ids, cases, rows)
    records = [case.record for case in cases]
    ran = 0
    for strategy in strategies:
        try:
            got = engine.patch(family.model, ids, records, strategy=strategy)
        except models.UnsupportedModelError:
            assert strategy in ("packed", "layered", "expanded"), strategy
            continue
        wanted.near(got, strategy)
        ran += 1
    wanted.near(engine.naive.patch(family.model, ids, records), "engine.naive")
    return ran
