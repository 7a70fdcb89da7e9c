"""The limits of what a worker may do without moving.

Units are the last word of a name.
"""

from __future__ import annotations

from typing import Final

BATCH_TIMEOUT_S: Final = 120.0  # a batch that runs longer means a hung worker
BATCH_SAID_S: Final = 10.0  # of one that runs longer the log speaks
# A worker that neither starts a batch nor beats for so long is hung.  It does not beat while it collects
# garbage or loads a program.  Less than REQUEST_TIMEOUT_MS: who waits goes to another one in time.
STILL_TIMEOUT_S: Final = 45.0
# A worker is occupied after so long in one batch, and after so many times what its version's batches take;
# then others get what comes for other versions.  That costs little, so it may be soon: beside hung models it
# meets first binds and compilers.
OCCUPIED_S: Final = 1.0
OCCUPIED_BATCHES: Final = 3
OCCUPIED_S_MAX: Final = 30.0  # whatever they take: the mean remembers what has hung before
OCCUPIED_BEATS: Final = 3  # missed by one that is in no batch
