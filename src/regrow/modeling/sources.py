"""Where models come from: a local folder, the Hub, or a built-in one. Imports no torch."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from regrow.errors import UserError
from regrow.modeling.builtin import builtin_model

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_HUB_FILES = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.py",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]


def resolve_model(source: str, revision: str | None = None) -> Path:
    """The local folder of a model.

    Args:
        source: a local folder, `builtin:<name>`, or a Hub id (fetched to the Hub's cache, safetensors only).
        revision: branch, tag or commit of a Hub model.

    Raises:
        UserError: the folder or the Hub model does not exist, cannot be reached, or has no config.json.
    """
    if source.startswith("builtin:"):
        return builtin_model(source.removeprefix("builtin:"))
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no config.json; name the folder of a Hugging Face checkpoint.")
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file; name the folder that holds the checkpoint.")
    if not _HUB_ID.match(source):
        raise UserError(f"The model folder {source} does not exist; check the path.")
    return _fetch_from_hub(source, revision)


def resolve_headers(source: str, revision: str | None = None) -> Path:
    """A local folder with at least the model's `config.json`: of a Hub model only that file is fetched.

    Raises:
        UserError: as `resolve_model`.
    """
    if source.startswith("builtin:") or Path(source).expanduser().exists() or not _HUB_ID.match(source):
        return resolve_model(source, revision)
    from huggingface_hub import hf_hub_download

    with _hub_errors(source, revision):
        return Path(hf_hub_download(source, "config.json", revision=revision)).parent


def _fetch_from_hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(source, revision):
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_HUB_FILES))
    if not (folder / "config.json").is_file():
        raise UserError(f"{source} on the Hub holds no config.json; name a transformers checkpoint.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{source} on the Hub has no safetensors weights; regrow reads no other format.")
    return folder


@contextlib.contextmanager
def _hub_errors(source: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one sentence."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{source} is gated on the Hub; accept its terms there and run: hf auth login."
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{source} has no revision {revision!r} on the Hub; check the name.") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"{source} is no local folder and the Hub cannot be reached; check the path, or the network."
        ) from None
    except EntryNotFoundError:
        raise UserError(
            f"{source} on the Hub holds no config.json; name a transformers checkpoint."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{source} is neither a local folder nor a model on the Hub; check the name."
        ) from None
    except Exception as error:  # the Hub's client raises requests', httpx' and its own errors
        raise UserError(
            f"{source} is no local folder and the Hub cannot be reached ({type(error).__name__}); "
            "check the path, or the network."
        ) from None
