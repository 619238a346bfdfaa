"""Single images out of the packed files that `ingest` writes."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline_steps.errors import PleatError


def read_images(path: Path, sample_ids: list[str]) -> dict[str, bytes]:
    """The encoded images of an images.arrow, by sample_id; those that it does not hold are left out.

    Raises:
        PleatError: the file is absent, so the stage `ingest` has not run.
    """
    if not path.exists():
        raise PleatError(f"{path} is missing: the stage that writes it has not run; run `dvc repro`.")
    # Memory-mapped, so of a file of gigabytes only the ids and the few images asked for are read.
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
        rows = pc.index_in(pa.array(sample_ids, pa.string()), table["sample_id"].combine_chunks())
        found = zip(sample_ids, rows.to_pylist(), strict=True)
        return {sample_id: table["bytes"][row].as_py() for sample_id, row in found if row is not None}
