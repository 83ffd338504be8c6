"""Running a batch through a torch module, which both of torch's formats do alike."""

from collections.abc import Callable

import torch

from server.errors import DeviceMemoryError
from server.requests import Images, Outputs

Module = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def run_module(module: Module, images: Images, device: torch.device) -> Outputs:
    """Runs a batch `[N, H, W, 3]`.

    Raises:
        DeviceMemoryError: The device has no memory for it.
    """
    try:
        with torch.inference_mode():
            logits, probabilities = module(torch.from_numpy(images).to(device))
            return Outputs(logits.cpu().numpy(), probabilities.cpu().numpy())
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"no memory for {len(images)} images") from error
