"""`lf-jax parity`."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
from rich.console import Console
from rich.table import Table

from lf_jax import checkpoint, parity
from lf_jax.commands import console

AGREES, DIFFERS = 0, 1


@dataclasses.dataclass(frozen=True)
class Parity:
    """Compare a converted model with what another implementation computed.

    The other side is a dump of `tools/dump_torch.py`: inputs, noise, outputs of blocks and of whole passes, latents.
    Ours computes the same from the same inputs; the first tensor that is further off than the tolerance is named. The
    exit code is 0 if there is none, 1 if there is one, 2 if the comparison could not be made.
    """

    dump: Path
    """The safetensors file that tools/dump_torch.py wrote."""
    model: Path
    """A converted folder (lf-jax convert) of the same checkpoint."""
    tolerance: float = 1e-4
    """Relative Euclidean error that a tensor may have. 1e-4 suits float32, 3e-2 a dump made in bfloat16."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of our parameters and activations."""

    def run(self) -> int:
        dump = parity.read(self.dump)
        settings = parity.settings_for(dump, checkpoint.load_config(self.model), self.dtype)
        console.show_config(settings, dump=self.dump, made_by=dump.source, model=self.model)
        _, model = checkpoint.load_component(self.model, "dit", dtype=self.dtype)
        with jax.default_matmul_precision("highest"), console.progress() as bar:  # GPUs round float32 otherwise
            rows = tuple(bar.track(parity.replay(model, dump, settings), description="comparing"))
        report = parity.Report(rows, self.tolerance)
        print_rows(report)
        return DIFFERS if report.diverged else AGREES


def print_rows(report: parity.Report) -> None:
    """A row a tensor, in the order of computation, then the verdict."""
    table = Table("tensor", "max abs", "relative L2", "alone", "cosine", box=None, pad_edge=False)
    for row in report.rows:
        over = not row.error <= report.tolerance
        alone = "" if row.alone is None else f"{row.alone:.2e}"
        cells = (row.name, f"{row.max_abs:.2e}", f"{row.relative:.2e}", alone, f"{row.cosine:.9f}")
        table.add_row(*cells, style="red" if over else None)
    Console(highlight=False).print(table)
    print(f"{len(report.rows)} tensors; the largest error is {report.worst.error:.2e}, of {report.worst.name}")
    if report.diverged is None:
        print(f"AGREES within {report.tolerance:g}")
    else:
        print(f"DIFFERS: first over {report.tolerance:g} is {report.diverged.name}, off by {report.diverged.error:.2e}")
