"""Guesses of what a row says next, copied from what it has said already.

Source: prompt lookup decoding (Saxena, 2023), a speculative decoding (Leviathan et al., arXiv 2211.17192)
without a second model. The model itself judges every guess, so the text stays what it would have been;
answers that repeat their prompt, a list's pattern or themselves need a fraction of the forward passes.
"""

from collections.abc import Sequence

_NGRAM = 3
_LENGTH = 4  # tokens of a guess; on a CPU a token more costs about what it may save


class Lookup:
    """Text of one row and where each of its n-grams was seen last.

    Args:
        tokens: the prompt.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram -> index of what followed it last
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append what the row has said."""
        for token in tokens:
            if len(self._tokens) >= _NGRAM:
                self._followers[tuple(self._tokens[-_NGRAM:])] = len(self._tokens)
            self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """A few next tokens, `most` at most: what followed the last n-gram before; none if it is new."""
        begin = self._followers.get(tuple(self._tokens[-_NGRAM:]))
        guess: list[int] = []
        if begin is not None:
            said = len(self._tokens)
            for place in range(begin, begin + min(_LENGTH, most)):
                # past what was said, the guess goes on from itself: a loop goes on as a loop
                guess.append(self._tokens[place] if place < said else guess[place - said])
        return guess
