"""One training over several devices: a process for each of them, gradients averaged after every step (DDP)."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from threading import Thread
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from pipeline_steps.vision import engine
from pipeline_steps.vision.engine import Epoch, Fitted, Lesson


def fit(
    devices: list[torch.device],
    network: nn.Module,
    lesson: Lesson,
    on_epoch: Callable[[Epoch], None],
    on_resume: Callable[[list[Epoch]], None] = lambda _: None,
) -> Fitted:
    """As `engine.fit`, each batch spread evenly over the devices.

    It takes the steps of one device, apart from rounding, dropout, augmentation, class weights (a weighted mean of its
    own for each part of a batch) and, on CPUs, batch norm (statistics of each part; on GPUs of the whole batch). At
    most len(devices) - 1 samples of an epoch's last batch are left out.

    Args:
        devices: different GPUs, or the CPU as often as it has processes.
        network: on the CPU.
        lesson: likewise; with a batch_size that len(devices) divides.
    """
    gpus = [device.index for device in devices if device.type == "cuda"]
    fabric = Fabric(
        accelerator="cuda" if gpus else "cpu", devices=gpus or len(devices), strategy="ddp_spawn", precision="32-true"
    )
    told: Any = torch.multiprocessing.get_context("spawn").SimpleQueue()

    def listen() -> None:
        while (event := told.get()) is not None:
            (on_resume if isinstance(event, list) else on_epoch)(event)

    listener = Thread(target=listen, daemon=True)
    listener.start()
    # Fabric looks into what it hands on and refuses frozen dataclasses; it does not look into a partial.
    work = partial(_one_of_several, told=told, network=network, lesson=lesson)
    try:
        state, history, best_epoch = fabric.launch(work)
    finally:
        told.put(None)
        listener.join()
    tensors = {name: torch.from_numpy(values) for name, values in state.items()}
    return Fitted(tensors, [Epoch(**line) for line in history], best_epoch)


def _one_of_several(
    fabric: Fabric, told: Any, network: nn.Module, lesson: Lesson
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], int] | None:
    device, network = fabric.device, deepcopy(network)  # what was handed over lies in memory that all share
    if device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // fabric.world_size))
    network = network.to(device).to(memory_format=torch.channels_last)
    first = fabric.global_rank == 0
    fitted = engine.fit(network, lesson.to(device), told.put, told.put if first else lambda _: None, fabric)
    fabric.barrier()
    if not first:
        return None
    # As arrays: torch would hand on tensors as open files, which end with this process.
    state = {name: tensor.cpu().numpy() for name, tensor in fitted.state.items()}
    return state, [vars(line) for line in fitted.history], fitted.best_epoch
