"""A request to try, printed when the server is ready: curl, and Python with tritonclient.

JSON has no BF16: such tensors follow it in binary form.
"""

from __future__ import annotations

import json
import math
from typing import Final

from overcommit.runtime.config import TensorSpec
from overcommit.runtime.front_end_messages import Route

_SIZE: Final = 4  # of an axis that varies; the batch axis gets 1
# One request is all of its sequence.
SEQUENCE: Final = {"sequence_id": 1, "sequence_start": True, "sequence_end": True}
_ELEMENTS_MAX: Final = 64  # a longer example is no use on a command line
_BF16_ONE: Final = "\\200\\077"  # as printf writes it
_NUMPY: Final = {"FP32": "float32", "FP64": "float64", "FP16": "float16", "BOOL": "bool"}


def example_shape(spec: TensorSpec) -> list[int]:
    """Fill in the varying axes of a shape."""
    return [
        size if size >= 0 else (1 if axis == 0 else _SIZE) for axis, size in enumerate(spec.shape)
    ]


def example_body(route: Route) -> dict[str, object] | None:
    """Return a V2 inference request of ones for this model; None when it would be too long."""
    inputs = []
    for spec in route.inputs:
        if spec.optional:
            continue
        shape = example_shape(spec)
        elements = 1
        for size in shape:
            elements *= size
        if elements > _ELEMENTS_MAX:
            return None
        value: object = "text" if spec.datatype == "BYTES" else spec.datatype == "BOOL" or 1
        tensor = {"name": spec.name, "datatype": spec.datatype, "shape": shape}
        if spec.datatype == "BF16":
            inputs.append({**tensor, "parameters": {"binary_data_size": 2 * elements}})
        else:
            inputs.append({**tensor, "data": [value] * elements})
    if route.sequence:
        return {"parameters": SEQUENCE, "inputs": inputs}
    return {"inputs": inputs}


def example_request(url: str, route: Route) -> str:
    """Return text that shows how to call this model at `url`."""
    body = example_body(route)
    if body is None:
        return f"Try it:\n\n  curl {url}/v2/models/{route.name}\n"
    tls = ", ssl=True" if url.startswith("https:") else ""
    bf16_bytes = 0
    code = [
        "import numpy, tritonclient.http as triton",
        f'client = triton.InferenceServerClient("{url.partition("://")[2]}"{tls})',
        "inputs = []",
    ]
    for spec in route.inputs:
        if spec.optional:
            continue
        dtype = _NUMPY.get(spec.datatype, spec.datatype.lower())
        kind = "ml_dtypes.bfloat16" if spec.datatype == "BF16" else f'"{dtype}"'
        bf16_bytes += 2 * math.prod(example_shape(spec)) if spec.datatype == "BF16" else 0
        array = f"numpy.ones({example_shape(spec)}, {kind})"
        made = f'triton.InferInput("{spec.name}", {example_shape(spec)}, "{spec.datatype}")'
        code += [f"inputs.append({made})", f"inputs[-1].set_data_from_numpy({array})"]
    output = route.outputs[0].name if route.outputs else ""
    more = ", sequence_id=1, sequence_start=True, sequence_end=True" if route.sequence else ""
    code.append(f'print(client.infer("{route.name}", inputs{more}).as_numpy("{output}"))')
    text = json.dumps(body)
    curl = f"curl {url}/v2/models/{route.name}/infer -d '{text}'"
    if bf16_bytes:
        code[0] = "import ml_dtypes, numpy, tritonclient.http as triton"
        curl = (
            f"printf '%s{_BF16_ONE * (bf16_bytes // 2)}' '{text}' |\n"
            f"    curl {url}/v2/models/{route.name}/infer --data-binary @- "
            f"-H 'Inference-Header-Content-Length: {len(text)}'"
        )
    lines = "\n".join(f"  {line}" for line in code)
    return f"Try it:\n\n  {curl}\n\nor in Python, with tritonclient:\n\n{lines}\n"
