"""Load a teacher bundle and run it: features -> logits."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from softlabel_schemas.bundle import BundleReader, ExportedProgram, Factory, HuggingFaceCtc
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.folds import Fold
from softlabel_schemas.front_end import AnyFrontEnd
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.spec import DatasetSpec
from teacher_service.config import JobConfig, TeacherConfig
from teacher_service.exported_program import load_exported_program

# How torch's errors of a device that has failed begin. Newer versions have a class for the first ones (AcceleratorError).
_DEVICE_FAULTS = (
    "CUDA error",
    "CUDA driver error",
    "HIP error",
    "cuDNN error",
    "CUBLAS_STATUS",
    "CUSOLVER_STATUS",
    "cuFFT error",
)
# Bundles that `student-trainer export` writes name this factory; any other must be allowed by the job.
_OWN_FACTORY = "student_trainer.models:build_acoustic_model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """One loaded model.

    Attributes:
        weight: normalised over the ensemble (of the fold).
        fold: the only one it labels; None labels everything.
        autocast: to bfloat16. The weights stay float32: an exported program has its types written into the graph.
    """

    name: str
    weight: float
    fold: int | None
    front_end: AnyFrontEnd
    inventory: ClassInventory
    model: nn.Module
    device: torch.device
    autocast: bool

    @property
    def emulates_bfloat16(self) -> bool:
        """Whether it computes in bfloat16 without instructions for that, which takes many times as long as float32."""
        if not self.autocast:
            return False
        if self.device.type == "cuda":
            return not torch.cuda.is_bf16_supported(including_emulation=False)
        # What torch itself asks before it takes oneDNN's kernels, the only fast ones.
        has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return not (has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def logits(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits float [B, T', V] on the teacher's device, ready for any of its streams, and lengths int64 [B].

        Raises:
            InputError: the model does not take these features or does not give what a bundle promises; both shapes are named.
        """
        inputs = features_BTD.to(self.device, non_blocking=True), lengths_B.to(self.device)
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                outputs = self.model(*inputs)
        except AssertionError as error:
            # Exported programs check so that sizes are those they were exported for.
            raise InputError(
                f"teacher '{self.name}' refuses features of shape {tuple(features_BTD.shape)}: {error}"
            ) from None
        if self.device.type == "cuda":
            # Capture reads the logits on a stream of its own. The reading of the lengths, below, waits for them only where they
            # are on the GPU: pad_packed_sequence gives them on the CPU. Waited for here and not by capture's stream, since
            # capture begins when the next batch's model may be queued behind this one, and would wait for both.
            torch.cuda.current_stream(self.device).synchronize()
        if not isinstance(outputs, tuple | list) or [isinstance(each, Tensor) for each in outputs] != [True, True]:
            raise InputError(f"teacher '{self.name}' gives no pair of tensors, expected logits and their lengths")
        logits_BTV, lengths_B = outputs
        expected = (features_BTD.shape[0], self.inventory.num_classes)
        if logits_BTV.ndim != 3 or (logits_BTV.shape[0], logits_BTV.shape[2]) != expected:
            raise InputError(
                f"teacher '{self.name}' gives logits of shape {tuple(logits_BTV.shape)}, "
                f"expected [{expected[0]}, frames, {expected[1]}]"
            )
        if lengths_B.shape != (expected[0],) or lengths_B.is_floating_point():
            raise InputError(
                f"teacher '{self.name}' gives lengths of shape {tuple(lengths_B.shape)} and type {lengths_B.dtype}, "
                f"expected integers [{expected[0]}]"
            )
        low, high = int(lengths_B.min()), int(lengths_B.max())
        if low < 0 or high > logits_BTV.shape[1]:
            raise InputError(
                f"teacher '{self.name}' gives lengths from {low} to {high} for logits of {logits_BTV.shape[1]} frames"
            )
        return logits_BTV, lengths_B


def is_device_fault(error: Exception) -> bool:
    """Whether nothing that the process gives to its device can be expected to work any more."""
    return isinstance(error, RuntimeError) and any(fault in str(error) for fault in _DEVICE_FAULTS)


def lacks_memory(error: Exception) -> bool:
    """Of the GPU, or of the machine, which torch says in words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def check_gpu(config: JobConfig) -> None:
    """Raises InputError where the job labels on GPUs and this machine has none.

    Not for actors: there it is a fault of one node, the driver tries another, and an InputError would end the job.
    """
    if config.resources.gpus_per_actor > 0 and not torch.cuda.is_available():
        raise InputError(
            f"resources.gpus_per_actor is {config.resources.gpus_per_actor:g}: the job labels on GPUs, and torch "
            f"{torch.__version__} finds none here; use a machine of the kind that labels"
        )


def load_teachers(config: JobConfig, spec: DatasetSpec) -> list[Teacher]:
    """The ensemble, ready to run in this process with the threads of an actor.

    Raises:
        InputError: a bundle is no longer the one of ``spec``; also as :func:`load_teacher`.
        IntegrityError, OSError: as :func:`load_teacher`.
    """
    resources = config.resources
    torch.set_num_threads(resources.cpus_per_actor)
    device = "cuda" if resources.gpus_per_actor > 0 else "cpu"
    teachers = []
    for teacher, member in zip(config.teachers, spec.teachers, strict=True):
        reader = BundleReader(teacher.bundle)
        _check_unchanged(reader, member.digest)
        check_held_out(teacher, reader, spec.num_folds)
        teachers.append(
            load_teacher(teacher, reader, weight=member.weight, device=device, precision=resources.precision)
        )
    return teachers


def load_teacher(config: TeacherConfig, reader: BundleReader, *, weight: float, device: str, precision: str) -> Teacher:
    """``reader`` is of ``config.bundle``.

    Raises:
        InputError, IntegrityError: the bundle cannot be used.
        OSError: not on this machine, which lacks a package or cannot read it.
    """
    bundle = reader.description
    check_factory(config, reader)
    try:
        model = _model(config.bundle, bundle.model, reader.read_model(), device)
    except ImportError as error:
        # Another machine may have it: an InputError would end the job.
        raise OSError(f"{config.bundle}: this machine lacks a package that the model needs: {error}") from None
    return Teacher(
        name=bundle.name,
        weight=weight,
        fold=config.fold,
        front_end=bundle.front_end,
        inventory=reader.inventory,
        model=model.to(device),
        device=torch.device(device),
        autocast=precision == "bfloat16",
    )


def _model(where: str, description: Factory | HuggingFaceCtc | ExportedProgram, data: bytes, device: str) -> nn.Module:
    if isinstance(description, Factory):
        model = _build(description, where=where)
        try:
            model.load_state_dict(safetensors.torch.load(data))
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise IntegrityError(f"{where}: weights do not fit {description.factory}: {error}") from None
        return model.eval()
    if isinstance(description, HuggingFaceCtc):
        # Here: other teachers do without transformers, whose import takes seconds.
        from teacher_service.hugging_face import build_ctc_model

        return build_ctc_model(description, data, where=where)
    # A module from torch.export is in evaluation mode already and refuses eval().
    return load_exported_program(data, where=f"{where}/{description.file}", device=device)


def check_factory(config: TeacherConfig, reader: BundleReader) -> None:
    """Raises InputError where the bundle names a factory that the job does not allow: calling it runs its code."""
    model = reader.description.model
    if not isinstance(model, Factory):
        return
    called = model.factory
    if called == _OWN_FACTORY:
        # It imports what its architecture names, if that is not one of its own.
        called = str(model.arguments.get("architecture", ""))
        if ":" not in called:
            return
    if called != config.allow_factory:
        raise InputError(
            f"{config.bundle}: the model is made by calling {called}; if you trust it, say so in the job: "
            f'allow_factory = "{called}"'
        )


def check_held_out(config: TeacherConfig, reader: BundleReader, num_folds: int | None) -> None:
    """Raises InputError unless the bundle says that the fold it is to label had no part in its training."""
    if num_folds is None or config.fold is None:
        return
    wanted, found = Fold(num_folds=num_folds, fold=config.fold), reader.description.held_out
    if found is None:
        raise InputError(
            f"{reader.store.url}: teacher.json does not say that its training held out {wanted}, which the job has it label; "
            "train it with corpus.num_folds and corpus.held_out_fold and export it again, or, if it was trained elsewhere "
            f'without these speakers, add "held_out": {wanted.model_dump_json()} there'
        )
    if found != wanted:
        raise InputError(
            f"{reader.store.url}: its training held out {found}, the job has it label {wanted}, whose speakers it may have "
            "heard; give each teacher the fold that it was trained without"
        )


def _check_unchanged(reader: BundleReader, digest: str) -> None:
    """Raises InputError where the bundle has another digest. Actors are started hours after the job was prepared, too: the
    labels of a bundle that was replaced meanwhile would be committed as those of the one before."""
    found = reader.description.digest()
    if found != digest:
        raise InputError(
            f"{reader.store.url} changed while the job was running: expected the bundle with the digest {digest}, found "
            f"{found}; put the former one back and run again, which resumes, or label with this one to another destination"
        )


def _build(description: Factory, *, where: str) -> nn.Module:
    module_name, _, function_name = description.factory.partition(":")
    arguments: dict[str, Any] = dict(description.arguments)
    try:
        model = getattr(importlib.import_module(module_name), function_name)(**arguments)
    except (ImportError, OSError, MemoryError, RuntimeError):
        # Of the machine: another may do.
        raise
    except Exception as error:  # noqa: BLE001 - a factory is a user's code
        raise InputError(
            f"{where}: {description.factory} cannot be called with {arguments}: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(model, nn.Module):
        raise InputError(f"{where}: {description.factory} returned {type(model).__name__}, expected a torch module")
    return model
