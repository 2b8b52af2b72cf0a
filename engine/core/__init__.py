"""Patches as data, the plan, the prefix, the one runner, the oracle: what every question is asked through."""
