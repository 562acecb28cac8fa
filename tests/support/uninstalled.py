"""Packages that are not there, though this process may have imported them."""

from __future__ import annotations

import sys

import pytest

# Modules of student_trainer, at first or at second hand.
_IMPORTERS = {
    "kaldifst": ("graph", "graph_folder", "decode", "tune"),
    "kaldi_decoder": ("decode", "tune"),
    "ray": ("sweep_ray", "sweep"),
}


def uninstall(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Until the end of the test; what of ``student_trainer`` imports it is to be imported again."""
    monkeypatch.setitem(sys.modules, package, None)
    for module in _IMPORTERS[package]:
        monkeypatch.delitem(sys.modules, f"student_trainer.{module}", raising=False)
