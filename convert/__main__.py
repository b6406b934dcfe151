"""`python -m convert FAMILY SOURCE TARGET` is `lf-jax convert FAMILY SOURCE TARGET`."""

import sys

from lf_jax.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
