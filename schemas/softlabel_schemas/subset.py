"""``softlabels pull``: some utterances of a dataset as a published dataset of its own.

    dataset --> choice --> read and check shards --> take rows --> commit_columns --> publish

Labels are taken as they are stored, without decoding and encoding them once more, so that each utterance keeps its bytes and
its share of the content digest. The commit protocol is that of a labelling job: nothing looks complete before it is, and the
same command goes on after a kill.
"""

from __future__ import annotations

import numpy as np

from softlabel_schemas.about import About, inherit_about, read_about_or_warn
from softlabel_schemas.commit import Published, begin, commit_columns, committed_shards, publish
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.manifest import FrameSums, SpecDocument
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.plan import ShardRange
from softlabel_schemas.shard import ShardColumns
from softlabel_schemas.spec import DatasetSpec, SubsetSpec
from softlabel_schemas.subset_choice import Choice


class Subset:
    """What is made at ``output``; nothing is written before :meth:`begin`.

    Args:
        keep_ids: keep the ids of the shards made here in memory, so that :meth:`utterance_ids` need not fetch whole ones again.
    """

    def __init__(self, dataset: SoftLabelDataset, choice: Choice, output: str, *, keep_ids: bool = False) -> None:
        self._dataset, self._choice, self._keep_ids = dataset, choice, keep_ids
        self._ids_of_shard: dict[int, list[str]] = {}
        self.store = ObjectStore(output)
        manifest = dataset.manifest
        subset_of = SubsetSpec(
            content_digest=manifest.content_digest, choice=choice.text, choice_digest=choice.digest()
        )
        spec = manifest.spec.model_copy(update={"format_version": 2, "subset_of": subset_of})
        self._starts = np.concatenate([[0], np.cumsum([part.num_rows for part in choice.parts])]).tolist()
        self._document = SpecDocument(
            spec=DatasetSpec.model_validate(spec.fields()),
            storage=manifest.storage.model_copy(update={"num_shards": len(choice.parts), "num_rows": self._starts[-1]}),
        )

    @property
    def num_shards(self) -> int:
        return len(self._choice.parts)

    def begin(self) -> list[int]:
        """Claim the output, or join a run of the same choice; the shards without a commit record.

        Raises:
            InputError: the output was begun with another dataset or choice.
        """
        # Before the output is claimed: this may fail.
        about = read_about_or_warn(self._dataset.store) or About()
        begin(self.store, self._document, self._dataset.inventory)
        inherit_about(self.store, about)
        return sorted(set(range(self.num_shards)) - committed_shards(self.store))

    def make_shard(self, index: int) -> None:
        """Fetch, check and commit one shard. Raises IntegrityError, OSError where the dataset cannot be read."""
        part = self._choice.parts[index]
        shard, wanted = part.shard, part.utterance_ids
        columns = self._dataset.shards.read_columns(shard.index)[1]
        skipped = [entry for entry in shard.skipped if wanted is None or entry.utterance_id in wanted]
        if wanted is not None:
            columns = columns.take([row for row, each in enumerate(columns.utterance_ids) if each in wanted])
        num_rows = len(columns.utterance_ids) + len(skipped)
        if num_rows != part.num_rows:
            raise IntegrityError(
                f"{self._dataset.shards.describe(shard.index)}: {part.num_rows} rows were to be taken, it has {num_rows}"
            )
        shard_range = ShardRange(index=index, first_row=self._starts[index], num_rows=num_rows)
        commit_columns(self.store, self._document, shard_range, columns, _sums(columns), skipped)
        if self._keep_ids:
            self._ids_of_shard[index] = [*columns.utterance_ids, *(entry.utterance_id for entry in skipped)]

    def utterance_ids(self) -> list[str]:
        """Of all rows, skipped ones too, once every shard is committed."""
        found: list[str] = []
        for index, part in enumerate(self._choice.parts):
            if index in self._ids_of_shard:
                found += self._ids_of_shard[index]
            elif part.utterance_ids is not None:
                found += part.utterance_ids
            else:
                found += self._dataset.shards.read_columns(part.shard.index)[1].utterance_ids
                found += [entry.utterance_id for entry in part.shard.skipped]
        return found

    def publish(self) -> Published:
        return publish(self.store, self._document)


def _sums(columns: ShardColumns) -> FrameSums:
    """From the stored means, which are all that is known of a part."""
    frames_N = columns.num_frames.astype(np.float64)
    labelled_N = np.isfinite(columns.agreement)
    return FrameSums(
        kept_mass=float(columns.kept_mass @ frames_N),
        entropy=float(columns.entropy @ frames_N),
        agreement=float(columns.agreement[labelled_N] @ frames_N[labelled_N]),
        num_labelled_frames=int(columns.num_frames[labelled_N].sum()),
    )


def check_output(dataset: SoftLabelDataset, output: str) -> None:
    """Raises InputError where a dataset was to be written onto itself."""
    if ObjectStore(output).path("") == dataset.store.path(""):
        raise InputError(f"{output} is the dataset itself; give another destination")
