"""Problems: everything that is wrong with an input, by kind, in one message: a list to work off instead of one error a try."""

from __future__ import annotations

from collections import defaultdict

from softlabel_schemas.errors import InputError
from softlabel_schemas.strict import printable

# Names that a message shows of each kind; more would hide the other kinds.
_NAMES_SHOWN = 5


class Problems:
    """Names of what has a problem, by problem."""

    def __init__(self) -> None:
        self._names: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, problem: str, name: str) -> None:
        self._names[problem].append(name)

    def __bool__(self) -> bool:
        return bool(self._names)

    def lines(self) -> list[str]:
        """A line for each kind: how many, and the first names."""
        return [f"{problem}: {counted(names)}" for problem, names in self._names.items()]

    def raise_if_any(self, message: str) -> None:
        """Raises InputError with a line for each kind below ``message``."""
        if self:
            raise InputError("\n".join([f"{message}:", *(f"  {line}" for line in self.lines())]))


def counted(names: list[str]) -> str:
    """Such as "7 (a, b, c, d, e, ...)"."""
    shown = ", ".join(printable(name) for name in names[:_NAMES_SHOWN])
    return f"{len(names):,} ({shown}{', ...' if len(names) > _NAMES_SHOWN else ''})"
