"""Stage `split`: what belongs to the permanent holdout, and the stratified folds of the rest."""

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, read_parquet, write_csv, write_parquet
from pipeline_steps.params import Holdout, Params, Split
from pipeline_steps.progress import say

HASHES_A_CHUNK = 1024
FOLD_COLUMNS = ["sample_id", "batch", "label", "group", "side", "fold"]


def run(params: Params, root: Path = Path()) -> None:
    """Writes data/split/folds.parquet, data/split/straddling.parquet and reports/split (balance table and plot).

    Raises:
        PleatError: a class has fewer samples than there are folds.
    """
    manifest = read_parquet(root / "data" / "validate" / "manifest.parquet")
    # Groups come from all ingested samples, so that dropping a label later moves no other sample across the holdout.
    batches = params.experiment.batches
    ingested = pd.concat([read_parquet(root / "data" / "ingest" / batch / "manifest.parquet") for batch in batches])
    ingested = ingested.drop_duplicates("sample_id").reset_index(drop=True)
    groups = assign_groups(ingested, batches, params.split).set_axis(ingested["sample_id"])

    manifest = manifest.join(groups, on="sample_id")
    straddling = manifest["straddling"]
    left_out = manifest[straddling].assign(detail="near copy of samples on both sides of the holdout")
    rows = manifest[~straddling].reset_index(drop=True)
    rows["side"] = np.where(holdout_side(rows["group"], params.split.holdout), "holdout", "train")
    rows["fold"] = stratified_folds(rows, len(params.experiment.folds), params.experiment.seed)

    balance = pd.crosstab(rows["label"], rows["fold"].map(lambda fold: "holdout" if fold < 0 else f"fold {fold}"))
    with atomic_folder(root / "reports" / "split") as reports, atomic_folder(root / "data" / "split") as out:
        write_parquet(out / "folds.parquet", rows[FOLD_COLUMNS])
        write_parquet(out / "straddling.parquet", left_out[["sample_id", "batch", "source_path", "label", "detail"]])
        write_csv(reports / "balance.csv", balance.reset_index())
        _plot(balance, reports / "balance.png")
    near = int((rows.groupby("group")["sample_id"].transform("size") > 1).sum())
    kind = f"by {params.split.group_by}" if params.split.group_by else "near copies"
    say(
        f"split: {int((rows['side'] == 'holdout').sum()):,} samples in the holdout, "
        f"{int((rows['fold'] >= 0).sum()):,} in {len(params.experiment.folds)} folds; "
        f"{near:,} samples share a group ({kind}); {len(left_out)} left out as near copies across the holdout"
    )


def assign_groups(manifest: pd.DataFrame, batches: list[str], split: Split) -> pd.DataFrame:
    """Gives each sample the name of its group; near copies, and rows of one `group_by` value, share a group.

    Groups grow batch by batch and an older sample never changes its group, so a batch that comes later cannot move a
    sample across the holdout. A group is named after its first member.

    Args:
        manifest: with sample_id (unique), batch, phash (16 hex digits) and the column `split.group_by`.
        batches: in the order in which they were added.
        split: the `split` block of params.yaml.

    Returns:
        Columns `group` (str) and `straddling` (bool: tied to samples on both sides, so it must be left out).
    """
    keys = np.array(manifest["sample_id"], dtype=object)
    if split.group_by is not None:
        named = np.array(manifest[split.group_by], dtype=object)
        keys = np.where(named == "", keys, named)
    links = _links(keys, _near_pairs(manifest["phash"], split.near_copy_max_distance))
    batch = manifest["batch"].to_numpy()
    group = np.full(len(manifest), "", dtype=object)
    straddling = np.zeros(len(manifest), dtype=bool)
    for name in batches:
        for component in _components(links, batch == name):
            touched = {group[other] for row in component for other in links[row] if group[other]}
            straddling[component] = len({in_holdout(other, split.holdout) for other in touched}) > 1
            group[component] = min(touched) if touched else keys[component[0]]
    return pd.DataFrame({"group": group, "straddling": straddling}, index=manifest.index)


def in_holdout(group: str, holdout: Holdout) -> bool:
    """Whether a group belongs to the holdout: its salted SHA-256, read as a fraction of 1, lies below the limit."""
    digest = hashlib.sha256(f"{holdout.salt}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < holdout.fraction


def holdout_side(groups: pd.Series, holdout: Holdout) -> pd.Series:
    """`in_holdout` for each row."""
    sides = {group: in_holdout(group, holdout) for group in groups.unique()}
    return groups.map(sides).astype(bool)


def stratified_folds(rows: pd.DataFrame, n_folds: int, seed: int) -> pd.Series:
    """Fold number a row (-1 in the holdout); classes spread evenly, groups kept whole.

    Raises:
        PleatError: a class has fewer samples than folds.
    """
    fold = pd.Series(-1, index=rows.index)
    train = rows[rows["side"] == "train"]
    sizes = train["label"].value_counts()
    for label in sorted(set(rows["label"])):
        if sizes.get(label, 0) < n_folds:
            raise PleatError(
                f"Class '{label}' has {sizes.get(label, 0)} samples outside the holdout, fewer than the {n_folds} folds. "
                f"Drop it (labels.drop), merge it into another class (labels.merge), "
                "or use fewer folds (experiment.folds)."
            )
    groups_a_class = train.groupby("label")["group"].nunique()
    for label, count in groups_a_class[groups_a_class < n_folds].items():
        say(f"split: warning: class '{label}' comes from {count} groups only, so some folds will not hold it")
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said above, with the class's name
        for number, (_, scored) in enumerate(splitter.split(train, train["label"], train["group"])):
            fold.loc[train.index[scored]] = number
    return fold


def _near_pairs(phash: pd.Series, max_distance: int) -> list[tuple[int, int]]:
    """Pairs of rows whose 64-bit perceptual hashes differ in at most `max_distance` bits."""
    hashes = np.array([int(value, 16) for value in phash], dtype=np.uint64)
    pairs = []
    for start in range(0, len(hashes), HASHES_A_CHUNK):
        chunk = hashes[start : start + HASHES_A_CHUNK, None]
        left, right = np.nonzero(np.bitwise_count(chunk ^ hashes[None, start:]) <= max_distance)
        pairs += [(int(a) + start, int(b) + start) for a, b in zip(left, right, strict=True) if a < b]
    return pairs


def _links(keys: np.ndarray, pairs: list[tuple[int, int]]) -> list[set[int]]:
    """Neighbours of each row: its near copies, and the first row with the same key."""
    links: list[set[int]] = [set() for _ in keys]
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        pairs.append((first.setdefault(key, row), row))
    for left, right in pairs:
        if left != right:
            links[left].add(right)
            links[right].add(left)
    return links


def _components(links: list[set[int]], member: np.ndarray) -> list[list[int]]:
    """Connected components among the rows where `member` holds, each sorted, in the order of their first rows."""
    seen = ~member
    components = []
    for start in np.flatnonzero(member):
        if seen[start]:
            continue
        seen[start] = True
        component, stack = [], [int(start)]
        while stack:
            row = stack.pop()
            component.append(row)
            fresh = [other for other in links[row] if not seen[other]]
            seen[fresh] = True
            stack += fresh
        components.append(sorted(component))
    return components


def _plot(balance: pd.DataFrame, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    share = balance.div(balance.sum(axis=1), axis=0)
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(balance) + 1.6), layout="constrained")
    left = np.zeros(len(share))
    for column, colour in zip(share, plt.get_cmap("cividis")(np.linspace(0.1, 0.95, share.shape[1])), strict=True):
        axes.barh(range(len(share)), share[column], left=left, color=colour, label=column, height=0.75)
        left += share[column].to_numpy()
    axes.set_yticks(range(len(share)), [f"{label}  ({n:,})" for label, n in balance.sum(axis=1).items()])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the class's samples", title="How each class is spread over folds and holdout")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
