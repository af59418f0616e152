"""The method on arrays of your own: `search_alpha` and `fuse_logits`, with their checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidParameterError, require
from ..params import FusionParams, SamplingParams
from .dispatch import Float32Array, Threads, row_addresses
from .fuser import AlphaSearch, Fuser
from .records import AlphaChoice, Draw

_GREEDY = Draw(SamplingParams(temperature=0.0), seed=0, position=0, recent=np.empty(0, np.int32))


def search_alpha(
    large_logits: npt.ArrayLike,
    base_logits: npt.ArrayLike,
    expert_logits: npt.ArrayLike,
    params: FusionParams | None = None,
) -> AlphaChoice:
    """Find the pair (expert, α) that minimises J(α) = Σ_t [(KL(P̃‖P) − a_t)² + (KL(P‖P̃) − b_t)²], the paper's Eq. 6.

    large_logits, base_logits: (V,)
    expert_logits: (V,) or (T, V)

    Raises InvalidParameterError where the shapes do not fit or `params` are of a method without a search,
    NonFiniteLogitsError where a row has NaN, +inf or no finite value.
    """
    params = FusionParams() if params is None else params
    if not isinstance(params, FusionParams) or params.method != "dynamic":
        raise InvalidParameterError(f"α is searched with FusionParams of method dynamic, not with {params!r:.80}")
    members, names = _members(large_logits, base_logits, expert_logits)
    n_vocab = members[0].shape[1]
    search = AlphaSearch(n_vocab, Threads(1))
    choices, errors = search.search(row_addresses(members, 1, n_vocab), names, params)
    for error in errors.values():
        raise error
    assert choices[0] is not None
    return choices[0]


def fuse_logits(
    large_logits: npt.ArrayLike, base_logits: npt.ArrayLike, expert_logits: npt.ArrayLike, alpha: npt.ArrayLike
) -> Float32Array:
    """Compute large + Σ_t α_t (expert_t − base), unnormalised, (V,) float32.

    Where base or expert_t gives −inf, log Q_t − log Q counts as 0. Shapes and errors are those of `search_alpha`.

    alpha: (T,), or a number for a single expert
    """
    members, names = _members(large_logits, base_logits, expert_logits)
    n_experts = len(members) - 2
    alphas = np.atleast_1d(_numbers("alpha", alpha)).astype(np.float64)
    if alphas.shape != (n_experts,) or not np.isfinite(alphas).all():
        raise InvalidParameterError(f"alpha must be {n_experts} finite numbers, one for each expert, not {alpha!r}")
    fuser = Fuser(members[0].shape[1])
    (pick,) = fuser.pick(members, names, FusionParams(method="static"), [alphas.tolist()], [_GREEDY])
    if pick.error:
        raise pick.error
    fused: Float32Array = fuser._fused[-1]
    return fused


def _members(large: npt.ArrayLike, base: npt.ArrayLike, expert: npt.ArrayLike) -> tuple[list[Float32Array], list[str]]:
    """Check the shapes. Returns each member's row as (1, V), and the members' names."""
    with np.errstate(over="ignore"):  # what float32 cannot hold is +inf, an error that names the member
        arrays = [np.require(_numbers("logits", x), np.float32, ["C", "W", "A"]) for x in (large, base, expert)]
    require(arrays[0].ndim == 1 and arrays[0].size, f"large_logits must have shape (V,), not {arrays[0].shape}")
    n_vocab = arrays[0].size
    require(arrays[1].shape == (n_vocab,), f"base_logits must have shape ({n_vocab},), not {arrays[1].shape}")
    experts = np.atleast_2d(arrays[2])
    if experts.ndim != 2 or experts.shape[1] != n_vocab or not len(experts):
        raise InvalidParameterError(
            f"expert_logits must have shape ({n_vocab},) or (T, {n_vocab}), not {arrays[2].shape}"
        )
    names = ["large", "base", *(f"expert {t}" for t in range(len(experts)))]
    return [arrays[0][None], arrays[1][None], *(row[None] for row in experts)], names


def _numbers(name: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    """`value` as an array. Raises InvalidParameterError unless it holds real numbers."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InvalidParameterError(f"{name} must be numbers: {error}") from None
    require(array.dtype.kind in "iuf", f"{name} must be numbers, not {array.dtype}")
    return array
