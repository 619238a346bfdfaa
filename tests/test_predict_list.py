"""`pleat predict --list`: class numbers for each image of a list, in the data set's order of classes, or nothing."""

import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import encode, load_params, names, write_params
from PIL import Image

from pipeline_steps import formats, package, predict, predict_list
from pipeline_steps.cli import build_parser
from pipeline_steps.errors import PleatError
from pipeline_steps.registry import Registry
from pipeline_steps.targets import Target

SETTINGS = load_params()
# In neither type is the order that of the alphabet, which is the order of a model's classes.
CLASSES = "5\nattribute_name attribute_type\nshort 2\nred 1\nno sleeve at all 2\nblue 1\nlong 2\n"
TARGETS = [
    Target("sleeve", False, ["sleeve"], ["long", "no sleeve at all", "short"]),
    Target("colour", False, ["colour"], ["blue", "red"]),
]
IMAGES = {
    "img/a.png": (200, 0, 9),  # red, long
    "img/b.png": (9, 150, 200),  # blue, no sleeve at all
    "img/c.PNG": (200, 255, 9),  # red, short
    "img/d.png": (9, 255, 200),  # blue, short
}
LINES = {"img/a.png": "0 2", "img/b.png": "1 1", "img/c.PNG": "0 0", "img/d.png": "1 0"}


class ByMeanColour(torch.nn.Module):
    """The class of the colour follows from red and blue, that of the sleeve from green."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = torch.nn.Linear(3, 5)
        with torch.no_grad():
            rows = [[0, 0, 0], [0, 1, 0], [0, 3, 0], [0, 0, 1], [1, 0, 0]]
            self.outputs.weight.copy_(torch.tensor(rows) / 10)
            self.outputs.bias.copy_(torch.tensor([0, -10.0, -50.0, 0, 0]))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.outputs(pixels.float().mean((2, 3)))


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Version 1 answers both attributes, version 2 knows one under another name; none is champion."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        registry = Registry(SETTINGS.promotion.model)
        run = registry.client.create_run(mlflow.create_experiment("pleat", (folder / "mlruns").as_uri()))
        for version, targets in {"1": TARGETS, "2": [TARGETS[0], replace(TARGETS[1], name="tint")]}.items():
            made = folder / version / "package"
            made.mkdir(parents=True)
            about = {"preprocessing": {"resize": 8, "crop": 8, "interpolation": "bilinear"}, "max_pixels": 10_000}
            package.write(
                made, package.Answering(ByMeanColour(), targets, mirror=True), 8, about, encode(drawn((0, 0, 0)))
            )
            assert registry.register(made, package.digest(made), run.info.run_id, {}) == version
        yield


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data set, in a folder of its own within the workspace."""
    folder = tmp_path / "data set"
    (folder / "img").mkdir(parents=True)
    for path, colour in IMAGES.items():
        (folder / path).write_bytes(encode(drawn(colour), "PNG"))
    put(folder, "list_attr_cloth", CLASSES)
    put(folder, "train", "picture_filename\nimg/a.png\n")
    put(folder, "train_attr", f"colour sleeve\n{LINES['img/a.png']}\n")
    put(folder, "test", "picture_filename\nimg/d.png\nimg/b.png\n./img/c.PNG\n")
    return folder


def drawn(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (20, 12), colour)


def put(folder: Path, name: str, text: str) -> None:
    (folder / "split").mkdir(exist_ok=True)
    (folder / "split" / f"{name}.txt").write_text(text)


def refusal(folder: Path, listed: str = "split/test.txt") -> str:
    with pytest.raises(PleatError) as caught:
        predict_list.find(folder, listed)
    return str(caught.value).replace(f"{folder}/split/", "").replace(str(folder), "FOLDER")


def test_a_line_of_class_numbers_for_each_image_in_the_order_of_the_list(
    versions: None, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(data.parent)
    write_params(Path())
    command = ["predict", "data set", "--list", "split/test.txt", "--version", "1", "--out", "out/prediction.txt"]
    arguments = build_parser().parse_args(command)
    arguments.run(arguments)
    assert Path("out/prediction.txt").read_bytes() == b"1 0\n1 1\n0 0\n"
    assert names(Path("out")) == ["prediction.txt"]
    said = capsys.readouterr().out
    assert "scores 3 images" in said
    assert "predict: 3 images, 0 of them unreadable, in " in said


def test_an_image_that_cannot_be_read_ends_it_and_nothing_is_written(versions: None, data: Path) -> None:
    (data / "img" / "b.png").write_bytes(b"no image")
    (data.parent / "p.txt").write_text("as before\n")
    with pytest.raises(
        PleatError,
        match=r"^img/b\.png of .*/split/test\.txt cannot be answered \(it is no image of a known format\), and",
    ):
        predict.predict(SETTINGS, ["data set"], "p.txt", "1", listed="split/test.txt", root=data.parent)
    assert (data.parent / "p.txt").read_text() == "as before\n"
    assert names(data.parent) == ["data set", "p.txt"]


def test_a_model_that_lacks_an_attribute(versions: None, data: Path) -> None:
    sentence = r"^Version 2 of \w+ answers sleeve, tint; .*test\.txt needs exactly one class of each of colour, sleeve"
    with pytest.raises(PleatError, match=sentence):
        predict.predict(SETTINGS, ["data set"], "p.txt", "2", listed="split/test.txt", root=data.parent)
    assert names(data.parent) == ["data set"]


def test_a_model_must_answer_with_the_data_sets_own_classes(data: Path) -> None:
    asked, own = predict_list.find(data, "split/test.txt"), {target.name: target.classes for target in TARGETS}
    one_each = {"sleeve": False, "colour": False}
    asked.check("It", own, one_each)
    asked.check("It", own | {"more": ["x"]}, one_each | {"more": True})
    asked.check("It", own | {"colour": ["red"]}, one_each)  # no image of the other one was there to learn from
    with pytest.raises(PleatError, match="It answers colour with dark, but the data set's classes are red, blue; name"):
        asked.check("It", own | {"colour": ["blue", "dark"]}, one_each)
    with pytest.raises(
        PleatError, match=r"It answers sleeve, colour; .* needs exactly one class of each of colour, sle"
    ):
        asked.check("It", own, one_each | {"colour": True})


def test_the_numbers_mean_what_they_mean_in_the_lists_of_labels(data: Path) -> None:
    """Lines written for random answers, read back as the labels of val."""
    random = np.random.default_rng(0)
    answers = {target.name: random.choice(target.classes, 4) for target in TARGETS}
    asked = predict_list.find(data, "split/test.txt")
    rows = [
        ("x.png", {name: [[str(label), 0.5]] for name, label in zip(answers, labels, strict=True)})
        for labels in zip(*answers.values(), strict=True)
    ]
    predict_list.write(data / "split" / "val_attr.txt", iter(rows), asked)
    put(data, "val_attr", "colour sleeve\n" + (data / "split" / "val_attr.txt").read_text())
    put(data, "val", "picture_filename\nw.png\nx.png\ny.png\nz.png\n")
    read = formats.read(data, "attribute_lists").rows
    for name, labels in answers.items():
        assert list(read[name][read["given"] == "val"]) == list(labels)


def test_files_are_found_however_their_paths_are_written(data: Path) -> None:
    accent = unicodedata.normalize("NFD", "img/süß 1.png")
    (data / "img" / "a.png").rename(data / accent)
    paths = [unicodedata.normalize("NFC", accent), "./img/d.png", "img//c.PNG"]
    put(data, "more", "picture_filename\r\n" + "\r\n".join(paths))
    expected = [data / accent, data / "img" / "d.png", data / "img" / "c.PNG"]
    assert predict_list.find(data, "split/more.txt").images == list(zip(paths, expected, strict=True))


def test_paths_that_lead_out_of_the_folder_are_refused(data: Path) -> None:
    (data.parent / "secret.png").write_bytes(encode(drawn((1, 2, 3)), "PNG"))
    (data / "img" / "link.png").symlink_to(data.parent / "secret.png")
    for path in ("../secret.png", "img/../../secret.png", str(data.parent / "secret.png"), "img/link.png"):
        put(data, "test", f"picture_filename\nimg/a.png\n{path}\n")
        assert refusal(data).startswith("test.txt, line 3: expected the path of an image within FOLDER, but got '")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("test", "picture_filename\nimg/e.png\n", "test.txt, line 2: img/e.png does not exist in FOLDER; restore the"),
        ("test", "picture_filename\nimg\n", "test.txt, line 2: img does not exist in FOLDER; restore the"),
        ("test", "img/a.png\n", "test.txt, line 1: expected the header 'picture_filename', but got 'img/a.png'."),
        ("test", "picture_filename\n", "test.txt lists no image; it needs a header and one line for each image."),
        ("test", "picture_filename\na\n./a\n", "test.txt, line 3: ./a is in line 2 of test.txt already; list each"),
        ("train_attr", "colour\n0\n", "train_attr.txt, line 1: expected a header that names 2 columns"),
        ("list_attr_cloth", "red 1\n", "list_attr_cloth.txt, line 1: expected the number of classes, but got 'red 1'."),
    ],
)
def test_a_broken_list(data: Path, name: str, text: str, sentence: str) -> None:
    put(data, name, text)
    assert refusal(data).startswith(sentence)


def test_what_is_no_list_of_one_folder(data: Path) -> None:
    assert refusal(data, "split/tset.txt") == (
        "tset.txt does not exist; name a list of images below FOLDER, such as split/test.txt."
    )
    assert "does not exist; name a list of images below" in refusal(data, "")
    for images in (["s3://bucket/set"], ["data set", "data set"]):
        with pytest.raises(PleatError, match=r"^split/test\.txt lists images of one folder on this machine, but got"):
            predict.predict(SETTINGS, images, "p.txt", "1", listed="split/test.txt", root=data.parent)


def test_the_real_list_for_testing(real_data: Path) -> None:
    """Against pandas' own reading of the files."""
    folder = real_data / "data" / "fashion_attributes"
    asked = predict_list.find(folder, "split/test.txt")
    listed = pd.read_csv(folder / "split" / "test.txt")["picture_filename"]
    assert asked.images == [(path, folder / path) for path in listed]
    classes = pd.read_csv(folder / "split" / "list_attr_cloth.txt", sep=r"\s+", skiprows=1)
    in_order = {f"category{kind}": list(rows["attribute_name"]) for kind, rows in classes.groupby("attribute_type")}
    assert {column: sorted(numbers, key=numbers.__getitem__) for column, numbers in asked.numbers.items()} == in_order
    assert all(sorted(numbers.values()) == list(range(len(numbers))) for numbers in asked.numbers.values())
