"""Captions of scenes, and back: a small grammar with paraphrases whose every sentence `parse` understands.

One table gives the phrases of every fact. `caption` chooses among them, `parse` looks them up, longest first.
"""

import dataclasses
import random
import re

from lf_jax.config import check
from lf_jax.world.scene import Scene
from lf_jax.world.settings import BACKGROUNDS, CAMERAS, COLOURS, HEADINGS, SHAPES, SIZES, SPEEDS, TINTS, WALLS


@dataclasses.dataclass(frozen=True)
class Thing:
    """What is said of an object, in the names of `settings`; None where nothing is said."""

    colour: str
    shape: str
    size: str | None = None
    speed: str | None = None
    heading: str | None = None  # at the start; None of what stands still
    hidden: bool | None = None  # True: passes behind the wall


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is said of a scene, in the names of `settings`; None where nothing is said. There are no more things than these."""

    things: tuple[Thing, ...]
    wall: str | None = None
    background: str | None = None
    tints: tuple[str, ...] = ()  # one of a plain background, two of others
    camera: str | None = None  # None also of a fixed one

    def __post_init__(self):
        colours = [thing.colour for thing in self.things]
        check(len(colours) > 0, "a scene needs at least one object: colour and shape")
        check(len(set(colours)) == len(colours), f"{colours=} must differ: in this world an object is known by its colour")
        wanted = {None: 0, "plain": 1}.get(self.background, 2)
        check(len(self.tints) == wanted, f"{self.tints=} must be {wanted} of {', '.join(TINTS)} for {self.background=}")


SAID = {  # what is said -> fact -> the ways to say it
    "count": {1: ("one shape",), 2: ("two shapes",), 3: ("three shapes",)},
    "size": {"small": ("small", "little"), "large": ("large", "big")},
    "colour": {colour: (colour,) for colour in COLOURS},
    "shape": {"circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",), "cross": ("cross", "plus")},
    "speed": {
        "still": ("stays still", "does not move", "rests"),
        "slow": ("drifts", "moves slowly", "creeps"),
        "fast": ("rushes", "moves fast", "races"),
        None: ("moves", "goes"),
    },
    "heading": {
        "right": ("right", "to the right"),
        "up right": ("up right", "up and right"),
        "up": ("up", "upwards"),
        "up left": ("up left", "up and left"),
        "left": ("left", "to the left"),
        "down left": ("down left", "down and left"),
        "down": ("down", "downwards"),
        "down right": ("down right", "down and right"),
    },
    "hidden": {True: ("hides behind the wall", "and hides behind the wall", "behind the wall")},
    "wall": {
        "standing": ("a dark wall stands still", "there is a dark wall"),
        "sliding": ("a dark wall slides across", "a dark wall moves by"),
    },
    "tint": {tint: (tint,) for tint in TINTS},
    "background": {
        "plain": ("background",),
        "gradient": ("gradient",),
        "stripes": ("stripes", "striped background"),
        "checker": ("checkerboard", "checks"),
    },
    "camera": {True: ("the camera pans", "the view moves")},
    "back": {True: ("and back", "and returns")},
}
FILLERS = {"a", "an", "and", "on", "over", "of", "from", "to", "plain"}


def facts(scene: Scene) -> Facts:
    """What the caption of a scene says. `scene` is one scene (`scenes[i]`), on the host or the device."""
    told = [[bool(x) for x in row] for row in scene.said]
    tells_wall, tells_background, tells_camera = (bool(x) for x in scene.said_of_all)
    wall, background, camera = WALLS[int(scene.wall)], BACKGROUNDS[int(scene.background)], CAMERAS[int(scene.camera)]
    tells_wall &= wall != "none"
    things = []
    for i in range(int(scene.count)):
        tells_size, tells_speed, tells_heading = told[i]
        speed = SPEEDS[int(scene.speed[i])]
        things.append(
            Thing(
                colour=[*COLOURS][int(scene.colour[i])],
                shape=SHAPES[int(scene.shape[i])],
                size=SIZES[int(scene.size[i])] if tells_size else None,
                speed=speed if tells_speed else None,
                heading=HEADINGS[int(scene.heading[i])] if tells_heading and speed != "still" else None,
                hidden=True if tells_wall and bool(scene.hidden[i]) else None,
            )
        )
    tints = [[*TINTS][int(tint)] for tint in scene.tints]
    return Facts(
        things=tuple(things),
        wall=wall if tells_wall else None,
        background=background if tells_background else None,
        tints=tuple(tints[: 1 if background == "plain" else 2] if tells_background else ()),
        camera=camera if tells_camera and camera != "fixed" else None,
    )


def caption(scene: Scene, seed: int) -> str:
    """One of the ways to say `facts(scene)`, chosen by `seed`. `scene` is one scene (`scenes[i]`)."""
    return phrase(facts(scene), seed)


def phrase(said: Facts, seed: int) -> str:
    """One of the ways to say `said`, chosen by `seed`; `parse` gives `said` back."""
    choose = random.Random(seed).choice
    things = [_thing(thing, choose) for thing in said.things]
    if choose((True, False)):
        sentences = things
    else:
        sentences = [" and ".join(filter(None, [", ".join(things[:-1]), things[-1]]))]
    if said.background is not None:
        ground = _background(said, choose)
        if choose((True, False)):
            sentences[0] = f"{choose(('on', 'over'))} {ground}, {sentences[0]}"
        else:
            shapes = choose(SAID["count"][len(said.things)])
            sentences.insert(0, f"{shapes} on {ground}")
    if said.wall is not None:
        sentences.insert(choose((0, len(sentences))), choose(SAID["wall"][said.wall]))
    if said.camera is not None:
        way, *back = said.camera.split(" and ")
        pan = f"{choose(SAID['camera'][True])} {choose(SAID['heading'][way])}"
        sentences.append(f"{pan} {choose(SAID['back'][True])}" if back else pan)
    text = " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)
    return text.replace(" a azure", " an azure")


def _thing(thing: Thing, choose) -> str:
    size = [choose(SAID["size"][thing.size])] if thing.size else []
    motion = []
    if thing.speed or thing.heading:
        motion.append(choose(SAID["speed"][thing.speed]))
    if thing.heading:
        motion.append(choose(SAID["heading"][thing.heading]))
    if thing.hidden:
        alone, joined, short = SAID["hidden"][True]
        motion.append(alone if not motion else joined if thing.speed == "still" else choose((joined, short)))
    return " ".join(["a", *size, thing.colour, choose(SAID["shape"][thing.shape]), *motion])


def _background(said: Facts, choose) -> str:
    first, second = said.tints[0], said.tints[-1]
    kind = choose(SAID["background"][said.background])
    if said.background == "plain":
        return f"{choose(('a', 'a plain'))} {first} {kind}"
    if said.background == "gradient":
        return choose((f"a {kind} from {first} to {second}", f"a {first} to {second} {kind}"))
    article = "" if kind in ("stripes", "checks") else "a "
    return f"{article}{first} and {second} {kind}"


LOOKUP = {tuple(way.split()): (what, fact) for what, ways in SAID.items() for fact in ways for way in ways[fact]}
LONGEST = max(map(len, LOOKUP))


def _tokens(text: str):
    """What the phrases of a text say, in order, fillers left out."""
    words = re.findall(r"[a-z]+", text.lower())
    while words:
        for length in range(LONGEST, 0, -1):
            found = LOOKUP.get(tuple(words[:length]))
            if found:
                yield found
                break
        else:
            check(words[0] in FILLERS, f"word {words[0]!r} in caption {text!r} is not of this world's language")
        del words[:length]


def parse(text: str) -> Facts:
    """What a caption says. Case and punctuation do not matter, nor the order of sentences.

    Raises:
        ValueError: if the text contains other words than captions do, or what no scene can show.
    """
    things, tints, said, pending = [], [], {}, {}
    about = None  # whom a heading belongs to: the camera or the last thing
    for what, fact in _tokens(text):
        if what in ("size", "colour"):
            pending[what] = fact
        elif what == "shape":
            check("colour" in pending, f"the {fact} in caption {text!r} needs a colour")
            about = {**pending, "shape": fact}
            things.append(about)
            pending = {}
        elif what == "camera":
            about = said
        elif what == "tint":
            tints.append(fact)
        elif what in ("speed", "heading", "hidden", "back"):
            belongs = about is not None and (what == "heading" or (what == "back") == (about is said))
            check(belongs, f"{what} in caption {text!r} must follow {'the camera' if what == 'back' else 'a shape'}")
            about[what] = fact
        else:
            said[what] = fact
    way, back, count = said.pop("heading", None), said.pop("back", False), said.pop("count", len(things))
    check(count == len(things), f"caption {text!r} counts {count} shapes and names {len(things)}")
    check(way in (None, "left", "right"), f"the camera of caption {text!r} must pan left or right, received {way}")
    camera = way and (f"{way} and back" if back else way)
    return Facts(tuple(Thing(**thing) for thing in things), tints=tuple(tints), camera=camera, **said)
