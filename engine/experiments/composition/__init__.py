"""Task vectors of weights, composed in every way, on real sets: what `headpatch weights` runs.

results = engine.experiments.composition.run("images", folder="out/weights-images")
"""

from engine.experiments.composition.running import DEFAULTS, Options, Results, run
from engine.experiments.composition.ways import WAYS

__all__ = ["DEFAULTS", "WAYS", "Options", "Results", "run"]
