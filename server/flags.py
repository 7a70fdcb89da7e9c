"""The options of `overcommit serve`, as the command line declares them.

Most are strings that `settings.py` reads, so that a flag and its variable are checked alike and a
flag that is not given stays None.
"""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from overcommit.runtime.config import METRICS_MODELS

Repositories = Annotated[
    list[str] | None,
    Argument(metavar="REPOSITORY...", help="Folders with one folder per model, or URLs of such."),
]
Host = Annotated[str | None, Option(metavar="ADDRESS", help="Address to listen on (127.0.0.1).")]
Port = Annotated[str | None, Option(metavar="N", help="Port; 0 takes a free one (8000).")]
GrpcPort = Annotated[
    str | None,
    Option(metavar="N", help="Port of gRPC; 0: no gRPC, auto: a free one (the HTTP port + 1)."),
]
Grpc = Annotated[
    bool | None,
    Option("--grpc/--no-grpc", help="Serve gRPC beside HTTP (yes, if protobuf is installed)."),
]
SslCertfile = Annotated[
    str | None,
    Option(metavar="FILE", help="Speak TLS, HTTP and gRPC, with this certificate chain (PEM)."),
]
SslKeyfile = Annotated[
    str | None,
    Option(metavar="FILE", help="The certificate's key, not encrypted (in the same file)."),
]
FrontEnds = Annotated[str | None, Option(metavar="N", help="HTTP processes (1).")]
Workers = Annotated[str | None, Option(metavar="N", help="Processes that run models (1).")]
WorkerThreads = Annotated[
    str | None, Option(metavar="N", help="Threads of one worker (the cores, shared out).")
]
Devices = Annotated[
    str | None,
    Option(
        metavar="WHAT", help="Where models run: cpu, cpu:N, numbers of GPUs (0,1), or auto (auto)."
    ),
]
DeviceMemory = Annotated[
    str | None,
    Option(metavar="BYTES", help="For models in use: 4GB, 512MiB (a share of what is free)."),
]
HostMemory = Annotated[
    str | None,
    Option(
        metavar="BYTES",
        help="For models between GPU and disk; 0: no such tier (a share; without a GPU: 0).",
    ),
]
CacheDir = Annotated[
    str | None,
    Option(metavar="FOLDER", help="Where packed weights are kept (~/.cache/overcommit)."),
]
CacheKeepDays = Annotated[
    str | None,
    Option(
        metavar="DAYS",
        help="Packed weights that nothing has needed for so long are removed; 0: never (7).",
    ),
]
AllowCode = Annotated[
    bool | None,
    Option(
        "--allow-code/--no-allow-code",
        help="Run the code of models whose model.toml says allow_code (no).",
    ),
]
Policy = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="Which model leaves memory first: cost_aware, lru, lfu_da, gdsf or s3_fifo (cost_aware).",
    ),
]
HostPacking = Annotated[
    str | None,
    Option(
        metavar="MODE",
        help="Weights packed without loss on disk and in HOST: on, off, or auto, where that is faster "
        "(auto).",
    ),
]
PolicyHalfLife = Annotated[
    str | None,
    Option(metavar="SECONDS", help="In which cost_aware forgets half of a model's uses (172800)."),
]
MinResident = Annotated[
    str | None,
    Option(metavar="SECONDS", help="That a loaded model stays at least, unless others starve (0)."),
]
Ttl = Annotated[
    str | None,
    Option(metavar="SECONDS", help="Without a use, then a model leaves memory; 0: never (0)."),
]
MetricsModels = Annotated[
    str | None,
    Option(metavar="N", help=f"Models with metric series of their own ({METRICS_MODELS})."),
]
Admission = Annotated[
    bool | None,
    Option(
        "--admission/--no-admission",
        help="Refuse at once what cannot be answered within its time (yes).",
    ),
]
Damping = Annotated[
    bool | None,
    Option(
        "--damping/--no-damping",
        help="While models push each other out, let each stay a while (yes).",
    ),
]
Prefetch = Annotated[
    bool | None,
    Option(
        "--prefetch/--no-prefetch",
        help="Load models before the hour in which they are usually asked for (yes).",
    ),
]
PrefetchRate = Annotated[
    str | None,
    Option(metavar="BYTES", help="That prefetches load a second, on average (256MiB)."),
]
PrefetchShare = Annotated[
    str | None,
    Option(metavar="SHARE", help="Of each tier, for what was prefetched and not used yet (0.5)."),
]
StartMethod = Annotated[
    str | None, Option(metavar="NAME", help="Start workers by forkserver or spawn (forkserver).")
]
Verify = Annotated[
    str | None,
    Option(metavar="WHEN", help="Check digests of weights: first, always or never (first)."),
]
PayloadMemory = Annotated[
    str | None,
    Option(metavar="BYTES", help="Per front end, for requests and again for answers (256MiB)."),
]
MaxBody = Annotated[str | None, Option(metavar="BYTES", help="Longest request body (64MiB).")]
ClientSharedMemory = Annotated[
    bool | None,
    Option(
        "--client-shared-memory/--no-client-shared-memory",
        help="Let clients on this machine name pieces of /dev/shm in place of tensors (no).",
    ),
]
LoadOverrides = Annotated[
    bool | None,
    Option(
        "--load-overrides/--no-load-overrides",
        help="Let clients load models with a configuration or files of their own (no).",
    ),
]
RequestTimeout = Annotated[
    str | None, Option(metavar="SECONDS", help="Longest that a request may take (60).")
]
DrainTimeout = Annotated[
    str | None, Option(metavar="SECONDS", help="To finish requests when told to stop (30).")
]
ScanInterval = Annotated[
    str | None, Option(metavar="SECONDS", help="Between two looks at the repositories (2).")
]
PackTimeout = Annotated[
    str | None,
    Option(metavar="SECONDS", help="That packing one version may go on without progress (600)."),
]
SpinUs = Annotated[
    str | None, Option(metavar="US", help="How long a process polls before it sleeps.")
]
LogLevel = Annotated[
    str | None, Option(metavar="LEVEL", help="debug, info, warning or error (info).")
]
