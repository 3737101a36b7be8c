"""Files that a config names: on this machine, or in a data set of the Hugging Face hub, fetched once."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from rmsweep.errors import DataError
from rmsweep.paths import user_path

SCHEME = "hf://"
HUB = re.compile(r"hf://datasets/([A-Za-z0-9._-]+/[A-Za-z0-9._-]+)/([^@]+?)(?:@([A-Za-z0-9._/-]+))?")


def local_file(value: str, key: str) -> Path:
    """The file of this machine that `value` names; hf://datasets/OWNER/NAME/FILE[@REVISION] is fetched from the hub.

    key: the config key, for messages. Raises ConfigError for what is no path, DataError for what cannot be fetched.
    """
    return _fetched(value, key) if value.startswith(SCHEME) else user_path(value, key)


def file_name(value: str) -> str:
    """The name of the file that a path or an hf:// address names."""
    found = HUB.fullmatch(value)
    return Path(found[2] if found else value).name


@functools.lru_cache(maxsize=64)
def _fetched(address: str, key: str) -> Path:
    """A file of the hub in the hub library's own cache."""
    found = HUB.fullmatch(address)
    if found is None:
        raise DataError(
            f"{key}={address}: needs the form hf://datasets/OWNER/NAME/FILE, with @REVISION for a fixed one"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise DataError(f"{key}={address}: needs the library huggingface_hub: pip install huggingface_hub") from None
    repository, name, revision = found.groups()
    download: Any = hf_hub_download
    try:
        return Path(download(repo_id=repository, filename=name, revision=revision, repo_type="dataset"))
    except Exception as error:  # of the network, the hub or its library: many kinds, one meaning
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{key}={address}: cannot be fetched ({reason}); or fetch it yourself, {key}=FILE") from None
