"""Bringing a data set from where it lies into a new folder: a folder, an archive, a git repository, a bucket."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pipeline_steps import archives, buckets
from pipeline_steps.buckets import redact
from pipeline_steps.errors import PleatError
from pipeline_steps.formats.clothing_csv import TABLE
from pipeline_steps.formats.listing import IMAGE_SUFFIXES
from pipeline_steps.progress import say, track

Kind = Literal["folder", "archive", "git", "s3"]
GIT_SCHEMES = ("https://", "http://", "ssh://", "file://")
GIT_SHORT = re.compile(r"[A-Za-z0-9_.-]+@[A-Za-z0-9.-]+:")  # git@github.com:owner/repository
OTHER_ARCHIVES = (".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".tzst")
LFS_POINTER = b"version https://git-lfs"


def kind_of(source: str) -> Kind:
    """Says what `source` is.

    Raises:
        PleatError: nothing is there, or it is of a kind that cannot be added.
    """
    if source.startswith("s3://"):
        buckets.split_address(source)
        return "s3"
    if source.startswith("-") or re.match(r"[A-Za-z0-9+.-]+::", source):
        raise PleatError(f"'{redact(source)}' is no address that data may come from; {_choices()}.")
    if source.startswith(GIT_SCHEMES) or GIT_SHORT.match(source):
        if source.lower().endswith(archives.SUFFIXES + OTHER_ARCHIVES):
            raise PleatError(f"'{redact(source)}' is an archive on a server; download it first, then add the file.")
        return "git"
    if "://" in source:
        raise PleatError(f"'{redact(source)}' is no address that data may come from; {_choices()}.")
    path = Path(source).expanduser()
    if source.rstrip("/").endswith(".git") and path.is_dir():
        return "git"
    if path.is_dir():
        return "folder"
    if not path.exists():
        raise PleatError(f"'{source}' does not exist; {_choices()}.")
    if not path.is_file() or not path.name.lower().endswith(archives.SUFFIXES):
        raise PleatError(f"'{source}' is neither a folder nor an archive that Pleat can read; {_choices()}.")
    return "archive"


def bring(source: str, folder: Path) -> None:
    """Fills `folder`, which must be new, with the files of `source`; hidden and system files are left out.

    A single folder at the top of an archive is unwrapped. Folders beside `folder` may be used on the way.

    Raises:
        PleatError: see `kind_of`; or the source cannot be read, or holds links or names that lead out of it.
        OSError: the disk is full or a place cannot be written.
    """
    kind = kind_of(source)
    if kind == "s3":
        buckets.download(source, folder)
    elif kind == "git":
        _clone(source, folder)
    elif kind == "archive":
        unpacked = folder.with_name("unpacked")
        archives.extract(Path(source).expanduser(), unpacked)
        _unwrapped(unpacked).rename(folder)
    else:
        _bring_folder(Path(source).expanduser(), folder, move=False)


def run_child(
    command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None, inherit: Sequence[int] = ()
) -> None:
    """Runs a program to its end; on a terminal its progress is shown. `inherit` are open file descriptors it keeps.

    Raises:
        PleatError: the program is not installed, or it failed; with what it said.
    """
    shown = sys.stderr.isatty()
    errors = None if shown else subprocess.PIPE
    quiet = subprocess.DEVNULL
    try:
        child = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=quiet, stdout=quiet, stderr=errors, pass_fds=tuple(inherit)
        )
    except FileNotFoundError:
        raise PleatError(f"`{command[0]}` is not installed here, and it is needed for this.") from None
    with child:
        try:
            _, said = child.communicate()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if child.returncode:
        reason = "its message is above" if shown else " ".join(said.decode(errors="replace").split())[-800:]
        raise PleatError(f"`{redact(' '.join(command))}` failed: {redact(reason)}")


def _choices() -> str:
    return (
        f"a source is a folder, an archive ({', '.join(archives.SUFFIXES)}), a git address (https://, ssh://, git@, "
        "file:// or ending in .git), or s3://bucket/folder"
    )


def _bring_folder(source: Path, folder: Path, move: bool) -> None:
    top = source.resolve()
    if folder.resolve().is_relative_to(top):
        raise PleatError(f"{source} contains this project's data/raw, so it cannot be added to it; name another.")
    # Links first: each becomes a copy of its file, which must still be in its place by then.
    files = sorted(_files(top, top), key=lambda path: not path.is_symlink())
    folder.mkdir()
    for path in track(files, f"copy {source.name}", len(files), "files"):
        target = folder / path.relative_to(top)
        target.parent.mkdir(parents=True, exist_ok=True)
        if move and not path.is_symlink():
            path.replace(target)
        else:
            shutil.copyfile(path, target)


def _files(folder: Path, top: Path) -> Iterator[Path]:
    """Yields every file below `folder`, links to files within `top` included.

    Raises:
        PleatError: there is another link, or a device, pipe or socket.
    """
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if archives.left_out(entry.name):
            continue
        if entry.is_symlink():
            _check_link(path, top)
            yield path
        elif entry.is_dir():
            yield from _files(path, top)
        elif entry.is_file():
            yield path
        else:
            raise PleatError(f"{path} is neither a file nor a folder (a device, pipe or socket); remove it.")


def _check_link(link: Path, top: Path) -> None:
    remedy = "copy the data with its links resolved (`cp -rL`) first, or remove the link"
    try:
        target = link.resolve(strict=True)
    except (FileNotFoundError, RuntimeError):  # the latter for links in a circle
        raise PleatError(f"{link} is a link to {str(link.readlink())!r}, which does not exist; {remedy}.") from None
    if not target.is_relative_to(top):
        raise PleatError(f"{link} is a link to {target}, outside of {top}; {remedy}.")
    if not target.is_file():
        raise PleatError(f"{link} is a link to {target}, which is no file; {remedy}.")


def _clone(url: str, folder: Path) -> None:
    clone = folder.with_name("clone")
    say(f"clone {redact(url)}")
    # A hook of this repository may have set these; they would send git to the wrong one.
    env = {key: value for key, value in os.environ.items() if key not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    env |= {"GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "https:http:ssh:file"}
    command = ["git", "-c", "core.hooksPath=/dev/null", "clone", "--depth", "1", "--no-local", "--template="]
    run_child([*command, "--no-recurse-submodules", "--", url, str(clone)], env=env)
    _bring_folder(clone, folder, move=True)
    shutil.rmtree(clone)
    for path in folder.rglob("*"):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.stat().st_size < 1024:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise PleatError(f"{redact(url)} keeps its images in Git LFS; install git-lfs and add it again.")


def _unwrapped(folder: Path) -> Path:
    """Follows folders that are alone at the top, such as `dataset-main`, as far as they are not a class with images."""
    entries = list(folder.iterdir())
    while len(entries) == 1 and entries[0].is_dir():
        inside = list(entries[0].iterdir())
        holds_images = any(path.suffix.lower() in IMAGE_SUFFIXES for path in inside)
        if holds_images and not (entries[0] / TABLE).is_file():
            break
        folder, entries = entries[0], inside
    return folder
