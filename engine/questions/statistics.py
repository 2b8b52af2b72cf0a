"""How sure effects are: bootstrap intervals and sign-flip tests, of x [prompts, units] in float64."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from models.reading import read_int, read_seed
from models.shapes import Float, Integer

Correction: TypeAlias = Literal["max", "holm", "fdr"]

AT_ONCE = 1024  # units whose resampled means are held at once


def bootstrap(
    x: Float[Tensor, "prompts units"], level: float, resamples: Integer, seed: Integer
) -> tuple[Float[Tensor, " units"], Float[Tensor, " units"]]:
    """Low and high end of the interval of each unit's mean: BCa, every unit resampled alike."""
    stats = needed("scipy.stats", "intervals")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    resamples, seed = _read_resamples(resamples), read_seed(seed)
    low, high = x[0].clone(), x[0].clone()
    varied = (x != x[0]).any(dim=0).nonzero().flatten()
    for units in varied.split(AT_ONCE):
        with warnings.catch_warnings(action="ignore"):  # of what cannot be had, which is said below
            found = stats.bootstrap(
                (x[:, units].numpy(),),
                _mean,
                confidence_level=level,
                n_resamples=resamples,
                batch=max(1, 2**22 // (len(x) * len(units))),
                vectorized=True,
                rng=seed,
            ).confidence_interval
        low[units], high[units] = torch.from_numpy(found.low), torch.from_numpy(found.high)
    if broken := int((low.isnan() | high.isnan()).sum()):
        said = f"intervals of {broken} units are NaN: {resamples} resamples of {len(x)} prompts do not give them"
        warnings.warn(said, stacklevel=3)
    return low, high


def sign_flips(
    x: Float[Tensor, "prompts units"], correction: Correction | None, resamples: Integer, seed: Integer
) -> Float[Tensor, " units"]:
    """The p of each mean: the share of flips of the prompts' signs that put it as far from zero, corrected."""
    check_correction(correction)
    resamples, seed = _read_resamples(resamples), read_seed(seed)
    n = len(x)
    exact = 2 ** (n - 1) <= resamples
    signs = _all_signs(n) if exact else _drawn_signs(n, resamples, seed)
    # |sum| / norm is in the order of |t|: flips leave the norm alone. The largest is 1 lest squares underflow.
    x = x / x.abs().amax(dim=0).clamp(min=torch.finfo(x.dtype).tiny)
    x = x / x.norm(dim=0).clamp(min=1)
    seen = x.sum(dim=0).abs() - 1e-12  # flips that tie with what was seen count, whatever they round to
    hits, largest = [], torch.zeros(len(signs), dtype=torch.float64)
    for some, bar in zip(x.split(AT_ONCE, dim=1), seen.split(AT_ONCE), strict=True):
        flipped = (signs @ some).abs()
        hits.append((flipped >= bar).sum(dim=0))
        largest = torch.maximum(largest, flipped.amax(dim=1))
    if correction == "max":
        hits = [len(signs) - torch.searchsorted(largest.sort().values, seen)]
    count = torch.cat(hits).double()
    p = count / len(signs) if exact else (count + 1) / (len(signs) + 1)
    if correction == "holm":
        return holm(p)
    if correction == "fdr":
        return torch.from_numpy(needed("scipy.stats", "correction 'fdr'").false_discovery_control(p.numpy()))
    return p


def check_correction(correction: Correction | None) -> None:
    if correction is not None and correction not in get_args(Correction):
        raise ValueError(f"correction must be one of {get_args(Correction)} or None, got {correction!r}")


def _all_signs(n: int) -> Float[Tensor, "flips prompts"]:
    """The last prompt keeps its sign: turning all of them round changes no absolute mean."""
    bits = torch.arange(2 ** (n - 1))[:, None] >> torch.arange(n) & 1
    return 1 - 2 * bits.double()


def _drawn_signs(n: int, flips: int, seed: int) -> Float[Tensor, "flips prompts"]:
    random = torch.Generator().manual_seed(seed)
    return 1 - 2 * torch.randint(2, (flips, n), generator=random).double()


def holm(p: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """Holm, A simple sequentially rejective multiple test procedure (1979)."""
    ordered, order = p.sort()
    adjusted = (ordered * torch.arange(len(p), 0, -1)).cummax(dim=0).values.clamp(max=1)
    return torch.empty_like(p).scatter_(0, order, adjusted)


def spearman(one: Float[Tensor, "..."], other: Float[Tensor, "..."]) -> float:
    """Rank correlation over units. Raises ValueError for shapes that differ, or units that are all the same."""
    stats = needed("scipy.stats", "rank correlations")
    if one.shape != other.shape:
        raise ValueError(f"the other must have shape {list(one.shape)}, got {list(other.shape)}")
    for means in (one, other):
        if means.unique().numel() < 2:
            raise ValueError("a rank correlation needs units whose effects differ")
    return float(stats.spearmanr(one.flatten().numpy(), other.flatten().numpy()).statistic)


def needed(module: str, what: str, extra: str = "stats") -> Any:
    """A module that not every installation has. Raises ImportError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"{what} need {package}: pip install 'headpatch[{extra}]'") from error


def _mean(x: Any, axis: int) -> Any:
    return x.mean(axis=axis)


def _read_resamples(resamples: Integer) -> int:
    if (found := read_int(resamples, "resamples", None)) < 1:
        raise ValueError(f"resamples must be at least 1, got {found}")
    return found
