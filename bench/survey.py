"""Every architecture of transformers that can be built small, against plain hooked forwards of its own model.

The oracle shares nothing with the engine but which modules are the output projections: a loop of hooks on the model.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import engine
import models
from bench import architectures
from engine.progress import track
from models import Model, zoo

LIMIT = 1e-5  # of the largest logit, or of 1 if that is smaller
ROWS, NEW_TOKENS = 4, 3


@dataclass(frozen=True)
class Finding:
    """What one architecture can do.

    way:     the fastest exact way for rows patched at the last of 30 tokens, or "refused", or "not built".
    why:     why it was refused or not built; what the engine warned of.
    worst:   the largest difference to the oracle as a share of the largest logit, over all cells; cell: where it is.
    crashed: errors that are not the engine's own words.
    """

    architecture: str
    way: str
    why: str = ""
    worst: float = 0.0
    cell: str = ""
    crashed: str = ""

    @property
    def right(self) -> bool:
        return not self.crashed and self.worst <= LIMIT


def survey(only: Sequence[str] = (), progress: bool = True) -> list[Finding]:
    """Of all architectures, or of some."""
    return [look(name) for name in track(list(only) or architectures.names(), "architectures", progress)]


def look(name: str) -> Finding:
    """One architecture, asked everything."""
    found = _look(name, torch.float32)
    if found.worst > LIMIT:  # rounding, or wrong?
        double = _look(name, torch.float64)
        why = f"{found.worst:.0e} in float32 ({found.cell}); the figure is float64's"
        return replace(double, why="; ".join(part for part in (double.why, why) if part))
    return found


def _look(name: str, dtype: torch.dtype) -> Finding:
    if name in architectures.WHY_NOT:
        return Finding(name, "not built", architectures.WHY_NOT[name])
    try:
        hf = architectures.build(name, dtype)
        with torch.no_grad():
            hf(input_ids=torch.arange(1, 9)[None])
    except Exception as error:  # the library's own, with text alone or in a model that small
        first = (str(error).splitlines() or [""])[0]
        return Finding(name, "not built", f"{type(error).__name__}: {first:.120}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = models.wrap(hf, zoo.tiny_tokenizer(), name=name)
            found = {cell: run() for cell, run in cells(model, hf)}
        except models.UnsupportedModelError as error:
            return Finding(name, "refused", str(error))
        except Exception as error:
            return Finding(name, "?", crashed=f"{type(error).__name__}: {str(error).splitlines()[0]:.120}")
    cell = max(found, key=found.__getitem__)
    plan = engine.plan(model, list(range(1, 31)), rows=ROWS)
    why = (
        ""
        if plan.strategy == "packed"
        else plan.reason.removeprefix("nothing is shared: ").removeprefix("not packed: ")
    )
    ours = [str(one.message) for one in said if str(one.message).startswith(f"{name}: ")]
    return Finding(name, plan.strategy, why or "; ".join(ours), found[cell], cell)


def cells(model: Model, hf: nn.Module) -> Iterator[tuple[str, Callable[[], float]]]:
    """What is asked: lengths one after the other on one model, positions, late heads, prompts together, and so on."""
    shape, random = model.shape, torch.Generator().manual_seed(0)
    heads = torch.rand(ROWS, shape.n_layers, shape.n_heads, generator=random) < 0.4
    late = torch.zeros(12, shape.n_layers, shape.n_heads, dtype=torch.bool)
    late[torch.arange(12), -1, torch.arange(12) % shape.n_heads] = True
    values = torch.randn(shape.n_layers, shape.n_heads, shape.head_dim, generator=random).to(model.dtype)
    ids = torch.randint(1, min(architectures.VOCABULARY, shape.vocab_size), (30,), generator=random).tolist()
    given = dict(heads=heads, values=values)

    def compare(prompts: Any, positions: Any = -1, mask: Tensor = heads) -> float:
        got = engine.patch(model, prompts, heads=mask, values=values, positions=positions)
        several = isinstance(prompts, list) and not isinstance(prompts[0], int)
        at = [positions] if isinstance(positions, int) else positions
        each = [p if isinstance(p, list) else p.tokens.tolist() for p in (prompts if several else [prompts])]
        want = torch.stack([torch.stack([oracle(model, hf, p, row, values, at) for row in mask]) for p in each])
        return apart(got if several else got[None], want)

    for n_tokens in (2, 4, 30):
        yield f"{n_tokens} tokens", partial(compare, ids[:n_tokens])
    yield "positions [-3, -1]", lambda: compare(ids, [-3, -1])
    yield "late heads", lambda: compare(ids, mask=late)
    yield "three lengths", lambda: compare([ids[:11], ids, ids[7:10]])
    yield "prefix used again", lambda: compare(prefix(model, ids))
    yield "capture", lambda: apart(engine.capture(model, [ids, ids[:9]]), capture(model, hf, [ids, ids[:9]]))
    yield "generate", lambda: generated(model, hf, ids[:12], **given)


def prefix(model: Model, ids: list[int]) -> Any:
    try:
        return engine.prefill(model, ids)
    except models.UnsupportedModelError:  # nothing is shared
        return ids


def apart(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


@torch.no_grad()
def oracle(
    model: Model,
    hf: nn.Module,
    ids: list[int],
    mask: Tensor,
    values: Tensor,
    positions: Sequence[int],
    keep: Any = None,
) -> Tensor:
    """Last-token logits of one row by hooks on the model's output projections; keep: a list that z of them goes to."""

    def hook(layer: int, width: int) -> Any:
        def pre(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone().unflatten(-1, (len(mask[layer]), width))  # [1, T, H, D]
            for position in positions:
                z[0, position, mask[layer]] = values[layer, mask[layer], :width]
            if keep is not None:
                keep.append(torch.nn.functional.pad(z[0, -1], (0, values.shape[-1] - width)))
            return (z.flatten(-2), *args[1:])

        return pre

    projections: Any = model.projections  # type: ignore[attr-defined]
    handles = []
    for layer, projection in enumerate(projections):
        width = projection.weight.shape[0 if type(projection).__name__ == "Conv1D" else 1] // mask.shape[1]
        handles.append(projection.register_forward_pre_hook(hook(layer, width)))
    try:
        return hf(input_ids=torch.tensor([ids])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def capture(model: Model, hf: nn.Module, prompts: list[list[int]]) -> Tensor:
    shape = model.shape
    nothing = torch.zeros(shape.n_layers, shape.n_heads, dtype=torch.bool)
    found = []
    for ids in prompts:
        kept: list[Tensor] = []
        oracle(model, hf, ids, nothing, torch.zeros(*nothing.shape, shape.head_dim, dtype=model.dtype), (), kept)
        found.append(torch.stack(kept))
    return torch.stack(found)


def generated(model: Model, hf: nn.Module, ids: list[int], heads: Tensor, values: Tensor) -> float:
    """0 if all rows go on with the oracle's tokens, or others as likely up to rounding; else what they differ by."""
    text = model.tokenizer.decode(ids)
    ids = model.encode(text).tolist()
    got = engine.generate(model, text, heads=heads, values=values, patched="all", max_new_tokens=NEW_TOKENS)
    worst = 0.0
    for row, answer in zip(heads, got, strict=True):
        grown, said = list(ids), ""
        for _ in range(NEW_TOKENS):
            logits = oracle(model, hf, grown, row, values, range(len(ids) - 1, len(grown)))
            token = int(logits.argmax())
            if token in model.eos:
                break
            grown.append(token)
            said = model.decode(torch.tensor(grown[len(ids) :]))
            if said != answer[: len(said)]:
                first, second = logits.topk(2).values.tolist()
                worst = max(worst, (first - second) / max(1.0, logits.abs().max().item()))
                break
        else:
            worst = max(worst, float(said != answer and worst == 0))
    return worst


HEAD = """# Architectures

Made by `python -m bench families --all --write docs/architectures.md`: every architecture of transformers' mapping of
causal language models and of image-text models, as a tiny random model on text, float32. Each is asked for rows of 2,
4, then 30 tokens on one wrapped model, positions `[-3, -1]`, heads of the last layer, three lengths in one call, a
prefix used again, captured z, and answers, all against plain hooked forwards of transformers' own model. The figure:
the largest difference, as a share of the largest logit (or of 1, if that is smaller). Not built: transformers' own
error, where its small model does not run on text alone.
"""


def markdown(found: Sequence[Finding]) -> str:
    """The page of the documentation."""
    rows = ["| architecture | fastest exact way | largest difference | why no faster |", "|---|---|---|---|"]
    for one in found:
        figure = "" if one.way in ("refused", "not built") else f"{one.worst:.0e}"
        why = (one.crashed or one.why).replace("|", "/").splitlines()
        rows.append(f"| {one.architecture} | {one.way} | {figure} | {why[0] if why else ''} |")
    return "\n".join([HEAD, tally(found), "", *rows]) + "\n"


def tally(found: Sequence[Finding]) -> str:
    ways = Counter(one.way for one in found)
    wrong = [one.architecture for one in found if not one.right]
    said = ", ".join(f"{count} {way}" for way, count in ways.most_common())
    bad = ", ".join(wrong) or "none"
    return f"{len(found)} architectures: {said}. Wrong, or ended by an error that is not ours: {bad}."
