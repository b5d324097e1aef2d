"""Find what a mutant breaks: every guard of a module, and the module with a switch at each of them.

`instrument` parses a source once and gives the code of all its mutants together: at each place stands the question whether the
mutant of that place is the active one. None is active as a rule, and the module does what it says. Places are

* the condition of an ``if`` that refuses (returns None, False, a failure; raises; goes on with the next of a loop): never true;
* each operand of ``and`` and ``or``, and each pair of two tuples that are compared: left out;
* what a function annotated ``-> bool`` returns, and each ``all(...)``: always the same;
* what a comprehension, or a loop that may return, goes through: nothing.

Comprehensions count since readers are collected by them: a guard that looks at none of the nodes is a guard left out.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import hashlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

#: Behind it a rule's file has its examples, which are no guards.
EXAMPLES = "# ---- examples"

#: What a call that gives a refusal is called: `Failure`, `Refusal`, `Miss`, ``context.refuse``, ``self._stop``, ``_wrong``.
REFUSALS = ("failure", "refus", "miss", "stop", "wrong")

PROBE = "_mutation_"


@dataclasses.dataclass(frozen=True)
class Site:
    """A place, what is done to it, and the line it is on; ``id`` has no line number, and so outlives edits elsewhere."""

    id: str
    file: str
    line: int
    #: With which value the mutant differs from the original: "true", "false", or "any".
    matters: str


class Probe:
    """What the switches ask: which mutant is active. When recording, it notes where one would have made a difference."""

    def __init__(self) -> None:
        self.active: str | None = None
        self.recording = False
        self.seen: set[str] = set()
        self.matters: dict[str, str] = {}

    def saw(self, site: str, value: Any) -> Any:
        if self.recording and site not in self.seen and _matters(self.matters[site], value):
            self.seen.add(site)
        return value


def _matters(when: str, value: Any) -> bool:
    # A symbolic truth value would become a guard of the graph by being asked.
    if when == "any" or (type(value).__module__.partition(".")[0] == "torch" and type(value).__name__ != "Node"):
        return True
    return bool(value) is (when == "true")


@dataclasses.dataclass(frozen=True)
class Instrumented:
    tree: ast.Module
    sites: tuple[Site, ...]


def instrument(source: str, file: str) -> Instrumented:
    """``source`` with a switch at every site; ``file`` is what the sites' ids begin with."""
    tree = ast.parse(source)
    lines = source.splitlines()
    end = next((number for number, line in enumerate(lines, 1) if line.startswith(EXAMPLES)), len(lines) + 1)
    switches = _Switches(source, file)
    tree.body = [switches.visit(node) if node.lineno < end else node for node in tree.body]
    return Instrumented(ast.fix_missing_locations(tree), tuple(switches.sites))


class _Switches(ast.NodeTransformer):
    def __init__(self, source: str, file: str) -> None:
        self.lines, self.file = [line.encode() for line in source.splitlines()], file
        self.sites: list[Site] = []
        self.scopes: list[str] = []
        self.returns: list[str] = []  # annotations of the functions around
        self.loops: list[bool] = []  # of the function: whether the innermost loop around is a `for`
        self.counts: dict[str, int] = {}

    # ---- scopes -----------------------------------------------------------------------------------------------------

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.scopes.append(node.name)
        node.body = [self.visit(each) if isinstance(each, (ast.FunctionDef, ast.ClassDef)) else each for each in node.body]
        self.scopes.pop()
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.scopes.append(node.name)
        self.returns.append(ast.unparse(node.returns) if node.returns else "")
        around, self.loops = self.loops, []
        node.body = [self.visit(each) for each in node.body]
        self.loops = around
        self.returns.pop()
        self.scopes.pop()
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self.generic_visit(node) if self.returns else node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return self.generic_visit(node) if self.returns else node  # tables of a module are made when it is imported

    visit_AnnAssign = visit_Assign  # type: ignore[assignment]
    visit_Expr = visit_Assign  # type: ignore[assignment]

    # ---- statements -------------------------------------------------------------------------------------------------

    def visit_If(self, node: ast.If) -> ast.AST:
        refuses = self.returns and not node.orelse and self._refuses(node.body, node.test)
        if not refuses:
            return self.generic_visit(node)
        if isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.Or):
            return self.generic_visit(node)  # a test that misses one operand misses the whole
        site = self._site(node.test, "never", "true")
        test = self.visit(node.test)
        node.test = self._eager(site, test) if _binds(test) else self._switched(site, ast.Constant(False), test)
        node.body = [self.visit(each) for each in node.body]
        return node

    def visit_For(self, node: ast.For) -> ast.AST:
        searches = any(isinstance(each, (ast.Return, ast.Raise)) for part in node.body for each in ast.walk(part))
        if self.returns and searches:
            site = self._site(node.iter, "nothing of", "any")
            node.iter = self._switched(site, ast.Tuple([], ast.Load()), self.visit(node.iter))
        else:
            node.iter = self.visit(node.iter)
        self.loops.append(True)
        node.body = [self.visit(each) for each in node.body]
        self.loops.pop()
        node.orelse = [self.visit(each) for each in node.orelse]
        return node

    def visit_While(self, node: ast.While) -> ast.AST:
        self.loops.append(False)  # its condition stays: a mutant that never ends proves nothing
        node.body = [self.visit(each) for each in node.body]
        self.loops.pop()
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        value = node.value
        if value is None or not self.returns:
            return node
        if isinstance(value, ast.IfExp) and any(_is_refusal(each) for each in (value.body, value.orelse)):
            taken = _is_refusal(value.orelse)
            site = self._site(value.test, "always" if taken else "never", "false" if taken else "true")
            test = self.visit(value.test)
            if not _binds(test):
                test = self._switched(site, ast.Constant(taken), test)
            value.test, value.body, value.orelse = test, self.visit(value.body), self.visit(value.orelse)
            return node
        inner = value.operand if isinstance(value, ast.UnaryOp) else value
        if self.returns[-1] != "bool" or isinstance(value, ast.Constant) or isinstance(_pairs(inner), ast.BoolOp):
            return self.generic_visit(node)
        sites = [self._site(value, "always", "false"), self._site(value, "never", "true")]
        found = self.visit(value)
        for site, answer in zip(sites, (True, False)):
            found = self._switched(site, ast.Constant(answer), found)
        node.value = found
        return node

    # ---- expressions ------------------------------------------------------------------------------------------------

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        pairs = _pairs(node)
        return self.visit_BoolOp(pairs) if isinstance(pairs, ast.BoolOp) and self.returns else self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        if not self.returns:
            return node
        if any(isinstance(each, ast.Constant) and isinstance(each.value, str) for each in node.values):
            return self.generic_visit(node)  # what is said, not what is asked
        matters = "false" if isinstance(node.op, ast.And) else "true"
        plain = [copy.deepcopy(each) for each in node.values]  # without switches: one mutant is active at a time
        sites = [self._site(each, "without", matters) for each in node.values]
        found: ast.expr = ast.BoolOp(node.op, [self._seen(site, self.visit(each)) for site, each in zip(sites, node.values)])
        for index, site in enumerate(sites):
            rest = plain[:index] + plain[index + 1 :]
            found = self._either(site, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest), found)
        return found

    def visit_Call(self, node: ast.Call) -> ast.AST:
        asks = isinstance(node.func, ast.Name) and node.func.id in ("all", "any") and len(node.args) == 1
        if not asks or not isinstance(node.args[0], (ast.GeneratorExp, ast.ListComp)) or not self.returns:
            return self.generic_visit(node)
        every = node.func.id == "all"  # type: ignore[attr-defined]
        site = self._site(node, "always" if every else "never", "false" if every else "true")
        node.args[0] = self.generic_visit(node.args[0])  # type: ignore[assignment]
        return self._switched(site, ast.Constant(every), node)

    def visit_ListComp(self, node: Any) -> ast.AST:
        if not self.returns:
            return node
        first = node.generators[0]
        site = self._site(first.iter, "nothing of", "any")
        self.generic_visit(node)
        first.iter = self._switched(site, ast.Tuple([], ast.Load()), first.iter)
        return node

    visit_GeneratorExp = visit_SetComp = visit_DictComp = visit_ListComp

    # ---- switches ---------------------------------------------------------------------------------------------------

    def _site(self, node: ast.expr, what: str, matters: str) -> str:
        text = " ".join(self._text(node).split())
        name = f"{self.file} {'.'.join(self.scopes)}: {what} `{text}`"
        self.counts[name] = count = self.counts.get(name, 0) + 1
        name += f" ({count})" if count > 1 else ""
        self.sites.append(Site(name, self.file, node.lineno, matters))
        return name

    def _text(self, node: ast.expr) -> str:
        """`ast.get_source_segment`, which splits the source each time."""
        if node.end_lineno is None or node.end_col_offset is None:
            return ast.unparse(node)
        taken = self.lines[node.lineno - 1 : node.end_lineno]
        taken[-1] = taken[-1][: node.end_col_offset]
        taken[0] = taken[0][node.col_offset :]
        return b" ".join(taken).decode()

    def _seen(self, site: str, value: Any) -> ast.expr:
        saw = ast.Attribute(ast.Name(PROBE, ast.Load()), "saw", ast.Load())
        return ast.Call(saw, [ast.Constant(site), value], [])

    def _active(self, site: str, is_: ast.cmpop) -> ast.expr:
        active = ast.Attribute(ast.Name(PROBE, ast.Load()), "active", ast.Load())
        return ast.Compare(active, [is_], [ast.Constant(site)])

    def _either(self, site: str, mutant: ast.expr, original: ast.expr) -> ast.expr:
        return ast.IfExp(self._active(site, ast.Eq()), mutant, original)

    def _switched(self, site: str, mutant: ast.expr, original: Any) -> ast.expr:
        return self._either(site, mutant, self._seen(site, original))

    def _eager(self, site: str, test: Any) -> ast.expr:
        """Evaluated all the same, for the names it binds."""
        return ast.BoolOp(ast.And(), [self._seen(site, test), self._active(site, ast.NotEq())])

    def _refuses(self, body: list[ast.stmt], test: ast.expr) -> bool:
        last = body[-1]
        if isinstance(last, ast.Continue):
            return len(self.loops) > 0 and self.loops[-1]
        if isinstance(last, ast.Return) and isinstance(last.value, ast.Name):  # if failure is not None: return failure
            return any(isinstance(each, ast.Name) and each.id == last.value.id for each in ast.walk(test))
        return isinstance(last, ast.Raise) or (isinstance(last, ast.Return) and _is_refusal(last.value))


def _is_refusal(value: ast.expr | None) -> bool:
    if value is None or (isinstance(value, ast.Constant) and value.value in (None, False)):
        return True
    if isinstance(value, (ast.List, ast.Tuple)):
        return not value.elts
    if not isinstance(value, ast.Call):
        return False
    name = getattr(value.func, "attr", getattr(value.func, "id", ""))
    return any(each in name.lower() for each in REFUSALS)


def _binds(node: ast.AST) -> bool:
    return any(isinstance(each, ast.NamedExpr) for each in ast.walk(node))


def _pairs(node: ast.expr) -> ast.expr:
    """``(a, b) == (c, d)`` as ``a == c and b == d``; anything else as it is."""
    if not isinstance(node, ast.Compare) or len(node.ops) != 1 or not isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
        return node
    left, right = node.left, node.comparators[0]
    if not isinstance(left, ast.Tuple) or not isinstance(right, ast.Tuple) or len(left.elts) != len(right.elts):
        return node
    if len(left.elts) < 2 or any(isinstance(each, ast.Starred) for each in (*left.elts, *right.elts)):
        return node
    joined = ast.And() if isinstance(node.ops[0], ast.Eq) else ast.Or()
    values = [_unplaced(ast.Compare(a, [type(node.ops[0])()], [b]), node) for a, b in zip(left.elts, right.elts)]
    return ast.copy_location(ast.BoolOp(joined, values), node)


def _unplaced(made: ast.expr, like: ast.expr) -> ast.expr:
    """A node that is nowhere in the source as it is, at the line of ``like``."""
    made.lineno, made.col_offset, made.end_lineno = like.lineno, like.col_offset, None
    return made


# ---- importing -------------------------------------------------------------------------------------------------------


class Modules:
    """The modules to mutate, by name; imported from then on with switches in them. ``root``: what files are named from."""

    def __init__(self, paths: Mapping[str, Path], root: Path) -> None:
        self.paths, self.root = dict(paths), root

    def named(self, module: str) -> str:
        return self.paths[module].resolve().relative_to(self.root.resolve()).as_posix()

    @functools.cache  # noqa: B019 (as long as the process)
    def instrumented(self, module: str) -> Instrumented:
        return instrument(self.paths[module].read_text(encoding="utf-8"), self.named(module))

    def sites(self) -> list[Site]:
        return [site for module in sorted(self.paths) for site in self.instrumented(module).sites]

    def digest(self, module: str) -> str:
        return self.digests[module]

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in sorted(self.paths.items())}

    def install(self, probe: Probe) -> None:
        loaded = sorted(set(self.paths) & set(sys.modules))
        if loaded:
            raise RuntimeError(f"mutate: these modules were imported before their mutants were made: {', '.join(loaded)}")
        probe.matters.update({site.id: site.matters for site in self.sites()})
        sys.meta_path.insert(0, _Finder(self, probe))


class _Finder:
    def __init__(self, modules: Modules, probe: Probe) -> None:
        self.modules, self.probe = modules, probe

    def find_spec(self, name: str, path: Iterable[str] | None = None, target: ModuleType | None = None) -> Any:
        if name not in self.modules.paths:
            return None
        file = self.modules.paths[name]
        return importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file), self))


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, finder: _Finder) -> None:
        super().__init__(name, path)
        self.finder = finder

    def get_code(self, fullname: str) -> CodeType:  # never one that was compiled before, nor one for others to find
        return compile(self.finder.modules.instrumented(fullname).tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, PROBE, self.finder.probe)
        super().exec_module(module)
