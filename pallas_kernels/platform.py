"""What the device of this process is, as far as the choice of a kernel depends on it."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    backend: str  # "cpu", "gpu", "tpu"
    kind: str  # the device's own name
    compute_capability: tuple[int, int] | None  # of an NVIDIA GPU
    count: int  # devices of this kind
    multiprocessors: int | None = None  # of an NVIDIA GPU

    @property
    def nvidia(self) -> bool:
        return self.compute_capability is not None


def device() -> Device:
    """The default device of this process."""
    first = jax.devices()[0]
    capability = _capability(first)
    cores = None if capability is None else getattr(first, "core_count", None)
    return Device(first.platform, first.device_kind, capability, jax.device_count(), cores)


def describe() -> str:
    """One line about the default device: its kind, compute capability and the jax that drives it."""
    here = device()
    capability = "" if here.compute_capability is None else ", compute capability {}.{}".format(*here.compute_capability)
    return f"{here.count} x {here.kind} ({here.backend}{capability}), jax {jax.__version__}"


def _capability(first: jax.Device) -> tuple[int, int] | None:
    """ROCm devices answer with a name such as "gfx942", TPUs and CPUs not at all: neither is a number pair."""
    parts = str(getattr(first, "compute_capability", "")).split(".")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        return None
    return int(parts[0]), int(parts[1])
