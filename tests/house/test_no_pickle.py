"""Nothing that is read can run code: no module of ours unpickles."""

from __future__ import annotations

import ast

from tests.house import rules

REFUSED = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def violations(module: str, source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{module}:{node.lineno}: {name}" for name in names if name.split(".")[0] in REFUSED]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            is_safe = any(one.arg == "weights_only" and ast.unparse(one.value) == "True" for one in node.keywords)
            found += [] if is_safe else [f"{module}:{node.lineno}: torch.load without weights_only=True"]
    return found


def test_no_module_unpickles():
    wrong = [line for module, source in rules.modules().items() for line in violations(module, source)]
    assert not wrong, "\n".join(wrong)


def test_what_unpickles_is_refused():
    assert len(violations("m", "import pickle\nfrom dill import loads\ntorch.load(path)\n")) == 3
    assert violations("m", "import json\ntorch.load(path, weights_only=True)\nsafetensors.torch.load(data)\n") == []
