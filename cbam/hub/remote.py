"""The Hugging Face Hub: files of a repository, downloaded once to the cache of huggingface_hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from cbam.errors import CheckpointError, CheckpointNotFoundError, MissingExtraError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def downloaded(repository: str, names: Sequence[str], revision: str | None) -> Path:
    """The cache folder with these files of "org/name", all from one commit.

    Raises:
        CheckpointNotFoundError: no such folder, repository or revision.
        CheckpointError: it cannot be reached. MissingExtraError: huggingface_hub is not installed.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise CheckpointNotFoundError(
            f"{repository}: no such folder, and no repository of the Hub, which is called org/name"
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
            f"{repository}: access has to be requested on its page; then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"{repository}: has no revision {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"{repository}: no such folder, and no repository of the Hub (or a private one: `hf auth login`)"
        ) from error
    except Exception as error:  # of whatever HTTP client huggingface_hub uses
        told = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"{repository}: no such folder, and the Hugging Face Hub cannot be reached ({told}); a folder "
            "works without a network"
        ) from error
