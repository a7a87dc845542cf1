"""The Hugging Face Hub: a repository's files, brought here once by huggingface_hub and kept in its cache."""

import re
from collections.abc import Sequence
from pathlib import Path

from cbam.errors import CheckpointError, CheckpointNotFoundError, MissingExtraError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def downloaded(repository: str, names: Sequence[str], revision: str | None) -> Path:
    """The folder of the cache that holds these files of "org/name", all of one commit.

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
            f"{repository}: its author lets in who asked; ask on its page, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"{repository}: has no revision {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"{repository}: no such folder, and no repository of the Hub (or a private one: `hf auth login`)"
        ) from error
    except Exception as error:  # of the network below, whatever it is built on
        told = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"{repository}: no such folder, and the Hugging Face Hub cannot be reached ({told}); a folder "
            "works without a network"
        ) from error
