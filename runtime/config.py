"""Every limit and every setting, in one place.

Limits are constants of the design: a queue, loop, retry, wait or body that has no entry here has
no business being unbounded; `device_limits.py`, `pack_limits.py`, `prefetch_limits.py` and
`vigil_limits.py` have some of their own.
`Settings` is what an operator chooses; it crosses to every child process in its `Start` message.
`ModelConfig` is what a model's folder says (`model.toml`) or what was inferred.  Units are the last
word of a name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from overcommit.runtime.pack_limits import CACHE_KEEP_DAYS

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# --- memory -------------------------------------------------------------------------------------
PAGE_BYTES: Final = 4 * KIB
SMALL_CHUNK_BYTES: Final = 2 * MIB
LARGE_CHUNK_BYTES: Final = 64 * MIB
SLAB_MODEL_BYTES_MAX: Final = 1 * MIB  # models up to here share 2 MiB slab chunks
TENSOR_ALIGN_BYTES: Final = 256
IMAGE_ALIGN_BYTES: Final = 4 * KIB
PART_BYTES_MIN: Final = 16 * MIB  # a part that versions may share is about as long, or longer ...
PART_GROWTH: Final = 64  # ... than a 64th of what lies before it: 64 parts a GiB, 400 for 200 GiB
READ_BYTES: Final = 8 * MIB  # one O_DIRECT read; also the unit of a digest
# A packed piece of READ_BYTES that could not be made smaller has heads, tables and padding besides.  Also
# the length of the memory that a piece passes through, packed or not.
PIECE_BYTES_MAX: Final = READ_BYTES + 16 * KIB
PACK_RATIO_MIN: Final = 1.1  # weights that would hold less than so much more are not packed
PACK_SAMPLES: Final = 8  # stretches that say whether it is worth trying ...
PACK_SAMPLE_BYTES: Final = 256 * KIB  # ... each so long
UNPACK_STEP_BYTES: Final = 2 * MIB  # what is decoded at a time where it can; blocks share tables
READS_IN_FLIGHT: Final = 8  # of one load
# More than one load may have in flight: a load that begins finds a free one beside a long load.
READ_THREADS: Final = 12
COPY_THREADS_MAX: Final = 4  # or one per core, where there are fewer
COPY_BYTES_MIN: Final = 4 * MIB  # of one step of a copy between tiers, where so much is left
COPY_BYTES_MAX: Final = 32 * MIB
QUIET_NS: Final = 10_000_000  # after so long without loads others are woken ahead of one
# How long a mover looks for the message that its bell has announced: a decision of the supervisor's.
DECISION_SPIN_NS: Final = 800_000
# How long a supervisor looks for the wish that its bell has announced: what a worker does to a request.
HERALD_SPIN_NS: Final = 400_000
# How long an idle worker watches a state word that the mover has announced: a last step of a copy.
ARRIVAL_SPIN_NS: Final = 500_000
COPY_HERE_BYTES: Final = 4 * MIB  # a warm load up to here is copied by who receives its message
LOADS_IN_FLIGHT_MAX: Final = 4
PIN_BYTES: Final = 256 * MIB  # by one call; from 512 MiB on the kernel compacts, under a lock
COPIES_IN_FLIGHT: Final = 4  # to the GPU; a copy that is under way cannot be overtaken
MEMORY_RESERVE_BYTES: Final = 1 * GIB  # left to everything else when budgets are derived
PREFETCH_BYTES_PER_S: Final = 256 * MIB  # on average; the disk's and the copy's share for guesses
PREFETCH_SHARE: Final = 0.5  # of a tier, for what was prefetched and not used yet
DEVICE_SHARE: Final = 0.65  # of what is available, when no flag says otherwise (CPU only)

# --- processes and rings ------------------------------------------------------------------------
VERSIONS_MAX: Final = 65_536  # slots: the submission's model field is a u16
FRONT_ENDS_MAX: Final = 32
WORKERS_MAX: Final = 64
RING_SLOTS: Final = 1024
POP_MAX: Final = 64
POPS_MAX: Final = 32  # times in a row, of one ring: all that it holds
LISTEN_BACKLOG: Final = 2048
CONTROL_MESSAGE_BYTES_MAX: Final = 128 * KIB
CONTROL_ENCLOSED_BYTES_MAX: Final = 32 * MIB  # of one that is no datagram: 2 million extents
CONTROL_FDS_MAX: Final = 64
CONTROL_BACKLOG_MAX: Final = 4096  # messages a child may leave unread before it counts as hung
HEARTBEAT_NS: Final = 1_000_000_000
RESTART_BUDGET: Final = 30  # deaths ...
RESTART_WINDOW_S: Final = 60.0  # ... within this window before a seat is BROKEN
RESTART_BACKOFF_S: Final = (0.0, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
START_TIMEOUT_S: Final = 120.0
REAP_TIMEOUT_S: Final = 10.0
FORK_SERVER_PAUSE_S: Final = 1.0  # from one start of the fork server to the next
FAILURE_SAID_S: Final = 60.0  # what fails in the supervisor again and again is logged as often
FAILED_TURNS_PAUSE_S: Final = 0.02  # between turns of its loop that fail one after the other
STOP_TIMEOUT_S: Final = 5.0  # for a child to leave after Stop, then SIGKILL
PACK_TIMEOUT_S: Final = 600.0  # without progress; then it is ended.  Compilers take minutes
RETIRE_GRACE_S: Final = 1.0  # a version stays at least this long after its route is gone
ACTIVATIONS_KEPT: Final = 4096  # activation records for status
EXTENTS_SHOWN_MAX: Final = 64  # of one activation, in its record
ATTACHES_KEPT: Final = 1024  # of workers, for status
ATTACHES_UNSAID_MAX: Final = 256  # of one worker, between two heartbeats
ADMIN_REPLY_PART_BYTES: Final = 64 * KIB
QUARANTINE_DEATHS: Final = 3  # of workers, by retried requests, within RESTART_WINDOW_S
QUARANTINE_S: Final = 30.0
SUSPECTS_KEPT: Final = 1024  # requests remembered from the batches of dead workers
HALF_LIFE_S: Final = 48 * 3600.0  # bench/LOG.md says why
HALF_LIFE_S_MIN: Final = 60.0
STAY_S_MAX: Final = 365 * 86_400.0  # the longest `min_resident` and `ttl`
RESERVED_S: Final = 5.0  # of loading, queued for requests that come back when it is done
FAIR_WAIT_S: Final = 10.0  # a wish that waits so long goes first, however much it was charged
LOAD_BACKOFF_S: Final = (0.5, 1.0, 2.0, 5.0, 15.0, 60.0)

# --- requests -----------------------------------------------------------------------------------
NAME_CHARS_MAX: Final = 256
ID_CHARS_MAX: Final = 1024
ERROR_CHARS_MAX: Final = 4096  # what a client sent may be in it
FOREIGN_ERROR_CHARS_MAX: Final = 2000  # a shape mismatch deep inside a model can list megabytes
TENSORS_MAX: Final = 256
RANK_MAX: Final = 16
PICTURE_CHANNELS_MAX: Final = 4  # as many as `kernels/image.py` does
ALIASES_MAX: Final = 64  # of one model
STEPS_MAX: Final = 64  # of one ensemble ...
ENSEMBLE_DEPTH_MAX: Final = 8  # ... and so many deep lies one in another
SEQUENCE_IDLE_US: Final = 1_000_000  # without a request, and the sequence is over
SEQUENCE_CANDIDATES: Final = 128
SEQUENCE_CANDIDATES_MAX: Final = 65_536
SEQUENCE_ID_BYTES_MAX: Final = 128  # of an id that is a text
SEQUENCE_STATE_BYTES_MAX: Final = 1 * GIB  # kept for one version's sequences in one worker
SEQUENCE_UNSENT_MAX: Final = 64  # answers of a version that wait for larger blocks, in one worker
SEQUENCE_REFUSAL_NS: Final = 50_000_000  # before its time is over, who got no slot is told so
WARMUPS_MAX: Final = 64  # requests of one model, and ...
WARMUP_RUNS_MAX: Final = 1000  # ... how often one of them runs
REGIONS_MAX: Final = 1024  # shared memory that clients have registered, for all front ends
OVERRIDES_MAX: Final = 256  # models that clients have loaded with a configuration or files ...
OVERRIDES_BYTES_MAX: Final = 4 * GIB  # ... and what their files may take, of all of them
OVERRIDE_CONFIG_BYTES_MAX: Final = 64 * KIB  # as JSON; it crosses in one control message
TRACED_MODELS_MAX: Final = 1024  # models with trace settings of their own
HEADER_BYTES_MAX: Final = 64 * KIB
BODY_BYTES_MAX: Final = 64 * MIB
PAYLOAD_BYTES: Final = 256 * MIB  # ingress, and as much egress, per front end
BLOCK_BYTES_MIN: Final = 1 * KIB
BLOCK_BYTES_MAX: Final = 64 * MIB
PIPELINE_MAX: Final = 64  # parsed requests that one connection may have waiting
REQUEST_TIMEOUT_MS: Final = 60_000
RETRIES_MAX: Final = 1
NEVER_NS: Final = (1 << 63) - 1  # a deadline that does not come

# --- batching -----------------------------------------------------------------------------------
BATCH_SIZE_MAX: Final = 32
BATCH_SIZE_LIMIT: Final = 4096
QUEUE_SIZE_MAX: Final = 1024
QUEUE_DELAY_US: Final = 0
PRIORITY_LEVELS_MAX: Final = 65_535
QUEUE_LEVELS_MAX: Final = 256  # levels of one model with a policy of their own
METRICS_MODELS: Final = 80  # versions with 11 metric series of their own: under 1,000 in all
METRICS_MODELS_MAX: Final = 10_000
BOUND_MODELS_MAX: Final = 2048  # bound programs that a worker keeps
HEAP_KEPT_BYTES_MAX: Final = 256 * MIB  # that a worker's batches have freed, for the next ones ...
HEAP_BLOCK_BYTES_MAX: Final = 32 * MIB  # ... in blocks up to this long, glibc's most ...
HEAP_IDLE_NS: Final = 10_000_000_000  # ... until it has had no batch for so long
# What the engines of one process copy out of the arena into memory of their own.
PRIVATE_BYTES_MAX: Final = 512 * MIB
PYTHON_START_S: Final = 60.0  # a model's own process, until its `load` has returned
PYTHON_BATCH_S: Final = 100.0  # less than BATCH_TIMEOUT_S: the process goes, the worker stays
PYTHON_MESSAGE_BYTES_MAX: Final = 64 * KIB


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator chose.  `None` means: decide from the machine."""

    repositories: tuple[str, ...] = ()
    cache_dir: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None  # None: no gRPC; 0: a free one
    ssl_certfile: str = ""  # PEM, with the chain; "": no TLS
    ssl_keyfile: str = ""
    front_ends: int = 1
    workers: int = 1  # of each device
    worker_threads: int | None = None
    devices: str = "auto"  # what DEVICE is: "cpu", "cpu:2", numbers of GPUs ("0,1"), or "auto"
    device_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    # Whether weights are packed in HOST and on disk; "auto": where that was measured to be faster.
    host_packing: Literal["auto", "off", "on"] = "auto"
    start_method: Literal["forkserver", "spawn"] = "forkserver"
    allow_code: bool = False
    policy: str = "cost_aware"
    policy_half_life_s: float = HALF_LIFE_S  # of what cost_aware remembers of uses
    admission: bool = True  # refuse at once what cannot be answered in time
    prefetch: bool = True
    prefetch_bytes_per_s: float = PREFETCH_BYTES_PER_S
    prefetch_share: float = PREFETCH_SHARE
    damping: bool = True  # keep what thrashes resident for a while, and giants waiting
    min_resident_s: float = 0.0  # of models that do not say
    ttl_s: float = 0.0  # 0: a model that is idle keeps its bytes until another needs them
    metrics_models: int = METRICS_MODELS
    verify: Literal["first", "always", "never"] = "first"
    payload_bytes: int = PAYLOAD_BYTES
    body_bytes_max: int = BODY_BYTES_MAX
    load_overrides: bool = (
        False  # clients may load models with a configuration or files of their own
    )
    client_shared_memory: bool = False  # clients may name pieces of /dev/shm in place of tensors
    ring_slots: int = RING_SLOTS
    spin_ns: int | None = None
    scan_interval_s: float = 2.0
    pack_timeout_s: float = PACK_TIMEOUT_S  # without progress
    cache_keep_days: float = CACHE_KEEP_DAYS  # of images that nothing needs; 0: for ever
    request_timeout_ms: int = REQUEST_TIMEOUT_MS
    keep_alive_s: int = 75
    drain_timeout_s: float = 30.0
    log_level: str = "info"
    cuda_driver: str = ""  # for tests, as is nvml: see drivers.py
    nvml: str = ""


def smallest(shape: Iterable[int]) -> tuple[int, ...]:
    """Return the smallest shape that this one, with sizes that vary (-1), allows."""
    return tuple(max(1, size) if size < 0 else size for size in shape)


class Picture(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What becomes of pictures: of each value (value / 255 - mean) / std, by channel, in planes."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    datatype: Literal["FP32", "FP16"] = "FP32"


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One input or output.

    `shape` is the full shape, -1 where the size varies; where the model batches, axis 0 is the
    batch.  `axes` names the varying axes ("batch", "sequence"): requests of one batch may differ
    in an axis only if `pad` is set on every input that has it, and an output axis of the same name
    is cut back to the request's own size afterwards.  `reshape`: the model's own shape, where that is
    another one than its clients'.  `picture`: clients give UINT8 pixels, [rows, height, width, channels],
    and the model gets [rows, channels, height, width], normalised.  `declared`: the shape that the model's
    configuration gives an output, which its answers must have; `shape` may be what trials showed, no more.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...] = ()
    pad: float | None = None
    optional: bool = False
    labels: str | None = None  # output: the file, in the model's folder, that names its classes
    reshape: tuple[int, ...] | None = None
    picture: Picture | None = None
    declared: tuple[int, ...] = ()


TimeoutAction = Literal["reject", "delay"]


class QueueLevel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What holds for the requests of one level, in place of what the version says for all."""

    level: int
    max_queue_size: int = QUEUE_SIZE_MAX
    queue_timeout_us: int = 0
    timeout_action: TimeoutAction = "reject"


class Batching(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How requests for one model are gathered.  `max_batch_size` 0: the model does not batch."""

    max_batch_size: int = BATCH_SIZE_MAX
    max_queue_delay_us: int = QUEUE_DELAY_US
    max_queue_size: int = QUEUE_SIZE_MAX
    across_versions: bool = True  # a batch may hold requests of other versions of the program
    preferred_sizes: tuple[int, ...] = ()  # so many rows need not wait for the queue delay
    queue_timeout_us: int = 0  # a request that waits longer is refused; 0: its own time counts
    timeout_action: TimeoutAction = "reject"  # delay: it is not refused, and lets the others pass
    priority_levels: int = 0  # requests have levels from 1, the most urgent, to this; 0: none has
    default_priority: int = 0  # of a request that does not say; 0: the last
    levels: tuple[QueueLevel, ...] = ()

    @property
    def waiting_max(self) -> int:
        """Requests that may wait at a time, of all levels together."""
        rest = max(1, self.priority_levels) - len(self.levels)
        return sum(each.max_queue_size for each in self.levels) + rest * self.max_queue_size


class WarmupInput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One input of a warm-up request; `shape` without the batch, where the model batches."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Literal["zero", "random", "file"] = "zero"
    file: str = ""  # absolute


class Warmup(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request that a worker runs, and forgets, before the first one of a client."""

    name: str
    batch_size: int = 1  # rows, where the model batches
    count: int = 1
    inputs: tuple[WarmupInput, ...] = ()


class Control(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An input that tells a stateful model where in a sequence a request is."""

    kind: Literal["start", "end", "ready", "corrid"]
    name: str
    datatype: str
    values: tuple[float, float] = (0, 1)  # for no and yes


class SequenceState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tensor that goes from one request of a sequence to the next: out of an output, into an input.

    `shape` is a whole shape, as `TensorSpec` has it; `initial` the shape of one row of the first one,
    where `shape` does not say it.
    """

    input: str
    output: str
    datatype: str
    shape: tuple[int, ...]
    initial: tuple[int, ...] = ()
    file: str = ""  # what the first request gets; "": zeros
    is_shown: bool = False  # it is an output for clients as well


class Sequence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model with state: the requests of one correlation id go to one slot of one worker."""

    idle_us: int = SEQUENCE_IDLE_US
    strategy: Literal["direct", "oldest"] = "direct"
    candidates: int = SEQUENCE_CANDIDATES  # oldest: so many are open at a time, in one worker
    utilization: float = 0.0  # direct: the share of the slots that does not wait for the delay
    controls: tuple[Control, ...] = ()
    states: tuple[SequenceState, ...] = ()


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model of an ensemble.  The maps lead from the model's names to the ensemble's."""

    model: str
    version: str = ""  # "": what the model's name means
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}


class Naming(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model's names mean: no image, and nothing that runs, depends on it.

    With neither `latest` nor `specific` every version is served.
    """

    latest: int = 0  # so many of the highest versions are served
    specific: tuple[str, ...] = ()  # these versions are served
    aliases: dict[str, str] = {}  # further names -> a version, or "": what the model's name means
    weights: dict[str, float] = {}  # version -> percent of the requests that name none
    called: str = ""  # what its files call the version, where that is no whole number


class OnnxOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How ONNX Runtime runs a model."""

    prepack: bool = False  # copy weights into a faster layout, in memory of the worker's own
    keep_quantised: bool = False  # make floats of weights at each run, not once: slow and small


class PythonOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a model's own code runs."""

    process: bool = False  # in a process of its own
    venv: str | None = None  # folder of the virtual environment whose Python runs it


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model's folder says of it; everything may be absent."""

    engine: str | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    batching: Batching = msgspec.field(default_factory=Batching)
    pin: bool = False
    priority: int = 0
    min_resident_s: float | None = None  # None: what the server's settings say
    ttl_s: float | None = None
    weight: int = 1  # share of a worker among the models that wait, 1..100
    warm_up: bool = True
    timeout_ms: int | None = None
    allow_code: bool = False
    entry: str | None = None  # model.py: "file.py:ClassName"
    parameters: dict[str, str | int | float | bool] = {}
    warmup: tuple[Warmup, ...] = ()
    sequence: Sequence | None = None
    steps: tuple[Step, ...] = ()  # an ensemble's
    onnx: OnnxOptions | None = None
    python: PythonOptions | None = None
    naming: Naming | None = None
    adapts: bool = False  # its one input is taken under any name and as any kind of number


def imaged(config: ModelConfig) -> ModelConfig:
    """Leave out what no image depends on."""
    return config if config.naming is None else msgspec.structs.replace(config, naming=None)
