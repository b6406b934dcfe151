"""The interpreter of Mosaic GPU kernels, made as strict as a GPU where it is lenient."""

import math

import jax
import pytest


@pytest.fixture
def interpret(monkeypatch):
    """What `Config.interpret` takes. After the test no races may have been found, and no stores that a GPU makes elsewhere.

    The interpreter drops what a store has beyond the end of an axis. So does a GPU, except where Mosaic makes a store plain
    bytes (`is_simple_contiguous_copy` in jax's mosaic/gpu/launch_context.py): one that is not swizzled and in one piece, as a
    row of numbers is. It ends with the whole array, and before that runs into the next row.
    """
    if jax.__version_info__ < (0, 11):
        pytest.skip("the interpreter of jax 0.10 knows no transposed operand, no warps")
    from jax._src.pallas.mosaic_gpu.core import UnswizzleRef
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    store, astray = gpu_callbacks.copy_smem_to_gmem, []

    def checked(**call):
        if not any(isinstance(transform, UnswizzleRef) for transform in call["src_transforms"]):
            memory = gpu_callbacks._get_shared_memory()
            array = gpu_callbacks.HostAllocationKey.from_array(call["dst_allocation_key_as_array"])
            shape = memory.buffer_shape_and_dtype(array).shape
            place = memory.access(array, jax.tree.map(int, call["dst_transforms"])).range
            if runs_over(place, shape):
                astray.append((place, shape))
        return store(**call)

    monkeypatch.setattr(gpu_callbacks, "copy_smem_to_gmem", checked)
    yield InterpretGPUParams(detect_races=True)
    assert not astray, "stores that run into the next row"
    assert not interpret_pallas_call.get_races().races_found


def runs_over(place: tuple[slice | int, ...], shape: tuple[int, ...]) -> bool:
    """Whether what is stored to `place` of an array is one piece, and goes on where an axis ends but not the array."""
    sizes = [1 if isinstance(at, int) else at.stop - at.start for at in place]
    for i, size in enumerate(sizes):
        if size > 1 and math.prod(sizes[i + 1 :]) != math.prod(shape[i + 1 :]):
            return False
    ends = [at + 1 if isinstance(at, int) else at.stop for at in place]
    return any(end > axis and math.prod(shape[:i]) > 1 for i, (end, axis) in enumerate(zip(ends, shape, strict=True)))
