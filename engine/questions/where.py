"""Where prompts are patched: at which tokens, what the heads output there, and what comes before computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.core.activations import capture
from engine.core.patches import Positions, no_patch
from engine.core.prefix import Prefix, compute, patched_positions, shareable
from engine.core.reading import read_positions
from models.reading import as_int
from models.shapes import Float


@dataclass(frozen=True)
class Where:
    """The patched tokens of every prompt.

    at: positions, patched one at a time. several: they were given as a list, and are a dimension of the result.
    """

    at: tuple[int, ...]
    several: bool = False

    def activations(self, prompt: Prefix) -> Float[Tensor, "positions layers heads head_dim"]:
        """What the heads output there, of the unpatched prompt."""
        return capture(prompt.model, [prompt], self.at)[0]  # type: ignore[list-item]

    def computed(self, prompt: Prefix) -> Prefix:
        """The prompt computed up to the last position, for passes that follow; as it is if nothing is shared."""
        n_tokens = len(prompt.tokens)
        last = max(position % n_tokens for position in self.at)
        return compute([prompt], [shareable(prompt, last)])[0]


def read_where(prompts: Sequence[Prefix], positions: Positions) -> Where:
    """Raises TypeError or IndexError for positions that are none of every prompt, ValueError on an image token."""
    at = read_positions(positions)
    patch = no_patch(prompts[0].model.shape.n_layers, positions=at)
    for prompt in prompts:
        patched_positions(patch, prompt)
    return Where(at, several=as_int(positions) is None)
