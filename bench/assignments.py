"""Which model of a trace has how many bytes: laws by name, or a file that says.

Traces name models and not their sizes, and what a policy is worth depends on them: whether the
popular ones are the large ones, above all.  Pure but for the reading of a file.

Called by the scenario `replay`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

GB: Final = 10**9
MODEL_SIZES_GB: Final = (2.1, 6.9, 13.0, 23.8)

Assignment = Callable[[np.random.Generator, int], list[int]]


def _equal(random: np.random.Generator, count: int) -> list[int]:
    return [8 * GB] * count


def _drawn(random: np.random.Generator, count: int) -> list[int]:
    return [int(size * GB) for size in random.choice(MODEL_SIZES_GB, size=count)]


def _popular_large(random: np.random.Generator, count: int) -> list[int]:
    return [int(24 * GB / (1 + 11 * rank / count)) for rank in range(count)]


def _popular_small(random: np.random.Generator, count: int) -> list[int]:
    return list(reversed(_popular_large(random, count)))


def _lognormal(random: np.random.Generator, count: int) -> list[int]:
    sizes = np.exp(random.normal(1.5, 1.0, size=count)).clip(0.05, 60)
    return [int(size * GB) for size in sizes]


def _wide(random: np.random.Generator, count: int) -> list[int]:
    return [
        int(size) for size in np.exp(random.uniform(np.log(50_000), np.log(30 * GB), size=count))
    ]


# Model 0 is the most popular one of the trace.
ASSIGNMENTS: Final[dict[str, Assignment]] = {
    "equal": _equal,
    "drawn": _drawn,
    "lognormal": _lognormal,
    "popular_large": _popular_large,
    "popular_small": _popular_small,
    "wide": _wide,
}
TITLES: Final = {
    "equal": "equal sizes",
    "drawn": "2.1 to 23.8 GB at random",
    "lognormal": "lognormal",
    "popular_large": "the popular are large",
    "popular_small": "the popular are small",
    "wide": "50 KB to 30 GB, log-uniform",
}
