"""Inference whose binary tensors lie in shared memory, by a Content-Type of its own (MEDIA_TYPE).

The body is the JSON of a request with binary tensors, and what would follow it lies in a region of the
client's, which `parameters` names:

    {"inputs": [{"name", "datatype", "shape", "parameters": {"binary_data_size": int}}, ...],
     "parameters": {"shared_memory_region": str, "shared_memory_byte_size": int,
                    "shared_memory_offset"?: int, "shared_memory_answer_byte_size": int, ...}}

The answer's binary tensors are written to the same place, one behind the other, where they need no more
than `shared_memory_answer_byte_size`; its JSON says so by `parameters.shared_memory_byte_size`, and nothing
follows it.  Else it is the answer that a binary request gets, so a client need not know how long one will
be.  In contrast to the windows of Triton's extension, one for each tensor, inputs go straight into the
request's block and outputs straight out of theirs.

Invariants
 1. What a request means is decided by `prepare_head` and `prepare_decoded`, as for any other.
 2. Nothing is written after the request was answered or abandoned; until then it holds its region.

Called by the protocol (in) and by the dispatch (out).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, overload

from overcommit.runtime.errors import BadRequest, OvercommitError
from overcommit.server import codec
from overcommit.server.exchange import OK_JSON, Exchange
from overcommit.server.inference import Data, Prepared, prepare_decoded, prepare_head
from overcommit.server.plans import RoutePlans
from overcommit.server.regions import Held, Window, window_of

if TYPE_CHECKING:
    from overcommit.server.connection import Connection

MEDIA_TYPE: Final = b"application/vnd.overcommit.shared+json"
_ANSWER_BYTES: Final = "shared_memory_answer_byte_size"


@dataclass(slots=True, frozen=True, eq=False)
class SharedData(Sequence[Data]):
    """A request's tensors, still in the client's memory; read when they are looked at."""

    tensors: Held
    answer: Held
    sizes: tuple[int, ...]
    read: tuple[Data, ...] | None = None  # those that had to be looked at

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Data: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Data]: ...
    def __getitem__(self, index: int | slice) -> Data | Sequence[Data]:
        return list(self)[index]

    def __iter__(self) -> Iterator[Data]:
        if self.read is not None:
            return iter(self.read)
        view, at = memoryview(self.tensors.read()), 0
        pieces = []
        for size in self.sizes:
            pieces.append(view[at : at + size])
            at += size
        return iter(pieces)


def prepare(
    plans: RoutePlans, body: bytes, json_bytes: int | None
) -> tuple[Prepared, Sequence[Data]]:
    """Decode and check a request; return it and where its tensors are.  Raises BadRequest."""
    name = plans.route.name
    if json_bytes not in (None, len(body)):
        raise BadRequest(
            f"model '{name}': nothing follows the JSON of a request whose tensors lie in shared "
            f"memory; send them there, or leave the Content-Type out"
        )
    regions = plans.regions
    try:
        request = codec.decode_request(body)
        window = window_of(request.parameters)
        answer_bytes = codec.whole(request.parameters, _ANSWER_BYTES)
    except OvercommitError as error:
        raise type(error)(f"model '{name}': {error.message}") from error
    if window is None:
        raise BadRequest(f"model '{name}': parameter 'shared_memory_region' is missing")
    tensors = regions.hold(window)
    answer = regions.hold(Window(window.region, window.offset, answer_bytes or 0))
    prepared = prepare_head(plans, body, window.nbytes)
    if prepared is not None:
        sizes = tuple(place.nbytes for place in prepared.plan.places)
        return prepared, SharedData(tensors, answer, sizes)
    tail = memoryview(tensors.read())
    prepared, data = prepare_decoded(plans, request, tail)
    sizes = tuple(map(len, data))
    return prepared, SharedData(tensors, answer, sizes, tuple(data))


class SharedExchange(Exchange):
    """One request whose tensors lie in shared memory, and its answer."""

    prepare = staticmethod(prepare)

    def __init__(self, protocol: Connection, name: str, version: str | None) -> None:
        super().__init__(protocol, name, version)
        self.shared: SharedData | None = None

    def try_begin_bulk(self) -> list[memoryview] | None:
        """Nothing may follow the JSON; `prepare` says so."""
        return None

    def _begin_ensemble(self, plans: RoutePlans) -> None:
        prepared, data = self.prepare(plans, bytes(self.body), self.json_bytes)
        assert isinstance(data, SharedData)
        self.shared = data
        self._run_ensemble(prepared, list(data))

    def _submit(self, prepared: Prepared, data: Sequence[Data]) -> None:
        assert isinstance(data, SharedData)
        self.shared = data
        if data.read is not None:
            super()._submit(prepared, data)
            return
        self.prepared = prepared
        dispatch = self.protocol.front.dispatch
        now_ns = time.monotonic_ns()
        pending = dispatch.open(prepared.route, prepared.plan, self, now_ns)
        try:
            data.tensors.read_into(dispatch.parcels.space(pending, prepared.plan))
        except BaseException:
            dispatch.abandon(pending)
            raise
        self.pending = pending
        self.drop_body()
        self._send(pending, prepared, now_ns)

    def abandon(self) -> None:
        """The client is gone."""
        self.shared = None
        super().abandon()

    def _finish(self, response: list[bytes]) -> None:
        self.shared = None
        super()._finish(response)

    def succeed(self, view: memoryview) -> None:
        """Write the model's answer: its tensors into the region, if they fit."""
        prepared, shared = self.prepared, self.shared
        assert prepared is not None
        assert shared is not None
        try:
            body = respond(prepared, shared, view)
        except OvercommitError as error:
            self.fail(error)
            return
        except Exception:  # the request boundary: others wait for their completions
            self._fail_badly()
            return
        if body is None:
            super().succeed(view)
            return
        self.pending = None
        self._finish([OK_JSON % (len(body), self._close_header()) + body])


def respond(prepared: Prepared, shared: SharedData, view: memoryview) -> bytes | None:
    """Write outputs into the region and return the JSON; None when they cannot go there.

    Raises ProtocolError, BadRequest.
    """
    plan = prepared.plan_of(view)
    nbytes = sum(part.end - part.start for part in plan.parts)
    if nbytes > shared.answer.window.nbytes or not all(
        part.is_binary and part.classes is None for part in plan.parts
    ):
        return None
    shared.answer.write_all([view[part.start : part.end] for part in plan.parts], nbytes)
    pieces = [prepared.answer_head, *(part.prefix for part in plan.parts), plan.tail]
    if prepared.id is not None:
        pieces += (b',"id":', codec.encode(prepared.id))
    pieces.append(b',"parameters":{"shared_memory_byte_size":%d}}' % nbytes)
    return b"".join(pieces)
