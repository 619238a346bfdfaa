"""The commit of a batch beside whatever a person is doing in the same repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_params
from inbox_help import SETTINGS, batches, git

from pipeline_steps import inbox_publish
from pipeline_steps.errors import PleatError
from pipeline_steps.inbox_publish import commit

ME = ("-c", "user.name=me", "-c", "user.email=me@localhost")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, to which a batch has just been added."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    root = tmp_path / "project"
    (root / "data" / "raw").mkdir(parents=True)
    write_params(root, SETTINGS)
    (root / "readme").write_text("one\n")
    (root / "data" / "raw" / ".gitignore").write_text("/old\n")
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, *ME, "commit", "--quiet", "-m", "start")
    add(root, "new")
    return root


def add(root: Path, batch: str) -> None:
    """What `pleat data add` leaves behind."""
    (root / "data" / "raw" / f"{batch}.dvc").write_text(f"outs:\n- md5: {batch}\n")
    with (root / "data" / "raw" / ".gitignore").open("a") as file:
        file.write(f"/{batch}\n")
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("  - old\n", f"  - old\n  - {batch}\n"))
    assert batch in batches(root)


def test_exactly_the_new_batch_is_committed_and_tagged(root: Path) -> None:
    commit(root, "new", "Add new")
    assert git(root, "status", "--porcelain") == ""
    assert git(root, "show", "--name-only", "--format=%s", "HEAD").split("\n") == [
        "Add new", "", "data/raw/.gitignore", "data/raw/new.dvc", "params.yaml",
    ]  # fmt: skip
    assert git(root, "rev-parse", "data/new") == git(root, "rev-parse", "HEAD")
    assert git(root, "log", "-1", "--format=%an <%ae> %cn") == "Pleat <pleat@localhost> Pleat"
    head = git(root, "rev-parse", "HEAD")
    commit(root, "new", "Add new")
    assert git(root, "rev-parse", "HEAD") == head
    # The tag is made good where a person made the commit.
    git(root, "tag", "--delete", "data/new")
    commit(root, "new", "Add new")
    assert git(root, "rev-parse", "data/new") == head


def test_what_a_person_has_not_committed_stays_so(root: Path) -> None:
    """Staged and unstaged edits, in other files and in the very files that the commit changes."""
    git(root, "config", "user.name", "Ann")
    git(root, "config", "user.email", "ann@localhost")
    (root / "readme").write_text("one\nstaged\n")
    (root / "draft").write_text("staged")
    git(root, "add", "readme", "draft")
    (root / "readme").write_text("one\nstaged\nnot staged\n")
    (root / "loose").write_text("untracked")
    add(root, "mine")  # another batch, added by hand and not committed
    with_seed = (root / "params.yaml").read_text().replace("seed: 17", "seed: 18")
    (root / "params.yaml").write_text(with_seed)
    before = {path: (root / path).read_bytes() for path in ("params.yaml", "readme", "data/raw/.gitignore")}

    commit(root, "new", "Add new")
    assert {path: (root / path).read_bytes() for path in before} == before
    assert git(root, "status", "--porcelain").splitlines() == [
        "M data/raw/.gitignore", "A  draft", " M params.yaml", "MM readme", "?? data/raw/mine.dvc", "?? loose",
    ]  # fmt: skip
    assert git(root, "show", "HEAD:data/raw/.gitignore") == "/old\n/new"
    committed = git(root, "diff", "HEAD~1", "HEAD", "--", "params.yaml")
    assert [line for line in committed.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")] == [
        "+  - new"
    ]
    assert git(root, "show", ":readme") == "one\nstaged"
    assert git(root, "log", "-1", "--format=%an") == "Ann"


def test_staged_edits_of_params_stay_staged(root: Path) -> None:
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("seed: 17", "seed: 18").replace("  - new\n", ""))
    git(root, "add", "params.yaml")
    (root / "params.yaml").write_text(text.replace("seed: 17", "seed: 18"))
    commit(root, "new", "Add new")
    assert "seed: 17" in git(root, "show", "HEAD:params.yaml")
    assert "seed: 18" in git(root, "show", ":params.yaml")
    assert git(root, "diff", "--name-only") == ""
    assert git(root, "diff", "--cached", "--name-only") == "params.yaml"


def test_a_params_file_of_another_version_is_left_to_the_person(root: Path, capsys: pytest.CaptureFixture) -> None:
    now = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text("experiment: {old: true}\n")
    git(root, "add", "params.yaml")
    git(root, *ME, "commit", "--quiet", "-m", "older")
    (root / "params.yaml").write_text(now)
    commit(root, "new", "Add new")
    assert "commit the new one yourself" in capsys.readouterr().out
    assert git(root, "show", "--name-only", "--format=", "HEAD").split() == ["data/raw/.gitignore", "data/raw/new.dvc"]


def test_an_unborn_branch_and_a_folder_within_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    root = tmp_path / "top" / "project"
    (root / "data" / "raw").mkdir(parents=True)
    write_params(root, SETTINGS)
    add(root, "new")
    git(tmp_path / "top", "init", "--quiet")
    (tmp_path / "top" / "other").write_text("not to be committed")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as a hook of another repository would set it
    commit(root, "new", "Add new")
    monkeypatch.delenv("GIT_DIR")
    assert git(tmp_path / "top", "ls-tree", "-r", "--name-only", "data/new").split() == [
        "project/data/raw/.gitignore", "project/data/raw/new.dvc", "project/params.yaml",
    ]  # fmt: skip
    assert git(tmp_path / "top", "status", "--porcelain") == "?? other"


def test_no_repository_and_an_ignored_place(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "plain").mkdir()
    commit(tmp_path / "plain", "new", "Add new")
    assert "is in no git repository, so nothing is committed" in capsys.readouterr().out
    (root / ".gitignore").write_text("*.dvc\n")
    before = git(root, "rev-parse", "HEAD")
    commit(root, "new", "Add new")
    assert "git ignores data/raw/new.dvc" in capsys.readouterr().out
    assert git(root, "rev-parse", "HEAD") == before


def test_a_merge_under_way_and_a_commit_at_the_same_moment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = git(root, "rev-parse", "HEAD")
    (root / ".git" / "MERGE_HEAD").write_text(f"{head}\n")
    with pytest.raises(PleatError, match="in the middle of a merge") as caught:
        commit(root, "new", "Add new")
    assert caught.value.temporary
    (root / ".git" / "MERGE_HEAD").unlink()
    true = inbox_publish._Git.commit_on

    def commit_on(*arguments: object) -> str:
        git(root, *ME, "commit", "--quiet", "--allow-empty", "-m", "theirs", "--only")
        return true(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(inbox_publish._Git, "commit_on", commit_on)
    with pytest.raises(PleatError, match="git could not record the new batch") as caught:
        commit(root, "new", "Add new")
    assert caught.value.temporary
    assert git(root, "log", "--format=%s").splitlines() == ["theirs", "start"]
    assert git(root, "tag") == ""
    monkeypatch.undo()
    commit(root, "new", "Add new")
    assert git(root, "log", "--format=%s").splitlines() == ["Add new", "theirs", "start"]


def test_hooks_do_not_run(root: Path) -> None:
    for name in ("pre-commit", "commit-msg", "post-commit"):
        hook = root / ".git" / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text("#!/bin/sh\nexit 1\n")
        hook.chmod(0o755)
    commit(root, "new", "Add new")
    assert git(root, "tag") == "data/new"


def test_git_that_is_not_installed(root: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(FileNotFoundError):
        subprocess.run(["git", "--version"], check=True)
    commit(root, "new", "Add new")
    assert "git is not installed" in capsys.readouterr().out
