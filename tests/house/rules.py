"""The rules of the house as functions: each takes a module's name and source and returns what is wrong with it.

The floors follow docs/design/layout.md. Tests run every rule over src/hasten, and over small bad sources that it
must refuse. Nothing here imports hasten: a rule reads text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SRC = Path(__file__).parents[2] / "src"

# lowest first; a module imports only rows below its own, and names on one row do not import each other
FLOORS = (
    {"errors"},
    {"config"},
    {"masks"},
    {"ops"},
    {"models"},
    {"cache", "convert"},
    {"engine", "train"},
    {"serve", "bench"},
    {"cli"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# two implementations of one contract never import each other; what they share is in masks and in the rest of ops
IMPLEMENTATIONS = {"reference", "blockwise", "portable", "hopper"}

# library -> the only folders that may import it
LIBRARY_HOMES = {
    **{name: {"cli"} for name in ("typer", "click", "rich")},
    **{name: {"serve", "cli"} for name in ("starlette", "fastapi", "uvicorn", "prometheus_client", "httpx")},
    "matplotlib": {"bench"},
    "llguidance": {"engine"},
    "triton": {"ops"},
    "transformers": {"models", "cache", "convert", "engine", "train", "serve", "bench", "cli"},
    "tokenizers": {"models", "engine", "train", "serve", "bench", "cli"},
}

# variables of other libraries that a module may read where it meets that library
FOREIGN_VARIABLES = ("TRITON_INTERPRET",)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> dict[str, str]:
    """Return the source of every module of hasten by its dotted name; packages keep '.__init__'."""
    return {
        ".".join(path.relative_to(SRC).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted((SRC / "hasten").rglob("*.py"))
    }


def home_of(module: str) -> str:
    """Return the name on the first level below hasten: 'hasten.ops.tiles' is at home in 'ops'."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported_names(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import, wherever in the file it stands."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def floor_violations(module: str, source: str) -> list[str]:
    """Refuse an import that does not point down. `hasten/__init__.py` stands above all and is free."""
    home = home_of(module)
    if home == "__init__":
        return []
    if home not in FLOOR_OF:
        return [f"{module}: {home!r} has no floor; give it one in FLOORS and in docs/design/layout.md"]
    wrong = []
    for line, name in imported_names(module, source):
        target = home_of(name)
        if name.split(".")[0] != "hasten" or target == home:
            continue
        if target not in FLOOR_OF:
            wrong.append(f"{module}:{line}: imports {name} from the top of hasten, which is above every floor")
        elif FLOOR_OF[target] >= FLOOR_OF[home]:
            wrong.append(f"{module}:{line}: {home} imports {target}, which is not below it")
    return wrong


def implementation_violations(module: str, source: str) -> list[str]:
    """Refuse an implementation of an op that imports another one."""
    parts = module.split(".")
    own = parts[2] if len(parts) > 2 and parts[1] == "ops" else ""
    if own not in IMPLEMENTATIONS:
        return []
    wrong = []
    for line, name in imported_names(module, source):
        target = name.split(".")
        if target[:2] == ["hasten", "ops"] and len(target) > 2 and target[2] in IMPLEMENTATIONS - {own}:
            wrong.append(f"{module}:{line}: {own} imports {target[2]}; move what both need to masks, tiles or ops")
    return wrong


def library_violations(module: str, source: str) -> list[str]:
    """Refuse a library outside the folders that own what it is for."""
    return [
        f"{module}:{line}: {name.split('.')[0]} may be imported only in {sorted(LIBRARY_HOMES[name.split('.')[0]])}"
        for line, name in imported_names(module, source)
        if name.split(".")[0] in LIBRARY_HOMES and home_of(module) not in LIBRARY_HOMES[name.split(".")[0]]
    ]


def print_violations(module: str, source: str) -> list[str]:
    """Refuse print() outside the command line."""
    if home_of(module) == "cli":
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"{module}:{call.lineno}: print() belongs to hasten.cli; return the text instead"
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]


def environment_violations(module: str, source: str) -> list[str]:
    """Refuse reading the environment outside config, except a listed variable of another library."""
    if module == "hasten.config":
        return []
    lines = source.splitlines()
    reads = {
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} & {"environ", "getenv"})
    }
    return [
        f"{module}:{line}: the environment is read in hasten.config only"
        for line in sorted(reads)
        if not any(f'"{name}"' in lines[line - 1] for name in FOREIGN_VARIABLES)
    ]


def is_kernel(function: Function) -> bool:
    """Tell whether a function is compiled by Triton or Gluon: some decorator ends in 'jit'."""
    names = [ast.unparse(mark.func if isinstance(mark, ast.Call) else mark) for mark in function.decorator_list]
    return any(name.split(".")[-1] == "jit" and not name.startswith("torch.") for name in names)


def count_lines(function: Function) -> int:
    """Count from `def` to the last line, without the docstring: a contract may be long, code may not."""
    total = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def budget_violations(module: str, source: str) -> list[str]:
    """Refuse a file, function or kernel that outgrew its budget."""
    wrong = []
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        wrong.append(f"{module}: {num_lines} lines, at most {MAX_FILE_LINES}; split it by idea")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function):
            most = MAX_KERNEL_LINES if is_kernel(node) else MAX_FUNCTION_LINES
            if count_lines(node) > most:
                wrong.append(f"{module}:{node.lineno}: {node.name} has {count_lines(node)} lines, at most {most}")
    return wrong


def docstring_violations(module: str, source: str) -> list[str]:
    """Refuse a module, or a public function or class on its first level, that says nothing about itself.

    Public is what `__all__` names where a module has one, else every name without a leading underscore.
    """
    tree = ast.parse(source)
    wrong = [] if ast.get_docstring(tree) else [f"{module}: the module opens without saying what it answers"]
    listed = listed_names(tree)
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            is_public = node.name in listed if listed is not None else not node.name.startswith("_")
            if is_public and not ast.get_docstring(node):
                wrong.append(f"{module}:{node.lineno}: {node.name} is public and has no docstring")
    return wrong


def listed_names(tree: ast.Module) -> list[str] | None:
    """Return the names written out in `__all__`, or None when the module has none or computes it."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            names = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
            return [name.value for name in names] if all(isinstance(name, ast.Constant) for name in names) else None
    return None
