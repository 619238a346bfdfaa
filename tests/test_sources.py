"""Folders and git repositories brought into a batch, hostile ones included."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from pipeline_steps import sources
from pipeline_steps.errors import PleatError

SET = {"images.csv": b"image,sender_id,label\na,1,Hat\n", "images/a.jpg": os.urandom(3000), "Röcke/b c.jpg": b"b"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    """Where the data goes: a new folder in an empty one."""
    (tmp_path / "staging").mkdir()
    return tmp_path / "staging" / "batch"


def test_a_folder_is_copied_without_hidden_and_foreign_files(tmp_path: Path, batch: Path) -> None:
    kept = {**SET, "LICENSE": b"CC0", "README.md": b"read"}
    junk = [".git/config", ".DS_Store", "images/Thumbs.db", "__MACOSX/images/a.jpg", "dvc.yaml", "images.dvc"]
    make(tmp_path / "set", {**kept, **dict.fromkeys(junk, b"junk")})
    sources.bring(str(tmp_path / "set"), batch)
    assert contents(batch) == kept


def test_a_link_within_the_source_becomes_its_file(tmp_path: Path, batch: Path) -> None:
    source = make(tmp_path / "set", {"Hat/a.jpg": b"hat", ".annex/b": b"annexed"})
    (source / "Hat" / "same.jpg").symlink_to("a.jpg")
    (source / "Hat" / "b.jpg").symlink_to("../.annex/b")
    (tmp_path / "alias").symlink_to(source)
    sources.bring(str(tmp_path / "alias"), batch)
    assert contents(batch) == {"Hat/a.jpg": b"hat", "Hat/same.jpg": b"hat", "Hat/b.jpg": b"annexed"}
    assert not (batch / "Hat" / "same.jpg").is_symlink()


@pytest.mark.parametrize(
    ("link", "sentence"),
    [
        ("/etc/hosts", "is a link to /etc/hosts, outside of"),
        ("../../secret.jpg", "outside of"),
        ("nowhere.jpg", "is a link to 'nowhere.jpg', which does not exist"),
        ("trap.jpg", "which does not exist"),
        (".", "which is no file"),
    ],
)
def test_other_links_are_refused_not_followed(tmp_path: Path, batch: Path, link: str, sentence: str) -> None:
    make(tmp_path, {"secret.jpg": b"secret", "set/Hat/a.jpg": b"hat"})
    (tmp_path / "set" / "Hat" / "trap.jpg").symlink_to(link)
    with pytest.raises(PleatError, match=r"trap\.jpg is a link.*cp -rL") as caught:
        sources.bring(str(tmp_path / "set"), batch)
    assert sentence in str(caught.value)
    assert not batch.exists()


def test_a_pipe_in_a_folder_is_refused_instead_of_waited_for(tmp_path: Path, batch: Path) -> None:
    make(tmp_path / "set", {"Hat/a.jpg": b"hat"})
    os.mkfifo(tmp_path / "set" / "Hat" / "pipe.jpg")
    with pytest.raises(PleatError, match=r"pipe\.jpg is neither a file nor a folder"):
        sources.bring(str(tmp_path / "set"), batch)


def test_a_folder_that_contains_the_project_is_refused(tmp_path: Path, batch: Path) -> None:
    make(tmp_path, {"Hat/a.jpg": b"hat"})
    with pytest.raises(PleatError, match="contains this project's data/raw"):
        sources.bring(str(tmp_path), batch)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository of three commits, with a folder of images, a link within and a hidden file."""
    path = tmp_path_factory.mktemp("remote") / "set"
    make(path, {**SET, ".github/workflow.yml": b"x", "old.jpg": b"old"})
    (path / "images" / "same.jpg").symlink_to("a.jpg")
    git(path, "init", "--quiet")
    commit(path)
    (path / "old.jpg").unlink()
    commit(path)
    return path


def git(folder: Path, *command: str) -> None:
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com"]
    subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "change")


@pytest.mark.parametrize("address", ["file://{}", "{}/.git"])
def test_a_git_repository_is_cloned_without_history_or_hidden_files(
    repository: Path, batch: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a git hook.
    monkeypatch.setenv("GIT_DIR", str(batch.with_name("other")))
    monkeypatch.setenv("GIT_WORK_TREE", str(batch.with_name("other")))
    sources.bring(address.format(repository), batch)
    assert contents(batch) == {**SET, "images/same.jpg": SET["images/a.jpg"]}
    assert not (batch / "images" / "same.jpg").is_symlink()
    assert list(batch.parent.iterdir()) == [batch]


def test_hooks_of_the_user_and_of_templates_do_not_run(
    repository: Path, batch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = make(tmp_path, {"template/hooks/post-checkout": f"#!/bin/sh\ntouch {tmp_path}/ran\n".encode()})
    (hook / "template/hooks/post-checkout").chmod(0o755)
    (tmp_path / "gitconfig").write_text(
        f"[init]\ntemplateDir = {tmp_path}/template\n[core]\nhooksPath = {tmp_path}/template/hooks\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    sources.bring(f"file://{repository}", batch)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("target", ["/etc/hosts", "../../../secret"])
def test_a_repository_with_a_link_to_the_outside(tmp_path: Path, batch: Path, target: str) -> None:
    make(tmp_path, {"secret": b"secret", "set/Hat/a.jpg": b"a"})
    (tmp_path / "set" / "Hat" / "b.jpg").symlink_to(target)
    git(tmp_path / "set", "init", "--quiet")
    commit(tmp_path / "set")
    with pytest.raises(PleatError, match=r"b\.jpg is a link to"):
        sources.bring(f"file://{tmp_path}/set", batch)
    assert not batch.exists()


def test_images_left_in_git_lfs(tmp_path: Path, batch: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    git(make(tmp_path / "set", {"Hat/a.jpg": pointer}), "init", "--quiet")
    commit(tmp_path / "set")
    with pytest.raises(PleatError, match="keeps its images in Git LFS; install git-lfs"):
        sources.bring(f"file://{tmp_path}/set", batch)


def test_a_repository_that_cannot_be_cloned_and_its_password(tmp_path: Path, batch: Path) -> None:
    with pytest.raises(PleatError, match=r"failed: .*does not"):
        sources.bring(f"file://{tmp_path}/nothing", batch)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: refused at once
        port = closed.getsockname()[1]
        with pytest.raises(PleatError, match="failed") as caught:
            sources.bring(f"https://me:s3cret@127.0.0.1:{port}/set.git", batch)
    assert "s3cret" not in str(caught.value)
    assert "://***@127.0.0.1" in str(caught.value)
    assert not batch.exists()


@pytest.mark.parametrize(
    "source",
    ["ext::sh -c touch% {}/ran", "ext::sh -c 'touch {}/ran' .git", "--upload-pack=touch {}/ran", "-u.git", "fd::17",
     "gs://bucket/set", "ftp://host/set.zip"],
)  # fmt: skip
def test_addresses_that_would_run_commands_or_are_unknown(tmp_path: Path, batch: Path, source: str) -> None:
    with pytest.raises(PleatError, match="is no address that data may come from; a source is a folder, an archive"):
        sources.bring(source.format(tmp_path), batch)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["set.7z", "set.rar", "set.tar.zst", "set.gz", "image.jpg", "set"])
def test_a_file_that_is_no_readable_archive(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(PleatError, match=r"is neither a folder nor an archive that Pleat can read; .*\.tar\.gz"):
        sources.kind_of(str(tmp_path / name))


def test_what_each_source_is(tmp_path: Path) -> None:
    (tmp_path / "x.ZIP").touch()
    (tmp_path / "bare.git").mkdir()
    found = {
        source: sources.kind_of(source)
        for source in [
            str(tmp_path), str(tmp_path / "x.ZIP"), str(tmp_path / "bare.git"), "https://host/owner/set",
            "git@host.org:owner/set.git", "ssh://git@host/set", "file:///srv/set", "s3://bucket/a/b",
        ]
    }  # fmt: skip
    assert list(found.values()) == ["folder", "archive", "git", "git", "git", "git", "git", "s3"]
    for source, sentence in [
        (str(tmp_path / "nowhere"), "does not exist; a source is"),
        ("https://host/set.zip", "is an archive on a server; download it first"),
        ("s3://", "Expected an address such as s3://bucket/folder"),
    ]:
        with pytest.raises(PleatError, match=sentence):
            sources.kind_of(source)


def test_a_program_that_is_not_installed() -> None:
    with pytest.raises(PleatError, match="`no-such-program` is not installed here"):
        sources.run_child(["no-such-program"])
