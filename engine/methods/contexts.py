"""Questions after demonstrations, beside the same ones without: what methods compare."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.core.activations import capture
from engine.core.prefix import Prefix, as_prefix
from engine.distributed import digest
from engine.tasks.scoring import ExampleLike, as_example
from models import Model, PromptLike, Site
from models.shapes import Float


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


def states(
    model: Model, prompts: Sequence[Prefix], site: Site, progress: bool
) -> Float[Tensor, "prompts layers units width"]:
    """Of each prompt's last token, in float32 on the CPU. Raises ValueError for what is not finite."""
    found = capture(model, prompts, sites=site, progress=progress).float().cpu()  # type: ignore[arg-type]
    if not found.isfinite().all():
        n = int((~found.flatten(1).isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(
            f"{model.name} gives NaN or infinite {site} on prompt {n}, {model.decode(prompts[n].tokens)!r:.60}"
        )
    return found


def digest_of(prompts: Sequence[Prefix]) -> str:
    """Equal for prompts of equal tokens and pixels."""
    return digest(*(part for one in prompts for part in (one.tokens, *one.prompt.inputs.values())))
