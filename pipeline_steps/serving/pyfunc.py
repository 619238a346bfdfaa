"""The model as MLflow serves it."""

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from .classifier import Best, Classifier, Several, UnreadableError, image_of

TOP_K = 5


class ImageModel(PythonModel):
    """Column `image` in; label, probability and the `top_k` most probable labels of each target out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Called by MLflow once before the first prediction."""
        self.classifier = Classifier(Path(context.artifacts["package"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:  # noqa: ARG002
        """Classifies the images of one column.

        Args:
            context: unused.
            model_input: a frame whose column `image` holds, a row, bytes, base64 text, the path of a file, or pixels as
                an array of shape (height, width, 3) or (height, width), 0 to 255.
            params: `top_k`, the number of labels listed (default 5).

        Returns:
            A row for each image, in order. For each target, such as `label`: TARGET (text), TARGET_probability and
            TARGET_top_k (list of {label, probability}, best first); `error` says why an image has none, else null. Of a
            multilabel target, TARGET and TARGET_probability are lists, empty where no label applies.
        """
        if "image" not in model_input:
            raise ValueError(
                f"Expected a column `image`, but got {', '.join(map(str, model_input.columns)) or 'none'}."
            )
        top_k = int((params or {}).get("top_k", TOP_K))
        if top_k < 1:
            raise ValueError(f"Expected `top_k` to be at least 1, but got {top_k}.")
        cells = [image_of(value) for value in model_input["image"]]
        good = [cell for cell in cells if not isinstance(cell, UnreadableError)]
        answers = self.classifier.best(good, top_k)
        rows = [self._row(cell if isinstance(cell, UnreadableError) else next(answers)) for cell in cells]
        columns = [name for target in self.classifier.classes for name in columns_of(target)]
        # Of objects: a column of numbers would hold NaN where there is none, which is no JSON.
        return pd.DataFrame(rows, columns=[*columns, "error"], index=model_input.index, dtype=object)

    def _row(self, answer: Best | UnreadableError) -> dict[str, Any]:
        if isinstance(answer, UnreadableError):
            names = [name for target in self.classifier.classes for name in columns_of(target)]
            return {**dict.fromkeys(names), "error": str(answer)}
        row: dict[str, Any] = {"error": None}
        for target, best in answer.items():
            labels, ranked = best if isinstance(best, Several) else (None, best)
            own = ranked[0] if labels is None else ([name for name, _ in labels], [value for _, value in labels])
            listed = [{"label": label, "probability": probability} for label, probability in ranked]
            row |= dict(zip(columns_of(target), (*own, listed), strict=True))
        return row


def columns_of(target: str) -> tuple[str, str, str]:
    """Names of a target's columns in the output: label, probability, most probable labels."""
    return target, f"{target}_probability", f"{target}_top_k"
