"""Rules of imports, read from the source: which module may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cascadeexit"
CORE = sorted(PACKAGE.rglob("*.py"))

# A module imports only modules before it in this list. A package's own name means its __init__.
ORDER = """
    values events costs folders lookup prompts examples artifact calibration config
    exits.adapters exits.confidence exits.config exits.bank exits
    backends.memory backends.graphs backends.cache backends.base backends.weights backends.exits
    backends.torch.recording backends.torch.linear backends.torch.attention backends.torch.cache
    backends.torch.layers backends.torch.heads backends.torch.exits backends.torch
    backends.cpu.structures backends.cpu.build backends.cpu.states backends.cpu.packing
    backends.cpu.heads backends.cpu.layers backends.cpu.exits backends.cpu
    backends.gpu.kernels backends.gpu.launches backends.gpu.places backends.gpu.recording backends.gpu.layers
    backends.gpu.heads backends.gpu.exits backends.gpu backends
    sampling model carry staircase drafting tree metrics engine race inspection scoring shape
    repetition machine text sides wire stream record conversion bundled gguf_file accelerator selfcheck payoff hub
    custom_generate library turns runner spread evaluation views report settings kept page endpoints uploads blocks
    openai.errors openai.requests openai.writing openai.answers openai.service openai.routes openai doctor
    terminal console __main__
""".split()
# Each outside library, and the modules that may import it.
DOORS = {"transformers": ("hub", "conversion", "custom_generate", "backends.torch."), "plotly": ("views",),
         "gguf": ("gguf_file",), "ctypes": ("backends.",), "triton": ("backends.",), "gradio": ("blocks",),
         "spaces": (), "training": (), "app": (), "pydantic": ("openai.",), "starlette": ("openai.", "uploads"),
         "openai": ()}


def name_of(path: Path) -> str:
    """Module name inside the package; '' for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from cascadeexit.backends.cpu import build` is an import of that module, not of its package.
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            names |= inside if len(inside) == len(node.names) else {node.module, *inside}
    return names


MODULES = {f"cascadeexit.{name_of(path)}" for path in CORE}


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_outside_libraries_are_imported_where_allowed(path):
    used = {name.split(".")[0] for name in imported(path)}
    for library, doors in DOORS.items():
        allowed = any(name_of(path) == door or (door.endswith(".") and f"{name_of(path)}.".startswith(door))
                      for door in doors)
        assert allowed or library not in used, f"{path.name} imports {library}"


def test_the_order_names_every_module_once():
    assert sorted(ORDER) == sorted(name for name in map(name_of, CORE) if name)


@pytest.mark.parametrize("path", [path for path in CORE if name_of(path)], ids=name_of)
def test_imports_point_one_way(path):
    above = set(ORDER[ORDER.index(name_of(path)):])
    own = {name.removeprefix("cascadeexit.") for name in imported(path) if name.startswith("cascadeexit.")}
    assert not own & above, f"{name_of(path)} imports upwards: {own & above}"


def test_a_backend_does_not_know_its_neighbours():
    for path in PACKAGE.glob("backends/*/*.py"):
        kind = name_of(path).split(".")[1]
        others = {other.name for other in (PACKAGE / "backends").iterdir() if other.is_dir()} - {kind}
        assert not any(name.startswith(f"cascadeexit.backends.{other}") for name in imported(path) for other in others)
