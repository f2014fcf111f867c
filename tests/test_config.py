"""The environment is read at call time, not at import (that only config reads it is a rule of tests/house)."""

from __future__ import annotations

from pathlib import Path

import pytest

from hasten import config
from hasten.errors import ArgumentError


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in (*config.VARIABLES, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_unset_variables_ask_for_nothing():
    assert config.forced_implementation() is None
    assert config.num_threads() is None
    assert config.cache_dir() == Path.home() / ".cache" / "hasten"
    assert config.environment() == dict.fromkeys(config.VARIABLES)


def test_each_variable_is_read_when_asked(monkeypatch):
    monkeypatch.setenv("HASTEN_IMPLEMENTATION", " reference ")
    monkeypatch.setenv("HASTEN_NUM_THREADS", "3")
    monkeypatch.setenv("XDG_CACHE_HOME", "/base")
    assert config.forced_implementation() == "reference"
    assert config.num_threads() == 3
    assert config.cache_dir() == Path("/base/hasten")
    monkeypatch.setenv("HASTEN_CACHE", "/mine")
    assert config.cache_dir() == Path("/mine")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_thread_count_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("HASTEN_NUM_THREADS", text)
    with pytest.raises(ArgumentError, match="HASTEN_NUM_THREADS: expected a positive integer"):
        config.num_threads()


def test_there_are_at_most_three():
    assert len(config.VARIABLES) <= 3
