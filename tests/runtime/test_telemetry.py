"""What the machine has, read from files that the test wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from overcommit.runtime.config import GIB, MEMORY_RESERVE_BYTES, MIB, PAYLOAD_BYTES, Settings
from overcommit.runtime.errors import ConfigurationError
from overcommit.runtime.telemetry import Budgets, Telemetry, budgets, show_bytes


def machine(tmp_path: Path, total_gib: float = 32, available_gib: float = 16) -> Path:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal:       {int(total_gib * GIB / 1024)} kB\n"
        f"MemAvailable:   {int(available_gib * GIB / 1024)} kB\nHugePages_Total:       0\n"
    )
    return tmp_path


def cgroup(root: Path, line: str, folder: str, files: dict[str, object]) -> None:
    (root / "proc/self/cgroup").write_text(line + "\n")
    place = root / "sys/fs/cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / name).write_text(f"{content}\n")


def test_without_cgroups_meminfo_counts(tmp_path: Path) -> None:
    telemetry = Telemetry(machine(tmp_path))
    assert telemetry.host_available_bytes() == 16 * GIB


def test_a_v2_limit_counts_less_the_cache_that_can_be_dropped(tmp_path: Path) -> None:
    root = machine(tmp_path)
    files = {
        "memory.max": 8 * GIB,
        "memory.current": 5 * GIB,
        "memory.stat": f"anon 1\ninactive_file {2 * GIB}",
    }
    cgroup(root, "0::/a/b", "a/b", files)
    assert Telemetry(root).host_available_bytes() == 5 * GIB


def test_a_limit_of_a_parent_counts_too(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, "0::/a/b", "a/b", {"memory.max": "max", "memory.current": 1})
    cgroup(root, "0::/a/b", "a", {"memory.max": 4 * GIB, "memory.current": 1 * GIB})
    assert Telemetry(root).host_available_bytes() == 3 * GIB


def test_a_path_of_the_host_falls_back_to_the_mount(tmp_path: Path) -> None:
    root = machine(tmp_path)
    cgroup(root, "0::/docker/abc", "", {"memory.max": 4 * GIB, "memory.current": 0})
    assert Telemetry(root).host_available_bytes() == 4 * GIB


def test_a_v1_limit_counts_and_its_huge_number_does_not(tmp_path: Path) -> None:
    root = machine(tmp_path)
    usage = {"memory.usage_in_bytes": 1 * GIB, "memory.stat": "total_inactive_file 0"}
    cgroup(root, "5:memory:/x", "memory/x", {"memory.limit_in_bytes": 6 * GIB, **usage})
    cgroup(root, "5:memory:/x", "memory", {"memory.limit_in_bytes": 9223372036854771712, **usage})
    assert Telemetry(root).host_available_bytes() == 5 * GIB


def test_the_real_machine_can_be_read() -> None:
    telemetry = Telemetry()
    assert telemetry.host_available_bytes() > 0
    for device in telemetry.devices():
        assert device.total > 0


# --- budgets ------------------------------------------------------------------------------------
def test_without_flags_a_device_of_host_memory_gets_all_that_models_may_have(
    tmp_path: Path,
) -> None:
    telemetry = Telemetry(machine(tmp_path))
    spare = 16 * GIB - MEMORY_RESERVE_BYTES - 2 * PAYLOAD_BYTES
    assert budgets(Settings(), telemetry) == Budgets(int(spare * 0.65), 0)
    assert budgets(Settings(), telemetry, count=2) == Budgets(int(spare * 0.65) // 2, 0)


def test_a_host_tier_beside_a_device_of_host_memory_is_one_that_was_asked_for(
    tmp_path: Path,
) -> None:
    telemetry = Telemetry(machine(tmp_path))
    assert budgets(Settings(device_memory_bytes=1 * GIB), telemetry) == Budgets(GIB, 0)
    asked = Settings(device_memory_bytes=1 * GIB, host_memory_bytes=4 * GIB)
    assert budgets(asked, telemetry) == Budgets(GIB, 4 * GIB)


def test_flags_are_taken_as_they_are(tmp_path: Path) -> None:
    settings = Settings(device_memory_bytes=15 * GIB, host_memory_bytes=0)
    assert budgets(settings, Telemetry(machine(tmp_path))) == Budgets(15 * GIB, 0)


def test_a_device_without_a_flag_makes_room_for_a_host_tier(tmp_path: Path) -> None:
    big_host = budgets(Settings(host_memory_bytes=14 * GIB), Telemetry(machine(tmp_path)))
    assert big_host.device_bytes == 16 * GIB - 14 * GIB - MEMORY_RESERVE_BYTES - 2 * PAYLOAD_BYTES


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(device_memory_bytes=20 * GIB, host_memory_bytes=0), "do not fit"),
        (Settings(device_memory_bytes=9 * GIB, host_memory_bytes=9 * GIB), "do not fit"),
        (Settings(device_memory_bytes=1 * MIB), "--device-memory"),
        (Settings(host_memory_bytes=1 * MIB), "--host-memory"),
        (Settings(payload_bytes=8 * GIB), "no memory is left"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(
    tmp_path: Path, settings: Settings, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        budgets(settings, Telemetry(machine(tmp_path)))


def test_sizes_are_shown_for_people() -> None:
    assert [show_bytes(n) for n in (12, 2048, 3 * MIB, int(1.5 * GIB))] == [
        "12 B",
        "2.0 KiB",
        "3.0 MiB",
        "1.5 GiB",
    ]
