"""One tiny random transformer per family of diffusers, and what a reference written by hand has to know of each."""

from . import cross, flux, hunyuan, mixed, mmdit
from .family import BLOCKS, STEPS, TEXT_TOKENS, Container, Family, Output, stacked

FAMILIES = [*mmdit.FAMILIES, *flux.FAMILIES, *hunyuan.FAMILIES, *mixed.FAMILIES, *cross.FAMILIES]

__all__ = ["BLOCKS", "FAMILIES", "STEPS", "TEXT_TOKENS", "Container", "Family", "Output", "stacked"]
