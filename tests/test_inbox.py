"""What arrives becomes one batch or is set aside: whole looks at real projects, and kills at every step of one."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import REPOSITORY, content, names
from inbox_help import N_TRAINING, batches, change, dark, dvc, git, images, put, settings, summary, take

from pipeline_steps import deliveries, inbox, params, versions
from pipeline_steps.deliveries import FolderInbox
from pipeline_steps.errors import PleatError

pytest_plugins = ["inbox_project"]


def untouched(root: Path) -> dict[str, bytes]:
    """All that must stay as it is when nothing becomes a batch."""
    kept = {"params.yaml": (root / "params.yaml").read_bytes(), "HEAD": git(root, "log", "--all").encode()}
    return kept | content(root / "data" / "raw") | {"status": git(root, "status", "--porcelain").encode()}


def test_one_look_at_everything_that_may_arrive(shop: Path) -> None:
    arrived = shop / "data" / "inbox"
    new = images(100, 12)
    put(
        arrived / "a good",
        new | images(0, 3) | {"Hat/twice.jpg": new["Shoes/100.jpg"], "Hat/102b.jpg": new["Hat/102.jpg"]},
    )
    with zipfile.ZipFile(arrived / "b again.zip", "w") as archive:
        for name, data in (new | images(3, 2)).items():
            archive.writestr(f"top/{name}", data)
    put(arrived / "c dark", images(200, 12, dark))
    put(arrived / "d hats", {name.replace("Shoes/", "hat/"): data for name, data in images(300, 12).items()})
    (arrived / "e broken.zip").write_bytes(b"PK\3\4 this is no archive")
    (arrived / "f note.txt").write_text("hello")
    put(arrived / "g short", {f"Hat/{n}.jpg": data[: len(data) // 3] for n, data in enumerate(images(400, 3).values())})
    put(arrived / "h writing", images(500, 2) | {"Hat/x.jpg.part": b"x"})
    (arrived / "i empty").mkdir()
    for name in (".DS_Store", "j.zip.part", "k.crdownload", ".rsync-partial"):
        (arrived / name).write_bytes(b"x")

    found = {one.delivery: one for one in take(shop)}
    assert {name: one.outcome for name, one in found.items()} == {
        "a good": "added",
        "b again.zip": "nothing new",
        "c dark": "set aside",
        "d hats": "set aside",
        "e broken.zip": "set aside",
        "f note.txt": "set aside",
        "g short": "set aside",
        "h writing": "waiting",
        "i empty": "waiting",
    }
    good = found["a good"]
    assert good.batch is not None
    assert good.reasons == [
        "Images left out, since a batch holds them already: 3.",
        "Images left out, since they came more than once (one of each was kept): 1.",
    ]
    # "twice" has the bytes of another label's image: `validate` will put both into the quarantine, not this.
    assert content(shop / "data" / "raw" / good.batch).keys() == {*new, "Hat/twice.jpg"}
    assert batches(shop) == ["old", good.batch]
    assert good.data_version == versions.data_version(["old", good.batch], shop)
    assert good.data_version.startswith("old=")
    assert f",{good.batch}=" in good.data_version
    assert "unversioned" not in good.data_version
    assert found["b again.zip"].reasons == ["All of its 14 images are in a batch already."]
    assert "brightness (mean luma, 0 to 1) differ by" in found["c dark"].reasons[0]
    assert "'hat' (4 images, nearest is 'Hat')" in found["d hats"].reasons[0]
    assert found["e broken.zip"].reasons[0].startswith("e broken.zip is damaged, incomplete or not the archive")
    assert found["f note.txt"].reasons[0].startswith("f note.txt is neither a folder nor an archive (.zip, .tar, ")
    assert "Not one image of g short could be used" in found["g short"].reasons[0]
    assert "Hat/x.jpg.part has the name of a file that is still being written" in found["h writing"].reasons[0]
    for one in found.values():
        assert ".pleat" not in " ".join(one.reasons)
        assert (one.report is not None) == (one.outcome in ("added", "set aside"))

    assert names(arrived) == [".DS_Store", ".rsync-partial", "h writing", "i empty", "j.zip.part", "k.crdownload"]
    aside = {one.parent.name: one for one in (shop / "data" / "inbox_set_aside").glob("*/reasons.txt")}
    assert len(aside) == 5
    [of_dark] = [path for name, path in aside.items() if name.startswith("inbox_c_dark_")]
    assert of_dark.read_text().splitlines() == found["c dark"].reasons
    assert content(of_dark.parent / "c dark") == images(200, 12, dark)
    page = (of_dark.parent / "index.html").read_text()
    assert page == (shop / str(found["c dark"].report)).read_text()
    assert "Set aside" in page
    assert [word for word in ("<script", "http://", "https://") if word in page] == []
    done = sorted(
        path.parent.name[:12] for path in (shop / "data" / "inbox_done").glob("*/*") if path.name != "index.html"
    )
    assert done == ["inbox_a_good", "inbox_b_agai"]

    after = summary(shop)
    assert after["tags"] == [f"data/{good.batch}"]
    assert after["commits"] == [f"Add batch {good.batch} from the inbox", "start"]
    assert after["changed"] == ""
    assert git(shop, "show", "--name-only", "--format=", "HEAD").split() == [
        f"data/raw/{good.batch}.dvc",
        "params.yaml",
    ]
    assert git(shop, "log", "-1", "--format=%an <%ae>") == "Pleat <pleat@localhost>"
    assert len(after["remote"]) == 12 + 1  # each image once, "twice" being one of them, and the list of them

    # Until somebody has announced it, it is told again; what waits is looked at again.
    assert {one.delivery: one for one in take(shop)} == found
    inbox.acknowledge(list(found.values()), shop)
    assert [one.delivery for one in take(shop)] == ["h writing", "i empty"]
    # The same delivery on another day, its neighbours' files in another order.
    put(arrived / "a good", new | images(0, 3))
    assert [one.outcome for one in take(shop)] == ["nothing new", "waiting", "waiting"]
    assert summary(shop) == after


def test_what_changes_is_not_taken(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(shop / "data" / "inbox" / "new", images(100, 6))
    before = untouched(shop)
    change(shop, {"inbox.settle_s": 60})
    [waits] = take(shop)
    assert waits.outcome == "waiting"
    assert "is taken after 60 s without a change" in waits.reasons[0]
    # Copied with its old times, as `cp -a` and unzip do: it has lain here for a moment only.
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    assert [one.outcome for one in take(shop)] == ["waiting"]
    [seen] = inbox.waiting(settings(shop), shop)
    assert (seen.name, seen.n_files(), seen.n_bytes) == ("new", 6, sum(map(len, images(100, 6).values())))

    change(shop, {})
    true = FolderInbox.fetch

    def fetch_while_written(self: FolderInbox, delivery: deliveries.Delivery, target: Path) -> None:
        true(self, delivery, target)
        (folder / "Hat" / "late.jpg").write_bytes(b"late")

    monkeypatch.setattr(FolderInbox, "fetch", fetch_while_written)
    [waits] = take(shop)
    assert (waits.outcome, waits.reasons) == ("waiting", ["It changed while it was copied."])
    monkeypatch.setattr(FolderInbox, "fetch", lambda *_: (folder / "Hat" / "late.jpg").unlink() or Path("gone").stat())
    assert [one.outcome for one in take(shop)] == ["waiting"]
    assert {**untouched(shop), "params.yaml": b""} == {
        **before,
        "params.yaml": b"",
        "status": untouched(shop)["status"],
    }
    assert names(shop / "data" / "inbox") == ["new"]


def test_settled_by_the_clock(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(shop / "data" / "inbox" / "new", images(100, 2))
    now = deliveries.time.time()
    monkeypatch.setattr(deliveries.time, "time", lambda: now + 59)
    [seen] = inbox.waiting(settings(shop), shop)
    assert seen.wait(60).endswith("is taken after 60 s without a change.")
    monkeypatch.setattr(deliveries.time, "time", lambda: now + 61)
    [seen] = inbox.waiting(settings(shop), shop)
    assert seen.wait(60) == ""


def test_a_rule_on_rows_looks_at_the_delivery_and_one_on_the_table_at_all(shop: Path) -> None:
    """Two images of one label are fine beside the old ones, though not alone; a rule on rows is not diluted by them."""
    put(shop / "data" / "inbox" / "few", {"Hat/a.jpg": images(102, 1)["Hat/102.jpg"]})
    before = untouched(shop)
    suite = shop / "data" / "expectations" / "manifest.yaml"
    usual = suite.read_text()
    suite.write_text(
        f"{usual}\n- {{expect: expect_column_values_to_be_between, column: width, min_value: 500, mostly: 0.01, "
        "severity: critical, why: images are wide, advice: Send wider ones.}\n"
    )
    [refused] = take(shop)
    assert refused.outcome == "set aside"
    assert "images are wide; found 1 of 1 rows that break it" in refused.reasons[0]
    suite.write_text(usual)
    assert untouched(shop) == before
    put(shop / "data" / "inbox" / "few", {"Hat/a.jpg": images(102, 1)["Hat/102.jpg"]})
    inbox.acknowledge([refused], shop)
    change(shop, {"inbox.max_drift.image_statistics": 1.0})
    assert [one.outcome for one in take(shop)] == ["added"]


def test_new_labels_where_they_are_allowed_and_no_training_data_yet(shop: Path) -> None:
    put(shop / "data" / "inbox" / "coats", {f"Coat/{name[-7:]}": data for name, data in images(100, 4).items()})
    change(shop, {"inbox.max_drift.new_labels": True, "inbox.max_drift.label_shares": 1.0})
    shutil.rmtree(shop / "data" / "ingest")
    shutil.rmtree(shop / "data" / "raw" / "old")
    shutil.rmtree(shop / ".dvc" / "cache", ignore_errors=True)
    # Which images the old batch holds is then in no place at all.
    with pytest.raises(PleatError, match=r"batch 'old' holds cannot be found out.*`dvc pull data/raw/old\.dvc`"):
        take(shop)
    assert names(shop / "data" / "inbox") == ["coats"]


def test_without_a_run_of_the_pipeline_it_says_so(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline_steps import inbox_check

    put(shop / "data" / "inbox" / "coats", {f"Coat/{name[-7:]}": data for name, data in images(100, 4).items()})
    runs = shop / ".pleat" / "runs" / "pleat_train-x" / "data"
    runs.mkdir(parents=True)
    (shop / "data" / "ingest").rename(runs / "ingest")
    monkeypatch.setattr(inbox_check, "run_suite", lambda *_: [])
    # Airflow's runs ingest in workspaces of their own.
    [refused] = take(shop)
    assert "Labels that the training data does not have: 'Coat' (4 images)" in refused.reasons[0]
    inbox.acknowledge([refused], shop)
    shutil.rmtree(runs)
    shutil.copytree(next((shop / "data" / "inbox_set_aside").glob("*/coats")), shop / "data" / "inbox" / "coats")
    [added] = take(shop)
    assert added.outcome == "added"
    assert added.reasons == [inbox_check.NO_TRAINING_DATA]
    assert "not compared" in (shop / str(added.report)).read_text()


def test_a_remote_that_is_away_delays_and_does_not_repeat(shop: Path) -> None:
    put(shop / "data" / "inbox" / "new", images(100, 6))
    dvc(shop, "push", "--quiet", "data/raw/old.dvc")
    (shop / "remote").rename(shop / "away")
    (shop / "remote").write_text("no folder")
    with pytest.raises(PleatError, match="was added, but not pushed to the remote 'storage'") as caught:
        take(shop)
    assert caught.value.temporary
    assert len(batches(shop)) == 2
    assert git(shop, "tag") == ""
    (shop / "remote").unlink()
    (shop / "away").rename(shop / "remote")
    [added] = take(shop)
    assert added.outcome == "added"
    after = summary(shop)
    assert after["batches"] == ["old", added.batch]
    assert after["tags"] == [f"data/{added.batch}"]
    assert len(after["remote"]) == N_TRAINING + 6 + 2  # each image and each list once


def test_only_one_look_at_a_time(shop: Path) -> None:
    with inbox._alone(shop), pytest.raises(PleatError, match="Another look at the inbox is at work here") as caught:
        take(shop)
    assert caught.value.temporary
    with pytest.raises(PleatError, match="is no DVC project"):
        inbox.take(settings(shop), shop / "data")


def test_no_inbox_and_names_of_batches(shop: Path) -> None:
    (shop / "data" / "inbox").rmdir()
    assert take(shop) == []
    assert inbox.waiting(settings(shop), shop) == []
    digest = "0123456789abcdef"
    for delivery, expected in {
        "Week 32.tar.gz": "inbox_Week_32_0123456789",
        "---": "inbox_0123456789",
        "sample": "inbox_sample_0123456789",
        "é/../x.dvc": "inbox_x_dvc_0123456789",
        "a" * 300: f"inbox_{'a' * 40}_0123456789",
    }.items():
        assert inbox.batch_name(delivery, digest) == expected
        params.check(
            {
                **settings(shop).model_dump(),
                "experiment": {**settings(shop).experiment.model_dump(), "batches": [expected]},
            },
            "",
        )


# What is found out about the delivery is set, since it takes seconds and other tests look at it.
KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
sys.modules["pipeline_steps.pages"] = SimpleNamespace(drift=SimpleNamespace(drift_page=lambda *_: "the page"))
from pipeline_steps import data_add, deliveries, inbox, inbox_check, inbox_decisions, inbox_publish, params, sources
inbox_check.check = lambda params, root, work, name, kept: inbox_check.Check(["Too dark."] if "dark" in name else [])
def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def kill_after(owner, name, when=lambda *_: True):
    true = getattr(owner, name)
    def wrapped(*arguments, **named):
        result = true(*arguments, **named)
        if when(*arguments):
            kill()
        return result
    setattr(owner, name, wrapped)
point = sys.argv[1]
if point == "looked":
    inbox._decide = kill
elif point == "decided":
    data_add.add = kill
elif point == "moved to raw":
    sources.run_child = kill
elif point == "tracked":
    kill_after(sources, "run_child")
elif point == "listed":
    data_add.shutil.rmtree = lambda path, *_, **__: kill() if Path(path).name.startswith(".adding-") else None
elif point == "added":
    kill_after(data_add, "add")
elif point == "pushed":
    kill_after(inbox_publish, "push")
elif point == "staged":
    inbox_publish._Git.commit_on = kill
elif point == "committed":
    kill_after(inbox_publish, "commit")
elif point == "held":
    deliveries._move = kill
elif point == "moved":
    kill_after(deliveries.FolderInbox, "move")
elif point == "finished":
    kill_after(inbox_decisions.Decision, "write", lambda decision, *_: decision.data_version is not None)
inbox.take(params.load())
"""
POINTS = [
    "looked", "decided", "moved to raw", "tracked", "listed", "added", "pushed", "staged", "committed", "held", "moved",
    "finished",
]  # fmt: skip


def killed_at(point: str, root: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED, point],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, f"{point}: {child.stdout}{child.stderr}"


def test_killed_at_every_step_and_looked_at_again(shop: Path) -> None:
    """One after the other on one delivery, so each look also goes on from where the one before was killed."""
    put(shop / "data" / "inbox" / "new", images(100, 6) | images(0, 1))
    for point in POINTS:
        killed_at(point, shop)
    assert names(shop / "data" / "inbox") == []
    [added] = take(shop)
    assert added.outcome == "added"
    assert asdict(added)["data_version"] == versions.data_version(["old", str(added.batch)], shop)
    after = summary(shop)
    assert after == {
        "raw": [str(added.batch), f"{added.batch}.dvc", "old", "old.dvc"],
        "batches": ["old", added.batch],
        "tags": [f"data/{added.batch}"],
        "commits": [f"Add batch {added.batch} from the inbox", "start"],
        "changed": "",
        "inbox": [],
        "remote": after["remote"],
    }
    assert len(after["remote"]) == 6 + 1
    [kept] = (shop / "data" / "inbox_done").iterdir()
    assert names(kept) == ["index.html", "new"]
    assert content(kept / "new") == images(100, 6) | images(0, 1)
    inbox.acknowledge([added], shop)
    assert take(shop) == []


@pytest.mark.parametrize("point", ["held", "moved"])
def test_killed_while_it_is_set_aside(shop: Path, point: str) -> None:
    arrived = put(shop / "data" / "inbox" / "dark", images(100, 12, dark))
    before = untouched(shop)
    killed_at(point, shop)
    assert not arrived.exists()
    [refused] = take(shop)
    assert refused.outcome == "set aside"
    assert refused.reasons == ["Too dark."]
    [aside] = (shop / "data" / "inbox_set_aside").iterdir()
    assert names(aside) == ["dark", "index.html", "reasons.txt"]
    assert content(aside / "dark") == images(100, 12, dark)
    assert names(shop / "data" / "inbox") == []
    assert untouched(shop) == before
