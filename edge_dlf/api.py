"""`FusedLlama`: a family of GGUF models that decodes as one. The one place that wires llama.cpp to the rest."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .batch import row_seed, run_batch
from .completion import ChatCompletionShape, CompletionShape, Dict
from .decode import Decoder
from .ensemble import Ensemble
from .errors import ContextOverflowError, EdgeDLFError, InvalidParameterError
from .family import FamilySpec
from .files import check_files
from .generation import Generation
from .llama import default_n_threads
from .members import Members, place, ways_to_overlap
from .overlap import settle
from .params import OVERLAPS, FusionParams, Overlap, SamplingParams, check_draft
from .requests import Request, schema_of
from .scheduler import Scheduler
from .scoring import Score, run_scores
from .stream import Answer, TokenStream
from .template import Message
from .tokenizer import Prompt, Tokenizer

if TYPE_CHECKING:
    from .fusion import Fuser

logger = logging.getLogger(__name__)

ExpertFiles: TypeAlias = str | Path | Sequence[tuple[str | Path, float]]

_PATIENCE_S = 4.0
_MAX_OWN_CTX = 4096
_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_FORM = frozenset(("max_tokens", "stop", "grammar", "json_schema"))
_FUSION = frozenset(field.name for field in dataclasses.fields(FusionParams))


class FusedLlama:
    """A large model, a base and one or more experts in memory, answering together.

    large, base: GGUF files. experts: name -> a GGUF file, a LoRA GGUF over the base, or [(lora, scale), …].
    n_ctx: positions of the context, for every member; None takes 4096, or what the large model was trained for where
    that is less. n_gpu_layers: layers to offload, -1 for all; one number, or a mapping from member to a number (LoRA
    experts have the base's layers). Members that a GPU cannot hold are split by what memory it has, small ones first.
    main_gpu: the one GPU to be on, of several; a number, or a mapping as before. tensor_split: the share of its layers
    that each GPU gets of every other member; None gives each member one GPU where that suffices.
    n_threads: None takes the physical cores, or fewer for a member of a few megabytes. type_k, type_v: types of the KV
    cache, such as "f16" (default) or "q8_0".
    overlap: how members that are wholly on GPUs are decoded beside the others: "off" waits for each before the next,
    "queue" hands all over from one thread, "threads" from a thread each; "auto" measures once what is fastest here, and
    remembers it. Members on the CPU are decoded in turn.
    n_parallel: requests that `batch` decodes at once; "auto" is 16, or 32 on a GPU. They share as many positions of a
    KV cache as memory allows, n_ctx at least.

    Raises LoadError (ModelFileError, FamilyError, VocabMismatchError) or OutOfMemoryError. One request at a time: a new
    one ends the one before. A context manager.
    """

    def __init__(
        self,
        large: str | Path,
        base: str | Path,
        experts: Mapping[str, ExpertFiles],
        *,
        n_ctx: int | None = 4096,
        n_gpu_layers: int | Mapping[str, int] = -1,
        main_gpu: int | Mapping[str, int] | None = None,
        tensor_split: Sequence[float] | None = None,
        n_threads: int | None = None,
        type_k: str | None = None,
        type_v: str | None = None,
        n_parallel: int | Literal["auto"] = 1,
        overlap: Overlap | Literal["auto"] = "auto",
    ) -> None:
        self._load(
            FamilySpec.from_files(large, base, experts),
            n_ctx=n_ctx,
            n_gpu_layers=n_gpu_layers,
            main_gpu=main_gpu,
            tensor_split=tensor_split,
            n_threads=n_threads,
            type_k=type_k,
            type_v=type_v,
            n_parallel=n_parallel,
            overlap=overlap,
        )

    @classmethod
    def from_family(cls, family: str | Path, **settings: Any) -> FusedLlama:
        """Load the family that a `family.toml`, its folder, or a name in the models folder describes.

        settings: the constructor's keyword arguments from `n_ctx` on. Its `[defaults]` hold for every request.
        """
        llm = cls.__new__(cls)
        llm._load(FamilySpec.load(family), **settings)
        return llm

    def _load(
        self,
        spec: FamilySpec,
        *,
        n_ctx: int | None = 4096,
        n_gpu_layers: int | Mapping[str, int] = -1,
        main_gpu: int | Mapping[str, int] | None = None,
        tensor_split: Sequence[float] | None = None,
        n_threads: int | None = None,
        type_k: str | None = None,
        type_v: str | None = None,
        n_parallel: int | Literal["auto"] = 1,
        overlap: Overlap | Literal["auto"] = "auto",
    ) -> None:
        if overlap not in ("auto", *OVERLAPS):
            raise InvalidParameterError(f"overlap must be auto, {', '.join(OVERLAPS)}, not {overlap!r}")
        files = check_files(spec)
        n_ctx = n_ctx or min(_MAX_OWN_CTX, files.n_ctx_train or _MAX_OWN_CTX)
        self.name = spec.name
        self._defaults = dict(spec.defaults)
        placement = place(
            files,
            n_ctx=n_ctx,
            n_parallel=n_parallel,
            n_gpu_layers=n_gpu_layers,
            main_gpu=main_gpu,
            tensor_split=tensor_split,
            type_k=type_k,
            type_v=type_v,
        )
        # Importing numba and loading kernels takes as long as mapping the models: both at once.
        background = ThreadPoolExecutor(1)
        fuser = background.submit(_ready_fuser, files.n_vocab, n_threads or default_n_threads())
        background.shutdown(wait=False)
        self._members = Members(files, placement, n_ctx=n_ctx, n_threads=n_threads, type_k=type_k, type_v=type_v)
        try:
            ensemble = Ensemble(self._members.backends, files.n_vocab, self._members.lanes)
            decoder = Decoder(ensemble, fuser.result())
            if overlap != "auto":
                ensemble.overlap = overlap
            elif len(ensemble.lanes) > 1:
                settle(ensemble, self._members.key, ways_to_overlap())
        except BaseException:
            self._members.close()
            raise
        large = self._members.models[0]
        self._open_tokenizer: Tokenizer | None = Tokenizer(large, files.n_vocab)
        self._ensemble = decoder.ensemble
        self._scheduler = Scheduler(decoder)
        self._said_stuck = False
        if n_ctx > large.n_ctx_train:
            logger.warning(
                "a context of %d tokens is more than the %d that the large model was trained for",
                n_ctx,
                large.n_ctx_train,
            )

    def __enter__(self) -> FusedLlama:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free contexts and weights. Calling it twice is no error."""
        self._scheduler.clear()
        if self._open_tokenizer is not None:
            self._open_tokenizer.close()
        self._open_tokenizer = None
        self._ensemble.close()
        self._members.close()

    def interrupt(self) -> None:
        """Stop the running request, even amid a long prompt; for other threads. It raises RequestInterruptedError; a
        later one is not affected."""
        self._members.interrupt.set()

    @property
    def _tokenizer(self) -> Tokenizer:
        if self._open_tokenizer is None:
            raise EdgeDLFError("this FusedLlama has been closed")
        return self._open_tokenizer

    @property
    def n_ctx(self) -> int:
        """Positions of the context."""
        return self._ensemble.n_ctx

    @property
    def n_vocab(self) -> int:
        """Tokens that all members share."""
        return self._ensemble.n_vocab

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts."""
        return self._ensemble.experts

    @property
    def first_token(self) -> int:
        """What a text begins with that nothing stands before: BOS, or else the token that ends a text."""
        return self._tokenizer.first_token

    @property
    def chat_template(self) -> str | None:
        """The large model's chat template, as jinja text."""
        return self._members.models[0].chat_template

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text` as a raw prompt: with BOS where the model expects one, and, if `special`, the names of
        control tokens read as these tokens."""
        return self._tokenizer.tokenize(text, special=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, names of control tokens included."""
        return self._tokenizer.detokenize(tokens)

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Prompt tokens for the assistant's answer to `messages`, by the large model's own chat template. No text in a
        message can become a control token."""
        return self._tokenizer.conversation(messages)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        top_logprobs: int = 0,
        prompts: Mapping[str, Prompt] | None = None,
        draft: int | Literal["auto", "off"] = "auto",
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
        trace: bool = False,
        **settings: Any,
    ) -> TokenStream:
        """Generate from `prompt`: text taken raw, or token ids. Yields `Token`s; `.report` tells what was done.

        max_tokens: None goes on to the end of the context. stop: strings that end the answer. top_logprobs: how many
        likely tokens each token lists. prompts: member -> a prompt of its own. draft: tokens that an expert, or a text
        that repeats itself, runs ahead at each step, which changes the speed and not the tokens (but where two fused
        logits tie within what llama.cpp rounds batches by); "auto" chooses what pays, "off" is 0. grammar, json_schema:
        what the answer must look like, text of a GBNF grammar or JSON of a schema. trace: whether each token carries
        why it was chosen. settings: fields of SamplingParams and FusionParams. Generation ends at any token that ends
        generation for any member.
        Raises InvalidParameterError, ContextOverflowError (before anything is evaluated), TypeError for unknown names.
        """
        answer = self._answer(
            "stream",
            prompt,
            max_tokens=max_tokens,
            stop=stop,
            top_logprobs=top_logprobs,
            prompts=prompts,
            draft=draft,
            grammar=grammar,
            json_schema=json_schema,
            trace=trace,
            settings=settings,
        )
        self._begin()
        return TokenStream(self._scheduler, answer)

    def n_picked(self) -> int:
        """Tokens picked so far for requests of a batch that are not done; may be asked from another thread."""
        return self._scheduler.n_picked

    def _begin(self) -> None:
        """End the request before."""
        self._scheduler.clear()
        self._members.interrupt.clear()

    def _answer(
        self,
        function: str,
        prompt: Prompt,
        *,
        max_tokens: int | None,
        stop: str | Sequence[str] | None,
        top_logprobs: int,
        prompts: Mapping[str, Prompt] | None,
        draft: int | str,
        grammar: str | None,
        json_schema: Mapping[str, Any] | None,
        trace: bool,
        settings: Mapping[str, Any],
    ) -> Answer:
        """The answer to one request, checked, of which nothing has been evaluated yet."""
        sampling, fusion = self._params(function, settings)
        _require_count("max_tokens", max_tokens, least=1)
        _require_count("top_logprobs", top_logprobs, least=0)
        own = prompts or {}
        if unknown := sorted(set(own) - set(self._ensemble.members)):
            raise InvalidParameterError(
                f"prompts names {unknown[0]!r}; the members are {', '.join(self._ensemble.members)}"
            )
        shared = self._tokenizer.prompt(prompt)
        tokens = {name: self._tokenizer.prompt(own[name]) if name in own else shared for name in self._ensemble.members}
        generation = Generation(
            roles=self._ensemble.roles(fusion),
            prompts=tokens,
            fusion=fusion,
            sampling=sampling,
            alphas=self._ensemble.static_alphas(fusion) if fusion.method == "static" else (),
            n_top=min(top_logprobs, self.n_vocab),
            n_draft=self._n_draft(draft),
            constraint=self._tokenizer.constraint(grammar, json_schema, self._ends),
            traced=trace,
        )
        longest = max(len(tokens[name]) for name in generation.roles.members)
        if longest + (max_tokens or 1) > self.n_ctx:
            raise ContextOverflowError(
                f"the prompt has {longest} tokens and the answer may have {max_tokens or 1}: together "
                f"{longest + (max_tokens or 1)}, more than the context of {self.n_ctx}"
            )
        return Answer(
            generation,
            max_tokens=max_tokens or self.n_ctx - longest,
            stop=_stop_strings(stop),
            piece=self._tokenizer.piece,
            ends=self._ends,
        )

    def _ends(self, token: int) -> bool:
        return any(model.is_eog(token) for model in self._members.models)

    def create_completion(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        stream: bool = False,
        prompts: Mapping[str, Prompt] | None = None,
        draft: int | Literal["auto", "off"] = "auto",
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
        trace: bool = False,
        **settings: Any,
    ) -> Dict | Iterator[Dict]:
        """An OpenAI-shaped completion of `prompt`, or, with `stream`, an iterator of chunks. Arguments as in `stream`;
        logprobs: how many likely tokens to list beside each token's own logprob. A traced result has its
        tokens, as `--trace` writes them, in `["edge_dlf"]["trace"]["tokens"]`."""
        self._params("create_completion", settings)
        tokens = self.stream(
            prompt,
            max_tokens=max_tokens,
            stop=stop,
            top_logprobs=logprobs or 0,
            prompts=prompts,
            draft=draft,
            grammar=grammar,
            json_schema=json_schema,
            trace=trace,
            **settings,
        )
        shape = CompletionShape(self.name, logprobs is not None, self._tokenizer.name_bytes)
        return shape.chunks(tokens, tokens.report) if stream else shape.result(list(tokens), tokens.report)

    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
        top_logprobs: int = 0,
        stream: bool = False,
        prompts: Mapping[str, Sequence[Message]] | None = None,
        draft: int | Literal["auto", "off"] = "auto",
        response_format: Mapping[str, Any] | None = None,
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
        trace: bool = False,
        **settings: Any,
    ) -> Dict | Iterator[Dict]:
        """An OpenAI-shaped answer to `messages`, or, with `stream`, an iterator of chunks. Arguments as in `stream`;
        prompts: member -> messages of its own. response_format: OpenAI's, in place of json_schema."""
        self._params("create_chat_completion", settings)
        tokens = self.stream(
            self.apply_chat_template(messages),
            max_tokens=max_tokens,
            stop=stop,
            top_logprobs=top_logprobs if logprobs else 0,
            prompts={name: self.apply_chat_template(own) for name, own in (prompts or {}).items()},
            draft=draft,
            grammar=grammar,
            json_schema=json_schema if response_format is None else schema_of(response_format),
            trace=trace,
            **settings,
        )
        shape = ChatCompletionShape(self.name, logprobs, self._tokenizer.name_bytes)
        return shape.chunks(tokens, tokens.report) if stream else shape.result(list(tokens), tokens.report)

    def batch(
        self,
        requests: Iterable[Any],
        *,
        ordered: bool = False,
        raw: bool = True,
        system: str | None = None,
        seed: int = 0,
        draft: int | Literal["auto", "off"] = "auto",
        trace: bool = False,
        **settings: Any,
    ) -> Iterator[Dict]:
        """Results of many requests, `n_parallel` decoded at once, as they are done, or, if `ordered`, in their order.

        requests: lines of an OpenAI batch file as mappings, or the short form, `{"prompt": …}` or `{"messages": …}`,
        with an `id` (else their number) and fields as in an OpenAI body; or strings, which are prompts. They are pulled
        as there is room. raw: a prompt of the short form is taken raw, otherwise as a user's message; system: the
        message before messages that have none.
        settings: arguments of `stream`, for requests that do not set them. A sampled request without a seed of its own
        gets one from `seed` and its id, so that its result depends neither on the others nor on the order.
        Results are OpenAI's: `custom_id` and `response` with `body`, or `error` with `code` and `message`: a request
        that cannot be answered ends no other one. Raises what concerns them all.
        """
        self._params("batch", {name: value for name, value in settings.items() if name not in _FORM})

        def prepare(request: Request, custom_id: str) -> tuple[Answer, CompletionShape]:
            own = {"seed": row_seed(seed, custom_id), **settings}
            return self.prepare(request, raw=raw, system=system, draft=draft, trace=trace, **own)

        self._begin()
        return run_batch(self._scheduler, requests, prepare, self._ensemble.n_seq_max, ordered)

    def score(self, pairs: Iterable[tuple[Prompt, Sequence[int]]], **settings: Any) -> Iterator[tuple[int, Score]]:
        """How likely given answers are: of each pair of a prompt and the tokens that follow it, its number, from 0, and
        its `Score`, as they are done, `n_parallel` at once.

        Prompts that begin alike and follow one another are evaluated once. settings: fields of FusionParams.
        Raises InvalidParameterError, ContextOverflowError, TypeError for unknown names.
        """
        if unknown := sorted(set(settings) - _FUSION):
            raise TypeError(f"score() got an unexpected keyword argument {unknown[0]!r}")
        self._begin()
        generations = (self._scored(prompt, answer, settings) for prompt, answer in pairs)
        return run_scores(self._scheduler, generations, self._ensemble.n_seq_max)

    def _scored(self, prompt: Prompt, answer: Sequence[int], settings: Mapping[str, Any]) -> Generation:
        given = tuple(map(self._tokenizer.known, answer))
        if not given:
            raise InvalidParameterError("the answer to be scored has no tokens")
        _, fusion = self._params("score", settings)
        tokens = self._tokenizer.prompt(prompt)
        if len(tokens) + len(given) - 1 > self.n_ctx:
            raise ContextOverflowError(
                f"the prompt has {len(tokens)} tokens and the answer {len(given)}: more than the context of "
                f"{self.n_ctx}"
            )
        return Generation(
            roles=self._ensemble.roles(fusion),
            prompts=dict.fromkeys(self._ensemble.members, tokens),
            fusion=fusion,
            sampling=SamplingParams(temperature=0.0, seed=0),
            alphas=self._ensemble.static_alphas(fusion) if fusion.method == "static" else (),
            n_top=1,
            scored=given,
        )

    def prepare(
        self,
        request: Request,
        *,
        raw: bool = True,
        system: str | None = None,
        draft: int | Literal["auto", "off"] = "auto",
        trace: bool = False,
        **settings: Any,
    ) -> tuple[Answer, CompletionShape]:
        """The answer to one request, checked, of which nothing has been evaluated yet, and the shape of its result, for
        who runs the scheduler. Arguments as in `batch`."""
        arguments = {"max_tokens": None, "stop": None, **settings, **request.settings}
        logprobs, n_top = arguments.pop("logprobs", None), arguments.pop("top_logprobs", 0)
        answer = self._answer(
            "prepare",
            self._content(request, raw=raw, system=system),
            max_tokens=arguments.pop("max_tokens"),
            stop=arguments.pop("stop"),
            top_logprobs=(n_top if logprobs else 0) if request.is_chat else logprobs or 0,
            prompts=None,
            draft=draft,
            grammar=arguments.pop("grammar", None),
            json_schema=arguments.pop("json_schema", None),
            trace=trace,
            settings=arguments,
        )
        if request.is_chat:
            return answer, ChatCompletionShape(self.name, bool(logprobs), self._tokenizer.name_bytes)
        return answer, CompletionShape(self.name, logprobs is not None, self._tokenizer.name_bytes)

    @property
    def scheduler(self) -> Scheduler:
        """Runs every request of this family. One thread at a time."""
        return self._scheduler

    def _content(self, request: Request, *, raw: bool, system: str | None) -> Prompt:
        """The prompt of a batched request."""
        content: Any = request.content
        if not request.is_chat:
            if raw or request.is_raw or not isinstance(content, str):
                return request.content  # type: ignore[no-any-return]
            content = [{"role": "user", "content": content}]
        if system is not None and content[0].get("role") != "system":
            content = [{"role": "system", "content": system}, *content]
        return self.apply_chat_template(content)

    def _params(self, function: str, settings: Mapping[str, Any]) -> tuple[SamplingParams, FusionParams]:
        """`settings` over the family's defaults. Raises TypeError for a name that is neither's."""
        if unknown := sorted(set(settings) - _SAMPLING - _FUSION):
            raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
        merged = {**self._defaults, **settings}
        if bias := merged.get("logit_bias"):
            merged["logit_bias"] = {self._tokenizer.known(int(token)): float(value) for token, value in bias.items()}
        sampling = SamplingParams(**{name: value for name, value in merged.items() if name in _SAMPLING})
        return sampling, FusionParams(**{name: value for name, value in merged.items() if name in _FUSION})

    def _n_draft(self, draft: int | str) -> int | None:
        """Tokens to draft at each step; None for "auto"."""
        check_draft(draft)
        if draft in ("off", 0):
            return 0
        if stuck := [name for name, member in self._ensemble.members.items() if not member.can_trim]:
            if not self._said_stuck:
                logger.warning("%s cannot take tokens back, so nothing is drafted", " and ".join(stuck))
            self._said_stuck = True
            return 0
        return draft if isinstance(draft, int) else None


def _ready_fuser(n_vocab: int, n_threads: int) -> Fuser:
    from .fusion import Fuser, warm_up

    notice = "compiling kernels for this machine; they are kept, so later starts are quick"
    timer = threading.Timer(_PATIENCE_S, logger.warning, [notice])
    timer.daemon = True
    timer.start()
    try:
        warm_up()
    finally:
        timer.cancel()
    return Fuser(n_vocab, n_threads)


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if any(not isinstance(string, str) or not string for string in strings):
        raise InvalidParameterError("a stop string must be text, and not empty")
    return strings


def _require_count(name: str, value: int | None, *, least: int) -> None:
    if value is not None and value < least:
        raise InvalidParameterError(f"{name} must be {least} or more, not {value}")
