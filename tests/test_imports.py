"""The walls of the house: who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "cascadeexit").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_the_core_never_imports_training_or_the_page(path):
    assert not tops(path) & {"training", "app", "gradio"}


@pytest.mark.parametrize("path", CORE, ids=lambda p: p.name)
def test_each_library_has_one_door(path):
    allowed = {"transformers": {"hub.py", "model.py"}, "plotly": {"views.py"}, "gguf": {"hub.py"}}
    for library, doors in allowed.items():
        assert library not in tops(path) or path.name in doors, f"{path.name} imports {library}"


def test_imports_inside_the_core_point_one_way():
    """Lower files never import higher ones."""
    order = ["events.py", "prompts.py", "memory.py", "cache.py", "states.py", "kernels.py", "graphs.py", "linear.py",
             "sampling.py", "lookup.py", "model.py", "calibration.py", "exits.py", "metrics.py", "tree.py", "engine.py",
             "race.py", "inspection.py", "evaluation.py", "stream.py", "record.py", "views.py", "hub.py", "library.py",
             "__init__.py"]
    assert sorted(order) == sorted(path.name for path in CORE)
    for path in CORE:
        above = {name.removesuffix(".py") for name in order[order.index(path.name):]} - {"__init__"}
        own = {name.split(".")[1] for name in imported(path) if name.startswith("cascadeexit.")}
        assert not own & above, f"{path.name} imports upwards: {own & above}"
