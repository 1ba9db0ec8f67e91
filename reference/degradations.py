"""Ways in which a picture of the reference world loses quality, and keeps what it shows: noise, blur, tint, a ghost.

For training and testing scores of quality. Covered: faults that generated pictures of this world have. Not covered:
shapes that are not well formed.
"""

import torch
import torch.nn.functional as F


def degrade(pictures: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`pictures`, float `(n, 3, h, w)` in [0, 1], each with one fault drawn from `generator`.

    `strength` is `(n,)` in [0, 1]: 0 leaves a picture as it is; 1 is noise of deviation 0.12, a blur over 7 pixels, a
    tint of 0.15, or a ghost of a third of the picture's contrast, a few pixels aside.
    """
    n, device = len(pictures), pictures.device
    s = strength.view(n, 1, 1, 1)
    noise = 0.12 * torch.randn(pictures.shape, generator=generator, device=device)
    blurred = pictures
    for _ in range(3):
        blurred = F.avg_pool2d(F.pad(blurred, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    tint = torch.randn(n, 3, 1, 1, generator=generator, device=device)
    tint = 0.15 * tint / tint.norm(dim=1, keepdim=True)
    ghost = pictures.roll((3, 4), dims=(2, 3)) - pictures
    faults = [s * noise, s * (blurred - pictures), (s * tint).expand_as(noise), s / 3 * ghost]
    faulty = pictures + torch.stack(faults)
    chosen = torch.randint(len(faulty), (n,), generator=generator, device=device)
    return faulty[chosen, torch.arange(n, device=device)].clamp(0, 1)
