"""Archives unpacked into a batch, hostile and damaged ones included."""

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline_steps import archives, sources
from pipeline_steps.errors import PleatError

SET = {"images.csv": b"image,sender_id,label\na,1,Hat\n", "images/a.jpg": os.urandom(3000), "Röcke/b c.jpg": b"b"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_bytes(files: dict[str, bytes], *special: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in special:
            archive.addfile(info)
    return out.getvalue()


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    """Where the data goes: a new folder in an empty one."""
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging" / "batch"


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".tar", bytes), (".tar.gz", gzip.compress), (".TGZ", gzip.compress), (".tar.bz2", bz2.compress),
     (".tar.xz", lzma.compress), (".tar", gzip.compress), (".zip", None)],
)  # fmt: skip
@pytest.mark.parametrize("top", ["", "clothing-main/", "a b/c/"])
def test_archives_are_unpacked_and_a_single_folder_at_the_top_unwrapped(
    tmp_path: Path, batch: Path, suffix: str, compress: Callable[[bytes], bytes] | None, top: str
) -> None:
    files = {f"{top}{name}": data for name, data in SET.items()} | {f"{top}.DS_Store": b"", "__MACOSX/._a": b"x"}
    path = tmp_path / f"set{suffix}"
    if compress:
        path.write_bytes(compress(tar_bytes(files, special(f"{top}empty", tarfile.DIRTYPE))))
    else:
        zipped(path, files)
    sources.bring(str(path), batch)
    assert contents(batch) == SET


def test_a_single_class_folder_is_not_unwrapped(tmp_path: Path, batch: Path) -> None:
    sources.bring(str(zipped(tmp_path / "hats.zip", {"Hat/a.jpg": b"a", "Hat/b.jpg": b"b"})), batch)
    assert contents(batch) == {"Hat/a.jpg": b"a", "Hat/b.jpg": b"b"}


def test_zip_names_in_utf8_that_are_not_marked_so_and_backslashes(tmp_path: Path, batch: Path) -> None:
    path = zipped(tmp_path / "set.zip", {"Röcke/日本.jpg": b"a", "Hut\\b.jpg": b"b"})
    # Clears the UTF-8 flag of every local and central header, as many tools leave it.
    data = path.read_bytes().replace(b"\x50\x4b\x03\x04\x14\x00\x00\x08", b"\x50\x4b\x03\x04\x14\x00\x00\x00")
    data = data.replace(b"\x50\x4b\x01\x02\x14\x03\x14\x00\x00\x08", b"\x50\x4b\x01\x02\x14\x03\x14\x00\x00\x00")
    path.write_bytes(data)
    assert not any(info.flag_bits & 0x800 for info in zipfile.ZipFile(path).infolist())
    sources.bring(str(path), batch)
    assert contents(batch) == {"Röcke/日本.jpg": b"a", "Hut/b.jpg": b"b"}


ESCAPES = ["../evil.jpg", "Hat/../../evil.jpg", "/tmp/evil.jpg", "..\\evil.jpg", "C:\\evil.jpg", "//host/evil.jpg"]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_no_member_leads_outside(tmp_path: Path, batch: Path, suffix: str, name: str) -> None:
    files = {"Hat/a.jpg": b"a", name: b"evil"}
    path = tmp_path / f"set{suffix}"
    zipped(path, files) if suffix == ".zip" else path.write_bytes(tar_bytes(files))
    with pytest.raises(PleatError, match="leads outside of the folder") as caught:
        sources.bring(str(path), batch)
    assert repr(name) in str(caught.value)
    assert not batch.exists()
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    ("kind", "link"),
    [(tarfile.SYMTYPE, "/etc"), (tarfile.SYMTYPE, "a.jpg"), (tarfile.LNKTYPE, "Hat/a.jpg"), (tarfile.CHRTYPE, ""),
     (tarfile.BLKTYPE, ""), (tarfile.FIFOTYPE, "")],
)  # fmt: skip
def test_links_and_devices_in_a_tar_are_refused_by_name(tmp_path: Path, batch: Path, kind: bytes, link: str) -> None:
    path = tmp_path / "set.tar.gz"
    path.write_bytes(gzip.compress(tar_bytes({"Hat/a.jpg": b"a"}, special("Hat/trap", kind, link))))
    with pytest.raises(PleatError, match=r"set\.tar\.gz holds 'Hat/trap', which is a link or a device"):
        sources.bring(str(path), batch)


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip_are_refused_by_name(tmp_path: Path, batch: Path, mode: int) -> None:
    info = zipfile.ZipInfo("Hat/trap")
    info.external_attr = (mode | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr(info, "/etc")
    with pytest.raises(PleatError, match=r"set\.zip holds 'Hat/trap', which is a link or a device"):
        sources.bring(str(tmp_path / "set.zip"), batch)


def bomb_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Hat/a.jpg", bytes(30_000_000))
    return out.getvalue()


def lying_zip() -> bytes:
    """Claims that its 30 MB are ten bytes."""
    data = bomb_zip()
    return data.replace(struct.pack("<I", 30_000_000), struct.pack("<I", 10))


def sparse_tar() -> bytes:
    """A GNU sparse member: one terabyte of nothing in two blocks."""
    info = special("Hat/a.jpg", tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = struct.pack(">BxxxQ", 0x80, 2**40)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def huge_header_tar() -> bytes:
    """A pax header of 300 MB, which tarfile would read at once."""
    info = special("pax", tarfile.XHDTYPE)
    info.size = 300_000_000
    return gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(300_000_000), 1)


def hidden_bomb_tar() -> bytes:
    """The large member is one that would be left out anyway; it still must not be decompressed without bound."""
    return gzip.compress(tar_bytes({"__MACOSX/x": bytes(30_000_000), "Hat/a.jpg": b"a"}))


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("bomb.zip", bomb_zip, "expands beyond"),
        ("lying.zip", lying_zip, "is damaged"),
        ("bomb.tar.gz", lambda: gzip.compress(tar_bytes({"Hat/a.jpg": bytes(30_000_000)})), "expands beyond"),
        ("bomb.tar.xz", lambda: lzma.compress(tar_bytes({"Hat/a.jpg": bytes(30_000_000)})), "expands beyond"),
        ("sparse.tar", sparse_tar, "expands beyond"),
        ("header.tar.gz", huge_header_tar, "holds a header of 300,000,256 bytes"),
        ("hidden.tar.gz", hidden_bomb_tar, "expands beyond"),
    ],
)
def test_nothing_expands_without_bound(
    tmp_path: Path, batch: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: Callable[[], bytes], sentence: str
) -> None:
    monkeypatch.setattr(archives, "RATIO_SLACK_BYTES", 1_000_000)
    (tmp_path / name).write_bytes(data())
    with pytest.raises(PleatError) as caught:
        sources.bring(str(tmp_path / name), batch)
    assert sentence in str(caught.value)
    assert sum(len(data) for data in contents(batch.parent).values()) < 25_000_000


def test_a_file_too_many(tmp_path: Path, batch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    archives.extract(zipped(tmp_path / "three.zip", dict.fromkeys("abc", b"")), batch)
    with pytest.raises(PleatError, match="more than 3 files"):
        archives.extract(zipped(tmp_path / "four.zip", dict.fromkeys("abcd", b"")), batch.with_name("other"))


def test_a_member_that_is_there_twice(tmp_path: Path, batch: Path) -> None:
    (tmp_path / "set.tar").write_bytes(tar_bytes({"Hat/a.jpg": b"one", "Hat//a.jpg": b"two"}))
    with pytest.raises(PleatError, match=r"holds 'Hat//a\.jpg' twice"):
        sources.bring(str(tmp_path / "set.tar"), batch)


def test_a_zip_with_a_password(tmp_path: Path, batch: Path) -> None:
    data = bytearray(zipped(tmp_path / "set.zip", {"Hat/a.jpg": b"a"}).read_bytes())
    for header, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + offset] |= 1
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(PleatError, match=r"set\.zip cannot be unpacked: .*password"):
        sources.bring(str(tmp_path / "set.zip"), batch)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.95])
def test_a_truncated_tar_is_never_taken_for_a_whole_one(
    tmp_path: Path, batch: Path, compress: Callable[[bytes], bytes], kept: float
) -> None:
    whole = tar_bytes({f"Hat/{n}.jpg": os.urandom(2000) for n in range(20)})
    whole = compress(whole[: 20 * 2560 + 1024])
    (tmp_path / "set.tar").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(PleatError, match=r"set\.tar is damaged, incomplete or not the archive that its name says"):
        sources.bring(str(tmp_path / "set.tar"), batch)


def test_a_tar_that_ends_exactly_between_two_members(tmp_path: Path, batch: Path) -> None:
    whole = tar_bytes({f"Hat/{n}.jpg": bytes(2048) for n in range(4)})
    (tmp_path / "set.tar").write_bytes(whole[: 2 * 2560])
    with pytest.raises(PleatError, match="it ends too early"):
        sources.bring(str(tmp_path / "set.tar"), batch)


@pytest.mark.parametrize(("offset", "suffix"), [(60, ".zip"), (2000, ".zip"), (2560, ".tar"), (1500, ".tar.gz")])
def test_flipped_bytes_are_noticed(tmp_path: Path, batch: Path, offset: int, suffix: str) -> None:
    files = {f"Hat/{n}.jpg": os.urandom(2000) for n in range(4)}
    path = tmp_path / f"set{suffix}"
    if suffix == ".zip":
        zipped(path, files)
    else:
        path.write_bytes((gzip.compress if suffix == ".tar.gz" else bytes)(tar_bytes(files)))
    data = bytearray(path.read_bytes())
    for position in range(offset, offset + 8):
        data[position] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(PleatError, match="is damaged, incomplete or not the archive"):
        sources.bring(str(path), batch)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_wrong_checksum_at_the_very_end_is_noticed(
    tmp_path: Path, batch: Path, compress: Callable[[bytes], bytes]
) -> None:
    data = bytearray(compress(tar_bytes({"Hat/a.jpg": os.urandom(2000)})))
    data[-6] ^= 0xFF
    (tmp_path / "set.tar").write_bytes(data)
    with pytest.raises(PleatError, match="is damaged, incomplete or not the archive"):
        sources.bring(str(tmp_path / "set.tar"), batch)


@pytest.mark.parametrize("name", ["set.zip", "set.tar", "set.tar.gz"])
@pytest.mark.parametrize("data", [b"", b"no archive at all" * 100])
def test_a_file_that_only_looks_like_an_archive(tmp_path: Path, batch: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PleatError, match="is damaged, incomplete or not the archive that its name says"):
        sources.bring(str(tmp_path / name), batch)
