"""Teacher bundle: a folder with all that is needed to run one acoustic model, and nothing that executes on reading.

    bundle/
      teacher.json      this module's TeacherBundle
      inventory.json    the class inventory of its outputs
      model.pt2         a torch.export program, or
      model.safetensors weights for a factory named in teacher.json, or for a CTC model of Hugging Face configured there

The model takes features float32 [B, T, D], zero-padded, and lengths int64 [B]; it gives logits [B, T', V] and their
lengths int64 [B].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from softlabel_schemas.digest import canonical_json, parse_json, sha256_hex
from softlabel_schemas.errors import InputError, IntegrityError, NotHereError
from softlabel_schemas.folds import Fold
from softlabel_schemas.front_end import AnyFrontEnd, FrontEnd
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.spec import Sha256
from softlabel_schemas.strict import StrictModel, parse
from softlabel_schemas.transfers import undamaged

DESCRIPTION = "teacher.json"
INVENTORY = "inventory.json"
EXPORTED_PROGRAM = "model.pt2"
WEIGHTS = "model.safetensors"


class ExportedProgram(StrictModel):
    kind: Literal["torch_export"] = "torch_export"
    sha256: Sha256

    @property
    def file(self) -> str:
        return EXPORTED_PROGRAM


class Factory(StrictModel):
    """``package.module:function``, called with ``arguments``, returns the module that the weights are loaded into."""

    kind: Literal["factory"] = "factory"
    factory: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    sha256: Sha256

    @property
    def file(self) -> str:
        return WEIGHTS


class HuggingFaceCtc(StrictModel):
    """A CTC model of the library ``transformers``; ``config`` is what its configuration class is made with."""

    kind: Literal["hugging_face_ctc"] = "hugging_face_ctc"
    model_type: Literal["wav2vec2", "hubert"]
    config: dict[str, JsonValue]
    sha256: Sha256

    @property
    def file(self) -> str:
        return WEIGHTS


class TeacherBundle(StrictModel):
    """Description of a teacher.

    Attributes:
        frame_shift_ms: of its outputs.
        held_out: the fold of speakers that had no part in its training, neither as training nor as dev speech; None where
            nothing is known of that. Whoever trained it says so.
    """

    bundle_version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=200)]
    model: Annotated[ExportedProgram | Factory | HuggingFaceCtc, Field(discriminator="kind")]
    front_end: FrontEnd
    inventory_digest: Sha256
    num_classes: Annotated[int, Field(gt=0)]
    frame_shift_ms: Annotated[float, Field(gt=0)]
    held_out: Fold | None = Field(default=None, exclude_if=lambda held_out: held_out is None)

    def digest(self) -> str:
        """sha256 over all but the name and the fold: what the teacher's outputs are a function of."""
        return sha256_hex(canonical_json(self.model_dump(mode="json", exclude={"name", "held_out"})))


class BundleReader:
    """A bundle at a URL, its description and inventory checked; the weights are read on request.

    Raises:
        InputError: a file is missing or invalid, or the description contradicts the inventory.
    """

    def __init__(self, url: str | Path, storage_options: Mapping[str, Any] | None = None) -> None:
        self.store = ObjectStore(url, storage_options)
        where = self.store.describe(DESCRIPTION)
        self.description = parse(TeacherBundle, _json(self._read(DESCRIPTION), where), where=where)
        self.inventory = ClassInventory.from_json(self._read(INVENTORY), where=self.store.describe(INVENTORY))
        found = (self.inventory.digest(), self.inventory.num_classes)
        expected = (self.description.inventory_digest, self.description.num_classes)
        if found != expected:
            raise InputError(
                f"{self.store.url}: inventory.json has (digest, classes) {found}, teacher.json says {expected}"
            )

    def _read(self, name: str) -> bytes:
        try:
            return self.store.read(name)
        except FileNotFoundError as error:
            raise NotHereError(
                f"{self.store.url} is not a teacher bundle: {error}; 'teacher-service import-hf' and 'student-trainer export' "
                "make bundles"
            ) from None

    def read_model(self) -> bytes:
        """The model file's bytes. Raises IntegrityError unless they have the digest that teacher.json names."""
        return undamaged(self.store, self._read_model)

    def _read_model(self) -> bytes:
        data = self._read(self.description.model.file)
        if sha256_hex(data) != self.description.model.sha256:
            raise IntegrityError(
                f"{self.store.describe(self.description.model.file)}: sha256 is {sha256_hex(data)}, "
                f"teacher.json says {self.description.model.sha256}"
            )
        return data


def write_bundle(
    url: str | Path,
    *,
    name: str,
    model: bytes,
    factory: str | None = None,
    arguments: Mapping[str, JsonValue] | None = None,
    front_end: AnyFrontEnd,
    inventory: ClassInventory,
    frame_shift_ms: float,
    held_out: Fold | None = None,
    replace: bool = False,
) -> TeacherBundle:
    """Write a bundle; ``factory`` None means that ``model`` is a torch.export program, else it is safetensors, for what calling
    the factory with ``arguments`` returns.

    The description is written last, so that a half-written bundle is not taken for one. Another bundle at ``url`` stays, unless
    ``replace`` is set.

    Raises:
        InputError: another bundle is there.
    """
    stored: dict[str, Any] = {"kind": "torch_export"}
    if factory is not None:
        stored = {"kind": "factory", "factory": factory, "arguments": dict(arguments or {})}
    fields = {"name": name, "model": stored, "frame_shift_ms": frame_shift_ms, "held_out": held_out}
    return write_model(url, model, fields, front_end=front_end, inventory=inventory, replace=replace)


def write_model(
    url: str | Path,
    model: bytes,
    fields: dict[str, Any],
    *,
    front_end: AnyFrontEnd,
    inventory: ClassInventory,
    replace: bool = False,
) -> TeacherBundle:
    """Write a bundle of any kind of model, as :func:`write_bundle` does.

    Args:
        model: bytes of the model's file.
        fields: of the description, without those that follow from the other arguments.
    """
    described = {
        **fields,
        "model": {**fields["model"], "sha256": sha256_hex(model)},
        "front_end": front_end.model_dump(mode="json"),
        "inventory_digest": inventory.digest(),
        "num_classes": inventory.num_classes,
    }
    description = parse(TeacherBundle, described, where="teacher bundle")
    store = ObjectStore(url)
    data = canonical_json(description.model_dump(mode="json"))
    if not replace:
        _check_no_other(store, data)
    store.put(description.model.file, model)
    store.put(INVENTORY, inventory.to_json())
    store.put(DESCRIPTION, data)
    return description


def _check_no_other(store: ObjectStore, data: bytes) -> None:
    """Raises InputError where there is a bundle of another description than ``data``."""
    if store.read_if_there(DESCRIPTION) not in (None, data):
        raise InputError(f"{store.url} holds another bundle already; give another folder, or delete that one")


def _json(data: bytes, where: str) -> Any:
    try:
        return parse_json(data)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None
