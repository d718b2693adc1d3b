"""A folder to a model hub (Hugging Face's, or another one of its kind that ``HF_ENDPOINT`` names), by its own client.

Source: https://huggingface.co/docs/huggingface_hub/guides/upload . This is the only place that sends anything away, and
only when it is asked to.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ArtifactError, ConfigError, Fault

__all__ = ["upload"]


def upload(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Uploads a folder as a model repository, which is made when it is not there.

    The token is what ``hf auth login`` or ``HF_TOKEN`` left; it is read by the client, and never seen here.

    Args:
        folder: all files in it are uploaded.
        repo: ``owner/name``.
        private: only its owner sees it, when it is made.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: the hub is not reached, knows no such account, or refuses.
        ConfigError: ``repo`` is no name of a repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # The client has changed the library that it speaks HTTP with; its own error always stands on that one's.
    unreached: tuple[type[BaseException], ...] = (OfflineModeIsEnabled, OSError, HfHubHTTPError.__bases__[0])
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except HFValidationError as error:
        raise ConfigError([Fault("repo", f"{repo!r} is no name of a repository", "owner/name")]) from error
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        seen = str(error).splitlines()[0][:200]
        todo = "log in: hf auth login, or set HF_TOKEN" if code in (None, 401, 403) else "try again"
        raise ArtifactError("The hub did not take the model.", seen=seen, todo=todo) from error
    except unreached as error:
        seen = f"{type(error).__name__}: {error}"[:200]
        todo = "HF_HUB_OFFLINE must not be set; a hub of your own: HF_ENDPOINT"
        raise ArtifactError("The hub is not reached.", seen=seen, todo=todo) from error
    return str(made)
