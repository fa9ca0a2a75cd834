"""Guesses from a row's own text."""

from hypothesis import given
from hypothesis import strategies as st

from regrow.modeling.lookup import Lookup


def test_what_followed_the_last_three_tokens_last_is_guessed():
    assert Lookup([1, 2, 3, 4, 1, 2, 3, 5, 6, 1, 2, 3]).guess(9) == [5, 6, 1, 2]
    assert Lookup([1, 2, 3, 4, 5]).guess(9) == []
    assert Lookup([1, 2]).guess(9) == []
    assert Lookup([1, 2, 3, 4, 1, 2, 3]).guess(2) == [4, 1]
    assert Lookup([1, 2, 3, 4, 1, 2, 3]).guess(0) == []


def test_a_loop_goes_on_as_a_loop():
    assert Lookup([9, 7, 7, 7, 7]).guess(9) == [7, 7, 7, 7]
    assert Lookup([1, 2, 1, 2, 1]).guess(9) == [2, 1, 2, 1]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 20), st.integers(0, 40))
def test_guesses_agree_with_a_search_from_behind(tokens, most, cut):
    row = Lookup(tokens[:cut])
    row.extend(tokens[cut:])
    expected = []
    for begin in range(len(tokens) - 1, 2, -1):
        if tokens[begin - 3 : begin] == tokens[-3:]:
            text = list(tokens)
            for index in range(min(most, 4)):
                text.append(text[begin + index])
            expected = text[len(tokens) :]
            break
    assert row.guess(most) == expected
