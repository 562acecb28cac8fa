"""Speech with hard labels and soft labels, of each module its own."""

from __future__ import annotations

import pytest

from tests.support.speech import SoftDataset, Speech, write_soft_labels, write_speech


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Speech:
    return write_speech(tmp_path_factory.mktemp("train") / "speech")


@pytest.fixture(scope="module")
def labels(speech: Speech) -> SoftDataset:
    return write_soft_labels(speech.folder / "labels", speech.split("train"))
