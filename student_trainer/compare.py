"""Compare arms: soft labels against hard labels alone, paired by utterance, and what the labels cost to store.

::

    run folders, evaluations --> Arm --+--> Pair (bootstrap over utterances) --+
    published datasets --------> LabelledData (bytes, kept mass, entropy) -----+--> Comparison -> table, JSON, report.html

All numbers come from files that ``student-trainer train`` and ``student-trainer evaluate`` wrote; no model is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabel_schemas.command_line import progress
from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.describe import description
from softlabel_schemas.errors import InputError
from student_trainer.arms import Arm, load_arms, unlike_settings
from student_trainer.config import TrainConfig
from student_trainer.metric_names import COLUMNS, COUNTS, METRICS, Metric
from student_trainer.result_files import Evaluation
from student_trainer.significance import MIN_UTTERANCES, NUM_RESAMPLES, Difference, difference
from student_trainer.spread import format_spread

UNKNOWN = "–"
NO_PAIRS = "no arm with soft labels has a hard-only arm of the same model to be compared with"
# Of pairs, one by one.
_MOST_WARNINGS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An arm with soft labels against one with hard labels alone and the same model.

    Attributes:
        differences: of frame, token, phone and word errors, of those that both arms have.
        unlike: settings other than the soft labels that differ, with both values.
    """

    soft: Arm
    hard: Arm
    differences: tuple[Difference, ...]
    unlike: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledData:
    """A published dataset: ``facts`` as ``softlabels describe`` gives them, and means over each utterance.

    Attributes:
        frames_N, kept_mass_N, entropy_N: of utterance n; entropy in nats.
    """

    url: str
    facts: dict[str, Any]
    frames_N: npt.NDArray[np.int64]
    kept_mass_N: npt.NDArray[np.float32]
    entropy_N: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]
    datasets: tuple[LabelledData, ...]

    @property
    def evaluation(self) -> Evaluation:
        """Any of them: splits, corpus and utterances are those of all."""
        return self.arms[0].evaluations[0]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that an arm has; word error rate only where every arm has it."""

        def is_shown(metric: Metric) -> bool:
            are_known = [arm.values(metric) is not None for arm in self.arms]
            return all(are_known) if metric == "word_error_rate" else any(are_known)

        return tuple(filter(is_shown, METRICS))

    def bytes_per_frame(self, arm: Arm) -> float | None:
        """What it was trained with takes, as it is stored, all its datasets together; None where one was not given."""
        sizes = {data.facts["content_digest"]: data.facts["bytes_per_frame"] for data in reversed(self.datasets)}
        digests = arm.runs[0].dataset_digests if arm.runs else ()
        return sum(sizes[digest] for digest in digests) if digests and sizes.keys() >= {*digests} else None


def compare(
    runs: Sequence[str],
    evaluations: Sequence[str],
    datasets: Sequence[str],
    splits: Sequence[str],
    configs: Mapping[str, TrainConfig] | None = None,
) -> Comparison:
    """Read everything, refuse what cannot be compared, and test each pair.

    Args:
        configs: see :func:`~student_trainer.arms.load_arms`.

    Raises:
        InputError: see :func:`~student_trainer.arms.load_arms`; or a dataset is not published or labels other classes.
        IntegrityError: a dataset is damaged.
    """
    arms = load_arms(runs, evaluations, splits, configs)
    pairs = [_pair(soft, hard) for soft in arms if soft.is_soft for hard in arms if _same_model(soft, hard)]
    inventory_digest = arms[0].evaluations[0].inventory_digest
    labelled = [_load_dataset(url, inventory_digest) for url in dict.fromkeys(datasets)]
    return Comparison(arms=tuple(arms), pairs=tuple(pairs), datasets=tuple(labelled))


def _same_model(soft: Arm, hard: Arm) -> bool:
    """Architecture, its arguments and its front end: a model that hears something else is another model."""
    if not hard.is_hard_only:
        return False
    of_soft, of_hard = soft.runs[0].config, hard.runs[0].config
    return of_soft.model == of_hard.model and of_soft.front_end == of_hard.front_end


def _pair(soft: Arm, hard: Arm) -> Pair:
    differences = tuple(found for metric in COUNTS if (found := difference(soft, hard, metric)))
    soft_setup, hard_setup = ({**arm.runs[0].setup(), "seeds": arm.seeds} for arm in (soft, hard))
    # Less what makes the two arms what they are.
    apart = ("name", "soft_labels", "dataset_digest")
    unlike = [line for line in unlike_settings(soft_setup, hard_setup) if not line.startswith(apart)]
    return Pair(soft=soft, hard=hard, differences=differences, unlike=tuple(unlike))


def _load_dataset(url: str, inventory_digest: str) -> LabelledData:
    dataset = open_dataset(url)
    found = dataset.manifest.spec.inventory_digest
    if found != inventory_digest:
        raise InputError(
            f"{url} does not label the classes of the runs: its class inventory has digest {found}, "
            f"the evaluations' has {inventory_digest}"
        )
    if not dataset.manifest.num_frames:
        raise InputError(f"{url} holds no labelled frames (every utterance was skipped)")
    frames, kept_mass, entropy = [], [], []
    with progress(f"read {url}", dataset.num_shards, "shards") as advance:
        for done, shard in enumerate(dataset.iter_shards(), start=1):
            frames.append(np.diff(shard.frame_offsets))
            kept_mass.append(shard.kept_mass)
            entropy.append(shard.entropy)
            advance(done)
    return LabelledData(
        url=url,
        facts=description(dataset),
        frames_N=np.concatenate(frames),
        kept_mass_N=np.concatenate(kept_mass),
        entropy_N=np.concatenate(entropy),
    )


def table_columns(comparison: Comparison) -> tuple[str, ...]:
    return ("arm", "seeds", "parameters", *(COLUMNS[metric] for metric in comparison.metrics))


def table_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The cells under ``table_columns``, one row for each arm."""
    return [
        (
            arm.name,
            str(len(arm.runs)) if arm.runs else UNKNOWN,
            f"{arm.runs[0].num_parameters:,}" if arm.runs else UNKNOWN,
            *(_format_spread(arm, metric) for metric in comparison.metrics),
        )
        for arm in comparison.arms
    ]


def _format_spread(arm: Arm, metric: Metric) -> str:
    """``34.10 ± 0.25``; ``34.10 ± –`` for a single seed, ``34.10`` for what was not trained here."""
    spread = arm.spread(metric)
    if spread is None:
        return UNKNOWN
    shown = format_spread(spread, metric)
    return f"{shown} ± {UNKNOWN}" if arm.runs and spread.std is None else shown


def format_p(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def verdict(pair: Pair, found: Difference) -> str:
    """What a pair shows, in words: no clear difference where the interval holds zero, or p is not below 0.05, which it never is
    where few utterances differ."""
    if found.low <= 0 <= found.high or found.p_value >= 0.05:
        return f"{pair.soft.name}: no clear difference from {pair.hard.name} in {found.unit} errors"
    what = "fewer" if found.points < 0 else "more"
    return f"{pair.soft.name}: {abs(found.points):.2f} points {what} {found.unit} errors than {pair.hard.name}"


def signed(points: float) -> str:
    """Two decimals with a sign, a true minus."""
    return f"{points:+.2f}".replace("-", "−")


def warning(pair: Pair) -> str | None:
    """What else than the soft labels could explain the difference."""
    if not pair.unlike:
        return None
    return f"{pair.soft.name} and {pair.hard.name} were not trained alike: {'; '.join(pair.unlike)}"


def _unequal(pairs: Sequence[Pair]) -> list[str]:
    """The pairs that were not trained alike; many of them by what differs, with one pair as an example."""
    lines = [line for line in map(warning, pairs) if line]
    if len(lines) <= _MOST_WARNINGS:
        return lines
    example: dict[str, tuple[Pair, str]] = {}
    counts: Counter[str] = Counter()
    for pair in pairs:
        for line in pair.unlike:
            setting, _, values = line.partition(": ")
            example.setdefault(setting, (pair, values))
            counts[setting] += 1
    return [
        f"{counts[setting]} of {len(pairs)} pairs were not trained alike in {setting}, "
        f"as {pair.soft.name} and {pair.hard.name}: {values}"
        for setting, (pair, values) in example.items()
    ]


def warnings(comparison: Comparison) -> list[str]:
    """What a reader must know before believing the numbers."""
    lines, splits = _unequal(comparison.pairs), set(comparison.evaluation.splits)
    for arm in comparison.arms:
        # Seeds of an arm are trained on the same speech.
        both = sorted({split for run in arm.runs[:1] for split in run.config.corpus.train_splits} & splits)
        if both:
            lines.append(
                f"{arm.name} was trained on split {', '.join(both)}, on which it is evaluated here: its errors there say "
                "nothing about other speech"
            )
    without_words = [arm.name for arm in comparison.arms if arm.values("word_error_rate") is None]
    if 0 < len(without_words) < len(comparison.arms):
        lines.append(
            f"word error rates are not shown: {', '.join(without_words)} evaluated without words (evaluate --graph)"
        )
    for arm in comparison.arms:
        num_left_out = max(len(evaluation.left_out) for evaluation in arm.evaluations)
        if num_left_out:
            total = len(comparison.evaluation.utterances)
            lines.append(
                f"{arm.name} was evaluated without {num_left_out} of {total} utterances, which were never labelled"
            )
    num_utterances = len(comparison.evaluation.utterances)
    if num_utterances < MIN_UTTERANCES:
        lines.append(
            f"intervals of so few utterances ({num_utterances}) are too narrow, and say little; evaluate on "
            f"{MIN_UTTERANCES} or more"
        )
    return lines


def text(comparison: Comparison) -> str:
    """What ``student-trainer compare`` prints."""
    marked = [
        (f"{row[0]} *" if arm.kind == "ensemble" else row[0], *row[1:])
        for arm, row in zip(comparison.arms, table_rows(comparison), strict=True)
    ]
    rows = [table_columns(comparison), *marked]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]  # fmt: skip
    if any(arm.kind == "ensemble" for arm in comparison.arms):
        lines.append("* teacher ensemble, from its stored soft labels")
    lines.append("")
    verdicts = [f"{verdict(pair, found)} ({_test(found)})" for pair in comparison.pairs for found in pair.differences]
    lines += verdicts or [NO_PAIRS]
    lines += [f"warning: {line}" for line in warnings(comparison)]
    return "\n".join(lines)


def _test(found: Difference) -> str:
    numbers = f"{signed(found.points)}, 95% interval {signed(found.low)} to {signed(found.high)}"
    p_value = format_p(found.p_value)
    return f"{numbers}, p {p_value if p_value.startswith('<') else f'= {p_value}'}"


def results(comparison: Comparison) -> dict[str, Any]:
    """All numbers, for ``--json``: rates in percent, cross-entropy in nats per frame, differences in points."""
    first = comparison.evaluation
    return {
        "splits": list(first.splits),
        "corpus_digest": first.corpus_digest,
        "inventory_digest": first.inventory_digest,
        "num_utterances": len(first.utterances),
        f"num_{first.counted}": first.num_counted,
        "arms": [
            {
                "name": arm.name,
                "kind": arm.kind,
                "seeds": arm.seeds,
                "num_parameters": arm.runs[0].num_parameters if arm.runs else None,
                **{metric: _spread_json(arm, metric) for metric in comparison.metrics},
                "setup": arm.runs[0].setup() if arm.runs else None,
            }
            for arm in comparison.arms
        ],
        "pairs": [
            {
                "soft": pair.soft.name,
                "hard": pair.hard.name,
                **{
                    found.metric: {
                        "difference": found.points,
                        "interval": [found.low, found.high],
                        "p_value": found.p_value,
                    }
                    for found in pair.differences
                },
                "unlike": list(pair.unlike),
                "num_resamples": NUM_RESAMPLES,
            }
            for pair in comparison.pairs
        ],
        "datasets": [data.facts for data in comparison.datasets],
    }


def _spread_json(arm: Arm, metric: Metric) -> dict[str, Any] | None:
    spread = arm.spread(metric)
    return None if spread is None else {**asdict(spread), "values": arm.values(metric)}
