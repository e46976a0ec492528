"""Archives are unpacked whole or not at all, and into their own folder only."""

import os
import tarfile
from pathlib import Path

import pytest

from l2bn.data.archive import unpack
from l2bn.errors import UserError
from official_formats import add_member


def archive(folder: Path, *members: tarfile.TarInfo) -> Path:
    path = folder / "data.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        add_member(tar, "data/file", b"content")
        for member in members:
            tar.addfile(member)
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def device(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.CHRTYPE
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../outside"),
        tarfile.TarInfo("data/../../outside"),
        tarfile.TarInfo("/outside"),
        tarfile.TarInfo("beside"),
        link("data/link", "../../outside"),
        link("data/link", "/etc/passwd"),
        link("data/link", "../outside", tarfile.LNKTYPE),
        device("data/device"),
    ],
    ids=["parent", "parent of a member", "absolute", "beside", "symbolic", "absolute link", "hard link", "device"],
)
def test_an_archive_that_would_write_outside_its_folder_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    root = tmp_path / "root"
    root.mkdir()
    path = archive(tmp_path, member)
    with pytest.raises(UserError, match=f"is refused: its member {member.name} is no plain file") as caught:
        unpack(path, root, "data")
    assert str(path) in str(caught.value)
    assert not list(root.iterdir())
    assert sorted(tmp_path.iterdir()) == [path, root]


def test_no_extraction_filter_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11.0 to 3.11.3 has none."""
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda *_, **__: pytest.fail("called"))
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *_, **__: pytest.fail("called"))
    monkeypatch.delattr(tarfile, "FilterError")
    monkeypatch.delattr(tarfile, "data_filter")
    unpack(archive(tmp_path), tmp_path, "data")
    assert (tmp_path / "data" / "file").read_bytes() == b"content"


def test_modes_follow_the_users_umask(tmp_path: Path) -> None:
    private = tarfile.TarInfo("data/private")
    private.mode = 0o600
    before = os.umask(0o027)
    try:
        unpack(archive(tmp_path, private), tmp_path, "data")
    finally:
        os.umask(before)
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "data" / "private").stat().st_mode & 0o777 == 0o640


def test_a_truncated_archive_leaves_nothing(tmp_path: Path) -> None:
    path = archive(tmp_path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(path, tmp_path, "data")
    assert list(tmp_path.iterdir()) == [path]


def test_another_process_may_have_been_faster(tmp_path: Path) -> None:
    path = archive(tmp_path)
    unpack(path, tmp_path, "data")
    unpack(path, tmp_path, "data")
    assert (tmp_path / "data" / "file").read_bytes() == b"content"
