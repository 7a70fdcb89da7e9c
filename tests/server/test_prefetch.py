"""A real server that brings a model to memory before its hour, by a wall clock that the test sets."""

from __future__ import annotations

from pathlib import Path

from serving import Server

CLOCK = Path(__file__).parents[1] / "wallclock.py"
IDS = {"input_ids": [[5, 17, 3, 99]], "attention_mask": [[1, 1, 1, 1]]}
HOUR = 3600.0
DAY = 24 * HOUR
MONDAY = 4 * DAY + 52 * 7 * DAY  # the epoch was a Thursday


class Clock:
    """Moves by whole renames: the server never sees half a number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set(MONDAY)

    def set(self, now_s: float) -> None:
        """It is so late now."""
        temporary = self.path.with_suffix(".new")
        temporary.write_text(repr(now_s))
        temporary.replace(self.path)
        self.now_s = now_s


def serve(clock: Clock) -> tuple[str, ...]:
    return (str(CLOCK), str(clock.path), "serve")


def ask(server: Server, name: str, clock: Clock, at_s: float) -> None:
    """Ask at this time of the clock, and wait until the supervisor has seen it."""
    clock.set(at_s)
    before = server.status()["prefetch"]["uses_seen"]
    assert server.infer(name, IDS).status == 200
    server.wait_until(lambda: server.status()["prefetch"]["uses_seen"] > before)


def tier(server: Server, name: str) -> str:
    return str(server.models()[f"{name}/1"]["tier"])


def test_a_model_with_an_hour_of_its_own_is_there_before_it_after_a_restart_too(
    bert_repository: Path, image_cache: Path, tmp_path: Path
) -> None:
    clock = Clock(tmp_path / "clock")
    (image_cache / "demand.bin").unlink(missing_ok=True)
    name = sorted(folder.name for folder in bert_repository.iterdir())[0]
    with Server(bert_repository, cache=image_cache, serve=serve(clock)) as server:
        for day in range(4):
            for minute in (2, 20):
                ask(server, name, clock, MONDAY + day * DAY + 9 * HOUR + minute * 60)
        assert server.status()["prefetch"]["models"] == 1
        server.stop()

    clock.set(MONDAY + 4 * DAY + 3 * HOUR)
    with Server(bert_repository, cache=image_cache, serve=serve(clock)) as server:
        status = server.status()["prefetch"]
        assert (status["models"], status["started_device"]) == (1, 0), "it remembers, and waits"
        assert tier(server, name) == "DISK"
        clock.set(MONDAY + 4 * DAY + 9 * HOUR - 60)
        server.wait_until(lambda: tier(server, name) == "DEVICE")
        loads = server.models()[f"{name}/1"]["loads_from_disk"]
        ask(server, name, clock, MONDAY + 4 * DAY + 9 * HOUR + 120)
        after = server.status()["prefetch"]
        assert server.models()[f"{name}/1"]["loads_from_disk"] == loads, "nobody waited for a load"
        assert after["used"] == 1
        assert after["saved_s"] > 0
        text = server.get("/metrics").body.decode()
        assert "overcommit_prefetch_used_total 1.0" in text
        assert 'overcommit_prefetch_waiting_bytes{tier="device"} 0.0' in text


def test_with_no_prefetch_nothing_is_learnt_and_nothing_is_kept(
    bert_repository: Path, image_cache: Path, tmp_path: Path
) -> None:
    name = sorted(folder.name for folder in bert_repository.iterdir())[0]
    (image_cache / "demand.bin").unlink(missing_ok=True)
    with Server(bert_repository, cache=image_cache, flags=("--no-prefetch",)) as server:
        assert server.infer(name, IDS).status == 200
        assert server.status()["prefetch"] is None
        assert "overcommit_prefetch" not in server.get("/metrics").body.decode()
        server.stop()
    assert not (image_cache / "demand.bin").exists()
