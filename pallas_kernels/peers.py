"""Attention of PyTorch systems to compare with, on the same lists. The one file of the kernels that imports torch.

sdpa    `scaled_dot_product_attention` through cuDNN; dense workloads
flex    FlexAttention, compiled with every configuration that torch knows tried; a block mask of the same lists
fa4     FlashAttention-4 with the lists as full blocks and tiles of their size

Each has its inputs in the layout that it likes, keys in one array, before the clock starts, and is launched as a CUDA
graph of some calls, so that the time of its Python code does not count.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
import torch
import torch._functorch.config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pallas_kernels.runs import CALLS, Missing, Run, needs_full_lists
from pallas_kernels.workloads import Case

Array = jax.Array | np.ndarray
Call = Callable[[], Sequence[torch.Tensor]]  # -> the output, or the gradients of q, k and v, each [b, t, head, e]


def run(name: str, case: Case) -> Run:
    """See `runs.prepare`."""
    if not torch.cuda.is_available():
        raise Missing("torch sees no NVIDIA GPU here")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call = {"sdpa": _sdpa, "flex": _flex, "fa4": _fa4}[name](case)
        for _ in range(2):  # compiles
            call()
        stream.synchronize()
        launch, launched, calls = _captured(call, stream)
    return Run(launch, lambda outputs: stream.synchronize(), _head, launched, calls)


def _captured(call: Call, stream: torch.cuda.Stream) -> tuple[Call, str, int]:
    """Some calls as one CUDA graph, or where it cannot be captured one as it is; which of the two, and how many calls."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Only this thread: JAX has others, which may allocate meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(CALLS):
                outputs = call()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        torch.cuda.synchronize()
    else:
        reason = "it held no kernels"
        with torch.no_grad():
            for output in outputs:
                output.zero_()
        graph.replay()
        stream.synchronize()
        if all(bool(output.any()) for output in outputs):
            return partial(_replay, graph, stream, outputs, call), "CUDA graph", CALLS

    def plain():
        with torch.cuda.stream(stream):
            return call()

    return plain, f"calls; as a CUDA graph {reason}", 1


def _replay(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, outputs: Sequence[torch.Tensor], call: Call):
    """The outputs, which the graph fills again.

    The graph holds addresses, not tensors: those it reads live as long as `call`, which made it. Were they gone, the next
    graph's capture would return their memory to the driver, and this one would fault.
    """
    del call
    with torch.cuda.stream(stream):
        graph.replay()
    return outputs


def _head(output: torch.Tensor, head: int) -> np.ndarray:
    return output[:, :, head].detach().float().cpu().numpy()


def _tensor(array: Array) -> torch.Tensor:
    """A copy for torch; numpy's own bfloat16 is not known to it."""
    host = np.array(array)
    if host.dtype.name == "bfloat16":
        return torch.from_numpy(host.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(host).cuda()


def _inputs(case: Case, head_first: bool) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output: [b, t, head, e], or [b, head, t, e]."""
    tensors = [_tensor(x) for x in (case.q, *case.all_keys(), case.dout)]
    return [x.transpose(1, 2).contiguous() for x in tensors] if head_first else tensors


def _differentiable(case: Case, attend: Callable[..., torch.Tensor]) -> Call:
    """Calls of a differentiable function with arrays [b, head, t, e]: of itself, or of its gradients alone."""
    *qkv, dout = _inputs(case, head_first=True)
    if not case.workload.backward:
        return lambda: (attend(*qkv).transpose(1, 2),)
    out = attend(*(x.requires_grad_() for x in qkv))
    return lambda: [x.transpose(1, 2) for x in torch.autograd.grad(out, qkv, dout, retain_graph=True)]


def _sdpa(case: Case) -> Call:
    needs_full_lists(case)

    def attend(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=case.workload.scale)

    return _differentiable(case, attend)


def _flex(case: Case) -> Call:
    work = case.workload
    torch._dynamo.reset()  # it gives up compiling after a few shapes
    torch._functorch.config.donated_buffer = False  # the backward runs many times over one forward
    compiled = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    options = {"fwd_BLOCK_N": work.block_k} if work.block_k < 64 else None  # not among the configurations tried
    mask = None if work.full and not work.padded else block_mask(case)
    return _differentiable(case, partial(compiled, block_mask=mask, scale=work.scale, kernel_options=options))


def block_mask(case: Case, device: str = "cuda") -> BlockMask:
    """The lists of a workload for FlexAttention: whole blocks, and those with dead tokens, which it masks."""
    work, blocks = case.workload, case.blocks
    index, count = np.asarray(blocks.index), np.asarray(blocks.count)
    listed = np.arange(index.shape[-1]) < count[..., None]
    masked = listed & (index % work.frame_blocks == work.frame_blocks - 1) & work.padded

    def packed(chosen: np.ndarray) -> list[torch.Tensor]:
        """Count, and the chosen entries first in lists as wide as there are key blocks."""
        order = np.argsort(~chosen, axis=-1, kind="stable")
        wide = np.zeros((*index.shape[:3], work.key_blocks), np.int32)
        wide[..., : index.shape[-1]] = np.take_along_axis(index, order, -1)
        return [torch.from_numpy(x).to(device) for x in (chosen.sum(-1, dtype=np.int32), wide)]

    def live(b, h, q, key):
        return key % work.padded_frame < work.frame_tokens

    return BlockMask.from_kv_blocks(
        *packed(masked),
        *packed(listed & ~masked),
        BLOCK_SIZE=(work.block_q, work.block_k),
        mask_mod=live,
        seq_lengths=(work.queries, work.key_blocks * work.block_k),
    )


def transposed(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The query blocks that name each key block, [b, head, key_block, query_block] int32, and how many: what gradients of
    FlashAttention-4 walk, in units of whole query blocks."""
    index, count = np.asarray(case.blocks.index), np.asarray(case.blocks.count)
    named = np.zeros((*count.shape, case.workload.key_blocks + 1), bool)
    entries = np.where(np.arange(index.shape[-1]) < count[..., None], index, case.workload.key_blocks)
    np.put_along_axis(named, entries, True, axis=-1)
    named = named[..., :-1].swapaxes(-1, -2)
    return np.argsort(~named, axis=-1, kind="stable").astype(np.int32), named.sum(-1, dtype=np.int32)


def _fa4(case: Case) -> Call:
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    except ImportError as error:
        raise Missing(f"FlashAttention-4 is not installed ({error})") from error
    work, blocks = case.workload, case.blocks
    if work.padded:
        raise Missing("is given full blocks only, and blocks of these frames hold dead tokens")
    if work.backward and not work.full and (work.block_q % 64 or work.block_k != 128):
        raise Missing("its gradients need query blocks of a multiple of 64 and key blocks of 128 (Hopper, head_dim 128)")

    def tensors(index: Array, count: Array) -> BlockSparseTensorsTorch:
        full_index, full_count = _tensor(index), _tensor(count)
        masked_index, masked_count = torch.zeros_like(full_index), torch.zeros_like(full_count)
        size = (work.block_q, work.block_k)
        return BlockSparseTensorsTorch(masked_count, masked_index, full_count, full_index, block_size=size)

    q, k, v, dout = _inputs(case, head_first=False)
    sparse = (
        {}
        if work.full
        else dict(block_sparse_tensors=tensors(blocks.index, blocks.count), tile_mn=(work.block_q, work.block_k))
    )
    forward = partial(_flash_attn_fwd, q, k, v, softmax_scale=work.scale, **sparse)
    if not work.backward:
        return lambda: forward()[:1]
    out, lse = forward(return_lse=True)[:2]
    if not work.full:
        sparse = dict(block_sparse_tensors=tensors(*transposed(case)))
    return lambda: _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=work.scale, **sparse)[:3]
