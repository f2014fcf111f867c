"""From the fields of a request's body to what the engine understands; a field that means nothing is refused by name.

Called by each protocol. Ranges are checked by `Sampling`, whose errors name the same fields.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from hasten.engine.sampling import Sampling
from hasten.serve.refusals import Refusal, bad_field

# fields of both protocols that are Sampling's own, by the same name
SAMPLED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
)


def read_body(data: bytes) -> dict[str, Any]:
    """The fields that are not null of a JSON object. Raises Refusal (400) for anything else."""
    try:
        body = json.loads(data, parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        hint = "send a JSON object in UTF-8"
        raise Refusal(400, f"the body is not JSON ({str(error)[:100]}); {hint}", code="invalid_json") from error
    if not isinstance(body, dict):
        got = type(body).__name__
        raise Refusal(400, f"the body: expected a JSON object, got {got}; send one", code="invalid_json")
    return {name: value for name, value in body.items() if value is not None}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def refuse_others(body: Mapping[str, Any], known: Collection[str], within: str = "") -> None:
    """Raise Refusal (400) that names the first field that is not known."""
    for name in body:
        if name not in known:
            message = f"{within}{name}: expected a field among {', '.join(sorted(known))}, got this one; leave it out"
            raise Refusal(400, message, param=f"{within}{name}"[:100], code="unknown_field")


def flag(body: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; false if it is not there."""
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise bad_field(name, "true or false", json.dumps(value), "correct it")
    return value


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream ends with its usage (`stream_options.include_usage`)."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not flag(body, "stream"):
        raise bad_field("stream_options", "an object beside stream true", json.dumps(options), "leave it out")
    refuse_others(options, ("include_usage",), "stream_options.")
    return flag(options, "include_usage")


def sampling(body: Mapping[str, Any], **own: Any) -> Sampling:
    """How tokens are chosen, from the fields that protocols share; own: those that each reads by itself.

    The temperature is 1 where none is given, as in OpenAI's. The likeliest token is among those of any top_p, top_k
    and min_p: beside temperature 0 they are checked, and change nothing.
    """
    values: dict[str, Any] = {"temperature": 1.0, **{name: body[name] for name in SAMPLED if name in body}, **own}
    values["logit_bias"] = _bias(body.get("logit_bias", {}))
    stop = body.get("stop", [])
    if not isinstance(stop, str | list):
        raise bad_field("stop", "a string or a list of strings", json.dumps(stop), "correct it")
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if values["temperature"] == 0 and not isinstance(values["temperature"], bool):
        Sampling(**{**values, "temperature": 1.0})
        values = {name: value for name, value in values.items() if name not in ("top_p", "top_k", "min_p")}
    return Sampling(**values)


def _bias(written: Any) -> dict[int, Any]:
    if not isinstance(written, dict):
        raise bad_field("logit_bias", "an object {token id: bias}", json.dumps(written), "correct it")
    strange = [key for key in written if not (key.isascii() and key.isdigit() and len(key) < 12)]
    if strange:
        raise bad_field("logit_bias", "token ids as keys", json.dumps(strange[0]), "correct it")
    return {int(key): value for key, value in written.items()}


__all__ = ["flag", "read_body", "refuse_others", "sampling", "wants_usage"]
