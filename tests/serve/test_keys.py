"""API keys: who has none is refused, tenants share no prefix, and no key is in a log or an error."""

from __future__ import annotations

import logging

import httpx2
import openai
import pytest

from hasten.errors import ArgumentError
from hasten.serve.keys import Keys
from tests.serve.serving import NAME, client, engine, serving

FIRST, SECOND = "first-key-0123456789", "second-key-0123456789"


def test_tenants_are_let_in_and_share_no_prefix(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    prompt = list(range(5, 105))

    def cached(one):
        answer = one.completions.create(model=NAME, prompt=prompt, max_tokens=2, temperature=0)
        return answer.usage.prompt_tokens_details.cached_tokens

    with engine(tmp_path) as made, serving(made, keys=Keys([FIRST, SECOND])) as address:
        with client(address, FIRST) as first, client(address, SECOND) as second:
            assert [cached(first), cached(second)] == [0, 0]
            assert cached(first) >= 96 and cached(second) >= 96
        with client(address, "another-key-0123456789") as other:
            for call in (other.models.list, lambda: cached(other)):
                with pytest.raises(openai.AuthenticationError) as caught:
                    call()
                assert caught.value.code == "invalid_api_key" and "0123456789" not in str(caught.value)
        assert httpx2.get(f"{address}/v1/models").status_code == 401
        assert httpx2.get(f"{address}/health").status_code == 200
    ours = [record for record in caplog.records if not record.name.startswith(("openai", "httpx", "httpcore"))]
    assert not [record for record in ours if "0123456789" in record.getMessage()]


def test_salts_are_stable_differ_and_do_not_hold_the_key():
    salts = [Keys([FIRST, SECOND]).salt(f"Bearer {key}") for key in (FIRST, SECOND, FIRST)]
    assert salts[0] == salts[2] != salts[1] and FIRST not in salts[0] and len(salts[0]) == 64
    assert Keys().salt(None) == Keys().salt(f"Bearer {FIRST}") == ""


def test_keys_of_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of the two\n\n{FIRST}\n  {SECOND}\n")
    assert Keys.read(file).salt(f"bearer {SECOND}") == Keys([SECOND]).salt(f"Bearer {SECOND}")
    for text in ("", "# none\n", "short\n", "with spaces in it all over\n"):
        file.write_text(text)
        with pytest.raises(ArgumentError) as caught:
            Keys.read(file)
        assert not text.strip() or text.strip() not in str(caught.value)
    with pytest.raises(ArgumentError, match="api_key_file"):
        Keys.read(tmp_path / "absent")
