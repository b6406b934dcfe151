"""What an attention policy costs in quality: policies on the same prompts and noise, measured, and a page to look at.

`lf-jax eval` runs it; `study` is the story. `policies` says what is compared, `forcing` and `probe` look inside the
network, `pixels` and `lf_jax.world` at the videos, `statistics` and `summary` make means with intervals of it, and `page`
shows them.
"""
