"""The calls that infer: ModelInfer, and ModelStreamInfer with many requests in one call.

    unary   one `Inference`, which is the call's
    stream  each message is an `Inference` of its own; answers leave in the order of the messages

Invariants
 1. A stream has at most GRPC_STREAM_REQUESTS_MAX requests under way, and none begins while answers
    wait for the client; what waits of messages counts against the budget of all bodies.
 2. What was submitted is cancelled when the call ends before its answers.

Called by the HTTP/2 connection (in) and by the inferences (out).
"""

from __future__ import annotations

from collections import deque

from overcommit.server import grpc_wire
from overcommit.server.grpc_answers import FINAL, stream_answer
from overcommit.server.grpc_call import Call, Unary
from overcommit.server.grpc_inference import Inference, Service
from overcommit.server.grpc_wire import CallFailed, CallHead
from overcommit.server.h2_connection import Connection
from overcommit.server.inference import Data
from overcommit.server.limits import GRPC_STREAM_REQUESTS_MAX
from overcommit.server.proto import messages


class InferCall(Unary):
    """ModelInfer."""

    __slots__ = ("_inference",)

    def __init__(
        self, connection: Connection, number: int, service: Service, head: CallHead
    ) -> None:
        super().__init__(connection, number, service, head)
        self._inference: Inference | None = None

    def run(self, message: Data) -> None:
        """Submit the request."""
        self._inference = inference = Inference(self.service, self, self.head.version)
        inference.begin(message, self.deadline_ns)
        self.release()

    def on_answer(self, inference: Inference, pieces: list[bytes]) -> None:
        """Send the answer."""
        self.send_message(pieces, grpc_wire.TRAILERS_OK)

    def on_failure(self, inference: Inference, failure: CallFailed) -> None:
        """Send the error."""
        self.refuse(failure)

    def stop(self) -> None:
        """Cancel what was submitted."""
        if self._inference is not None:
            self._inference.abandon()


class StreamCall(Call):
    """ModelStreamInfer: answers in the order of the requests."""

    __slots__ = ("_has_all", "_later", "_turns")

    def __init__(
        self, connection: Connection, number: int, service: Service, head: CallHead
    ) -> None:
        super().__init__(connection, number, service, head)
        self._turns: deque[Inference] = deque()  # submitted, not answered
        self._later: deque[Data] = deque()  # not looked at yet
        self._has_all = False  # messages: not while the last bytes are still cut into some

    def on_message(self, message: Data, is_last: bool) -> None:
        """Begin, or wait until there are fewer under way."""
        self.hold(len(message))
        self._later.append(message)
        self._go_on()

    def _is_full(self) -> bool:
        return len(self._turns) >= GRPC_STREAM_REQUESTS_MAX or bool(self.queue)

    def _go_on(self) -> None:
        while self._later and not self._is_full() and not self.is_gone:
            message = self._later.popleft()
            self.let_go(len(message))
            inference = Inference(self.service, self, self.head.version)
            self._turns.append(inference)
            inference.begin(message, self.deadline_ns)
        self._end_if_done()

    def top_up(self) -> None:
        """A client that sends faster than its requests are answered waits."""
        if not self._later:
            super().top_up()

    def on_end(self) -> None:
        """The client sends no more; its answers come all the same."""
        self._has_all = True
        self._end_if_done()

    def on_sent(self) -> None:
        """The client has read what waited."""
        if not self.is_gone:
            self._go_on()

    def check_time(self, now_s: float) -> None:
        """A stream may stay open and silent."""

    def on_answer(self, inference: Inference, pieces: list[bytes]) -> None:
        """Keep the answer until it is its turn."""
        inference.answer = stream_answer([*pieces, FINAL])
        self._send_turns()

    def on_failure(self, inference: Inference, failure: CallFailed) -> None:
        """An error is the request's, the stream goes on; unless the client wants it otherwise."""
        if self.head.wants_status:
            self.refuse(failure)
            return
        response = messages.ModelStreamInferResponse(error_message=failure.text)
        response.infer_response.id = inference.id
        inference.answer = [response.SerializeToString()]
        self._send_turns()

    def _send_turns(self) -> None:
        turns = self._turns
        while turns and turns[0].answer is not None:
            answer = turns.popleft().answer
            assert answer is not None
            self.send_message(answer, None)
        if self._later and not self._is_full():
            self.connection.loop.call_soon(self.on_sent)
        else:
            self._end_if_done()
        if not self._later and not self.is_ended:
            self.top_up()

    def _end_if_done(self) -> None:
        if self._has_all and not self._turns and not self._later and not self.is_gone:
            self.release()
            self.connection.send(
                self, grpc_wire.BEGIN[self.head.answers_in], (), grpc_wire.TRAILERS_OK
            )

    def stop(self) -> None:
        """Cancel what was submitted."""
        self._later.clear()
        turns, self._turns = self._turns, deque()
        for inference in turns:
            inference.abandon()
