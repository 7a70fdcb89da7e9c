"""Packing what is no nn.Module: ONNX files, models of other libraries, a user's own class.

An engine says what a source takes and answers (`Foreign`) and offers ways to run it from an image
(`Candidate`), the best one first; the first that answers as the source itself does is taken.

Invariants
 1. A program was seen to answer from the image's bytes as the source does, or the source took none
    of the values that were tried; then what it declares is believed, and it is not batched.

Called by the packer.
"""

from __future__ import annotations

import importlib
import logging
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from overcommit.runtime import engines, probes, trials
from overcommit.runtime.config import ModelConfig, TensorSpec
from overcommit.runtime.errors import (
    BadRequest,
    ImageError,
    ModelError,
    OvercommitError,
    RepositoryError,
)
from overcommit.runtime.image import (
    FORMAT_VERSION,
    ImageHeader,
    TensorEntry,
    TensorFacts,
    lay_out,
    layout_hash,
)
from overcommit.runtime.image_cache import program_folder
from overcommit.runtime.misfits import fits
from overcommit.runtime.packer_messages import Pack
from overcommit.runtime.sources import Source

log = logging.getLogger("overcommit.packer")

KINDS: Final = ("aoti", "onnx", "python", "torchscript", "trees")
# Sizes that a model which fails the first ones may take: windows of audio, mostly.
_SIZES: Final = (1, 8, 32, 64, 128, 256, 512, 1024)


@dataclass(slots=True, frozen=True)
class Candidate:
    """One way to run a source from an image."""

    label: str
    program: dict[str, str]
    facts: Sequence[TensorFacts]
    data: Mapping[str, memoryview]
    key: str
    save: Callable[[Path], Path]


@dataclass(slots=True, frozen=True)
class Foreign:
    """A source as its own library sees it."""

    known: probes.Known
    run: trials.Run
    # Where the library itself answers in more than one way, each of them counts as right.
    others: tuple[trials.Run, ...]
    candidates: Callable[[], Iterator[Candidate]]
    outputs: tuple[TensorSpec, ...] = ()  # what it declares; empty: only trials tell
    is_compared: bool = True  # False: a class that rolls dice answers otherwise each time


Made = tuple[ImageHeader, Iterator[tuple[TensorEntry, memoryview]]]


def make(
    job: Pack, source: Source, scratch: Path, on_step: Callable[[], None] = lambda: None
) -> Made:
    """Return the header of a source's image, and its tensors; `scratch` is an empty folder.

    `on_step` is called whenever a step is done.

    Raises RepositoryError, ModelError.
    """
    foreign = _prepare(job, source, scratch)
    on_step()
    outcome = _try_out(job, foreign)
    on_step()
    problem: OvercommitError | None = None
    for candidate in foreign.candidates():
        on_step()
        header = _header(job, source, candidate, outcome.config)
        on_step()
        try:
            _verify(job, header, candidate, outcome, foreign)
        except (BadRequest, ImageError, ModelError, RepositoryError) as error:
            problem = error
            log.info("model '%s', %s: %s", job.name, candidate.label, error.message)
        else:
            kept = (entry for entry in header.tensors if entry.alias_of is None)
            return header, ((entry, candidate.data[entry.name]) for entry in kept)
    assert problem is not None, "there is a candidate at least"
    raise RepositoryError(
        f"model '{job.name}' does not work over mapped weights: {problem.message}"
    ) from problem


def _prepare(job: Pack, source: Source, scratch: Path) -> Foreign:
    prepare: Callable[[Pack, Source, Path], Foreign]
    name = f"overcommit.runtime.engines.{source.kind}_source"
    prepare = importlib.import_module(name).prepare
    return prepare(job, source, scratch)


def _try_out(job: Pack, foreign: Foreign) -> trials.Outcome:
    where = f"model '{job.name}'"
    if foreign.outputs:
        _check_inputs(where, job.config.inputs, foreign.known.inputs)
    try:
        return trials.complete(where, job.config, foreign.known, foreign.run)
    except ModelError as error:
        if not foreign.outputs:
            raise
        log.info("%s fails with the sizes that were tried: %s", where, error.message)
    # It says itself what it takes and gives; what it refuses it refuses in a request as well.
    inputs = job.config.inputs or foreign.known.inputs
    config = msgspec.structs.replace(
        job.config,
        inputs=tuple(msgspec.structs.replace(spec, pad=None) for spec in inputs),
        outputs=job.config.outputs or foreign.outputs,
        batching=msgspec.structs.replace(job.config.batching, max_batch_size=0),
    )
    for given in _guesses(inputs):
        try:
            return trials.Outcome(config, given, foreign.run(given)[0])
        except ModelError as error:
            log.debug("%s: %s", where, error.message)
    log.warning("%s takes none of the values that were tried: its answers were not compared", where)
    return trials.Outcome(config, {}, {})


def _check_inputs(where: str, given: Sequence[TensorSpec], known: Sequence[TensorSpec]) -> None:
    """Raise RepositoryError where a configuration lists other inputs than the program has."""
    by_name = {spec.name: spec for spec in known}
    for spec in given:
        own = by_name.get(spec.name)
        if own is None or own.datatype != spec.datatype:
            has = ", ".join(f"'{each.name}' ({each.datatype})" for each in known)
            raise RepositoryError(
                f"{where} has no input '{spec.name}' ({spec.datatype}), which its configuration "
                f"lists; it takes {has}"
            )
        # A graph that leaves the rank open says the same as one that takes a scalar.
        if own.shape and not fits(spec.shape, own.shape):
            raise RepositoryError(
                f"{where}: its input '{spec.name}' is {list(spec.shape)} in its configuration, but the "
                f"program takes {list(own.shape)}; a batch's axis counts (max_batch_size in config.pbtxt)"
            )


def _guesses(inputs: Sequence[TensorSpec]) -> Iterator[probes.Arrays]:
    """One axis after the other gets another size, while the others are 1; or all of them at once."""
    names = [name for spec in inputs for name in probes.axis_names(spec) if name is not None]
    axes = list(dict.fromkeys(names))
    for size in _SIZES:
        for long in (*axes, None):
            sizes = {axis: size if long in (axis, None) else 1 for axis in axes}
            yield probes.trial_inputs(inputs, sizes, 1, vary=True)


def _header(job: Pack, source: Source, candidate: Candidate, config: ModelConfig) -> ImageHeader:
    entries, nbytes = lay_out(candidate.facts)
    file = candidate.save(program_folder(job.cache_dir, candidate.key))
    return ImageHeader(
        format_version=FORMAT_VERSION,
        engine=source.engine,
        program_key=candidate.key,
        program={**candidate.program, "file": str(file)},
        layout_hash=layout_hash(entries),
        nbytes=nbytes,
        tensors=entries,
        config=msgspec.structs.replace(config, engine=source.engine),
    )


def _verify(
    job: Pack,
    header: ImageHeader,
    candidate: Candidate,
    outcome: trials.Outcome,
    foreign: Foreign,
) -> None:
    """Run the program over the image's bytes.  Raises ImageError for other answers."""
    memory = mmap.mmap(-1, header.nbytes)
    for entry in header.tensors:
        memory[entry.offset : entry.offset + entry.nbytes] = candidate.data[entry.name]
    program = engines.load_program(header, allow_code=job.allow_code)
    # It may be a process: it is not kept here.
    engines.forget_program(header)
    model = program.bind(header, memoryview(memory).toreadonly())
    if not outcome.outputs:
        return
    answers = model.run(outcome.inputs)
    if not foreign.is_compared:
        return
    problem = _difference(outcome.config, outcome.outputs, answers)
    for other in foreign.others if problem else ():
        if not _difference(outcome.config, other(outcome.inputs)[0], answers):
            return
    if problem:
        raise ImageError(f"its output '{problem}' differs from that of the file itself")


def _difference(config: ModelConfig, one: probes.Arrays, two: probes.Arrays) -> str | None:
    """Name the first output that differs."""
    for spec in config.outputs:
        if not trials.is_close(one[spec.name], two[spec.name], spec.datatype):
            return spec.name
    return None
