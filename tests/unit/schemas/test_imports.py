"""The import rule: ``teacher_service -> softlabel_schemas <- student_trainer``, and a core without torch and ray."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FORBIDDEN = {
    "schemas/softlabel_schemas": {"torch", "ray", "teacher_service", "student_trainer"},
    "teacher_service": {"student_trainer"},
    "student_trainer": {"teacher_service", "ray"},
}
# A sweep's runs are Ray tasks; nothing that a single run needs imports it.
ALLOWED = {"student_trainer/sweep_ray.py": {"ray"}}


def imported_packages(module: Path) -> set[str]:
    """Top-level names of everything a module imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_module_crosses_the_wall(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    names = {str(module.relative_to(ROOT)): imported_packages(module) & FORBIDDEN[package] for module in modules}
    crossing = {name: found - ALLOWED.get(name, set()) for name, found in names.items()}
    assert not any(crossing.values()), crossing


def test_the_rule_sees_imports_inside_functions(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("import a.b\nfrom c.d import e\ndef f():\n    import torch.nn\n    from . import g\n")
    assert imported_packages(module) == {"a", "c", "torch"}


@pytest.mark.parametrize(
    "statement",
    ["import softlabel_schemas", "from softlabel_schemas.cli import main; main(['--help'], standalone_mode=False)"],
)
def test_the_core_loads_neither_torch_nor_ray(statement: str) -> None:
    assert loaded_by(statement) == "[]"


def test_training_loads_no_ray() -> None:
    assert loaded_by("import student_trainer.cli, student_trainer.train, student_trainer.compare") == "['torch']"


def loaded_by(statement: str) -> str:
    """Of the heavy packages, those that a fresh process has loaded after it."""
    code = f"import sys; {statement}; print(sorted({{'torch', 'ray', 's3fs'}} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    return found.stdout.splitlines()[-1]
