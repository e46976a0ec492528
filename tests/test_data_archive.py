"""Archives are unpacked whole or not at all, and into their own folder only."""

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


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../outside"),
        tarfile.TarInfo("data/../../outside"),
        link("data/link", "../../outside"),
        link("data/link", "/etc/passwd"),
        link("data/link", "../outside", tarfile.LNKTYPE),
    ],
    ids=["parent", "parent of a member", "symbolic link", "absolute link", "hard link"],
)
def test_an_archive_that_would_write_outside_its_folder_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    root = tmp_path / "root"
    root.mkdir()
    path = archive(tmp_path, member)
    with pytest.raises(UserError, match="is refused, it would write outside its folder") as caught:
        unpack(path, root, "data")
    assert str(path) in str(caught.value)
    assert not list(root.iterdir())
    assert sorted(tmp_path.iterdir()) == [path, root]


def test_a_device_is_refused(tmp_path: Path) -> None:
    device = tarfile.TarInfo("data/device")
    device.type = tarfile.CHRTYPE
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UserError, match="is refused"):
        unpack(archive(tmp_path, device), root, "data")
    assert not list(root.iterdir())


def test_an_absolute_name_stays_inside(tmp_path: Path) -> None:
    unpack(archive(tmp_path, tarfile.TarInfo(f"{tmp_path}/outside")), tmp_path, "data")
    assert not (tmp_path / "outside").exists()
    assert (tmp_path / "data" / "file").read_bytes() == b"content"


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
