"""Stage `split`: what belongs to the permanent holdout, and the folds of the rest: stratified, or as given."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline_steps import balance, targets
from pipeline_steps.errors import PleatError
from pipeline_steps.files import atomic_folder, read_parquet, write_parquet
from pipeline_steps.params import Holdout, Params, Split
from pipeline_steps.progress import say
from pipeline_steps.stratify import class_sizes, stratified_folds
from pipeline_steps.targets import Target

COMPARISONS_A_CHUNK = 2**23  # of hashes, 8 bytes each
HOLDOUT, VAL, TRAIN = -1, 0, 1  # fold numbers; the last two are the data set's own lists
# Why a sample is left out.
ACROSS_HOLDOUT = "near copy of samples on both sides of the holdout"
BESIDE_VAL = "on the train list, but in one group with samples of the val list"


def run(params: Params, root: Path = Path()) -> None:
    """Writes data/split/folds.parquet, data/split/straddling.parquet and reports/split (balance table and plot).

    folds.parquet has columns sample_id, batch, the targets' label columns, group, side ("train" or "holdout") and fold
    (-1 in the holdout). With `split.given` fold 0 is the val list, and fold 1 the train list, which is never scored.

    Raises:
        PleatError: a class has too few samples, there are fewer groups than folds, or `split.given` is set but samples
            are on none of the lists.
    """
    manifest = read_parquet(root / "data" / "validate" / "manifest.parquet")
    # Groups come from all ingested samples, so that dropping a label later moves no other sample across the holdout.
    batches, folds = params.experiment.batches, params.experiment.folds
    ingested = pd.concat([read_parquet(root / "data" / "ingest" / batch / "manifest.parquet") for batch in batches])
    ingested = ingested.drop_duplicates("sample_id").reset_index(drop=True)
    groups = assign_groups(ingested, batches, params.split).set_axis(ingested["sample_id"])

    rows = manifest.join(groups, on="sample_id")
    left_out = rows[rows["straddling"]].assign(detail=ACROSS_HOLDOUT)
    rows = rows[~rows["straddling"]].reset_index(drop=True)
    if params.split.given:
        check_lists(manifest)
        beside = beside_val(rows)
        left_out = pd.concat([left_out, rows[beside].assign(detail=BESIDE_VAL)])
        rows = rows[~beside].reset_index(drop=True)
    found = targets.of(params.targets, rows)
    if params.split.given:
        rows["fold"] = given_folds(rows, found)
        parts = {VAL: "val", TRAIN: "train", HOLDOUT: "holdout"}
    else:
        rows["fold"] = stratified_folds(rows, found, len(folds), params.experiment.seed)
        parts = {number: f"fold {number}" for number in folds} | {HOLDOUT: "holdout"}

    counts = balance.table(rows, found, parts)
    scored = [parts[number] for number in folds]
    for (target, label), row in zip(counts.index, counts[scored].to_numpy(), strict=True):
        if lacking := ", ".join(part for part, n in zip(scored, row, strict=True) if n == 0):
            say(f"split: warning: no sample of class '{label}' of target {target} in {lacking}, so no score there")
    labels = targets.label_columns(params.targets)
    with atomic_folder(root / "reports" / "split") as reports, atomic_folder(root / "data" / "split") as out:
        write_parquet(out / "folds.parquet", rows[["sample_id", "batch", *labels, "group", "side", "fold"]])
        write_parquet(out / "straddling.parquet", left_out[["sample_id", "batch", "source_path", *labels, "detail"]])
        balance.write(reports, counts, rows["fold"].map(parts).value_counts()[counts.columns])
    _report(params, rows, left_out)


def check_lists(manifest: pd.DataFrame) -> None:
    """Refuses samples without a place in the data set's own lists.

    Raises:
        PleatError: there are such samples.
    """
    unlisted = manifest["batch"][~manifest["given"].isin(["val", "train"])]
    if len(unlisted):
        raise PleatError(
            f"split.given is true, but {len(unlisted):,} samples are on neither a train nor a val list, the first in "
            f"batch '{unlisted.iloc[0]}'. Batches with and without such lists cannot be mixed: take such a batch off "
            "experiment.batches, or set split.given: false and experiment.folds to at least 2."
        )


def beside_val(rows: pd.DataFrame) -> pd.Series:
    """Whether each row is of the train list but shares its group with rows of the val list, outside the holdout.

    These are left out, and not those of the val list, so that scores on it can be compared with others' scores.
    """
    scored = rows["group"][(rows["given"] == "val") & (rows["side"] == "train")]
    return (rows["given"] == "train") & rows["group"].isin(scored)


def given_folds(rows: pd.DataFrame, found: Sequence[Target]) -> pd.Series:
    """Fold number a row by the data set's own lists: 0 is val, 1 is train, -1 the holdout.

    Raises:
        PleatError: no sample is left to score, or none of a class to learn from.
    """
    fold = rows["given"].map({"val": VAL, "train": TRAIN}).where(rows["side"] == "train", HOLDOUT)
    if not (fold == VAL).any():
        raise PleatError(
            "split.given is true, but no sample of a val list lies outside the holdout; "
            "set split.given: false and experiment.folds to at least 2."
        )
    unknown = [name for name, n in class_sizes(found, rows[fold == TRAIN]).items() if n == 0]
    if unknown:
        raise PleatError(
            f"The train list holds no sample outside the holdout of {', '.join(unknown)}. Drop such a class "
            "(labels.drop), or merge it into another one (labels.merge)."
        )
    return fold


def _report(params: Params, rows: pd.DataFrame, left_out: pd.DataFrame) -> None:
    in_part, reasons = rows["fold"].value_counts(), left_out["detail"].value_counts()
    where = f"{int((rows['fold'] >= 0).sum()):,} in {len(params.experiment.folds)} folds"
    why = f"{reasons.get(ACROSS_HOLDOUT, 0):,} left out as near copies across the holdout"
    if params.split.given:
        where = f"{in_part[VAL]:,} of the val list and {in_part[TRAIN]:,} of the train list outside it"
        why += f", {reasons.get(BESIDE_VAL, 0):,} of the train list because their group has samples of the val list"
    together = int((rows.groupby("group")["sample_id"].transform("size") > 1).sum())
    kind = f"one {params.split.group_by}, or near copies" if params.split.group_by else "near copies"
    say(
        f"split: {in_part.get(HOLDOUT, 0):,} samples in the holdout, {where}; "
        f"{together:,} samples share a group ({kind}); {why}"
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
