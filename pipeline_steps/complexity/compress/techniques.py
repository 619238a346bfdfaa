"""From a technique of params.yaml to the file that knows it."""

from dataclasses import replace
from pathlib import Path

from pipeline_steps import package
from pipeline_steps.complexity.compress.refitted import Made, NotPossibleError, Refitted
from pipeline_steps.params_compress import Distilled, FewerFilters, Int8, Pruned, SharedWeights, SmallerInput, Technique


def make(refitted: Refitted, name: str, settings: Technique, source: Path, made: Made, out: Path) -> Made:
    """Writes the package that a technique gives into the empty folder `out`.

    Args:
        name: what params.yaml calls it.
        source: the package that int8 and shared_weights change.
        made: what there is to say of that package.

    Raises:
        NotPossibleError: the technique cannot be used on this model.
        PleatError: weights cannot be had, or a network does not take what is asked for.
    """
    # Imports are late, because each technique brings libraries of its own.
    if isinstance(settings, Int8):
        from pipeline_steps.complexity.compress import int8

        pixels = refitted.training_pixels(settings.calibration_images, _preprocessing(source))
        graph = int8.quantize(source / "network.onnx", pixels)
        told = f"weights and activations in 8 bits, ranges from {len(pixels):,} images of training"
        return _changed(out, source, graph, name, made, told)
    if isinstance(settings, SharedWeights):
        from pipeline_steps.complexity.compress import shared_weights

        graph, n_shared = shared_weights.shared(source / "network.onnx", settings.clusters)
        if not n_shared:
            raise NotPossibleError("no layer has enough weights in 32 bits to share")
        told = f"at most {settings.clusters} values of weights a layer, in {n_shared} layers"
        return _changed(out, source, graph, name, made, told)
    if isinstance(settings, SmallerInput):
        from pipeline_steps.complexity.compress import smaller_input

        return smaller_input.make(refitted, name, settings, out)
    if isinstance(settings, FewerFilters):
        from pipeline_steps.complexity.compress import fewer_filters

        return fewer_filters.make(refitted, name, settings, out)
    if isinstance(settings, Pruned):
        from pipeline_steps.complexity.compress import pruned

        return pruned.make(refitted, name, settings, out)
    assert isinstance(settings, Distilled)
    from pipeline_steps.complexity.compress import distilled

    return distilled.make(refitted, name, settings, out)


def _preprocessing(package_folder: Path) -> dict[str, object]:
    from pipeline_steps.files import read_json

    return dict(read_json(package_folder / "about.json")["preprocessing"])


def _changed(out: Path, source: Path, graph: bytes, name: str, made: Made, told: str) -> Made:
    told = f"{made.told}; then {told}" if made.told else told
    package.write_other_graph(out, source, graph, {"compression": {"name": name, "told": told}})
    return replace(made, told=told)
