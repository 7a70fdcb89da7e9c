"""Seeded traces of demand that can be learnt, and of demand that cannot.

    hours     each model has an hour of the day: every day, from Monday to Friday, or on weekends; a
              dozen requests at random in that hour, and now and then a day is left out
    jobs      each model is asked by a job: every 10 minutes to 12 hours, with a jitter of 3 % (at most
              two minutes), three requests at a time
    sets      each hour of the day has its dozen models, asked by a power law
    office    models of working days, of weekends and of two hours at night, each asked at random, 1 to 8
              times an hour: which models are in use can be learnt, which is next cannot
    poisson   a power law, at random, at all times

It starts on a Monday at midnight; the first days teach, and count as all others do.  The proportions
are assumptions, not measurements.  Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from overcommit.bench.catalogue_trace import Request

MODELS: Final = 80
DAYS: Final = 21
DAY_S: Final = 86_400.0
HOUR_S: Final = 3600.0
MONDAY_S: Final = 4 * DAY_S  # the epoch was a Thursday
PERIODS_S: Final = (600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14_400.0, 21_600.0, 43_200.0)
SET_MODELS: Final = 12

Draw = Callable[[np.random.Generator, int], list[tuple[float, int]]]


def _hours(random: np.random.Generator, days: int) -> list[tuple[float, int]]:
    found: list[tuple[float, int]] = []
    for model in range(MODELS):
        hour = int(random.integers(0, 24))
        kind = random.choice(3, p=(0.35, 0.5, 0.15))  # every day, working days, weekends
        for day in range(days):
            is_weekend = day % 7 >= 5
            if (kind == 1 and is_weekend) or (kind == 2 and not is_weekend):
                continue
            if random.random() < 0.05:
                continue
            times = random.random(random.poisson(12)) * HOUR_S
            found += [(day * DAY_S + hour * HOUR_S + float(at), model) for at in times]
    return found


def _jobs(random: np.random.Generator, days: int) -> list[tuple[float, int]]:
    found: list[tuple[float, int]] = []
    for model in range(MODELS):
        period_s = float(random.choice(PERIODS_S))
        phase_s = random.random() * period_s
        for turn in range(int(days * DAY_S / period_s)):
            jitter_s = random.normal() * 0.03 * min(period_s, HOUR_S)
            at_s = max(0.0, phase_s + turn * period_s + jitter_s)
            found += [(at_s + 2.0 * request, model) for request in range(3)]
    return found


def _sets(random: np.random.Generator, days: int) -> list[tuple[float, int]]:
    sets = [random.choice(MODELS, size=SET_MODELS, replace=False) for _ in range(24)]
    shares = 1 / np.arange(1, SET_MODELS + 1)
    shares /= shares.sum()
    found: list[tuple[float, int]] = []
    for hour in range(days * 24):
        count = random.poisson(60)
        times = (hour + random.random(count)) * HOUR_S
        ranks = random.choice(SET_MODELS, size=count, p=shares)
        models = sets[hour % 24][ranks]
        found += zip(times.tolist(), models.tolist(), strict=True)
    return found


def _office(random: np.random.Generator, days: int) -> list[tuple[float, int]]:
    found: list[tuple[float, int]] = []
    for model in range(MODELS):
        kind = random.choice(3, p=(0.5, 0.2, 0.3))
        night = int(random.integers(0, 22))
        begin, end = ((9, 17), (10, 22), (night, night + 2))[kind]
        rate = float(random.choice((1, 2, 4, 8)))
        for day in range(days):
            is_weekend = day % 7 >= 5
            if (kind == 0 and is_weekend) or (kind == 1 and not is_weekend):
                continue
            count = random.poisson(rate * (end - begin))
            times = (begin + random.random(count) * (end - begin)) * HOUR_S
            found += [(day * DAY_S + float(at), model) for at in times]
    return found


def _poisson(random: np.random.Generator, days: int) -> list[tuple[float, int]]:
    count = 1000 * days
    shares = 1 / np.arange(1, MODELS + 1)
    times = np.cumsum(random.exponential(days * DAY_S / count, size=count))
    models = random.choice(MODELS, size=count, p=shares / shares.sum())
    return list(zip(times.tolist(), models.tolist(), strict=True))


TRACES: Final[dict[str, Draw]] = {
    "hours": _hours,
    "jobs": _jobs,
    "sets": _sets,
    "office": _office,
    "poisson": _poisson,
}


def make_trace(name: str, seed: int = 1, days: int = DAYS) -> list[Request]:
    """Draw one of `TRACES`, in order of time."""
    drawn = sorted(TRACES[name](np.random.default_rng(seed), days))
    return [Request(MONDAY_S + time_s, model) for time_s, model in drawn]
