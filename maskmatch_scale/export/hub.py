"""Pushing an export to a model hub, by huggingface_hub.

Decision: docs/decisions/0060-push-to-a-hub.md.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from maskmatch_scale.errors import CommandFailed, UserError

_HIDDEN = [".*", "*/.*"]
"""What another command is writing at present, such as ONNX graphs that are not checked yet."""
_OURS = [
    *("segmenter.json", "config.json", "preprocessor_config.json", "model.safetensors", "head.safetensors"),
    *("backbone/*", "onnx.json", "model.onnx", "model.onnx.data", "model-batch.onnx", "model-batch.onnx.data"),
]
"""All that exports may have. What of it an earlier push has left in a repository belongs to another model."""
_TIMEOUT, _TOO_MANY = 408, 429
"""Answers of 400 to 499 that are no mistake of the user's."""


def check_push(repo_id: str) -> None:
    """Refuse what cannot be pushed, without asking the hub.

    Args:
        repo_id: `NAME`, or `USER/NAME`.

    Raises:
        UserError: this is no name of a repository, there is no token, or the environment forbids the network.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--push {repo_id}: it must be NAME or USER/NAME: {error}") from None
    if constants.is_offline_mode():
        raise UserError("--push: HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if get_token() is None:
        raise UserError("--push: there is no token of the hub; log in with `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Make a repository, unless it exists, and put an export there as one commit.

    Files that other exports have, and this one has not, are removed from the repository; files of others stay. The
    token is that of `hf auth login` or HF_TOKEN. HF_ENDPOINT names another hub.

    Args:
        folder: an export. It stays as it is, whatever happens.
        repo_id: `NAME` or `USER/NAME`.
        private: of a repository that is made; one that exists stays as it is.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub refuses it.
        CommandFailed: the hub cannot be reached, or fails.
        OSError: a file of the export cannot be read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    again = f"the export is complete in {folder}; push it again: maskmatch export {shlex.quote(str(folder))} --push "
    again += repo_id if private else f"{repo_id} --public"
    try:
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        message = "Export of maskmatch_scale"
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=_HIDDEN,
            delete_patterns=_OURS,
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        line = f"--push {repo_id}: the hub answers {status}{_said(error)}"
        if 400 <= status < 500 and status not in (_TIMEOUT, _TOO_MANY):
            hint = " (is the token right, and may it write? `hf auth login`)" if status in (401, 403) else ""
            raise UserError(f"{line}{hint}; {again}") from None
        raise CommandFailed(f"{line}; {again}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        # Of the network, in classes of the library that is below huggingface_hub, or of its own protocols.
        raise CommandFailed(f"--push {repo_id}: {type(error).__name__}{_said(error)}; {again}") from None
    return str(url)


def _said(error: Exception) -> str:
    """What an error says, with a colon before it, on one line and without the token; empty if it says nothing."""
    from huggingface_hub import get_token

    text = " ".join((getattr(error, "server_message", None) or str(error)).split())
    token = get_token()
    text = text if not token else text.replace(token, "…")
    return f": {text}" if text else ""
