"""Airflow's UI in a real browser: the login, the trigger form, the pages of a run, and the links to MLflow.

Screenshots go to the folder PLEAT_SCREENSHOTS (build/screenshots if unset); a test that fails leaves its page there, as
a picture and as text.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from airflow_served import Served
from conftest import REPOSITORY
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from trigger_projects import override_keys

from pipeline_steps import trigger_form

CHROMIUM = shutil.which("chromium")
NO_BROWSER = "no browser: there is no `chromium` on PATH (Debian has a package of this name)"
pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason=NO_BROWSER)

SCREENSHOTS = Path(os.environ.get("PLEAT_SCREENSHOTS") or REPOSITORY / "build" / "screenshots")
WINDOW = {"width": 1440, "height": 1000}
WHOLE_FORM = {"width": 1440, "height": 1600}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE_MS = 60_000  # of every wait; a page on a busy machine
TITLES = {
    "recipe": "Recipe",
    "models": "Models",
    "folds": "Folds",
    "epochs": "Epochs",
    "batches": "Data batches",
    "promote": "Promotion",
    "overrides": "Single settings",
}
OVERRIDES = {"training.cnn_tiny.patience": 3}
# CSS knows many ways to write a colour; a canvas gives red, green, blue and opacity.
DRAWN_COLOUR = """element => {
    const canvas = document.createElement("canvas").getContext("2d");
    canvas.fillStyle = getComputedStyle(element).backgroundColor;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, NO_BROWSER
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def session(browser: Browser, served: Served) -> Iterator[BrowserContext]:
    """The cookies of a person who has logged in."""
    context = new_context(browser)
    page = context.new_page()
    page.goto(served.airflow.address)
    log_in(page, served.password)
    expect(page.get_by_role("heading", name="Welcome")).to_be_visible()
    yield context
    context.close()


@pytest.fixture
def page(session: BrowserContext, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A new tab; it and those opened from it are kept as picture and text when the test fails."""
    failed_before = request.session.testsfailed
    tab = session.new_page()
    yield tab
    for number, left in enumerate(session.pages):
        if request.session.testsfailed > failed_before and left.url != "about:blank":
            name = re.sub(r"\W+", "_", f"failed_{request.node.name}_{number}")
            shot(left, name)
            (SCREENSHOTS / f"{name}.txt").write_text(f"{left.url}\n{left.locator('body').inner_text()}\n")
        left.close()


@pytest.fixture(scope="module")
def run(session: BrowserContext, served: Served) -> str:
    """A run that the form has started, once it has succeeded."""
    page = session.new_page()
    page.set_viewport_size(WHOLE_FORM)
    form = open_form(page, served)
    field(form, "models").get_by_role("combobox").click()
    form.get_by_role("option", name="cnn_tiny", exact=True).click()
    field(form, "folds").get_by_role("spinbutton").fill("2")
    field(form, "epochs").get_by_role("spinbutton").fill("2")
    write_overrides(form, OVERRIDES)
    shot(page, "2_form_filled")
    form.get_by_role("button", name="Trigger", exact=True).click()
    page.wait_for_url("**/dags/pleat_train/runs/**")  # the form leads to the new run
    name = page.url.rpartition("/runs/")[2]
    page.close()
    assert served.airflow.wait(name) == "success"
    return name


def new_context(browser: Browser) -> BrowserContext:
    context = browser.new_context(viewport=WINDOW, permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(PATIENCE_MS)
    return context


def shot(page: Page, name: str) -> None:
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def log_in(page: Page, password: str) -> None:
    page.get_by_label("Username").fill("admin")
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()


def open_form(page: Page, served: Served) -> Locator:
    page.goto(f"{served.airflow.address}/dags/pleat_train")
    page.get_by_role("button", name="Trigger Dag").click()
    form = page.get_by_role("dialog")
    expect(field(form, "overrides").get_by_role("textbox")).to_be_attached()
    return form


def field(form: Locator, name: str) -> Locator:
    return form.get_by_role("group").filter(has_text=re.compile(f"^{TITLES[name]}"))


def write_overrides(form: Locator, overrides: dict[str, int]) -> None:
    # Pasted: on a DAG's page Airflow takes each typed `g` for its shortcut, and the editor adds brackets of its own.
    page, text = form.page, json.dumps(overrides)
    page.evaluate("text => navigator.clipboard.writeText(text)", text)
    field(form, "overrides").get_by_role("textbox").focus()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.press("ControlOrMeta+V")
    expect(field(form, "overrides")).to_contain_text(text.strip("{}"))


def open_task(page: Page, served: Served, run: str, task: str) -> None:
    """From the run's page, as a person gets there."""
    page.goto(f"{served.airflow.address}/dags/pleat_train/runs/{run}")
    page.get_by_role("table").get_by_role("link", name=task, exact=True).click()
    expect(page.get_by_role("heading", name=task)).to_be_visible()


def follow(page: Page, title: str) -> Page:
    """Opens one of a task's links to other pages."""
    page.get_by_role("link", name="Details").click()
    with page.expect_popup() as popup:
        page.get_by_role("link", name=title, exact=True).click()
    return popup.value


def test_only_the_password_opens_the_login(browser: Browser, served: Served) -> None:
    context = new_context(browser)
    page = context.new_page()
    page.goto(served.airflow.address)
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    shot(page, "1_login")
    log_in(page, served.password[::-1])
    expect(page.get_by_text("Invalid credentials")).to_be_visible()
    page.goto(f"{served.airflow.address}/dags/pleat_train")
    expect(page.get_by_role("button", name="Sign in")).to_be_visible()
    log_in(page, served.password)
    expect(page.get_by_role("button", name="Trigger Dag")).to_be_visible()
    context.close()


def test_the_form_has_every_field_with_its_title_and_help(page: Page, served: Served) -> None:
    page.set_viewport_size(WHOLE_FORM)
    form = open_form(page, served)
    fields = trigger_form.fields(served.project)
    assert list(fields) == list(TITLES)
    tops = [field(form, name).bounding_box()["y"] for name in TITLES]
    assert tops == sorted(tops)
    for name, definition in fields.items():
        expect(field(form, name).locator("label")).to_have_text(re.compile(rf"^{TITLES[name]}\s*\*?$"))
        if "description" in definition:
            help_text = field(form, name).get_by_text(definition["description"], exact=True)
            assert help_text.evaluate("e => e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight")
    settings = field(form, "overrides").inner_text()
    assert all(key.rpartition(".")[2] in settings for key in override_keys(fields))
    field(form, "models").get_by_role("combobox").click()
    expect(form.get_by_role("option")).to_have_text(fields["models"]["examples"])
    expect(field(form, "batches")).to_contain_text("sample")


def test_no_word_of_the_help_covers_another(page: Page, served: Served) -> None:
    page.set_viewport_size(WHOLE_FORM)
    form = open_form(page, served)
    # Words that are marked as code get boxes higher than a line.
    boxes = (
        field(form, "overrides")
        .locator("p, li")
        .evaluate_all("""
        elements => elements.flatMap(element => [...element.querySelectorAll("code")]
            .flatMap(word => [...word.getClientRects()].map(box => [box.left, box.right, box.top, box.bottom])))
    """)
    )
    for number, (left, right, top, bottom) in enumerate(boxes):
        for other_left, other_right, other_top, other_bottom in boxes[:number]:
            beside = right <= other_left or other_right <= left
            assert beside or top >= other_bottom - 1 or bottom <= other_top + 1


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"training.cnn_tiny.patienc": 3}, "training.cnn_tiny.patienc"),
        ({"training.cnn_tiny.patience": 0}, "0 is less than the minimum of 1"),
    ],
)
def test_a_wrong_setting_starts_nothing_and_is_named(
    page: Page, served: Served, overrides: dict[str, int], reason: str
) -> None:
    runs = served.airflow.get("dags/pleat_train/dagRuns")["total_entries"]
    form = open_form(page, served)
    write_overrides(form, overrides)
    form.get_by_role("button", name="Trigger", exact=True).click()
    refusal = form.get_by_text("Invalid input for param overrides")
    expect(refusal).to_contain_text(reason)
    refusal.scroll_into_view_if_needed()
    shot(page, f"3_refused_{next(iter(overrides))}")
    assert len(refusal.inner_text()) < 1000  # not drowned in the schema of all settings
    assert served.airflow.get("dags/pleat_train/dagRuns")["total_entries"] == runs


def test_a_single_fold_cannot_be_entered(page: Page, served: Served) -> None:
    form = open_form(page, served)
    folds = field(form, "folds").get_by_role("spinbutton")
    folds.fill("1")
    folds.blur()
    expect(folds).to_have_value("2")


def test_the_run_does_what_the_form_says(served: Served, run: str) -> None:
    started = served.airflow.get(f"dags/pleat_train/dagRuns/{run}")
    expected = {"models": ["cnn_tiny"], "folds": 2, "epochs": 2, "overrides": OVERRIDES}
    assert expected.items() <= started["conf"].items()
    assert started["triggering_user_name"] == "admin"


def test_grid_and_graph_are_green(page: Page, served: Served, run: str) -> None:
    page.goto(f"{served.airflow.address}/dags/pleat_train/runs/{run}")
    expect(page.get_by_role("row", name="train cnn_tiny · fold 0 Success")).to_be_visible()
    expect(page.get_by_role("row", name="train cnn_tiny · fold 1 Success")).to_be_visible()
    tasks = {task["task_id"] for task in served.airflow.tasks(run)}
    assert {"setup", "list_train", "train", "register"} <= tasks
    unasked = {"approve", "decide"}  # skipped, since no model waits for a person
    for task in tasks - unasked:
        square = page.get_by_test_id(f"grid-{run}-{task}").get_by_test_id("task-state-badge")
        red, green, blue, _ = square.evaluate(DRAWN_COLOUR)
        assert green > 2 * max(red, blue)
    shot(page, "4_grid")
    page.get_by_role("button", name="Show Graph").click()
    expect(page.get_by_test_id("rf__node-train")).to_contain_text("train [2]")
    for task in tasks:
        expect(page.get_by_test_id(f"rf__node-{task}")).to_contain_text("skipped" if task in unasked else "success")
    shot(page, "5_graph")
    page.get_by_role("button", name="Show Grid").click()


def test_folds_are_listed_by_name_and_show_the_lines_of_the_training(page: Page, served: Served, run: str) -> None:
    page.goto(f"{served.airflow.address}/dags/pleat_train/runs/{run}/tasks/train/mapped")
    for fold in range(2):
        expect(page.get_by_role("row", name=f"cnn_tiny · fold {fold} Success")).to_be_visible()
    shot(page, "6_folds")
    page.get_by_role("table").get_by_role("link", name="cnn_tiny · fold 0", exact=True).click()
    expect(page.get_by_text("cnn_tiny fold 0: epoch 1/2")).to_be_visible()
    expect(page.get_by_text("cnn_tiny fold 0: epoch 2/2")).to_be_visible()
    expect(page.get_by_text("> pleat train cnn_tiny 0")).to_be_visible()
    shot(page, "7_log_of_a_fold")


def test_setup_shows_settings_and_versions_and_leads_to_the_runs_in_mlflow(
    page: Page, served: Served, run: str
) -> None:
    about = served.airflow.returned(run, "setup")
    open_task(page, served, run, "setup")
    # What a person sees who opens the log, without scrolling.
    for line in (about["data_version"], about["code_version"], "max_epochs: 2", "patience: 3"):
        expect(page.get_by_text(line).last).to_be_in_viewport()
    shot(page, "8_setup_log")
    page.get_by_role("link", name="Details").click()
    expect(page.get_by_role("link", name="MLflow", exact=True)).to_be_visible()
    shot(page, "9_setup_links")

    [experiment] = served.mlflow.search_experiments(filter_string="name = 'pleat'")
    used = f"tags.`pleat.run.{about['name']}` = 'yes'"
    logged = [found.info.run_name for found in served.mlflow.search_runs([experiment.experiment_id], used)]
    assert sorted(logged) == ["cnn_tiny", "cnn_tiny fold 0", "cnn_tiny fold 1", "cnn_tiny refit", "pipeline sample"]
    mlflow = follow(page, "MLflow")
    expect(mlflow.get_by_role("heading", name="Runs")).to_be_visible()
    expect(mlflow.get_by_text("5 matching runs")).to_be_visible()
    for name in ("pipeline sample", "cnn_tiny"):  # folds are folded in below their model
        expect(mlflow.get_by_role("link", name=name, exact=True)).to_be_visible()
    shot(mlflow, "10_mlflow_runs")


def test_register_leads_to_the_report(page: Page, served: Served, run: str) -> None:
    open_task(page, served, run, "register")
    expect(page.get_by_text("> pleat register")).to_be_visible()
    report = follow(page, "Report")
    shot(page, "11_register_links")
    frame = report.frame_locator("iframe")
    leaderboard = frame.get_by_role("table").first
    row = pd.read_csv(served.workspace(run) / "reports" / "leaderboard.csv").set_index("model").loc["cnn_tiny"]
    expect(leaderboard.get_by_role("row", name="cnn_tiny")).to_contain_text(f"{row['f1_weighted']:.3f}")
    expect(frame.locator("a[href]")).to_have_count(0)  # the pages beside it cannot be reached from MLflow's frame
    shot(report, "12_report")


def test_register_leads_to_the_pipelines_run_in_mlflow(page: Page, served: Served, run: str) -> None:
    open_task(page, served, run, "register")
    mlflow = follow(page, "MLflow")
    expect(mlflow.get_by_role("heading", name="pipeline sample")).to_be_visible()
    expect(mlflow.get_by_text("f1_weighted").first).to_be_visible()
    shot(mlflow, "13_mlflow_pipeline_run")
