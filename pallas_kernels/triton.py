"""What all Triton-lowered Pallas kernels share: where they run, and the silence of jax's warning about their lowering."""

import warnings

from pallas_kernels import platform

CAPABILITIES = (8, 9, 12)  # major numbers

# jax warns while it compiles, long after this code has run, so a filter around the call would miss it. Whoever chose the
# implementation can do nothing about the warning; when the lowering goes, these kernels go.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def reason() -> str | None:
    """Why such kernels cannot run on the default device; None if they can."""
    here = platform.device()
    if here.compute_capability is None:
        return f"needs an NVIDIA GPU, the default device is {here.kind} ({here.backend})"
    if here.compute_capability[0] not in CAPABILITIES:
        return "needs compute capability 8.x, 9.x or 12.x, {} has {}.{}".format(here.kind, *here.compute_capability)
    return None
