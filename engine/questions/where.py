"""Where prompts are patched: at which site and tokens, what is there, and what comes before computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from engine.core.activations import capture
from engine.core.patches import Positions, no_patch
from engine.core.prefix import Prefix, compute, patched_positions, shareable
from engine.core.reading import read_positions, read_site
from models import Site
from models.reading import as_int, read_list
from models.shapes import Float, Integer

# One token; several, one at a time; every token, one at a time; all tokens at once, each with its own value; or tokens
# by name, an index for each prompt.
Places: TypeAlias = Positions | Literal["all", "together"] | Mapping[str, Sequence[Integer]]
# Tokens of a prompt that are patched together, each with its own value.
Spot: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Where:
    """spots: of every prompt, patched one at a time. names: theirs, where they are a dimension of the result."""

    site: Site
    spots: tuple[tuple[Spot, ...], ...]
    names: tuple[int | str, ...] | None = None

    def activations(self, n: int, prompt: Prefix) -> Float[Tensor, "spots tokens layers units width"]:
        """What stands in the unpatched prompt (or a source of it) at the spots of prompt n."""
        spots = self.spots[n]
        found = capture(prompt.model, [prompt], [at for spot in spots for at in spot], sites=self.site)[0]  # type: ignore[list-item]
        return found.unflatten(0, (len(spots), -1))

    def at(self, n: int, n_tokens: int) -> list[Spot]:
        """The spots of prompt n, counted from its start."""
        return [tuple(at % n_tokens for at in spot) for spot in self.spots[n]]

    @property
    def only_last(self) -> bool:
        return all(spot == (-1,) for spots in self.spots for spot in spots)

    @property
    def described(self) -> Any:
        """As JSON."""
        if self.names is not None:
            return list(self.names)
        return list(self.spots[0][0]) if len(self.spots[0][0]) == 1 else "together"

    def labels(self, prompts: Sequence[Prefix]) -> list[str] | None:
        """The text at each position, where these are tokens: that of the first prompt, "..." after it where others
        have another.
        """
        model = prompts[0].model
        if self.names is None or model.tokenizer is None or any(isinstance(name, str) for name in self.names):
            return None
        texts = []
        for p in range(len(self.names)):
            ids = [prompt.tokens[self.spots[n][p][0]] for n, prompt in enumerate(prompts)]
            texts.append(model.decode(ids[0][None]) + ("" if len({int(i) for i in ids}) == 1 else "..."))
        return texts


def computed(prompt: Prefix, last: int) -> Prefix:
    """The prompt computed up to this token, for passes that follow; as it is if nothing is shared."""
    return compute([prompt], [shareable(prompt, last)])[0]


def read_where(prompts: Sequence[Prefix], site: Site, positions: Places) -> Where:
    """Raises TypeError or IndexError for positions that are none of every prompt, ValueError for prompts whose lengths
    differ where they must not, on an image token, or for a site that has no values to patch in.
    """
    read_site(prompts[0].model, site)
    if site == "scores":
        raise ValueError("scores of tokens that are not seen are -inf: sweep 'pattern', or engine.sweep_knockout")
    spots, names = _read_spots(prompts, positions)
    for prompt, own in zip(prompts, spots, strict=True):
        for spot in own:
            patched_positions(no_patch(prompts[0].model.shape.n_layers, positions=spot), prompt)
    return Where(site, spots, names)


def _read_spots(
    prompts: Sequence[Prefix], positions: Any
) -> tuple[tuple[tuple[Spot, ...], ...], tuple[int | str, ...] | None]:
    lengths = [len(prompt.tokens) for prompt in prompts]
    if isinstance(positions, Mapping):
        return _read_named(positions, len(prompts))
    if isinstance(positions, str):
        if positions == "together":
            return tuple((tuple(range(length)),) for length in lengths), None
        if positions != "all":
            raise ValueError(f"positions must be tokens, 'all', 'together' or tokens by name, got {positions!r}")
        same_length(lengths, "at all positions, one at a time,")
        return (tuple((at,) for at in range(lengths[0])),) * len(prompts), tuple(range(lengths[0]))
    at = read_positions(positions)
    return (tuple((p,) for p in at),) * len(prompts), None if as_int(positions) is not None else at


def _read_named(positions: Mapping[Any, Any], count: int) -> tuple[tuple[tuple[Spot, ...], ...], tuple[str, ...]]:
    if not positions:
        raise ValueError("no positions were named")
    each = []
    for name, given in positions.items():
        found = [as_int(at) for at in read_list(given)]
        if not isinstance(name, str) or None in found:
            raise TypeError(f"positions by name must be an index for each prompt, got {name!r}: {given!r:.80}")
        if len(found) != count:
            raise ValueError(f"position {name!r} must be given for each of {count} prompts, got {len(found)}")
        each.append(found)
    return tuple(tuple((at,) for at in own) for own in zip(*each, strict=True)), tuple(positions)


def same_length(lengths: Sequence[int], what: str) -> None:
    """Raises ValueError naming a prompt that is longer or shorter than the first."""
    if odd := [n for n, length in enumerate(lengths) if length != lengths[0]]:
        raise ValueError(
            f"{what} prompts must have the same number of tokens: prompt 0 has {lengths[0]}, prompt {odd[0]} "
            f"{lengths[odd[0]]}; name positions instead, {{'subject': [5, 4, ...]}}"
        )


def check_pair(n: int, prompt: Prefix, source: Prefix, what: str) -> None:
    """Raises ValueError for a source whose tokens do not stand where those of its prompt do."""
    if len(prompt.tokens) != len(source.tokens):
        raise ValueError(
            f"prompt {n} has {len(prompt.tokens)} tokens, its source {len(source.tokens)}: {what} they must match "
            "(at -1 they need not)"
        )
