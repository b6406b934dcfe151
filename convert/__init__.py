"""PyTorch checkpoints to and from lf_jax. The only place that may import torch (in `reader`)."""
