"""`lf-jax COMMAND ...`: argv to a command and its config, errors to one line.

Every setting has a default from a preset, a Python file or a converted folder (`--config`, `--model`), and any field of
it can be given on the command line: `--rollout.shift 8 --cache.window 12`.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import tyro

from lf_jax import compilation
from lf_jax.commands.console import note
from lf_jax.config import Config, check

COMMANDS = {  # imported when called for: each brings its own part of the library
    "sample": ("lf_jax.commands.sample", "Sample"),
    "stream": ("lf_jax.commands.stream", "Stream"),
    "encode": ("lf_jax.commands.encode", "Encode"),
    "latents": ("lf_jax.commands.latents", "Latents"),
    "convert": ("lf_jax.commands.checkpoints", "Convert"),
    "quantise": ("lf_jax.commands.checkpoints", "Quantise"),
    "export": ("lf_jax.commands.checkpoints", "Export"),
    "parity": ("lf_jax.commands.parity", "Parity"),
    "train": ("lf_jax.commands.train", "Train"),
    "warmup": ("lf_jax.commands.warmup", "Warmup"),
    "plan": ("lf_jax.commands.plan", "Plan"),
    "doctor": ("lf_jax.commands.doctor", "Doctor"),
    "bench": ("lf_jax.commands.bench", "Bench"),
    "eval": ("lf_jax.commands.evaluate", "Eval"),
}
CACHE = "--compilation-cache"
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

_rules = tyro.constructors.ConstructorRegistry()


@_rules.primitive_rule
def _policy(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """`sparsity.policy` is a name on the command line, and may be a function in Python."""
    if info.type != str | Callable:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str) or callable(value),
        str_from_instance=lambda value: [value if isinstance(value, str) else value.__name__],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 out of memory, 2 bad input, 130 interrupted, or the command's own.

    A wrong value, file or folder ends in one line that names it. `--traceback` shows where it was found. All programs that a
    command compiles are kept for the next one (`lf_jax.compilation`), in the folder `--compilation-cache` if it is given.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if words[-1:] == [CACHE]:
        return _fail(f"{CACHE} needs a folder")
    kept, words = _option(words, CACHE), _without(words, CACHE)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, *words = words
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; the commands are {', '.join(COMMANDS)}")
    compilation.use_cache(kept)
    try:
        with _terminate_as_interrupt():
            return parse(name, words).run() or 0
    except BrokenPipeError:  # `| head` has seen enough; what the interpreter flushes at exit must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        note(f"lf-jax {name}: interrupted")
        return INTERRUPTED
    except (ValueError, NotImplementedError, OSError) as error:
        if traceback:
            raise
        return _fail(f"lf-jax {name}: error: {describe(error)}")
    except jax.errors.JaxRuntimeError as error:
        if traceback or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first, *_ = str(error).splitlines()
        note(f"lf-jax {name}: the device is out of memory; `lf-jax plan` shows what takes how much ({first})")
        return FAILED
    except SystemExit as stop:  # of the parser: 0 after --help, 2 after a wrong option
        return stop.code or 0


def parse(name: str, words: Sequence[str]):
    """The command `name` with its options from `words`; the config they start from is read first.

    Raises:
        ValueError: if `--config` or `--model` names nothing that can be read, or there is a negative prompt without use.
        SystemExit: after `--help`, and after options that do not parse.
    """
    command = load_command(name)
    cli = functools.partial(tyro.cli, args=list(words), prog=f"lf-jax {name}", registry=_rules)
    if "settings" not in {field.name for field in dataclasses.fields(command)}:
        return cli(command)
    if hasattr(command, "defaults"):  # its settings are more than a Config
        return cli(functools.partial(command, settings=command.defaults(_option(words, "--config"))))
    base = _base_config(*(_option(words, name) for name in ("--config", "--model", "--vae"))) or Config()
    parsed = cli(functools.partial(command, settings=base))
    video, scale = parsed.settings.video, parsed.settings.rollout.guidance_scale
    check(
        video.negative_prompt == base.video.negative_prompt or scale != 1,
        f"--video.negative-prompt {video.negative_prompt!r} has no use at --rollout.guidance-scale {scale:g}",
    )
    return parsed


def overview() -> str:
    """What `lf-jax --help` prints."""
    lines = [
        "usage: lf-jax COMMAND [OPTIONS] [--traceback] [--compilation-cache DIR]",
        "       lf-jax COMMAND --help explains a command",
        "",
    ]
    for name in COMMANDS:
        lines.append(f"  {name:<8} {load_command(name).__doc__.splitlines()[0]}")
    return "\n".join(lines)


def load_command(name: str) -> type:
    module, attribute = COMMANDS[name]
    return getattr(importlib.import_module(module), attribute)


def describe(error: BaseException) -> str:
    """An error as a user should read it: for files, the name and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _base_config(config: str | None, model: str | None, vae: str | None) -> Config | None:
    """The config before overrides: the parts that a model fixes are the model's, the rest is `--config`'s or the model's."""
    from lf_jax import loading, presets

    chosen = None if config is None else presets.load(config)
    if model is None:
        return chosen
    return loading.config_of(model, chosen, vae)


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of an option before the parser proper runs, in both of its spellings; the last one counts."""
    found = None
    for at, word in enumerate(words):
        if word == name and words[at + 1 :]:
            found = words[at + 1]
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def _without(words: Sequence[str], name: str) -> list[str]:
    """`words` without an option and its value."""
    return [word for before, word in zip(["", *words], words, strict=False) if name not in (before, word.partition("=")[0])]


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """A terminated command cleans up as an interrupted one does."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str) -> int:
    note(message)
    return BAD_INPUT
