"""gRPC on the real server: front ends that share a port, die and drain."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from h2_rig import request, values
from model_rig import SLOW, add_model
from serving import WATCHDOG_S, Server

from overcommit.server.proto import messages

SERVICE = "/inference.GRPCInferenceService/"


class Client:
    """One channel with a connection of its own."""

    def __init__(self, server: Server) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options)

    def infer(self, seconds: float) -> list[float]:
        call = self.channel.unary_unary(SERVICE + "ModelInfer")
        message = messages.ModelInferRequest.FromString(request([seconds], name="seconds"))
        message.model_name = "slow"
        answer = call(message.SerializeToString(), timeout=WATCHDOG_S, wait_for_ready=True)
        return values(answer)

    def try_infer(self, seconds: float) -> list[float] | None:
        try:
            return self.infer(seconds)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return None

    def refusal(self, token: str) -> grpc.StatusCode:
        call = self.channel.unary_unary(SERVICE + "ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=WATCHDOG_S, metadata=(("authorization", token),))
        return caught.value.code()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    add_model(root, "slow", SLOW, {"seconds": "FP32"}, batch=1)
    return root


def test_front_ends_share_the_port_die_and_drain(repository: Path, tmp_path: Path) -> None:
    flags = ("--allow-code", "--front-ends", "2")
    with Server(repository, cache=tmp_path / "cache", flags=flags) as server:
        server.wait_until(lambda: all(r["state"] == "READY" for r in server.models().values()))
        clients = [Client(server) for _ in range(16)]
        assert [client.infer(0.0) for client in clients] == [[0.0]] * 16
        fronts = server.status()["front_ends"]
        assert len(fronts) == 2
        server.wait_until(lambda: all(front["requests"] for front in server.status()["front_ends"]))
        first, second = server.pids("front_end")
        os.kill(first, signal.SIGKILL)
        # Connections to the one that died are made anew, to whoever listens; a call that was on its
        # way to it fails, and the client says so.
        for client in clients:
            server.wait_until(lambda client=client: client.try_infer(0.0) == [0.0])
        server.wait_until(lambda: len(server.pids("front_end")) == 2)
        assert second in server.pids("front_end")

        answers: list[Any] = []

        def ask() -> None:
            answers.append(clients[0].infer(0.5))

        waiting = threading.Thread(target=ask)
        waiting.start()
        server.wait_until(lambda: sum(f["in_flight"] for f in server.status()["front_ends"]))
        # A call that is refused before it is one leaves others of its connection alone.
        assert clients[0].refusal("v" * 17_000) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert clients[0].refusal("v" * 300_000) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert server.stop() == 0
        waiting.join(WATCHDOG_S)
        assert answers == [[0.5]]
        assert "Traceback" not in "\n".join(server.log)
