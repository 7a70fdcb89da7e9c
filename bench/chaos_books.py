"""The books of a server after a kill phase: reads from disk, descriptors, blocks and chunks.

What the server says of itself is held against what the kernel says of its processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from overcommit.bench import processes, snapshot
from overcommit.bench.processes import Io
from overcommit.bench.report import Report
from overcommit.bench.server import Server
from overcommit.bench.snapshot import Snapshot
from overcommit.runtime.config import MIB, READ_BYTES

# Read calls of the mover that are not weights: image headers, doorbells.
OTHER_READS_BYTES: Final = 1 * MIB
SETTLE_LIMIT_S: Final = 20.0


@dataclass(slots=True, frozen=True)
class Books:
    """What the kernel says, at one instant."""

    descriptors: dict[str, dict[str, int]]  # by process
    mover_pid: int
    mover_io: Io | None

    @classmethod
    def read(cls, server: Server) -> Books:
        """Read /proc for the processes that no phase kills."""
        rows = server.status()["processes"]
        seats = {(row["kind"], row["seat"]): row["pid"] for row in rows}
        pids = {"supervisor": server.pid, "mover": seats["mover", 0]}
        pids["front end 0"] = seats["front_end", 0]
        for row in server.family():
            if "fork_server" in processes.command(row.pid) and row.parent == server.pid:
                pids["fork server"] = row.pid
        found = {name: processes.descriptors(pid) for name, pid in pids.items()}
        # Its connections come and go with the clients.
        found["front end 0"] = {k: n for k, n in found["front end 0"].items() if k != "socket"}
        return cls(found, pids["mover"], processes.read_io(pids["mover"]))


def check_descriptors(report: Report, server: Server, before: Books) -> None:
    """Every process that lived through has as many descriptors of each kind as before."""
    last: dict[str, str] = {}

    def is_back() -> bool:
        now = Books.read(server).descriptors
        for name in before.descriptors:
            last[name] = processes.difference(before.descriptors[name], now.get(name, {}))
        return not any(last.values())

    processes.wait_for(is_back, SETTLE_LIMIT_S)
    for name, text in last.items():
        count = sum(before.descriptors[name].values())
        report.expect(f"books: descriptors of the {name} are back", not text, text or f"{count}")


def check_reads(
    report: Report, server: Server, before: Books, start: Snapshot, end: Snapshot
) -> None:
    """What was read from disk is what the loads needed."""
    loads = end.total("loads_from_disk") - start.total("loads_from_disk")
    largest = max(row["bytes"] for row in end.models.values())
    counted = end.total("bytes_read") - start.total("bytes_read")
    report.expect(
        "kill: bytes read are explained by loads",
        counted <= loads * (largest + READ_BYTES),
        f"{counted:,} bytes, {loads} loads of at most {largest:,}",
    )
    read = _mover_read(server, before)
    if read is None:
        report.notes.append("/proc does not tell what the mover reads")
        return
    # A load that the kills made the server give up and repeat would be read and not counted.
    report.expect(
        "kill: the kernel saw no more reads than the loads needed",
        read <= loads * (largest + READ_BYTES) + OTHER_READS_BYTES,
        f"{read:,} bytes, {loads} loads",
    )


def check_no_reads(
    report: Report, server: Server, before: Books, start: Snapshot, end: Snapshot
) -> None:
    """Everything was resident, so the kills cost no read at all."""
    loads = end.total("loads_from_disk") - start.total("loads_from_disk")
    counted = end.total("bytes_read") - start.total("bytes_read")
    report.expect(
        "resident: killed workers cost no load from disk",
        loads == 0 == counted,
        f"{loads} loads, {counted:,} bytes",
    )
    read = _mover_read(server, before)
    if read is not None:
        report.expect(
            "resident: the kernel saw the mover read no weights",
            read < OTHER_READS_BYTES,
            f"{read:,} bytes",
        )
    evictions = end.total("evictions_device") - start.total("evictions_device")
    report.expect("resident: nothing was evicted", evictions == 0, f"{evictions}")


def _mover_read(server: Server, before: Books) -> int | None:
    now = Books.read(server)
    if now.mover_io is None or before.mover_io is None or now.mover_pid != before.mover_pid:
        return None
    return max(
        now.mover_io.call_bytes - before.mover_io.call_bytes,
        now.mover_io.device_bytes - before.mover_io.device_bytes,
    )


def check_tiers(report: Report, server: Server, names: Sequence[str]) -> None:
    """Blocks are free, the tiers hold what the models take, and unloading frees everything."""
    quiet = snapshot.settle(server)
    report.expect(
        "books: nothing in flight, every block free", not quiet.unquiet(), quiet.unquiet()
    )
    late = sum(row["late_completions"] for row in quiet.status["front_ends"])
    if late:
        report.notes.append(f"{late} completions came for requests that had ended (allowed)")
    for tier in ("device", "host"):
        used, saved = quiet.status[tier]["used"], quiet.status[tier]["saved"]
        held = sum(row[f"{tier}_bytes"] for row in quiet.models.values())
        report.expect(
            f"books: {tier.upper()} holds what its models take",
            used + saved == held,
            f"{used:,} used, {saved:,} saved by sharing, {held:,} held",
        )
    for name in names:
        server.request("POST", f"/v2/repository/models/{name}/unload", b"{}")
    emptied = snapshot.settle(
        server, also=lambda s: not s.status["device"]["used"] and not s.status["host"]["used"]
    )
    for tier in ("device", "host"):
        used = emptied.status[tier]["used"]
        report.expect(f"books: unloading everything empties {tier.upper()}", not used, f"{used:,}")
    for name in names:
        server.request("POST", f"/v2/repository/models/{name}/load", b"{}")
    server.wait_packed(names)
