"""The dashboard asks for metrics that the code exports, by the names under which Prometheus has them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from teacher_service import metrics

DASHBOARD: dict[str, Any] = json.loads(
    (Path(__file__).parents[3] / "deploy" / "grafana" / "labelling.json").read_text(encoding="utf-8")
)


def exported() -> set[str]:
    """Names as Ray exports them: those of the metrics that the module makes."""
    tree = ast.parse(Path(metrics.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    names = set[str]()
    for call in calls:
        match call:
            case ast.Call(func=ast.Name("_counter"), args=[ast.Constant(str(name)), *_]):
                names.add(f"ray_softlabels_{name}_total")
            case ast.Call(func=ast.Name("Gauge"), args=[ast.Constant(str(name)), *_]):
                names.add(f"ray_{name}")
    return names


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_every_query_is_of_an_exported_metric_and_every_metric_is_shown() -> None:
    asked = {name for text in expressions() for name in re.findall(r"ray_\w+", text)}
    variables = {name for each in DASHBOARD["templating"]["list"] for name in re.findall(r"ray_\w+", str(each))}
    assert asked == exported()
    assert variables <= exported()
    assert len(exported()) == 8


def test_the_modules_table_names_them_all() -> None:
    table = re.findall(r"^softlabels_\w+", metrics.__doc__ or "", re.MULTILINE)
    assert {f"ray_{name}" for name in table} == {name.removesuffix("_total") for name in exported()}


def test_labels_and_states_are_the_codes() -> None:
    for text in expressions():
        assert '{fingerprint=~"$fingerprint"}' in text
    (shards,) = [text for text in expressions() if "softlabels_shards" in text]
    assert "by (fingerprint, state)" in shards
    description = next(panel["description"] for panel in DASHBOARD["panels"] if panel["title"] == "Shards by state")
    assert description.lower().startswith(", ".join(state.replace("_", " ") for state in metrics.STATES[:3]))


def test_panels_have_places_of_their_own() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in DASHBOARD["panels"]})
