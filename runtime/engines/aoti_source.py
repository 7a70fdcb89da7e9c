"""What packing needs to know about a compiled program: an exported one to compile, or a package.

An exported program is compiled here, once for all versions that have it; its answers are those of torch's own
run.  A package (`overcommit compile`) is native code of somebody: it runs only where that is allowed, and
nothing but itself can say what it should answer.

Called by `foreign`, in the packer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import torch

from overcommit.runtime import checkpoint, probes
from overcommit.runtime.config import ModelConfig
from overcommit.runtime.engines import aoti, aoti_package, archive, manifest, torch_export
from overcommit.runtime.engines.aoti_package import Manifest
from overcommit.runtime.engines.bound_module import Arguments, BoundModule
from overcommit.runtime.engines.manifest import dense_stride
from overcommit.runtime.engines.user_code import require_allowed
from overcommit.runtime.errors import ImageError, RepositoryError
from overcommit.runtime.foreign import Candidate, Foreign
from overcommit.runtime.image import TensorFacts
from overcommit.runtime.packer_messages import Pack
from overcommit.runtime.sources import Source


def prepare(job: Pack, source: Source, scratch: Path) -> Foreign:
    """Look at a program.  Raises RepositoryError, Forbidden."""
    if source.main.suffix == aoti_package.SUFFIX:
        return _prepare_package(job, source, scratch)
    modules = archive.inspect(source.main)
    with torch_export.reading(source.main):
        exported = torch_export.load(source.main, modules)
        described, tensors = aoti_package.manifest_of(exported, modules)
        module = exported.module()
    signature = torch_export.signature_of(exported)
    call = torch_export.Call(module, exported.call_spec.in_spec, signature)
    facts, data = _laid_out(tensors)
    key = torch_export.program_key(exported, facts)

    def compiled() -> bytes:
        # Another one: compiling changes it.
        return aoti_package.compile_program(torch_export.load(source.main, modules), described)

    candidate = Candidate(
        label="aoti",
        program={"kind": "aoti"},
        facts=facts,
        data=data,
        key=_key(key, described),
        save=lambda folder: aoti_package.save(folder, compiled, described),
    )
    return _foreign(job, described, call, candidate)


def _prepare_package(job: Pack, source: Source, scratch: Path) -> Foreign:
    where = f"model '{job.name}'"
    require_allowed(where, job.config, job.allow_code)
    code, described = aoti_package.read_package(source.main)
    given = checkpoint.read(source.weights)
    tensors = {name: given[name].contiguous() for name in described.constants if name in given}
    library = scratch / aoti_package.CODE_FILE
    library.write_bytes(code)
    try:
        aoti.check(described, tensors)
        call = aoti.Call(aoti_package.open_library(library), described, tensors)
    except ImageError as error:
        raise RepositoryError(f"{where}: {error.message}") from error
    facts, data = _laid_out(tensors)
    digest = hashlib.blake2b(code, digest_size=16).hexdigest()

    candidate = Candidate(
        label="package",
        program={"kind": "native"},
        facts=facts,
        data=data,
        key=_key(digest, described),
        save=lambda folder: aoti_package.save(folder, lambda: code, described),
    )
    return _foreign(job, described, call, candidate)


def _foreign(
    job: Pack, described: Manifest, call: Callable[[Arguments], object], candidate: Candidate
) -> Foreign:
    """A source that can be run in one way; its tensors are called as the configuration says, else as here."""
    named = ModelConfig(inputs=job.config.inputs or described.inputs, outputs=job.config.outputs)
    return Foreign(
        known=probes.Known(described.inputs, described.sizes, described.batch_limits),
        run=BoundModule(call, named).run_typed,
        others=(),
        candidates=lambda: iter((candidate,)),
    )


def _key(program: str, described: Manifest) -> str:
    content = program.encode() + msgspec.json.encode(described, order="deterministic")
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _laid_out(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[list[TensorFacts], dict[str, memoryview]]:
    """Describe tensors as they lie in the image; those that are the same memory lie there once."""
    facts: list[TensorFacts] = []
    data: dict[str, memoryview] = {}
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        alias_of = first.setdefault(place, name) if tensor.numel() else name
        if alias_of == name:
            data[name] = manifest.tensor_bytes(tensor.detach())
        nbytes = tensor.numel() * tensor.element_size()
        kind = str(tensor.dtype).removeprefix("torch.")
        facts.append(
            (
                *(name, "buffer", True, kind, tuple(tensor.shape), tensor.stride(), nbytes),
                None if alias_of == name else alias_of,
            )
        )
        if alias_of == name and not manifest.fills_its_bytes(tensor.shape, tensor.stride()):
            raise RepositoryError(
                f"tensor '{name}' has the strides {list(tensor.stride())}, where "
                f"{list(dense_stride(tensor.shape))} is usual; export the model with .contiguous()"
            )
    return facts, data
