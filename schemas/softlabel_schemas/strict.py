"""Strict models for everything that comes from a file: unknown keys, wrong types and bad ranges are errors.

Pydantic does the checking; this module only turns its findings into one message a user can act on.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from softlabel_schemas.errors import InputError


class StrictModel(BaseModel):
    """Immutable; rejects unknown keys and lossy type conversions, NaN and infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


ModelT = TypeVar("ModelT", bound=StrictModel)


def parse(model: type[ModelT], data: Any, *, where: str) -> ModelT:
    """Validate ``data`` as ``model``.

    Raises:
        InputError: names ``where``, every bad key and, for an unknown key, the nearest known one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem, model)}" for problem in error.errors(include_url=False))
        raise InputError(f"{where} is not valid:\n{problems}") from None


def load_toml(model: type[ModelT], path: str | Path) -> ModelT:
    """Read a TOML file into ``model``; see :func:`parse` for the errors."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give the path of a TOML file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    return parse(model, data, where=str(path))


def _explain(problem: Any, model: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "extra_forbidden":
        # Our own messages say what was found where it is fit to be shown: a credential is not.
        own = problem["type"] in ("missing", "value_error")
        shown = "" if own else f", found {problem['input']!r:.80}"
        return f"{location}: {message}{shown}"
    key = str(problem["loc"][-1])
    if key in _known_keys(model):
        return f"{location}: unknown key '{key}' here; it belongs in another table"
    near = difflib.get_close_matches(key, sorted(_known_keys(model)), n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{location}: unknown key '{key}'{hint}"


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
