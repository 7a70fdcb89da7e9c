"""What packing needs to know about a model's own class.

Called by `foreign`, in the packer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from overcommit.runtime import checkpoint, probes, sources
from overcommit.runtime.config import PythonOptions
from overcommit.runtime.engines import manifest, python_model, user_code
from overcommit.runtime.engines.manifest import dense_stride
from overcommit.runtime.engines.python_child import Hosted
from overcommit.runtime.engines.store import save_once
from overcommit.runtime.foreign import Candidate, Foreign
from overcommit.runtime.image import TensorFacts
from overcommit.runtime.packer_messages import Pack
from overcommit.runtime.sources import Source


def _triton_arguments(job: Pack) -> dict[str, str]:
    """What Triton initializes a model with; the configuration as far as models read it."""
    config = job.config
    batches = config.batching.max_batch_size > 0
    tensors = {
        kind: [
            {
                "name": spec.name,
                "data_type": "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}",
                "dims": list(spec.shape[1:] if batches else spec.shape),
            }
            for spec in specs
        ]
        for kind, specs in (("input", config.inputs), ("output", config.outputs))
    }
    shown = {
        "name": job.name,
        "backend": "python",
        "max_batch_size": config.batching.max_batch_size,
        **tensors,
        "instance_group": [{"name": f"{job.name}_0", "kind": "KIND_CPU", "count": 1, "gpus": []}],
        "model_transaction_policy": {"decoupled": False},
        "parameters": {
            key: {"string_value": str(value)} for key, value in config.parameters.items()
        },
    }
    folder = Path(job.folder).absolute()
    return {
        "model_config": json.dumps(shown, sort_keys=True),
        "model_instance_kind": "CPU",
        "model_instance_name": f"{job.name}_0_0",
        "model_instance_device_id": "0",
        # Of the model, not the version, where it has folders for these.
        "model_repository": str(folder.parent if folder.name == job.version else folder),
        "model_version": job.version,
        "model_name": job.name,
    }


def prepare(job: Pack, source: Source, scratch: Path) -> Foreign:
    """Load the class once, to try it out.  Raises RepositoryError, ModelError, Forbidden."""
    user_code.require_allowed(f"model '{job.name}'", job.config, job.allow_code)
    content = user_code.read_source(source.main)
    options = job.config.python or PythonOptions()
    program = {
        "kind": "python",
        "source": user_code.digest_of(content),
        "class": source.class_name,
        "arguments": json.dumps(job.config.parameters, sort_keys=True),
        "folder": str(Path(job.folder).absolute()),
        "process": "yes" if options.process or options.venv else "",
        "venv": options.venv or "",
        "triton": json.dumps(_triton_arguments(job), sort_keys=True),
    }
    hosted = python_model.start({**program, "file": str(source.main)})
    facts: list[TensorFacts] = []
    data: dict[str, memoryview] = {}
    if isinstance(hosted, Hosted) and hosted.takes_tensors:
        paths = [path for path in source.weights if path.suffix == ".safetensors"]
        for name, tensor in checkpoint.read(paths).items():
            tensor = tensor.contiguous()
            data[name] = manifest.tensor_bytes(tensor)
            shape, nbytes = tuple(tensor.shape), data[name].nbytes
            kind = str(tensor.dtype).removeprefix("torch.")
            facts.append((name, "buffer", True, kind, shape, dense_stride(shape), nbytes, None))
        from overcommit.runtime.engines.dtypes import to_array

        hosted.bind({name: to_array(t.contiguous()) for name, t in checkpoint.read(paths).items()})
    # One program for each content: an instance has what `load` read from the folder.
    parts = (json.dumps(program, sort_keys=True), sources.content_key(job, source))
    key = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    def candidates() -> Iterator[Candidate]:
        def save(folder: Path) -> Path:
            return save_once(folder / "model.py", lambda: content)

        yield Candidate("python", program, facts, data, key, save)

    return Foreign(
        known=probes.Known(),
        run=lambda inputs: python_model.run_typed(hosted, inputs),
        others=(),
        candidates=candidates,
        is_compared=False,
    )
