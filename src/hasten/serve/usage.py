"""What a call took, in tokens, as OpenAI counts them. Called by each protocol."""

from __future__ import annotations

from typing import Any

from hasten.engine import Finished


class Usage:
    """Counts a call's records: a prompt once, whatever the number of its continuations."""

    def __init__(self) -> None:
        self._prompts: dict[int, Finished] = {}
        self.num_new = 0

    def add(self, number: int, record: Finished, num_new: int) -> None:
        """A record of the prompt of that number, with so many new tokens."""
        self._prompts[number] = record
        self.num_new += num_new

    def json(self) -> dict[str, Any]:
        """`usage`, with the tokens that the prompt cache had."""
        num_prompt = sum(one.prompt_tokens for one in self._prompts.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_new,
            "total_tokens": num_prompt + self.num_new,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in self._prompts.values())},
        }


__all__ = ["Usage"]
