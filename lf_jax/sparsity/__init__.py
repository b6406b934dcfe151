"""Which key blocks a query block attends to: budgets (`growth`) and selectors, chosen by name or given as a function."""

from collections.abc import Callable

import jax

from lf_jax import config
from lf_jax.sparsity.auto import unless_everything
from lf_jax.sparsity.baselines import full, oracle, random, topk, window
from lf_jax.sparsity.clusters import svg2
from lf_jax.sparsity.growth import Budget, chunk_budgets, chunk_sparsities
from lf_jax.sparsity.hierarchical import light_forcing
from lf_jax.sparsity.marginal import linear_attention
from lf_jax.sparsity.published import radial, sla, sta, vmoba
from lf_jax.sparsity.select import Inputs, Selector, Timeline, pool_keys, timeline
from pallas_kernels import BlockMap

SELECTORS: dict[str, Selector] = {
    "light_forcing": light_forcing,
    "topk": topk,
    "window": window,
    "full": full,
    "random": random,
    "oracle": oracle,
    "sta": sta,
    "radial": radial,
    "vmoba": vmoba,
    "svg2": svg2,
    "sla": sla,
}


def select(inputs: Inputs) -> BlockMap:
    """The key blocks of one layer of a chunk, by `settings.policy`: a name of `SELECTORS`, or a selector of one's own.

    No gradient flows into the choice. With `settings.attention` "auto" there is none where the budget holds everything.

    Raises:
        ValueError: for an unknown name.
    """
    choose, inputs = selector(inputs.settings.policy), jax.lax.stop_gradient(inputs)
    return unless_everything(choose, inputs) if inputs.settings.attention == "auto" else choose(inputs)


def selector(policy: str | Callable) -> Selector:
    """The selector that a sparse `policy` names or is. Raises ValueError for an unknown name."""
    if not isinstance(policy, str):
        return policy
    config.check(policy in SELECTORS, f"{policy=} must be 'dense', a function, or one of {', '.join(SELECTORS)}")
    return SELECTORS[policy]


__all__ = [
    "SELECTORS",
    "Budget",
    "Inputs",
    "Selector",
    "Timeline",
    "chunk_budgets",
    "chunk_sparsities",
    "linear_attention",
    "pool_keys",
    "select",
    "selector",
    "timeline",
]
