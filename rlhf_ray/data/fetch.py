"""Public preference data from the Hugging Face hub, as its own files; `data import` turns them into tables."""

import os
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.errors import UserError


@dataclass(frozen=True)
class Source:
    """A dataset on the hub."""

    repository: str
    files: tuple[str, ...]
    """Glob patterns of what is fetched."""


SOURCES = {
    "hh-rlhf": Source("Anthropic/hh-rlhf", ("helpful-base/*.jsonl.gz", "harmless-base/*.jsonl.gz")),
}


def fetch(name: str, to: Path) -> list[Path]:
    """Downloads a dataset's files to `to`, those that are there already excepted; returns them.

    Raises:
        UserError: an unknown name, a hub that does not answer or has no such files, or `to` cannot be written.
    """
    if name not in SOURCES:
        raise UserError(f"{name}: is no dataset that can be fetched; choose one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(
            source.repository, repo_type="dataset", local_dir=to, allow_patterns=list(source.files), max_workers=2
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError) as error:
        raise UserError(
            f"{name}: {source.repository} cannot be fetched from the hub ({str(error).splitlines()[0]}); check the "
            "network, set HF_ENDPOINT to a mirror, or give files of your own to `rlhf-ray data import`"
        ) from error
    except OSError as error:
        raise UserError(f"--to {to}: cannot be written ({error.strerror or error}); choose another place") from error
    found = sorted(path for pattern in source.files for path in to.glob(pattern))
    if not found:
        raise UserError(f"{name}: {source.repository} on the hub holds none of {', '.join(source.files)}")
    return found
