"""`pleat predict --list`: the images of one list of a data set in the format attribute_lists, answered in that format.

So a challenge can score images whose labels it keeps to itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline_steps import isolated
from pipeline_steps.errors import PleatError


@dataclass(frozen=True)
class Asked:
    """What a list asks for.

    Attributes:
        listed: the list's own path, for errors.
        images: as they are written in the list, with their files, in its order.
        numbers: of the classes, by label column, in the order in which the data set's labels give them.
    """

    listed: Path
    images: list[tuple[str, Path]]
    numbers: dict[str, dict[str, int]]

    def check(self, model: str, classes: Mapping[str, list[str]], targets: Mapping[str, bool]) -> None:
        """Checks before any long work that a model answers what the list asks for.

        Args:
            model: its name, for errors.
            classes: of each target of the model.
            targets: of the model, and whether each is multilabel.

        Raises:
            PleatError: it has no such target, or a class that the data set does not number.
        """
        lacking = [column for column in self.numbers if targets.get(column, True)]
        if lacking:
            raise PleatError(
                f"{model} answers {', '.join(targets)}; {self.listed} needs exactly one class of each of "
                f"{', '.join(self.numbers)}, so name a version that was trained on these as multiclass targets."
            )
        for column, numbers in self.numbers.items():
            strange = [name for name in classes[column] if name not in numbers]
            if strange:
                raise PleatError(
                    f"{model} answers {column} with {', '.join(strange)}, but the data set's classes are "
                    f"{', '.join(numbers)}; name a version that was trained on this data set, without merged labels."
                )


def find(folder: Path, listed: str) -> Asked:
    """Reads a list of images, `folder / listed`, and the classes of the data set around it.

    Raises:
        PleatError: the list or the data set's lists of classes and labels are absent or malformed, or an image is
            listed twice, does not exist or lies outside the folder.
    """
    from pipeline_steps.formats import attribute_lists

    images = attribute_lists.listed_images(folder, listed)
    numbers = {
        column: {name: number for number, name in enumerate(names)}
        for column, names in attribute_lists.classes_by_column(folder).items()
    }
    return Asked(folder / listed, images, numbers)


def write(out: Path, rows: Iterator[tuple[str, isolated.Row]], asked: Asked) -> None:
    """Writes a line for each image as its row comes: the number of its class in each label column, as train_attr.txt.

    There is no header: that is what the challenge takes.

    Raises:
        PleatError: an image cannot be read, since a line that is left out would shift all others.
    """
    from pipeline_steps.files import atomic_path

    with atomic_path(out) as partial, partial.open("w", encoding="ascii", newline="\n") as lines:
        for name, answer in rows:
            if isinstance(answer, str):
                raise PleatError(
                    f"{name} of {asked.listed} cannot be answered ({answer}), and every listed image needs a line, "
                    "so nothing was written; repair the image."
                )
            best = ((numbers, answer[column][0][0]) for column, numbers in asked.numbers.items())
            lines.write(" ".join(str(numbers[label]) for numbers, label in best) + "\n")
