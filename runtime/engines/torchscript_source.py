"""What packing needs to know about an archive of torch.jit.

Called by `foreign`, in the packer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from overcommit.runtime import probes
from overcommit.runtime.engines import manifest, torchscript
from overcommit.runtime.engines.bound_module import BoundModule
from overcommit.runtime.engines.manifest import dense_stride
from overcommit.runtime.engines.store import save_once
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.foreign import Candidate, Foreign
from overcommit.runtime.image import TensorFacts
from overcommit.runtime.packer_messages import Pack
from overcommit.runtime.sources import Source


def prepare(job: Pack, source: Source, scratch: Path) -> Foreign:
    """Load an archive.  Raises RepositoryError."""
    torchscript.inspect(source.main)
    module = torchscript.load(source.main)
    where = f"model '{job.name}'"
    if not job.config.inputs:
        taken = [each.name for each in module._c._get_method("forward").schema.arguments[1:]]
        raise RepositoryError(
            f"{where} does not say what it takes, and TorchScript does not either: add [[input]] "
            f"tables for {taken} to its model.toml"
        )
    plain = msgspec.structs.replace(job.config, outputs=job.config.outputs)
    bound = BoundModule(torchscript.Call(module, plain), plain)
    before = {name: t._version for name, (_, t) in torchscript.tensors_of(module).items()}

    def run(inputs: probes.Arrays) -> tuple[probes.Arrays, dict[str, str]]:
        result = bound.run_typed(inputs)
        for name, (_, tensor) in torchscript.tensors_of(module).items():
            if tensor._version != before[name]:
                raise RepositoryError(
                    f"{where} writes to its tensor '{name}' while it runs, but weights are "
                    f"read-only; compute a new tensor instead"
                )
        return result

    used = [spec for spec in job.config.inputs if not spec.optional]
    given = probes.trial_inputs(used, probes.SIZES[0], 0, vary=True)
    torchscript.refuse_state(where, module, run, given)
    return Foreign(
        known=probes.Known(),
        run=run,
        others=(),
        candidates=lambda: _candidates(source.main),
    )


def _candidates(path: Path) -> Iterator[Candidate]:
    module: Any = torchscript.load(path)
    facts: list[TensorFacts] = []
    data: dict[str, memoryview] = {}
    for name, (role, tensor) in torchscript.tensors_of(module).items():
        values = tensor.detach().contiguous()
        data[name] = manifest.tensor_bytes(values)
        shape, nbytes = tuple(values.shape), data[name].nbytes
        kind = str(values.dtype).removeprefix("torch.")
        stride = dense_stride(shape)
        is_parameter = role == "parameter"
        facts.append(
            (
                *(name, "parameter" if is_parameter else "buffer", True, kind),
                *(shape, stride, nbytes, None),
            )
        )
    stripped = torchscript.strip(module)
    digest = hashlib.blake2b(stripped + torch.__version__.encode(), digest_size=16).hexdigest()
    yield Candidate(
        label="torchscript",
        program={"kind": "torchscript"},
        facts=facts,
        data=data,
        key=digest,
        save=lambda folder: save_once(folder / "program.pt", lambda: stripped),
    )
