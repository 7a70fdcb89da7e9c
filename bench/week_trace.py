"""A seeded trace of requests whose demand moves: days and nights, weekends, models that come and go.

The trace of `catalogue_trace` is stationary, and says nothing about how fast a policy should forget.
Here each model has a popularity (a power law), hours in which it is used, and a life: some are there
all the time, some are launched in the middle and rise within a day, some fade away.  Requests come in
sessions of one model, as users make them.  It starts on a Monday at midnight.

The proportions are assumptions, not measurements.  Pure.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from overcommit.bench.catalogue_trace import Request

MODELS: Final = 120
DAYS: Final = 28
REQUESTS: Final = 30_000  # expected
HOUR_S: Final = 3600.0
POPULARITY_FALL: Final = 1.1  # exponent of the power law
SESSION_REQUESTS: Final = 4.0  # in the mean
SESSION_GAP_S: Final = 90.0
HOURS: Final = ("always", "office", "evening", "nightly")
HOURS_SHARES: Final = (0.3, 0.4, 0.15, 0.15)
LIVES: Final = ("steady", "launched", "fading")
LIVES_SHARES: Final = (0.5, 0.25, 0.25)
REST: Final = 0.02  # of its demand, that a model has outside its hours

Floats = NDArray[np.float64]


def _demand(kind: str, hours: Floats, own_hour: int) -> Floats:
    """How much a model is used in each hour of the trace, from 0 to 1."""
    hour, day = hours % 24, hours // 24 % 7
    is_weekend = day >= 5
    if kind == "always":
        return 0.6 + 0.4 * np.sin((hour - 8) / 24 * 2 * np.pi)
    if kind == "office":
        is_on = (hour >= 8) & (hour < 18) & ~is_weekend
    elif kind == "evening":
        is_on = ((hour >= 19) & (hour < 23)) | (is_weekend & (hour >= 10) & (hour < 23))
    else:
        is_on = hour == own_hour
    return np.where(is_on, 1.0, REST)


def _life(kind: str, hours: Floats, turn: float) -> Floats:
    """How much of its popularity a model has in each hour, from 0 to 1."""
    if kind == "steady":
        return np.ones_like(hours)
    days = (hours - turn) / 24
    if kind == "launched":
        return np.where(days < 0, 0.0, 1 - np.exp(-np.maximum(days, 0)))
    return 0.5 ** np.maximum(days, 0)  # halves each day


def demand(random: np.random.Generator, days: int = DAYS) -> Floats:
    """Return the relative demand, by hour and model; model 0 would be the most popular."""
    hours = np.arange(days * 24, dtype=np.float64)
    weights = np.arange(1, MODELS + 1) ** -POPULARITY_FALL
    kinds = random.choice(HOURS, size=MODELS, p=HOURS_SHARES)
    lives = random.choice(LIVES, size=MODELS, p=LIVES_SHARES)
    columns = [
        weight
        * _demand(str(kind), hours, int(random.integers(0, 6)))
        * _life(str(life), hours, random.uniform(0.1, 0.9) * len(hours))
        for weight, kind, life in zip(weights, kinds, lives, strict=True)
    ]
    return np.stack(columns, axis=1)


def make_trace(seed: int = 1, requests: int = REQUESTS, days: int = DAYS) -> list[Request]:
    """Draw a trace of about so many requests, in order of time."""
    random = np.random.default_rng(seed)
    by_hour = demand(random, days)
    expected = by_hour * (requests / SESSION_REQUESTS / by_hour.sum())
    trace: list[Request] = []
    for hour, model in zip(*np.nonzero(sessions := random.poisson(expected)), strict=True):
        for _ in range(sessions[hour, model]):
            start_s = (hour + random.random()) * HOUR_S
            count = random.geometric(1 / SESSION_REQUESTS)
            gaps = random.exponential(SESSION_GAP_S, size=count)
            gaps[0] = 0.0
            times = (start_s + np.cumsum(gaps)).tolist()
            trace += [Request(time_s, int(model)) for time_s in times]
    return sorted(trace, key=lambda request: (request.time_s, request.model))
