"""Strict models: what a user is told about a bad file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from softlabel_schemas import ClassInventory, InputError
from softlabel_schemas.inventory import check_same_inventory
from softlabel_schemas.selection import Selection, TopK
from softlabel_schemas.spec import DatasetSpec, check_temperatures
from softlabel_schemas.strict import StrictModel, load_toml, parse
from tests.support.datasets import SPEC


class Resources(StrictModel):
    batch_seconds: float = Field(default=60.0, gt=0)


class Job(StrictModel):
    destination: str
    selection: Selection
    resources: Resources = Resources()


GOOD: dict[str, Any] = {"destination": "labels", "selection": {"policy": "top_k", "k": 8}}


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('destination = "labels"\n[selection]\npolicy = "top_k"\nk = 8\n')
    assert load_toml(Job, path) == Job(destination="labels", selection=TopK(k=8))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"destinaton": "x"}, "destinaton: unknown key 'destinaton'; did you mean 'destination'?"),
        (
            {"resources": {"batch_second": 1}},
            "resources.batch_second: unknown key 'batch_second'; did you mean 'batch_seconds'?",
        ),
        ({"batch_seconds": 1}, "batch_seconds: unknown key 'batch_seconds' here; it belongs in another table"),
        (
            {"selection": {"policy": "mass", "mas": 0.9, "max_entries": 3, "mass": 0.9}},
            "selection.mass.mas: unknown key 'mas'; did you mean 'mass'?",
        ),
        ({"zzz": 1}, "zzz: unknown key 'zzz'"),
        ({"destination": 7}, "destination: Input should be a valid string, found 7"),
        ({"resources": {"batch_seconds": 0}}, "resources.batch_seconds: Input should be greater than 0, found 0"),
        ({"resources": {"batch_seconds": float("nan")}}, "resources.batch_seconds: Input should be a finite number"),
        ({"selection": {"policy": "top_k"}}, "selection.top_k.k: Field required"),
        ({"selection": {"policy": "top_k", "k": 2.5}}, "selection.top_k.k: Input should be a valid integer"),
    ],
)
def test_a_bad_key_is_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(Job, GOOD | changes, where="job.toml")
    first, line = str(caught.value).split("\n")
    assert first == "job.toml is not valid:"
    assert line.startswith(f"  {problem}")
    assert problem.endswith("?") or "?" not in line


def test_every_problem_is_named() -> None:
    with pytest.raises(InputError) as caught:
        parse(Job, {"destination": 1, "selection": {"policy": "best"}, "x": 1}, where="here")
    lines = str(caught.value).split("\n")[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["destination", "selection.policy", "x"]


def test_what_is_no_table() -> None:
    with pytest.raises(InputError, match=r"here is not valid:\n  \(whole file\): Input should be"):
        parse(Job, 3, where="here")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"job.toml does not exist; give the path of a TOML file$"):
        load_toml(Job, tmp_path / "job.toml")
    with pytest.raises(InputError, match="is a folder; give the path of a TOML file"):
        load_toml(Job, tmp_path)


@pytest.mark.parametrize("data", [b"a = ", b"\xff"])
def test_what_is_not_toml(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"job.toml is not valid TOML: "):
        load_toml(Job, path)


def test_models_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Resources().batch_seconds = 1.0  # type: ignore[misc]


class TestSpec:
    @pytest.mark.parametrize(
        ("temperatures", "message"),
        [
            ((), "must start with 1.0"),
            ((2.0, 1.0), "must start with 1.0"),
            ((1.0, 2.0, 2.0), "must be distinct and positive"),
            ((1.0, 0.0), "must be distinct and positive"),
        ],
    )
    def test_temperatures(self, temperatures: tuple[float, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_temperatures(temperatures)
        with pytest.raises(InputError, match=message):
            parse(DatasetSpec, SPEC.model_dump() | {"temperatures": temperatures}, where="spec")

    def test_the_fingerprint_depends_on_every_field(self) -> None:
        changes: dict[str, Any] = {
            "corpus_digest": "0" * 64,
            "inventory_digest": "0" * 64,
            "num_classes": 51,
            "frame_shift_ms": 30.0,
            "teachers": [{"name": "tdnn", "digest": "0" * 64, "weight": 1.0}],
            "combination": "log_linear",
            "temperatures": [1.0],
            "selection": {"policy": "top_k", "k": 9},
            "codec": "packed-f32",
            "precision": "bfloat16",
            "combined_from": [{"content_digest": "0" * 64, "weight": 1.0}],
            "subset_of": {"content_digest": "0" * 64, "choice": "10 hours", "choice_digest": "0" * 64},
        }
        changed = [{key: changes[key]} for key in changes]
        # These belong together.
        in_folds = [{"name": "tdnn", "digest": "0" * 64, "weight": 1.0, "fold": fold} for fold in range(3)]
        changed.append({"num_folds": 2, "speakers_digest": "0" * 64, "teachers": in_folds[:2]})
        changed.append({"num_folds": 2, "speakers_digest": "1" * 64, "teachers": in_folds[:2]})
        changed.append({"num_folds": 3, "speakers_digest": "0" * 64, "teachers": in_folds})
        assert {key for each in changed for key in each} == set(DatasetSpec.model_fields) - {"format_version"}
        specs = [DatasetSpec.model_validate(SPEC.model_dump(mode="json") | each) for each in changed]
        assert len({spec.fingerprint() for spec in (SPEC, *specs)}) == len(changed) + 1
        assert DatasetSpec.model_validate(SPEC.model_dump(mode="json")).fingerprint() == SPEC.fingerprint()

    def test_the_weights_of_the_teachers_add_up_to_one(self) -> None:
        teachers = [{"name": name, "digest": "0" * 64, "weight": 0.4} for name in ("tdnn", "blstm")]
        with pytest.raises(InputError, match=r"the weights of the teachers add up to 0.8, expected 1"):
            parse(DatasetSpec, SPEC.model_dump() | {"teachers": teachers}, where="spec")

    def test_another_format_version_is_refused(self) -> None:
        with pytest.raises(InputError, match="format_version: Input should be 1 or 2, found 3"):
            parse(DatasetSpec, SPEC.model_dump() | {"format_version": 3}, where="spec")


class TestInventory:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"names": []}, "an inventory needs at least one class"),
            ({"names": ["a", "b", "a"]}, "class names must be unique, 'a' is repeated"),
            ({"names": ["a", "b"], "phones": ["A"]}, "phones must be given for all 2 classes or none, found 1"),
            (
                {"names": ["a"], "phones": ["A"], "silence_phones": ["SIL"]},
                r"silence_phones \['SIL'\] are not phones of any class",
            ),
        ],
    )
    def test_rules(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            parse(ClassInventory, fields, where="inventory.json")

    def test_load_undoes_to_json(self, tmp_path: Path) -> None:
        inventory = ClassInventory(names=("a_0", "ß_0"), phones=("a", "ß"), silence_phones=("a",))
        path = tmp_path / "inventory.json"
        path.write_bytes(inventory.to_json())
        assert ClassInventory.load(path) == inventory
        assert ClassInventory.load(path).digest() == inventory.digest()

    def test_a_file_that_is_missing_or_is_not_json(self, tmp_path: Path) -> None:
        path = tmp_path / "inventory.json"
        with pytest.raises(InputError, match=r"class inventory .*inventory.json does not exist"):
            ClassInventory.load(path)
        path.write_text("{")
        with pytest.raises(InputError, match=r"inventory.json is not a class inventory: "):
            ClassInventory.load(path)

    def test_phone_ids(self) -> None:
        inventory = ClassInventory(names=("b_0", "a_0", "b_1"), phones=("b", "a", "b"))
        phones, ids = inventory.phone_ids()
        assert phones == ("a", "b")
        assert ids.tolist() == [1, 0, 1]
        with pytest.raises(InputError, match="names no phones"):
            ClassInventory(names=("a",)).phone_ids()

    def test_two_inventories_differ(self) -> None:
        first, second = ClassInventory(names=("a", "b")), ClassInventory(names=("a",))
        check_same_inventory(first, first, expected_in="the corpus", found_in="the teacher")
        with pytest.raises(InputError) as caught:
            check_same_inventory(first, second, expected_in="the corpus", found_in="the teacher")
        assert f"the corpus has 2 classes (digest {first.digest()[:12]})" in str(caught.value)
        assert f"the teacher has 1 (digest {second.digest()[:12]})" in str(caught.value)
