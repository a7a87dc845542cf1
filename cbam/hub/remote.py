"""The Hugging Face Hub: files of a repository, downloaded once into the cache of huggingface_hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from cbam.errors import CheckpointError, CheckpointNotFoundError, MissingExtraError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def downloaded(repository: str, names: Sequence[str], revision: str | None) -> Path:
    """The cache folder with these files of the repository "org/name", all from one commit.

    Raises:
        CheckpointNotFoundError: no such folder, repository or revision.
        CheckpointError: the Hub cannot be reached, or access has to be requested.
        MissingExtraError: huggingface_hub is not installed.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise CheckpointNotFoundError(
            f"{repository}: no such folder, and not the name of a Hub repository, which is org/name"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise MissingExtraError.of(f"{repository}: no such folder; the Hugging Face Hub", "vision") from error
    try:
        return Path(snapshot_download(repository, allow_patterns=list(names), revision=revision))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: request access on its page, then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"{repository}: has no revision {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"{repository}: no such folder, and no such repository on the Hub (if private: `hf auth login`)"
        ) from error
    except Exception as error:  # of whatever HTTP client huggingface_hub uses
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"{repository}: no such folder, and the Hugging Face Hub cannot be reached ({reason}); a local "
            "folder needs no connection"
        ) from error
