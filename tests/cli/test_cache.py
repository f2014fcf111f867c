"""`hasten cache` on a small folder, and what it says of one that is damaged or none."""

from __future__ import annotations

import json

import pytest

from hasten.cache.store import DiskStore
from hasten.cli import app
from hasten.models import builtin
from tests.cache.test_store import chain, file_of


def run(*arguments):
    with pytest.raises(SystemExit) as exit_info:
        app.main(["cache", *map(str, arguments)])
    return exit_info.value.code or 0


@pytest.fixture
def folder(tmp_path):
    store = DiskStore(tmp_path)
    pieces = chain(3)
    for one in pieces:
        store.put(one)
    store.pin("root", "system", [one.key for one in pieces[:2]], 6, None)
    store.close()
    return tmp_path, pieces


def test_ls_lists_pieces_and_pins(folder, capsys):
    path, pieces = folder
    assert run("ls", path) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 3 and "3 pieces" in err
    (pinned,) = [line for line in lines if "pinned as 'system'" in line]
    assert pinned.startswith(pieces[1].key[:12]) and "tokens 3 to 6" in pinned
    assert run("ls", path, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {record["key"] for record in records} == {one.key for one in pieces}


def test_show_is_a_tree(folder, capsys):
    path, pieces = folder
    assert run("show", pieces[1].key[:10], path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip()[:12] for line in lines[::2]] == [one.key[:12] for one in pieces]
    assert lines[1].strip() == "0 0 7" and lines[2].startswith("  ") and lines[4].startswith("    ")
    assert run("show", "zz", path) == 2
    assert "key: expected the beginning of one key" in capsys.readouterr().err
    assert run("show", pieces[0].key, path, "--model", builtin.path()) == 0
    assert capsys.readouterr().out.splitlines()[1].strip().startswith("'")


def test_verify_says_what_is_damaged(folder, capsys):
    path, pieces = folder
    assert run("verify", path) == 0
    assert capsys.readouterr().out == "3 pieces are whole, 0 were not\n"
    file = file_of(path, pieces[2])
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert run("verify", path) == 2
    out, err = capsys.readouterr()
    assert out == "2 pieces are whole, 1 were not\n" and pieces[2].key in err and "checksum" in err


def test_prune_needs_a_limit_and_keeps_pins(folder, capsys):
    path, _ = folder
    assert run("prune", path) == 2
    assert "--max-bytes: expected a limit" in capsys.readouterr().err
    assert run("prune", path, "--max-bytes", "0") == 0
    assert capsys.readouterr().out.startswith("1 pieces went, ")
    assert run("prune", path, "--ttl", "1000") == 0


def test_pin_computes_and_keeps(tmp_path, capsys):
    assert run("pin", "system", tmp_path, "--prompt", "def fibonacci(n):\n" * 8, "--ttl", "60") == 0
    out, _ = capsys.readouterr()
    assert out.endswith("tokens are kept as 'system'\n")
    assert run("ls", tmp_path) == 0
    assert "pinned as 'system'" in capsys.readouterr().out


def test_a_folder_that_is_none(tmp_path, capsys):
    assert run("ls", tmp_path) == 2
    assert "path: expected a folder of prompt caches" in capsys.readouterr().err
