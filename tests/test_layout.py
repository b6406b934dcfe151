"""The architecture, written down once: imports only go down, and no source file is longer than 400 lines."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = [  # bottom first; the longest matching prefix places a module
    ["pallas_kernels", "lf_jax.config", "lf_jax.arrays"],
    [
        "lf_jax.layers",
        "lf_jax.rope",
        "lf_jax.quant",
        "lf_jax.cache",
        "lf_jax.flow",
        "lf_jax.solvers",
        "lf_jax.tokens",
        "lf_jax.noise",
        "lf_jax.compilation",
        "lf_jax.video",
        "lf_jax.world",
    ],
    ["lf_jax.sparsity"],
    ["lf_jax.attention"],
    ["lf_jax.dit", "lf_jax.vae", "lf_jax.text"],
    ["lf_jax.chunk", "lf_jax.rollout", "lf_jax.checkpoint"],
    [
        "lf_jax.presets",
        "lf_jax.loading",
        "lf_jax.inputs",
        "lf_jax.generate",
        "lf_jax.pipeline",
        "lf_jax.plan",
        "lf_jax.programs",
        "lf_jax.doctor",
        "lf_jax.parity",
        "lf_jax.evaluate",
        "lf_jax.train",
    ],
    ["lf_jax", "lf_jax.cli", "lf_jax.commands", "convert", "configs"],
]
APART = ["lf_jax.dit", "lf_jax.vae", "lf_jax.text"]  # of one layer, and may not import each other
FILES = [path for top in ("lf_jax", "pallas_kernels", "convert", "configs") for path in sorted((ROOT / top).rglob("*.py"))]


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(module: str, names: list[str]) -> str | None:
    """The longest of `names` that is `module` or a package around it."""
    return max((n for n in names if module == n or module.startswith(n + ".")), key=len, default=None)


def layer(module: str) -> int | None:
    name = place(module, [n for names in LAYERS for n in names])
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) else node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    mine = module_of(path)
    assert layer(mine) is not None, f"{mine} is in no layer: add it to LAYERS"
    for other in imports(path):
        if layer(other) is None:
            continue
        assert layer(other) <= layer(mine), f"{mine} (layer {layer(mine)}) imports {other} (layer {layer(other)})"
        apart = {place(mine, APART), place(other, APART)} - {None}
        assert len(apart) < 2, f"{mine} imports {other}: these folders stand apart"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_two_files_import_torch():
    guilty = [str(p.relative_to(ROOT)) for p in FILES if any(n.split(".")[0] == "torch" for n in imports(p))]
    assert guilty == ["pallas_kernels/peers.py", "convert/torchfile.py"]


def test_the_kernels_import_jax_and_numpy_only():
    allowed = {"jax", "numpy", "pallas_kernels"}
    peers = {"torch", "flash_attn"}  # whom the bench compares with: one file, which one function imports when it is asked to
    standard = __import__("sys").stdlib_module_names
    for path in FILES:
        if module_of(path).startswith("pallas_kernels"):
            tops = {name.split(".")[0] for name in imports(path)}
            more = peers if module_of(path) == "pallas_kernels.peers" else set()
            assert tops <= allowed | standard | more, f"{path}: {tops - allowed - standard}"
    users = [module_of(path) for path in FILES if "pallas_kernels.peers" in imports(path)]
    assert users == ["pallas_kernels.runs"]
    tree = ast.parse((ROOT / "pallas_kernels/runs.py").read_text())
    at_the_top = [name.name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names]
    assert "peers" not in at_the_top


def test_packages_of_kernels_share_types_only():
    """What goes into a call of one, another may make. How one computes is its own: what several need stands beside them."""
    packages = {path.parent.name for path in (ROOT / "pallas_kernels").glob("*/api.py")}
    for path in (path for name in packages for path in (ROOT / "pallas_kernels" / name).glob("*.py")):
        others = {f"pallas_kernels.{name}" for name in packages - {path.parent.name}}
        taken = {name for name in imports(path) if place(name, list(others))}
        assert taken <= {f"{name}.types" for name in others}, path
    assert len(packages) == 5


def test_an_upward_import_would_be_caught():
    assert layer("lf_jax.cache") < layer("lf_jax.rollout") < layer("lf_jax.cli") == layer("lf_jax")
    assert layer("lf_jax.dit.block") == layer("lf_jax.vae.decoder")
