"""A Ray cluster of two nodes on this machine, on loopback, to try `teacher-service submit` and to break things.

    python deploy/local/cluster.py

Each node has a raylet of its own, so that one can be lost and another join. It prints what to put into another shell's
environment, then takes commands, one a line: `add` (a node joins), `kill` (the raylet of the node that joined last is killed
with SIGKILL), end of file or Ctrl-C (all processes end). Actors inherit this process's environment, the credentials of the
object store included.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

# Ray binds all interfaces otherwise.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Whoever shares the machine cannot join without the token.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Jobs are started by `python`: this one, which has the package, whatever else lies on PATH.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

from ray.cluster_utils import Cluster

_OBJECT_STORE_BYTES = 80 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Ray cluster of two nodes on loopback.")
    parser.add_argument("--nodes", type=int, default=2, help="including the head")
    parser.add_argument("--cpus", type=int, default=2, help="of each node; may be more than there are")
    parser.add_argument("--head-cpus", type=int, help="of the head, where the driver runs; default: as the others")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="of the Jobs API")
    parser.add_argument("--json", action="store_true", help="answer with JSON lines, for programs")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    node = {"num_cpus": arguments.cpus, "object_store_memory": _OBJECT_STORE_BYTES, "dashboard_agent_listen_port": 0}
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": arguments.dashboard_port}
    head = {**node, **dashboard, "num_cpus": arguments.cpus if arguments.head_cpus is None else arguments.head_cpus}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    # In the order in which they joined; Ray keeps a set.
    nodes = [cluster.head_node]
    try:
        nodes += [cluster.add_node(**node) for _ in range(arguments.nodes - 1)]
        environment = {
            "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"],
            "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"],
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{arguments.dashboard_port}",
        }
        shell = "\n".join(f"export {name}={value}" for name, value in environment.items())
        session = cluster.head_node.get_session_dir_path()
        facts = {"gcs": cluster.address, "session": session, "nodes": _raylets(nodes)}
        facts["metrics"] = [f"http://127.0.0.1:{node.metrics_export_port}/metrics" for node in nodes]
        notes = f"# logs: {session}/logs; metrics: {', '.join(facts['metrics'])}; raylets {facts['nodes']}"
        _say(arguments.json, f"{shell}\n{notes}", facts)
        for line in sys.stdin:
            if line.strip() == "add":
                nodes.append(cluster.add_node(**node))
            elif line.strip() == "kill" and len(nodes) > 1:
                _lose(cluster, nodes.pop())
            pids = _raylets(nodes)
            _say(arguments.json, f"{len(pids)} nodes, raylets {pids}", {"nodes": pids})
    except KeyboardInterrupt:
        print("ending the cluster", file=sys.stderr)
    finally:
        cluster.shutdown()


def _raylets(nodes: list[Any]) -> list[int]:
    return [node.all_processes["raylet"][0].process.pid for node in nodes]


def _lose(cluster: Cluster, node: Any) -> None:
    """As when a machine is switched off: the raylet first, then what is left of the node."""
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


def _say(as_json: bool, text: str, facts: dict[str, Any]) -> None:
    print(json.dumps(facts) if as_json else text, flush=True)


if __name__ == "__main__":
    main()
