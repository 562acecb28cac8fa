"""The training data of a configuration, opened by one process and used by others."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from softlabel_schemas import InputError, IntegrityError
from softlabel_schemas.names import Address, tag
from softlabel_schemas.selection import TopK
from student_trainer.config import TrainConfig
from student_trainer.inputs import open_inputs, reopen_inputs
from student_trainer.source import TrainingSource
from student_trainer.torch_data import StepDataset, StepLoader, UtteranceDataset
from tests.support.speech import SoftDataset, Speech, train_config, write_soft_labels


@pytest.fixture
def config(speech: Speech, labels: SoftDataset, tmp_path: Path) -> TrainConfig:
    """The manifest in a folder of its own."""
    manifest = tmp_path / "corpus.parquet"
    manifest.write_bytes(Path(speech.manifest).read_bytes())
    for utterance in speech.split("train"):
        (tmp_path / str(utterance.audio)).symlink_to(speech.folder / str(utterance.audio))
    return train_config(speech, tmp_path / "run", url=labels.url, corpus__manifest=str(manifest))


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With a short path: there are sockets in it, through which workers of a loader hand on their batches."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_workers_of_any_loader_do_not_read_it_either(config: TrainConfig) -> None:
    dataset = UtteranceDataset(config)
    dataset.open()
    Path(config.corpus.manifest).unlink()
    loader = DataLoader(dataset, batch_size=4, collate_fn=dataset.collate, num_workers=2)
    assert sum(len(batch.utterance_ids) for batch in loader) == 20


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_loader_s_workers_do_not_read_the_corpus(config: TrainConfig, temporary: Path, method: str) -> None:
    dataset = StepDataset(config)
    dataset.open()
    expected = [step.batch.utterance_ids for step in deepcopy(dataset)]
    Path(config.corpus.manifest).unlink()
    loader = StepLoader(dataset, num_workers=2, multiprocessing_context=method)
    assert [step.batch.utterance_ids for step in loader] == expected
    assert len(list(temporary.glob("training-corpus-*/corpus.arrow"))) == (method == "spawn")
    del loader, dataset
    assert not list(temporary.iterdir())


def test_a_loader_opens_it_before_its_workers(config: TrainConfig) -> None:
    """So that what does not fit together is an error of this process."""
    Path(config.corpus.manifest).unlink()
    with pytest.raises(InputError, match=r"^corpus manifest .* does not exist"):
        next(iter(StepLoader(StepDataset(config), num_workers=2)))


def rows_of(source: TrainingSource, queue: object) -> None:
    corpus = source.data.corpus
    queue.put([(row.utterance_id, row.hard_labels) for row in corpus])  # type: ignore[attr-defined]


def test_all_of_a_row_is_there(config: TrainConfig) -> None:
    source, context = TrainingSource(config, open_inputs(config)), get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=rows_of, args=(source, queue))
    process.start()
    found = queue.get(timeout=300)
    process.join()
    corpus = source.data.corpus
    assert [utterance_id for utterance_id, _ in found] == [row.utterance_id for row in corpus]
    for (_, labels_T), row in zip(found, corpus, strict=True):
        assert np.array_equal(labels_T, row.hard_labels)


def test_a_copy_elsewhere_opens_it_itself(config: TrainConfig, temporary: Path) -> None:
    """As on another machine, which has not this one's files."""
    dataset = UtteranceDataset(config)
    expected = len(dataset)
    assert len(deepcopy(dataset)) == expected
    assert not list(temporary.iterdir())


def test_no_room_for_the_corpus(config: TrainConfig, temporary: Path) -> None:
    dataset = StepDataset(config)
    loader = StepLoader(dataset, num_workers=1, multiprocessing_context="spawn")
    dataset.open()
    shutil.rmtree(temporary)
    with pytest.raises(InputError, match=r"cannot be written for the processes that share it: .* or set TMPDIR"):
        next(iter(loader))


def test_a_disk_that_is_full_at_the_corpus(config: TrainConfig, temporary: Path) -> None:
    source = TrainingSource(config)
    source.open()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be written for the processes that share it: .*File too large"):
            source.share()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(temporary.iterdir())


def test_a_name_that_means_another_version_by_then(speech: Speech, tmp_path: Path) -> None:
    """The run goes on with the labels that it began with."""
    address = Address(prefix=str(tmp_path), name="english", version=None)
    first = write_soft_labels(tmp_path / "first", speech.split("train")).url
    tag(first, address)
    config = train_config(speech, tmp_path / "run", url=str(address))
    checked = open_inputs(config).checked
    tag(write_soft_labels(tmp_path / "second", speech.split("train"), selection=TopK(k=2)).url, address)
    assert open_inputs(config).checked.content_digests != checked.content_digests
    assert checked.urls == (first,)
    assert len(reopen_inputs(config, checked).corpus) == 20


def test_a_dataset_that_was_replaced(speech: Speech, tmp_path: Path) -> None:
    url = write_soft_labels(tmp_path / "labels", speech.split("train")).url
    config = train_config(speech, tmp_path / "run", url=url)
    checked = open_inputs(config).checked
    assert len(reopen_inputs(config, checked).corpus) == 20
    shutil.rmtree(url)
    write_soft_labels(url, speech.split("train"), selection=TopK(k=2))
    with pytest.raises(IntegrityError, match="was replaced since this run began: its labels were"):
        reopen_inputs(config, checked)
