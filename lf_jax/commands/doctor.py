"""`lf-jax doctor`."""

import dataclasses
import json
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from lf_jax import doctor
from lf_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say what this machine has, and which implementation of every operation will run here, and why.

    Example: lf-jax doctor --config light_forcing_1_3b
    """

    model: str | None = None  # converted folder or preset whose settings are meant
    config: str | None = None  # preset or Python file with the settings, in place of those of the model
    json: bool = False  # machine-readable
    settings: Annotated[Config, tyro.conf.arg(name="")] = Config()

    def run(self) -> None:
        report = doctor.examine(self.settings)
        if self.json:
            print(json.dumps(dataclasses.asdict(report), indent=2))
            return
        console = Console()
        console.print(report.device, highlight=False)
        table = Table("operation", "runs", "because")
        for operation in report.operations:
            table.add_row(operation.name, operation.choice, "\n".join(operation.reasons))
        console.print(table)
        for name, measured in report.tuning.items():
            console.print(f"{name}: {measured}", highlight=False)
        table = Table("package", "version", "")
        for name, version in report.versions.items():
            table.add_row(name, version or "MISSING", "required")
        for name, version in report.optional.items():
            table.add_row(name, version or "not installed", doctor.OPTIONAL[name])
        console.print(table)
        for name, value in report.environment.items():
            console.print(f"{name}={value}", highlight=False)
