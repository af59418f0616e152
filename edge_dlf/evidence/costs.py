"""What a step costs on this machine, in sentences: batches of a few tokens, drafts, fusion, and slow quantizations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ..families.describe import quantization
from ..families.files import FamilyFiles
from ..gguf.info import GGUFInfo

BATCHES = 1, 2, 4
"""Numbers of tokens that are evaluated at once. A draft of n tokens is checked in a batch of n + 1."""
_RIGHT = 0.9
"""Share of drafted tokens that are right in what is said of drafting: about that of maths and code in answers."""
_WORTH = 1.02
_K_ROWS = 256
"""llama.cpp quantizes rows to K types only in multiples of so many weights."""
_SLOW = "Q5_0", "Q5_1"
"""What it takes in place of Q4_K and Q5_K then, for which it has no fast kernels on CPUs."""

Seconds = Mapping[str, Sequence[float]]
"""Member -> seconds in which it evaluates 1, 2 and 4 tokens at once."""


def batches(seconds: Seconds) -> str:
    """Say what batches of two and four tokens cost each member."""
    each = (f"{name} {two / one:.1f} and {four / one:.1f}" for name, (one, two, four) in seconds.items())
    return f"2 and 4 tokens at once take, in steps of one: {', '.join(each)}"


def drafting(files: FamilyFiles, seconds: Seconds) -> str:
    """Say whether drafts by an expert pay for the family's first method, by these costs."""
    taking_part = {name: seconds[name] for name in _members(files)}
    drafters = [name for name in taking_part if name not in ("large", "base", *files.correctors)]
    if not drafters:
        return "a corrector cannot draft; only texts that repeat themselves are drafted for"
    gain, n_drafted = max(
        (_gain(taking_part, drafter, n), BATCHES[n] - 1) for drafter in drafters for n in range(1, len(BATCHES))
    )
    tokens = "one token" if n_drafted == 1 else f"{n_drafted} tokens"
    if gain < _WORTH:
        return f"does not pay here: with {_RIGHT:.0%} of drafted tokens right, {gain:.2f} times plain fusion at best"
    best = f"drafts of {tokens} give {gain:.2f} times plain fusion"
    return f"pays here: with {_RIGHT:.0%} of drafted tokens right, {best}"


def fusion(files: FamilyFiles, seconds: Seconds) -> str:
    """Say how long a plain step of the family's own method takes, against one of the large model alone."""
    plain = sum(seconds[name][0] for name in _members(files))
    return f"a plain step takes {plain / seconds['large'][0]:.2f} times one of the large model alone"


def slow_types(files: FamilyFiles) -> list[tuple[str, str]]:
    """Name the models most of whose matrices have a slow type since their rows do not fit the one that was asked for.

    Returns for each a sentence, and what to do.
    """
    models = {info.path: info for info in files.models.values()}
    return [found for info in models.values() if (found := _slow_type(info))]


def _members(files: FamilyFiles) -> tuple[str, ...]:
    """The members that the family's first method decodes."""
    return tuple(files.roles({"method": files.methods[0]}).members)


def _gain(seconds: Seconds, drafter: str, n: int) -> float:
    """How many times as many tokens a second drafts that fill a batch of BATCHES[n] give, of plain steps.

    The drafter evaluates guesses one by one, and the last one only if all were right; the others evaluate the batch.
    """
    n_drafted = BATCHES[n] - 1
    n_tokens = sum(_RIGHT**k for k in range(n_drafted + 1))
    own = seconds[drafter][0] * (n_drafted + _RIGHT**n_drafted)
    step = own + sum(costs[n] for name, costs in seconds.items() if name != drafter)
    return n_tokens * sum(costs[0] for costs in seconds.values()) / step


def _slow_type(info: GGUFInfo) -> tuple[str, str] | None:
    asked = quantization(info)
    matrices = [tensor for tensor in info.tensors.values() if len(tensor.shape) == 2]
    kinds = Counter(tensor.type for tensor in matrices if tensor.type in _SLOW and tensor.shape[0] % _K_ROWS)
    if not kinds or "_K" not in asked or 2 * sum(kinds.values()) < len(matrices):
        return None
    ((kind, _),) = kinds.most_common(1)
    width = Counter(tensor.shape[0] for tensor in matrices if tensor.type == kind).most_common(1)[0][0]
    text = (
        f"{info.path.name}: {sum(kinds.values())} of {len(matrices)} matrices are {kind}, which is slow on CPUs, since "
        f"rows of {width} do not fit {asked}"
    )
    stem = re.sub(f"[-._]?{asked}", "", info.path.stem, flags=re.IGNORECASE)
    return text, f"Q4_0 is faster, and a little less exact: llama-quantize ORIGINAL-F16.gguf {stem}-q4_0.gguf Q4_0"
