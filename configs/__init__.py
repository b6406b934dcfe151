"""Presets: Python files that each end in `CONFIG = Config(...)`. `lf-jax` finds them by file name; copies in any folder work as well."""
