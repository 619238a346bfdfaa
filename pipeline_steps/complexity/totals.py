"""Totals of a whole model of params.yaml, counted on torch's meta device: no memory, no weights."""

from pipeline_steps.complexity import layers
from pipeline_steps.complexity.subject import Subject, of_model
from pipeline_steps.complexity.trace import trace
from pipeline_steps.params_models import Head, Model


def count(settings: Model, head: Head, n_outputs: int) -> dict[str, int]:
    """Counts one image's forward pass, backbone and head; the head has one output for each class of each target.

    Returns:
        `params` (learnt values, frozen ones included), `macs` (multiply-accumulates of convolutions and matrix
        products), `input_size` in pixels.

    Raises:
        PleatError: timm does not know the network, or it cannot take images of this size.
    """
    subject = of_model("the model", settings, head, n_outputs)
    return summary(layers.totals(layers.table(trace(subject.build, subject.shape))), subject)


def summary(found: dict[str, int], subject: Subject) -> dict[str, int]:
    """What other stages use of `layers.totals`."""
    return {"params": found["params"], "macs": found["macs"], "input_size": subject.input_size}
