"""A module of this project as text: its statements, what they define, and what its imports refer to."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
Name = tuple[str, str]  # (module, name in it)


class FlattenError(RuntimeError):
    """The source has something that cannot be put into one file."""


@dataclass
class Edit:
    """Replace source[start:stop] of a module, in bytes, by a text or by the name of a target in the flat file."""

    start: int
    stop: int
    text: str | Name


@dataclass
class Statement:
    """A top-level statement: the names it defines, those of this project it uses, and its imports by local name."""

    module: str
    node: ast.stmt
    start: int
    stop: int
    defines: list[str]
    uses: list[Name] = field(default_factory=list)
    imports: dict[str, str] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)

    @property
    def is_effect(self) -> bool:
        """Whether it defines no name that others could use; a registration, for instance."""
        return not [name for name in self.defines if name != "_"]


class Module:
    """The source of one module, its top-level statements and what its imports refer to."""

    def __init__(self, name: str) -> None:
        base = ROOT.joinpath(*name.split("."))
        self.name, self.path = name, base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        self.source = self.path.read_bytes()
        lines = self.source.splitlines(keepends=True)
        self.line_at = [0]
        for line in lines:
            self.line_at.append(self.line_at[-1] + len(line))
        tree = ast.parse(self.source)
        self.doc = ast.get_docstring(tree) or ""
        self.external: dict[str, str] = {}  # local name -> import statement
        self.ours: dict[str, Name] = {}  # local name -> (module, name)
        self.modules: dict[str, str] = {}  # local name -> module
        self.needs: list[str] = []  # modules of this project, in import order
        self.statements: list[Statement] = []
        end = 0
        for node in tree.body:
            stop = self.line_at[node.end_lineno or 0]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._take_import(node)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                self.statements.append(Statement(name, node, end, stop, defined(node)))
            end = stop
        self.own = {name for statement in self.statements for name in statement.defines}

    def offset(self, line: int, column: int) -> int:
        return self.line_at[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        at = node.lineno, node.col_offset, node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]
        return self.offset(at[0], at[1]), self.offset(at[2], at[3])

    def _take_import(self, node: ast.Import | ast.ImportFrom) -> None:
        source = getattr(node, "module", None) or ""
        if source == "__future__":
            return
        for alias in node.names:
            local, renamed = alias.asname or alias.name, f" as {alias.asname}" if alias.asname else ""
            if isinstance(node, ast.Import):
                if is_ours(alias.name):
                    raise FlattenError(f"{self.path}: import {alias.name}; write from ... import ...")
                self.external[local.partition(".")[0] if not renamed else local] = f"import {alias.name}{renamed}"
            elif not is_ours(source):
                self.external[local] = f"from {source} import {alias.name}{renamed}"
            elif path_of(f"{source}.{alias.name}"):
                self.modules[local] = f"{source}.{alias.name}"
                self.needs.append(self.modules[local])
            else:
                self.ours[local] = (source, alias.name)
                self.needs.append(source)


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "ovq"


def path_of(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def defined(node: ast.stmt) -> list[str]:
    """The names that a top-level statement binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return []


def arguments_of(arguments: ast.arguments) -> list[ast.arg]:
    listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [*listed, *(one for one in (arguments.vararg, arguments.kwarg) if one)]


def bound_in(function: ast.FunctionDef | ast.Lambda) -> set[str]:
    """The names that are local to a function."""
    bound = {argument.arg for argument in arguments_of(function.args)}
    free: set[str] = set()

    def walk(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
            return
        if isinstance(node, ast.Lambda):
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            free.update(node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        for child in ast.iter_child_nodes(node):
            walk(child)

    for node in [function.body] if isinstance(function, ast.Lambda) else function.body:
        walk(node)
    return bound - free
