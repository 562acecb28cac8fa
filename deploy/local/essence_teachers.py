"""Teachers of the experiment and what they say: trained on shares of the speech and on all but a fold, labelled once.

::

    share 25%, 50%     three models each       labels-25, labels-50    all training speech
    all of it          three models            labels-test, labels-dev, labels-heard (the speech they were trained on)
    all but a fold     three models, 4 folds   labels-train            each speaker by teachers that never heard them
                                               labels-train-exact      the same, at other temperatures too

Every dataset stores all classes, so that any selection can be derived from it, a sampled one included. At another temperature
than 1 that takes a codec without loss (``softlabel_schemas.tempering`` says why). What is done already is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from recipe import Model, Workspace, inline
from speechocean762 import PARTS

NUM_FOLDS = 4
# By percent. Parts are of speakers, and nested: the first one is in every share.
SHARES = {25: PARTS[:1], 50: PARTS[:2], 100: PARTS}
# Trainings at a time; each with one thread uses two cores better than one with two.
_NUM_PARALLEL = 2


@dataclass(frozen=True, kw_only=True)
class Architecture:
    name: str
    model: Model
    num_mel_bins: int = 40


MEMBER = Model(architecture="conv_glu")
ARCHITECTURES = (
    Architecture(name="tdnn", model=Model(architecture="tdnn")),
    Architecture(name="conv_glu", model=MEMBER, num_mel_bins=64),
    Architecture(
        name="conv_glu_deep", model=Model(architecture="conv_glu", arguments={"num_layers": 10, "kernel_size": 3})
    ),
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Teachers that label together: of ``share`` percent of the speakers, and without ``fold`` of them."""

    share: int
    fold: int | None = None

    @property
    def name(self) -> str:
        return f"{self.share}" if self.fold is None else f"{self.share}-without-{self.fold}"

    def bundle(self, architecture: Architecture) -> str:
        return f"bundles/{architecture.name}-{self.name}"


WHOLE = Group(share=100)
FOLDS = tuple(Group(share=100, fold=fold) for fold in range(NUM_FOLDS))


def train_teachers(
    workspace: Workspace,
    labels: Sequence[Labels],
    architectures: Sequence[Architecture],
    *,
    epochs: int,
    precision: str,
) -> None:
    """Train and export what these labels need: each architecture for each group. A share of the speech is heard more often:
    equal budgets."""
    groups = dict.fromkeys(group for each in labels for group in each.groups)
    todo = [(group, architecture) for group in groups for architecture in architectures]
    with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
        list(pool.map(lambda each: _train(workspace, *each, epochs=epochs, precision=precision), todo))


def _train(workspace: Workspace, group: Group, architecture: Architecture, *, epochs: int, precision: str) -> None:
    name = f"{architecture.name}-{group.name}"
    if workspace.exists(f"{group.bundle(architecture)}/teacher.json"):
        return
    held_out = "" if group.fold is None else f"num_folds = {NUM_FOLDS}\nheld_out_fold = {group.fold}\n"
    workspace.write(
        f"{name}.toml",
        f'name = "{name}"\noutput = "teachers/{name}"\n\n[corpus]\nmanifest = "corpus.parquet"\n'
        f'inventory = "inventory.json"\ntrain_splits = {inline(SHARES[group.share])}\n{held_out}\n'
        f'[front_end]\nkind = "fbank"\nnum_mel_bins = {architecture.num_mel_bins}\nstack = 3\n\n{architecture.model.toml()}\n'
        f"[training]\nepochs = {epochs * 100 // group.share}\nbatch_seconds = 40.0\nnum_threads = 1\n"
        f"precision = {inline(precision)}\n",
    )
    workspace.command("student-trainer", "train", f"{name}.toml")
    workspace.command("student-trainer", "export", f"teachers/{name}", group.bundle(architecture))


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A dataset. ``groups``: one, or one for each fold. ``targets``: keys of [targets]."""

    url: str
    splits: tuple[str, ...]
    groups: tuple[Group, ...]
    targets: Mapping[str, object] = field(default_factory=dict)

    def job(self, architectures: Sequence[Architecture], num_classes: int) -> str:
        folds = f"num_folds = {NUM_FOLDS}\n" if len(self.groups) > 1 else ""
        teachers = "".join(self._teachers(architectures))
        targets = "".join(f"{key} = {inline(value)}\n" for key, value in self.targets.items())
        return (
            f'[corpus]\nmanifest = "corpus.parquet"\nsplits = {inline(self.splits)}\n{folds}\n{teachers}'
            f'[combination]\nmethod = "arithmetic"\n\n[targets]\n{targets}\n'
            f'[selection]\npolicy = "top_k"\nk = {num_classes}\n\n'
            f'[destination]\nurl = "{self.url}"\nshard_seconds = 600.0\n\n[resources]\nnum_actors = 2\n'
        )

    def _teachers(self, architectures: Sequence[Architecture]) -> Iterator[str]:
        for group in self.groups:
            fold = "" if group.fold is None else f"fold = {group.fold}\n"
            for architecture in architectures:
                yield f'[[teachers]]\nbundle = "{group.bundle(architecture)}"\n{fold}\n'


LABELS = (
    Labels(url="labels-train", splits=PARTS, groups=FOLDS),
    Labels(
        url="labels-train-exact",
        splits=PARTS,
        groups=FOLDS,
        targets={"temperatures": [1.0, 2.0], "codec": "packed-f32"},
    ),
    Labels(url="labels-heard", splits=PARTS, groups=(WHOLE,)),
    Labels(url="labels-dev", splits=("dev",), groups=(WHOLE,)),
    Labels(url="labels-test", splits=("test",), groups=(WHOLE,)),
    Labels(url="labels-25", splits=PARTS, groups=(Group(share=25),)),
    Labels(url="labels-50", splits=PARTS, groups=(Group(share=50),)),
)


def label(
    workspace: Workspace, labels: Sequence[Labels], architectures: Sequence[Architecture], *, num_classes: int
) -> None:
    for each in labels:
        workspace.write(f"{each.url}.toml", each.job(architectures, num_classes))
        workspace.command("teacher-service", "run", f"{each.url}.toml")
        workspace.command("softlabels", "verify", each.url)
