"""Strict models for everything that comes from a file: unknown keys, wrong types and bad ranges are errors.

Pydantic does the checking; this module only turns its findings into one message a user can act on.
"""

from __future__ import annotations

import difflib
import reprlib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from softlabel_schemas.errors import InputError

# A hostile document has millions of problems; nobody reads on after these.
_MAX_PROBLEMS = 20
_MAX_SHOWN = 80
# Beyond this a key is no misspelling, and comparing it takes long.
_MAX_TEXT = 100
_MAX_MESSAGE = 500

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _MAX_SHOWN


def shortened(value: object) -> str:
    """``repr`` for messages, however long or deep a value from a file is; control characters are escaped."""
    return _repr.repr(value)[:_MAX_SHOWN]


class StrictModel(BaseModel):
    """Immutable; rejects unknown keys and lossy type conversions, NaN and infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


ModelT = TypeVar("ModelT", bound=StrictModel)


def parse(model: type[ModelT], data: Any, *, where: str, context: object = None) -> ModelT:
    """Validate ``data`` as ``model``; ``context`` is for its validators.

    Raises:
        InputError: names ``where``, every bad key and, for an unknown key, the nearest known one.
    """
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [f"  {_explain(problem, model)}" for problem in found[:_MAX_PROBLEMS]]
        if len(found) > _MAX_PROBLEMS:
            problems.append(f"  and {len(found) - _MAX_PROBLEMS} problems more")
        raise InputError("\n".join([f"{where} is not valid:", *problems])) from None


def load_toml(model: type[ModelT], path: str | Path) -> ModelT:
    """Read a TOML file into ``model``; see :func:`parse` for the errors."""
    return parse(model, read_toml(path), where=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Raises InputError where the file is missing or not TOML."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a TOML file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give the path of a TOML file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None


def _explain(problem: Any, model: type[BaseModel]) -> str:
    location = ".".join(printable(str(part)) for part in problem["loc"]) or "(whole file)"
    # Pydantic puts some of what it found into its own messages.
    message = printable(problem["msg"].removeprefix("Value error, "), _MAX_MESSAGE)
    if problem["type"] == "union_tag_invalid":
        found, expected = printable(problem["ctx"]["tag"]), problem["ctx"]["expected_tags"]
        near = difflib.get_close_matches(found, expected.replace("'", "").split(", "), n=1, cutoff=0.5)
        name = problem["ctx"]["discriminator"].strip("'")
        return f"{location}.{name}: '{found}' is none of {expected}{_hint(near)}"
    if problem["type"] != "extra_forbidden":
        # Our own messages say what was found where it is fit to be shown: a credential is not.
        own = problem["type"] in ("missing", "value_error")
        shown = "" if own else f", found {shortened(problem['input'])}"
        return f"{location}: {message}{shown}"
    key = printable(str(problem["loc"][-1]))
    if key in _known_keys(model):
        return f"{location}: unknown key '{key}' here; it belongs in another table"
    near = difflib.get_close_matches(key, sorted(_known_keys(model)), n=1, cutoff=0.5)
    return f"{location}: unknown key '{key}'{_hint(near)}"


def _hint(near: list[str]) -> str:
    return f"; did you mean '{near[0]}'?" if near else ""


def printable(text: str, at_most: int = _MAX_TEXT) -> str:
    """``text`` as a message may show it: without what a terminal obeys, and not all of it if it is long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text[:at_most])
    return shown if len(text) <= at_most else f"{shown}..."


def _known_keys(model: type[BaseModel]) -> set[str]:
    """Every key of ``model`` and of the models nested in it: a misplaced key is found too."""
    names: set[str] = set()
    pending: list[Any] = [model]
    seen: set[Any] = set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if isinstance(current, type) and issubclass(current, BaseModel):
            names.update(current.model_fields)
            pending.extend(field.annotation for field in current.model_fields.values())
        else:
            pending.extend(getattr(current, "__args__", ()))
    return names
