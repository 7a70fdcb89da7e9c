"""Clients that use shared memory by themselves: right answers, certain detection, nothing left behind."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from serving import Server

import overcommit
from overcommit.bench.models_repo import ALLOW_CODE, make_echo
from overcommit.runtime.errors import BadRequest, DeadlineExceeded
from overcommit.server import leases
from overcommit.server.clients import exchange, sharing
from overcommit.server.clients.exchange import Received, Sent
from overcommit.server.clients.sharing import REGION_BYTES_MIN, Region, Sharing

LONG = sharing.SHARED_BYTES_MIN // 4  # numbers of FP32
FLAGS = (ALLOW_CODE, "--client-shared-memory", "--front-ends", "2")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("echoes")
    make_echo(root, "twice", 2.0, columns=-1, batch=4)
    return root


@pytest.fixture(scope="module")
def server(repository: Path, image_cache: Path) -> Iterator[Server]:
    with Server(repository, cache=image_cache, flags=FLAGS) as running:
        yield running


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def numbers(seed: int, count: int = LONG) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random((1, count), np.float32)


def regions(server: Server) -> list[str]:
    return [row["name"] for row in server.get("/v2/systemsharedmemory/status").json()]


def own_files() -> set[str]:
    """Files of this process's clients."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if Path(target).name.startswith(leases.KEY_PREFIX):
                found.add(target)
    return found


# --- a real server --------------------------------------------------------------------------------
def test_long_tensors_go_through_a_region_that_is_used_again_and_given_back(server: Server) -> None:
    with overcommit.Client(url(server)) as client:
        for seed in range(6):
            x = numbers(seed)
            result = client.infer("twice", {"x": x}, id=str(seed))
            np.testing.assert_array_equal(result["y"], 2 * x)
            assert result.id == str(seed)
            result["y"][:] = 0  # it is the caller's own
        (name,) = regions(server)
        assert os.path.exists(f"{leases.FOLDER}/{name}")
        client.infer("twice", {"x": numbers(0, 4)})
        longer = numbers(7, 3 * LONG)
        np.testing.assert_array_equal(client.infer("twice", {"x": longer})["y"], 2 * longer)
        assert len(regions(server)) == 2
    assert regions(server) == []
    assert not own_files()
    assert not os.path.exists(f"{leases.FOLDER}/{name}")


def test_threads_and_tasks_never_see_each_others_numbers(server: Server) -> None:
    with overcommit.Client(url(server)) as client:

        def ask(seed: int) -> bool:
            x = numbers(seed, LONG + seed)
            return bool((client.infer("twice", {"x": x})["y"] == 2 * x).all())

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, range(24)))
        assert regions(server)

    async def run() -> None:
        async with overcommit.AsyncClient(url(server)) as client:

            async def ask_too(seed: int) -> bool:
                x = numbers(seed, LONG + seed)
                return bool(((await client.infer("twice", {"x": x}))["y"] == 2 * x).all())

            assert await ask_too(0)
            assert all(await asyncio.gather(*map(ask_too, range(12))))
            assert regions(server)
            tasks = [asyncio.ensure_future(ask_too(seed)) for seed in range(4)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert [each for each in done if not isinstance(each, BaseException)] == [True, True]

    asyncio.run(run())
    assert not own_files()


def test_what_the_server_refuses_is_refused_in_the_same_words(server: Server) -> None:
    with overcommit.Client(url(server)) as client:
        client.infer("twice", {"x": numbers(0)})
        with pytest.raises(BadRequest, match=r"max_batch_size is 4"):
            client.infer("twice", {"x": np.zeros((5, LONG), np.float32)})
        with pytest.raises(BadRequest, match="unknown output 'z'"):
            client.infer("twice", {"x": numbers(0)}, outputs=["z"])
        assert len(regions(server)) >= 1  # the region was not to blame
        x = numbers(1)
        np.testing.assert_array_equal(client.infer("twice", {"x": x})["y"], 2 * x)


def test_a_region_that_somebody_took_away_costs_no_answer(server: Server) -> None:
    with overcommit.Client(url(server)) as client:
        client.infer("twice", {"x": numbers(0)})
        assert regions(server)
        server.post("/v2/systemsharedmemory/unregister", {})
        for seed in range(3):
            x = numbers(seed)
            np.testing.assert_array_equal(client.infer("twice", {"x": x})["y"], 2 * x)
        assert regions(server) == []  # not for a while
        assert not own_files()


def test_a_client_that_is_killed_leaves_nothing(server: Server) -> None:
    script = f"""
import numpy, overcommit, time
client = overcommit.Client("{url(server)}")
client.infer("twice", {{"x": numpy.ones((1, {LONG}), "float32")}})
print("there", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        (name,) = regions(server)
        process.kill()
    server.wait_until(lambda: not regions(server))
    assert not os.path.exists(f"{leases.FOLDER}/{name}")


def test_the_successor_of_a_dead_server_answers_right(
    server: Server, repository: Path, image_cache: Path
) -> None:
    x = numbers(3)
    with Server(repository, cache=image_cache, flags=FLAGS) as first:
        client = overcommit.Client(url(first))
        np.testing.assert_array_equal(client.infer("twice", {"x": x})["y"], 2 * x)
        assert regions(first)
        first._kill()
    # Another port stands for the same one: connections break, and nobody knows the region.
    client._place = overcommit.Client(url(server))._place
    with client:
        for _ in range(3):
            np.testing.assert_array_equal(client.infer("twice", {"x": x})["y"], 2 * x)
    assert not own_files()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({}, "'shared_memory_region' is missing"),
        ({"shared_memory_region": "no"}, "shared_memory_byte_size"),
        ({"shared_memory_region": "no", "shared_memory_byte_size": 4}, "Unable to find"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 5}, "5 bytes follow"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 1 << 21}, "Invalid offset"),
    ],
)
def test_a_body_that_names_no_region_is_refused(
    server: Server, parameters: dict[str, Any], says: str
) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1]}
    body = {"inputs": [{**tensor, "parameters": {"binary_data_size": 4}}], "parameters": parameters}
    headers = {"content-type": "application/vnd.overcommit.shared+json"}
    region = Region(REGION_BYTES_MIN)
    path = "/v2/systemsharedmemory/region/r"
    try:
        asked = {"key": region.name, "byte_size": region.nbytes, "leased": True}
        assert server.post(f"{path}/register", asked).json() == {"proof": region.proof}
        text = msgspec.json.encode(body)
        answer = server.request("POST", "/v2/models/twice/infer", text, headers)
        assert answer.status in (400, 404)
        assert says in answer.json()["error"]
    finally:
        server.post(f"{path}/unregister", {})
        region.close()
    # Nobody holds its lock, and soon it has no name.
    assert server.post(f"{path}/register", asked).status == 400


# --- without a server -----------------------------------------------------------------------------
def asked(count: int = LONG) -> exchange.Inference:
    return exchange.inference("m", None, {"x": np.zeros(count, np.float32)}, None, None, None, None)


def scripted(client: overcommit.Client, proof: str, calls: list[str]) -> None:
    """Answer as a server that lists the extension, on another machine."""

    def send(sent: Sent, timeout_s: float) -> Received:
        calls.append(sent.path.rsplit("/", 1)[1])
        body: Any = {"name": "m", "model_name": "m", "outputs": []}
        if sent.path == "/v2":
            body = {"extensions": ["system_shared_memory(leased)"]}
        elif sent.path.endswith("/register"):
            body = {"proof": proof}
        return Received(200, {}, msgspec.json.encode(body))

    client._send = send  # type: ignore[method-assign]


def test_who_cannot_say_the_nonce_gets_bodies() -> None:
    calls: list[str] = []
    client = overcommit.Client()
    scripted(client, "0" * 64, calls)
    for _ in range(3):
        client.infer("m", {"x": np.zeros(LONG, np.float32)})
    assert calls == ["m", "v2", "register", "infer", "infer", "infer"]
    assert not own_files()


def test_after_a_timeout_a_region_is_not_used_again() -> None:
    client = overcommit.Client()
    own = client._sharing
    assert own is not None
    assert own.begin()
    own.end(True)
    region, gone = own.make(REGION_BYTES_MIN)
    assert region is not None
    assert gone == []
    own.give_back(region)

    def send(sent: Sent, timeout_s: float) -> Received:
        raise DeadlineExceeded("no answer")

    client._infos["m", None] = exchange.ModelInfo("m")
    client._send = send  # type: ignore[method-assign]
    with pytest.raises(DeadlineExceeded):
        client.infer("m", {"x": np.zeros(LONG, np.float32)})
    assert own.lend(1) is None
    assert not own_files()


def test_a_gateways_error_is_no_answer_of_the_server() -> None:
    sent = asked().in_region("r", REGION_BYTES_MIN)
    gateway = Received(503, {"retry-after": "1"}, b"")
    assert exchange.pause_s(sent, gateway, 0, 60.0) is None
    assert not exchange.is_servers_own(gateway)
    ours = Received(503, {"retry-after": "1", "retry-after-ms": "10"}, b"")
    assert exchange.pause_s(sent, ours, 0, 60.0) == 0.01
    assert exchange.pause_s(asked().in_body(), gateway, 0, 60.0) == 1.0


def test_regions_are_bounded_and_make_way_for_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "REGION_BYTES_TOTAL", 4 * REGION_BYTES_MIN)
    own = Sharing()
    small = [own.make(REGION_BYTES_MIN)[0] for _ in range(4)]
    assert own.make(REGION_BYTES_MIN) == (None, [])
    for region in small:
        assert region is not None
        own.give_back(region)
    large, gone = own.make(4 * REGION_BYTES_MIN)
    assert large is not None
    assert gone == small
    for region in (*gone, large):
        region.close()
    assert not own_files()


def test_a_pause_is_kept_and_grows() -> None:
    now_s = 0.0
    own = Sharing(clock_s=lambda: now_s)
    for pause_s in (sharing.PAUSE_S, 2 * sharing.PAUSE_S):
        assert own.begin()
        assert not own.begin()  # somebody asks already
        own.end(False)
        now_s += pause_s - 0.1
        assert not own.begin()
        now_s += 0.2


def test_short_tensors_have_no_region_until_the_answer_was_long() -> None:
    own = Sharing()
    assert own.wanted_bytes(asked(4)) == 0
    assert own.wanted_bytes(asked()) == REGION_BYTES_MIN
    result = exchange.Result("m", "1", None, {"y": np.zeros(3 * REGION_BYTES_MIN, np.uint8)})
    own.learn(asked(4), result)
    assert own.wanted_bytes(asked(4)) == 4 * REGION_BYTES_MIN


def test_the_collector_removes_what_nobody_closed() -> None:
    own = Sharing()
    region, _ = own.make(REGION_BYTES_MIN)
    assert region is not None
    name = region.name
    own.give_back(region)
    del own, region
    gc.collect()
    assert not os.path.exists(f"{leases.FOLDER}/{name}")
    assert not own_files()


def test_a_fork_has_none_of_its_parents_regions() -> None:
    own = Sharing()
    region, _ = own.make(REGION_BYTES_MIN)
    assert region is not None
    own.give_back(region)
    child = os.fork()
    if child == 0:
        is_right = own.lend(1) is None and not own.close()
        region.close()
        os._exit(0 if is_right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.path.exists(f"{leases.FOLDER}/{region.name}")
    assert own.lend(1) is region
    own.retire(region)


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    folder = leases.FOLDER
    living, key = leases.create(4096, folder)
    dead, gone = leases.create(4096, folder)
    os.close(dead)
    try:
        assert os.path.exists(f"{folder}/{gone}")
        assert leases.remove_leftovers(folder) >= 1
        assert not os.path.exists(f"{folder}/{gone}")
        other = os.open(f"{folder}/{key}", os.O_RDWR)
        assert leases.is_held(other)
        leases.remove(other, "../" + key, folder)
        os.close(other)
        assert os.path.exists(f"{folder}/{key}")
    finally:
        leases.remove(living, key, folder)
        os.close(living)


def test_a_full_memory_is_a_body_and_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, at: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    own = Sharing()
    assert own.make(REGION_BYTES_MIN) == (None, [])
    monkeypatch.undo()
    assert own.make(REGION_BYTES_MIN) == (None, [])  # not tried again at once
    assert not own_files()
