"""``softlabels combine``: the dataset of an ensemble from the datasets of its members, shard by shard, without a teacher.

    dataset of teacher A --+
    dataset of teacher B --+--> combine_targets --> commit_shard --> publish

Shards are cut as the first input's. The commit protocol is that of a labelling job: kill it, run it again, and it goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from softlabel_schemas.about import Description, begin_about
from softlabel_schemas.combine import combine_targets
from softlabel_schemas.commit import Published, begin, commit_shard, committed_shards, publish
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.manifest import SkippedUtterance, SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.selection import AnySelection, SampledSelection, TopK, least_entries_per_frame
from softlabel_schemas.shard import LabelledUtterance, UtteranceStats
from softlabel_schemas.spec import Combination, DatasetSpec, InputSpec
from softlabel_schemas.tempering import obstacle, warn_of_floor

# In which the inputs must agree, or they are not labels of the same frames and classes made alike.
_SAME = (
    "corpus_digest",
    "inventory_digest",
    "num_classes",
    "frame_shift_ms",
    "precision",
    "num_folds",
    "speakers_digest",
)


class CombinedDataset:
    """What is made at ``output``; nothing is written before :meth:`begin`.

    Args:
        weights: of the inputs, positive; normalised here.
        top_k: entries kept of each frame.

    Raises:
        InputError: the inputs do not fit together; names what differs, and both values.

    Attributes:
        left_out_temperatures: those that some input stores and the result does not, with the reason of each.
        narrow_inputs: URLs of those whose frames may have fewer entries than the result is to keep, with how few. Of what they
            did not keep only the tail is known, so that a selection derived from the result is narrower than one of the whole
            posteriors.
    """

    def __init__(
        self,
        inputs: Sequence[SoftLabelDataset],
        weights: Sequence[float],
        method: Combination,
        top_k: int,
        output: str,
    ) -> None:
        check_inputs(inputs, method)
        if len(weights) != len(inputs) or not all(0 < weight < np.inf for weight in weights):
            raise InputError(
                f"expected {len(inputs)} positive weights, one for each dataset, found {', '.join(f'{w:g}' for w in weights)}"
            )
        self._inputs, self._weights = inputs, [weight / sum(weights) for weight in weights]
        if not all(self._weights):
            raise InputError(
                f"the weights {', '.join(f'{w:g}' for w in weights)} are too large or too far apart: the share of one is 0; "
                "expected numbers such as 1, 2"
            )
        for data in inputs:
            warn_of_floor(data.manifest.spec, where=data.store.url)
        if method == "log_linear":
            _check_floors(inputs, self._weights)
        self._store = ObjectStore(output)
        self._skipped = [{each.utterance_id: each.reason for each in data.manifest.skipped} for data in inputs]
        first = inputs[0].manifest
        on_error = "skip" if any(data.manifest.storage.on_error == "skip" for data in inputs) else "fail"
        selection = _selection([data.manifest.spec for data in inputs], top_k)
        left_out = _left_out_temperatures(inputs, selection)
        self._document = SpecDocument(
            spec=_spec(inputs, self._weights, method, selection, left_out),
            storage=first.storage.model_copy(update={"on_error": on_error}),
        )
        self.num_frames_of_shard = [shard.num_frames for shard in first.shards]
        self.left_out_temperatures = left_out
        entries = {data.store.url: _least_entries(data) for data in inputs}
        self.narrow_inputs = {url: count for url, count in entries.items() if count < selection.k}

    def begin(self) -> list[int]:
        """Claim the output, or join a run of the same inputs and settings; the shards without a commit record.

        Raises:
            InputError: the output was begun with others.
        """
        begin(self._store, self._document, self._inputs[0].inventory)
        begin_about(self._store, Description())
        return sorted(set(range(len(self.num_frames_of_shard))) - committed_shards(self._store))

    def make_shard(self, index: int) -> None:
        """Combine and commit one shard.

        Raises:
            InputError: the inputs disagree on the frames of an utterance.
            IntegrityError, OSError: an input cannot be read.
        """
        shard = self._inputs[0].manifest.shards[index]
        shard_range = ShardRange(index=index, first_row=shard.first_row, num_rows=shard.num_rows)
        of_first = list(self._inputs[0].read_shard(index))
        ids = [utterance.utterance_id for utterance in of_first]
        skipped = [
            SkippedUtterance(utterance_id=each, reason=reason)
            for each in (*(entry.utterance_id for entry in shard.skipped), *ids)
            if (reason := self._reason(each)) is not None
        ]
        left_out = {entry.utterance_id for entry in skipped}
        wanted = [each for each in ids if each not in left_out]
        others = [_read(data, wanted) for data in self._inputs[1:]]
        kept = [utterance for utterance in of_first if utterance.utterance_id not in left_out]
        utterances = list(self._combined(zip(kept, *others, strict=True)))
        commit_shard(self._store, self._document, shard_range, utterances, skipped)

    def publish(self) -> Published:
        return publish(self._store, self._document)

    def _reason(self, utterance_id: str) -> str | None:
        """Why the utterance is skipped. Stored, and so named by what the inputs hold and not by where they are."""
        for position, (data, skipped) in enumerate(zip(self._inputs, self._skipped, strict=True), start=1):
            if utterance_id in skipped:
                names = ", ".join(teacher.name for teacher in data.manifest.spec.teachers)
                return f"input {position} of {len(self._inputs)} ({names}): {skipped[utterance_id]}"
        return None

    def _combined(self, rows: Iterator[tuple[LabelledUtterance, ...]]) -> Iterator[LabelledUtterance]:
        spec = self._document.spec
        assert isinstance(spec.selection, TopK)
        for of_inputs in rows:
            utterance_id = of_inputs[0].utterance_id
            try:
                targets = [each.targets for each in of_inputs]
                found = combine_targets(
                    targets, self._weights, spec.combination, spec.temperatures, top_k=spec.selection.k
                )
            except InputError as error:
                raise InputError(f"utterance {utterance_id}: {error}") from None
            kept_mass_T = found.targets.kept_mass_T()
            yield LabelledUtterance(
                utterance_id=utterance_id,
                targets=found.targets,
                stats=UtteranceStats(
                    kept_mass=float(kept_mass_T.mean()) if len(kept_mass_T) else 0.0,
                    entropy=float(found.entropy_T.mean()) if len(kept_mass_T) else 0.0,
                    # The hard labels are in the corpus, which is not read.
                    agreement=float("nan"),
                ),
            )


def _read(dataset: SoftLabelDataset, utterance_ids: Sequence[str]) -> list[LabelledUtterance]:
    try:
        return dataset.read_utterances(utterance_ids)
    except KeyError as error:
        raise IntegrityError(f"{error.args[0]}: the first dataset has it, and its corpus digest is the same") from None


def check_inputs(inputs: Sequence[SoftLabelDataset], method: Combination) -> None:
    """Raises InputError where the datasets do not label the same frames and classes, or are ensembles of another kind."""
    first = inputs[0]
    repeated = [
        digest for digest, count in Counter(data.manifest.content_digest for data in inputs).items() if count > 1
    ]
    if repeated:
        raise InputError(
            f"the same labels are given twice (content digest {repeated[0][:12]}); use a larger weight instead"
        )
    for data in inputs:
        for name in _SAME:
            expected, found = getattr(first.manifest.spec, name), getattr(data.manifest.spec, name)
            if found != expected:
                raise InputError(
                    f"{name} differs: {expected} in {first.store.url}, {found} in {data.store.url}; "
                    "datasets are combined that label the same corpus alike"
                )
        spec = data.manifest.spec
        if _is_ensemble(spec) and spec.combination != method:
            raise InputError(
                f"{data.store.url} is a '{spec.combination}' ensemble already, it cannot be a member of a '{method}' one; "
                "combine the datasets of single teachers"
            )
        if spec.subset_of is not None:
            raise InputError(
                f"{data.store.url} is a subset ({spec.subset_of.choice}); combine whole datasets, then pull"
            )
        if spec.selection.frames is not None:
            raise InputError(
                f"{data.store.url} was labelled without some frames (selection.frames), so the ensemble's posterior is not "
                "known there; label without 'frames', combine, and drop frames when reading"
            )
        if isinstance(spec.selection, SampledSelection):
            raise InputError(
                f"{data.store.url} stores samples ('{spec.selection.policy}'): their logarithms are biased, and so are the "
                "likeliest classes of a mean of them; store likeliest classes instead (such as 'top_k'), and combine those"
            )


def _check_floors(inputs: Sequence[SoftLabelDataset], weights: Sequence[float]) -> None:
    """Raises InputError where a posterior raised to its weight, as a log-linear ensemble takes it, cannot be told."""
    for data, weight in zip(inputs, weights, strict=True):
        spec = data.manifest.spec
        found = obstacle(spec.selection, spec.codec, 1 / weight, spec.num_classes)
        if found is not None:
            raise InputError(
                f"{data.store.url} is raised to its weight {weight:.3g} in a 'log_linear' ensemble, which is temperature "
                f"{1 / weight:.3g}, but {found}; label with targets.codec = \"packed-f32\", or combine by 'arithmetic'"
            )


def _is_ensemble(spec: DatasetSpec) -> bool:
    """Whether some utterance was labelled by several teachers: by all of them, or by those of one fold."""
    return max(Counter(teacher.fold for teacher in spec.teachers).values()) > 1


def _is_whole(specs: Sequence[DatasetSpec]) -> bool:
    """Whether some input, and so the ensemble too, has an entry for every class in every frame."""
    return any(isinstance(spec.selection, TopK) and spec.selection.k >= spec.num_classes for spec in specs)


def _least_entries(dataset: SoftLabelDataset) -> int:
    spec = dataset.manifest.spec
    return least_entries_per_frame(spec.selection, spec.num_classes)


def _left_out_temperatures(inputs: Sequence[SoftLabelDataset], selection: AnySelection) -> dict[float, str]:
    """``selection``: of the result, which has the codec of the first input."""
    stored = {temperature for data in inputs for temperature in data.manifest.spec.temperatures}
    reasons = {temperature: _why_left_out(inputs, selection, temperature) for temperature in sorted(stored)}
    return {temperature: reason for temperature, reason in reasons.items() if reason is not None}


def _why_left_out(inputs: Sequence[SoftLabelDataset], selection: AnySelection, temperature: float) -> str | None:
    lacking = [data.store.url for data in inputs if temperature not in data.manifest.spec.temperatures]
    if lacking:
        return f"{', '.join(lacking)} did not store it"
    for data in inputs:
        spec = data.manifest.spec
        found = obstacle(spec.selection, spec.codec, temperature, spec.num_classes)
        if found is not None:
            return f"of {data.store.url} {found}"
    first = inputs[0].manifest.spec
    return obstacle(selection, first.codec, temperature, first.num_classes)


def _selection(specs: Sequence[DatasetSpec], top_k: int) -> TopK:
    return TopK(k=top_k if _is_whole(specs) else min(top_k, max(specs[0].num_classes - 1, 1)))


def _spec(
    inputs: Sequence[SoftLabelDataset],
    weights: Sequence[float],
    method: Combination,
    selection: TopK,
    left_out: Collection[float],
) -> DatasetSpec:
    specs = [data.manifest.spec for data in inputs]
    first = specs[0]
    members = [(teacher, weight) for spec, weight in zip(specs, weights, strict=True) for teacher in spec.teachers]
    update = {
        "format_version": 2,
        "teachers": tuple(teacher.model_copy(update={"weight": teacher.weight * w}) for teacher, w in members),
        "combination": method,
        "temperatures": tuple(t for t in first.temperatures if t not in left_out),
        "selection": selection,
        "combined_from": tuple(
            InputSpec(content_digest=data.manifest.content_digest, weight=weight)
            for data, weight in zip(inputs, weights, strict=True)
        ),
    }
    return DatasetSpec.model_validate(first.model_copy(update=update).fields())
