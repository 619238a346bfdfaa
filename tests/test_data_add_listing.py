"""A batch's name put into params.yaml by `pleat data add`, with not one other character changed."""

from pathlib import Path

import pytest

from pipeline_steps import data_add, params

SAMPLE = Path(__file__).parent.parent / "recipes" / "sample.yaml"


@pytest.mark.parametrize(
    ("written", "name", "expected"),
    [
        ("[sample]", "new", "[sample, new]"),
        ("[ sample , 'x' ]   # why", "new", "[ sample , 'x', new ]  # why"),
        ("[sample] # why", "new", "[sample, new] # why"),
        ("[sample]      # why", "new", "[sample, new]  # why"),
        ("[sample]           # why", "new", "[sample, new]      # why"),
        ("[\n    sample,   # one\n    x,\n  ]", "new", "[\n    sample,   # one\n    x, new,\n  ]"),
        ("\n    - sample   # one\n    - x   # two\n", "new", "\n    - sample   # one\n    - x   # two\n    - new\n"),
        ("\n  - sample\n\n  # below", "new", "\n  - sample\n  - new\n\n  # below"),
        ("[sample]", "2024", '[sample, "2024"]'),
        ("[sample]", "1e5", '[sample, "1e5"]'),
        ("[sample]", "null", '[sample, "null"]'),
        ("[sample]", "v1.2", "[sample, v1.2]"),
        ("[sample, new]", "new", "[sample, new]"),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_name_is_listed_without_touching_anything_else(
    tmp_path: Path, written: str, name: str, expected: str, newline: str
) -> None:
    text = SAMPLE.read_text()
    line = next(line for line in text.splitlines() if line.startswith("  batches:"))
    # Odd but valid: none of this may be tidied up.
    text = text.replace("  seed: 17", "  seed:   0x11\n\n\n").replace("group_by: null ", "group_by: ~ ")
    path = tmp_path / "params.yaml"
    path.write_bytes(text.replace(line, f"  batches: {written}").replace("\n", newline).encode())
    after = text.replace(line, f"  batches: {expected}").replace("\n", newline)
    assert data_add._listed(path, name).decode() == after
    path.write_text(after)
    assert name in params.load(path).experiment.batches
