"""The child process of `isolated`: loads one model and answers orders, a line of JSON each.

Run as a script, without site-packages; the first argument is the folder of what may be imported, the second the parent.
"""

import gc
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
POLL_S = 0.5


def main() -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and that one ends this process
    sys.path.insert(0, sys.argv[1])
    threading.Thread(target=end_with, args=(int(sys.argv[2]),), daemon=True).start()
    model = Model()
    for line in sys.stdin:
        order = json.loads(line)
        for answer in answers_to(model, order):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def answers_to(model: "Model", order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What one order brings about: no answer, one, or many; an error is the last."""
    do = order.pop("do")
    try:
        if do == "classify":
            yield from model.classify(**order)
        elif do == "prepare":
            prepare()
        else:
            yield getattr(model, do)(**order)
    except Exception as raised:  # whatever a model raises is told to the parent
        error: BaseException = raised
        while error.__cause__:  # MLflow wraps what a model raises while it is loaded
            error = error.__cause__
        yield {"error": f"{type(error).__name__}: {error}"}


class Model:
    """The model; each method is an order."""

    pyfunc: Any  # as MLflow loads it
    classifier: Any  # of a model that Pleat made

    def load(self, folder: str) -> dict[str, Any]:
        """Loads the model as MLflow does."""
        import mlflow.pyfunc

        self.pyfunc = mlflow.pyfunc.load_model(folder)
        return {"load_s": time.monotonic() - STARTED}

    def predict(self, paths: list[str], top_k: int) -> dict[str, Any]:
        """The rows for these files."""
        import pandas as pd

        found = self.pyfunc.predict(pd.DataFrame({"image": paths}), params={"top_k": top_k})
        return {"rows": json.loads(found.to_json(orient="records", double_precision=15))}

    def time(self, paths: list[str]) -> dict[str, Any]:
        """How long each file takes, in seconds."""
        import pandas as pd

        return {"seconds": [self._seconds(pd.DataFrame({"image": [path]})) for path in paths]}

    def memory(self) -> dict[str, Any]:
        """The most memory that was resident so far."""
        with suppress(OSError):  # Linux, where ru_maxrss begins with what the parent had resident
            status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            return {"n_bytes": 1024 * int(status["VmHWM"].split()[0])}
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"n_bytes": kilobytes * (1 if sys.platform == "darwin" else 1024)}

    def open(self, package: str) -> dict[str, Any]:
        """Loads the classifier of a package alone, without MLflow and pandas."""
        (code,) = Path(package, "code").glob("*/classifier.py")
        sys.path.insert(0, str(code.parent.parent))
        module = importlib.import_module(f"{code.parent.name}.classifier")
        self.classifier = module.Classifier(Path(package))
        several = self.classifier.about.get("multilabel", [])
        return {"targets": {target: target in several for target in self.classifier.classes}}

    def classify(self, listed: str, top_k: int, at_once: int) -> Iterator[dict[str, Any]]:
        """The rows of the files that a file lists, `at_once` together."""
        with Path(listed).open() as lines:
            found = self.classifier.best((Path(json.loads(line)) for line in lines), top_k)
            rows = (row if isinstance(row, dict) else str(row) for row in found)
            while together := list(islice(rows, at_once)):
                yield {"rows": together}

    def _seconds(self, frame: Any) -> float:
        started = time.perf_counter()
        self.pyfunc.predict(frame)
        return time.perf_counter() - started


def prepare() -> None:
    """Imports what a classifier does; what fails here fails again when it is loaded, and is told then."""
    gc.disable()  # imports make many objects and hardly any garbage
    with suppress(Exception):
        for name in ("numpy", "onnxruntime", "torch", "PIL.Image"):
            importlib.import_module(name)
    gc.freeze()
    gc.enable()


def end_with(parent: int) -> None:
    """Ends this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


if __name__ == "__main__":
    main()
