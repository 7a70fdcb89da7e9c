"""Which file has the names of an output's classes.

Only `model.toml` says so: packing finds out what a model's outputs are, and does not look at their labels.

Pure.  Called by the registry, the accounts and `misfits`.
"""

from __future__ import annotations

import os

import msgspec

from overcommit.runtime.config import ModelConfig
from overcommit.runtime.sequence_terms import visible_outputs


def label_files(
    folder: str, config: ModelConfig, source: ModelConfig | None
) -> tuple[tuple[str, ...], ...]:
    """Return where each output's file may be: in the version's folder, or in the model's above it.

    () for an output that has none, or names one that lies elsewhere; () where no output has one.
    """
    names = _names(source)
    if not names:
        return ()
    return tuple(
        places_of(folder, names[spec.name]) if spec.name in names else ()
        for spec in visible_outputs(config)
    )


def places_of(folder: str, file: str) -> tuple[str, ...]:
    """Return where a file of labels may be, the first that is there counts; () if it lies elsewhere."""
    if not _is_inside(file):
        return ()
    return tuple(os.path.join(place, file) for place in (folder, os.path.dirname(folder)))


def with_labels(config: ModelConfig, source: ModelConfig | None) -> ModelConfig:
    """Say in the outputs that were found what `model.toml` says of their labels."""
    names = _names(source)
    if not names:
        return config
    outputs = (
        msgspec.structs.replace(spec, labels=names.get(spec.name)) for spec in config.outputs
    )
    return msgspec.structs.replace(config, outputs=tuple(outputs))


def _names(source: ModelConfig | None) -> dict[str, str]:
    if source is None:
        return {}
    return {
        spec.name: spec.labels for spec in source.outputs if spec.labels and _is_inside(spec.labels)
    }


def _is_inside(file: str) -> bool:
    return not (os.path.isabs(file) or ".." in file.split("/") or "\0" in file)
