"""Where models come from: a converted folder, or random weights of a preset. Components are loaded when asked for."""

import dataclasses
import os
import pathlib

import jax
from flax import nnx

from lf_jax import checkpoint, presets
from lf_jax import vae as vaes
from lf_jax.checkpoint import component
from lf_jax.config import Config, Model, Text, Vae, check
from lf_jax.dit import WanDiT
from lf_jax.text import UMT5, Tokenizer, fingerprint, tiny_model

SPIECE = "spiece.model"  # the tokenizer, beside the text encoder it belongs to
COMPONENT_PARTS = {"dit": "model", "vae": "vae", "text": "text"}
SHIPPED = pathlib.Path(__file__).with_name("assets")  # model folders that come with the package, by the preset they are of


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that can be loaded component by component.

    Attributes:
        folder: converted weights; None for random ones.
        seed: of random weights.
        vae_folder: converted weights that the autoencoder has in place of those.
    """

    config: Config
    folder: pathlib.Path | None
    seed: int = 0
    vae_folder: pathlib.Path | None = None

    def check(self, *names: str) -> None:
        """Raises ValueError if a component is missing, truncated or of another size: cheap, so it comes before long work."""
        for name in names:
            if (place := self.place(name)) is not None:
                checkpoint.check_component(place, name)

    def dit(self) -> WanDiT:
        return self._load("dit")

    def vae(self) -> vaes.Vae:
        return self._load("vae")

    def text(self) -> tuple[UMT5, Tokenizer]:
        """The text encoder and its tokenizer. Random weights read prompts with the tiny preset's 512 pieces."""
        part = self.config.text
        spiece = tiny_model() if self.folder is None else self.folder / "text" / SPIECE
        tokenizer = Tokenizer(spiece, length=part.length, vocab=part.vocab)  # first: cheap, and may be what is missing
        return self._load("text"), tokenizer

    def fingerprint(self, encoder: UMT5 | None = None, tokenizer: Tokenizer | None = None) -> str | None:
        """What embedding files are marked with. None where it would take loading an encoder that is not given."""
        place = None if self.folder is None else self.folder / "text"
        if place is not None and (place / component.TENSORS).is_file():
            return fingerprint(self.config.text, (place / SPIECE).read_bytes(), place / component.TENSORS)
        return None if encoder is None else fingerprint(self.config.text, tokenizer.model, checkpoint.flatten(encoder))

    def _load(self, name: str) -> nnx.Module:
        part, place = getattr(self.config, COMPONENT_PARTS[name]), self.place(name)
        if place is None:
            return random_module(part, self.seed)
        return checkpoint.load_component(place, name, dtype=part.dtype, linears=getattr(part, "linears", None))[1]

    def place(self, name: str) -> pathlib.Path | None:
        """The folder that holds a component; None where it has random weights."""
        return self.vae_folder if name == "vae" and self.vae_folder is not None else self.folder


def shipped(source: str | os.PathLike) -> str | os.PathLike:
    """The model folder of a preset whose weights come with the package; any other source as it is."""
    folder = SHIPPED / str(source)
    return folder if presets.is_name(source) and folder.is_dir() else source


def find(
    source: str | os.PathLike,
    settings: Config | None = None,
    seed: int | None = None,
    vae: str | os.PathLike | None = None,
) -> Source:
    """The source of a converted folder or a preset; a preset's name means the preset, `./name` a folder of that name.

    A preset has the weights that come with the package, or random ones.

    Args:
        settings: in place of the source's own config. Of the models themselves only the dtype may differ, and
            the form of the linear layers (`Model.linears`).
        seed: of a preset's random weights; None means 0.
        vae: another autoencoder than the source's own: a converted folder that holds one, or of a preset with random
            weights a name of `lf_jax.vae.PARTS`.

    Raises:
        ValueError: if there is no such folder or preset, `settings` describe other models than the folder holds, or a
            folder comes with a seed.
    """
    source = shipped(source)
    own, random = config_of(source, vae=vae), presets.is_name(source)
    check(random or seed is None, f"a seed of random weights ({seed}) has no use: {source} is a converted folder")
    place = None if vae is None or vae in vaes.PARTS else pathlib.Path(vae)
    found = Source(settings or own, None if random else pathlib.Path(source), seed or 0, place)
    for name, part in COMPONENT_PARTS.items():
        fixed = found.place(name) or (vae if name == "vae" else None)
        ours, theirs = (getattr(c, part) for c in (found.config, own))
        differing = [
            f"{part}.{f.name}={getattr(ours, f.name)!r} but {fixed} has {getattr(theirs, f.name)!r}"
            for f in dataclasses.fields(ours)
            if f.name not in ("dtype", "linears") and getattr(ours, f.name) != getattr(theirs, f.name)
        ]
        check(fixed is None or not differing, "; ".join(differing))
    return found


def config_of(source: str | os.PathLike, chosen: Config | None = None, vae: str | os.PathLike | None = None) -> Config:
    """The config of a converted folder or a preset. With `chosen`, its models with the other settings of `chosen`.

    Args:
        vae: as in `find`.

    Raises:
        ValueError: if there is no such folder or preset.
    """
    source = shipped(source)
    if presets.is_name(source):
        own = presets.load(source)
    else:
        path = pathlib.Path(source)
        check(
            path.exists(),
            f"model {str(source)!r} is neither a folder nor a preset; the presets are {', '.join(presets.names())}",
        )
        check(path.is_dir(), f"model {path} is a file; `lf-jax convert` makes a folder of a checkpoint file")
        own = checkpoint.load_config(path)
    if vae is not None:
        own = dataclasses.replace(own, vae=_autoencoder(source, own.vae, vae))
    if chosen is None:
        return own
    return dataclasses.replace(chosen, **{part: getattr(own, part) for part in COMPONENT_PARTS.values()})


def _autoencoder(source: str | os.PathLike, own: Vae, chosen: str | os.PathLike) -> Vae:
    """The chosen autoencoder of a source that has another one of its own."""
    if chosen in vaes.PARTS:
        check(
            presets.is_name(source),
            f"vae={chosen!r} has random weights, and {source} is a converted folder: expected a folder with that autoencoder, "
            "which `lf-jax convert` makes",
        )
        return dataclasses.replace(vaes.PARTS[chosen], dtype=own.dtype)
    known = ", ".join(vaes.PARTS)
    check(pathlib.Path(chosen).is_dir(), f"vae={str(chosen)!r} must be a converted folder, or with a preset one of {known}")
    return checkpoint.load_part(chosen, "vae")


def random_module(part: Model | Vae | Text, seed: int) -> nnx.Module:
    """A component with random weights, drawn on the device by one program."""
    return drawing(part)(jax.random.key(seed))


def drawing(part: Model | Vae | Text) -> jax.stages.Wrapped:
    """The jitted function from a key to a component's random weights."""
    constructor = {Model: WanDiT, Vae: vaes.build, Text: UMT5}[type(part)]
    # The program is long and runs once: on a CPU optimising it takes several times as long as running it as it is.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quick if jax.default_backend() == "cpu" else None
    return jax.jit(lambda key: constructor(part, rngs=nnx.Rngs(key)), compiler_options=options)
