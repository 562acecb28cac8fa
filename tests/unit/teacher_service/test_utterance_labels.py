"""The stream that captures run on. What they give is tested in ``test_pipeline`` and ``test_narrowing``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from softlabel_schemas import Utterance
from softlabel_schemas.selection import TopK
from teacher_service import utterance_labels
from teacher_service.capture import capture
from teacher_service.selection import Selected
from teacher_service.utterance_labels import Outputs, label_outputs
from tests.support.datasets import NUM_CLASSES, make_document

# No machine has it: what stands for its stream is in no other test's way.
GPU = torch.device("cuda", 99)


class OnGpu(torch.Tensor):
    """Says so."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU


def test_all_captures_on_a_device_share_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    made, used = list[torch.device](), list[object]()

    def stream(device: torch.device) -> object:
        made.append(device)
        return object()

    def use(stream: object) -> AbstractContextManager[None]:
        used.append(stream)
        return nullcontext()

    def captured(logits: list[torch.Tensor], *args: Any) -> Selected:
        return capture([each.as_subclass(torch.Tensor) for each in logits], *args)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(utterance_labels, "capture", captured)
    document = make_document(1, shard_format="parquet", codec="packed-f32", num_shards=1)
    spec = document.spec.model_copy(update={"selection": TopK(k=3), "temperatures": (1.0,)})
    row = Utterance(utterance_id="utt", audio="a.wav", sample_rate=1, num_samples=1, split="a")
    logits_BTV = torch.zeros(1, 5, NUM_CLASSES)
    for each in (logits_BTV.as_subclass(OnGpu), logits_BTV.as_subclass(OnGpu), logits_BTV):
        outputs = Outputs(indices=[0], logits=[each], lengths=[torch.tensor([5])])
        assert label_outputs([row], outputs, ["a"], [1.0], spec, np.zeros(0, dtype=bool)).keys() == {0}
    assert made == [GPU]
    assert len(used) == 2
    assert used[0] is used[1]
