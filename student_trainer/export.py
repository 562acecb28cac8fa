"""Make a trained model a teacher bundle: a student can teach."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import safetensors.torch
import torch

from softlabel_schemas.bundle import TeacherBundle, write_bundle
from softlabel_schemas.errors import InputError
from student_trainer.models import AcousticModel
from student_trainer.run_folder import RunFolder, weights_of

FACTORY = "student_trainer.models:build_acoustic_model"


def export(run: str | Path, bundle: str | Path, *, name: str | None = None) -> TeacherBundle:
    """Write the run's model as a bundle; only the decoding head goes along, and the fold of speakers that was held out.

    A torch.export program where the architecture allows one (needs nothing but torch to run), otherwise a factory with
    safetensors: torch.export fixes the time axis of ``nn.LSTM``.

    Raises:
        InputError: the run has no trained model or is not complete, or another bundle is there.
    """
    folder = RunFolder(run)
    model, config, inventory = folder.load_model()
    if unfinished := folder.unfinished():
        raise InputError(f"{run} {unfinished}; finish it with 'student-trainer train', then export it")
    model.heads = torch.nn.ModuleList([model.heads[0]])
    recurrent = any(isinstance(module, torch.nn.RNNBase) for module in model.modules())
    if recurrent or ":" in config.model.architecture:
        data, factory = safetensors.torch.save(weights_of(model)), FACTORY
    else:
        data, factory = _exported_program(model, config.front_end.num_features), None
    return write_bundle(
        bundle,
        name=name or config.name,
        model=data,
        factory=factory,
        arguments={
            "architecture": config.model.architecture,
            "num_features": config.front_end.num_features,
            "num_classes": inventory.num_classes,
            "arguments": dict(config.model.arguments),
        },
        front_end=config.front_end,
        inventory=inventory,
        frame_shift_ms=config.front_end.output_frame_shift_ms * getattr(model.encoder, "subsampling", 1),
        held_out=config.corpus.held_out,
    )


def _exported_program(model: AcousticModel, num_features: int) -> bytes:
    batch, time = torch.export.Dim("batch", min=1, max=1 << 16), torch.export.Dim("time", min=1, max=1 << 20)
    example = (torch.zeros(2, 32, num_features), torch.tensor([32, 20]))
    with warnings.catch_warnings():
        # torch.export warns about its own internals (deprecated traversal of pytrees).
        warnings.simplefilter("ignore")
        program = torch.export.export(model, example, dynamic_shapes=({0: batch, 1: time}, {0: batch}))
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                # Names files of this machine: a bundle would have another digest in another folder.
                node.meta.pop("stack_trace", None)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    return buffer.getvalue()
