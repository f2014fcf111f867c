"""API keys: who may ask, and the salt that keeps each one's prompt cache apart.

Only digests and salts are held; a key is never logged and never in an error.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from hasten.errors import ArgumentError
from hasten.serve.refusals import Refusal

LEAST = 16
_SALT = b"hasten: salt of a prompt cache"


class Keys:
    """The keys of a server; none at all lets everybody in, as one tenant."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        given = list(keys)
        short = next((place for place, key in enumerate(given, 1) if len(key) < LEAST or not _is_plain(key)), None)
        if short is not None:
            expected = f"keys of at least {LEAST} printable ASCII characters without spaces"
            raise ArgumentError("api keys", expected, f"another as key {short}", "make one: openssl rand -hex 32")
        self._digests = [_digest(key) for key in given]

    @classmethod
    def read(cls, file: str | Path) -> Keys:
        """The keys of a file, one a line; empty lines and those with # at first are left out."""
        try:
            lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ArgumentError("api_key_file", "a file that can be read", str(file), type(error).__name__) from error
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ArgumentError("api_key_file", "at least one key", "none", "write one a line")
        return cls(keys)

    def salt(self, authorization: str | None) -> str:
        """The salt of who sends this header; "" if there are no keys. Raises Refusal (401) for others."""
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        is_known = [hmac.compare_digest(digest, one) for one in self._digests]  # all of them: time tells nothing
        if scheme.lower() != "bearer" or not any(is_known):
            message = "the key is missing or unknown; send it as Authorization: Bearer <key>"
            raise Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return hmac.new(key.strip().encode(), _SALT, hashlib.sha256).hexdigest()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_plain(key: str) -> bool:
    return all("!" <= letter <= "~" for letter in key)


__all__ = ["Keys"]
