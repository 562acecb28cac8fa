"""A destination as names and contents."""

from __future__ import annotations

from pathlib import Path

from softlabel_schemas.local_files import TEMPORARY


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by relative path; leftovers of killed writers (temporary names) left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and TEMPORARY not in path.name
    }
