"""What `lf-jax` can do: each command is a frozen dataclass of its options with a method `run`."""
