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


def device(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.CHRTYPE
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../outside"),
        tarfile.TarInfo("data/../../outside"),
        link("data/link", "../../outside"),
        link("data/link", "/etc/passwd"),
        link("data/link", "../outside", tarfile.LNKTYPE),
        device("data/device"),
    ],
    ids=["parent", "parent of a member", "symbolic", "absolute link", "hard link", "device"],
)
def test_an_archive_that_would_write_outside_its_folder_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    root = tmp_path / "root"
    root.mkdir()
    path = archive(tmp_path, member)
    with pytest.raises(UserError, match=f"cannot be unpacked into .*{member.name}") as caught:
        unpack(path, root, "data")
    assert str(path) in str(caught.value)
    assert not list(root.iterdir())
    assert sorted(tmp_path.iterdir()) == [path, root]


@pytest.mark.parametrize("name", ["/outside", "beside"])
def test_what_lies_beside_the_folder_stays_behind(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    unpack(archive(tmp_path, tarfile.TarInfo(name)), root, "data")
    assert [path.name for path in root.rglob("*")] == ["data", "file"]
    assert not Path("/outside").exists()


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
