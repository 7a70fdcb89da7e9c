"""What packing needs to know about a model that its own library reads.

Called by `foreign`, in the packer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from overcommit.runtime import probes
from overcommit.runtime.config import TensorSpec
from overcommit.runtime.engines import trees, user_code
from overcommit.runtime.engines.dtypes import v2_of_numpy
from overcommit.runtime.engines.store import save_once
from overcommit.runtime.errors import RepositoryError
from overcommit.runtime.foreign import Candidate, Foreign
from overcommit.runtime.image import TensorFacts
from overcommit.runtime.packer_messages import Pack
from overcommit.runtime.sources import Source


def prepare(job: Pack, source: Source, scratch: Path) -> Foreign:
    """Read the file.  Raises RepositoryError, Forbidden."""
    is_code = source.engine == "sklearn"
    if is_code:
        what = f"{source.main.name}, a pickle, runs whatever it holds"
        user_code.require_allowed(f"model '{job.name}'", job.config, job.allow_code, what)
    content = source.main.read_bytes()
    if not content:
        raise RepositoryError(f"{source.main.name} is empty")
    loaded = trees.load(source.engine, content)
    fact: TensorFacts
    fact = ("file", "buffer", True, "uint8", (len(content),), (1,), len(content), None)
    package = trees.library(source.engine)
    key = hashlib.blake2b(f"{source.engine} {package.__version__}".encode(), digest_size=16)

    def run(inputs: probes.Arrays) -> tuple[probes.Arrays, dict[str, str]]:
        outputs = trees.run(loaded, inputs, columns=job.config.adapts)
        return outputs, {name: v2_of_numpy(array) for name, array in outputs.items()}

    def candidates() -> Iterator[Candidate]:
        yield Candidate(
            label=source.engine,
            program={"kind": "pickle" if is_code else "trees"},
            facts=[fact],
            data={trees.FILE_TENSOR: memoryview(content)},
            key=key.hexdigest(),
            save=lambda folder: save_once(folder / "engine", lambda: source.engine.encode()),
        )

    shape = (-1, loaded.features or -1)
    axes = ("batch", None if loaded.features else f"{trees.INPUT}.1")
    # Whoever takes any number takes them as exactly as the library does.
    is_exact = job.config.adapts and source.engine != "xgboost"
    spec = TensorSpec(
        name=trees.INPUT, datatype="FP64" if is_exact else "FP32", shape=shape, axes=axes
    )
    return Foreign(known=probes.Known((spec,)), run=run, others=(), candidates=candidates)
