"""What ``[evaluate]`` of a sweep asks for, opened and compared before a run starts: the evaluation comes hours later."""

from __future__ import annotations

from collections.abc import Sequence

from softlabel_schemas.command_line import needs_extra
from softlabel_schemas.corpus import Corpus
from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory
from student_trainer.config import TrainConfig
from student_trainer.ctc import Spelling, check_transcripts
from student_trainer.evaluate import load_evaluation_corpus, open_ensemble
from student_trainer.hard_labels import check_label_frames
from student_trainer.left_out import leave_out_skipped
from student_trainer.sweep_config import Sweep
from student_trainer.token_errors import load_transcribed_corpus


def check_evaluation(sweep: Sweep) -> None:
    """Reads manifests, indices and the graph; neither speech nor labels.

    Raises:
        InputError: arms have different class inventories; a split, the graph or a dataset is missing, or does not fit.
        IntegrityError: a file is damaged.
    """
    settings = sweep.evaluate
    inventory = _inventory(sweep.runs)
    corpus = _labelled(sweep, settings.splits, inventory)
    if settings.graph is not None:
        _check_graph(settings.graph, sweep, corpus, inventory)
    if settings.ensemble is not None:
        _check_ensemble(settings.ensemble, corpus, inventory)
    if settings.dev_ensemble is not None:
        _check_ensemble(settings.dev_ensemble, _labelled(sweep, sweep.dev_splits, inventory), inventory)


def _inventory(runs: Sequence[TrainConfig]) -> ClassInventory:
    """Of all arms, whose errors are compared class by class."""
    inventories = {run.name: ClassInventory.load(run.corpus.inventory) for run in runs}
    (first, inventory), *others = inventories.items()
    for name, other in others:
        if other.digest() != inventory.digest():
            raise InputError(
                f"the arms '{first}' and '{name}' have different class inventories, {inventory.digest()[:12]} and "
                f"{other.digest()[:12]}; their errors cannot be compared: give each inventory a sweep of its own"
            )
    return inventory


def _labelled(sweep: Sweep, splits: Sequence[str], inventory: ClassInventory) -> Corpus:
    """The speech of these splits, all of which can be evaluated, by every arm."""
    if sweep.units is None:
        corpus = load_evaluation_corpus(sweep.manifest, splits, inventory)
        # Once for all arms that hear alike.
        for run in {(run.front_end, run.model.architecture): run for run in sweep.runs}.values():
            check_label_frames(corpus, run, where=sweep.manifest)
        return corpus
    corpus = load_transcribed_corpus(sweep.manifest, splits)
    check_transcripts(corpus, Spelling(inventory, sweep.units))
    return corpus


def _check_graph(path: str, sweep: Sweep, corpus: Corpus, inventory: ClassInventory) -> None:
    # Here: only decoding needs the decoder's libraries.
    with needs_extra("decode"):
        from student_trainer.graph_folder import check_graph, transcripts
        from student_trainer.tune import check_apart

    description = check_graph(path, inventory)
    check_apart(sweep.evaluate.splits, description.splits, f"{path} was made from")
    for dev_splits in dict.fromkeys(run.corpus.dev_splits for run in sweep.runs):
        check_apart(dev_splits, description.splits, f"{path} was made from")
        check_apart(sweep.evaluate.splits, dev_splits, "the decoder's settings are chosen on")
    transcripts(corpus, where=sweep.manifest)


def _check_ensemble(url: str, whole_corpus: Corpus, inventory: ClassInventory) -> None:
    dataset = open_ensemble(url)
    found, expected = dataset.manifest.spec.inventory_digest, inventory.digest()
    if found != expected:
        raise InputError(
            f"{url}: labels are of class inventory {found[:12]} ({dataset.manifest.spec.num_classes} classes), the arms' is "
            f"{expected[:12]}; give labels of the same classes"
        )
    corpus, _ = leave_out_skipped(whole_corpus, dataset)
    shards = dataset.shards_of(corpus.table["utterance_id"].to_pylist())
    missing = next((utterance_id for utterance_id, shard in shards.items() if shard is None), None)
    if missing is not None:
        raise InputError(
            f"{url}: no soft targets for utterance {missing}; give labels of the splits that are evaluated"
        )
