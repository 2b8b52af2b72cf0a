"""VTV for text and images: the search of Visual Task Vectors (arXiv 2404.05729) on a language model, as Multimodal Task
Vectors compares with it (arXiv 2406.15334, appendix B.2).

    mean [L, H, D] = z of the last token, averaged over 10 one-shot prompts
    heads          = MTV-EXTRACT of 10 steps on one-shot examples, whatever the format that the task is asked in later

The loss is cross-entropy in place of the squared error of pixels. What the paper does not say is as in MTV's reference
code: theta begins at -1, 32 rollouts a step, the best of ten draws. The original's finer granularity, heads by
quadrants of a masked autoencoder's image, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.artifacts import TaskVector
from engine.core.activations import mean_activations
from engine.core.reading import check_model
from engine.methods import mtv
from engine.tasks.scoring import ExampleLike, check_examples, read_examples
from models import Model
from models.reading import read_int, read_seed
from models.shapes import Integer

ITERATIONS = 10


def extract(
    model: Model,
    examples: Sequence[ExampleLike],
    *,
    iterations: Integer = ITERATIONS,
    rollouts: Integer = 32,
    lr: float = 0.1,
    seed: Integer = 0,
    validation: Sequence[ExampleLike] | None = None,
    progress: bool = True,
) -> TaskVector:
    """Heads and means from a few one-shot prompts.

    examples:   prompts of one demonstration and a query, with the query's answer; at least `iterations`. The first
                `iterations` give the means; each step of the search draws one of all of them.
    iterations: prompts that are averaged, and steps of the search; default 10 each.
    rollouts, lr, seed: as in `engine.mtv.extract`. validation: that choose among ten draws; default all of `examples`.

    Raises ValueError for fewer examples than iterations, and as `engine.mtv.extract`.

    Source: Multimodal Task Vectors (arXiv 2406.15334), appendix B.2.

    >>> examples = engine.tasks.load("antonyms").few_shot([Pair("hot", "cold"), Pair("up", "down")], shots=1, count=2)
    >>> engine.vtv.extract(model, examples, iterations=2, rollouts=4, progress=False).metadata["method"]
    'vtv'
    """
    check_model(model)
    iterations, examples = read_int(iterations, "iterations", None), read_examples(examples)
    if not 1 <= iterations <= len(examples):
        raise ValueError(f"expected iterations from 1 to {len(examples)}, the number of examples, got {iterations}")
    mtv.read_options(steps=iterations, rollouts=rollouts, lr=lr)
    seed, unseen = read_seed(seed), read_examples(validation, "validation examples") if validation else []
    check_examples(model, [*examples, *unseen])  # before the means
    means = mean_activations(model, [example.prompt for example in examples[:iterations]], progress=progress)
    vector = mtv.extract(
        model, examples, means, steps=iterations, rollouts=rollouts, lr=lr, seed=seed,
        validation=validation or examples, progress=progress,
    )  # fmt: skip
    vector.metadata["method"] = "vtv"
    return vector
