"""A real S3 server on loopback for tests: Ceph's RADOS gateway over one monitor and one storage daemon in memory.

    python -m tests.support.rgw FOLDER

runs one in the foreground until Ctrl-C and prints what to paste into another shell. Needs the Debian packages ``radosgw``,
``ceph-mon``, ``ceph-osd`` and ``ceph-common``, and no privileges. Every server has ports, keys and a folder of its own, so
that several can run side by side.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

PROGRAMS = ("setpriv", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool")
PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"
REGION = "us-east-1"
# A start takes 2 s on two idle cores.
_START_LIMIT_SECONDS = 120
_COMMAND_LIMIT_SECONDS = 60

_CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
ms_bind_msgr1 = false
keyring = {folder}/keyring
mon_data = {folder}/mon
osd_data = {folder}/osd
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
run_dir = {folder}
# Unix sockets allow paths of 107 bytes, which test folders exceed.
admin_socket =
pid_file =
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
# A disk that is 95% full otherwise stops the monitor, which keeps a few MB there.
mon_data_avail_crit = 1
mon_data_avail_warn = 1
# By default every change of a map waits a second for others to join it; a start makes a dozen.
paxos_propose_interval = 0.05
auth_allow_insecure_global_id_reclaim = false
[client.rgw]
rgw_data = {folder}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_thread_pool_size = 64
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rgw:
    """A running server and one of its users, who has these keys and owns ``bucket``."""

    endpoint: str
    user: str
    access_key: str
    # Not in the messages of failing tests.
    secret_key: str = field(repr=False)
    bucket: str
    configuration: Path

    def environment(self) -> dict[str, str]:
        """What botocore, and so s3fs, reads from the environment to use this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            # Without it a machine without keys asks the cloud's metadata service first.
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def admin(self, *arguments: str) -> str:
        """Run ``radosgw-admin`` and return its output. Raises RuntimeError with what it said."""
        return _output(["radosgw-admin", "-c", str(self.configuration), "-n", "client.rgw", *arguments])

    def add_keys(self) -> Rgw:
        """The same user with another pair of keys; the old ones stay valid."""
        added = replace(self, access_key=secrets.token_hex(10).upper(), secret_key=secrets.token_hex(20))
        keys = ("--access-key", added.access_key, "--secret-key", added.secret_key)
        self.admin("key", "create", "--uid", self.user, "--key-type", "s3", *keys)
        return added

    def remove_keys(self) -> None:
        self.admin("key", "rm", "--uid", self.user, "--key-type", "s3", "--access-key", self.access_key)

    def add_user(self) -> Rgw:
        """Another user of the same server, with an empty bucket."""
        name = f"labels-{secrets.token_hex(4)}"
        other = replace(self, user=name, bucket=name)
        other.admin("user", "create", "--uid", name, "--display-name", name)
        other = other.add_keys()
        _make_bucket(other)
        return other


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Rgw]:
    """Run a server whose files lie in ``folder``, until the block ends or this thread dies.

    Raises:
        RuntimeError: a program is missing or ended; carries the end of its log.
    """
    if missing := missing_programs():
        raise RuntimeError(f"no {', '.join(missing)} on PATH; as root: apt-get install {PACKAGES}")
    folder.mkdir(parents=True, exist_ok=True)
    mon_port, port = _free_ports(2)
    configuration = folder / "ceph.conf"
    fsid = str(uuid.uuid4())
    configuration.write_text(_CONFIGURATION.format(fsid=fsid, folder=folder, mon_port=mon_port, port=port))
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    daemons = _Daemons(folder, configuration)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        _start_storage(folder, configuration, fsid, mon_port, daemons)
        daemons.start("radosgw", "-n", "client.rgw", "-f")
        daemons.wait_for(endpoint)
        nobody = Rgw(endpoint=endpoint, user="", access_key="", secret_key="", bucket="", configuration=configuration)
        yield nobody.add_user()
    finally:
        daemons.kill()


@contextlib.contextmanager
def s3_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """``os.environ`` with these ``AWS_`` variables and no others, and new S3 file systems; all as before afterwards."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AWS_")}
    os.environ.update(variables)
    _forget_file_systems()
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)
        _forget_file_systems()


def _forget_file_systems() -> None:
    """fsspec keeps file systems, with the endpoint and the keys that they began with."""
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()


def _make_bucket(server: Rgw) -> None:
    # Only here: this module is imported where s3fs, and so botocore, may be missing.
    import botocore.session

    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name=REGION,
    )
    client.create_bucket(Bucket=server.bucket)
    client.close()


def _start_storage(folder: Path, configuration: Path, fsid: str, mon_port: int, daemons: _Daemons) -> None:
    """The keys and the map of the cluster, its monitor, and its one storage daemon."""
    keyring, monmap = str(folder / "keyring"), str(folder / "monmap")
    everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *"]
    _output(["ceph-authtool", keyring, "--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"])
    for name in ("client.admin", "client.rgw", "osd.0"):
        _output(["ceph-authtool", keyring, "--gen-key", "-n", name, *everything])
    address = f"[v2:127.0.0.1:{mon_port}/0]"
    _output(["monmaptool", monmap, "--create", "--fsid", fsid, "--addv", "a", address])
    common = ["-c", str(configuration)]
    _output(["ceph-mon", *common, "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring])
    daemons.start("ceph-mon", "-i", "a", "-f")
    _output(["ceph", *common, "--connect-timeout", str(_COMMAND_LIMIT_SECONDS), "osd", "create"])
    _output(["ceph-osd", *common, "-i", "0", "--mkfs"])
    daemons.start("ceph-osd", "-i", "0", "-f")


class _Daemons:
    """Processes that end with this one, however it ends."""

    def __init__(self, folder: Path, configuration: Path) -> None:
        self._folder = folder
        self._common = ["-c", str(configuration)]
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, program: str, *arguments: str) -> None:
        # The kernel kills the daemon when the thread that starts it dies. A session of its own: Ctrl-C is for the parent, which
        # then ends it.
        command = ["setpriv", "--pdeathsig", "KILL", program, *self._common, *arguments]
        with (self._folder / f"{program}.out").open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._processes.append((program, process))

    def wait_for(self, url: str) -> None:
        deadline = time.monotonic() + _START_LIMIT_SECONDS
        while True:
            for program, process in self._processes:
                if process.poll() is not None:
                    said = (self._folder / f"{program}.out").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{program} ended with {process.returncode}: {said}")
            try:
                with urllib.request.urlopen(url, timeout=_COMMAND_LIMIT_SECONDS):
                    return
            except urllib.error.HTTPError as error:
                error.close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no answer from {url} within {_START_LIMIT_SECONDS} s: {error}") from None
            time.sleep(0.05)

    def kill(self) -> None:
        """Nothing is worth a clean end: the data lie in memory."""
        for _, process in self._processes:
            process.kill()
        for _, process in self._processes:
            process.wait()
        self._processes.clear()


def _output(command: Sequence[str]) -> str:
    """Raises RuntimeError where the command fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMMAND_LIMIT_SECONDS, check=False
    )
    if done.returncode != 0:
        # Never the whole command: it may hold keys.
        raise RuntimeError(f"{' '.join(command[:1])} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _free_ports(count: int) -> list[int]:
    """Ports that are free now. Another program may take one before the daemon does, which then says so and ends."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.support.rgw FOLDER   (FOLDER: new or empty)")
    folder = Path(sys.argv[1]).resolve()
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty; name a new folder")
    # SIGTERM unwinds like Ctrl-C, so that the daemons are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with serve(folder) as server:
        print(f"S3 at {server.endpoint}; write to s3://{server.bucket}/...; Ctrl-C ends it. In another shell:\n")
        variables = server.environment() | {"SOFTLABELS_TEST_BUCKET": server.bucket}
        for name, value in variables.items():
            print(f"export {name}={shlex.quote(value)}")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
