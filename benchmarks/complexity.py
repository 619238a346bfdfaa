"""What `pleat profile` takes: the layers of ConvNeXt-L, and the command for ConvNeXt-T from start to end.

Run with `python benchmarks/complexity.py`; takes two minutes.
"""

import os
import subprocess
import sys
import tempfile
import time

from measure import REPOSITORY, on_this_machine, verdict

from pipeline_steps.complexity import layers
from pipeline_steps.complexity.subject import of_timm
from pipeline_steps.complexity.trace import trace

COUNT_S, PROFILE_S, LATENCY_S = 2, 10, 60
PLEAT = [sys.executable, "-c", "from pipeline_steps.cli import main; main()", "profile", "convnext_tiny"]


def main() -> None:
    with on_this_machine("Complexity: `pleat profile`"), tempfile.TemporaryDirectory() as folder:
        subject = of_timm("convnext_large")
        started = time.perf_counter()
        layers.table(trace(subject.build, subject.shape))
        counted_s = time.perf_counter() - started
        seconds = []
        for more in ([], ["--latency"]):
            started = time.perf_counter()
            environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
            subprocess.run([*PLEAT, *more], cwd=folder, check=True, stdout=subprocess.DEVNULL, env=environment)
            seconds.append(time.perf_counter() - started)
        print("\nTargets on 2 cores:")
        print(verdict("layers of convnext_large", counted_s, "<=", COUNT_S, " s"))
        print(verdict("pleat profile convnext_tiny", seconds[0], "<=", PROFILE_S, " s"))
        print(verdict("the same with --latency", seconds[1], "<=", LATENCY_S, " s"))


if __name__ == "__main__":
    main()
