"""Clients' shared memory over gRPC: the methods that register it; `regions` says what it means.

There is no CUDA shared memory; its methods answer as a server without a GPU does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import Message

from overcommit.runtime.errors import BadRequest, NotFound
from overcommit.runtime.front_end_messages import Region
from overcommit.server.grpc_handler import Handler, handler
from overcommit.server.proto import messages
from overcommit.server.regions import register, unregister

if TYPE_CHECKING:
    from overcommit.server.frontend import FrontEnd

_NUMBER_MAX = (1 << 63) - 1


class SharedMemory:
    """See the module."""

    def __init__(self, front: FrontEnd) -> None:
        self._front = front

    def by_path(self, service: str) -> dict[str, Handler]:
        """Return who answers which path."""
        system, cuda = service + "SystemSharedMemory", service + "CudaSharedMemory"
        return {
            system + "Status": handler(messages.SystemSharedMemoryStatusRequest, self.status),
            system + "Register": handler(messages.SystemSharedMemoryRegisterRequest, self.add),
            system + "Unregister": handler(
                messages.SystemSharedMemoryUnregisterRequest, self.remove
            ),
            cuda + "Status": handler(messages.CudaSharedMemoryStatusRequest, self.cuda_status),
            cuda + "Register": handler(messages.CudaSharedMemoryRegisterRequest, self.cuda_add),
            cuda + "Unregister": handler(
                messages.CudaSharedMemoryUnregisterRequest, self.cuda_remove
            ),
        }

    async def status(self, request: messages.SystemSharedMemoryStatusRequest) -> Message:
        """All regions, or one."""
        answer = messages.SystemSharedMemoryStatusResponse()
        for region in self._front.regions.listed(request.name):
            shown = answer.regions[region.name]
            shown.name, shown.key = region.name, region.key
            shown.offset, shown.byte_size = region.offset, region.byte_size
        return answer

    async def add(self, request: messages.SystemSharedMemoryRegisterRequest) -> Message:
        """Register a region."""
        if max(request.offset, request.byte_size) > _NUMBER_MAX:
            raise BadRequest(f"'offset' and 'byte_size' are at most {_NUMBER_MAX}")
        region = Region(
            name=request.name,
            key=request.key,
            offset=request.offset,
            byte_size=request.byte_size,
        )
        await register(self._front, region)
        return messages.SystemSharedMemoryRegisterResponse()

    async def remove(self, request: messages.SystemSharedMemoryUnregisterRequest) -> Message:
        """Forget a region, or all."""
        await unregister(self._front, request.name)
        return messages.SystemSharedMemoryUnregisterResponse()

    async def cuda_status(self, request: messages.CudaSharedMemoryStatusRequest) -> Message:
        """None is there."""
        if request.name:
            raise NotFound(f"Unable to find cuda shared memory region: '{request.name}'")
        return messages.CudaSharedMemoryStatusResponse()

    async def cuda_add(self, request: messages.CudaSharedMemoryRegisterRequest) -> Message:
        """None is taken."""
        raise BadRequest(
            f"failed to register shared memory region: '{request.name}': this server takes no CUDA "
            f"shared memory; use system shared memory"
        )

    async def cuda_remove(self, request: messages.CudaSharedMemoryUnregisterRequest) -> Message:
        """Forgetting what is not there is no error."""
        return messages.CudaSharedMemoryUnregisterResponse()
