"""Echo in a grpc.aio server: the argument is the port; SCALE and WIDTH are variables."""

from __future__ import annotations

import os
import sys

import grpc
import numpy as np
import uvloop

SCALE = np.float32(os.environ["SCALE"])
NBYTES = 4 * int(os.environ["WIDTH"])
HEAD = b"\x0a\x04echo\x12\x011\x2a\x0d\x0a\x01y\x12\x04FP32\x1a\x02\x01" + bytes((NBYTES // 4,))


async def infer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    """The tensor is what the message ends with."""
    values = np.frombuffer(request, np.float32, offset=len(request) - NBYTES) * SCALE
    return HEAD + b"\x32" + bytes((NBYTES,)) + values.tobytes()


async def main() -> None:
    """Serve until killed."""
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(infer)
    service = "inference.GRPCInferenceService"
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {"ModelInfer": handler}),)
    )
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    assert NBYTES < 128
    uvloop.run(main())
