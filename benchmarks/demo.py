"""`make demo` after set-up: `dvc repro` on the embedded sample in a fresh clone.

Run with `python benchmarks/demo.py`; takes one to three minutes.
"""

from clone import fresh_clone, print_stages
from measure import on_this_machine, verdict

SECONDS = 180


def main() -> None:
    with on_this_machine("Demo: `dvc repro` on the sample"), fresh_clone() as clone:
        run = clone.run("dvc", "repro")
        print(f"\n`dvc repro`: {run.seconds:.1f} s, peak memory {run.peak_bytes / 2**30:.2f} GiB; of these")
        print_stages(run)
        print("\nTarget on 2 cores:")
        print(verdict("seconds for the sample", run.seconds, "<=", SECONDS, " s"))


if __name__ == "__main__":
    main()
