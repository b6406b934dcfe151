"""Tests run on CPU in full float32 and check every shape annotation of the library."""

import os

if "gpu" not in os.environ.get("PYTEST_ADDOPTS", "") and "LF_JAX_TEST_GPU" not in os.environ:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook(["lf_jax", "convert"], "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
