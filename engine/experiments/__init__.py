"""The experiments of the Multimodal Task Vectors paper, each one call: `run("main", model, tasks, folder=...)`."""

from engine.experiments.paper import DATA_SETS, EXPERIMENTS, default_shots
from engine.experiments.running import Results, run
from engine.experiments.setting import Options

__all__ = ["DATA_SETS", "EXPERIMENTS", "Options", "Results", "default_shots", "run"]
