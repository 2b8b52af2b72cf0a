"""Fair timings: every way in every round, in changing order; medians and quartiles, ratios round by round."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping

from engine.progress import track


def interleaved(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each way in each round. `wait`: until the device is done, before and after each call."""
    order, seconds = list(ways), {name: [0.0] * rounds for name in ways}
    draw = random.Random(0)
    for name in order:
        for _ in range(warm_up):
            ways[name]()
    for index in track(range(rounds), "timing", progress):
        draw.shuffle(order)
        gc.collect()  # what one way left behind is not another's to clean up
        for name in order:
            wait()
            started = time.perf_counter()
            ways[name]()
            wait()
            seconds[name][index] = time.perf_counter() - started
    return seconds


def summary(samples: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"median": median, "low": low, "high": high}


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Quartiles of over / under, round by round: a drift of the machine cancels."""
    return summary([a / b for a, b in zip(over, under, strict=True)])
