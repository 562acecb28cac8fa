"""What must hold before Ray is imported and joined. Ray itself is not imported here; import this module before ``ray``.

Local Ray: loopback only (without this GCS, raylet and metrics listen on all interfaces, unauthenticated), and no usage
reports. A cluster's own settings win.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from softlabel_schemas.errors import InputError

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray warns about a coming change of this default, which nothing here depends on.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

_CONNECT_SECONDS = 10.0
_JOIN_SECONDS = 120.0


def check_answers(address: str) -> None:
    """Raises InputError where nothing listens at HOST:PORT; Ray itself would wait for many minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(f"no Ray cluster answers at {address}: {error}") from None


@contextmanager
def join_limit(address: str) -> Iterator[None]:
    """End the process if joining takes two minutes: Ray blocks in native code, which no exception reaches.

    Raises:
        InputError: Ray's own processes did not start in time, for which Ray has no exception of its own.
    """

    def end() -> None:
        message = f"error: joining the Ray cluster at {address} took more than {_JOIN_SECONDS:g} s"
        print(message, file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(_JOIN_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise InputError(
            f"Ray did not start ({address}): {error} If this machine is busy or short of memory, try again when it is not"
        ) from None
    finally:
        timer.cancel()
