"""What to run for a task, found from examples with answers: a member alone, static, dynamic, or fitted weights.

Every method is compared by its loss, −log p of the answers in nats a token, on examples that its weights were not
fitted on. The cheapest method whose loss cannot be told from the lowest is recommended: it is within one standard
error of it, and the 95% interval of the difference on the same examples reaches nought; or it is within a thousandth
of a nat.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..answers.template import MemberPrompts
from ..api import FusedLlama
from ..errors import EdgeDLFError, InvalidParameterError
from ..llama import default_n_threads
from .answer_rows import AnswerLosses, evaluate
from .examples import Example, tokenized
from .held_out import SAME, HeldOut, Outcome
from .stats import Estimate, Z, interval

_FEWEST = 10
"""Examples below which nothing is told apart."""
_TOLERANCE = 0.1
"""Part of the loss that a member alone may be behind, at the end of its interval, to be as good as a fusion."""
_MEMORISED = 0.03, 10.0
"""Nats a token below which an expert seems to know the examples, if the large model has so many times its loss."""
_UNKNOWN = 4.0, 1 / 3
"""Nats a token above which, and part of the tokens right below which, no member knows the task."""
_FLATTERED = "Examples that an expert was trained on flatter it; these numbers hold for others only if it was not."
_SLACK = 8
"""Tokens that a generated answer may have more than the example's."""


@dataclass(frozen=True)
class Check:
    """Answers generated for held-out examples. n_exact: method -> how many equal the example's answer."""

    n: int
    n_exact: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class TuneResult:
    """The comparison and its conclusion.

    defaults: the family's.
    outcomes: of every method, as it does on held-out examples.
    best, recommended: the one with the lowest loss; the cheapest that is as good.
    verdict: the conclusion in one sentence. notes: further sentences.
    folds: the fold of each example.
    """

    family: str
    defaults: Mapping[str, Any]
    examples: Sequence[Example]
    outcomes: Sequence[Outcome]
    best: Outcome
    recommended: Outcome
    verdict: str
    notes: list[str]
    folds: npt.NDArray[np.int64]
    check: Check | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What is recommended, as it stands under `edge_dlf` in a request; `weights` is None where there are none."""
        unfiltered = {"plausibility": 0.0} if self.defaults.get("plausibility") else {}
        settings = self.recommended.settings
        return {"method": settings["method"], "weights": None, **unfiltered, **settings}

    @property
    def is_known(self) -> bool:
        """Whether the recommended method knows anything of the task."""
        return _mean(self.recommended) <= _UNKNOWN[0] or self.recommended.share_right >= _UNKNOWN[1]

    @property
    def runner_up(self) -> Outcome:
        """The method with the lowest loss beside the recommended one."""
        return min((one for one in self.outcomes if one is not self.recommended), key=_mean)

    def as_json(self) -> dict[str, Any]:
        """Everything, as one object. Losses that are infinite are None."""
        return {
            "family": self.family,
            "n_examples": len(self.examples),
            "n_tokens": sum(len(example.answer) for example in self.examples),
            "recommended": self.settings,
            "verdict": self.verdict,
            "notes": list(self.notes),
            "methods": [self._method(outcome) for outcome in self.outcomes],
            "check": None if self.check is None else {"n": self.check.n, "exact": dict(self.check.n_exact)},
        }

    def cost(self, outcome: Outcome) -> float:
        """Bytes that a token costs, relative to the large model alone."""
        return outcome.n_bytes / self.outcomes[0].n_bytes

    def _method(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "name": outcome.name,
            "settings": outcome.settings,
            "members": list(outcome.members),
            "loss": _finite(outcome.loss),
            "above_best": _finite(outcome.above(self.best)),
            "tokens_right": outcome.share_right,
            "answers_right": answers_right(outcome)._asdict(),
            "cost": self.cost(outcome),
            "prior": outcome.prior and outcome.prior._asdict(),
            "standard_errors": outcome.standard_errors or None,
            "is_best": outcome is self.best,
            "is_recommended": outcome is self.recommended,
        }


def tune(
    llm: FusedLlama,
    examples: Iterable[Mapping[str, Any]],
    *,
    raw: bool = False,
    system: str | None = None,
    n_threads: int | None = None,
    tell: Callable[[int], None] = lambda n_done: None,
) -> TuneResult:
    """Find what to run for the task of these examples.

    examples: rows {"prompt", "answer"}, {"messages", "answer"}, or {"messages"} that end with the answer.
    raw: whether prompts are taken as they are, without the chat template.
    system: a message that goes before messages that have none.
    n_threads: that fuse rows and fit weights; by default the physical cores.
    tell: called with the number of examples that have been read, also now and then after that. It may raise.

    Examples that an expert was trained on flatter it. Raises InvalidParameterError for examples that cannot be used,
    NonFiniteLogitsError where a member returns NaN.
    """
    rows = ((f"example {number}", row) for number, row in enumerate(examples, 1))
    tasks = {"": tokenized(llm, rows, raw=raw, system=system)}
    return tune_tasks(llm, tasks, n_threads=n_threads, tell=tell)[""]


def tune_tasks(
    llm: FusedLlama,
    tasks: Mapping[str, Sequence[Example]],
    *,
    n_threads: int | None = None,
    folder: Path | None = None,
    tell: Callable[[int], None] = lambda n_done: None,
) -> dict[str, TuneResult]:
    """Find what to run for each of several tasks, in one pass over all of their examples. Arguments as in `tune` and
    `evaluate`."""
    different = {task: _distinct(task, examples) for task, examples in tasks.items()}
    everything = list(dict.fromkeys(itertools.chain(*different.values())))
    n_threads = n_threads or default_n_threads()
    found = evaluate(llm, everything, n_threads, folder, tell)
    numbers = {example: number for number, example in enumerate(everything)}
    results = {}
    for task, examples in different.items():
        own = found.take([numbers[example] for example in examples])
        result = _compared(llm, examples, own, n_threads, lambda: tell(len(everything)))
        if n_repeated := len(tasks[task]) - len(examples):
            result.notes.append(f"{n_repeated} examples are repeated; each counts once.")
        results[task] = result
    return results


def _compared(
    llm: FusedLlama, examples: Sequence[Example], found: AnswerLosses, n_threads: int, tell: Callable[[], None]
) -> TuneResult:
    """Compare all methods on the examples of one task, which have been read."""
    members = llm.driver.decoder.ensemble.members
    held_out = HeldOut(found, {name: member.n_bytes for name, member in members.items()}, n_threads)
    outcomes = list(held_out.fixed())
    if not any(math.isfinite(_mean(outcome)) for outcome in outcomes if len(outcome.members) == 1):
        raise InvalidParameterError("no member gives every token of the answers a probability")
    for outcome in held_out.weighted():
        outcomes.append(outcome)
        tell()
    best = min(outcomes, key=_mean)
    recommended = _cheapest(outcomes, best)
    verdict, notes = _conclusion(outcomes, recommended)
    defaults, folds = llm.files.spec.defaults, held_out.fold_of_example
    result = TuneResult(llm.name, defaults, examples, outcomes, best, recommended, verdict, notes, folds)
    return result if result.is_known else replace(result, verdict=_about_ignorance(recommended))


def _distinct(task: str, examples: Sequence[Example]) -> list[Example]:
    """The examples, each once. Raises InvalidParameterError, which names the task, unless there are two at least."""
    different = list(dict.fromkeys(examples))
    if len(different) < 2:
        what = "there are no examples" if not examples else "there is only one example"
        what = "all examples are the same" if len(examples) > 1 else what
        what = f"task {task!r}: {what}" if task else what
        raise InvalidParameterError(f"{what}; weights need at least two, and {_FEWEST} or more tell methods apart")
    return different


def check(llm: FusedLlama, result: TuneResult, n: int) -> TuneResult:
    """Generate greedy answers to `n` examples, by what is recommended and by the runner-up, and count the exact ones.

    Weights are those fitted without the example's fold. Returns the result with its `check`.
    """
    n = min(n, len(result.examples))
    n_exact = {}
    for outcome in (result.recommended, result.runner_up):
        requests = [_request(result, outcome, number) for number in range(n)]
        n_exact[_label(outcome)] = 0
        for answered in llm.batch(requests, temperature=0.0, repeat_penalty=1.0):
            if answered["error"]:
                raise EdgeDLFError(f"an answer failed: {answered['error']['message']}")
            choice = answered["response"]["body"]["choices"][0]
            text = result.examples[int(answered["custom_id"])].text
            is_exact = choice["finish_reason"] == "stop" and choice["text"].strip() == text.strip()
            n_exact[_label(outcome)] += is_exact
    return replace(result, check=Check(n, n_exact))


def _request(result: TuneResult, outcome: Outcome, number: int) -> dict[str, Any]:
    example, settings = result.examples[number], dict(outcome.settings)
    if outcome.fold_weights:
        settings["weights"] = outcome.fold_weights[result.folds[number]]
    n_most = len(example.answer) + _SLACK
    prompt = MemberPrompts(example.prompt, dict(example.own))
    return {"id": str(number), "prompt": prompt, "max_tokens": n_most, "edge_dlf": settings}


def answers_right(outcome: Outcome) -> Estimate:
    """Share of whole answers whose every token is the greedy choice, with its 95% interval."""
    return interval((outcome.n_right == outcome.n_tokens).astype(np.float64).tolist())


def _cheapest(outcomes: Sequence[Outcome], best: Outcome) -> Outcome:
    """The cheapest method that is as good as the best; of several as cheap, the one with the lowest loss."""
    as_good = [outcome for outcome in outcomes if outcome is best or _is_as_good(outcome, best)]
    return min(as_good, key=lambda outcome: (outcome.n_bytes, _mean(outcome)))


def _is_as_good(outcome: Outcome, best: Outcome) -> bool:
    """Whether chance explains what the loss is above the lowest, and it is no more than that one's standard error."""
    difference, standard_error = outcome.above(best), (best.loss.high - best.loss.mean) / Z
    if not math.isfinite(difference.mean):
        return False
    return difference.mean <= SAME or (difference.low <= 0 and difference.mean <= standard_error)


def _conclusion(outcomes: Sequence[Outcome], recommended: Outcome) -> tuple[str, list[str]]:
    """The verdict in one sentence, and further ones."""
    n = len(recommended.losses)
    alone = [outcome for outcome in outcomes if len(outcome.members) == 1]
    single, fused = min(alone, key=_mean), min((o for o in outcomes if len(o.members) > 1), key=_mean)
    notes = []
    if recommended in alone:
        behind = recommended.above(fused)
        faster = fused.n_bytes / recommended.n_bytes
        who = _named(recommended)
        if not math.isfinite(_mean(fused)) or (n >= _FEWEST and behind.high <= _TOLERANCE * _mean(fused)):
            verdict = f"{who} is as good as any fusion here and about {faster:.1f} times as fast."
        else:
            verdict = (
                f"Too few examples to tell: {who} may be up to {nats(behind.high)} nats a token behind fusion, "
                f"and is about {faster:.1f} times as fast{_more(behind, n)}."
            )
    else:
        ahead = single.above(recommended)
        gain = f"{nats(_mean(recommended))} nats a token, {nats(ahead.mean)} below {single.name}, the best member"
        if n >= _FEWEST and ahead.low > 0:
            verdict = f"Fusion helps: {recommended.name} has {gain}."
        else:
            verdict = f"Too few examples to tell: {recommended.name} has {gain}{_more(ahead, n)}."
        if recommended.fold_weights:
            notes.append(_about_weights(recommended))
    experts = [outcome for outcome in alone if outcome.members[0] not in ("large", "base")]
    notes += [_about_memory(o) for o in experts if _seems_memorised(o, alone[0])] or [_FLATTERED]
    return verdict[0].upper() + verdict[1:], notes


def _more(difference: Estimate, n: int) -> str:
    """Words on how many examples would tell a difference from none."""
    half = difference.high - difference.mean
    factor = (half / difference.mean) ** 2 if difference.mean else math.inf
    if not math.isfinite(factor) or factor > 20:
        return "; more examples would hardly tell them apart"
    return f"; about {max(_FEWEST, n + 1, 10 * math.ceil(n * factor / 10)):,} would tell"


def _about_weights(outcome: Outcome) -> str:
    """Words on what more examples would gain: half of what the loss rises from the examples fitted on to others."""
    gain = (_mean(outcome) - outcome.loss_in_sample) / 2
    assert outcome.prior is not None
    shrunk = f"Weights are shrunk towards {outcome.prior.name}, with strength {outcome.prior.l2:g}"
    if gain > max(0.02 * _mean(outcome), SAME):
        return f"{shrunk}; more examples may lower the loss by about {nats(gain)} nats a token."
    return f"{shrunk}; more examples would hardly change them."


def _about_ignorance(recommended: Outcome) -> str:
    return (
        f"No member knows this task: the recommended method has {recommended.share_right:.0%} of the tokens right. "
        "An expert trained on such examples would help more than weights."
    )


def _seems_memorised(outcome: Outcome, large: Outcome) -> bool:
    most, ratio = _MEMORISED
    return _mean(outcome) < most and _mean(large) > ratio * _mean(outcome)


def _about_memory(outcome: Outcome) -> str:
    return (
        f"{outcome.members[0]} has {nats(_mean(outcome))} nats a token, suspiciously few: if it was trained on these "
        "examples, they flatter it, and others should be used."
    )


def _named(outcome: Outcome) -> str:
    (member,) = outcome.members
    return "the large model alone" if member == "large" else f"the expert {member} alone".replace("expert base", "base")


def _label(outcome: Outcome) -> str:
    return outcome.name if outcome.name != "weighted" else f"weighted {' + '.join(outcome.members)}"


def _mean(outcome: Outcome) -> float:
    return outcome.loss.mean


def nats(value: float) -> str:
    """A loss in figures for a person."""
    return f"{value:.3f}" if abs(value) >= 0.0095 else f"{value:.1g}"


def _finite(estimate: Estimate) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in estimate._asdict().items()}
