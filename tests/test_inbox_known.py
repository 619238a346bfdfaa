"""Leaving known and repeated images out of a delivery, and moving deliveries between file systems."""

import errno
import shutil
from pathlib import Path

import pytest
from conftest import content, names, write_batch
from inbox_help import N_TRAINING, dvc, images, put, settings

from pipeline_steps import deliveries, formats
from pipeline_steps.deliveries import DONE, FolderInbox, RefusedError
from pipeline_steps.errors import PleatError
from pipeline_steps.inbox_known import contents, digest, known_images, leave_out

pytest_plugins = ["inbox_project"]


def known(folder: Path) -> set[str]:
    return {one.md5 for one in contents(folder).values()}


def test_rows_and_files_of_a_clothing_set(tmp_path: Path) -> None:
    """Row 1 is known and has a copy in another folder, row 3 repeats row 2, row 4 contradicts row 2, 5 has no file."""
    rows = {"1": "Hat", "2": ("Shirt, long", "ann"), "3": ("Shirt, long", "bob"), "4": "Hat", "5": "Hat", "6": ""}
    files = {"1.jpg": b"one", "2.jpg": b"two", "3.jpg": b"two", "4.jpg": b"two", "6.jpg": b"six", "loose.jpg": b"one"}
    folder = write_batch(tmp_path, "new", rows, files)
    put(folder, {"images_original/1.png": b"one, large", "LICENSE": b"CC0"})
    before = formats.read(folder, "auto").rows
    found = leave_out(folder, "auto", contents(folder), known(put(tmp_path / "old", {"x.jpg": b"one"})))
    assert (found.known, found.repeated, found.n_left) == (["images/1.jpg", "images/loose.jpg"], ["images/3.jpg"], 2)
    assert content(folder).keys() == {"LICENSE", "images.csv", "images/2.jpg", "images/4.jpg", "images/6.jpg"}
    after = formats.read(folder, "auto")
    assert after.rows.to_dict("records") == before[before["source_path"].str.contains("[2456]")].to_dict("records")
    assert after.unlabelled == []


def test_nothing_known_changes_no_byte(tmp_path: Path) -> None:
    folder = write_batch(tmp_path, "new", {"1": "Hat", "2": "Shirt"}, {"1.jpg": b"one", "2.jpg": b"two"})
    (folder / "images.csv").write_bytes(b"\xef\xbb\xbfimage,sender_id,label\r\n1,,Hat\r\n\r\n2,,Shirt\r\n")
    before = content(folder)
    assert leave_out(folder, "auto", contents(folder), {"0" * 32}).n_left == 2
    assert content(folder) == before
    assert leave_out(folder, "auto", contents(folder), known(put(tmp_path / "old", {"x.jpg": b"two"}))).n_left == 1
    assert (folder / "images.csv").read_bytes() == b"image,sender_id,label\n1,,Hat\n"


def test_only_known_images_leave_the_folder_as_it_is(tmp_path: Path) -> None:
    folder = put(tmp_path / "new", images(0, 3))
    assert leave_out(folder, "auto", contents(folder), known(folder)).n_left == 0
    assert content(folder) == images(0, 3)


def test_labels_that_would_change_are_refused(tmp_path: Path) -> None:
    """ImageNet's two classes called crane keep their full names only while both are there."""
    folder = put(
        tmp_path / "new", {"n00000001-crane/a.jpg": b"bird", "n00000002-crane/b.jpg": b"machine", "Hat/c.jpg": b"c"}
    )
    old = known(put(tmp_path / "old", {"x.jpg": b"bird"}))
    with pytest.raises(PleatError, match="labels of the rest would read differently"):
        leave_out(folder, "auto", contents(folder), old)


def test_images_with_two_labels_are_equal_only_where_both_agree(tmp_path: Path) -> None:
    files = {
        "red_dress/1.jpg": b"one", "red_dress/2.jpg": b"two", "red_dress/3.jpg": b"two", "blue_dress/4.jpg": b"two",
        "red_hat/5.jpg": b"two", "red_hat/6.jpg": b"six",
    }  # fmt: skip
    folder = put(tmp_path / "new", files)
    old = known(put(tmp_path / "old", {"x.jpg": b"one"}))
    found = leave_out(folder, "auto", contents(folder), old)
    assert (found.known, found.repeated, found.n_left) == (["red_dress/1.jpg"], ["red_dress/3.jpg"], 4)
    rows = formats.read(folder, "auto").rows[["source_path", "colour", "garment"]]
    assert sorted(rows.itertuples(index=False, name=None)) == [
        ("blue_dress/4.jpg", "blue", "dress"),
        ("red_dress/2.jpg", "red", "dress"),
        ("red_hat/5.jpg", "red", "hat"),
        ("red_hat/6.jpg", "red", "hat"),
    ]


def test_a_rest_that_would_read_as_other_label_columns_is_refused(tmp_path: Path) -> None:
    """One folder alone is not taken for a colour and a garment."""
    folder = put(tmp_path / "new", {"red_dress/1.jpg": b"one", "blue_hat/2.jpg": b"two"})
    old = known(put(tmp_path / "old", {"x.jpg": b"one"}))
    with pytest.raises(PleatError, match="labels of the rest would read differently"):
        leave_out(folder, "auto", contents(folder), old)
    folder = put(tmp_path / "again", {"red_dress/1.jpg": b"one", "blue_hat/2.jpg": b"two"})
    assert leave_out(folder, "colour_garment", contents(folder), old).n_left == 1


def lists(folder: Path, **parts: dict[str, str]) -> Path:
    """An attribute_lists batch: for each list images and their two integers; an image's bytes are its first letter."""
    text = "4\nattribute_name attribute_type\nplain 1\nstriped 1\nlong 2\nshort 2\n"
    files = {"split/list_attr_cloth.txt": text.encode()}
    for part, rows in parts.items():
        files[f"split/{part}.txt"] = "\n".join(["picture_filename", *(f"img/{name}.jpg" for name in rows), ""]).encode()
        if part != "test":
            files[f"split/{part}_attr.txt"] = "\n".join(["pattern size", *rows.values()]).encode()
        files |= {f"img/{name}.jpg": name[0].encode() for name in rows}
    return put(folder, files)


def test_lines_and_files_of_attribute_lists(tmp_path: Path) -> None:
    """The images a, e and g are known; b2 repeats b, b3 contradicts it."""
    folder = lists(
        tmp_path / "new",
        train={"a": "0 0", "b": "0 1", "b2": "0 1", "b3": "1 1", "c": "1 0"},
        val={"d": "1 1", "e": "0 0"},
        test={"f": "", "g": ""},
    )
    before = formats.read(folder, "auto").rows
    old = known(put(tmp_path / "old", {"a.jpg": b"a", "e.jpg": b"e", "g.jpg": b"g"}))
    found = leave_out(folder, "auto", contents(folder), old)
    assert (found.known, found.repeated, found.n_left) == (
        ["img/a.jpg", "img/e.jpg", "img/g.jpg"], ["img/b2.jpg"], 4
    )  # fmt: skip
    after = formats.read(folder, "auto")
    assert after.rows.to_dict("records") == before.iloc[[1, 3, 4, 5]].to_dict("records")
    assert list(after.rows["given"]) == ["train", "train", "train", "val"]
    assert list(after.rows["pattern"]) == ["plain", "striped", "striped", "striped"]
    assert after.unlabelled == ["img/f.jpg"]
    # Nothing is left to score on: then there is no such list.
    folder = lists(tmp_path / "no val", train={"b": "0 1"}, val={"e": "0 0"})
    assert leave_out(folder, "auto", contents(folder), old).n_left == 1
    assert names(folder / "split") == ["list_attr_cloth.txt", "train.txt", "train_attr.txt"]
    # Without an image to train on it is no such data set any more.
    folder = lists(tmp_path / "no train", train={"a": "0 1"}, val={"d": "0 0"})
    with pytest.raises(PleatError, match="labels of the rest would read differently"):
        leave_out(folder, "auto", contents(folder), old)


def test_the_digest_is_of_names_and_contents_alone(tmp_path: Path) -> None:
    one, two = (
        put(tmp_path / "one", {"a/b.jpg": b"1", "c.jpg": b"2"}),
        put(tmp_path / "two", {"c.jpg": b"2", "a/b.jpg": b"1"}),
    )
    assert digest(contents(one)) == digest(contents(two))
    (two / "c.jpg").rename(two / "d.jpg")
    assert digest(contents(one)) != digest(contents(two))


def test_every_batch_is_known_wherever_its_list_is(shop: Path, tmp_path: Path) -> None:
    notes, raw = tmp_path / "notes", shop / "data" / "raw"
    put(raw / "untracked", {"Hat/x.jpg": b"untracked"})
    expected = known(raw / "old") | known(raw / "untracked")
    assert len(expected) == N_TRAINING + 1
    dvc(shop, "push", "--quiet", "data/raw/old.dvc")
    assert known_images(settings(shop), shop, notes) == expected
    # From the remote: neither its files nor DVC's cache are here; of the images none is fetched.
    shutil.rmtree(raw / "old")
    shutil.rmtree(shop / ".dvc" / "cache")
    shutil.rmtree(notes)
    assert known_images(settings(shop), shop, notes) == expected
    assert len([path for path in (shop / ".dvc" / "cache").rglob("*") if path.is_file()]) == 1
    # Once read, a list is never needed again.
    shutil.rmtree(shop / ".dvc" / "cache")
    shutil.rmtree(shop / "remote")
    assert known_images(settings(shop), shop, notes) == expected
    shutil.rmtree(notes)
    with pytest.raises(PleatError, match=r"bring it with `dvc pull data/raw/old\.dvc`"):
        known_images(settings(shop), shop, notes)


@pytest.mark.parametrize("kind", ["folder", "archive", "link"])
def test_a_move_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    folder = tmp_path / "inbox"
    put(folder, {"set/Hat/a.jpg": b"a"} if kind == "folder" else {"set": b"zip"} if kind == "archive" else {})
    if kind == "link":
        put(tmp_path / "elsewhere", {"Hat/a.jpg": b"a"})
        folder.mkdir()
        (folder / "set").symlink_to(tmp_path / "elsewhere")
    true = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.parent != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return true(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    inbox = FolderInbox(folder)
    [seen] = inbox.look()
    inbox.move("set", seen.files, DONE, "inbox_set", {"note.txt": "hello"})
    done = tmp_path / "inbox_done" / "inbox_set"
    assert names(folder) == []
    assert names(done) == ["note.txt", "set"]
    assert (done / "set").is_symlink() == (kind == "link")
    assert (done / "set").read_bytes() == b"zip" if kind == "archive" else content(done / "set") == {"Hat/a.jpg": b"a"}
    # Asked again, as after a kill, and for a second delivery of the same.
    inbox.move("set", seen.files, DONE, "inbox_set", {"note.txt": "hello"})
    put(folder, {"set/Hat/a.jpg": b"a"})
    [seen] = inbox.look()
    inbox.move("set", seen.files, DONE, "inbox_set", {})
    assert names(folder) == []
    assert names(done) == ["note.txt", "set"]


def test_what_changed_since_stays_in_the_inbox(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    put(tmp_path / "inbox", {"set/Hat/a.jpg": b"a"})
    inbox = FolderInbox(tmp_path / "inbox")
    [seen] = inbox.look()
    put(tmp_path / "inbox", {"set/Hat/b.jpg": b"b"})
    inbox.move("set", seen.files, DONE, "inbox_set", {})
    assert names(tmp_path / "inbox") == ["set"]
    assert names(tmp_path) == ["inbox"]
    assert "has changed since it was looked at" in capsys.readouterr().out


def test_names_and_links_that_cannot_be_taken(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = put(tmp_path / "inbox", {"linked/Hat/a.jpg": b"a", "x.git/Hat/a.jpg": b"a", "bad/Hat/\udcff.jpg": b"a"})
    (folder / "\udcfe.zip").write_bytes(b"x")
    (folder / "linked" / "Hat" / "b.jpg").symlink_to("/etc/passwd")
    inbox = FolderInbox(folder)
    seen = {one.name: one for one in inbox.look()}
    assert seen.keys() == {"bad", "linked", "x.git"}
    assert "whose name is not valid UTF-8; rename it" in capsys.readouterr().out
    assert "whose name is not valid UTF-8; rename it" in seen["bad"].wait(0)
    with pytest.raises(RefusedError, match="is a link to /etc/passwd, outside of"):
        inbox.fetch(seen["linked"], tmp_path / "one")
    # A folder's name says nothing; git is not asked to clone it.
    inbox.fetch(seen["x.git"], tmp_path / "two")
    assert content(tmp_path / "two") == {"Hat/a.jpg": b"a"}
    assert [deliveries.ignored(name) for name in (".x", "a.ZIP.Part", "a.zip")] == [True, True, False]
