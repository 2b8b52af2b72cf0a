"""Questions after demonstrations, beside the same ones without: what methods compare."""

from __future__ import annotations

from collections.abc import Sequence

from engine.core.prefix import Prefix, as_prefix
from engine.distributed import digest
from engine.tasks.scoring import ExampleLike, as_example
from models import Model, PromptLike


def read_contexts(
    model: Model, contexts: Sequence[PromptLike | ExampleLike], count: int | None, what: str = "contexts"
) -> list[Prefix]:
    """Raises ValueError for none, or not as many as there are examples; TypeError for one prompt alone."""
    if isinstance(contexts, str) or not isinstance(contexts, Sequence):
        raise TypeError(f"{what} must be a list of prompts, got {contexts!r:.80}")
    if not contexts or (count is not None and len(contexts) != count):
        wanted = "at least one prompt" if count is None else f"one for each of {count} examples"
        raise ValueError(f"{what} must be {wanted}, got {len(contexts)}")
    return [as_prefix(model, example.prompt if (example := as_example(one)) else one) for one in contexts]  # type: ignore[arg-type]


def digest_of(prompts: Sequence[Prefix]) -> str:
    """Equal for prompts of equal tokens and pixels."""
    return digest(*(part for one in prompts for part in (one.tokens, *one.prompt.inputs.values())))
