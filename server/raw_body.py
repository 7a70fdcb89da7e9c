"""Triton's raw binary requests: no JSON, the body is the one tensor of the model's one input.

`Inference-Header-Content-Length: 0` says so (the binary tensor data extension, "Raw Binary Request").  What
the JSON would have said follows from the model's configuration and the body's length: one row where the
model batches, and one size at most that is open.  A text's body is its one element, without a length in
front.  All outputs come back in binary form.

Invariants
 1. What is returned is what a client with JSON would have sent; it is checked like that.

Pure; called by `inference`.
"""

from __future__ import annotations

import math

import msgspec

from overcommit.runtime.errors import BadRequest
from overcommit.runtime.front_end_messages import Route
from overcommit.runtime.payload import DATATYPES
from overcommit.server import codec
from overcommit.server.binary import LENGTH_BYTES


def request_of(route: Route, nbytes: int) -> codec.InferRequest:
    """Say a body of this length as a binary request; of BYTES, its length must be put before it.

    Raises BadRequest where the configuration and the length do not tell the shape.
    """
    if len(route.inputs) != 1:
        raise BadRequest(
            f"a body without JSON (Inference-Header-Content-Length: 0) is one tensor, the model has "
            f"{len(route.inputs)} inputs; send the JSON before them"
        )
    (spec,) = route.inputs
    shape = list(spec.shape)
    if route.max_batch_size and shape:
        shape[0] = 1
    width = DATATYPES[spec.datatype][1]
    what = f"input '{spec.name}' is {spec.datatype} {list(spec.shape)}"
    if not width:
        if any(size != 1 for size in shape):
            raise BadRequest(
                f"{what}, a body without JSON is one element; send the JSON before the elements"
            )
        nbytes += LENGTH_BYTES
    else:
        if shape.count(-1) > 1:
            raise BadRequest(
                f"{what}, whose shape {nbytes} bytes do not tell: more than one size is open; send "
                f"the JSON before them"
            )
        if -1 in shape:
            row = width * math.prod(size for size in shape if size >= 0)
            shape[shape.index(-1)] = nbytes // row if row else 0
        if width * math.prod(shape) != nbytes:
            raise BadRequest(f"{what}, which {nbytes} bytes do not fill")
    size = {"binary_data_size": msgspec.Raw(b"%d" % nbytes)}
    return codec.InferRequest(
        (codec.RequestInput(spec.name, spec.datatype, tuple(shape), size),),
        parameters={"binary_data_output": msgspec.Raw(b"true")},
    )
