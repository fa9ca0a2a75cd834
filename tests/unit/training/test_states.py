import numpy as np
import pytest
import torch

from regrow.errors import RunError, UserError
from regrow.training.states import StateStore

IDENTITY = {"teacher": "abc", "text": "def"}


def states(row, tokens, width=8):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(row))


def test_rows_come_back_rounded_to_bf16(tmp_path):
    store = StateStore(tmp_path / "s", IDENTITY, [3, 0, 5], 8)
    for row, tokens in ((2, 5), (0, 3), (1, 0)):
        store.write(row, states(row, tokens))
    for row, tokens in ((0, 3), (1, 0), (2, 5)):
        assert torch.equal(store.read(row), states(row, tokens).bfloat16())


def test_reopened_store_knows_what_is_missing(tmp_path):
    store = StateStore(tmp_path / "s", IDENTITY, [3, 2, 5], 8)
    store.write(2, states(2, 5))
    store.flush()
    again = StateStore(tmp_path / "s", IDENTITY, [3, 2, 5], 8)
    assert again.missing([2, 0, 0, 1]) == [0, 1]
    assert torch.equal(again.read(2), states(2, 5).bfloat16())
    with pytest.raises(RunError, match="lacks row 0"):
        again.read(0)


def test_damage_is_found_when_the_row_is_read(tmp_path):
    store = StateStore(tmp_path / "s", IDENTITY, [3, 2], 8)
    for row, tokens in ((0, 3), (1, 2)):
        store.write(row, states(row, tokens))
    store.flush()
    raw = np.memmap(tmp_path / "s" / "states.bin", np.uint8, "r+")
    raw[3 * 8 * 2] ^= 1  # first byte of row 1
    raw.flush()
    again = StateStore(tmp_path / "s", IDENTITY, [3, 2], 8)
    again.read(0)
    with pytest.raises(RunError, match=r"Row 1 of .* is damaged"):
        again.read(1)


@pytest.mark.parametrize(
    ("identity", "num_tokens", "width"),
    [({"teacher": "other"}, [3], 8), (IDENTITY, [4], 8), (IDENTITY, [3], 16)],
)
def test_states_of_something_else_are_refused(tmp_path, identity, num_tokens, width):
    StateStore(tmp_path / "s", IDENTITY, [3], 8)
    with pytest.raises(UserError, match="another teacher or corpus"):
        StateStore(tmp_path / "s", identity, num_tokens, width)


def test_a_row_of_the_wrong_length_is_refused(tmp_path):
    store = StateStore(tmp_path / "s", IDENTITY, [3], 8)
    with pytest.raises(ValueError, match="row 0"):
        store.write(0, states(0, 2))
