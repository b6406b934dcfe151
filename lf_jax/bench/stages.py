"""Where the time of the transformer goes: the profiler's kernels, by the `jax.named_scope` that their operation was written in.

The profiler names the HLO instruction that every kernel belongs to; the compiled program's text gives the instruction's
`op_name`, the path of scopes.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import jax
from jax.profiler import ProfileData

from pallas_kernels import trace

Result = TypeVar("Result")

SCOPES = {  # stage -> consecutive scopes of `lf_jax.dit` and `lf_jax.attention`
    "embeddings": ("embed",),
    "qkv": ("block", "attention", "qkv"),
    "norm + rope": ("block", "attention", "norm_rope"),
    "selection": ("block", "attention", "select"),
    "attention": ("block", "attention", "attend"),
    "output": ("block", "attention", "output"),
    "cross-attention": ("block", "cross_attention"),
    "ffn": ("block", "ffn"),
    "head": ("head",),
}
COPIES = re.compile(r"copy|dynamic[-_](update[-_])?slice")  # of what no stage computes: weights of a layer, the cache
STAGES = (*SCOPES, "copies", "other")
CONTAINERS = (" while(", " conditional(", " call(")  # their time is that of the instructions inside them


def compiled(program: jax.stages.Lowered) -> jax.stages.Compiled:
    """A program whose kernels the profiler tells apart: on a GPU without CUDA graphs, which it sees as one."""
    options = {"xla_gpu_enable_command_buffer": ""} if jax.default_backend() == "gpu" else None
    return program.compile(compiler_options=options)


def measure(program: jax.stages.Compiled, run: Callable[[], Result]) -> tuple[Result, dict[str, float]]:
    """What one `run()` of `program` gives, and the milliseconds on the device of each of its stages."""
    with trace.profiled(host=2 if jax.default_backend() == "cpu" else 0) as profiles:  # on a CPU the host is the device
        result = jax.block_until_ready(run())
    events = [event for data in profiles for event in kernels(data)]
    return result, attribute(events, instructions(program.as_text()))


def kernels(data: ProfileData) -> Iterable[tuple[str, float]]:
    """The HLO instruction and the milliseconds of every event that has one."""
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                instruction = dict(event.stats).get("hlo_op")
                if instruction is not None:
                    yield str(instruction), event.duration_ns / 1e6


def attribute(events: Iterable[tuple[str, float]], paths: Mapping[str, str | None]) -> dict[str, float]:
    """Milliseconds by stage of (instruction, milliseconds); what `paths` does not have is another program's.

    Raises:
        RuntimeError: if no event belongs to the program: the profiler has not seen it.
    """
    found = [(name, ms) for name, ms in events if name in paths]
    if not found:
        raise RuntimeError("the profiler saw no kernel of the program")
    total = dict.fromkeys(STAGES, 0.0)
    for name, ms in found:
        if (path := paths[name]) is not None:
            total[stage_of(name, path)] += ms
    return total


def stage_of(instruction: str, path: str) -> str:
    """The stage of an instruction whose `op_name` is, say, jit(next_chunk)/while/body/block/ffn/dot_general."""
    scopes = path.split("/")
    for stage, wanted in SCOPES.items():
        if any(tuple(scopes[at : at + len(wanted)]) == wanted for at in range(len(scopes))):
            return stage
    return "copies" if COPIES.search(instruction) or COPIES.search(scopes[-1]) else "other"


def instructions(text: str) -> dict[str, str | None]:
    """The `op_name` of every instruction of a compiled program, "" where it has none, None for those that contain others.

    A fusion without a name of its own has the one that most instructions inside it have.
    """
    found: dict[str, str | None] = {}
    inside: dict[str, Counter[str]] = {}  # by computation
    calls: dict[str, str] = {}  # nameless instruction -> the computation it calls
    computation = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            computation = header[1]
            inside[computation] = Counter()
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            name, path = instruction[1], re.search(r'op_name="([^"]*)"', line)
            path = "" if path is None else path[1].partition(";")[0]  # of merged instructions the first
            found[name] = None if any(word in line for word in CONTAINERS) else path
            if path:
                inside[computation][path] += 1
            elif called := re.search(r"calls=%?([\w.\-]+)", line):
                calls[name] = called[1]
    for name, called in calls.items():
        if inside.get(called):
            found[name] = inside[called].most_common(1)[0][0]
    return found
