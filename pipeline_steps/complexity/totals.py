"""Parameters and multiply-accumulates of a whole model, counted on torch's meta device: no memory, no weights."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline_steps.params_models import CustomCnn, Head, Model, ScratchModel
from pipeline_steps.vision.networks import CustomCnn as CustomCnnNetwork


def count(settings: Model, head: Head, n_outputs: int) -> dict[str, int]:
    """Counts one image's forward pass, backbone and head; the head has one output for each class of each target.

    Returns:
        `params` (learnt values, frozen ones included), `macs` (multiply-accumulates of convolutions and matrix
        products: FlopCounterMode / 2, which counts two operations for each), `input_size` in pixels.

    Raises:
        PleatError: timm does not know the network, or it cannot take images of this size.
    """
    with torch.device("meta"):
        network: torch.nn.Module
        if isinstance(settings, CustomCnn):
            size = settings.input_size
            blocks = [(block.filters, block.kernel, block.pool, block.padding) for block in settings.blocks]
            network = CustomCnnNetwork(blocks, n_outputs, head.hidden, head.dropout, settings.batch_norm)
        else:
            from pipeline_steps.vision.timm_networks import load_network, preprocessing  # late: takes seconds

            wanted = settings.input_size
            head_on = "pooled" if isinstance(settings, ScratchModel) else settings.head_on
            size = preprocessing(settings.backbone, wanted).crop
            network = load_network(
                settings.backbone, None, False, wanted, head_on, n_outputs, head.hidden, head.dropout
            )
        network.eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.zeros(1, 3, size, size))
    params = sum(parameter.numel() for parameter in network.parameters())
    return {"params": params, "macs": counter.get_total_flops() // 2, "input_size": size}
