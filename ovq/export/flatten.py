"""Flattens many modules into one file: the source of some classes and of everything in this project that they use.

The file is cut from the package's own source: statements keep their text and comments. Names change only where two
modules use the same one, and branches that lead to a backend other than torch's are left out. So there is no second
copy of a model to maintain, and the file has nothing that the model does not need (other mixers, kernels, training).

The source must follow two rules: imports from this project, of names or of modules, are at the top of a file; and what
is imported is never reassigned from another module. Anything else raises `FlattenError`; a test flattens every mixer.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

from ovq.export import source
from ovq.export.source import Edit, FlattenError, Module, Name, Statement, arguments_of, bound_in

# Conditions that are false where only torch's backends exist: these calls, and `backend == "reference"`.
NEVER = {("ovq.ops.fla_backend", "uses_fla"), ("ovq.ops.attention.flex", "takes")}
REFERENCE = ast.dump(ast.parse('backend == "reference"', mode="eval").body)
# What stands in for names that only make sense in the package.
INSTEAD: dict[Name, Name] = {
    ("ovq.config", "ModelConfig"): ("ovq.export.modeling", "OVQConfig"),
    ("ovq.instantiate", "instantiate"): ("ovq.export.substitutes", "instantiate"),
    ("ovq.ops.ovq_attention.interface", "_choose"): ("ovq.export.substitutes", "choose"),
}
OPERATORS = ('"ovq::', '"ovq_exported::')  # another namespace: the package may be loaded in the same process


# --- which names a statement uses ------------------------------------------------------------------------------------


class Scopes(ast.NodeVisitor):
    """Finds the module-level names that a statement uses, and the edits that put them into one file."""

    def __init__(self, flat: Flat, module: Module, statement: Statement) -> None:
        self.flat, self.module, self.statement = flat, module, statement
        self.inner: list[set[str]] = []  # names bound by the enclosing functions

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for outside in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outside)
        for argument in arguments_of(node.args):
            if argument.annotation:
                self.visit(argument.annotation)
        if node.returns:
            self.visit(node.returns)
        self._inside(bound_in(node), node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for outside in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outside)
        self._inside(bound_in(node), [node.body])

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        targets = {name.id for part in node.generators for name in ast.walk(part.target) if isinstance(name, ast.Name)}
        self._inside(targets, list(ast.iter_child_nodes(node)))

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp  # type: ignore[assignment]

    def _inside(self, bound: set[str], body: Iterable[ast.AST]) -> None:
        self.inner.append(bound)
        for node in body:
            self.visit(node)
        self.inner.pop()

    def visit_Name(self, node: ast.Name) -> None:
        if self._is_local(node.id):
            return
        if node.id in self.module.modules:
            raise FlattenError(f"{self.module.path}:{node.lineno}: the module {node.id} is used as a value")
        if node.id in self.module.external:
            self.statement.imports[node.id] = self.module.external[node.id]
        elif (target := self.flat.target(self.module, node.id)) is not None:
            self._use(node, target, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        value = node.value
        if not isinstance(value, ast.Name) or value.id not in self.module.modules or self._is_local(value.id):
            self.visit(value)
            return
        self._use(node, self.flat.resolve(self.module.modules[value.id], node.attr), None)

    def _is_local(self, name: str) -> bool:
        return any(name in bound for bound in self.inner)

    def visit_Global(self, node: ast.Global) -> None:
        for name in node.names:
            self.flat.fixed.add((self.module.name, name))

    def visit_If(self, node: ast.If) -> None:
        if not self._never(node.test):
            self.generic_visit(node)
            return
        if node.orelse:
            raise FlattenError(f"{self.module.path}:{node.lineno}: a branch that is left out has an else")
        start, stop = self.module.line_at[node.lineno - 1], self.module.line_at[node.end_lineno or 0]
        self.statement.edits.append(Edit(start, stop, ""))

    def visit_IfExp(self, node: ast.IfExp) -> None:
        if not self._never(node.test):
            self.generic_visit(node)
            return
        (start, stop), (kept, end) = self.module.span(node), self.module.span(node.orelse)
        self.statement.edits += [Edit(start, kept, ""), Edit(end, stop, "")]
        self.visit(node.orelse)

    def visit_Call(self, node: ast.Call) -> None:
        if self._never(node):
            self.statement.edits.append(Edit(*self.module.span(node), "False"))
        else:
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value.startswith("ovq::"):
            start, stop = self.module.span(node)
            text = self.module.source[start:stop].decode().replace(*OPERATORS)
            self.statement.edits.append(Edit(start, stop, text))

    def _never(self, test: ast.expr) -> bool:
        if ast.dump(test) == REFERENCE:
            return True
        if not isinstance(test, ast.Call):
            return False
        called = test.func
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            return (self.module.modules.get(called.value.id), called.attr) in NEVER
        return isinstance(called, ast.Name) and self.module.ours.get(called.id) in NEVER

    def _use(self, node: ast.expr, target: Name, written: str | None) -> None:
        self.statement.uses.append(target)
        self.statement.edits.append(Edit(*self.module.span(node), target))
        if written != target[1]:  # a local variable may have the name that the target has in its own module
            self.flat.elsewhere.add(target)


# --- the file --------------------------------------------------------------------------------------------------------


class Flat:
    """The statements that some classes need, from all of their modules, and their names in one file."""

    def __init__(self, roots: Iterable[Name]) -> None:
        self.modules: dict[str, Module] = {}
        self.elsewhere: set[Name] = set()  # used in another module under a different name
        self.fixed: set[Name] = set()  # assigned with `global`, so they must keep their names
        self.kept: dict[int, Statement] = {}
        self.roots = {self.resolve(*root) for root in roots}
        wanted = list(self.roots)
        while wanted:
            wanted += self._keep(wanted.pop())
        self._order()
        self._name()

    def module(self, name: str) -> Module:
        if name not in self.modules:
            self.modules[name] = Module(name)
        return self.modules[name]

    def resolve(self, module: str, name: str) -> Name:
        """Where a name that can be imported from a module is defined, or its substitute (`INSTEAD`)."""
        if (module, name) in INSTEAD:
            module, name = INSTEAD[module, name]
        found = self.target(self.module(module), name)
        if found is None:
            raise FlattenError(f"{module} has no {name}")
        return found

    def target(self, module: Module, name: str) -> Name | None:
        if name in module.own:
            return INSTEAD.get((module.name, name), (module.name, name))
        return self.resolve(*module.ours[name]) if name in module.ours else None

    def _keep(self, target: Name) -> list[Name]:
        """Keep the statements that define a name, and registrations of it; returns the names that these use."""
        module, name = self.module(target[0]), target[1]
        uses: list[Name] = []
        for statement in module.statements:
            if id(statement) in self.kept:
                continue
            if name in ([self._about(module, statement)] if statement.is_effect else statement.defines):
                uses += self._read(module, statement)
        return uses

    def _read(self, module: Module, statement: Statement) -> list[Name]:
        self.kept[id(statement)] = statement
        Scopes(self, module, statement).visit(statement.node)
        return statement.uses

    def _about(self, module: Module, statement: Statement) -> str | None:
        """What a registration registers: the first name in its text that its own module defines."""
        named = [node for node in ast.walk(statement.node) if isinstance(node, ast.Name) and node.id in module.own]
        return min(named, key=lambda node: (node.lineno, node.col_offset)).id if named else None

    def _order(self) -> None:
        """Sort the modules so that each comes after those that it imports."""
        self.order: list[Module] = []
        done: set[str] = set()

        def visit(name: str) -> None:
            if name not in done and name in self.modules:
                done.add(name)
                for needed in self.modules[name].needs:
                    visit(needed)
                self.order.append(self.modules[name])

        for name in sorted(self.modules, key=lambda name: (name.startswith("ovq.export"), name)):
            visit(name)

    def statements(self) -> Iterator[tuple[Module, list[Statement]]]:
        for module in self.order:
            if kept := [statement for statement in module.statements if id(statement) in self.kept]:
                yield module, kept

    def _name(self) -> None:
        self.imports: dict[str, str] = {}
        own: dict[str, list[Name]] = {}
        for module, statements in self.statements():
            for statement in statements:
                for local, text in statement.imports.items():
                    if self.imports.setdefault(local, text) != text:
                        raise FlattenError(f"{module.path}: {local} is {text}, elsewhere {self.imports[local]}")
                for name in statement.defines:
                    own.setdefault(name, []).append((module.name, name))
        self.names: dict[Name, str] = {}
        for name, targets in own.items():
            for target in set(targets):
                alone = len(set(targets)) == 1 and name not in self.imports and target not in self.elsewhere
                keeps = alone or name == "_" or target in self.roots
                self.names[target] = name if keeps else f"{name}_{place(target[0])}"
                if target in self.fixed and self.names[target] != name:
                    raise FlattenError(f"{target[0]}.{name} is assigned with global, and another module has it too")

    def text(self, module: Module, statement: Statement) -> str:
        """The source of a statement with the comments above it, with names as they are in the flat file."""
        edits = [*statement.edits, *self._definitions(module, statement)]
        outer: list[Edit] = []
        for edit in sorted(edits, key=lambda edit: (edit.start, -edit.stop)):
            if not outer or edit.start >= outer[-1].stop:
                outer.append(edit)  # an edit inside another one is covered by it
        out, at = [], statement.start
        for edit in outer:
            text = edit.text if isinstance(edit.text, str) else self.names[edit.text]
            out += [module.source[at : edit.start].decode(), text]
            at = edit.stop
        text = "".join([*out, module.source[at : statement.stop].decode()])
        return re.sub(r"^# --- .*\n", "", text, flags=re.MULTILINE).strip("\n")

    def _definitions(self, module: Module, statement: Statement) -> Iterator[Edit]:
        node = statement.node
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "_":
            line = module.source[module.line_at[node.lineno - 1] : module.line_at[node.lineno]].decode()
            found = re.match(r"(?:def|class) (\w+)", line)
            assert found is not None
            start = module.line_at[node.lineno - 1] + found.start(1)
            yield Edit(start, start + len(node.name), (module.name, node.name))


def place(module: str) -> str:
    """A suffix for names of a module, to tell them apart: simple_gla_chunked for ovq.ops.simple_gla.chunked."""
    parts = module.split(".")
    return "_".join(parts[2:] if len(parts) > 2 else parts[1:])


def flatten(roots: Iterable[Name], header: str) -> str:
    """The source of one module that defines `roots` and everything that they use.

    Args:
        roots: (module, name) of classes, functions and constants of this project.
        header: the first lines, as a docstring or comments.

    Raises:
        FlattenError: the source has something that cannot be put into one file.
    """
    flat = Flat(roots)
    parts = [header.rstrip("\n"), "from __future__ import annotations\n\n" + import_lines(flat.imports.values())]
    for module, statements in flat.statements():
        rule = f"# --- {module.path.relative_to(source.ROOT)} "
        legend = "".join(f"#\n{comment(part)}" for part in module.doc.split("\n\n") if part.startswith("Shapes"))
        parts.append(f"{rule}{'-' * (120 - len(rule))}\n{legend}".rstrip("\n"))
        parts += [flat.text(module, statement) for statement in statements]
    return "\n\n\n".join(parts) + "\n"


def import_lines(imports: Iterable[str]) -> str:
    """Sorted import statements, with those from one module combined."""
    whole, named = set(), dict[str, set[str]]()
    for text in imports:
        if text.startswith("import "):
            whole.add(text)
        else:
            module, _, name = text.removeprefix("from ").partition(" import ")
            named.setdefault(module, set()).add(name)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(named.items())]
    return "\n".join([*sorted(whole), *lines])


def comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in text.splitlines())
