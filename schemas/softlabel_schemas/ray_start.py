"""What must hold before Ray is imported and joined. Ray itself is not imported here; import this module before ``ray``.

Local Ray: loopback only (without this GCS, raylet and metrics listen on all interfaces, unauthenticated), and no usage
reports. A cluster's own settings win.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from softlabel_schemas.errors import InputError

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray warns about a coming change of this default, which nothing here depends on.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

LOCAL = "local"
_CONNECT_SECONDS = 10.0
_JOIN_SECONDS = 120.0
# What tasks and actors return is a few bytes; Ray's default would take a third of the machine's memory.
_OBJECT_STORE_BYTES = 100 << 20


@contextmanager
def joining(address: str | None) -> Iterator[dict[str, Any]]:
    """Around ``ray.init``: yields its arguments. Ends the process if it takes two minutes: Ray blocks in native code, which no
    exception reaches.

    Args:
        address: None starts Ray on this machine, or joins the cluster that submitted the job.

    Raises:
        InputError: nothing answers there, or Ray raised; most of what it raises here is of no type of its own.
    """
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    _check_answers(address)
    on_terminate = signal.getsignal(signal.SIGTERM)

    def end() -> None:
        message = f"error: joining the Ray cluster at {address} took more than {_JOIN_SECONDS:g} s"
        print(message, file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(_JOIN_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield options
    except Exception as error:
        what, hint = (
            ("started on this machine", "if this machine is busy or short of memory, try again when it is not")
            if address == LOCAL
            else (
                f"joined at {address}",
                "the address is HOST:PORT; a cluster with token authentication needs RAY_AUTH_MODE and RAY_AUTH_TOKEN",
            )
        )
        raise InputError(f"Ray cannot be {what}: {error} ({hint})") from error
    finally:
        timer.cancel()
    if on_terminate is not None and threading.current_thread() is threading.main_thread():
        # Ray has put its own handler in place of the command's: one that aborts.
        signal.signal(signal.SIGTERM, on_terminate)


def _check_answers(address: str) -> None:
    """Raises InputError where nothing listens at HOST:PORT; Ray itself would wait for many minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(f"no Ray cluster answers at {address}: {error}") from None
