"""What stands around attention at the shapes at which it matters: the 1.3B transformer and the decoders at 512x768 pixels.

A transformer's call has three frames of 1536 tokens; a decoder's, the twelve frames that three latent ones become. All numbers
are normal, in bfloat16, and all methods of an `Operation` are pure functions of the arrays that it draws.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import fused
from pallas_kernels.conv import convolve
from pallas_kernels.linear import Quantised, linear, quantise_rows, reach
from pallas_kernels.runs import CALLS

Arrays = dict[str, Any]
EPS, FRAMES = 1e-6, 3
F32 = jnp.float32


class Operation:
    """A row of the table: a frozen dataclass of shapes and of what is fused in."""

    kernel = "hopper"  # the implementation that is ours
    unit, calls = "TFLOP/s", CALLS
    name: str
    work: int  # operations or, where the unit says so, bytes that have to be read and written once

    def draw(self, normal: Callable) -> Arrays:
        """The arguments of a call; normal(*shape, dtype=bfloat16) draws an array."""
        raise NotImplementedError

    def ours(self, a: Arrays, implementation: str) -> Any:
        raise NotImplementedError

    def xla(self, a: Arrays) -> Any:
        return self.ours(a, "xla")

    def compared(self, a: Arrays, outputs: Any) -> tuple[Any, Any]:
        """What the outputs hold and what they should, without a residual; arguments and outputs are those of `full`."""
        return outputs, self.xla(a)

    def speed(self, ms: float) -> float:
        return self.work / ms / (1e9 if self.unit == "TFLOP/s" else 1e6)


@partial(jax.jit, static_argnums=0)
def arguments(operation: Operation, seed: int) -> Arrays:
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    return operation.draw(lambda *shape, dtype=jnp.bfloat16: jax.random.normal(next(keys), shape, dtype))


def full(tree: Any) -> Any:
    """All arrays in float32; what is quantised, as the numbers that it stands for."""

    def widened(x: Any) -> jax.Array:
        return x.values.astype(F32) * x.scale[..., None] if isinstance(x, Quantised) else x.astype(F32)

    return jax.tree.map(widened, tree, is_leaf=lambda x: isinstance(x, Quantised))


def _some(a: Arrays, *names: str) -> Arrays:
    return {name: a[name] for name in names if name in a}


def _vectors(normal: Callable, width: int) -> Arrays:
    """Of the modulation of every frame."""
    return {name: normal(1, FRAMES, width, dtype=F32) / 4 for name in ("shift", "scale")}


def dense(x, w, bias, *, gelu=False, gate=None, residual=None):
    """A linear layer as one writes it, in the dtype of `x`, with `w` [in, out]; the others as in `pallas_kernels.linear`."""
    y = x @ w + bias
    y = jax.nn.gelu(y) if gelu else y
    if gate is not None:
        y = (y.reshape(*gate.shape[:2], -1, y.shape[-1]).astype(F32) * gate[:, :, None]).reshape(y.shape)
    return (y if residual is None else residual + y).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Linear(Operation):
    tokens: int
    inputs: int
    outputs: int
    then: str = ""  # "gelu", and quantised for the next layer; or "gate", and the residual
    quantise: bool = False  # whether the network has to, before this layer
    plain: bool = False  # bfloat16 on both sides; ours reads the second of a stack of layers, as in the network

    @property
    def name(self) -> str:
        fused_in = (word for word in ("bf16" if self.plain else "", "quantise" if self.quantise else "", self.then) if word)
        return "-".join(("linear", f"{self.tokens}x{self.inputs}x{self.outputs}", *fused_in))

    @property
    def work(self) -> int:
        return 2 * self.tokens * self.inputs * self.outputs

    def draw(self, normal):
        x, bias = normal(1, self.tokens, self.inputs), normal(self.outputs) / 8
        w = normal(self.inputs, self.outputs) * self.inputs**-0.5
        a = {"x": x, "w": w, "bias": bias}
        if self.plain:
            a |= {"stack": jnp.stack([w / 2, w]), "biases": jnp.stack([bias / 2, bias])}
        else:
            w8 = quantise_rows(w.T)
            a |= {"x8": quantise_rows(x), "w8": w8, "reach": reach(w8, bias)}
        if self.then == "gate":
            a |= {"gate": normal(1, FRAMES, self.outputs, dtype=F32), "residual": normal(1, self.tokens, self.outputs)}
        return a

    def ours(self, a, implementation):
        more = _some(a, "gate", "residual")
        if self.plain:
            more |= {"activation": "gelu"} if self.then == "gelu" else {}
            stack = a["stack"], a["biases"]
            return linear(a["x"], *stack, layer=jnp.int32(1), implementation=implementation, **more)
        x = fused.quantise(a["x"]) if self.quantise else a["x8"]
        if self.then == "gelu":
            more = {"activation": "gelu", "quantise": True, "reach": a["reach"]}
        return linear(x, a["w8"], a["bias"], implementation=implementation, **more)

    def xla(self, a):
        return dense(a["x"], a["w"], a["bias"], gelu=self.then == "gelu", **_some(a, "gate", "residual"))

    def compared(self, a, outputs):
        return outputs - a.pop("residual", 0), self.xla(a)


@dataclasses.dataclass(frozen=True)
class FeedForward(Operation):
    """Norm, modulation, linear layer, GELU, linear layer, gate, residual."""

    tokens: int
    width: int
    hidden: int
    plain: bool = False  # as in `Linear`

    @property
    def name(self) -> str:
        return f"feed-forward-{self.tokens}x{self.width}x{self.hidden}" + ("-bf16" if self.plain else "")

    @property
    def work(self) -> int:
        return 4 * self.tokens * self.width * self.hidden

    def draw(self, normal):
        up, down = (layer.draw(normal) for layer in self._layers())
        return {"x": down.pop("residual"), "up": up, "down": down, **_vectors(normal, self.width)}

    def ours(self, a, implementation):
        up, down, layer = a["up"], a["down"], partial(linear, implementation=implementation)
        x = fused.norm_modulate(a["x"], a["shift"], a["scale"], eps=EPS, quantise=not self.plain)
        if self.plain:
            first, second = self._layers()
            x = first.ours(up | {"x": x}, implementation)
            return second.ours(down | {"x": x, "residual": a["x"]}, implementation)
        x = layer(x, up["w8"], up["bias"], activation="gelu", quantise=True, reach=up["reach"])
        return layer(x, down["w8"], down["bias"], gate=down["gate"], residual=a["x"])

    def xla(self, a):
        return a["x"] + self._added(a)

    def compared(self, a, outputs):
        return outputs - a["x"], self._added(a)

    def _layers(self) -> tuple[Linear, Linear]:
        up = Linear(self.tokens, self.width, self.hidden, "gelu", plain=self.plain)
        return up, Linear(self.tokens, self.hidden, self.width, "gate", plain=self.plain)

    def _added(self, a: Arrays) -> jax.Array:
        up, down = a["up"], a["down"]
        x = fused.norm_modulate(a["x"], a["shift"], a["scale"], eps=EPS, implementation="xla")
        return dense(dense(x, up["w"], up["bias"], gelu=True), down["w"], down["bias"], gate=down["gate"])


@dataclasses.dataclass(frozen=True)
class NormModulate(Operation):
    tokens: int
    width: int
    quantise: bool

    kernel, unit = "triton", "GB/s"

    @property
    def name(self) -> str:
        return f"norm_modulate-{self.tokens}x{self.width}-{'fp8' if self.quantise else 'bf16'}"

    @property
    def work(self) -> int:
        return (3 if self.quantise else 4) * self.tokens * self.width

    def draw(self, normal):
        return {"x": normal(1, self.tokens, self.width), **_vectors(normal, self.width)}

    def ours(self, a, implementation):
        return fused.norm_modulate(**a, eps=EPS, quantise=self.quantise, implementation=implementation)

    def compared(self, a, outputs):
        return outputs, dataclasses.replace(self, quantise=False).xla(a)


@dataclasses.dataclass(frozen=True)
class Quantise(Operation):
    tokens: int
    width: int

    kernel, unit = "triton", "GB/s"

    @property
    def name(self) -> str:
        return f"quantise-{self.tokens}x{self.width}"

    @property
    def work(self) -> int:
        return 3 * self.tokens * self.width

    def draw(self, normal):
        return {"x": normal(1, self.tokens, self.width)}

    def ours(self, a, implementation):
        return fused.quantise(a["x"], implementation=implementation)

    def compared(self, a, outputs):
        return outputs, a["x"]


@dataclasses.dataclass(frozen=True)
class NormRope(Operation):
    """Of the keys, which lie between queries and values."""

    tokens: int
    width: int
    heads: int
    block: int | None = None  # tokens of a block whose mean is asked for

    kernel, unit = "triton", "GB/s"

    @property
    def name(self) -> str:
        return f"norm_rope-{self.tokens}x{self.width}" + (f"-means-{self.block}" if self.block else "")

    @property
    def work(self) -> int:
        """The angles' too, in float32."""
        return 4 * self.tokens * (self.width + self.width // self.heads)

    def draw(self, normal):
        angles = 9 * normal(self.tokens, self.width // self.heads // 2, dtype=F32)
        a = {"x": normal(1, self.tokens, 3 * self.width), "weight": 1 + normal(self.width) / 8}
        return a | {"cos": jnp.cos(angles), "sin": jnp.sin(angles)}

    def ours(self, a, implementation):
        return fused.norm_rope(**a, heads=self.heads, eps=EPS, part=1, block=self.block, implementation=implementation)


@dataclasses.dataclass(frozen=True)
class Conv(Operation):
    decoder: str
    frames: int
    rows: int
    columns: int
    inputs: int
    outputs: int
    then: str = ""  # "norm", with SiLU, or "residual"
    upsample: bool = False  # first, and then over rows and columns only

    calls = 1

    @property
    def name(self) -> str:
        fused_in = (word for word in ("upsample" if self.upsample else "", self.then) if word)
        shape = f"{self.frames}x{self.rows}x{self.columns}-{self.inputs}-{self.outputs}"
        return "-".join(("conv", self.decoder, shape, *fused_in))

    @property
    def work(self) -> int:
        """As it is defined: after an upsampling our kernel gets by with four products for nine."""
        taps, pixels = (9, 4) if self.upsample else (27, 1)
        return 2 * taps * pixels * self.frames * self.rows * self.columns * self.inputs * self.outputs

    def draw(self, normal):
        image, taps = (self.rows, self.columns), 1 if self.upsample else 3
        kernel = normal(taps, 3, 3, self.inputs, self.outputs) * (9 * taps * self.inputs) ** -0.5
        a = {"x": normal(1, self.frames, *image, self.inputs), "kernel": kernel, "bias": normal(self.outputs) / 8}
        if not self.upsample:
            a["past"] = normal(1, 2, *image, self.inputs)
        if self.then == "norm":
            a["scale"] = 1 + normal(self.outputs) / 8
        if self.then == "residual":
            a["residual"] = normal(1, self.frames, *image, self.outputs)
        return a

    def ours(self, a, implementation):
        eps = {"eps": EPS} if "scale" in a else {}
        return convolve(**a, **eps, upsample=self.upsample, implementation=implementation)

    def compared(self, a, outputs):
        """Of the last frame: all of them in float32 would take long."""
        x, residual = a["x"], a.pop("residual", jnp.zeros(()))
        last = a | {"x": x[:, -1:]} | ({} if self.upsample else {"past": x[:, -3:-1]})
        return (outputs - residual)[:, -1:], self.xla(last)


def _convolutions(decoder: str, base: int) -> tuple[Conv, ...]:
    conv, two, four = partial(Conv, decoder), 2 * base, 4 * base
    return (
        *(conv(3, 64, 96, four, four, then) for then in ("norm", "residual")),
        conv(6, 64, 96, four, two, upsample=True),
        *(conv(6, 128, 192, four, four, then) for then in ("norm", "residual")),
        conv(12, 128, 192, four, two, upsample=True),
        *(conv(12, 256, 384, two, two, then) for then in ("norm", "residual")),
        conv(12, 256, 384, two, base, upsample=True),
        *(conv(12, 512, 768, base, base, then) for then in ("norm", "residual")),
        conv(12, 512, 768, base, 3),
    )


def _transformer(tokens: int, width: int, hidden: int, heads: int, blocks: tuple[int, ...]) -> tuple[Operation, ...]:
    return (
        Linear(tokens, width, 3 * width),
        Linear(tokens, width, width, "gate", quantise=True),
        Linear(tokens, width, hidden, "gelu"),
        Linear(tokens, hidden, width, "gate"),
        FeedForward(tokens, width, hidden),
        *(Linear(tokens, *shape, plain=True) for shape in ((width, 3 * width), (width, width, "gate"))),
        *(Linear(tokens, *shape, plain=True) for shape in ((width, hidden, "gelu"), (hidden, width, "gate"))),
        FeedForward(tokens, width, hidden, plain=True),
        *(NormModulate(tokens, width, quantise) for quantise in (False, True)),
        Quantise(tokens, width),
        *(NormRope(tokens, width, heads, block) for block in (None, *blocks)),
    )


OPERATIONS = (
    *_transformer(4608, 1536, 8960, 12, (128, 64)),
    *(conv for decoder, base in (("wan", 96), ("light", 24)) for conv in _convolutions(decoder, base)),
)
# For trying the command on any machine.
SMALL = (
    *_transformer(384, 128, 256, 2, (64,)),
    Conv("small", 3, 8, 64, 16, 16, "norm"),
    Conv("small", 3, 8, 64, 16, 16, "residual"),
    Conv("small", 3, 8, 64, 16, 8, upsample=True),
    Conv("small", 3, 8, 64, 16, 3),
)
