"""The public names equal the list, each can be had, and a wrong one fails as Python's own would."""

from __future__ import annotations

import pytest

import hasten
from tests.house.public_names import PUBLIC_NAMES


def differences(names: list[str], expected: set[str]) -> dict[str, list[str]]:
    return {"unlisted": sorted(set(names) - expected), "missing": sorted(expected - set(names))}


def test_public_names_equal_the_list():
    assert differences(hasten.__all__, PUBLIC_NAMES) == {"unlisted": [], "missing": []}
    assert len(hasten.__all__) == len(set(hasten.__all__))


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_every_public_name_can_be_had(name):
    assert getattr(hasten, name).__doc__
    assert name in dir(hasten)


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="attenshun"):
        _ = hasten.attenshun


def test_the_comparison_sees_both_directions():
    assert differences(["a", "b"], {"b", "c"}) == {"unlisted": ["a"], "missing": ["c"]}
