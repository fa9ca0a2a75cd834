import numpy as np
import pytest
import torch

from regrow.errors import RunError, UserError
from regrow.losses import SparseTargets, sparse_targets
from regrow.modeling.hidden import Head
from regrow.modeling.sampling import uniform_stream
from regrow.training.forms import HiddenForm, SparseForm
from regrow.training.store import TokenStore

IDENTITY = {"teacher": "abc", "text": "def"}


HEAD = Head(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), None, 4.0, 0.5)
FORMS = [HiddenForm(8), SparseForm("top_k", 5, 1.0), SparseForm("sampled", 5, 2.0, seed=3)]
DTYPE = FORMS[0].dtype


def states(row, tokens, width=8):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(row))


def records(form, row, tokens):
    return form.encode(states(row, tokens), HEAD, [row], [tokens])


def same(left, right):
    if isinstance(left, SparseTargets):
        pairs = ((left.token_ids_TK, right.token_ids_TK), (left.log_probs_TK, right.log_probs_TK))
        return left.kind == right.kind and all(torch.equal(one, other) for one, other in pairs)
    return left.dtype == right.dtype and torch.equal(left, right)


def expected(form, row, tokens):
    if isinstance(form, HiddenForm):
        return states(row, tokens).bfloat16()
    uniforms = uniform_stream(form.seed, row, tokens * 5).view(tokens, 5)
    return sparse_targets(
        states(row, tokens),
        HEAD.weight_VD,
        kind=form.kind,
        num_entries=5,
        temperature=form.temperature,
        uniforms_TK=uniforms,
        teacher_softcap=4.0,
        teacher_scale=0.5,
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_come_back_as_they_were_said(tmp_path, form):
    store = TokenStore(tmp_path / "s", IDENTITY, [3, 0, 5], form.dtype)
    for row, tokens in ((2, 5), (0, 3), (1, 0)):
        store.write(row, records(form, row, tokens))
    for row, tokens in ((0, 3), (1, 0), (2, 5)):
        assert same(form.decode(store.read(row)), expected(form, row, tokens))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_do_not_depend_on_those_they_are_encoded_with(form):
    together = form.encode(torch.cat([states(4, 3), states(1, 2)]), HEAD, [4, 1], [3, 2])
    apart = [records(form, 4, 3), records(form, 1, 2)]
    name = form.dtype.names[0]
    assert np.array_equal(together[name], np.concatenate(apart)[name])
    assert form.dtype.itemsize == (16 if isinstance(form, HiddenForm) else 40)


def test_draws_depend_on_seed_and_row():
    base = FORMS[2]
    others = [(SparseForm("sampled", 5, 2.0, seed=4), 0), (base, 1)]
    drawn = base.encode(states(0, 6), HEAD, [0], [6])["token_ids"]
    for form, row in others:
        assert not np.array_equal(form.encode(states(0, 6), HEAD, [row], [6])["token_ids"], drawn)


def test_forms_tell_themselves_apart():
    forms = [
        *FORMS,
        SparseForm("top_k", 6, 1.0),
        SparseForm("top_k", 5, 2.0),
        SparseForm("sampled", 5, 2.0, seed=4),
    ]
    identities = [form.identity for form in forms]
    assert all(one != other for i, one in enumerate(identities) for other in identities[:i])
    assert SparseForm("top_k", 5, 1.0, seed=9).identity == FORMS[1].identity


def test_reopened_store_knows_what_is_missing(tmp_path):
    store = TokenStore(tmp_path / "s", IDENTITY, [3, 2, 5], DTYPE)
    store.write(2, records(FORMS[0], 2, 5))
    store.flush()
    again = TokenStore(tmp_path / "s", IDENTITY, [3, 2, 5], DTYPE)
    assert again.missing([2, 0, 0, 1]) == [0, 1]
    assert np.array_equal(again.read(2), records(FORMS[0], 2, 5))
    with pytest.raises(RunError, match="lacks row 0"):
        again.read(0)


def test_only_rows_that_are_reserved_take_space(tmp_path):
    store = TokenStore(tmp_path / "s", IDENTITY, [100_000] * 20, DTYPE)
    path = tmp_path / "s" / "records.bin"
    assert path.stat().st_size == 2_000_000 * DTYPE.itemsize
    assert path.stat().st_blocks * 512 < DTYPE.itemsize * 100_000
    store.reserve([3, 11])
    taken = path.stat().st_blocks * 512
    assert 2 * 100_000 * DTYPE.itemsize <= taken < 3 * 100_000 * DTYPE.itemsize


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_damage_is_found_when_the_row_is_read(tmp_path, form):
    store = TokenStore(tmp_path / "s", IDENTITY, [3, 2], form.dtype)
    for row, tokens in ((0, 3), (1, 2)):
        store.write(row, records(form, row, tokens))
    store.flush()
    raw = np.memmap(tmp_path / "s" / "records.bin", np.uint8, "r+")
    raw[3 * form.dtype.itemsize] ^= 1  # first byte of row 1
    raw.flush()
    again = TokenStore(tmp_path / "s", IDENTITY, [3, 2], form.dtype)
    again.read(0)
    with pytest.raises(RunError, match=r"Row 1 of .* is damaged"):
        again.read(1)


@pytest.mark.parametrize(
    ("identity", "num_tokens", "dtype"),
    [
        ({"teacher": "other"}, [3], DTYPE),
        (IDENTITY, [4], DTYPE),
        (IDENTITY, [3], HiddenForm(16).dtype),
        (IDENTITY, [3], FORMS[1].dtype),
    ],
)
def test_records_of_something_else_are_refused(tmp_path, identity, num_tokens, dtype):
    TokenStore(tmp_path / "s", IDENTITY, [3], DTYPE)
    with pytest.raises(UserError, match="another teacher, corpus or teacher_mode"):
        TokenStore(tmp_path / "s", identity, num_tokens, dtype)


def test_a_row_of_the_wrong_length_or_form_is_refused(tmp_path):
    store = TokenStore(tmp_path / "s", IDENTITY, [3], DTYPE)
    for form, tokens in ((FORMS[0], 2), (FORMS[1], 3)):
        with pytest.raises(ValueError, match="row 0"):
            store.write(0, records(form, 0, tokens))
