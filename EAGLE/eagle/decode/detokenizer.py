"""Text of tokens as they arrive, in whole characters."""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for the first bytes of a character."""


class Detokenizer:
    """The text of tokens that arrive one by one, in whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._tokens = tokenizer, list[int]()
        self._start, self._done = 0, 0  # the text of tokens before _done was returned; decoding starts at _start

    def add(self, token: int) -> str:
        """The text that ``token`` adds; empty while a character is incomplete."""
        self._tokens.append(token)
        text = self.rest()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._start, self._done = self._done, len(self._tokens)
        return text

    def rest(self) -> str:
        """The text that was not returned yet: that of an incomplete character."""
        before = self._decode(self._tokens[self._start : self._done])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
