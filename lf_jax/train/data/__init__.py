"""What is trained on: the procedural world, folders of videos, folders of latents, prompts. `Source` says what they share."""

from lf_jax.train.data.folder import Folder
from lf_jax.train.data.latents import Latents
from lf_jax.train.data.prompts import Prompts
from lf_jax.train.data.source import Source, ahead
from lf_jax.train.data.world import World

__all__ = ["Folder", "Latents", "Prompts", "Source", "World", "ahead"]
