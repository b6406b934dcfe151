"""What is kept on disk: converted models, one folder each, and states of a rollout, one file each."""

from lf_jax.checkpoint.component import (
    COMPONENTS,
    abstract,
    build,
    check_component,
    components,
    flatten,
    load_component,
    load_config,
    load_notes,
    load_part,
    save_component,
    save_settings,
    shapes,
)
from lf_jax.checkpoint.state import load_state, save_state

__all__ = [
    "COMPONENTS",
    "abstract",
    "build",
    "check_component",
    "components",
    "flatten",
    "load_component",
    "load_config",
    "load_notes",
    "load_part",
    "load_state",
    "save_component",
    "save_settings",
    "save_state",
    "shapes",
]
