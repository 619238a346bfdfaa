"""A packaged model in a process of its own, in which only its stated requirements can be imported.

So a model is judged, and scores batches, as it will run elsewhere, and two versions never share code.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from pipeline_steps import serving

CHILD = Path(__file__).parent / "isolated_child.py"
PACKAGE = Path("artifacts", "package")  # in an MLflow model that Pleat made
SHOWN = 300  # characters of an error
# Of the environment: what programs need to run. Credentials, which no model needs to answer images, stay behind.
KEPT = ("LANG", "LC_", "PATH", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "OMP_", "MKL_", "GOMP_", "KMP_", "MALLOC_", "CUDA_")
Row = dict[str, Any] | str


class BrokenError(Exception):
    """The model does not load, or died; the message is a clause for a sentence."""


class Isolated:
    """A model that answers in its process.

    Attributes:
        load_s: seconds from the start of the process until the model was loaded.
    """

    load_s: float

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes], links: Path) -> None:
        self._process, self._errors, self._links = process, errors, links

    def load(self, folder: Path) -> None:
        """Loads an MLflow model from its folder.

        Raises:
            BrokenError: it does not load.
        """
        self.load_s = self._ask({"do": "load", "folder": str(folder.absolute())})["load_s"]

    def answers(self, paths: Sequence[Path], top_k: int = 1) -> list[dict[str, Any]]:
        """The model's rows for these image files, in their order; see `serving.pyfunc`.

        Raises:
            BrokenError: the process died, or the model raised an error.
        """
        order = {"do": "predict", "paths": [str(path.absolute()) for path in paths], "top_k": top_k}
        return list(self._ask(order)["rows"])

    def prepare_to_classify(self) -> None:
        """Lets the process import what `classify` needs while this one does something else."""
        self._tell({"do": "prepare"})

    def open(self, folder: Path) -> dict[str, bool]:
        """Loads the classifier of a model that Pleat made, without MLflow, from the MLflow model's folder.

        Returns:
            Its targets, and whether each is multilabel.

        Raises:
            BrokenError: it does not load, or Pleat did not make it.
        """
        package = folder.absolute() / PACKAGE
        if not (package / "about.json").is_file():
            raise BrokenError("it was not made by Pleat")
        needed = [line for line in requirements_of(folder) if _requirement(line).name not in serving.REQUIRES]
        link_requirements(needed, self._links)
        return dict(self._ask({"do": "open", "package": str(package)})["targets"])

    def classify(self, paths: Sequence[Path], top_k: int, at_once: int) -> Iterator[list[Row]]:
        """Answers image files with the opened classifier, all of them side by side; no other order until the end.

        Args:
            paths: the files; their number may be large.
            top_k: how many labels of each target are listed.
            at_once: images whose rows come together.

        Yields:
            The next `at_once` rows in the order of the files: by target the most probable labels with probabilities,
            best first, and before them, of a multilabel target, the labels that apply; or text that says why the image
            has none.

        Raises:
            BrokenError: the process died, or the model raised an error.
        """
        with tempfile.NamedTemporaryFile("w", prefix="pleat-paths-", suffix=".txt") as listed:
            listed.writelines(f"{json.dumps(str(path.absolute()))}\n" for path in paths)
            listed.flush()
            self._tell({"do": "classify", "listed": listed.name, "top_k": top_k, "at_once": at_once})
            for _ in range(0, len(paths), at_once):
                yield self._hear()["rows"]

    def seconds(self, paths: Sequence[Path]) -> list[float]:
        """How long each image takes, asked for one by one, in seconds.

        Raises:
            BrokenError: as `answers`.
        """
        return list(self._ask({"do": "time", "paths": [str(path.absolute()) for path in paths]})["seconds"])

    def peak_memory_bytes(self) -> int:
        """The most memory that the process has had resident so far.

        Raises:
            BrokenError: the process died.
        """
        return int(self._ask({"do": "memory"})["n_bytes"])

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        self._tell(order)
        return self._hear()

    def _tell(self, order: dict[str, Any]) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        with suppress(BrokenPipeError):  # `_hear` says how it ended
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # nothing, or half an answer
            raise BrokenError(f"its process ended{self._last_words()}")
        answer = dict(json.loads(line))
        if "error" in answer:
            raise BrokenError(_short(answer["error"]))
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f" with status {status}" + (f" ({_short(lines[-1])})" if lines else "")


@contextmanager
def start(requirements: Sequence[str]) -> Iterator[Isolated]:
    """Starts the process; it ends with the block, or with this process.

    Args:
        requirements: lines of a requirements.txt; what they require themselves can be imported too. What a
            model needs beyond `serving.REQUIRES` is added when it is opened.

    Raises:
        BrokenError: a requirement is not installed here, or cannot be understood.
    """
    with tempfile.TemporaryDirectory(prefix="pleat-model-") as folder, tempfile.TemporaryFile() as errors:
        link_requirements(requirements, Path(folder))
        kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT)} | {"HOME": folder}
        process = subprocess.Popen(
            # -I and -S: neither this folder nor site-packages; the child adds the folder of links.
            [sys.executable, "-I", "-S", CHILD, folder, str(os.getpid())], text=True, env=kept,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        try:
            yield Isolated(process, errors, Path(folder))
        finally:
            process.kill()
            process.communicate()


def requirements_of(folder: Path) -> list[str]:
    """What an MLflow model says that it needs, from its requirements.txt.

    Raises:
        BrokenError: the file cannot be read.
    """
    try:
        return [line for line in (folder / "requirements.txt").read_text().splitlines() if line.strip()]
    except OSError as error:
        raise BrokenError(f"its requirements.txt cannot be read ({error.strerror})") from None


def classes_of(folder: Path) -> dict[str, list[str]]:
    """The classes of each target of a model that Pleat made, in the order of its outputs, from the model's folder."""
    return dict(json.loads((folder / PACKAGE / "about.json").read_text(encoding="utf-8"))["classes"])


def link_requirements(requirements: Sequence[str], folder: Path) -> None:
    """Fills `folder` with links to what the requirements, and theirs in turn, have installed here, of any version.

    Raises:
        BrokenError: one is not installed here, or cannot be understood.
    """
    stated = [_requirement(line) for line in requirements]
    waiting = [(item, "") for item in stated if item.marker is None or item.marker.evaluate()]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement, needed_by = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            needed = f", which {needed_by} needs," if needed_by else ""
            raise BrokenError(f"its requirement {requirement}{needed} is not installed here") from None
        _link(found, folder)
        for line in found.requires or []:
            inner = Requirement(line)
            extras = [*requirement.extras, ""]
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((inner, requirement.name))


def _requirement(line: str) -> Requirement:
    try:
        return Requirement(line)
    except InvalidRequirement:
        raise BrokenError(f"its requirement {line.strip()!r} cannot be understood") from None


def _link(found: Distribution, folder: Path) -> None:
    # Lines such as torch/nn/__init__.py,sha256=...,123; `found.files` would make ten thousand objects of torch's.
    files = [line.partition(",")[0] for line in (found.read_text("RECORD") or "").splitlines()]
    for top in {file.partition("/")[0] for file in files or map(str, found.files or [])} - {"", "..", "__pycache__"}:
        target = Path(str(found.locate_file(top)))
        if target.exists() and not (folder / top).exists():
            (folder / top).symlink_to(target)


def _short(text: str) -> str:
    return " ".join(text.split())[:SHOWN].rstrip(".")
