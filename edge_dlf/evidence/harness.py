"""A family as a model of lm-evaluation-harness, named edge-dlf.

The harness knows the models that are registered when it starts. `python -m edge_dlf.harness` is its own command with
this one among them: `python -m edge_dlf.harness --model edge-dlf --model_args family=DIR,method=dynamic --tasks …`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..api import FusedLlama
from ..errors import EdgeDLFError, InvalidParameterError
from ..params import FUSION, SAMPLING, FusionParams, SamplingParams

logger = logging.getLogger(__name__)

_LOADING = ("n_ctx", "n_gpu_layers", "main_gpu", "n_threads", "type_k", "type_v")
_PLAIN = dataclasses.asdict(SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0))
"""How an answer is chosen where its task says no more, whatever the family's defaults are."""
del _PLAIN["seed"]
_IGNORED = frozenset({"do_sample", "until", "max_gen_toks"})


@register_model("edge-dlf")
class HarnessModel(TemplateLM):  # type: ignore[misc]
    """family: a family's name or path, or what gives one that is loaded, which is called when it is first needed.

    batch_size: requests decoded at once, or "auto". settings: `n_ctx`, `n_gpu_layers`, `main_gpu`, `n_threads`,
    `type_k`, `type_v` of FusedLlama, and fields of FusionParams.
    """

    def __init__(
        self,
        family: str | Callable[[], FusedLlama],
        *,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        loading = {name: settings.pop(name) for name in _LOADING if name in settings}
        if unknown := sorted(set(settings) - FUSION):
            raise InvalidParameterError(f"edge-dlf has no argument {unknown[0]!r}")
        FusionParams(**settings)
        self._fusion = settings
        if isinstance(family, str):
            n_parallel = "auto" if str(batch_size).startswith("auto") else int(batch_size)
            family = partial(FusedLlama.from_family, family, n_parallel=n_parallel, **loading)
        self._load = family

    @cached_property
    def llm(self) -> FusedLlama:
        """The family, in memory."""
        return self._load()

    @property
    def max_length(self) -> int:
        return self.llm.n_ctx

    @property
    def max_gen_toks(self) -> int:
        return 256

    @property
    def eot_token_id(self) -> int:
        return self.llm.first_token

    @property
    def tokenizer_name(self) -> str:
        return self.llm.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The large model's own template, whatever name is asked for."""
        return self.llm.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for the next answer; a last message of the assistant's that is to go on is begun."""
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        return self.llm.detokenize(self.llm.apply_chat_template(messages)) + begun

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokens = self.llm.tokenize(string)
        n_leading = len(self.llm.tokenize("")) if add_special_tokens is False else 0
        return tokens[n_leading:]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Raises EdgeDLFError for an answer without any text, which has no likelihood."""
        for request in requests:
            if not request.args[1].strip():  # a delimiter alone is no choice either
                where = f"example {request.doc_id} of {request.task_name}"
                raise EdgeDLFError(f"{where} has an empty choice: {request.doc!r:.200}")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Those whose contexts begin alike follow one another, so that what they share is evaluated once."""
        order = sorted(range(len(requests)), key=lambda k: (requests[k][1], requests[k][2]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        scores = self.llm.score((self._pair(*requests[k][1:]) for k in order), **self._fusion)
        for number, score in tqdm(scores, total=len(order), desc="scores", disable=disable_tqdm or None):
            k = order[number]
            found[k] = score.logprob, score.is_greedy
            if (request := requests[k][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", request, found[k])
        return found

    def _pair(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Both, of the context only its end where they would not fit."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise InvalidParameterError(
                f"a continuation has {len(continuation)} tokens, more than the context of {self.max_length}"
            )
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text in windows as wide as the context, every token once."""
        windows, owners = [], []
        for k, request in enumerate(requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for part in map(make_disjoint_window, parts):
                windows.append((None, *part))
                owners.append(k)
        sums = [0.0] * len(requests)
        for k, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[k] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda k: str(requests[k].args[0]))
        rows = (self._row(k, *requests[k].args) for k in order)
        answers = self.llm.batch(rows, **_PLAIN, **self._fusion)
        for row in tqdm(answers, total=len(order), desc="answers", disable=disable_tqdm or None):
            if row["error"]:
                raise EdgeDLFError(f"an answer failed: {row['error']['message']}")
            k = int(row["custom_id"])
            texts[k] = row["response"]["body"]["choices"][0]["text"]
            self.cache_hook.add_partial("generate_until", requests[k].args, texts[k])
        return texts

    def _row(self, k: int, context: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """One request of a batch."""
        asked = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        n_most = min(asked["max_gen_toks"], self.max_length - 1)
        sampling = {name: value for name, value in asked.items() if name in SAMPLING} if asked["do_sample"] else {}
        if unknown := sorted(set(asked) - SAMPLING - _IGNORED):
            logger.warning("the task asks for %s, which edge-dlf does not have", ", ".join(unknown))
        tokens = self.tok_encode(context)[-(self.max_length - n_most) :]
        stop = [text for text in asked["until"] if text]
        return {"id": str(k), "prompt": tokens, "max_tokens": n_most, "stop": stop, **sampling}
