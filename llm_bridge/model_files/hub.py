"""Models on the Hugging Face hub: how large a download is, and one sentence when it cannot be had."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from encoder.errors import ModelError

GIB = 2**30


def is_hub_id(name: str) -> bool:
    """Whether a text can be the name of a model on the hub: OWNER/NAME, which is no folder here."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what the hub's client raises about a model into one ModelError sentence that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then run `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(
            f"There is no folder {name} here, and no model of that name on the hub that you may read."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ModelError(
            f"There is no folder {name} here, and huggingface.co cannot be reached to download it: connect "
            "this machine, or copy the model's folder here and give its path."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise ModelError(f"The hub answers {status} when asked for {name}: try again later.") from error
    except OSError as error:
        if error.errno is None:
            raise
        raise ModelError(f"Cannot keep {name} on this disk: {error.strerror}.") from error


def download_bytes(name: str, revision: str | None, patterns: Sequence[str], ignored: Sequence[str]) -> int:
    """Bytes of a model's files that are not on this disk yet, 0 without a network; raises ModelError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with hub_errors(name):
            files = snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
                dry_run=True,
            )
    except DryRunError:
        return 0  # all of it may be here; loading will tell
    finally:
        if shown:
            enable_progress_bars()
    return sum(file.file_size or 0 for file in files if file.will_download)


def _cache_place() -> Path:
    """The hub's cache, or where it will be made."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    return place


def free_disk() -> int:
    """Bytes that are free on the disk of the hub's cache."""
    return shutil.disk_usage(_cache_place()).free


def check_room(name: str, size: int) -> None:
    """Raises ModelError where the hub's cache has no room for a download of so many bytes."""
    place, free = _cache_place(), free_disk()
    if size > free:
        raise ModelError(
            f"{name} takes {size / GIB:.1f} GiB on disk and {place} has {free / GIB:.1f} left: make room, or "
            "set HF_HOME to a folder on another disk."
        )


def cached_models() -> Iterator[tuple[str, Path]]:
    """The models in the hub's cache, by name, each with the folder of its newest snapshot, whole or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError

    for place in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        name = place.name.removeprefix("models--").replace("--", "/", 1)
        try:
            yield name, Path(snapshot_download(name, revision=None, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError, OSError):
            continue


def cached_bytes(name: str) -> int:
    """Bytes of a model's files in the hub's cache, those that are still coming included."""
    from huggingface_hub.constants import HF_HUB_CACHE

    total = 0
    for file in (Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs").glob("*"):
        with contextlib.suppress(OSError):  # renamed meanwhile
            total += file.stat().st_size
    return total
