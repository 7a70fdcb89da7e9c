"""What a model's files say that does not fit the model, or what lies beside it, and stops nothing.

Warm-up requests that the model does not take, files of labels that are not there, versions that a policy
names and nobody has: the model is served, but not as whoever wrote the file means it.

Invariants
 1. What is not known before packing (inputs that the file does not list) is not found fault with.
 2. A text names the file, the place in it, and what to do.
 3. A model with neither warm-up requests nor labels costs two looks at its configuration.

Called by the scanner and the catalogue, which log it, and by `overcommit check`, which fails on it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from overcommit.runtime import labels, model_files
from overcommit.runtime.config import BODY_BYTES_MAX, ModelConfig, TensorSpec, WarmupInput
from overcommit.runtime.payload import DATATYPES

if TYPE_CHECKING:
    from overcommit.runtime.repository import VersionSource


def fits(one: Sequence[int], two: Sequence[int]) -> bool:
    """Whether some tensor has both shapes; -1 is any size."""
    return len(one) == len(two) and all(
        -1 in (a, b) or a == b for a, b in zip(one, two, strict=True)
    )


def misfits_of(
    folder: str, config: ModelConfig, source: ModelConfig | None, *, is_packed: bool = True
) -> list[str]:
    """Say what of a version does not fit: `source` is as its files say it, `config` as packing found it.

    `is_packed` False: nothing is known but what the files say, and a model may yet turn out not to batch.
    """
    if source is None or not (source.warmup or any(spec.labels for spec in source.outputs)):
        return []
    texts = (*_warmups(config, source, is_packed), *_labels(folder, source))
    file = _file(folder) if texts else ""
    return [f"{file}: {text}" for text in texts]


def missing_versions(versions: Sequence[VersionSource]) -> list[str]:
    """Say which versions the policy of one model names that are not there; `versions`: all of it."""
    naming = next((v.config.naming for v in reversed(versions) if v.config is not None), None)
    if naming is None or not naming.specific:
        return []
    there = [each.version for each in versions]
    gone = [each for each in naming.specific if each not in there]
    if not gone:
        return []
    last = versions[-1].folder
    above = os.path.dirname(last) if os.path.basename(last) == versions[-1].version else last
    text = (
        f"{_file(last)}: its version policy (version_policy, [versions]) names version "
        f"{', '.join(gone)}, which is not in {above} (there is {', '.join(there)}): put it there, or "
        f"leave it out of `specific`"
    )
    return [text]


def _file(folder: str) -> str:
    """The file that says most of a version, as far as there is one."""
    places = (folder, os.path.dirname(folder))
    paths = (os.path.join(place, name) for place in places for name in model_files.RANKS)
    return next(filter(os.path.isfile, paths), folder)


# --- warm-up ------------------------------------------------------------------------------------
def _warmups(config: ModelConfig, source: ModelConfig, is_packed: bool) -> Iterator[str]:
    specs = {spec.name: spec for spec in config.inputs}
    for warmup in source.warmup:
        rows = (warmup.batch_size,) if config.batching.max_batch_size else ()
        for each in warmup.inputs:
            where = f"model_warmup ([[warmup]]) '{warmup.name}', input '{each.name}'"
            shape = (*rows, *each.shape)
            if each.name in specs and not is_packed and fits(each.shape, specs[each.name].shape):
                shape = each.shape
            if specs and each.name not in specs:
                names = ", ".join(f"'{name}'" for name in specs)
                yield f"{where}: the model has no such input, but {names}: correct the name"
            elif specs and (problem := _misfit(each, shape, specs[each.name])):
                yield f"{where}: {problem}"
            if problem := _file_misfit(each, shape):
                yield f"{where}: {problem}"


def _misfit(given: WarmupInput, shape: tuple[int, ...], spec: TensorSpec) -> str:
    if given.datatype != spec.datatype:
        return f"it is {given.datatype}, the model takes {spec.datatype}: correct its data type"
    if not fits(shape, spec.shape):
        return f"it is {list(shape)}, the model takes {list(spec.shape)}: correct its dims"
    return ""


def _file_misfit(given: WarmupInput, shape: tuple[int, ...]) -> str:
    if not given.file:
        return ""
    try:
        size = os.stat(given.file).st_size
    except OSError as error:
        return f"{given.file} cannot be read ({error.strerror or error}): put it there"
    count, nbytes = math.prod(shape), DATATYPES[given.datatype][1]
    if size > BODY_BYTES_MAX:
        return f"{given.file} has {size} bytes, the limit is {BODY_BYTES_MAX}: make it shorter"
    # A text has at least its length before it.
    if (nbytes and size != count * nbytes) or size < count * (nbytes or 4):
        least = "" if nbytes else "at least "
        return (
            f"{given.file} has {size} bytes, the shape {list(shape)} of {given.datatype} needs "
            f"{least}{count * (nbytes or 4)}: correct the file or the dims"
        )
    return ""


# --- labels -------------------------------------------------------------------------------------
def _labels(folder: str, source: ModelConfig) -> Iterator[str]:
    for spec in source.outputs:
        if not spec.labels:
            continue
        where = f"label_filename (labels) of output '{spec.name}'"
        places = labels.places_of(folder, spec.labels)
        if not places:
            yield f"{where}: '{spec.labels}' leads out of the model's folder: put the file in there"
        elif not any(map(os.path.isfile, places)):
            yield f"{where}: there is no file {' nor '.join(places)}: put it there, or leave it out"
