"""What the command says when it is stopped."""

import sys

import pytest

from regrow import cli


def test_ctrl_c_is_one_sentence(monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("regrow.modeling.sources.resolve_headers", stop)
    monkeypatch.setattr(sys, "argv", ["regrow", "inspect", "model"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert capsys.readouterr().err.strip() == "regrow: interrupted; the same command goes on where it can."
