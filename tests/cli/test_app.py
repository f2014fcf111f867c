"""The command line without its verbs: lazy loading, exit codes, where words go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Annotated

import pytest
import typer

from hasten.cli import app
from hasten.errors import ArgumentError


@pytest.fixture
def add_verb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def add(name: str, member: str, value: object) -> None:
        module = ModuleType(f"hasten.cli.{name}")
        setattr(module, member, value)
        monkeypatch.setitem(sys.modules, f"hasten.cli.{name}", module)
        monkeypatch.setitem(app.VERBS, name, f"the {name} line")

    yield add


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        app.main(arguments)
    code = exit_info.value.code
    return code if isinstance(code, int) else 0


def test_a_function_verb_gets_its_options(add_verb, capsys):
    def hello(name: str, times: Annotated[int, typer.Option()] = 1) -> None:
        print(" ".join([name] * times))

    add_verb("hello", "hello", hello)
    assert run("hello", "you", "--times", "2") == 0
    assert capsys.readouterr().out == "you you\n"


def test_an_app_verb_keeps_its_only_subcommand(add_verb, capsys):
    measure = typer.Typer()

    @measure.command()
    def attention(size: int = 3) -> None:
        print(size)

    add_verb("measure", "app", measure)
    assert run("measure", "attention", "--size", "4") == 0
    assert capsys.readouterr().out == "4\n"
    assert run("measure", "--help") == 0
    assert "attention" in capsys.readouterr().out


def fail() -> None:
    raise ArgumentError("q", "4 dimensions", "3", "add a\nbatch dimension")


def test_our_error_is_one_line_on_stderr_and_exit_code_2(add_verb, capsys):
    add_verb("fail", "fail", fail)
    assert run("fail") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: q: expected 4 dimensions, got 3; add a batch dimension\n"


def test_traceback_is_shown_on_request(add_verb, capsys):
    add_verb("fail", "fail", fail)
    assert run("--traceback", "fail") == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "in fail" in err
    assert err.splitlines()[-1].startswith("error: q: expected")


def test_other_errors_are_bugs_and_keep_their_traceback(add_verb):
    def crash() -> None:
        raise ZeroDivisionError

    add_verb("crash", "crash", crash)
    with pytest.raises(ZeroDivisionError):
        app.main(["crash"])


def test_interrupt_exits_130(add_verb):
    def wait() -> None:
        raise KeyboardInterrupt

    add_verb("wait", "wait", wait)
    assert run("wait") == 130


def test_unknown_verb_exits_2_and_names_the_nearest(capsys):
    assert run("docter") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "doctor" in err


def test_help_lists_every_verb_without_loading_any():
    program = (
        "import sys\n"
        "from hasten.cli.app import VERBS, main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'triton', 'transformers', 'matplotlib'} | {f'hasten.cli.{verb}' for verb in VERBS}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    for verb in app.VERBS:
        assert verb in done.stdout
    assert "loaded: []" in done.stdout


def test_version_is_the_installed_one(capsys):
    from importlib.metadata import version

    assert run("--version") == 0
    assert capsys.readouterr().out == version("hasten") + "\n"


def test_a_bad_thread_count_names_the_variable(add_verb, capsys, monkeypatch):
    add_verb("nothing", "nothing", lambda: None)
    monkeypatch.setenv("HASTEN_NUM_THREADS", "many")
    assert run("nothing") == 2
    assert capsys.readouterr().err.startswith("error: HASTEN_NUM_THREADS: expected a positive integer, got 'many'")


@pytest.mark.parametrize("verb", sorted(app.VERBS))
def test_every_listed_verb_loads_and_shows_help(verb, capsys):
    assert run(verb, "--help") == 0
    assert "Usage: hasten" in capsys.readouterr().out
