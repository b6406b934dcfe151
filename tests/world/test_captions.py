"""What captions say, and that `parse` reads it back."""

import dataclasses
import re

import jax
import pytest

from lf_jax.world import Facts, Thing, World, caption, facts, parse, phrase, sample

MANY = 2000


@pytest.fixture(scope="module")
def scenes():
    return jax.device_get(sample(World(), jax.random.split(jax.random.key(3), MANY)))


@pytest.fixture(scope="module")
def captions(scenes):
    return [caption(scenes[i], i) for i in range(MANY)]


def test_every_caption_is_read_back(scenes, captions):
    assert all(parse(captions[i]) == facts(scenes[i]) for i in range(MANY))


def test_paraphrases_say_the_same(scenes):
    for i in range(20):
        ways = {caption(scenes[i], seed) for seed in range(30)}
        assert len(ways) > 1
        assert {parse(way) for way in ways} == {facts(scenes[i])}


def test_case_punctuation_and_order_of_sentences_do_not_matter(captions):
    for text in captions[:100]:
        sentences = text.rstrip(".").split(". ")
        assert parse(text.upper().replace(".", " ;")) == parse(text)
        if len(re.findall("circle|disc|square|box|triangle|cross|plus", text)) == 1:
            assert parse(". ".join(reversed(sentences))) == parse(text)


def test_captions_suit_a_small_tokenizer(captions):
    words = [re.findall(r"[A-Za-z]+|[.,]", text) for text in captions]
    assert max(map(len, words)) < 64
    assert len({word for text in words for word in text}) < 100


def test_everything_is_said_somewhere_and_left_out_elsewhere(scenes):
    said = [facts(scenes[i]) for i in range(MANY)]
    assert {len(f.things) for f in said} == {1, 2, 3}
    for name, number in (("wall", 3), ("background", 5), ("camera", 5)):
        assert len({getattr(f, name) for f in said}) == number
    for name, number in (("colour", 6), ("shape", 4), ("size", 3), ("speed", 4), ("heading", 9), ("hidden", 2)):
        assert len({getattr(thing, name) for f in said for thing in f.things}) == number


def test_without_mention_only_colours_and_shapes_are_said():
    scenes = jax.device_get(sample(World(mention=(0.0, 0.0)), jax.random.split(jax.random.key(0), 100)))
    said = [facts(scenes[i]) for i in range(100)]
    assert said == [Facts(tuple(Thing(t.colour, t.shape) for t in f.things)) for f in said]


def test_an_example():
    text = (
        "On a white to grey gradient, a small red circle races up and left and a green cross. The camera pans right and back."
    )
    said = Facts(
        (Thing("red", "circle", "small", "fast", "up left"), Thing("green", "cross")),
        background="gradient",
        tints=("white", "grey"),
        camera="right and back",
    )
    assert parse(text) == said
    assert parse(phrase(dataclasses.replace(said, camera=None), 5)).camera is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("A red circle juggles.", "'juggles'"),
        ("A small circle.", "needs a colour"),
        ("Two shapes. A red circle.", "counts 2 shapes and names 1"),
        ("A red circle. A red square.", "must differ"),
        ("The camera pans up. A red circle.", "left or right"),
        ("Drifts left.", "must follow a shape"),
        ("A red circle and back.", "must follow the camera"),
        ("A red circle on white checks.", "must be 2"),
        ("On a white background.", "at least one object"),
    ],
)
def test_what_no_scene_shows_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
