"""`python -m lf_jax` is `lf-jax`."""

import sys

from lf_jax.cli import main

sys.exit(main())
