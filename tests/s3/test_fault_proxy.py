"""Each fault is what it claims to be: seen by a plain HTTP client in front of a plain HTTP server."""

from __future__ import annotations

import http.client
import http.server
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.support.fault_proxy import RANDOM_FAULTS, Fault, FaultProxy

BODY = bytes(range(200))


class Upstream(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Upstream

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY) if self.command != "PUT" else 0))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(BODY)

    do_GET = do_PUT = do_HEAD = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    proxy: FaultProxy, method: str = "GET", target: str = "/bucket/key", body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=60)
    try:
        connection.request(method, target, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_requests_pass_unchanged(upstream: Upstream) -> None:
    target = "/bucket/a%2Fb%20c//d?list-type=2&prefix=%C3%BC&empty="
    with FaultProxy(upstream.endpoint) as proxy:
        assert ask(proxy, "PUT", target, b"data", Authorization="signature", Host="s3.example") == (200, b"")
        assert ask(proxy, "HEAD") == (200, b"")
        assert ask(proxy) == (200, BODY)
        assert (proxy.counts(), proxy.num_requests) == ({}, 3)
    method, path, headers, body = upstream.seen[0]
    assert (method, path, body) == ("PUT", target, b"data")
    assert (headers["Authorization"], headers["Host"]) == ("signature", "s3.example")


@pytest.mark.parametrize(("fault", "status"), [(Fault.ERROR_500, 500), (Fault.SLOW_DOWN, 503)])
def test_errors_are_answered_without_asking_the_server(upstream: Upstream, fault: Fault, status: int) -> None:
    with FaultProxy(upstream.endpoint) as proxy:
        proxy.rule(fault, times=2)
        assert ask(proxy)[0] == status
        assert ask(proxy, "HEAD") == (status, b"")
        assert ask(proxy) == (200, BODY)
        assert proxy.counts() == {fault: 2}
    assert len(upstream.seen) == 1


@pytest.mark.parametrize(("fault", "num_seen"), [(Fault.RESET, 0), (Fault.LOST_RESPONSE, 1)])
def test_a_reset_comes_before_and_a_lost_response_after(upstream: Upstream, fault: Fault, num_seen: int) -> None:
    with FaultProxy(upstream.endpoint) as proxy:
        proxy.rule(fault, method="PUT")
        with pytest.raises(ConnectionResetError):
            ask(proxy, "PUT", body=b"data")
        assert proxy.counts() == {fault: 1}
    assert len(upstream.seen) == num_seen


def test_a_truncated_body_has_its_whole_length_and_half_its_bytes(upstream: Upstream) -> None:
    with FaultProxy(upstream.endpoint) as proxy:
        proxy.rule(Fault.TRUNCATED_BODY)
        with pytest.raises(http.client.IncompleteRead) as caught:
            ask(proxy)
        assert caught.value.partial == BODY[:100]
        assert caught.value.expected == 100


def test_a_slow_body_is_whole(upstream: Upstream) -> None:
    with FaultProxy(upstream.endpoint) as proxy:
        proxy.rule(Fault.SLOW_BODY)
        assert ask(proxy) == (200, BODY)
        assert ask(proxy, "PUT") == (200, b"")
        # Nothing to be slow with in the second.
        assert proxy.counts() == {Fault.SLOW_BODY: 1}


def test_a_hang_lasts_until_the_client_gives_up(upstream: Upstream) -> None:
    with FaultProxy(upstream.endpoint) as proxy:
        proxy.rule(Fault.HANG, times=1)
        connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=0.3)
        connection.request("GET", "/")
        with pytest.raises(TimeoutError):
            connection.getresponse()
        connection.close()
        assert ask(proxy) == (200, BODY)
        assert proxy.counts() == {Fault.HANG: 1}
    assert len(upstream.seen) == 1


def test_rules_choose_by_method_and_path(upstream: Upstream) -> None:
    with FaultProxy(upstream.endpoint) as proxy:
        rule = proxy.rule(Fault.ERROR_500, method="PUT", path=r"commits/\d+", times=1)
        for method, target in (("GET", "/b/commits/1"), ("PUT", "/b/shards/1")):
            assert ask(proxy, method, target)[0] == 200
        assert ask(proxy, "PUT", "/b/commits/1")[0] == 500
        assert rule.applied == 1
        assert ask(proxy, "PUT", "/b/commits/1")[0] == 200
        proxy.rule(Fault.ERROR_501, method="PUT")
        assert ask(proxy, "PUT")[0] == 200
        assert ask(proxy, "PUT", **{"If-None-Match": "*"})[0] == 501
        proxy.clear_rules()
        assert ask(proxy, "PUT", **{"If-None-Match": "*"})[0] == 200


def test_a_share_of_requests_fails_and_the_seed_chooses(upstream: Upstream) -> None:
    def outcomes(seed: int) -> list[object]:
        found: list[object] = []
        with FaultProxy(upstream.endpoint, share=0.5, seed=seed) as proxy:
            for _ in range(40):
                try:
                    found.append(ask(proxy))
                except (ConnectionError, http.client.HTTPException) as error:
                    found.append(type(error))
            counts = proxy.counts()
            assert counts.keys() == set(RANDOM_FAULTS)
            assert 10 < sum(counts.values()) < 30
        return found

    assert outcomes(1) == outcomes(1)
    assert outcomes(1) != outcomes(2)


def test_a_server_that_is_down_resets(upstream: Upstream) -> None:
    with FaultProxy("http://127.0.0.1:1") as proxy, pytest.raises(ConnectionResetError):
        ask(proxy)
