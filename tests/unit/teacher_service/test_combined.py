"""Members labelled one by one and combined, against the job of the whole ensemble."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from softlabel_schemas import open_dataset
from softlabel_schemas.combined_dataset import CombinedDataset
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.spec import Combination
from teacher_service.config import TeacherConfig
from teacher_service.job import prepare
from tests.support.labelling import run_here
from tests.support.teachers import INVENTORY, Sounds, make_job, write_linear_teacher, write_sounds

WEIGHTS = (1.0, 3.0)
TEMPERATURES = (1.0, 2.0)


def label(
    sounds: Sounds, members: list[TeacherConfig], url: Path, *, k: int, method: Combination = "arithmetic"
) -> SoftLabelDataset:
    config = make_job(
        sounds.manifest,
        members,
        url,
        selection={"policy": "top_k", "k": k},
        combination__method=method,
        targets={"temperatures": TEMPERATURES, "codec": "packed-f32"},
    )
    run_here(prepare(config))
    return open_dataset(url)


@pytest.mark.parametrize("method", ["arithmetic", "log_linear"])
def test_members_combined_are_the_ensemble(tmp_path: Path, method: Combination) -> None:
    """Every class of each member is stored: the same entries and tails, up to float32."""
    sounds = write_sounds(tmp_path / "sounds", [0.9, 0.3, 1.5, 0.6, 1.2])
    members = [
        write_linear_teacher(tmp_path / f"teacher-{seed}", seed=seed).model_copy(update={"weight": weight})
        for seed, weight in enumerate(WEIGHTS)
    ]
    inputs = [
        label(sounds, [member], tmp_path / f"labels-{index}", k=INVENTORY.num_classes)
        for index, member in enumerate(members)
    ]
    expected = label(sounds, members, tmp_path / "ensemble", k=4, method=method)
    made = CombinedDataset(inputs, WEIGHTS, method, 4, str(tmp_path / "combined"))
    for index in made.begin():
        made.make_shard(index)
    made.publish()
    found = open_dataset(tmp_path / "combined")
    assert found.num_shards == expected.num_shards > 1
    assert found.manifest.spec.teachers == expected.manifest.spec.teachers
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.utterance_id == theirs.utterance_id
        np.testing.assert_array_equal(ours.targets.class_ids, theirs.targets.class_ids)
        np.testing.assert_allclose(ours.targets.log_probs, theirs.targets.log_probs, atol=1e-5)
        np.testing.assert_allclose(ours.targets.tail_mass, theirs.targets.tail_mass, atol=1e-5)
        assert ours.stats.entropy == pytest.approx(theirs.stats.entropy, abs=1e-5)
