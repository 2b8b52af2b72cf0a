"""What a caller gave as patches, read: checked in full against the model before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from engine.core.patches import Change, Edit, Heads, Knockout, Mode, One, Patch, Patches, Positions, Units, Values
from models import Model, Shape, Site, SiteShape
from models.reading import as_int, read_int, read_list, read_tensor
from models.shapes import Bool, Float

SITES: tuple[Site, ...] = get_args(Site)


def check_model(model: Any) -> None:
    """Raises TypeError for a model that was not wrapped."""
    if not hasattr(model, "rules"):
        kind = type(model).__name__
        raise TypeError(
            f"expected a model of models.load(...) or models.wrap(...), got {kind}: wrap it, models.wrap(hf)"
        )


def read_patches(
    model: Model,
    patches: One | Sequence[One] | None = None,
    heads: Heads = None,
    values: Values = None,
    positions: Positions = -1,
    mode: Mode = "replace",
) -> Patches:
    """Patches, and after them heads and values as one more, of z. Raises TypeError, ValueError, IndexError or
    UnsupportedModelError naming what was given and what was expected.
    """
    check_model(model)
    given = _listed(patches)
    where, mode = read_positions(positions), read_mode(mode)
    n_layers = model.shape.n_layers
    changes = [_read(model, one) for one in given]
    if heads is None and values is None and given and (where != (-1,) or mode != "replace"):
        raise ValueError("positions and mode belong to each patch: engine.Patch(site, units, values, positions, mode)")
    if heads is not None or not given:
        mask = read_heads(model.shape, heads)
        size = SiteShape(n_layers, model.shape.n_heads, model.shape.head_dim)
        found = read_values(model, values, size, mask, where)
        changes.append(Change(Patch("z", mask, found, where, mode), "z", mask, where, found))
    elif values is not None:
        raise ValueError("values are of heads, and none were given beside the patches: expected heads= as well")
    rows = {len(change.units) for change in changes} - {1}
    if len(rows) > 1:
        said = [f"{len(change.units)} of {change.site}" for change in changes]
        raise ValueError(f"patches must have equally many rows, or one for all: got rows {', '.join(said)}")
    n_rows = max(rows, default=1)
    changes = [
        replace(
            change,
            units=change.units.expand(n_rows, -1, -1),
            keys=change.keys * (n_rows if len(change.keys) == 1 else 1),
        )
        for change in changes
    ]
    return Patches(tuple(changes), n_rows, n_layers)


def _listed(patches: Any) -> list[One]:
    if patches is None:
        return []
    given = [patches] if isinstance(patches, (Patch, Knockout, Edit)) else patches
    if not isinstance(given, Sequence) or isinstance(given, str):
        given = [patches]
    for one in given:
        if not isinstance(one, (Patch, Knockout, Edit)):
            hint = "; masks of heads are heads=" if isinstance(one, Tensor) else ""
            raise TypeError(
                f"patches must be engine.Patch, engine.Knockout or engine.Edit, got {type(one).__name__}{hint}"
            )
    return list(given)


def _read(model: Model, one: One) -> Change:
    positions = read_positions(one.positions)
    if isinstance(one, Knockout):
        model.site("scores")
        everywhere = torch.ones(1, model.shape.n_layers, model.shape.n_heads, dtype=torch.bool)
        mask = everywhere if one.heads is None else read_heads(model.shape, one.heads)
        return _with_keys(one, mask, positions)
    size = read_site(model, one.site)
    if isinstance(one, Edit):
        if not callable(one.function):
            raise TypeError(f"the function of an Edit must be one, function(layer, x) -> x, got {one.function!r:.80}")
        on = read_units(
            one.site, size, [read_int(layer, "a layer", None) for layer in read_list(one.layers)], any_unit=True
        )
        return Change(one, one.site, on.expand(read_int(one.rows, "rows"), -1, -1), positions)
    read_mode(one.mode)
    units = read_units(one.site, size, one.units)
    values = read_values(model, one.values, size, units, positions, f"values of {one.site}", numbers=True)
    if one.site == "pattern" and one.mode == "replace":
        if np.ndim(one.values) == 0:  # type: ignore[arg-type]
            raise ValueError(f"a pattern must be weights, one for each token of the prompt, got {one.values!r}")
        _check_weights(model, units, values)
    return Change(one, one.site, units, positions, values)


def _check_weights(model: Model, units: Bool[Tensor, "rows layers heads"], values: Tensor) -> None:
    """Raises ValueError for a pattern that no softmax gives; with sinks (GPT-OSS), which take a part, weights sum to
    less than one.
    """
    each = values.detach().cpu().expand(len(units), -1, units.shape[1], units.shape[2], -1)
    each = each.permute(0, 2, 3, 1, 4)[units]  # [units that are patched, positions, tokens]
    sums, least = each.sum(dim=-1), min(each.flatten().tolist(), default=0.0)
    sinks = any(hasattr(module, "sinks") for module in getattr(model, "hf", torch.nn.Module()).modules())
    if least < 0 or (sums > 1.001).any() or (not sinks and (sums < 0.999).any()):
        raise ValueError(
            "a pattern must be weights of the tokens of the prompt, not negative, with the sum 1, got sums from "
            f"{sums.min():.3g} to {sums.max():.3g}, the least weight {least:.3g}; engine.Edit takes any"
        )


def _with_keys(one: Knockout, mask: Bool[Tensor, "rows layers heads"], positions: tuple[int, ...]) -> Change:
    given = read_tensor(one.keys, "keys")
    given = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"keys must be positions, or a list of positions a row, got {one.keys!r:.80}")
    rows = list(given)
    each = [[x] if as_int(x) is not None else read_list(x) for x in rows]
    if rows and all(as_int(x) is not None for x in rows):
        each = [rows]
    keys = [tuple(as_int(key) for key in row) for row in each]
    if not keys or any(not row or None in row for row in keys):
        raise TypeError(f"keys must be positions, or a list of positions a row, got {one.keys!r:.80}")
    n_rows = max(len(mask), len(keys))
    if {len(mask), len(keys)} - {1, n_rows}:
        raise ValueError(f"a knockout of {len(mask)} rows of heads must have keys for each of them, got {len(keys)}")
    keys = keys * (n_rows if len(keys) == 1 else 1)
    return Change(one, "scores", mask.expand(n_rows, -1, -1), positions, keys=tuple(keys))  # type: ignore[arg-type]


def read_site(model: Model, site: Any) -> SiteShape:
    """Raises ValueError for a name that is none, UnsupportedModelError for a site that the model does not have."""
    if not isinstance(site, str) or site not in SITES:
        raise ValueError(f"site must be one of {list(SITES)}, got {site!r}")
    return model.site(site)


def read_mode(mode: Any) -> Mode:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    return mode


def read_positions(positions: Positions) -> tuple[int, ...]:
    at = [as_int(position) for position in read_list(positions)]
    if not at or None in at:
        raise TypeError(f"positions must be an int or a list of ints, got {positions!r}")
    return tuple(at)  # type: ignore[arg-type]


def read_heads(shape: Shape, heads: Heads) -> Bool[Tensor, "rows layers heads"]:
    size = SiteShape(shape.n_layers, shape.n_heads, shape.head_dim)
    if heads is None:
        return torch.zeros(1, size.n_layers, size.units, dtype=torch.bool)
    return read_units("z", size, heads, "heads")


def read_units(
    site: Site, size: SiteShape, units: Units, what: str = "", any_unit: bool = False
) -> Bool[Tensor, "rows layers units"]:
    """any_unit: of the layers named all units."""
    n_layers, n_units = size.n_layers, size.units
    unit = "neuron" if site == "mlp_act" else "head"
    what = what or f"units of {site}"
    single = n_units == 1
    kinds = f"a bool mask or a list of (layer, {unit})" if not single else "a bool mask or a list of layers"
    units = read_tensor(units, what)
    if isinstance(units, Tensor) and units.dtype != torch.bool and units.shape[1:] == (2,) and n_units != 2:
        units = units.tolist()  # pairs, as `mask.nonzero()` gives them
    if isinstance(units, Tensor) and single and units.ndim == 1 and units.dtype in (torch.int64, torch.int32):
        units = units.tolist()  # layers
    if not isinstance(units, Tensor):
        if not isinstance(units, Iterable) or isinstance(units, str):
            raise TypeError(f"{what} must be {kinds}, got {units!r}")
        given = [(layer, 0) if (single or any_unit) and as_int(layer) is not None else layer for layer in units]
        mask = _mask_of_pairs(size, given, what, kinds, unit)
        return (mask.any(dim=1, keepdim=True).expand(-1, n_units) if any_unit else mask)[None]
    if units.dtype != torch.bool:
        raise TypeError(f"{what} must be {kinds}, got a tensor of {units.dtype}")
    shape = list(units.shape)
    if single and units.ndim == 2 and units.shape != (n_layers, 1):
        units = units[..., None]
    mask = units[None] if units.ndim == 2 else units
    if mask.ndim != 3 or mask.shape[1:] != (n_layers, n_units) or not len(mask):
        shapes = f"[rows, {n_layers}, {n_units}] or [{n_layers}, {n_units}]"
        raise ValueError(f"{what} must have shape {shapes}, got {shape}")
    for layer, (here, _) in enumerate(size.sizes):
        if mask[:, layer, here:].any():
            raise IndexError(f"{unit} {here} or a later one of layer {layer} is out of range: it has {here}")
    return mask


def _mask_of_pairs(size: SiteShape, pairs: list[Any], what: str, kinds: str, unit: str) -> Bool[Tensor, "layers units"]:
    mask = torch.zeros(size.n_layers, size.units, dtype=torch.bool)
    for pair in pairs:
        try:
            layer, number = (read_int(i, "a number", None) for i in pair)
        except (TypeError, ValueError):
            raise TypeError(f"{what} must be {kinds}, got {pair!r} in the list") from None
        if not 0 <= layer < size.n_layers:
            raise IndexError(
                f"layer {layer} of {unit} {(layer, number)} is out of range: layers are 0..{size.n_layers - 1}"
            )
        most = size.sizes[layer][0] if size.sizes else size.units
        if not 0 <= number < most:
            raise IndexError(f"{unit} {number} of {unit} {(layer, number)} is out of range: {unit}s are 0..{most - 1}")
        mask[layer, number] = True
    return mask


def read_values(
    model: Model,
    values: Values | float | int,
    size: SiteShape,
    mask: Bool[Tensor, "rows layers units"],
    positions: Sequence[int] = (-1,),
    what: str = "values",
    numbers: bool = False,
) -> Tensor:
    """As Float[R or 1, P or 1, L or 1, U or 1, W or 1]; numbers: one number, or one vector, may stand for all."""
    given = float(values) if numbers and isinstance(values, (int, float)) and not isinstance(values, bool) else values
    if isinstance(given, float):
        given = torch.tensor(given, dtype=torch.promote_types(model.dtype, torch.float32))
    read = read_tensor(given, what)
    n_layers, n_units, width = size.n_layers, size.units, size.width
    if read is None:
        if mask.any():
            shape = [n_layers, n_units, width or "tokens"]
            named = "heads are" if what == "values" else f"{what.removeprefix('values of ')} is"
            raise ValueError(f"{named} to be patched but no values were given: expected a tensor {shape}")
        return torch.zeros(1, 1, 1, 1, 1)
    if not isinstance(read, Tensor) or not read.is_floating_point():
        kind = read.dtype if isinstance(read, Tensor) else type(read).__name__
        raise TypeError(f"{what} must be a floating-point tensor, got {kind}")
    found = _by_row_and_position(read, size, len(mask), len(positions), what, numbers)
    if not found.isfinite().all():
        at = (~found.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{what} must be finite, got NaN or inf (first at layer {at[2]}, head {at[3]})")
    check_fits(model, found, what)
    return found


def _by_row_and_position(x: Tensor, size: SiteShape, rows: int, positions: int, what: str, numbers: bool) -> Tensor:
    if numbers and (x.ndim == 0 or (x.ndim == 1 and size.units == 1 and len(x) == size.width)):
        return x.reshape(1, 1, 1, 1, -1)
    each = (size.n_layers, size.units, size.width or (x.shape[-1] if x.ndim else 0))
    lead = tuple(x.shape[:-3])
    known = {(), (rows,), (rows, 1), (1, positions), (rows, positions)} | ({(positions,)} if rows == 1 else set())
    if tuple(x.shape[-3:]) != each or lead not in known:
        words = [str(size.n_layers), str(size.units), str(size.width or "tokens")]
        said = f"[{', '.join(words)}], or [{', '.join([str(rows), *words])}] for one set a row"
        if positions > 1:
            said += f", or [{', '.join([f'1 or {rows}', str(positions), *words])}] for one a position"
        raise ValueError(f"{what} must have shape {said}, got {list(x.shape)}")
    if x.ndim == 4:
        return x[:, None] if rows > 1 else x[None]
    return x if x.ndim == 5 else x[None, None]


def read_means(model: Model, means: Values, site: Site = "z") -> Float[Tensor, "layers units width"]:
    """Values of all units of a site, for all rows and positions."""
    size = read_site(model, site)
    found = read_values(model, means, size, torch.ones(1, size.n_layers, size.units, dtype=torch.bool))
    if len(shape := list(getattr(means, "shape", ()))) != 3:
        raise ValueError(f"means must have shape {[size.n_layers, size.units, size.width]}, got {shape}")
    return found[0, 0]


def check_fits(model: Model, given: Tensor, what: str) -> None:
    """Raises ValueError for numbers that are finite, but not in the model's dtype."""
    most = torch.finfo(model.dtype).max
    if torch.finfo(given.dtype).max > most and (largest := given.detach().abs().max()).to(model.dtype).isinf():
        raise ValueError(
            f"{what} must be finite in {model.dtype}, the dtype of {model.name}, whose greatest number is {most:.5g}: "
            f"got {largest:.5g}"
        )
