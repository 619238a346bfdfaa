"""Parameters and multiply-accumulates of a whole model, counted on torch's meta device: no memory, no weights."""

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline_steps.params_models import CustomCnn, Head, Model
from pipeline_steps.vision.networks import CustomCnn as CustomCnnNetwork
from pipeline_steps.vision.networks import Head as HeadNetwork
from pipeline_steps.vision.weights import unknown_model


def count(settings: Model, head: Head, n_outputs: int) -> dict[str, int]:
    """Counts one image's forward pass, backbone and head; the head has one output for each class of each target.

    Returns:
        `params` (learnt values, frozen ones included), `macs` (multiply-accumulates of convolutions and matrix
        products: FlopCounterMode / 2, which counts two operations for each), `input_size` in pixels.

    Raises:
        PleatError: timm does not know the backbone.
    """
    with torch.device("meta"):
        network: torch.nn.Module
        if isinstance(settings, CustomCnn):
            size = settings.input_size
            blocks = [(block.filters, block.kernel, block.pool) for block in settings.blocks]
            network = CustomCnnNetwork(blocks, n_outputs, head.hidden, head.dropout)
        else:
            if not timm.is_model(settings.backbone):
                raise unknown_model(settings.backbone)
            backbone = timm.create_model(settings.backbone, num_classes=0)
            size = int(timm.data.resolve_model_data_config(backbone)["input_size"][-1])
            n_features = backbone(torch.zeros(1, 3, size, size)).shape[-1]
            network = torch.nn.Sequential(backbone, HeadNetwork(n_features, n_outputs, head.hidden, head.dropout))
        network.eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.zeros(1, 3, size, size))
    params = sum(parameter.numel() for parameter in network.parameters())
    return {"params": params, "macs": counter.get_total_flops() // 2, "input_size": size}
