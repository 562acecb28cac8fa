"""Commands that tests start; processes and their sockets, from Linux' /proc."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# For what never ends: on a busy machine all takes several times as long as on an idle one.
LIMIT_SECONDS = 600.0
# Commands save what they have and end Ray on SIGTERM.
_END_SECONDS = 60.0
_LISTEN = "0A"


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, and what it wrote to those of stdout and stderr that are pipes; one that does not end in time is ended, and
    the error says what it wrote."""
    try:
        stdout, stderr = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        end(process)
        raise
    return process.returncode, stdout or "", stderr or ""


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """While ``process`` runs; where that fails it is ended, lest it takes room from the tests that follow."""
    deadline = time.monotonic() + LIMIT_SECONDS
    try:
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"waited {LIMIT_SECONDS:g} s"
            time.sleep(0.1)
    except BaseException:
        end(process)
        raise


def end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def descendants(pid: int) -> set[int]:
    """``pid`` and all processes below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in brackets may contain anything.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, pending = set(), [pid]
    while pending:
        current = pending.pop()
        found.add(current)
        pending += children.get(current, [])
    return found


def title(pid: int) -> str:
    """The command line, as the process itself may have changed it; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def resident_bytes(pid: int) -> int:
    """Memory that the process has to itself, without pages it shares (Ray's object store, libraries); 0 where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in fields if line.startswith("Private_"))


def gone(pid: int) -> bool:
    """Within a minute: taking an interpreter with torch and numba down is a second of work, and longer beside other tests."""
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def listening_addresses(pids: set[int]) -> set[str]:
    """Addresses, in hexadecimal as the kernel gives them, that these processes accept TCP connections on."""
    inodes = {link for pid in pids for link in _socket_links(pid)}
    addresses = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in inodes:
                    addresses.add(fields[1].partition(":")[0])
    return addresses


def _socket_links(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(descriptor.readlink())
