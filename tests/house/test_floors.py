"""Arrows point down: floors, separate implementations, libraries at home, one printer, one reader of settings."""

from __future__ import annotations

import pytest

from tests.house import rules

ALL_RULES = (
    rules.floor_violations,
    rules.implementation_violations,
    rules.library_violations,
    rules.print_violations,
    rules.environment_violations,
)


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.__name__)
def test_every_module_keeps_the_rule(rule):
    wrong = [line for module, source in rules.modules().items() for line in rule(module, source)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_rules_see_the_package():
    assert {"hasten.__init__", "hasten.errors", "hasten.cli.app"} <= set(rules.modules())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hasten.masks", "import hasten.ops.tiles"),
        ("hasten.masks.bands", "from ..ops import tiles"),
        ("hasten.masks.bands", "from .. import ops"),
        ("hasten.ops.tiles", "def late():\n    from hasten.models import registry"),
        ("hasten.ops.tiles", "def late():\n    importlib.import_module('hasten.models.registry')"),
        ("hasten.ops.tiles", "if TYPE_CHECKING:\n    from hasten.engine import Engine"),
        ("hasten.engine.runner", "from hasten.train import loop"),
        ("hasten.cache.__init__", "from ..convert import gqa"),
        ("hasten.models.llama", "from hasten import attention"),
        ("hasten.models.llama", "import hasten"),
        ("hasten.errors", "from hasten.config import cache_dir"),
        ("hasten.utils", "x = 1"),
    ],
)
def test_an_arrow_that_points_up_is_refused(module, source):
    assert len(rules.floor_violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hasten.__init__", "from hasten.engine import Engine"),
        ("hasten.cli.generate", "from hasten.engine import Engine\nfrom hasten.cli import app"),
        (
            "hasten.ops.tiles",
            "from hasten import masks\nfrom .. import errors\nfrom . import cost\nfrom .cost import flops",
        ),
        ("hasten.ops.__init__", "from .attention import attention\nfrom ..masks import Causal"),
    ],
)
def test_an_arrow_that_points_down_is_allowed(module, source):
    assert rules.floor_violations(module, source) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hasten.ops.reference", "from hasten.ops import blockwise"),
        ("hasten.ops.reference", "from . import portable"),
        ("hasten.ops.blockwise", "from hasten.ops.portable.forward import launch"),
        ("hasten.ops.portable.forward", "from ..reference import attend"),
        ("hasten.ops.hopper.forward", "def late():\n    from hasten.ops.portable import forward"),
    ],
)
def test_an_implementation_that_imports_another_is_refused(module, source):
    assert len(rules.implementation_violations(module, source)) == 1


def test_an_implementation_may_import_its_own_parts_and_the_shared_ones():
    source = "from . import inner\nfrom .. import tiles\nfrom hasten.ops.portable import config"
    assert rules.implementation_violations("hasten.ops.portable.forward", source) == []
    assert rules.implementation_violations("hasten.ops.attention", "from . import blockwise, portable") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hasten.engine.engine", "from rich.progress import Progress"),
        ("hasten.cache.store", "import fastapi"),
        ("hasten.bench.run", "import typer"),
        ("hasten.ops.cost", "import matplotlib.pyplot as plt"),
        ("hasten.models.accelerate", "def late():\n    import triton"),
        ("hasten.ops.attention", "from transformers import AttentionInterface"),
        ("hasten.__init__", "import transformers"),
    ],
)
def test_a_library_away_from_home_is_refused(module, source):
    assert len(rules.library_violations(module, source)) == 1


def test_a_library_at_home_is_allowed():
    assert rules.library_violations("hasten.cli.generate", "import rich\nimport typer") == []
    assert rules.library_violations("hasten.bench.plots", "import matplotlib") == []


def test_print_is_refused_outside_the_command_line():
    assert len(rules.print_violations("hasten.engine.engine", "def f():\n    print('x')")) == 1
    assert rules.print_violations("hasten.cli.generate", "print('x')") == []


@pytest.mark.parametrize(
    "source", ["os.environ['HASTEN_X']", "os.getenv('X', '')", "from os import environ", 'os.environ.get("OTHER")']
)
def test_reading_the_environment_outside_config_is_refused(source):
    assert len(rules.environment_violations("hasten.ops.choose", source)) == 1
    assert rules.environment_violations("hasten.config", source) == []


def test_the_variable_of_another_library_is_allowed_where_listed():
    assert rules.environment_violations("hasten.ops.choose", 'os.environ.get("TRITON_INTERPRET")') == []
