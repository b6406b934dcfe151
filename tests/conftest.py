"""Tests run on CPU in full float32 and check every shape annotation of the library."""

import os

if "LF_JAX_TEST_GPU" not in os.environ:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Most of a test's time is compilation: by the emitters that compile fastest, and in one piece.
    flags = (
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # commands keep what they compile: not that of tests

# Interpreted kernels block a thread of XLA's pool at every barrier; one pool thread per core is too few on a small machine.
os.environ.setdefault("NPROC", "8")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["lf_jax", "convert"], "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
