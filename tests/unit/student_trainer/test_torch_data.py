"""PyTorch datasets: every utterance once in an epoch, whoever reads it; and a loop that goes on where it was."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from softlabel_schemas import InputError
from student_trainer.config import TrainConfig
from student_trainer.data import Step, TrainingData
from student_trainer.inputs import open_inputs
from student_trainer.order import Order, Share, even_batches
from student_trainer.torch_data import StepDataset, StepLoader, UtteranceDataset
from tests.support.shared_epochs import NUM_EPOCHS
from tests.support.speech import Speech, train_config, write_soft_labels, write_speech
from tests.support.teachers import write_job

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_speech(tmp_path_factory.mktemp("torch") / "speech")


@pytest.fixture(scope="module")
def config(speech: Speech) -> TrainConfig:
    """Several pools and steps in an epoch, with soft labels; 20 utterances."""
    labels = write_soft_labels(speech.folder / "labels", speech.split("train"))
    return train_config(speech, speech.folder / "run", url=labels.url, training__pool_seconds=4.0)


def ids(steps: list[Step]) -> list[tuple[str, ...]]:
    return [step.batch.utterance_ids for step in steps]


def reference(config: TrainConfig, num_epochs: int) -> list[Step]:
    """What ``student-trainer train`` takes."""
    training = config.training
    order = Order(seed=config.seed, batch_seconds=training.batch_seconds, pool_seconds=training.pool_seconds)
    return list(open_inputs(config).data.steps(order, temperature=2.0, num_epochs=num_epochs))


def assert_same_batch(found: Step, expected: Step) -> None:
    assert (found.epoch, found.step, found.num_steps) == (expected.epoch, expected.step, expected.num_steps)
    assert found.batch.utterance_ids == expected.batch.utterance_ids
    torch.testing.assert_close(found.batch.features_BTD, expected.batch.features_BTD)
    assert found.batch.targets is not None
    assert expected.batch.targets is not None
    torch.testing.assert_close(found.batch.targets.probs_NK, expected.batch.targets.probs_NK)


@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=6), min_size=1, max_size=3),
    st.integers(1, 4),
)
def test_shares_are_even_and_lose_nothing(sizes: list[list[int]], world_size: int) -> None:
    rows = iter(range(10_000))
    pools = [[[next(rows) for _ in range(size)] for size in pool] for pool in sizes]
    num_rows = sum(map(sum, sizes))
    if num_rows < world_size:
        with pytest.raises(InputError, match=f"cannot be shared evenly by {world_size} processes"):
            even_batches(pools, world_size)
        return
    try:
        shares = [Share(rank=rank, world_size=world_size).pools(pools) for rank in range(world_size)]
    except InputError:
        # Down to single utterances, there is nothing left to cut.
        assert num_rows % world_size
        return
    batches = [[batch for pool in share for batch in pool] for share in shares]
    assert len({len(own) for own in batches}) == 1
    assert sorted(chain.from_iterable(chain.from_iterable(batches))) == list(range(num_rows))
    whole = [set(batch) for pool in pools for batch in pool]
    assert all(any(set(batch) <= other for other in whole) for own in batches for batch in own)
    if world_size == 1:
        assert shares[0] == pools
    # Each pool is read by one of them, but for those at the borders.
    assert sum(sum(map(bool, share)) for share in shares) <= len(pools) + world_size - 1


@pytest.mark.parametrize("world_size", [2, 8, 32])
def test_processes_read_their_own_part_of_the_labels(world_size: int) -> None:
    """Of shards of ten utterances each; before, each process read nearly all of them in every epoch."""
    seconds_N = np.random.default_rng(0).uniform(2.0, 16.0, 20_000)
    order = Order(seed=1, batch_seconds=60.0, pool_seconds=3_600.0)
    pools = order.pools(seconds_N, epoch=0)
    num_read = 0
    for rank in range(world_size):
        rows = chain.from_iterable(chain.from_iterable(Share(rank=rank, world_size=world_size).pools(pools)))
        num_read += len({row // 10 for row in rows})
    # Each of eight runs of rows in a pool begins and ends within a shard; at most two processes share a pool.
    assert num_read <= (1.0 + 0.2) * 2_000 * (1 + (world_size - 1) / len(pools))


class TestSteps:
    @pytest.mark.parametrize("num_workers", [0, 1, 2])
    def test_workers_change_nothing(self, config: TrainConfig, num_workers: int) -> None:
        dataset = StepDataset(config)
        loader = StepLoader(dataset, num_workers=num_workers)
        found = [step for _ in range(2) for step in loader]
        expected = reference(config, 2)
        assert len(expected) > 8
        for step, other in zip(found, expected, strict=True):
            assert_same_batch(step, other)
        assert (dataset.epoch, dataset.num_steps(0)) == (2, expected[0].num_steps)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_it_goes_on_where_the_loop_was(self, config: TrainConfig, num_workers: int) -> None:
        """However far the workers were ahead, and with another number of them."""
        dataset = StepDataset(config)
        iterator = iter(StepLoader(dataset, num_workers=num_workers))
        before = [next(iterator) for _ in range(3)]
        state = json.loads(json.dumps(dataset.state_dict()))
        del iterator
        resumed = StepDataset(config)
        resumed.load_state_dict(state)
        after = list(StepLoader(resumed, num_workers=2 - num_workers))
        assert ids([*before, *after]) == ids(reference(config, 1))
        assert resumed.state_dict() == {"epoch": 1, "step": 0, "world_size": 1}

    def test_it_goes_on_behind_a_break(self, config: TrainConfig) -> None:
        """As of a loop that looks at dev speech every third step; and from a state that is loaded in between."""
        dataset = StepDataset(config)
        loader = StepLoader(dataset, num_workers=2)
        found: list[Step] = []
        while dataset.epoch < 2:
            for step in loader:
                found.append(step)
                if len(found) % 3 == 0:
                    break
        assert ids(found) == ids(reference(config, 2))
        dataset.load_state_dict({"epoch": 0, "step": 1, "world_size": 1})
        assert ids(list(loader)) == ids(reference(config, 1))[1:]

    def test_workers_that_would_not_know_where_the_loop_is(self, config: TrainConfig) -> None:
        with pytest.raises(
            InputError, match="persistent_workers would lose and repeat steps where a loop leaves an epoch"
        ):
            StepLoader(StepDataset(config), num_workers=2, persistent_workers=True)
        assert not StepLoader(StepDataset(config), num_workers=2, persistent_workers=False).persistent_workers
        with pytest.raises(InputError, match="in_order = False would lose and repeat steps where a loop is resumed"):
            StepLoader(StepDataset(config), num_workers=2, in_order=False)

    def test_spawned_workers_read_labels_on_s3(self, speech: Speech, new_url: Callable[[str], str]) -> None:
        """After this process has read some: its S3 client would not outlive a fork."""
        labels = write_soft_labels(new_url("s3"), speech.split("train"))
        config = train_config(speech, speech.folder / "run", url=labels.url)
        expected = ids(reference(config, 1))
        loader = StepLoader(StepDataset(config), num_workers=2, multiprocessing_context="spawn")
        assert ids(list(loader)) == expected

    def test_its_own_state_without_a_loader_of_ours(self, config: TrainConfig) -> None:
        """What a loader that asks the dataset needs, as torchdata's does."""
        dataset = StepDataset(config)
        iterator = iter(dataset)
        before = [next(iterator) for _ in range(2)]
        other = deepcopy(dataset)
        assert ids([*before, *other]) == ids(reference(config, 1))

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_processes_share_an_epoch(self, config: TrainConfig, world_size: int) -> None:
        shares = [list(StepDataset(config, rank=rank, world_size=world_size)) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert {step.num_steps for step in chain(*shares)} == {len(shares[0])}
        seen = Counter(chain.from_iterable(chain.from_iterable(map(ids, shares))))
        assert set(seen.values()) == {1}
        assert len(seen) == 20

    def test_pools_of_many_processes_are_smaller(self, config: TrainConfig) -> None:
        """Ten hours in all; and an hour at least, or what the configuration says where that is less."""
        for pool_seconds, world_size, expected in (
            (36_000.0, 1, 36_000.0),
            (36_000.0, 8, 4_500.0),
            (36_000.0, 64, 3_600.0),
            (600.0, 8, 600.0),
        ):
            training = config.training.model_copy(update={"pool_seconds": pool_seconds})
            dataset = StepDataset(config.model_copy(update={"training": training}), rank=0, world_size=world_size)
            assert dataset._order.pool_seconds == expected

    def test_an_epoch_makes_nothing_but_its_own_examples(
        self, speech: Speech, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of one pool, each utterance heard at one of three speeds and taught by one of three datasets."""
        urls = [write_soft_labels(tmp_path / name, speech.split("train")).url for name in ("a", "b", "c")]
        soft_labels = {"urls": urls, "temperature": 2.0}
        config = train_config(speech, tmp_path / "run", soft_labels=soft_labels, augmentation={})
        expected = reference(config, 2)
        load, made = TrainingData.load_variants, []

        def counting(self: TrainingData, *args: Any) -> Any:
            examples = load(self, *args)
            made.append(len(examples))
            return examples

        monkeypatch.setattr(TrainingData, "load_variants", counting)
        dataset = StepDataset(config)
        for step, other in zip([*dataset, *dataset], expected, strict=True):
            assert_same_batch(step, other)
        assert made == [20, 20]

    def test_what_is_refused(self, config: TrainConfig) -> None:
        with pytest.raises(InputError, match="rank is 2, expected 0 to 1"):
            StepDataset(config, rank=2, world_size=2)
        with pytest.raises(InputError, match="rank and world_size belong together"):
            StepDataset(config, rank=0)
        state = StepDataset(config, rank=0, world_size=2).state_dict()
        # Between two epochs their number may change.
        StepDataset(config).load_state_dict({**state, "epoch": 1})
        with pytest.raises(InputError, match="the state is of 2 processes, here are 1"):
            StepDataset(config).load_state_dict({**state, "step": 3})


class TestUtterances:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_under_a_loader(self, config: TrainConfig, num_workers: int) -> None:
        dataset = UtteranceDataset(config)
        loader = DataLoader(dataset, batch_size=8, collate_fn=dataset.collate, num_workers=num_workers)
        batches = list(loader)
        assert [utterance for batch in batches for utterance in batch.utterance_ids] == [
            f"train-{index:02d}" for index in range(20)
        ]
        assert all(batch.targets is not None for batch in batches)

    def test_one(self, config: TrainConfig) -> None:
        dataset = UtteranceDataset(config)
        assert (len(dataset), dataset[3].utterance_id) == (20, "train-03")
        for row in (-1, 20):
            with pytest.raises(IndexError, match=f"utterance {row} asked for, the training corpus has 20"):
                dataset[row]

    def test_where_teachers_are_switched_per_batch(self, config: TrainConfig, speech: Speech) -> None:
        """By its place in an epoch, which an utterance has not: it had the targets of the first dataset."""
        urls = [write_soft_labels(speech.folder / name, speech.split("train")).url for name in ("a", "b")]
        switched = train_config(speech, speech.folder / "run", soft_labels={"urls": urls})
        with pytest.raises(InputError, match=r"soft_labels\.urls: .* use StepDataset, or give soft_labels\.url"):
            UtteranceDataset(switched)


def test_the_loop_in_the_readme(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python example of the package's page, for two epochs."""
    page = (ROOT / "student_trainer" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    tables = config.model_dump(
        mode="json", exclude_none=True, include={"corpus", "soft_labels", "front_end", "training"}
    )
    top = 'name = "student"\noutput = "run"\nseed = 7\n'
    write_job(tmp_path / "tables.toml", tables)
    (tmp_path / "student.toml").write_text(top + (tmp_path / "tables.toml").read_text())
    monkeypatch.chdir(tmp_path)
    losses: list[tuple[str, ...]] = []
    names: dict[str, Any] = {
        "my_model": lambda features_BTD, lengths_B: features_BTD,
        "my_loss": lambda logits, batch: losses.append(batch.utterance_ids),
    }
    exec(example.replace("< 15", "< 2"), names)
    assert losses == ids(reference(config, 2))
    assert names["state"] == {"epoch": 2, "step": 0, "world_size": 1}


def check_shared(folder: Path) -> None:
    """Of two processes: every utterance once in each epoch, and the same weights."""
    found: list[dict[str, Any]] = [json.loads((folder / f"rank-{rank}.json").read_bytes()) for rank in range(2)]
    for epoch in range(NUM_EPOCHS):
        assert sorted(chain(*(each["seen"][epoch] for each in found))) == [f"train-{index:02d}" for index in range(20)]
    assert found[0]["weights"] == found[1]["weights"]


def run_shared(config: TrainConfig, folder: Path, launcher: list[str], *more: str) -> None:
    (folder / "config.json").write_text(config.model_dump_json())
    arguments = ["-m", "tests.support.shared_epochs", str(folder / "config.json"), str(folder), *more]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT}/schemas", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT,
        # Ray Train gives its workers 60 s to start, too little where the suite's other processes have the cores.
        env={**os.environ, **paths, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "400"},
        check=True,
        timeout=500,
    )
    check_shared(folder)


def test_torchrun(config: TrainConfig, tmp_path: Path) -> None:
    meeting = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    run_shared(config, tmp_path, ["-m", "torch.distributed.run", *meeting])


@pytest.mark.ray
def test_ray_train(config: TrainConfig, tmp_path: Path) -> None:
    run_shared(config, tmp_path, [], "ray")
