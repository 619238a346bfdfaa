"""Whether a network's pre-trained weights can be had and fit it, found out before any long work."""

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline_steps.errors import PleatError

SHOWN = 3  # tensors of a kind that an error names
Shapes = Mapping[str, tuple[int, ...]]  # of tensors by name


def check_weights(name: str, weights: Path | None) -> None:
    """Checks, without loading them, that a timm backbone's weights can be had.

    Raises:
        PleatError: with both ways out: a file (`weights: FILE`) or a network connection to timm's hub.
    """
    if weights is not None:
        if not weights.is_file():
            raise PleatError(
                f"The weights file {weights} of {name} does not exist. Give another with `weights: FILE`, "
                "or set `weights: null` to load them from timm's hub, which needs a network connection."
            )
        if weights.suffix != ".safetensors":
            raise PleatError(
                f"The weights file {weights} is not a .safetensors file; other kinds can run code when they are read. "
                "Convert it with safetensors.torch.save_file."
            )
        return
    import timm  # late: takes seconds, and a file needs none of it
    from huggingface_hub import file_exists, try_to_load_from_cache

    if not timm.is_model(name):
        raise unknown_model(name)
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise PleatError(f"timm has no pre-trained weights for {name}; give a file with `weights: FILE`.")
    if isinstance(try_to_load_from_cache(config.hf_hub_id, "model.safetensors"), str):
        return
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        file_exists(config.hf_hub_id, "model.safetensors")
    except Exception as error:  # being offline shows in many ways: DNS, proxy, time-out, offline mode
        raise PleatError(
            f"The weights of {name} are not on this machine and timm's hub cannot be reached. Either connect to the "
            "network, or download them elsewhere and name the file: models.MODEL.weights: FILE.safetensors "
            "(`pleat use RECIPE --set models.MODEL.weights=FILE.safetensors`).",
            temporary=True,
        ) from error


def unknown_model(name: str) -> PleatError:
    """The error for a name that timm does not know, with the nearest names that it does."""
    import timm

    near = get_close_matches(name, timm.list_models(), n=5)
    return PleatError(f"timm knows no model named '{name}'; near names: {', '.join(near) or 'none'}.")


def shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a .safetensors file, from its header.

    Raises:
        PleatError: it is no such file, or a damaged one.
    """
    try:
        with safe_open(weights, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PleatError(f"The weights {weights} cannot be read as safetensors: {error}. Fetch them again.") from error


def misfit(name: str, weights: Path, found: Shapes, wanted: Shapes, classifier: Sequence[str]) -> PleatError | None:
    """The error for a file with the tensors `found` where the network `name` wants others; None: it wants the same.

    Args:
        classifier: names of the classifier's tensors.
    """
    # torch counts batches itself where a file has no count.
    lacking = [key for key in wanted if key not in found and not key.endswith("num_batches_tracked")]
    unknown = [key for key in found if key not in wanted]
    others = [
        f"{key} ({_shape(found[key])} instead of {_shape(wanted[key])})"
        for key in wanted
        if key in found and found[key] != wanted[key]
    ]
    if lacking and set(lacking) <= set(classifier) and not others and not unknown:
        return PleatError(
            f"The weights {weights} hold no classifier ({_some(lacking)}), which `head_on: logits` needs; "
            "give a file with one, or set `head_on: pooled`."
        )
    told = [("lacks", lacking), ("has in another shape", others), ("has beyond them", unknown)]
    reasons = "; ".join(f"{what} {_some(names)}" for what, names in told if names)
    if not reasons:
        return None
    return PleatError(
        f"The weights {weights} do not fit {name}: of the network's tensors the file {reasons}. "
        "Give the file of this network, or name the network that the file is of."
    )


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
