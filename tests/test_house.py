"""Claims about the layout: which module may import which, read from the source, including imports inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ovq", "data", "eval", "launch")
MOST_LINES = 400
# Files that may be longer, and why.
LONG = {
    "ovq/ops/ovq_attention/kernels/assign.py": "a kernel, with the maths of its stages",
    "ovq/ops/ovq_attention/kernels/backward.py": "kernels, with the maths of their stages",
}


def source_of() -> dict[str, Path]:
    """Module name -> file, for everything but the tests."""
    files = [ROOT / "train.py", *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]
    return {name_of(file): file for file in files}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = source_of()


def imports_of(module: str) -> set[str]:
    """The project's modules that a module imports, anywhere in its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name in MODULES and name != module}


ARROWS = {module: imports_of(module) for module in MODULES}


def below(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


# room (a package or module) -> the rooms it may import from, besides itself. A nested room comes before its parent.
SHARED = (
    *("ovq.config", "ovq.config_data", "ovq.compose", "ovq.identity", "ovq.cli", "ovq.errors", "ovq.schema"),
    *("ovq.optim_config", "ovq.values", "ovq.overrides", "ovq.cpu"),
    *("ovq.files", "ovq.lengths", "ovq.machine", "ovq.report", "ovq.bounded", "ovq.signals"),
)
CORE = (*SHARED, "ovq.instantiate", "ovq.processes", "ovq.stacks")
MAY_IMPORT = {
    "ovq.ops.ovq_attention.selftest": (*SHARED, "ovq.ops"),  # a tool: no operator imports it
    "ovq.ops.ovq_attention.verify": ("ovq.bounded", "ovq.ops"),
    "ovq.ops": (),
    "ovq.mixers": ("ovq.ops", "ovq.processes"),
    "ovq.model": (*CORE, "ovq.mixers", "ovq.ops"),
    "ovq.memory": (*CORE, "ovq.model", "ovq.mixers", "ovq.ops", "ovq.train.parallelize"),
    "ovq.plan": (*CORE, "ovq.model", "ovq.memory"),
    "ovq.export": (*CORE, "ovq.model", "ovq.mixers", "ovq.ops"),
    "ovq.hf": ("ovq.export",),
    "ovq.train": (*CORE, "ovq.model", "ovq.mixers", "ovq.ops", "ovq.export.stored"),
    "ovq.inference": (*CORE, "ovq.model", "ovq.mixers", "ovq.ops", "ovq.train", "ovq.export", "ovq.hf", "data"),
    "ovq": CORE,
    "data": CORE,
    "eval.figures": ("ovq", "data", "eval", "launch"),
    "eval.report": ("ovq", "data", "eval", "launch"),
    "eval.bench": ("ovq", "data", "eval"),
    "eval": ("ovq", "data"),
    "launch": ("ovq", "data", "train", "eval.preflight"),
    "train": ("ovq", "data", "eval"),
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_one_way(module: str) -> None:
    room = next(room for room in MAY_IMPORT if below(module, room))
    for target in sorted(ARROWS[module]):
        allowed = below(target, room) or any(below(target, other) for other in MAY_IMPORT[room])
        assert allowed, f"{module} ({room}) imports {target}; {room} may import: {', '.join(MAY_IMPORT[room])}"


def test_no_tool_imports_the_figures() -> None:
    """Figures are the top layer of eval: only they may combine packages that are otherwise kept apart."""
    for module, targets in ARROWS.items():
        if not below(module, "eval.figures"):
            assert not [target for target in targets if below(target, "eval.figures")], module


def test_there_is_no_import_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(ARROWS[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


# Modules of the data package that build their parts from a config.
BUILDERS = ("data.build", "data.describe", "data.prepare", "data.train_tokenizer")


def test_no_leaf_of_data_imports_the_builder() -> None:
    for module, targets in ARROWS.items():
        if below(module, "data") and module not in BUILDERS:
            assert "data.build" not in targets, module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_has_the_name_of_a_library_it_imports(module: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
    assert module.rpartition(".")[2] not in imported - set(PACKAGES)


def test_files_are_short() -> None:
    for module, file in MODULES.items():
        lines = len(file.read_text().splitlines())
        name = str(file.relative_to(ROOT))
        if name in LONG:
            assert lines > MOST_LINES, f"{name} has only {lines} lines: remove it from LONG"
        else:
            assert lines <= MOST_LINES, f"{module} has {lines} lines"
