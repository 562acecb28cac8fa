"""Load a torch.export program that somebody else made, without running code from it.

``torch.export.load`` (2.13) unpickles some records, and makes Python source, which it executes, out of shape expressions,
guards, and the names of arguments, nodes, parameters and sample inputs; operators may open files. Bundles are shared
between teams, so torch never sees the archive that came, but a copy of what was understood: raw tensors, and a graph in
which every string is a plain name, arithmetic of shape symbols, a comparison of sizes, or an ATen operator that opens no
file. A copy, because two readers of one zip archive need not agree on what is in it. What an ordinary export of an acoustic
model contains passes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from softlabel_schemas.errors import InputError

_GRAPH = "models/model.json"
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_COPIED = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder"
    r"|\.data/version|\.data/serialization_id"
)

_NAME = re.compile(r"[\w.]*", re.ASCII)
# Parts of a path to an attribute of the module, which is set: not those that are Python's own.
_ATTRIBUTE = re.compile(r"(?!__)\w+(\.(?!__)\w+)*", re.ASCII)
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_SYMBOL_CALL = re.compile(r"Symbol\('[suz]+\d+'(?:, [a-z]+=(?:True|False))*\)", re.ASCII)
_SYMBOL = re.compile(r"[suz]+\d+", re.ASCII)
_FUNCTIONS = frozenset({"FloorDiv", "CleanDiv", "CeilToInt", "Mod", "PythonMod", "ModularIndexing", "Max", "Min", "Integer",
                        "Eq", "Ne", "Ge", "Gt", "Le", "Lt", "And", "Or", "Not", "Add", "Mul", "Pow", "int_oo", "true", "false",
                        "True", "False"})  # fmt: skip
_EXPRESSION = re.compile(r"[\w\s+\-*/%(),<>=&|~]*", re.ASCII)
_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
_ARITHMETIC = frozenset(
    f"_operator.{name}"
    for name in ("add", "sub", "mul", "floordiv", "mod", "eq", "ne", "ge", "gt", "le", "lt", "getitem", "neg", "pos")
)
# Guards compare input sizes; they are compiled as Python.
_SIZE = re.compile(r"L\['\w+'\]\.size\(\)\[\d+\]", re.ASCII)
_COMPARISON = re.compile(r"[\d +\-*/%()<>=!]*", re.ASCII)

# A bundle's model takes two tensors and gives two.
_TWO = (torch.zeros(1), torch.zeros(1))
_IN_SPEC = pytree.treespec_dumps(pytree.tree_structure((_TWO, {})))
_OUT_SPECS = tuple(pytree.treespec_dumps(pytree.tree_structure(outputs)) for outputs in (_TWO, list(_TWO)))


def load_exported_program(data: bytes, *, where: str, device: str = "cpu") -> torch.nn.Module:
    """The program's module on ``device``, in evaluation mode.

    Raises:
        InputError: not an exported program, or one with records that could run code; names the record.
    """
    try:
        program = torch.export.load(_checked_archive(data, where))
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - of a damaged archive, torch's parsers may raise anything
        raise InputError(f"{where} is not a readable torch.export program: {error}") from None
    # The device it was exported on stands in the graph too, where Module.to() does not reach. What fails here is the device.
    return move_to_device_pass(program, device).module()


def _checked_archive(data: bytes, where: str) -> io.BytesIO:
    checked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as received, zipfile.ZipFile(checked, "w") as copy:
        names = received.namelist()
        for name in names:
            # The records lie in one folder, of any name.
            record, record_where = name.partition("/")[2], f"{where}: {name}"
            if names.count(name) > 1 or not name.startswith(f"{names[0].partition('/')[0]}/"):
                raise InputError(f"{record_where} is there twice or outside the archive's folder; refused")
            copy.writestr(f"archive/{record}", _checked_record(record, received.read(name), record_where))
    checked.seek(0)
    return checked


def _checked_record(record: str, content: bytes, where: str) -> bytes:
    if _COPIED.fullmatch(record):
        return content
    if record in _CONFIGS:
        config = json.loads(content)["config"]
        for name, payload in config.items():
            if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                raise InputError(f"{where} asks for unpickling '{payload['path_name']}'; refused")
            _require(_ATTRIBUTE.fullmatch(name), name, "a plain name", where)
        _check_graph(config, "", where)
        return json.dumps({"config": config}).encode()
    if record == _GRAPH:
        graph = json.loads(content)
        # The first entry is the whole program; the rest, like metadata, describes the source it was traced from.
        graph["graph_module"]["module_call_graph"] = graph["graph_module"]["module_call_graph"][:1]
        _check_graph(graph, "", where)
        return json.dumps(graph).encode()
    if record == _SAMPLE_INPUTS:
        # Torch reads from them how many inputs there are. Theirs are not unpickled.
        sample = io.BytesIO()
        torch.save((_TWO, {}), sample)
        return sample.getvalue()
    raise InputError(f"{where} is an unexpected record in a torch.export program; refused")


def _check_graph(value: Any, key: str, where: str) -> None:
    """Check each string by the ``key`` that it stands under; empties "metadata"."""
    if isinstance(value, dict):
        for name, item in value.items():
            _require(_NAME.fullmatch(name), name, "a plain name", where)
            if name == "metadata":
                value[name] = {}
            else:
                _check_graph(item, name, where)
    elif isinstance(value, list):
        for item in value:
            _check_graph(item, key, where)
    elif isinstance(value, str):
        check, expected = _STRINGS.get(key, (_NAME.fullmatch, "a plain name"))
        _require(check(value), value, expected, where)


def _require(holds: object, value: str, expected: str, where: str) -> None:
    if not holds:
        raise InputError(f"{where}: {value!r} is not {expected}; refused")


def _is_operator(target: str) -> bool:
    if target in _ARITHMETIC:
        return True
    found = _ATEN.fullmatch(target)
    operator = found and getattr(getattr(torch.ops.aten, found[1], None), found[2], None)
    # aten::from_file and aten::save write files.
    return isinstance(operator, torch._ops.OpOverload) and all(
        argument.name != "filename" for argument in operator._schema.arguments
    )


def _is_shape_expression(expression: str) -> bool:
    plain = _SYMBOL_CALL.sub("s0", expression)
    known = all(name in _FUNCTIONS or _SYMBOL.fullmatch(name) for name in _IDENTIFIER.findall(plain))
    return known and _EXPRESSION.fullmatch(plain) is not None


# What a string may be, by its key. Literals are written into the source as such, by repr().
_STRINGS: dict[str, tuple[Callable[[str], object], str]] = {
    "target": (_is_operator, "an ATen operator that opens no file"),
    "as_operator": (_is_operator, "an ATen operator that opens no file"),
    "expr_str": (_is_shape_expression, "plain arithmetic of shape symbols"),
    "guards_code": (lambda guard: _COMPARISON.fullmatch(_SIZE.sub("0", guard)), "a comparison of sizes"),
    "in_spec": (_IN_SPEC.__eq__, "the structure of two inputs"),
    "out_spec": (_OUT_SPECS.__contains__, "the structure of two outputs"),
    "parameter_name": (_ATTRIBUTE.fullmatch, "a plain name"),
    "buffer_name": (_ATTRIBUTE.fullmatch, "a plain name"),
    "tensor_constant_name": (_ATTRIBUTE.fullmatch, "a plain name"),
    "as_string": (lambda _: True, "a literal"),
    "as_strings": (lambda _: True, "a literal"),
    # JSON has no infinities.
    "as_float": (("Infinity", "-Infinity", "NaN").__contains__, "a number"),
    "as_floats": (("Infinity", "-Infinity", "NaN").__contains__, "a number"),
    "torch_version": (lambda _: True, "a version"),
}
