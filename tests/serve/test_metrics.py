"""`/metrics` counts what clients were told: responses, tokens, cached ones, times; and pages are all there."""

from __future__ import annotations

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hasten.serve.keys import Keys
from tests.serve.serving import NAME, client, engine, serving

KEY, OPERATOR = "the-only-key-0123456789", "the-operator-0123456789"


def read(address):
    answer = httpx2.get(f"{address}/metrics", headers={"Authorization": f"Bearer {OPERATOR}"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_metrics_count_what_clients_were_told(tmp_path):
    prompt = list(range(5, 105))
    ask = {"model": NAME, "prompt": prompt, "max_tokens": 4, "temperature": 0}
    keys = {"keys": Keys([KEY]), "metrics_keys": Keys([OPERATOR])}
    with engine(tmp_path) as made, serving(made, **keys) as address, client(address, KEY) as one:
        usages = [one.completions.create(**ask, n=2).usage]
        *_, last = one.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        usages.append(last.usage)
        with pytest.raises(openai.BadRequestError):
            one.completions.create(**ask, top_p=0)
        for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
            assert httpx2.get(f"{address}/metrics", headers=headers).status_code == 401
        assert httpx2.get(f"{address}/v1/models").status_code == 401
        found = read(address)
    assert found["hasten_prompt_tokens_total",] == sum(one.prompt_tokens for one in usages) == 200
    assert found["hasten_generated_tokens_total",] == sum(one.completion_tokens for one in usages) == 12
    assert found["hasten_cached_tokens_total",] == sum(one.prompt_tokens_details.cached_tokens for one in usages) >= 96
    assert [found["hasten_responses_total", status] for status in ("200", "400", "401")] == [2, 1, 1]
    assert found["hasten_continuations_total", "length"] == 3
    assert found["hasten_ttft_seconds_count",] == 2 and found["hasten_ttft_seconds_sum",] > 0
    assert found["hasten_tpot_seconds_count",] == 3
    assert found["hasten_calls_waiting",] == found["hasten_sequences_running",] == 0
    pages = [found["hasten_pages", "0", state] for state in ("free", "cached", "used")]
    assert sum(pages) == made.stats().num_pages[0] and pages[1] > 0 == pages[2]


def test_without_keys_of_their_own_metrics_are_there_only_where_there_are_no_tenants(tmp_path):
    with engine(tmp_path) as made:
        for keys, status in ((None, 200), (Keys([KEY]), 404)):
            with serving(made, keys=keys) as address:
                answer = httpx2.get(f"{address}/metrics", headers={"Authorization": f"Bearer {KEY}"})
                assert answer.status_code == status
