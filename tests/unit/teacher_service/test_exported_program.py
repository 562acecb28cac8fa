"""Exported programs: ordinary ones run as the model they were made from, hostile ones are refused and run nothing.

Each attack would leave a file named "canary" in the working directory, on loading or on the first call.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softlabel_schemas import InputError
from teacher_service.exported_program import load_exported_program
from tests.support.teachers import eager_model, export, exported_program

CANARY = "open('canary', 'w').close()"
# Paths of attributes are cut at dots.
PATH_ATTACK = "forward\"), open('canary', 'w'), (\""
GRAPH = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
CONSTANTS = "archive/data/constants/model_constants_config.json"
SAMPLE_INPUTS = "archive/data/sample_inputs/model.pt"

Records = dict[str, bytes]


# Ordinary programs


@pytest.mark.parametrize("architecture", ["tdnn", "conv_glu", "conformer"])
def test_equals_the_model_it_was_exported_from(architecture: str) -> None:
    program = load_exported_program(exported_program(architecture), where="model.pt2")
    generator = torch.Generator().manual_seed(0)
    for lengths in ([32, 20], [7], [3, 50, 1, 50]):
        features_BTD = torch.randn(len(lengths), max(lengths), 40, generator=generator)
        with torch.inference_mode():
            found_BTV, found_B = program(features_BTD, torch.tensor(lengths))
            expected_BTV, _ = eager_model(architecture)(features_BTD, torch.tensor(lengths))
        torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-4, atol=1e-5)
        assert found_B.tolist() == lengths


def test_a_device_that_fails_is_not_the_programs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """An InputError would end the job, where another machine may have a device that works."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("teacher_service.exported_program.move_to_device_pass", fail)
    with pytest.raises(torch.OutOfMemoryError):
        load_exported_program(exported_program("tdnn"), where="model.pt2", device="cuda")


class Strided(nn.Module):
    """A user's own, with much that the project's own models lack: buffers of both kinds, a constant, a stride, infinity,
    operators with names for arguments, an attribute path with numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.BatchNorm1d(6)])
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("deviation", torch.rand(4) + 1, persistent=False)
        self.scale = torch.tensor([0.5])

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (((features_BTD - self.mean) / self.deviation) * self.scale).transpose(1, 2)
        for layer in self.layers:
            hidden = layer(hidden)
        lengths_B = torch.div(lengths_B - 1, 2, rounding_mode="floor") + 1
        past_end_BT = torch.arange(hidden.shape[2])[None] >= lengths_B[:, None]
        hidden = nn.functional.gelu(hidden, approximate="tanh").masked_fill(past_end_BT[:, None], -torch.inf)
        return hidden.transpose(1, 2), lengths_B


def test_a_users_own_model() -> None:
    model = Strided().eval()
    dynamic = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        example = (torch.randn(4, 32, 4), torch.tensor([32, 30, 9, 1]))
        torch.export.save(
            torch.export.export(model, example, dynamic_shapes=({0: dynamic, 1: dynamic}, {0: dynamic})), buffer
        )
    program = load_exported_program(buffer.getvalue(), where="model.pt2")
    inputs = (torch.randn(3, 21, 4), torch.tensor([21, 6, 13]))
    with torch.inference_mode():
        for found, expected in zip(program(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(found, expected)


def test_the_device_reaches_into_the_graph() -> None:
    """Masks are made on the device of the export; a meta tensor stands for one on a GPU."""
    program = load_exported_program(exported_program("conformer"), where="model.pt2", device="meta")
    logits_BTV, lengths_B = program(
        torch.zeros(3, 9, 40, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta")
    )
    assert (logits_BTV.device.type, lengths_B.device.type) == ("meta", "meta")
    assert logits_BTV.shape == (3, 9, 12)


# Attacks


class Attack:
    """Pickles as a call that leaves the canary."""

    def __reduce__(self) -> Any:
        return exec, (CANARY,)


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def records_of(data: bytes) -> Records:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(records: Records | list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        # One attack has a name twice.
        warnings.simplefilter("ignore")
        for name, data in records.items() if isinstance(records, dict) else records:
            archive.writestr(name, data)
    return buffer.getvalue()


def edited(name: str, edit: Callable[[Any], None]) -> Callable[[Records], None]:
    """An attack that changes one JSON record."""

    def apply(records: Records) -> None:
        document = json.loads(records[name])
        edit(document)
        records[name] = json.dumps(document).encode()

    return apply


def graph_attack(edit: Callable[[Any], None]) -> Callable[[Records], None]:
    return edited(GRAPH, edit)


def nodes(document: Any) -> list[Any]:
    return document["graph_module"]["graph"]["nodes"]


def signature(document: Any) -> Any:
    return document["graph_module"]["module_call_graph"][0]["signature"]


def dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from dictionaries(item)


def set_everywhere(key: str, value: Any) -> Callable[[Records], None]:
    def edit(document: Any) -> None:
        found = [fields for fields in dictionaries(document) if key in fields]
        assert found, key
        for fields in found:
            fields[key] = value

    return graph_attack(edit)


def call(target: str, *arguments: dict[str, Any]) -> Callable[[Records], None]:
    """An attack that calls an operator before all others."""

    def edit(document: Any) -> None:
        inputs = [{"name": name, "arg": argument, "kind": 1} for entry in arguments for name, argument in entry.items()]
        metas = document["graph_module"]["graph"]["tensor_values"]
        metas["attack"] = copy.deepcopy(next(iter(metas.values())))
        outputs = [{"as_tensor": {"name": "attack"}}]
        node = {"target": target, "inputs": inputs, "outputs": outputs, "metadata": {}, "name": "attack"}
        nodes(document).insert(0, {**node, "is_hop_single_tensor_return": None})

    return graph_attack(edit)


def string(name: str, value: str) -> dict[str, Any]:
    return {name: {"as_string": value}}


def pickled_weight(records: Records) -> None:
    def edit(document: Any) -> None:
        next(iter(document["config"].values()))["use_pickle"] = True

    edited(WEIGHTS, edit)(records)
    records["archive/data/weights/weight_0"] = pickled(Attack())


def pickled_constant(path_name: str) -> Callable[[Records], None]:
    payload = {"path_name": path_name, "is_param": False, "use_pickle": True, "tensor_meta": None}

    def apply(records: Records) -> None:
        edited(CONSTANTS, lambda document: document["config"].update(attack=payload))(records)
        records[f"archive/data/constants/{path_name}"] = pickled(Attack())

    return apply


def constant_beside_its_folder(records: Records) -> None:
    payload = {"path_name": "../weights/weight_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
    edited(CONSTANTS, lambda document: document["config"].update(attack=payload))(records)


def parameter_name(records: Records) -> None:
    """Names of parameters become ``getattr(self, "name")`` in generated source."""
    evil, old = PATH_ATTACK, "encoder.layers.0.bias"

    def rename(document: Any) -> None:
        spec = next(s["parameter"] for s in document["graph_module"]["signature"]["input_specs"] if "parameter" in s
                    and s["parameter"]["parameter_name"] == old)  # fmt: skip
        spec["parameter_name"] = evil

    edited(GRAPH, rename)(records)
    edited(WEIGHTS, lambda document: document["config"].update({evil: document["config"].pop(old)}))(records)


def parameter_name_in_the_graph_alone(records: Records) -> None:
    set_everywhere("parameter_name", PATH_ATTACK)(records)


def dunder_parameter(records: Records) -> None:
    set_everywhere("parameter_name", "encoder.__class__.forward")(records)


def keyword_names(document: Any) -> None:
    """Names of keyword arguments become parameters of the generated function."""
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = json.loads(signature(document)["in_spec"])
    spec[1]["children_spec"][1] |= {"context": json.dumps([f"x={CANARY}"]), "children_spec": [leaf]}
    signature(document)["in_spec"] = json.dumps(spec)


def enumeration(document: Any) -> None:
    """Tree specs import the modules of enumerations."""
    spec = json.loads(signature(document)["in_spec"])
    spec[1]["children_spec"][1]["context"] = json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "x"}])
    signature(document)["in_spec"] = json.dumps(spec)


def named_sym_int(document: Any) -> None:
    found = [fields for fields in dictionaries(document) if "as_name" in fields]
    assert found
    for fields in found:
        fields["as_name"] = f"x\n{CANARY}\n"


def node_output(document: Any) -> None:
    nodes(document)[0]["outputs"] = [{"as_tensor": {"name": f"x\n{CANARY}\n"}}]


def tensor_value(document: Any) -> None:
    values = document["graph_module"]["graph"]["tensor_values"]
    values[f"x\n{CANARY}\n"] = values.pop(next(iter(values)))


def second_graph(records: Records) -> None:
    other = json.loads(records[GRAPH])
    signature(other)["forward_arg_names"] = [f"x={CANARY}", "y"]
    records["archive/models/other.json"] = json.dumps(other).encode()


def extra(name: str, data: bytes = b"") -> Callable[[Records], None]:
    return lambda records: records.update({name: data})


ATTACKS: dict[str, tuple[Callable[[Records], None], str]] = {
    "a pickled weight": (pickled_weight, "asks for unpickling 'weight_0'"),
    "a pickled constant": (pickled_constant("tensor_0"), "asks for unpickling 'tensor_0'"),
    "an opaque object": (pickled_constant("opaque_obj_0"), "asks for unpickling|unexpected record"),
    "a custom object": (pickled_constant("custom_obj_0"), "asks for unpickling|unexpected record"),
    "a path out of its folder": (constant_beside_its_folder, "asks for unpickling '../weights/weight_0'"),
    "legacy weights": (extra("archive/data/weights/model.pt", pickled(Attack())), "model.pt is an unexpected record"),
    "an extra record": (extra("archive/extra/notes.txt"), "notes.txt is an unexpected record"),
    "a compiled library": (extra("archive/data/aotinductor/model/a.so"), "a.so is an unexpected record"),
    "a second graph": (second_graph, "other.json is an unexpected record"),
    "a second folder": (extra("other/models/model.json", b"{}"), "outside the archive's folder"),
    "a graph named as a plain record": (extra("archive/models/a/byteorder", b"{}"), "byteorder is an unexpected record"),
    "a shape expression": (
        set_everywhere("expr_str", "__import__('os').close(1)"),
        r"is not plain arithmetic of shape symbols",
    ),
    "a shape expression with a method": (set_everywhere("expr_str", "s0.free_symbols"), "is not plain arithmetic"),
    "a shape expression on two lines": (set_everywhere("expr_str", f"s0\n{CANARY}"), "is not plain arithmetic"),
    "a guard": (graph_attack(lambda g: g.update(guards_code=[CANARY])), "is not a comparison of sizes"),
    "a guard with a size": (
        graph_attack(lambda g: g.update(guards_code=[f"L['features_BTD'].size()[0] == {CANARY}"])),
        "is not a comparison of sizes",
    ),
    "torch.load": (call("torch.load", string("f", "canary")), "'torch.load' is not an ATen operator"),
    "a function of a module": (call("torch.os.system", string("command", "touch canary")), "is not an ATen operator"),
    "methodcaller": (call("_operator.methodcaller", string("name", "x")), "is not an ATen operator"),
    "an operator of another library": (call("torch.ops.inductor.x.default"), "is not an ATen operator"),
    "a higher-order operator": (call("torch.ops.higher_order.run_with_rng_state"), "is not an ATen operator"),
    "an attribute of an operator": (call("torch.ops.aten.add.__init__"), "is not an ATen operator"),
    "an attribute of the namespace": (call("torch.ops.aten.__getattr__.__call__"), "is not an ATen operator"),
    "an operator as an argument": (
        call("torch.ops.aten.relu.default", {"self": {"as_operator": "torch.load"}}),
        "'torch.load' is not an ATen operator",
    ),
    "a file made by an operator": (
        call(
            "torch.ops.aten.from_file.default",
            string("filename", "canary"),
            {"shared": {"as_bool": True}},
            {"size": {"as_int": 8}},
        ),
        "from_file.default' is not an ATen operator that opens no file",
    ),
    "a file saved by an operator": (
        call("torch.ops.aten.save.default", {"item": {"as_int": 1}}, string("filename", "canary")),
        "save.default' is not an ATen operator that opens no file",
    ),
    "the name of a parameter": (parameter_name, "is not a plain name"),
    "the name of a parameter in the graph": (parameter_name_in_the_graph_alone, "is not a plain name"),
    "a parameter of a class": (dunder_parameter, "'encoder.__class__.forward' is not a plain name"),
    "the name of an argument": (
        graph_attack(lambda g: signature(g).update(forward_arg_names=[f"x={CANARY}", "y"])),
        "is not a plain name",
    ),
    "the name of a keyword": (graph_attack(keyword_names), "is not the structure of two inputs"),
    "an enumeration": (graph_attack(enumeration), "is not the structure of two inputs"),
    "the name of a size": (graph_attack(named_sym_int), "is not a plain name"),
    "the name of an output": (graph_attack(node_output), "is not a plain name"),
    "the name of a tensor": (graph_attack(tensor_value), "is not a plain name"),
    "the name of a node": (
        graph_attack(lambda g: nodes(g)[0].update(name=f"x\n{CANARY}\n")),
        "is not a plain name",
    ),
    "a list for a name": (graph_attack(lambda g: nodes(g)[0].update(name=[CANARY])), "is not a plain name"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "canary"


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(attack: str, canary: Path) -> None:
    apply, message = ATTACKS[attack]
    records = records_of(exported_program("tdnn"))
    apply(records)
    with pytest.raises(InputError, match=message) as caught:
        run(archive_of(records))
    assert str(caught.value).startswith("bundle/model.pt2")
    assert not canary.exists()


def run(data: bytes) -> None:
    """Some attacks would strike on the first call only."""
    load_exported_program(data, where="bundle/model.pt2")(torch.zeros(3, 9, 40), torch.tensor([9, 4, 1]))


@pytest.mark.parametrize(
    "inputs",
    [
        Attack(),
        (
            ({"'' + str(exec(chr(111) + \"pen('canary','w')\")) + ''": torch.zeros(2, 32, 40)}, torch.tensor([32, 20])),
            {},
        ),
    ],
    ids=["a pickle", "keys that end up in the source of guards"],
)
def test_sample_inputs_are_not_read(inputs: Any, canary: Path) -> None:
    records = records_of(exported_program("tdnn"))
    records[SAMPLE_INPUTS] = pickled(inputs)
    run(archive_of(records))
    assert not canary.exists()


def test_metadata_is_not_read() -> None:
    """Whoever reads it imports what it names, and fails on this."""
    records = records_of(exported_program("tdnn"))

    def edit(document: Any) -> None:
        for fields in dictionaries(document):
            if "metadata" in fields:
                fields["metadata"] = {"source_fn_stack": "x,torch.load", "custom": "not JSON"}

    graph_attack(edit)(records)
    run(archive_of(records))


def test_a_record_that_is_there_twice() -> None:
    """Which of the two counts depends on the reader, so a check of one says nothing of the other."""
    records = records_of(exported_program("tdnn"))
    bad = dict(records)
    graph_attack(lambda g: signature(g).update(forward_arg_names=[f"x={CANARY}", "y"]))(bad)
    for first, second in ((records, bad), (bad, records)):
        data = archive_of(
            [(GRAPH, first[GRAPH]), *((n, d) for n, d in records.items() if n != GRAPH), (GRAPH, second[GRAPH])]
        )
        with pytest.raises(InputError, match="there twice"):
            run(data)


def test_what_one_zip_reader_sees_and_another_does_not(canary: Path) -> None:
    """Later versions of Python find the archive inconsistent; all run nothing but what was checked."""
    good, bad = records_of(exported_program("tdnn")), records_of(exported_program("tdnn"))
    ATTACKS["a file made by an operator"][0](bad)
    with contextlib.suppress(InputError):
        run(two_directories(hidden=archive_of(bad), shown=archive_of(good)))
    assert not canary.exists()


def two_directories(*, hidden: bytes, shown: bytes) -> bytes:
    """Two archives in one. The Zip64 locator points at the end record of ``hidden``; that of ``shown`` lies before it, where
    Python looks."""

    def end_record(data: bytes, shift: int) -> bytes:
        count, size, offset = struct.unpack("<H2L", data[-12:-2])
        return struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset + shift)

    prefix = hidden + end_record(hidden, 0)
    _, size, offset = struct.unpack("<H2L", shown[-12:-2])
    directory = bytearray(shown[offset : offset + size])
    position = 0
    while position < size:
        file_offset = struct.unpack_from("<L", directory, position + 42)[0]
        struct.pack_into("<L", directory, position + 42, file_offset + len(prefix))
        position += 46 + sum(struct.unpack_from("<3H", directory, position + 28))
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(hidden), 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return prefix + shown[:offset] + directory + end_record(shown, len(prefix)) + locator + end


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a zip archive",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: archive_of({}),
        lambda data: archive_of({"archive/archive_format": b"pt2"}),
        lambda data: archive_of({**records_of(data), GRAPH: b"[]"}),
        lambda data: archive_of({**records_of(data), GRAPH: b"{"}),
        lambda data: archive_of({**records_of(data), GRAPH: b"[" * 100_000}),
        lambda data: archive_of({**records_of(data), GRAPH: b'{"graph_module": {"module_call_graph": []}}'}),
        lambda data: archive_of({**records_of(data), WEIGHTS: b'{"config": {"a": []}}'}),
        lambda data: archive_of({n: d for n, d in records_of(data).items() if not n.endswith("weight_0")}),
        lambda data: archive_of({**records_of(data), "archive/data/weights/weight_0": b"12"}),
    ],
)
def test_damage_is_an_input_error(damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(InputError, match=r"^bundle/model\.pt2"):
        load_exported_program(damage(exported_program("tdnn")), where="bundle/model.pt2")


def test_a_model_of_one_input_is_not_a_teacher() -> None:
    class OneInput(nn.Module):
        def forward(self, features_BTD: Tensor) -> tuple[Tensor]:
            return (features_BTD * 2,)

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(OneInput(), (torch.zeros(2, 3, 4),)), buffer)
    with pytest.raises(InputError, match="is not the structure of two inputs"):
        load_exported_program(buffer.getvalue(), where="bundle/model.pt2")


def test_export_helper_is_ordinary() -> None:
    """The attacks start from an archive that is accepted as it is, also when it is written by another program."""
    run(archive_of(records_of(export(eager_model("tdnn"), 40))))
