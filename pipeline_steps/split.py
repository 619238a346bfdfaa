"""Stage `split`: what belongs to the permanent holdout, and the stratified folds of the rest."""

import hashlib
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, read_parquet, write_csv, write_parquet
from pipeline_steps.params import Holdout, Params, Split
from pipeline_steps.progress import say

COMPARISONS_A_CHUNK = 2**23  # of hashes, 8 bytes each
FOLD_COLUMNS = ["sample_id", "batch", "label", "group", "side", "fold"]
STRADDLING_COLUMNS = ["sample_id", "batch", "source_path", "label", "detail"]


def run(params: Params, root: Path = Path()) -> None:
    """Writes data/split/folds.parquet, data/split/straddling.parquet and reports/split (balance table and plot).

    Raises:
        PleatError: a class has fewer samples than there are folds, or there are fewer groups than folds.
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
    rows["fold"] = stratified_folds(rows, len(params.experiment.folds), params.experiment.seed)

    n_folds = len(params.experiment.folds)
    columns = {**{number: f"fold {number}" for number in range(n_folds)}, -1: "holdout"}
    balance = pd.crosstab(rows["label"], rows["fold"])
    balance = balance[[number for number in columns if number in balance]].rename(columns=columns)
    with atomic_folder(root / "reports" / "split") as reports, atomic_folder(root / "data" / "split") as out:
        write_parquet(out / "folds.parquet", rows[FOLD_COLUMNS])
        write_parquet(out / "straddling.parquet", left_out[STRADDLING_COLUMNS])
        write_csv(reports / "balance.csv", balance.reset_index())
        _plot(balance, reports / "balance.png")
    together = int((rows.groupby("group")["sample_id"].transform("size") > 1).sum())
    kind = f"one {params.split.group_by}, or near copies" if params.split.group_by else "near copies"
    say(
        f"split: {int((rows['side'] == 'holdout').sum()):,} samples in the holdout, "
        f"{int((rows['fold'] >= 0).sum()):,} in {len(params.experiment.folds)} folds; "
        f"{together:,} samples share a group ({kind}); {len(left_out):,} left out as near copies across the holdout"
    )


def assign_groups(manifest: pd.DataFrame, batches: list[str], split: Split) -> pd.DataFrame:
    """Finds what belongs together: near copies, and rows of one `group_by` value, directly or over several steps.

    Sides are given batch by batch and never depend on a later batch, so new data moves no sample across the holdout: a
    sample joins the side of the older ones it belongs to, otherwise its side follows from the name of the first sample
    (or `group_by` value) of what arrived together.

    Args:
        manifest: with sample_id (unique), batch, phash (16 hex digits) and the column `split.group_by`; rows of an
            older batch first.
        batches: in the order in which they were added.
        split: the `split` block of params.yaml.

    Returns:
        Columns `group` (str: what must stay in one fold, named after its first member), `side` ("train" or "holdout")
        and `straddling` (bool: belongs to older samples of both sides, so it must be left out).
    """
    keys = np.array(manifest["sample_id"], dtype=object)
    if split.group_by is not None:
        named = np.array(manifest[split.group_by].str.strip(), dtype=object)
        keys = np.where(named == "", keys, named)
    every_hash = np.array([int(value, 16) for value in manifest["phash"]], dtype=np.uint64)
    hashes, hash_of = np.unique(every_hash, return_inverse=True)
    near = _near_pairs(hashes, split.near_copy_max_distance)

    batch = manifest["batch"].to_numpy()
    arrivals = [np.flatnonzero(batch == name) for name in batches]
    holdout, straddling = _sides(arrivals, keys, hash_of, near, split.holdout)
    # Among what is kept, a later sample may join older groups of one side; folds are not permanent, so they follow.
    group = np.full(len(manifest), "", dtype=object)
    kept = np.flatnonzero(~straddling)
    for members in _components(keys[kept], hash_of[kept], near):
        group[kept[members]] = keys[kept[members[0]]]
    side = np.where(holdout, "holdout", "train")
    return pd.DataFrame({"group": group, "side": side, "straddling": straddling}, index=manifest.index)


def _sides(
    arrivals: list[np.ndarray], keys: np.ndarray, hash_of: np.ndarray, near: np.ndarray, settings: Holdout
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row lies in the holdout, and whether it belongs to older rows of both sides.

    `arrivals` are the rows of each batch, the oldest first; what a batch decides, no later one changes.
    """
    holdout = np.zeros(len(keys), dtype=bool)
    straddling = np.zeros(len(keys), dtype=bool)
    near_hashes: dict[int, list[int]] = defaultdict(list)
    for left, right in near.tolist():
        near_hashes[left].append(right)
        near_hashes[right].append(left)
    # What the older batches decided: the names of groups, from which the sides follow.
    of_key: dict[str, str] = {}
    of_hash: dict[int, set[str]] = {}
    for rows in arrivals:
        older: dict[int, set[str]] = {}
        for row in rows:
            hashes = (hash_of[row], *near_hashes.get(hash_of[row], ()))
            names = set().union(*(of_hash.get(number, ()) for number in hashes))
            older[row] = names | {of_key[keys[row]]} if keys[row] in of_key else names
        arrived = [rows[members] for members in _components(keys[rows], hash_of[rows], near)]
        chosen = [min(set().union(*(older[row] for row in members)), default=keys[members[0]]) for members in arrived]
        for members, name in zip(arrived, chosen, strict=True):
            holdout[members] = in_holdout(name, settings)
            for row in members:
                straddling[row] = any(in_holdout(other, settings) != holdout[row] for other in older[row])
        for members, name in zip(arrived, chosen, strict=True):
            for row in members:
                of_key.setdefault(keys[row], name)
                if not straddling[row]:
                    of_hash.setdefault(hash_of[row], set()).add(name)
    return holdout, straddling


def in_holdout(group: str, holdout: Holdout) -> bool:
    """Whether a group belongs to the holdout: its salted SHA-256, read as a fraction of 1, lies below the limit."""
    digest = hashlib.sha256(f"{holdout.salt}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < holdout.fraction


def stratified_folds(rows: pd.DataFrame, n_folds: int, seed: int) -> pd.Series:
    """Fold number a row (-1 in the holdout); classes spread evenly, groups kept whole.

    Raises:
        PleatError: a class has fewer samples than folds, or there are fewer groups than folds.
    """
    fold = pd.Series(-1, index=rows.index)
    train = rows[rows["side"] == "train"]
    sizes = train["label"].value_counts().reindex(sorted(set(rows["label"])), fill_value=0)
    small = sizes[sizes < n_folds]
    if len(small):
        found = ", ".join(f"class '{label}' has {n}" for label, n in small.items())
        raise PleatError(
            f"Too few samples outside the holdout for {n_folds} folds: {found}. Drop such a class (labels.drop), "
            "merge it into another one (labels.merge), or use fewer folds (experiment.folds)."
        )
    n_groups = train["group"].nunique()
    if n_groups < n_folds:
        raise PleatError(
            f"The samples outside the holdout form {n_groups} groups, fewer than the {n_folds} folds. "
            "Use fewer folds (experiment.folds), or do not keep groups whole (split.group_by: null)."
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


def _near_pairs(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """Pairs (n, 2) of positions in `hashes`, distinct uint64, that differ in at most `max_distance` bits."""
    pairs = [np.empty((0, 2), dtype=np.int64)]
    step = max(1, COMPARISONS_A_CHUNK // max(1, len(hashes)))
    for start in range(0, len(hashes), step):
        distance = np.bitwise_count(hashes[start : start + step, None] ^ hashes[None, start:])
        left, right = np.nonzero(np.triu(distance <= max_distance, k=1))
        pairs.append(np.column_stack([left, right]) + start)
    return np.concatenate(pairs)


def _components(keys: np.ndarray, hash_of: np.ndarray, near: np.ndarray) -> list[np.ndarray]:
    """Rows that share a key or whose hashes are the same or near, directly or over several steps; each sorted."""
    if not len(keys):
        return []
    n_rows = len(keys)
    _, key_of = np.unique(keys, return_inverse=True)
    present, hash_of = np.unique(hash_of, return_inverse=True)
    near = np.searchsorted(present, near[np.isin(near, present).all(axis=1)])
    # One graph of rows, hashes and keys: each row is joined to its hash and its key, near hashes to each other.
    first_key = n_rows + len(present)
    rows = np.arange(n_rows)
    left = np.concatenate([rows, rows, n_rows + near[:, 0]])
    right = np.concatenate([n_rows + hash_of, first_key + key_of, n_rows + near[:, 1]])
    n_nodes = first_key + int(key_of.max()) + 1
    graph = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(n_nodes, n_nodes))
    number = connected_components(graph, directed=False)[1][:n_rows]
    order = np.argsort(number, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(number[order])) + 1)


def _plot(balance: pd.DataFrame, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    balance = balance.loc[balance.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    share = balance.div(balance.sum(axis=1), axis=0)
    figure, axes = plt.subplots(figsize=(10, 0.34 * len(balance) + 1.5), layout="constrained")
    left = np.zeros(len(share))
    for number, column in enumerate(share):
        colour = "#d8dee4" if column == "holdout" else ("#9ecae1", "#c6dbef")[number % 2]
        bars = axes.barh(range(len(share)), share[column], left=left, color=colour, edgecolor="white", height=0.82)
        axes.bar_label(bars, [f"{n:,}" for n in balance[column]], label_type="center", fontsize=8, color="#1f2328")
        left += share[column].to_numpy()
    # Where the borders would lie if every class were spread like all samples together.
    overall = balance.sum() / balance.to_numpy().sum()
    borders = overall.cumsum()
    for border in borders[:-1]:
        axes.axvline(border, color="#0072b2", linewidth=1, linestyle=(0, (4, 3)))
    top = axes.secondary_xaxis("top")
    top.set_xticks(borders - overall / 2, [f"{name}\n{n:,}" for name, n in balance.sum().items()])
    top.tick_params(length=0)
    names = [f"{label}  {n:,}" for label, n in balance.sum(axis=1).items()]
    axes.set_yticks(range(len(share)), names, parse_math=False)  # a label may hold a $
    axes.tick_params(length=0)
    axes.set(xlim=(0, 1), xticks=[], ylim=(len(share) - 0.4, -0.6))
    where = "folds and holdout" if "holdout" in balance else "folds"
    axes.set_title(f"Samples of each class by {where}; dashed: all classes together", pad=12)
    for side in (*axes.spines.values(), *top.spines.values()):
        side.set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
