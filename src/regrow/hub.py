"""The only writer to the Hugging Face Hub."""

from pathlib import Path
from typing import Any

from regrow.errors import RunError, UserError
from regrow.progress import say

# What a published model may hold: weights without pickles, their description, tokenizer and processor.
_KEPT = ("*.safetensors", "*.json", "*.jinja", "*.md", "*.txt", "*.model", "LICENSE*", "NOTICE*")
_UNWANTED = (".*", "**/.*")


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = True,
    token: str | None = None,
    *,
    revision: str | None = None,
    commit_message: str = "Upload a model made with regrow",
    api: Any = None,
) -> str:
    """Upload a finished model folder to a Hub repository, which is made where it does not exist.

    Nothing is deleted in the repository, and files other than a model's own (hidden files, pickles) are
    not uploaded.

    Args:
        folder: model folder with `config.json`, `README.md` and at least one safetensors file.
        repo_id: `user/name` on the Hub.
        private: whether a repository made by this call is private.
        token: a Hub token; without it, the one of `hf auth login` or of the environment variable HF_TOKEN.
        revision: branch to commit to.
        commit_message: first line of the commit.
        api: object with the methods of `huggingface_hub.HfApi`; for tests.

    Returns:
        URL of the commit.

    Raises:
        UserError: the folder is no finished model, the name is no repository name, there is no token, the
            token may not write, or the Hub is switched off.
        RunError: the Hub cannot be reached or failed during the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    folder = _require_model(Path(folder))
    api = api or HfApi(token=token)
    say(f"upload {folder.name} to {repo_id} ...")
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True, token=token)
        commit = api.upload_folder(
            repo_id=repo.repo_id if hasattr(repo, "repo_id") else repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            token=token,
            allow_patterns=list(_KEPT),
            ignore_patterns=list(_UNWANTED),
        )
    except HFValidationError:
        raise UserError(f"{repo_id!r} is no name of a Hub repository; give it as user/name.") from None
    except Exception as error:
        raise _explained(error, repo_id) from None
    return str(getattr(commit, "commit_url", commit))


def _require_model(folder: Path) -> Path:
    for name in ("config.json", "README.md"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} holds no {name}, so it is no model with its card; run `regrow report` first."
            )
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no safetensors file; name the folder of a finished model.")
    return folder


def _explained(error: Exception, repo_id: str) -> Exception:
    """One sentence for what the Hub or the network said; errors of other kinds stay what they are."""
    # HTTPError: the transport's base error, whichever HTTP library this version of the client stands on.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    login = "run `hf auth login` or set HF_TOKEN to a token with write access"
    if isinstance(error, OfflineModeIsEnabled):
        return UserError("The Hub is switched off by HF_HUB_OFFLINE; unset it to upload.")
    if isinstance(error, LocalTokenNotFoundError):
        return UserError(f"There is no Hub token on this machine; {login}.")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return UserError(f"The Hub does not accept the token for {repo_id}; {login}.")
    if status == 403 or isinstance(error, GatedRepoError):
        return UserError(f"The Hub token may not write to {repo_id}; {login}, or name another repository.")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"The Hub knows no repository {repo_id} that this token may see; check the name.")
    if isinstance(error, HfHubHTTPError):
        return RunError(f"The Hub refused the upload to {repo_id} (HTTP {status}); try again later.")
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return RunError(
            f"The Hub cannot be reached to upload {repo_id} ({type(error).__name__}); check the network and "
            "run again, what was uploaded is not sent twice."
        )
    return error
