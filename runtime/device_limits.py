"""The limits of GPUs, and of several devices in one server; most others are in `config.py`.

Units are the last word of a name.
"""

from __future__ import annotations

from typing import Final

from overcommit.runtime.config import GIB, KIB, MIB

# --- a GPU's memory -------------------------------------------------------------------------------
# CUDA: chunks of DEVICE, each a descriptor in the supervisor.  As many as possible are of 2 MiB: parts are
# 16 to 64 MiB long, and what lies before another part may take no 64 MiB chunk.  117 GiB are 60,000.
# A process has twice as many descriptors at most: eight such GPUs stay under 1,048,576, four under 524,288.
CUDA_CHUNKS_MAX: Final = 60_000
# Where DEVICE is a GPU: what of its free memory stays for everything but weights.
CUDA_CONTEXT_BYTES: Final = 512 * MIB  # of each worker; the probe has one of its own while it asks
CUDA_RESERVE_BYTES: Final = 1 * GIB  # for what models compute with, graphs, libraries ...
CUDA_RESERVE_SHARE: Final = 0.05  # ... or of the GPU's memory, if that is more
CUDA_HOST_SHARE: Final = 0.60  # of what is available: HOST is all that takes host memory then
GRAPHS_MAX: Final = 512  # CUDA graphs that a worker keeps
GRAPH_SHAPES_MAX: Final = (
    32  # shapes of one model that are watched, and captured if they come again
)
GRAPH_AFTER: Final = (
    2  # calls of a shape before it is captured: libraries load and choose meanwhile
)
# A batch on its way: estimates until `bench gpu` has measured them.
FLIGHTS_MAX: Final = 4  # lanes whose batches are under way at once, each on a stream
FLIGHT_SPIN_NS: Final = (
    1_000_000  # a batch is asked without a pause whether it is done, so long ...
)
FLIGHT_NAP_NS: Final = 100_000  # ... and then with pauses of this
COPY_FROM_BYTES: Final = 64 * KIB  # pieces from here on are copied, shorter ones are gathered
GATHER_ROWS_MAX: Final = (
    4096  # rows of one launch, of all tensors; larger batches are made by the CPU
)
PAYLOAD_PIN_BYTES: Final = 64 * MIB  # of payload memory are registered with CUDA at a time
PROBE_TIMEOUT_S: Final = 60.0  # a driver that hangs must not keep the server from saying so
GPU_FREE_LOW_BYTES: Final = (
    256 * MIB
)  # less than this is free on the GPU: DEVICE gives some back ...
GPU_FREE_GOAL_BYTES: Final = 1 * GIB  # ... until so much is
GPU_KEEP_SHARE: Final = 0.25  # of itself that DEVICE keeps
GPU_SHRINK_PAUSE_NS: Final = 5_000_000_000
GPU_FREE_GROW_BYTES: Final = (
    1536 * MIB
)  # so much is free, in as many readings in a row: DEVICE grows ...
GPU_GROW_LOOKS: Final = 30
GPU_GROW_LOOKS_MAX: Final = (
    16 * GPU_GROW_LOOKS
)  # ... twice as many after each time that was too soon ...
GPU_GROW_REGRET_NS: Final = 600_000_000_000  # ... because DEVICE had to shrink within this
GPU_GROW_CHUNKS: Final = (
    16  # that the mover makes at once: its control thread does nothing else then ...
)
GPU_GROW_BYTES: Final = 256 * MIB  # ... and bytes of them, if these are less
GPU_GROW_PAUSE_NS: Final = 50_000_000  # between two such steps
GPU_WATCH_S: Final = 1.0  # between two readings of NVML
XIDS_KEPT: Final = 32
FDS_SPARE: Final = 1024  # descriptors of the supervisor beside those of chunks

# --- copies from DEVICE to HOST -------------------------------------------------------------------
DEMOTE_FREE_SHARE: Final = 0.05  # of DEVICE is free at most: else nobody has to leave soon
DEMOTE_SHARE: Final = 0.125  # of DEVICE whose versions, the next to leave, are to be on HOST
DEMOTE_LOOKS: Final = 32  # at versions, each time
DEMOTE_GAIN: Final = (
    2.0  # a read from disk takes so many times as long as a copy, or nothing is copied
)
DEMOTE_PAUSES: Final = 4  # after a copy, times as long as it took
DEMOTE_REST_NS: Final = 500_000_000  # after there was nothing to copy

# --- several devices ------------------------------------------------------------------------------
DEVICES_MAX: Final = 16
SPREAD_INTERVAL_S: Final = 1.0  # between two looks
SPREAD_SLACK: Final = 0.1  # of a device's memory, by which a site may be ahead and still get kin
QUEUE_BATCHES: Final = 2  # that wait for each worker of a version: one device is not enough ...
REPLICA_LOOKS: Final = 3  # ... if so many looks in a row say so
COLD_LOOKS: Final = 30  # in a row with hardly anybody waiting: one device is enough again
REST_LOOKS: Final = 10  # in which a version that was moved is left alone
HOMES_A_MESSAGE: Final = 4096  # entries of a datagram
SETTLE_LOOKS: Final = 10  # after which what was promised to a device is seen there, or was not used
MOVES_MAX: Final = 8  # versions that leave one device at one look
FULL_SHARE: Final = 1.0  # of DEVICE: the versions in use need more ...
ROOM_SHARE: Final = 0.9  # ... and stay below this where they go
LOST_STARTS: Final = 3  # a device whose processes die so often before they serve is lost
LOST_XIDS: Final = frozenset((79,))  # what the driver says of a GPU that is off the bus
