"""push_folder against a stub of HfApi: what is sent, and one sentence for each way it can fail."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from regrow.errors import RegrowError, RunError, UserError
from regrow.hub import push_folder


class StubApi:
    def __init__(self, create=None, upload=None):
        self.create, self.upload, self.calls = create, upload, []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        if self.create:
            raise self.create
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options))
        if self.upload:
            raise self.upload
        return SimpleNamespace(commit_url="https://hub.example/commit/1")


def http_error(kind, status):
    return kind("refused", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "README.md", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def test_makes_the_repository_then_uploads(model):
    api = StubApi()
    url = push_folder(model, "me/small", private=False, token="t", revision="v1", api=api)
    assert url == "https://hub.example/commit/1"
    (first, repo, options), (second, upload) = api.calls
    assert (first, repo, second) == ("create_repo", "me/small", "upload_folder")
    assert options["private"] is False
    assert options["exist_ok"] is True
    assert options["token"] == upload["token"] == "t"
    assert upload["folder_path"] == model
    assert upload["revision"] == "v1"
    assert "delete_patterns" not in upload


def test_private_unless_told_otherwise(model):
    api = StubApi()
    push_folder(model, "me/small", api=api)
    assert api.calls[0][2]["private"] is True


def test_only_a_models_own_files_are_sent(model):
    from huggingface_hub.utils import filter_repo_objects

    api = StubApi()
    push_folder(model, "me/small", api=api)
    sent = api.calls[1][1]
    names = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "chat_template.jinja",
        "merges.txt",
        "tokenizer.model",
        "LICENSE",
        "pytorch_model.bin",
        "optimizer.pt",
        ".env",
        ".cache/x.json",
        "run.log",
    ]
    kept = list(
        filter_repo_objects(
            names, allow_patterns=sent["allow_patterns"], ignore_patterns=sent["ignore_patterns"]
        )
    )
    assert kept == names[:6]


@pytest.mark.parametrize("missing", ["config.json", "README.md", "model.safetensors"])
def test_refuses_what_is_no_finished_model(model, missing):
    (model / missing).unlink()
    api = StubApi()
    with pytest.raises(UserError):
        push_folder(model, "me/small", api=api)
    assert api.calls == []


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (HFValidationError("bad"), UserError, "user/name"),
        (OfflineModeIsEnabled("offline"), UserError, "HF_HUB_OFFLINE"),
        (LocalTokenNotFoundError("none"), UserError, "hf auth login"),
        (http_error(HfHubHTTPError, 401), UserError, "does not accept"),
        (http_error(HfHubHTTPError, 403), UserError, "may not write"),
        (http_error(RepositoryNotFoundError, 404), UserError, "check the name"),
        (http_error(HfHubHTTPError, 500), RunError, "500"),
        (HTTPError("no route"), RunError, "cannot be reached"),
        (TimeoutError("slow"), RunError, "cannot be reached"),
    ],
)
@pytest.mark.parametrize("where", ["create", "upload"])
def test_each_failure_is_one_sentence(model, error, kind, words, where):
    with pytest.raises(kind) as caught:
        push_folder(model, "me/small", api=StubApi(**{where: error}))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_programming_error_is_not_dressed_up(model):
    with pytest.raises(ZeroDivisionError):
        push_folder(model, "me/small", api=StubApi(upload=ZeroDivisionError()))


def test_the_real_client_with_the_hub_switched_off(model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RegrowError):
        push_folder(model, "me/small", token="hf_none")
