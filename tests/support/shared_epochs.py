"""Two epochs of a training loop as one of several processes runs it, by DistributedDataParallel.

torchrun --nproc-per-node 2 -m tests.support.shared_epochs CONFIG OUTPUT      each process is one
python -m tests.support.shared_epochs CONFIG OUTPUT ray                       Ray Train starts two
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from student_trainer.config import TrainConfig
from student_trainer.loss import hard_loss
from student_trainer.models import frame_mask
from student_trainer.run_folder import build_model
from student_trainer.torch_data import StepDataset, StepLoader
from tests.support.speech import INVENTORY

NUM_EPOCHS = 2


def train_shared(config: TrainConfig, output: Path) -> None:
    """Train by DistributedDataParallel, and write the utterances of each epoch and the weights' sum."""
    rank = distributed.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(build_model(config, INVENTORY))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dataset = StepDataset(config)
    loader = StepLoader(dataset, num_workers=1)
    seen: list[list[str]] = []
    while dataset.epoch < NUM_EPOCHS:
        seen.append([])
        for step in loader:
            batch = step.batch
            logits_BTV, lengths_B = model(batch.features_BTD, batch.lengths_B)
            loss = hard_loss(logits_BTV[frame_mask(lengths_B, logits_BTV.shape[1])], batch.labels_N)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen[-1] += batch.utterance_ids
    weights = float(sum(parameter.detach().double().sum() for parameter in model.parameters()))
    (output / f"rank-{rank}.json").write_text(json.dumps({"seen": seen, "weights": weights}))


def train_on_ray(config: TrainConfig, output: Path) -> None:
    from softlabel_schemas import ray_start  # noqa: F401 - before Ray: it sets what Ray reads when it is imported

    # isort: split
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
    TorchTrainer(
        lambda: train_shared(config, output),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(storage_path=str(output / "ray")),
    ).fit()
    ray.shutdown()


def main() -> None:
    config, output = TrainConfig.model_validate_json(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    if sys.argv[3:] == ["ray"]:
        train_on_ray(config, output)
        return
    distributed.init_process_group("gloo")
    train_shared(config, output)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
