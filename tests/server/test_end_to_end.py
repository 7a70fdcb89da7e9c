"""The whole server over HTTP: more models than fit, right answers, changes while it runs, a clean end."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import WATCHDOG_S, Server, children_of, files_of, is_alive

IDS = [[5, 17, 3, 99], [7, 8, 9, 10]]


def inputs(ids: list[list[int]]) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def hidden(body: Any) -> np.ndarray[Any, Any]:
    output = next(o for o in body["outputs"] if o["name"] == "last_hidden_state")
    return np.array(output["data"], np.float32).reshape(output["shape"])


@pytest.fixture(scope="module")
def server(bert_repository: Path, image_cache: Path) -> Iterator[Server]:
    with Server(bert_repository, cache=image_cache) as running:
        yield running


def test_every_model_gives_its_own_answer(
    server: Server, bert_repository: Path, bert_reference: Callable[..., Any]
) -> None:
    answers = []
    for folder in sorted(bert_repository.iterdir()):
        answer = server.infer(folder.name, inputs(IDS))
        assert answer.status == 200, answer.body
        got = hidden(answer.json())
        np.testing.assert_allclose(got, bert_reference(folder, IDS), atol=1e-5)
        answers.append(got)
    for i, left in enumerate(answers):
        for right in answers[i + 1 :]:
            assert np.abs(left - right).max() > 1e-2


def test_requests_of_unequal_length_in_one_batch_get_their_own_rows(
    server: Server, bert_repository: Path, bert_reference: Callable[..., Any]
) -> None:
    folder = bert_repository / "bert-00"
    requests = [[list(range(1, 2 + length))] for length in range(1, 17)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda ids: server.infer("bert-00", inputs(ids)), requests))
    for ids, answer in zip(requests, answers, strict=True):
        assert answer.status == 200, answer.body
        np.testing.assert_allclose(hidden(answer.json()), bert_reference(folder, ids), atol=1e-5)


def test_tritonclient_gets_the_same_answer_in_binary(
    server: Server, bert_repository: Path, bert_reference: Callable[..., Any]
) -> None:
    triton = pytest.importorskip("tritonclient.http")
    client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
    ids = np.array(IDS)
    tensors = [
        triton.InferInput(name, list(ids.shape), "INT64")
        for name in ("input_ids", "attention_mask")
    ]
    tensors[0].set_data_from_numpy(ids)
    tensors[1].set_data_from_numpy(np.ones_like(ids))
    got = client.infer("bert-03", tensors).as_numpy("last_hidden_state")
    np.testing.assert_allclose(got, bert_reference(bert_repository / "bert-03", IDS), atol=1e-5)
    assert client.is_server_ready()
    assert client.is_model_ready("bert-03")
    assert client.get_model_metadata("bert-03")["inputs"][0]["datatype"] == "INT64"
    assert {row["name"] for row in client.get_model_repository_index()} >= {"bert-03"}
    client.close()


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v2/models/nope/infer", 404, "Request for unknown model: 'nope' is not found"),
        ("/v2/models/bert-00/versions/9/infer", 404, "bert-00"),
        ("/v2/models/..%2f..%2fetc/infer", 404, "unknown model"),
    ],
)
def test_an_unknown_model_is_a_404_that_names_it(
    server: Server, path: str, status: int, words: str
) -> None:
    answer = server.post(path, {"inputs": []})
    assert answer.status == status
    assert words in answer.json()["error"]


def test_unload_and_load(server: Server) -> None:
    assert server.post("/v2/repository/models/bert-05/unload", {}).status == 200
    server.wait_until(lambda: server.infer("bert-05", inputs(IDS)).status != 200)
    assert "bert-05" in server.infer("bert-05", inputs(IDS)).json()["error"]
    assert server.post("/v2/repository/models/bert-05/load", {}).status == 200
    server.wait_until(lambda: server.infer("bert-05", inputs(IDS)).status == 200)


def test_metrics_and_status_count_what_happened(server: Server) -> None:
    assert server.infer("bert-01", inputs(IDS)).status == 200
    text = server.get("/metrics").body.decode()
    assert "overcommit_requests_total" in text
    assert 'overcommit_model_success_total{model="bert-01",version="1"}' in text
    detail = server.get("/metrics?model=bert-01").body.decode()
    assert 'overcommit_model_loads_from_disk_total{model="bert-01",version="1"} 1.0' in detail
    assert "bert-02" not in detail
    (version,) = server.get("/v2/overcommit/models/bert-01").json()["versions"]
    assert version["success"] == version["requests"] > 0
    (top,) = server.get("/v2/overcommit/models?limit=1&order=requests").json()["models"]
    assert top["requests"] >= version["requests"]
    status = server.status()
    assert status["totals"]["loads_from_disk"] > 0
    kinds = {row["kind"] for row in status["processes"]} - {"packer"}  # it goes when it has no work
    assert kinds == {"front_end", "worker", "mover"}


def test_the_supervisor_has_not_imported_torch(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "_shm" in maps


def test_more_models_than_fit_are_evicted_and_come_back(
    tmp_path: Path,
    bert_repository: Path,
    image_cache: Path,
    bert_reference: Callable[..., Any],
) -> None:
    # One 2 MiB chunk is the smallest device; the twelve models take about 1.5 MiB together, so a
    # model with a large table is added that takes the rest of it.
    repository = tmp_path / "repository"
    shutil.copytree(bert_repository, repository)
    wide_bert(repository / "wide-0", 100)
    wide_bert(repository / "wide-1", 101)
    wide_bert(repository / "wide-2", 102)
    names = ["wide-0", "wide-1", "wide-2"]
    want = {name: bert_reference(repository / name, IDS) for name in names}
    flags = ("--device-memory", "8MiB", "--host-memory", "8MiB")
    with Server(repository, cache=image_cache, flags=flags) as server:
        for _ in range(3):
            for name in names:
                answer = server.infer(name, inputs(IDS))
                assert answer.status == 200, answer.body
                np.testing.assert_allclose(hidden(answer.json()), want[name], atol=1e-5)
        totals = server.status()["totals"]
        assert totals["evictions_device"] > 0
        assert server.stop() == 0


def test_a_model_that_is_idle_for_its_ttl_leaves_device_and_answers_as_before(
    tmp_path: Path, make_bert: Callable[[Path, int], None], bert_reference: Callable[..., Any]
) -> None:
    repository = tmp_path / "repository"
    for name, seed, terms in (("short", 1, "ttl = 0.3\n"), ("long", 2, "min_resident = 3600\n")):
        make_bert(repository / name, seed)
        (repository / name / "model.toml").write_text(terms)
    want = bert_reference(repository / "short", IDS)
    with Server(repository, cache=tmp_path / "cache", flags=("--ttl", "3600")) as server:
        for _ in range(2):
            for name in ("short", "long"):
                assert server.infer(name, inputs(IDS)).status == 200
            server.wait_until(lambda: not server.models()["short/1"]["device_bytes"])
        rows = server.models()
        assert rows["long/1"]["tier"] == "DEVICE"
        assert (rows["short/1"]["ttl_s"], rows["long/1"]["ttl_s"]) == (0.3, 3600)
        assert rows["long/1"]["min_resident_s"] == 3600
        assert server.status()["totals"]["expiries"] >= 2
        np.testing.assert_allclose(
            hidden(server.infer("short", inputs(IDS)).json()), want, atol=1e-5
        )
        assert server.stop() == 0


def wide_bert(folder: Path, seed: int) -> None:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=8000,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)


def test_added_changed_and_removed_models_are_noticed(
    tmp_path: Path, make_bert: Callable[[Path, int], None], bert_reference: Callable[..., Any]
) -> None:
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    make_bert(repository / "first", 1)
    with Server(repository, cache=cache) as server:
        assert server.infer("first", inputs(IDS)).status == 200
        make_bert(tmp_path / "second", 2)
        (tmp_path / "second").rename(repository / "second")
        server.wait_until(lambda: server.infer("second", inputs(IDS)).status == 200)

        (repository / "broken").mkdir()
        (repository / "broken" / "weights.bin").write_bytes(b"nothing")
        server.wait_until(lambda: server.models().get("broken/1", {}).get("state") == "UNAVAILABLE")
        assert server.models()["broken/1"]["reason"]
        assert "broken" in server.infer("broken", inputs(IDS)).json()["error"]

        make_bert(tmp_path / "first", 3)
        want = bert_reference(tmp_path / "first", IDS)
        shutil.copy(tmp_path / "first" / "model.safetensors", repository / "first" / "new")
        os.replace(repository / "first" / "new", repository / "first" / "model.safetensors")
        server.wait_until(
            lambda: np.allclose(hidden(server.infer("first", inputs(IDS)).json()), want, atol=1e-5)
        )
        shutil.rmtree(repository / "second")
        server.wait_until(lambda: server.infer("second", inputs(IDS)).status == 404)
        assert server.infer("first", inputs(IDS)).status == 200
        assert server.stop() == 0


def test_a_cache_that_is_lost_while_it_serves_is_made_again(
    tmp_path: Path, bert_repository: Path, bert_reference: Callable[..., Any]
) -> None:
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    for name in ("bert-00", "bert-01", "bert-02"):
        shutil.copytree(bert_repository / name, repository / name)
    with Server(repository, cache=cache) as server:
        server.wait_until(lambda: all(m["state"] == "READY" for m in server.models().values()))
        assert server.infer("bert-00", inputs(IDS)).status == 200
        shutil.rmtree(cache / "images")
        assert server.infer("bert-00", inputs(IDS)).status == 200  # it is in memory
        refused = server.infer("bert-01", inputs(IDS))
        assert "is gone from the cache" in refused.json()["error"]
        server.wait_until(lambda: server.infer("bert-01", inputs(IDS)).status == 200)
        assert server.post("/v2/repository/models/bert-02/load", {}).status == 200
        answer = server.infer("bert-02", inputs(IDS))
        assert answer.status == 200, answer.body
        expected = bert_reference(repository / "bert-02", IDS)
        np.testing.assert_allclose(hidden(answer.json()), expected, atol=1e-5)


def test_sigterm_under_load_answers_every_accepted_request(
    bert_repository: Path, image_cache: Path
) -> None:
    with Server(bert_repository, cache=image_cache) as server:
        for number in range(12):
            assert server.infer(f"bert-{number:02}", inputs(IDS)).status == 200
        sent, wrong = [0] * 8, []

        def load(index: int) -> None:
            import http.client
            import json

            ids = inputs(IDS)
            tensors = [
                {"name": n, "datatype": "INT64", "shape": [2, 4], "data": [*rows[0], *rows[1]]}
                for n, rows in ids.items()
            ]
            body = json.dumps({"inputs": tensors})
            while True:
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                try:
                    connection.connect()
                except OSError:
                    return  # not accepted: the listener is gone
                answered = 0
                try:
                    while answered < 20:
                        connection.request("POST", f"/v2/models/bert-{index:02}/infer", body)
                        response = connection.getresponse()
                        response.read()
                        if response.status != 200:
                            wrong.append(response.status)
                        answered += 1
                        sent[index] += 1
                        if response.will_close:
                            break
                except (OSError, http.client.HTTPException) as error:
                    # A connection that fails on its first request was in the kernel's queue and
                    # never accepted; one that had been answered must not be cut.
                    if answered:
                        wrong.append(error)
                    return
                finally:
                    connection.close()

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            running = [pool.submit(load, index) for index in range(8)]
            server.wait_until(lambda: min(sent) >= 20)
            family = children_of(server.process.pid)
            assert server.stop() == 0
            for future in running:
                future.result()
        assert wrong == []
        assert not any(is_alive(pid) for pid in family)


def test_killing_the_supervisor_leaves_no_process_and_no_file(
    bert_repository: Path, image_cache: Path, tmp_path: Path
) -> None:
    with Server(
        bert_repository, cache=image_cache, environment={"TMPDIR": str(tmp_path)}
    ) as server:
        assert server.infer("bert-00", inputs(IDS)).status == 200
        family = children_of(server.process.pid)
        assert len(family) >= 4
        # Memory that they share has no name, so that nothing of it can be left behind.
        names = [name for pid in (server.process.pid, *family) for name in files_of(pid)]
        assert any(name.startswith("/memfd:") for name in names)
        assert [name for name in names if name.startswith("/dev/shm/")] == []
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        deadline = time.monotonic() + WATCHDOG_S
        while any(is_alive(pid) for pid in family) and time.monotonic() < deadline:
            signal.sigtimedwait([], 0.05)
        assert [pid for pid in family if is_alive(pid)] == []
    assert list(tmp_path.iterdir()) == []


def test_a_second_server_on_the_same_port_is_refused(
    server: Server, bert_repository: Path, image_cache: Path
) -> None:
    flags = ("--port", str(server.port))
    other = Server(bert_repository, cache=image_cache, flags=flags)
    assert other.process.wait(60) == 2
    assert any("another --port" in line for line in other.log)


def test_a_clean_end_warns_of_nobody(tmp_path: Path) -> None:
    empty = tmp_path / "repository"
    empty.mkdir()
    with Server(empty, cache=tmp_path / "cache") as server:
        assert server.stop() == 0
        ends = [line for line in server.log if " ended: " in line]
        assert {line.split()[4] for line in ends} == {"front_end", "mover", "worker"}
        assert all(" INFO " in line for line in ends), ends


def test_who_does_not_stop_when_told_is_killed_and_named(tmp_path: Path) -> None:
    empty = tmp_path / "repository"
    empty.mkdir()
    with Server(empty, cache=tmp_path / "cache") as server:
        (mover,) = server.pids("mover")
        os.kill(mover, signal.SIGSTOP)
        assert server.stop() == 0
        assert any("mover" in line and "did not stop in" in line for line in server.log)
        assert not is_alive(mover)
