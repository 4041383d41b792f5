"""Copy an exported adapter to a hub, or to any place that fsspec knows: s3://, gs://, sftp://, …"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from aggregator.errors import PushError
from protocol.extras import how_to_install

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def push(folder: Path, target: str, *, message: str) -> str:
    """Copy a folder's files to a hub's id (`owner/name`) or a URL; return where they are now.

    A hub's repository is made if it is not there, private; who may write there says the token of
    `huggingface_hub` (HF_TOKEN, or `hf auth login`).

    Raises:
        PushError: no such place, a package is missing, or the other side refuses; says what to do.
    """
    if "://" in target:
        return _to_url(folder, target)
    if HUB_ID.fullmatch(target):
        return _to_hub(folder, target, message)
    raise PushError(
        f"{target!r} is neither a hub's id (owner/name) nor a URL (s3://bucket/folder, "
        "file:///folder, …)"
    )


def _to_url(folder: Path, url: str) -> str:
    _need("fsspec", url)
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        system.makedirs(path, exist_ok=True)
        for file in sorted(folder.iterdir()):
            system.put_file(str(file), f"{path.rstrip('/')}/{file.name}")
    except Exception as error:  # each store's library has errors of its own, with no base in common
        raise PushError(f"can't push to {url}: {_words(error)}") from None
    return url


def _to_hub(folder: Path, name: str, message: str) -> str:
    _need("huggingface_hub", name)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except HFValidationError as error:
        raise PushError(f"{name!r} can't be a hub's id: {error}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = "; set HF_TOKEN to a token that may write there" if status in (401, 403) else ""
        raise PushError(f"the hub refuses {name}: {_words(error)}{advice}") from None
    except _unreachable() as error:
        raise PushError(f"can't reach the hub for {name}: {_words(error)}") from None
    return str(done.commit_url)


def _unreachable() -> tuple[type[Exception], ...]:
    """Return the errors of no connection: of requests, or from version 1 of the client of httpx."""
    if importlib.util.find_spec("httpx") is None:
        return (OSError,)
    import httpx

    return OSError, httpx.HTTPError


def _need(package: str, target: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise PushError(f"pushing to {target} needs {package}; {how_to_install('push')}")


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
