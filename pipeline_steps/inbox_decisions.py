"""What was decided about deliveries, in small files: written before anything is done, kept until somebody was told."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pipeline_steps.files import read_json, write_json

Outcome = Literal["added", "set aside", "nothing new", "waiting"]
STATE = Path(".pleat/inbox")  # what is known about the inbox, in the project's folder


@dataclass(frozen=True)
class Decision:
    """What is to be done about a delivery.

    Attributes:
        delivery: its name in the inbox.
        source: the inbox, as `inbox.source` names it.
        files: what it looked like, as in `Delivery`.
        outcome: never "waiting".
        batch: the name that it has or would have as a batch.
        decided_at: seconds since 1970.
        reasons: sentences.
        message: of the commit; "" where nothing is added.
        report: the page on it, within the project's folder.
        data_version: of all batches after it; None until all is done.
    """

    delivery: str
    source: str
    files: dict[str, str]
    outcome: Outcome
    batch: str
    decided_at: float
    reasons: list[str] = field(default_factory=list)
    message: str = ""
    report: str | None = None
    data_version: str | None = None

    def path(self, root: Path) -> Path:
        """The file that holds it."""
        return root / STATE / "decisions" / f"{self.batch}-{self.outcome.replace(' ', '_')}.json"

    def write(self, root: Path) -> None:
        """Writes it, atomically."""
        write_json(self.path(root), asdict(self))


def decisions(root: Path) -> list[Decision]:
    """All of them, the oldest first."""
    found = [Decision(**read_json(path)) for path in (root / STATE / "decisions").glob("[!.]*.json")]
    return sorted(found, key=lambda decision: decision.decided_at)
