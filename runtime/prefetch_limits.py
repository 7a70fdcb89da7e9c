"""The limits of loads before requests; what operators may set of them is in `config.py`.

Units are the last word of a name.
"""

from __future__ import annotations

from typing import Final

PREFETCH_COPIES_IN_FLIGHT: Final = 2
PREFETCH_READS_IN_FLIGHT: Final = 2  # what a foreground load may find before it on the disk
PREFETCH_WINDOW_S: Final = 60.0  # over which the average is taken
PREFETCH_IDLE_S: Final = 60.0  # nobody leaves for a prefetch who was used more recently
PREFETCH_EXPIRY_S: Final = 3600.0  # not used for so long: it was a mistake
PREFETCH_INTERVAL_S: Final = 1.0
PREFETCH_LOOKS: Final = 256  # models whose counters are read, and whose chance is taken, at a time
PREFETCH_WISHES_MAX: Final = 8
PREFETCH_VICTIMS_MAX: Final = 64  # holders that one prefetch looks at
PREFETCH_DISPLACED_MAX: Final = 4096
PREFETCH_MODELS_MAX: Final = 20_000
PREFETCH_SAVE_S: Final = 300.0  # what was learnt is written as often
