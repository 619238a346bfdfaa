"""Whether a backbone's pre-trained weights can be had, found out before any long work."""

import logging
from difflib import get_close_matches
from pathlib import Path

from pipeline_steps.errors import PleatError


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
