"""The contract between teachers and students: format, manifest, codec.

::

    teacher side:  SoftTargets -> codec -> container -> ObjectStore -> commit record -> manifest
    student side:  open_dataset(url) -> read_shard(i) -> Shard -> SoftTargets

>>> dataset = open_dataset("labels")                    # doctest: +SKIP
>>> for utterance in dataset:                           # doctest: +SKIP
...     print(utterance.utterance_id, utterance.targets.num_entries)

Needs neither torch nor ray. ``FORMAT.md`` specifies every stored byte.
"""

from softlabel_schemas.corpus import Corpus, Utterance, load_corpus, write_corpus
from softlabel_schemas.dataset import SoftLabelDataset, open_dataset
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.shard import LabelledUtterance, Shard, UtteranceStats
from softlabel_schemas.targets import SoftTargets
from softlabel_schemas.verification import verify

__all__ = [
    "ClassInventory",
    "Corpus",
    "InputError",
    "IntegrityError",
    "LabelledUtterance",
    "Shard",
    "SoftLabelDataset",
    "SoftTargets",
    "Utterance",
    "UtteranceStats",
    "load_corpus",
    "open_dataset",
    "verify",
    "write_corpus",
]
