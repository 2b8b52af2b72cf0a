"""What is asked of every prompt, by a sweep and by an attribution alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.core.prefix import Prefix, as_prefix
from engine.distributed import digest
from engine.questions.effects import Effects
from engine.questions.groups import Units
from engine.questions.origins import Origin
from engine.questions.scoring import Answers, Scoring
from engine.questions.where import Where
from engine.tasks.scoring import Example, ExampleLike, as_example
from models import Model, PromptLike
from models.shapes import Float


@dataclass(frozen=True, eq=False)
class Asked:
    """The prompts, where they are patched, with what, and what scores the runs.

    Raises ValueError for answers that do not fit behind their prompts.
    """

    prompts: list[Prefix]
    where: Where
    origin: Origin
    scoring: Scoring

    def __post_init__(self) -> None:
        self.scoring.check(self.prompts)

    @property
    def model(self) -> Model:
        return self.prompts[0].model

    @property
    def known(self) -> dict[str, Any]:
        """What tells it from others, as JSON: in the result's metadata, in checkpoints, compared by ranks."""
        every = [*self.prompts, *self.origin.sources]
        pixels = [x for prompt in every for x in prompt.prompt.inputs.values()]
        tokens = [prompt.tokens.tolist() for prompt in every]
        return dict(
            model=self.model.name,
            metric=self.scoring.metric,
            scored=self.scoring.scored,
            values=self.origin.described,
            site=self.where.site,
            positions=self.where.described,
            data=digest(tokens, self.where.spots, self.scoring.targets, self.scoring.others, *pixels),
        )

    def effects(
        self,
        patched: Float[Tensor, "prompts spots units"],
        clean: Float[Tensor, " prompts"],
        units: Units,
        reference: Float[Tensor, " prompts"] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Effects:
        """The result of all prompts."""
        where, names = self.where, units.names
        patched = patched.unflatten(2, units.shape)
        return Effects(
            patched if where.names is not None else patched[:, 0],
            clean,
            reference,
            groups=None if units.masks is None or names is None else dict(zip(names, units.masks, strict=True)),
            positions=None if where.names is None else list(where.names),
            metric=self.scoring.metric,
            metadata={**self.known, **(metadata or {}), "prompts": len(self.prompts)},
            site=where.site,
            tokens=where.labels(self.prompts),
        )


def read_prompts(
    model: Model, prompts: Sequence[PromptLike | ExampleLike], targets: Answers
) -> tuple[list[PromptLike], list[Prefix], Answers]:
    """The prompts as they were given, and encoded; and their targets, those of Examples if these are given."""
    if isinstance(prompts, (str, Example)) or not isinstance(prompts, Sequence) or not len(prompts):
        raise ValueError(f"expected a list of prompts, got {prompts!r:.80}")
    given: list[Any] = list(prompts)
    if examples := [example for one in prompts if (example := as_example(one)) is not None]:
        if len(examples) < len(prompts) or targets is not None:
            raise ValueError("prompts must be all Examples, which bring their targets, or none of them")
        given, targets = [one.prompt for one in examples], [one.answer for one in examples]
    return given, [as_prefix(model, one) for one in given], targets
