"""What makes a new batch known to others: `dvc push`, and a commit and tag in git. Both can be repeated."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline_steps import sources
from pipeline_steps.data_add import _listed
from pipeline_steps.errors import PleatError
from pipeline_steps.progress import say

TAG = "data/"  # data/BATCH
# States of git in which the branch is not where the person thinks, or in which a commit would end what they began.
BUSY = ("MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "rebase-merge", "rebase-apply")
IDENTITY = {"user.name": "Pleat", "user.email": "pleat@localhost"}
Change = Callable[[bytes | None], bytes | None]


def push(root: Path, batch: str) -> None:
    """Pushes one batch to DVC's default remote; does nothing where there is none.

    Raises:
        PleatError: the remote cannot be reached or refuses; temporary.
    """
    dvc = [sys.executable, "-m", "dvc"]
    asked = subprocess.run([*dvc, "config", "core.remote"], cwd=root, capture_output=True, text=True, check=False)
    remote = asked.stdout.strip()
    if not remote:
        say(f"No default remote of DVC is set, so {batch} stays on this machine")
        return
    say(f"dvc push {batch} to {remote}")
    try:
        sources.run_child([*dvc, "--wait-for-lock", "push", f"data/raw/{batch}.dvc"], cwd=root)
    except PleatError as error:
        raise PleatError(
            f"{batch} was added, but not pushed to the remote '{remote}': {error} The next look at the inbox goes on "
            "from there.",
            temporary=True,
        ) from error


def commit(root: Path, batch: str, message: str) -> None:
    """Commits one batch and tags it data/BATCH, both or neither; does nothing where `root` is in no git repository.

    The commit holds BATCH.dvc, and the last commit's params.yaml and data/raw/.gitignore with the one line that is new.
    So whatever a person has changed in these or other files, staged or not, stays as it is and stays uncommitted. No
    hook of the repository runs.

    Raises:
        PleatError: git refuses, is in the middle of a merge or rebase, or somebody committed at the same moment.
    """
    git = _Git(root)
    if not git.present():
        return
    for name in BUSY:
        if (root / git.ask("rev-parse", "--git-path", name)).exists():
            raise PleatError(
                f"git is in the middle of a merge, rebase or cherry-pick in {root.absolute()}; end it. The next look "
                "at the inbox commits the new batch.",
                temporary=True,
            )
    tracked, tag = f"data/raw/{batch}.dvc", f"refs/tags/{TAG}{batch}"
    if git.ignores(tracked):
        say(f"git ignores {tracked}, so nothing is committed")
        return
    if git.content("HEAD", tracked) == (root / tracked).read_bytes():
        if not git.has(tag):
            git.run("update-ref", tag, git.ask("log", "-1", "--format=%H", "--", tracked))
        return
    changes: dict[str, Change] = {
        tracked: lambda _: (root / tracked).read_bytes(),
        "data/raw/.gitignore": lambda old: _with_line(old, f"/{batch}"),
        "params.yaml": lambda old: _with_batch(old, batch, root),
    }
    paths = [path for path in changes if (root / path).is_file() and not git.ignores(path)]
    # The person's index first: were this killed in between, the same command would find all as `git add` leaves it.
    for path in paths:
        git.stage(path, changes[path](git.content("", path)))
    old = git.ask("rev-parse", "HEAD") if git.has("HEAD") else ""
    before = {path: git.content(old, path) if old else None for path in paths}
    new = git.commit_on(old, {path: changes[path](before[path]) for path in paths}, message)
    # Refused where somebody has committed since `old` was read.
    updates = f"update HEAD {new} {old or '0' * len(new)}\n" + ("" if git.has(tag) else f"create {tag} {new}\n")
    git.run("update-ref", "-m", f"pleat: {batch}", "--stdin", input=updates.encode())
    say(f"git: commit {new[:10]} and tag {TAG}{batch}")


class _Git:
    """git in one folder, which may lie below the top of its repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # A hook of another repository may have set these; they would send git there.
        theirs = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
        self.environment = {name: value for name, value in os.environ.items() if name not in theirs}
        self.environment |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
        self.prefix = ""

    def present(self) -> bool:
        """Whether there is a repository to commit to."""
        try:
            done = self._try("rev-parse", "--is-inside-work-tree", "--show-prefix")
        except FileNotFoundError:
            say("git is not installed, so nothing is committed")
            return False
        if done.returncode and b"not a git repository" in done.stderr:
            say(f"{self.root.absolute()} is in no git repository, so nothing is committed")
            return False
        lines = self._checked(done).decode().splitlines()
        self.prefix = lines[1] if len(lines) > 1 else ""
        return lines[0] == "true"

    def has(self, revision: str) -> bool:
        return self._try("rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}").returncode == 0

    def ignores(self, path: str) -> bool:
        """Whether a path is ignored and not tracked."""
        return self._try("check-ignore", "--quiet", "--", path).returncode == 0

    def content(self, revision: str, path: str) -> bytes | None:
        """A file of a commit, or of the index for the revision ""; None where it has none."""
        done = self._try("show", f"{revision}:./{path}")
        return None if done.returncode else done.stdout

    def stage(self, path: str, content: bytes | None, environment: dict[str, str] | None = None) -> None:
        """Puts a file's content into the index and leaves the file alone; nothing happens for None."""
        if content is not None:
            blob = self.run("hash-object", "-w", "--stdin", input=content).decode().strip()
            entry = f"100644,{blob},{self.prefix}{path}"
            self.run("update-index", "--add", "--cacheinfo", entry, environment=environment or {})

    def commit_on(self, parent: str, files: dict[str, bytes | None], message: str) -> str:
        """A commit of `parent` ("" for the first of all) with `files` changed, on no branch yet."""
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self.run("read-tree", parent or "--empty", environment=index)
            for path, content in files.items():
                self.stage(path, content, index)
            tree = self.run("write-tree", environment=index).decode().strip()
        unset = [name for name in IDENTITY if self._try("config", "--get", name).returncode]
        identity = [word for name in unset for word in ("-c", f"{name}={IDENTITY[name]}")]
        parents = ["-p", parent] if parent else []
        return self.ask(*identity, "commit-tree", tree, *parents, "-m", message)

    def ask(self, *arguments: str) -> str:
        return self.run(*arguments).decode().strip()

    def run(self, *arguments: str, input: bytes = b"", environment: dict[str, str] | None = None) -> bytes:  # noqa: A002
        return self._checked(self._try(*arguments, input=input, environment=environment))

    def _try(
        self,
        *arguments: str,
        input: bytes = b"",  # noqa: A002
        environment: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        env = self.environment | (environment or {})
        return subprocess.run(
            ["git", *arguments], cwd=self.root, env=env, input=input, capture_output=True, check=False
        )

    def _checked(self, done: subprocess.CompletedProcess[bytes]) -> bytes:
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())[-500:]
            raise PleatError(
                f"git could not record the new batch: {said} The next look at the inbox goes on from there.",
                temporary=True,
            )
        return done.stdout


def _with_line(old: bytes | None, line: str) -> bytes:
    text = (old or b"").decode()
    if line in text.splitlines():
        return text.encode()
    return f"{text}{'' if text.endswith(chr(10)) or not text else chr(10)}{line}\n".encode()


def _with_batch(old: bytes | None, batch: str, root: Path) -> bytes | None:
    """params.yaml with the batch listed; what a person has not committed of it stays out.

    None where the older text cannot be read by this version, so that nothing can be said about it.
    """
    if old is None:
        return (root / "params.yaml").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        path.write_bytes(old)
        try:
            return _listed(path, batch)
        except PleatError:
            say("params.yaml as last committed cannot be read by this version of Pleat; commit the new one yourself")
            return None
