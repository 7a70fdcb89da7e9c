"""A seeded trace of requests to many models, like one that was measured on a real service.

What was measured there: 26,798 requests in 23 days to 86 models; the most asked model has 31 % of
the requests, the first 5, 10 and 20 have 70, 87 and 94 %; 74.7 % of the requests ask another model
than the one before; an LRU that holds 1, 2, 4, 8, 16, 32 models misses 74.7, 57.5, 33.9, 14.7, 5.2,
2.0 % of them.

The generator draws each request from the models asked last, by depth, or by popularity alone; the
share and the decay are fitted to those figures.  Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

MODELS: Final = 86
REQUESTS: Final = 26_798
DAYS: Final = 23
# (models, share of the draws by popularity), from the most asked on; recency levels them
_SEGMENTS: Final = ((1, 0.36), (4, 0.40), (5, 0.14), (10, 0.055), (66, 0.045))
_FALL: Final = 0.8  # from one model of a segment to the next
_RECENT_SHARE: Final = 0.41  # of the requests that follow recency ...
_RECENT_FALL: Final = 0.61  # ... and how much less each place of it gets than the one before
TABLE: Final = {1: 0.747, 2: 0.575, 4: 0.339, 8: 0.147, 16: 0.052, 32: 0.020}
TOPS: Final = {1: 0.31, 5: 0.70, 10: 0.87, 20: 0.94}


@dataclass(slots=True, frozen=True)
class Request:
    """One request of a trace."""

    time_s: float
    model: int


def popularity() -> list[float]:
    """Return each model's share, from the most asked on."""
    shares: list[float] = []
    for count, total in _SEGMENTS:
        fall = _FALL if count < 20 else 0.97
        weights = [fall**rank for rank in range(count)]
        shares += [total * weight / sum(weights) for weight in weights]
    return shares


def draw_models(seed: int, requests: int) -> list[int]:
    """Draw which model each request asks for; model 0 is the most popular."""
    random = np.random.default_rng(seed)
    shares = np.array(popularity())
    draws = random.choice(len(shares), size=requests, p=shares / shares.sum())
    recent = random.random(requests) < _RECENT_SHARE
    depths = random.geometric(1 - _RECENT_FALL, size=requests) - 1
    stack: list[int] = []
    models: list[int] = []
    for popular, is_recent, depth in zip(
        draws.tolist(), recent.tolist(), depths.tolist(), strict=True
    ):
        model = stack[depth] if is_recent and depth < len(stack) else popular
        if model in stack:
            stack.remove(model)
        stack.insert(0, model)
        models.append(model)
    return models


def make_trace(seed: int = 1, requests: int = REQUESTS) -> list[Request]:
    """Draw a trace; model 0 is the most popular."""
    # The gaps have a generator of their own: who is asked for does not depend on when.
    random = np.random.default_rng((seed, 1))
    times = np.cumsum(random.exponential(DAYS * 86_400 / REQUESTS, size=requests)).tolist()
    return [
        Request(time_s, model)
        for time_s, model in zip(times, draw_models(seed, requests), strict=True)
    ]


def lru_misses(trace: Sequence[Request], room: int) -> float:
    """Return the share of requests that an LRU with room for so many models misses."""
    stack: list[int] = []
    misses = 0
    for request in trace:
        if request.model in stack:
            stack.remove(request.model)
        else:
            misses += 1
            del stack[room - 1 :]
        stack.insert(0, request.model)
    return misses / len(trace)


def top_share(trace: Sequence[Request], count: int) -> float:
    """Return the share of the requests that the most asked models have together."""
    counts = Counter(request.model for request in trace)
    return sum(number for _, number in counts.most_common(count)) / len(trace)
