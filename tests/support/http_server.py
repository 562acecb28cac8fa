"""A folder behind an HTTP server on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


class DistantHandler(QuietHandler):
    """Takes a while for each file, and counts how many it is asked for at once."""

    lock = threading.Lock()
    num_now = most_at_once = 0

    def do_GET(self) -> None:
        with self.lock:
            type(self).num_now += 1
            type(self).most_at_once = max(self.num_now, self.most_at_once)
        time.sleep(0.05)
        # Before it answers: whoever has the answer may ask for the next one while this thread still counts.
        with self.lock:
            type(self).num_now -= 1
        super().do_GET()


@contextmanager
def serving(folder: Path, handler: type[SimpleHTTPRequestHandler] = QuietHandler) -> Iterator[str]:
    """The URL of ``folder``."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http_server.server_address[1]}"
        finally:
            http_server.shutdown()
            thread.join()
