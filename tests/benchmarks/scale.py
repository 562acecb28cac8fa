"""What a million hours cost, 3.6e11 frames in 25,000 shards: planning, opening, resuming, publishing, requests, growth.

    python -m tests.benchmarks.scale [--json]        # about 20 minutes, 1 GB of disk; needs Ceph's radosgw
    python -m tests.benchmarks.scale --only planning

Each figure's note says whether it is real or extrapolated. Every step runs in a process of its own; its baseline is the least
that it must do.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import scale_epoch, scale_planning, scale_shards, scale_workers
from tests.benchmarks.command_line import benchmark_parser, print_figures
from tests.benchmarks.figures import Figure
from tests.support.rgw import serve

PARTS = ("planning", "shards", "epoch", "workers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of the curves; ``repeats`` are at the largest.

    Attributes:
        rows, labelled_rows: utterances without and with hard labels.
        cut_rows: utterances whose durations are cut into shards.
        epoch_shards: of the small real dataset that epochs are read from.
        ordered_rows: utterances that a student puts into order.
    """

    rows: tuple[int, ...] = (10_000, 100_000, 1_000_000, 5_000_000)
    labelled_rows: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    cut_rows: int = scale_planning.NUM_UTTERANCES
    row_groups: tuple[int, ...] = (1_000, 4_000, 16_000)
    shards: tuple[int, ...] = (1_000, 5_000, 25_000)
    workers: tuple[int, ...] = (10, 100, 1_000)
    epoch_shards: int = 16
    ordered_rows: tuple[int, ...] = (10_000, 100_000, 1_000_000, 5_000_000)
    repeats: int = 3


def figures(sizes: Sizes | None = None, parts: Collection[str] = PARTS) -> list[Figure]:
    """Raises RuntimeError where the S3 server is not installed, and where a step fails."""
    sizes = sizes or Sizes()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-")))
        server = functools.cache(lambda: stack.enter_context(serve(folder / "rgw")))
        run: dict[str, Callable[[], list[Figure]]] = {
            "planning": lambda: [
                *scale_planning.figures(folder, sizes.rows, sizes.labelled_rows, sizes.repeats),
                scale_planning.footer(folder, sizes.row_groups),
                scale_planning.cut(sizes.cut_rows),
            ],
            "shards": lambda: scale_shards.figures(folder, server(), sizes.shards, sizes.repeats),
            "epoch": lambda: [
                *scale_epoch.figures(server(), sizes.epoch_shards),
                scale_epoch.order_of_epoch(sizes.ordered_rows),
            ],
            "workers": lambda: scale_workers.figures(folder / "workers", sizes.workers),
        }
        found: list[Figure] = []
        for part in parts:
            print(f"scale: {part}", file=sys.stderr, flush=True)
            found += run[part]()
        return found


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    print_figures(figures(parts=options.only), as_json=options.json)


if __name__ == "__main__":
    main()
