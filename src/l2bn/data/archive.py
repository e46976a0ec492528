"""Archives from the network: downloaded once, checked, and unpacked into their own folder only."""

import logging
import tarfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from torchvision.datasets.utils import calculate_md5, download_url

from l2bn.data.cache import temporary_folder
from l2bn.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """A file with a known checksum, and the folder in it if it is a tar file."""

    url: str
    md5: str
    folder: str = ""

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


def fetch(archive: Archive, root: Path, download: bool, remedy: str) -> Path:
    """The archive's file in `root`, with the right checksum; downloaded if it is missing and `download` is true.

    remedy: what the user can do instead, added to every error. Raises `UserError`.
    """
    path = root / archive.file
    if not path.is_file():
        if not download:
            raise UserError(f"no {path.absolute()}, and dataset.download is false. {remedy}")
        log.info("downloading %s to %s", archive.url, root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with temporary_folder(root, ".downloading-") as place:
                download_url(archive.url, str(place), archive.file, archive.md5)
                (place / archive.file).replace(path)
        except (OSError, HTTPException, RuntimeError) as error:  # unreachable, broken off, or another checksum
            raise UserError(
                f"no {path.absolute()}, and {archive.url} cannot be downloaded ({error}). {remedy}"
            ) from error
    found = calculate_md5(path)
    if found != archive.md5:
        raise UserError(
            f"{path} has the md5 sum {found}, not {archive.md5}: it is damaged or another file. "
            f"Move it away. {remedy}"
        )
    return path


def unpack(path: Path, root: Path, folder: str) -> None:
    """Unpack the folder of a tar file into `root`, all of it or nothing.

    Raises `UserError` for a damaged tar file, and for one with a member that Python's filter of data refuses: a
    device, or what would lead out of the folder.
    """
    try:
        with temporary_folder(root, ".unpacking-") as place, tarfile.open(path) as tar:
            tar.extractall(place, filter="data")
            if not (root / folder).is_dir():  # another process may have been faster
                (place / folder).rename(root / folder)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        if not (root / folder).is_dir():
            raise UserError(f"{path} cannot be unpacked into {root}: {error}") from error
