"""Load a torch.export program that somebody else made, without running code from it.

``torch.export.load`` (2.13) unpickles some records with ``weights_only=False`` and evaluates symbolic expressions as Python
source, as it does with guards. Bundles are shared between teams, so the archive is checked first: only raw tensor records,
only expressions of shape symbols and arithmetic, only guards that compare sizes, only ATen operators. What an ordinary
export of an acoustic model contains passes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from softlabel_schemas.errors import InputError

_CONFIGS = re.compile(r"/data/(weights|constants)/[^/]*_config\.json$")
_PLAIN_RECORD = re.compile(
    r"/(data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder"
    r"|\.data/version|\.data/serialization_id)$"
)
_MODEL = re.compile(r"/models/[^/]*\.json$")
_SAMPLE_INPUTS = re.compile(r"/data/sample_inputs/[^/]*\.pt$")
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_SYMBOL_CALL = re.compile(r"Symbol\('[suz]+\d+'(?:, [a-z]+=(?:True|False))*\)")
_SYMBOL = re.compile(r"^[suz]+\d+$")
_FUNCTIONS = frozenset({"FloorDiv", "CleanDiv", "CeilToInt", "Mod", "PythonMod", "ModularIndexing", "Max", "Min", "Integer",
                        "Eq", "Ne", "Ge", "Gt", "Le", "Lt", "And", "Or", "Not", "Add", "Mul", "Pow", "int_oo", "true", "false",
                        "True", "False"})  # fmt: skip
_EXPRESSION = re.compile(r"^[\w\s+\-*/%(),<>=&|~]*$")
_ATEN = re.compile(r"^torch\.ops\.aten\.\w+\.\w+$")
_ARITHMETIC = frozenset(
    f"_operator.{name}"
    for name in ("add", "sub", "mul", "floordiv", "mod", "eq", "ne", "ge", "gt", "le", "lt", "getitem", "neg", "pos")
)
# Guards compare input sizes; they are compiled as Python.
_SIZE = re.compile(r"L\['\w+'\]\.size\(\)\[\d+\]")
_COMPARISON = re.compile(r"^[\d\s+\-*/%()<>=!]*$")


def load_exported_program(data: bytes, *, where: str) -> torch.nn.Module:
    """The program's module, in evaluation mode.

    Raises:
        InputError: not an exported program, or one with records that could run code; names the record.
    """
    try:
        _check_archive(data, where)
        module = torch.export.load(io.BytesIO(data)).module()
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is not a readable torch.export program: {error}") from None
    return module


def _check_archive(data: bytes, where: str) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            if _PLAIN_RECORD.search(name):
                continue
            if _CONFIGS.search(name):
                for record in json.loads(archive.read(name))["config"].values():
                    if record["use_pickle"] or not re.match(r"^(weight|tensor)_\d+$", record["path_name"]):
                        raise InputError(f"{where}: {name} asks for unpickling '{record['path_name']}'; refused")
            elif _SAMPLE_INPUTS.search(name):
                _check_sample_inputs(archive.read(name), f"{where}: {name}")
            elif _MODEL.search(name):
                _check_graph(json.loads(archive.read(name)), f"{where}: {name}")
            else:
                raise InputError(f"{where}: unexpected record {name} in a torch.export program; refused")


def _check_sample_inputs(data: bytes, where: str) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, the record is more than plain tensors
        raise InputError(f"{where} holds more than plain tensors; refused ({type(error).__name__})") from None


def _check_graph(graph: Any, where: str) -> None:
    for guard in graph.get("guards_code", []):
        if not _COMPARISON.match(_SIZE.sub("0", guard)):
            raise InputError(f"{where}: guard {guard!r} is not a comparison of sizes; refused")
    for node in _dictionaries(graph):
        if "target" in node and "inputs" in node:
            target = node["target"]
            if not _ATEN.match(target) and target not in _ARITHMETIC:
                raise InputError(f"{where}: operator {target!r} is not an ATen operator; refused")
        if "expr_str" in node:
            expression = node["expr_str"]
            names = _IDENTIFIER.findall(_SYMBOL_CALL.sub("s0", expression))
            known = all(name in _FUNCTIONS or _SYMBOL.match(name) for name in names)
            if not known or not _EXPRESSION.match(_SYMBOL_CALL.sub("s0", expression)):
                raise InputError(f"{where}: shape expression {expression!r} is not plain arithmetic; refused")
        # Names become identifiers in the module's generated code.
        name = node.get("name", "")
        if not isinstance(name, str) or not re.match(r"^[\w.]*$", name):
            raise InputError(f"{where}: {name!r} is not a plain name; refused")


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            yield current
            pending.extend(current.values())
        elif isinstance(current, list):
            pending.extend(current)
