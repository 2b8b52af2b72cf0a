"""The comparison on pictures runs, both ways agree, and pictures are looked at once."""

import models
from bench import pictures


def test_both_ways_agree():
    result = pictures.measure(models.load("smollm2-eyes"), rows=2, rounds=1)
    assert result["vision tower runs"] == 1
    assert result["largest logit difference"] < 2e-4
    assert result["ours, seconds"] > 0
