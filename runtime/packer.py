"""Making images out of model folders.

Runs in the packer process (`main`), or in the command line's process (`pack`).  It imports torch and
may run a model's code, where allowed.

The way of a version: find the engine -> content key -> an image that exists is reused -> build the
module for real -> trial runs -> manifest -> the program as a worker has it gives the same answer ->
image.

Invariants
 1. The source files are only read.
 2. `pack` never raises: it answers `ok=False` with a message that names the model, the reason and
    the remedy.
 3. No image is left behind by a failure; one under its final name is whole, and was seen to answer
    as the module that was built for real.  (A stripped program may stay: its name is its content.)
    That holds for each version alone, also where thousands have the same program.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import nn

from overcommit.runtime import disk_room, engines, foreign, real_modules, reshape, sources, trials
from overcommit.runtime.config import START_TIMEOUT_S, ModelConfig
from overcommit.runtime.container import TEMPORARY_PREFIX
from overcommit.runtime.control import ControlSocket
from overcommit.runtime.engines import manifest, user_code
from overcommit.runtime.engines.bound_module import BoundModule
from overcommit.runtime.errors import (
    ImageError,
    ModelError,
    OvercommitError,
    ProtocolError,
    RepositoryError,
)
from overcommit.runtime.image import (
    FORMAT_VERSION,
    ImageHeader,
    TensorFacts,
    lay_out,
    layout_hash,
    write_image,
)
from overcommit.runtime.image_cache import program_folder
from overcommit.runtime.kept_images import reusable, rewrite
from overcommit.runtime.messages import LogLevel, Ready, Start, Stop
from overcommit.runtime.packer_messages import Pack, PackDone, PackProgress

log = logging.getLogger("overcommit.packer")

Progress = Callable[[int, int], None]
MESSAGE_CHARS_MAX: Final = 4000
PROGRESS_S: Final = 0.2
STALE_S: Final = 3600.0  # a temporary file this old is of a packer that was killed


# --- packing --------------------------------------------------------------------------------------
def _pack(job: Pack, on_progress: Progress) -> PackDone:
    def on_step() -> None:
        on_progress(0, 0)  # nothing is written yet, but it goes on

    source = sources.find(job)
    if source.kind == "user":
        user_code.require_allowed(f"model '{job.name}'", job.config, job.allow_code)
    key = sources.content_key(job, source, on_step)
    folder = Path(job.cache_dir).absolute() / "images"
    path, other = folder / f"{key}.image", folder / f"{key}p.image"
    if job.packs:
        path, other, key = other, path, f"{key}p"
    if (header := reusable(path)) is not None:
        return _done(job, path, key, header)
    if reusable(other) is not None:
        # The same weights in the other form: they were seen to answer as they should.
        return _done(job, path, key, rewrite(other, path, on_progress, packs=job.packs))
    if source.kind in foreign.KINDS:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = TEMPORARY_PREFIX
        with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as scratch:
            made, tensors_of = foreign.make(job, source, Path(scratch), on_step)
            header = write_image(path, made, tensors_of, on_progress, packs=job.packs)
            return _done(job, path, key, header)
    prepared = real_modules.prepare(job, source)
    on_step()
    # What a tuple's elements are called is for the model's configuration to say.
    names = ModelConfig(inputs=job.config.inputs or prepared.known.inputs)
    names = msgspec.structs.replace(names, outputs=job.config.outputs)
    real = BoundModule(prepared.call, names)
    with _only_reading(prepared.module, job):
        outcome = trials.complete(f"model '{job.name}'", job.config, prepared.known, real.run_typed)
    on_step()
    facts, tensors = manifest.scan(prepared.module)
    header = _working_header(job, source, prepared, outcome, facts, tensors)
    parts = (
        (entry, manifest.tensor_bytes(tensors[entry.name]))
        for entry in header.tensors
        if entry.alias_of is None
    )
    return _done(job, path, key, write_image(path, header, parts, on_progress, packs=job.packs))


@contextlib.contextmanager
def _only_reading(module: nn.Module, job: Pack) -> Iterator[None]:
    """Refuse a module that writes to its own tensors: mapped weights are read-only.

    The write would kill every worker that runs the model, at its first request.
    """
    before = {name: (tensor, tensor._version) for name, _, _, tensor in manifest.registered(module)}
    yield
    for name, (tensor, version) in before.items():
        if tensor._version != version:
            raise RepositoryError(
                f"model '{job.name}' writes to its tensor '{name}' while it runs, but weights are "
                f"read-only; compute a new tensor instead"
            )


def _working_header(
    job: Pack,
    source: sources.Source,
    prepared: real_modules.Prepared,
    outcome: trials.Outcome,
    facts: Sequence[TensorFacts],
    tensors: Mapping[str, torch.Tensor],
) -> ImageHeader:
    """Make a header whose program was seen to answer as the real module does."""
    entries, nbytes = lay_out(facts)
    problem: OvercommitError | None = None
    # Some constructors need values, which meta has none of: those are built for real in workers.
    for skeleton in ("meta",) if source.kind == "export" else ("meta", "real"):
        prepared.program["skeleton"] = skeleton
        key = prepared.key(facts)
        file = prepared.save(program_folder(job.cache_dir, key))
        header = ImageHeader(
            format_version=FORMAT_VERSION,
            engine=source.engine,
            program_key=key,
            program={**prepared.program, **({} if file is None else {"file": str(file)})},
            layout_hash=layout_hash(entries),
            nbytes=nbytes,
            tensors=entries,
            config=msgspec.structs.replace(outcome.config, engine=source.engine),
        )
        try:
            _verify(header, job, outcome, tensors)
        except (ImageError, ModelError, RepositoryError) as error:
            problem = error
            log.info("model '%s' on a %s skeleton: %s", job.name, skeleton, error.message)
        else:
            return header
    assert problem is not None
    raise RepositoryError(
        f"model '{job.name}' does not work over mapped weights: {problem.message}; register all "
        f"tensors as parameters or buffers, or export it with torch.export"
    ) from problem


def _verify(
    header: ImageHeader, job: Pack, outcome: trials.Outcome, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Bind the tensors to the program as a worker has it; raise ImageError for other answers."""
    program: Any = engines.load_program(header, allow_code=job.allow_code)
    bound: dict[str, torch.Tensor] = {}
    for entry in header.tensors:
        tensor = bound[entry.alias_of] if entry.alias_of else tensors[entry.name]
        if entry.role == "parameter" and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        bound[entry.name] = tensor
    answers = program.bind_tensors(header.config, bound).run(outcome.inputs)
    for spec in outcome.config.outputs:
        if not trials.is_close(outcome.outputs[spec.name], answers[spec.name], spec.datatype):
            raise ImageError(f"its output '{spec.name}' differs from that of the module itself")


def _done(job: Pack, path: Path, key: str, header: ImageHeader) -> PackDone:
    return PackDone(
        job=job.job,
        ok=True,
        image_path=str(path),
        content_key=key,
        program_key=header.program_key,
        nbytes=header.nbytes,
        parts=header.parts,
        packed_bytes=header.packed_bytes,
        engine=header.engine,
        config=header.config,
    )


def pack(job: Pack, on_progress: Progress) -> PackDone:
    """Make the image of one version; the answer says whether it worked, and why not."""
    may_pass = False
    try:
        with _remarks_logged(job):
            # The model is packed as it is; which shape its clients give is nothing to it.
            itself = msgspec.structs.replace(job, config=reshape.model_side(job.config))
            done = _pack(itself, on_progress)
            config = reshape.client_side(done.config, job.config)
            return msgspec.structs.replace(done, config=config)
    except ModelError as error:
        message = f"model '{job.name}' failed its trial run: {error.message}"
    except OvercommitError as error:
        message = error.message
    except SystemExit as error:
        message = (
            f"model '{job.name}': its code calls sys.exit({error.code!r}), but what it ends is the "
            "process that packs, or later the worker: have it raise an error instead"
        )
    except MemoryError:
        message = f"model '{job.name}' needs more memory to be packed than there is"
    except OSError as error:
        message, may_pass = f"model '{job.name}': {error}", True
    except Exception as error:  # the job boundary: torch, transformers and models raise anything
        log.exception("job %d: model '%s' cannot be packed", job.job, job.name)
        message = f"model '{job.name}' cannot be packed: {type(error).__name__}: {error}"
    if job.name not in message:
        message = f"model '{job.name}': {message}"
    is_full = False
    if disk_room.is_missing(message):
        folder = disk_room.tightest(job.cache_dir)
        message, may_pass = disk_room.missing(job.name, folder, job.cache_dir), True
        is_full = folder == job.cache_dir
    message = message[:MESSAGE_CHARS_MAX]
    return PackDone(job=job.job, ok=False, message=message, may_pass=may_pass, is_full=is_full)


@contextlib.contextmanager
def _remarks_logged(job: Pack) -> Iterator[None]:
    """Log what our own binding warns of; keep other packages' remarks on themselves out."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        yield
    ours = (r for r in remarks if issubclass(r.category, manifest.UnregisteredTensorWarning))
    for text in sorted({str(remark.message) for remark in ours}):
        log.warning("model '%s': %s", job.name, text)


# --- the process ----------------------------------------------------------------------------------
def main(control_fd: int) -> None:
    """Pack what the supervisor asks for until Stop or until it is gone."""
    control = ControlSocket(control_fd)
    start, _ = control.receive(START_TIMEOUT_S) or (None, {})
    if not isinstance(start, Start):
        raise ProtocolError("a packer's first message must be Start")
    torch.set_num_threads(1)  # packing is bound by the disk and shares the machine with requests
    _sweep(start.settings.cache_dir)
    control.send(Ready(pid=os.getpid()))
    while (received := control.receive()) is not None:
        message, _ = received
        if isinstance(message, Stop):
            return
        if isinstance(message, LogLevel):
            logging.getLogger().setLevel(message.level)
        elif isinstance(message, Pack):
            control.send(pack(message, _Telling(control, message.job).on_progress))


class _Telling:
    """Tells how a job gets on, now and then: each message wakes the supervisor."""

    def __init__(self, control: ControlSocket, job: int) -> None:
        self._control = control
        self._job = job
        self._told_s = time.monotonic()

    def on_progress(self, done: int, total: int) -> None:
        """So many bytes are written; (0, 0): none yet, but a step was done."""
        now_s = time.monotonic()
        if now_s - self._told_s >= PROGRESS_S:
            self._told_s = now_s
            self._control.send(PackProgress(job=self._job, done=done, total=total))


def _sweep(cache_dir: str) -> None:
    """Remove what packers that were killed have left half written."""
    oldest = time.time() - STALE_S
    for pattern in ("images", "parts", "programs/*"):
        for path in Path(cache_dir).glob(f"{pattern}/{TEMPORARY_PREFIX}*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
