"""A page of results from ``sweep.json`` files alone: Markdown, with figures as SVG files beside it.

::

    sweep.json, ... --> NAME.json, NAME.introduction.md   all records and what precedes them: the page is made from these again
                    --> NAME.md, NAME-1.svg, NAME-1-bytes.svg, ...   sections and figures, for each sweep
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from softlabel_schemas.errors import InputError
from student_trainer.compare import UNKNOWN, format_p, signed
from student_trainer.metric_names import COLUMNS, METRICS, Metric, error_name, unit_name
from student_trainer.report import write
from student_trainer.results_arms import ArmRecords, arms_of, shares_of_gain, spread_of_difference
from student_trainer.results_figure import bytes_figure, error_figure
from student_trainer.spread import format_spread
from student_trainer.sweep_records import DifferenceRecord, GainRecord, SweepRecords, load_records, records_json


def write_results(
    files: Sequence[str | Path], output: str | Path, *, introduction: str | Path | None = None
) -> list[Path]:
    """Write the page and what belongs to it; returns what was written.

    Args:
        introduction: Markdown, which stands below the title; a copy is written beside the page.

    Raises:
        InputError: a file is missing or bad, or would be overwritten by other records.
    """
    page = Path(output)
    records = page.with_suffix(".json")
    if page == records:
        raise InputError(
            f"{output} is to be a page of Markdown, its records lie in a .json beside it; give a name in .md"
        )
    if introduction is not None and Path(introduction).resolve() == page.resolve():
        raise InputError(f"{output} is the introduction, which the page would overwrite; give the page another name")
    found = {file: load_records(file) for file in files}
    sweeps = [sweep for file in files for sweep in found[file]]
    for file, own in found.items():
        if list(own) != sweeps and records.exists() and records.samefile(file):
            raise InputError(
                f"{file} would be overwritten by the records of all {len(files)} files, which lie beside the page {output}; "
                "give the page another name"
            )
    texts = {records: records_json(sweeps)}
    opening = [_HOW_TO_READ]
    sources, options = f"`{page.stem}.json`", ""
    if introduction is not None:
        copy = page.with_name(f"{page.stem}.introduction.md")
        texts[copy] = _read(introduction)
        opening = [texts[copy].strip() + "\n", *opening]
        sources, options = f"{sources} and `{copy.name}`", f"--introduction {copy.name} "
    sections = []
    for number, sweep in enumerate(sweeps, start=1):
        name = f"{page.stem}-{number}"
        figures = {f"{name}.svg": error_figure(sweep, salt=name)}
        against_bytes = bytes_figure(sweep, salt=f"{name}-bytes")
        if against_bytes is not None:
            figures[f"{name}-bytes.svg"] = against_bytes
        texts |= {page.with_name(figure): svg for figure, svg in figures.items()}
        sections.append(_section(sweep, list(figures)))
    made_by = f"student-trainer results {page.stem}.json {options}--output {page.name}"
    head = f"# {page.stem}\n\nMade from {sources} by `{made_by}`; do not edit.\n"
    texts[page] = "\n".join([head, *opening, *sections])
    for path, text in texts.items():
        write(str(path), text)
    return list(texts)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; --introduction takes a Markdown file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None


_HOW_TO_READ = """\
Mean ± standard deviation over seeds. A difference is that of the mean error rates of two arms over the same utterances, in
points, and in percent of the second arm's rate (relative). Its interval (95%) and p-value are from a paired bootstrap over
utterances: they say what other utterances would show, with the seeds as they are. What other seeds would show is said by ±, the
standard deviation of the difference over seeds, and by "seeds", in how many of them the first arm has the lower error; of what
is kept of a gain, by the smallest and the largest share of any seed. Bytes per frame are those of the soft labels that the arm
uses, encoded as the dataset is.
"""


def _section(sweep: SweepRecords, figures: Sequence[str]) -> str:
    arms = arms_of(sweep)
    metrics = [metric for metric in METRICS if any(metric in arm.values for arm in arms)]
    errors = error_name(sweep.leading)
    alt_texts = (f"{errors.capitalize()} of each arm", f"{errors.capitalize()} against bytes per frame")
    lines = [
        f"## {sweep.title}",
        "",
        f"{sweep.num_utterances:,} utterances of {', '.join(sweep.splits)}, {sweep.num_counted:,} {sweep.counted}; corpus "
        f"`{sweep.corpus_digest[:12]}`, classes `{sweep.inventory_digest[:12]}`.",
        "",
        *_table(
            ["arm", "labels", "seeds", "parameters", "bytes/frame", *(COLUMNS[metric] for metric in metrics)],
            [_row(arm, metrics) for arm in arms],
        ),
        "",
        *(f"![{alt}]({figure})\n" for alt, figure in zip(alt_texts, figures, strict=False)),
    ]
    by_name = {arm.name: arm for arm in arms}
    if sweep.differences:
        header = ["arm", "against", "errors", "difference", "relative", "95% interval", "p", "seeds"]
        lines += [*_table(header, [_difference_row(found, by_name) for found in sweep.differences]), ""]
    if sweep.gains:
        lines += [*_gains(sweep.gains, by_name, sweep.leading), ""]
    return "\n".join(lines)


def _row(arm: ArmRecords, metrics: Sequence[Metric]) -> list[str]:
    first = arm.first
    return [
        arm.name,
        first.labels or "teacher ensemble",
        str(arm.num_seeds or UNKNOWN),
        UNKNOWN if first.num_parameters is None else f"{first.num_parameters:,}",
        _size(arm),
        *(_spread(arm, metric) for metric in metrics),
    ]


def _spread(arm: ArmRecords, metric: Metric) -> str:
    return format_spread(arm.spread(metric), metric) if metric in arm.values else UNKNOWN


def _difference_row(found: DifferenceRecord, arms: Mapping[str, ArmRecords]) -> list[str]:
    against = arms[found.against]
    spread = spread_of_difference(arms[found.arm], against, found.metric)
    return [
        found.arm,
        found.against,
        unit_name(found.metric),
        signed(found.difference) + ("" if spread is None else f" ± {spread:.2f}"),
        _relative(found, against),
        f"{signed(found.low)} to {signed(found.high)}",
        format_p(found.p_value),
        f"{found.better_seeds}/{found.num_seeds}",
    ]


def _relative(found: DifferenceRecord, against: ArmRecords) -> str:
    """Unknown where words were not decoded for every arm, and in percent of nothing."""
    mean = against.spread(found.metric).mean if found.metric in against.values else 0
    return f"{signed(100 * found.difference / mean)}%" if mean else UNKNOWN


def _gains(gains: Sequence[GainRecord], arms: Mapping[str, ArmRecords], metric: Metric) -> list[str]:
    """Of one baseline and reference."""
    baseline, reference = arms[gains[0].baseline], arms[gains[0].reference]
    points = baseline.spread(metric).mean - reference.spread(metric).mean
    gained = f"the gain of {reference.name} over {baseline.name} in {error_name(metric)}"
    said = f"What is kept of {gained}, {signed(points)} points"
    if any(found.low is None for found in gains):
        said += " (its interval holds zero or is below it: the shares have none, and mean little)"
    shares = (shares_of_gain(arms[found.arm], baseline, reference, metric) for found in gains)
    rows = [
        [found.arm, _size(arms[found.arm]), *_kept(found), _range(of_seeds)]
        for found, of_seeds in zip(gains, shares, strict=True)
    ]
    return [f"{said}:", "", *_table(["arm", "bytes/frame", "gain kept %", "95% interval", "of any seed"], rows)]


def _kept(found: GainRecord) -> tuple[str, str]:
    interval = UNKNOWN if found.low is None or found.high is None else f"{found.low:.1f} to {found.high:.1f}"
    return UNKNOWN if found.kept is None else f"{found.kept:.1f}", interval.replace("-", "−")


def _range(shares: Sequence[float]) -> str:
    return f"{min(shares):.0f} to {max(shares):.0f}".replace("-", "−") if shares else UNKNOWN


def _size(arm: ArmRecords) -> str:
    size = arm.first.labels_bytes_per_frame
    return UNKNOWN if size is None else f"{size:.1f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in cells]
