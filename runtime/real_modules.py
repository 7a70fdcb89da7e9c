"""A source of a torch program, built for real: what trials run, and what its image is held against.

Each kind says how its module is made, what its engine knows of inputs, and how its program is named and
saved.

Called by the packer.  Raises RepositoryError and what a model's own code raises.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from overcommit.runtime import checkpoint, probes, sources
from overcommit.runtime.engines import (
    archive,
    hugging_face,
    store,
    torch_export,
    torch_module,
    user_code,
)
from overcommit.runtime.engines.bound_module import Arguments
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.image import TensorFacts
from overcommit.runtime.packer_messages import Pack

log = logging.getLogger("overcommit.packer")


@dataclass(slots=True)
class Prepared:
    """A source, built for real, and how its program is named and saved."""

    module: nn.Module
    call: Callable[[Arguments], object]
    known: probes.Known
    program: dict[str, str]
    key: Callable[[Sequence[TensorFacts]], str]
    save: Callable[[Path], Path | None] = lambda folder: None


def _prepare_hugging_face(job: Pack, source: sources.Source) -> Prepared:
    where = f"model '{job.name}'"
    try:
        config: Any = json.loads(source.main.read_text())
    except ValueError as error:
        raise RepositoryError(f"{source.main} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise RepositoryError(f"{source.main} holds no JSON object")
    tensors = checkpoint.read(source.weights)
    program = hugging_face.describe(config, tensors, where)
    with hugging_face.as_loaded(program, where):
        module = torch_module.build(program)
    try:
        checkpoint.fill(module, tensors, where)
    except RepositoryError as error:
        # Names that the architecture had in another release; nearly all of the hub's are as they were.
        try:
            tensors = hugging_face.read_by_itself(program, job.folder)
        except RepositoryError as other:
            log.info("%s: %s", where, other.message)
            raise error from other
        checkpoint.fill(module, tensors, where)
    inputs = hugging_face.inputs_of(module)
    return Prepared(
        module=module,
        call=torch_module.Call(module),
        known=probes.Known(inputs, hugging_face.sizes_of(inputs)),
        program=program,
        key=lambda facts: _key(program, facts),
    )


def _prepare_user(job: Pack, source: sources.Source) -> Prepared:
    where = f"model '{job.name}'"
    content = user_code.read_source(source.main)
    program = user_code.describe(source.main, content, source.class_name, job.config.parameters)
    module = user_code.build({**program, "file": str(source.main)})
    checkpoint.fill(module, checkpoint.read(source.weights), where)
    return Prepared(
        module=module,
        call=torch_module.Call(module),
        known=probes.Known(),
        program=program,
        key=lambda facts: _key(program, facts),
        save=lambda folder: store.save_once(folder / "model.py", lambda: content),
    )


def _prepare_export(job: Pack, source: sources.Source) -> Prepared:
    modules = archive.inspect(source.main)
    with torch_export.reading(source.main):
        exported = torch_export.load(source.main, modules)
        signature = torch_export.signature_of(exported)
        module = exported.module()
    limits = signature.batch_limits
    return Prepared(
        module=module,
        call=torch_export.Call(module, exported.call_spec.in_spec, signature),
        known=probes.Known(signature.specs, signature.sizes, limits),
        program={"kind": "export", "modules": ",".join(modules)},
        key=lambda facts: torch_export.program_key(exported, facts),
        save=lambda folder: torch_export.save_program(folder, exported),
    )


def _key(program: Mapping[str, str], facts: Sequence[TensorFacts]) -> str:
    """Name a program: what builds it, and the tensors that it binds (but not their values)."""
    parts: list[object] = [json.dumps(dict(program), sort_keys=True), torch.__version__, *facts]
    if program["kind"] == "hugging_face":
        import transformers

        parts.append(transformers.__version__)
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(str(part).encode() + b"\0")
    return digest.hexdigest()


_PREPARE: Final = {
    "hugging_face": _prepare_hugging_face,
    "user": _prepare_user,
    "export": _prepare_export,
}


def prepare(job: Pack, source: sources.Source) -> Prepared:
    """Build what a source holds."""
    return _PREPARE[source.kind](job, source)
