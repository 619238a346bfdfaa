"""AdamW without torch's compiler.

torch.optim imports torch._dynamo at the first use of an optimizer, only to exempt it from compilation. That takes 1 to
2 s in each fold's process, as long as training a head. Nothing here is compiled, so it is left out.
"""

import torch
from torch.optim import AdamW, Optimizer


class EagerAdamW(AdamW):
    """torch.optim.AdamW, same arguments and same arithmetic; must not be used inside torch.compile."""

    # The function below the decorator that imports the compiler; all else that it does is to switch gradients off.
    step = torch.no_grad()(AdamW.step.__wrapped__)  # type: ignore[attr-defined]


for _method in vars(Optimizer).values():
    _plain = getattr(_method, "__wrapped__", None)
    if _plain is not None:
        # torch keeps here what it calls instead, once it has asked the compiler for an exempted version.
        _plain.__dynamo_disable = _plain
