"""A page of results from ``sweep.json`` files alone: Markdown, with figures as SVG files beside it.

::

    sweep.json, ... --> NAME.md, NAME-1.svg, ... (a figure for each sweep), NAME.json (all records, to make the page again)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from student_trainer.arms import METRICS, Metric
from student_trainer.compare import COLUMNS, DIGITS, UNKNOWN, signed
from student_trainer.report import write
from student_trainer.results_arms import ArmRecords, arms_of
from student_trainer.results_figure import error_figure
from student_trainer.sweep_records import DifferenceRecord, SweepRecords, load_records, records_json


def write_results(files: Sequence[str | Path], output: str | Path) -> list[Path]:
    """Write the page and what belongs to it; returns what was written. Raises InputError for a bad file."""
    sweeps = [sweep for file in files for sweep in load_records(file)]
    page = Path(output)
    texts = {page.with_suffix(".json"): records_json(sweeps)}
    sections = []
    for number, sweep in enumerate(sweeps, start=1):
        figure = page.with_name(f"{page.stem}-{number}.svg")
        texts[figure] = error_figure(sweep, salt=figure.stem)
        sections.append(_section(sweep, figure.name))
    made_by = f"student-trainer results {page.stem}.json --output {page.name}"
    head = f"# {page.stem}\n\nMade from `{page.stem}.json` by `{made_by}`; do not edit.\n"
    texts[page] = "\n".join([head, _HOW_TO_READ, *sections])
    for path, text in texts.items():
        write(str(path), text)
    return list(texts)


_HOW_TO_READ = """\
Mean ± standard deviation over seeds. A difference is that of the mean error rates of two arms over the same utterances, in
points; its interval (95%) and p-value are from a paired bootstrap over utterances, and "seeds" says in how many of them the
first arm has the lower error. Bytes per frame are those of the soft labels that the arm uses, encoded as the dataset is.
"""


def _section(sweep: SweepRecords, figure: str) -> str:
    arms = arms_of(sweep)
    metrics = [metric for metric in METRICS if any(metric in arm.values for arm in arms)]
    lines = [
        f"## {sweep.title}",
        "",
        f"{sweep.num_utterances:,} utterances of {', '.join(sweep.splits)}, {sweep.num_frames:,} frames; corpus "
        f"`{sweep.corpus_digest[:12]}`, classes `{sweep.inventory_digest[:12]}`.",
        "",
        *_table(
            ["arm", "labels", "seeds", "parameters", "bytes/frame", *(COLUMNS[metric] for metric in metrics)],
            [_row(arm, metrics) for arm in arms],
        ),
        "",
        f"![Frame error of each arm]({figure})",
        "",
    ]
    if sweep.differences:
        header = ["arm", "against", "errors", "difference", "95% interval", "p", "seeds"]
        lines += [*_table(header, [_difference_row(found) for found in sweep.differences]), ""]
    return "\n".join(lines)


def _row(arm: ArmRecords, metrics: Sequence[Metric]) -> list[str]:
    first = arm.first
    return [
        arm.name,
        first.labels or "teacher ensemble",
        str(arm.num_seeds or UNKNOWN),
        UNKNOWN if first.num_parameters is None else f"{first.num_parameters:,}",
        UNKNOWN if first.labels_bytes_per_frame is None else f"{first.labels_bytes_per_frame:.1f}",
        *(_spread(arm, metric) for metric in metrics),
    ]


def _spread(arm: ArmRecords, metric: Metric) -> str:
    if metric not in arm.values:
        return UNKNOWN
    mean, std = arm.spread(metric)
    digits = DIGITS.get(metric, 2)
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"


def _difference_row(found: DifferenceRecord) -> list[str]:
    return [
        found.arm,
        found.against,
        found.metric.removesuffix("_error_rate"),
        signed(found.difference),
        f"{signed(found.low)} to {signed(found.high)}",
        "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}",
        f"{found.better_seeds}/{found.num_seeds}",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in cells]
