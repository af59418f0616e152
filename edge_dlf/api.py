"""`FusedLlama`: a family of GGUF models that decodes as one. The one place that wires llama.cpp to the rest."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from .answers.batch import row_seed, run_batch
from .answers.completion import ChatCompletion, Completion, Dict
from .answers.preparer import Preparer, many
from .answers.requests import OF_TEMPLATE, Request, count, flag
from .answers.scoring import Score, run_scores
from .answers.stream import Driver, TokenStream
from .answers.template import ChatPrompt, Message
from .answers.tokenizer import Prompt, Tokenizer
from .engine.decoder import Decoder
from .engine.prompt_cache import PromptCache
from .errors import EdgeDLFError, require, shown
from .families.files import FamilyFiles, check_files
from .families.members import Members, plan_memory
from .families.spec import FamilySpec
from .llama import MAX_THREADS, default_n_threads
from .params import OVERLAPS, Number, Overlap

if TYPE_CHECKING:
    from .fusion.fuser import Fuser

logger = logging.getLogger(__name__)

ExpertFiles: TypeAlias = str | Path | Sequence[tuple[str | Path, float]]

_MAX_OWN_CTX = 4096
_THREADS = Number(0, MAX_THREADS, is_whole=True, minus_one=0)


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
    as_correctors: experts that correct this large model without the base, whatever their files say of themselves.
    prompt_cache: a folder that keeps what the members know of long prompts, so that later processes need not read them.

    Its attribute `files` holds the headers of the family's files, `cache_types` the types of the KV cache, `driver`
    what decodes every request, one thread at a time.

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
        as_correctors: Collection[str] = (),
        prompt_cache: str | Path | None = None,
    ) -> None:
        files = check_files(FamilySpec.from_files(large, base, experts, as_correctors))
        self._load(
            files, n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, main_gpu=main_gpu, tensor_split=tensor_split,
            n_threads=n_threads, type_k=type_k, type_v=type_v, n_parallel=n_parallel, overlap=overlap,
            prompt_cache=prompt_cache,
        )  # fmt: skip

    @classmethod
    def from_family(
        cls, family: str | Path | FamilySpec | FamilyFiles, *, profile: str | None = None, **settings: Any
    ) -> FusedLlama:
        """Load the family that a `family.toml`, its folder, or a name in the models folder describes, or one that has
        been read or checked already. It loads the members that the method in its `[defaults]` needs. Others are loaded
        when a request needs them; that request raises OutOfMemoryError where memory does not suffice.

        profile: name of settings in its `[profiles]`, which hold over its `[defaults]` for requests without a profile.
        settings: the constructor's keyword arguments from `n_ctx` on.
        """
        llm = cls.__new__(cls)
        files = family if isinstance(family, FamilyFiles) else check_files(family)
        llm._load(replace(files, spec=files.spec.choosing(profile)) if profile else files, **settings)
        return llm

    def _load(
        self,
        files: FamilyFiles,
        *,
        n_ctx: int | None = 4096,
        n_threads: int | None = None,
        type_k: str | None = None,
        type_v: str | None = None,
        overlap: Overlap | Literal["auto"] = "auto",
        prompt_cache: str | Path | None = None,
        **asked: Any,
    ) -> None:
        require(overlap in ("auto", *OVERLAPS), f"overlap must be auto, {', '.join(OVERLAPS)}, not {shown(overlap)}")
        n_ctx = None if n_ctx is None else count("n_ctx", n_ctx)
        n_threads = None if n_threads is None else _THREADS.read("n_threads", n_threads) or None
        n_ctx = n_ctx or min(_MAX_OWN_CTX, files.models["large"].n_ctx_train or _MAX_OWN_CTX)
        kept = None if prompt_cache is None else PromptCache(prompt_cache)
        self.name, self.files, self.cache_types = files.spec.name, files, (type_k or "f16", type_v or "f16")
        planned = partial(plan_memory, files, n_ctx=n_ctx, type_k=type_k, type_v=type_v, **asked)
        plan = planned()
        # Importing numba and loading kernels takes as long as mapping the models: both at once.
        background = ThreadPoolExecutor(1)
        fuser = background.submit(_ready_fuser, files, n_threads or default_n_threads())
        background.shutdown(wait=False)
        self._members = Members(files, plan, planned, n_ctx=n_ctx, n_threads=n_threads, type_k=type_k, type_v=type_v)
        try:
            ensemble = self._members.ensemble(kept)
            decoder = Decoder(ensemble, fuser.result())
            self._members.set_overlap(ensemble, overlap)
        except BaseException:
            self._members.close()
            raise
        tokenizer = Tokenizer(self._members.vocabulary, files.n_vocab, ensemble.n_ctx, files.tokens.templates)
        spec = files.spec
        self._open_preparer: Preparer | None = Preparer(
            self.name, spec.defaults, spec.profiles, spec.profile, ensemble, tokenizer, self._members.is_eog
        )
        self._ensemble, self.driver = ensemble, Driver(decoder)
        n_ctx_train = files.models["large"].n_ctx_train
        if n_ctx_train is not None and n_ctx > n_ctx_train:
            logger.warning("a context of %d tokens exceeds the %d of the large model's training", n_ctx, n_ctx_train)

    def __enter__(self) -> FusedLlama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free contexts and weights, and stop the running request. Calling it twice is no error."""
        self._members.interrupt.set()
        self.driver.close(self._ensemble.close, self._members.close)
        preparer, self._open_preparer = self._open_preparer, None
        if preparer is not None:
            preparer.tokenizer.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a FusedLlama can be neither pickled nor copied; load the family in each process")

    def interrupt(self) -> None:
        """Stop the running request from another thread. It raises RequestInterruptedError, later ones do not."""
        self._members.interrupt.set()

    def end_forms(self) -> None:
        """From any thread, end every grammar and JSON schema that is read or kept to. Their requests fail."""
        if self._open_preparer is not None:
            self._open_preparer.tokenizer.end_forms()

    @property
    def _preparer(self) -> Preparer:
        if self._open_preparer is None:
            raise EdgeDLFError("this FusedLlama has been closed")
        return self._open_preparer

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
        return self._preparer.tokenizer.first_token

    @property
    def chat_template(self) -> str | None:
        """The large model's chat template, as jinja text."""
        return self._preparer.tokenizer.chat_template

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text` as a raw prompt: with BOS where the model expects one, and, if `special`, the names of
        control tokens read as these tokens."""
        return self._preparer.tokenizer.tokenize(text, special=special)

    def tokenize_answer(self, text: str, *, is_chat: bool = False) -> list[int]:
        """Token ids of `text` as an answer, with the token that ends it: of a turn if `is_chat`, else of a text."""
        return self._preparer.tokenizer.answer(text, is_chat=is_chat)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, names of control tokens included."""
        return self._preparer.tokenizer.detokenize(tokens)

    def apply_chat_template(self, messages: Sequence[Message], **arguments: Any) -> ChatPrompt:
        """Prompt tokens for the assistant's answer to `messages`, by the large model's own chat template. No text in a
        message can become a control token.

        arguments: tools, tool_choice, parallel_tool_calls, chat_template_kwargs, think, as in `create_chat_completion`.
        The list remembers how an answer to it is taken apart: `stream` tells its thinking from its text.
        """
        if unknown := sorted(set(arguments) - {*OF_TEMPLATE, "think"}):
            raise TypeError(f"apply_chat_template() got an unexpected keyword argument {shown(unknown[0])}")
        return self._preparer.chat(messages, arguments)

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
        """Generate from `prompt`: text taken raw, or token ids. Yields `Token`s; `.report` tells what was done. Ends at
        any token that ends generation for any member.

        max_tokens: None goes on to the end of the context. stop: strings that end the answer. top_logprobs: how many
        likely tokens each token lists. prompts: member -> a prompt of its own. draft: tokens that an expert, or a text
        that repeats itself, runs ahead at each step, which changes the speed and not the tokens (but where two fused
        logits tie within what llama.cpp rounds batches by); "auto" chooses what pays, "off" is 0. grammar, json_schema:
        what the answer must look like, text of a GBNF grammar or JSON of a schema. trace: whether each token carries
        why it was chosen. settings: fields of SamplingParams and FusionParams, and `profile`, the name of such ones in
        family.toml, over which these go.

        Raises InvalidParameterError, ContextOverflowError (before anything is evaluated), TypeError for unknown names.
        """
        answer = self._preparer.answer(
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
            **settings,
        )
        self._begin()
        return TokenStream(self.driver, answer)

    def n_picked(self) -> int:
        """Tokens picked so far for requests of a batch that are not done; may be asked from another thread."""
        return self.driver.n_picked

    def _begin(self) -> None:
        """End the request that is running."""
        self.driver.clear()
        self._members.interrupt.clear()

    def create_completion(
        self, prompt: Prompt, *, logprobs: int | None = None, stream: bool = False, **arguments: Any
    ) -> Dict | Iterator[Dict]:
        """Return an OpenAI-shaped completion of `prompt`, or, with `stream`, an iterator of chunks.

        logprobs: how many likely tokens to list beside each token's own logprob.
        arguments: those of `stream`.

        A traced result has its tokens, as `--trace` writes them, in `["edge_dlf"]["trace"]["tokens"]`.
        """
        n_top = 0 if logprobs is None else count("logprobs", logprobs)
        answer = self._preparer.answer("create_completion", prompt, top_logprobs=n_top, **arguments)
        return self._complete(self._preparer.completion(answer, prompt, logprobs), stream)

    def _complete(self, completion: Completion, stream: bool) -> Dict | Iterator[Dict]:
        is_stream = flag("stream", stream)
        self._begin()
        tokens = TokenStream(self.driver, completion.answer)
        return completion.chunks(tokens) if is_stream else completion.result(list(tokens))

    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *,
        logprobs: bool = False,
        top_logprobs: int = 0,
        stream: bool = False,
        prompts: Mapping[str, Sequence[Message]] | None = None,
        **arguments: Any,
    ) -> Dict | Iterator[Dict]:
        """Return an OpenAI-shaped answer to `messages`, or, with `stream`, an iterator of chunks.

        logprobs, top_logprobs: whether to list logprobs, and how many likely tokens beside each token's own.
        prompts: member -> messages of its own.
        arguments: those of `stream`, and OpenAI's response_format, in place of json_schema, tools, tool_choice and
            parallel_tool_calls; chat_template_kwargs: variables of the chat template; think: "on", "off" or "auto";
            think_budget: most tokens of thinking, which is `reasoning_content` of the message; calls are `tool_calls`.
        """
        of_template = {name: arguments[name] for name in (*OF_TEMPLATE, "think") if name in arguments}
        own: Any = prompts
        if isinstance(prompts, Mapping):
            own = {name: self.apply_chat_template(each, **of_template) for name, each in prompts.items()}
        n_top = 0 if top_logprobs is None else count("top_logprobs", top_logprobs)
        is_listed = flag("logprobs", False if logprobs is None else logprobs)
        require(is_listed or not n_top, "top_logprobs needs logprobs=True")
        prompt = self._preparer.chat(messages, arguments)
        answer = self._preparer.answer("create_chat_completion", prompt, top_logprobs=n_top, prompts=own, **arguments)
        return self._complete(ChatCompletion(answer, self.name, logprobs, self._preparer.tokenizer.name_bytes), stream)

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
        exact: bool = False,
        **settings: Any,
    ) -> Iterator[Dict]:
        """Results of many requests, `n_parallel` decoded at once, as they are done, or, if `ordered`, in their order.

        requests: lines of an OpenAI batch file as mappings, or the short form, `{"prompt": …}` or `{"messages": …}`,
        with an `id` (else their number) and fields as in an OpenAI body; or strings, which are prompts. They are pulled
        as there is room. raw: a prompt of the short form is taken raw, otherwise as a user's message; system: the
        message before messages that have none. exact: one at a time (n_parallel=1), each with empty KV caches and no
        drafts, so that the others do not even change its rounding.
        settings: arguments of `stream`, for requests that do not set them. A sampled request without a seed of its own
        gets one from `seed` and its id, so that its result depends neither on the others nor on the order.
        Results are OpenAI's: `custom_id` and `response` with `body`, or `error` with `code` and `message`, which ends
        no other request. Raises what concerns them all.
        """
        self._preparer.check_batch({"seed": seed, **settings}, draft=draft, trace=trace)
        shared = {"raw": raw, "system": system, "draft": "off" if exact else draft, "trace": trace}

        def prepare(request: Request, custom_id: str) -> Completion:
            return self.prepare(request, **{"seed": row_seed(seed, custom_id), **settings, **shared})

        self._begin()
        return run_batch(self.driver, many("requests", requests), prepare, ordered=ordered, exact=exact)

    def score(self, pairs: Iterable[tuple[Prompt, Sequence[int]]], **settings: Any) -> Iterator[tuple[int, Score]]:
        """How likely given answers are: of each pair of a prompt and the tokens that follow it, its number, from 0, and
        its `Score`, as they are done, `n_parallel` at once.

        Prompts that begin alike and follow one another are evaluated once. settings: fields of FusionParams, `profile`.
        Raises InvalidParameterError, ContextOverflowError, TypeError for unknown names.
        """
        scored = self._preparer.scorer(settings)
        self._begin()
        return run_scores(self.driver, map(scored, many("pairs", pairs)))

    def prepare(self, request: Request, **settings: Any) -> Completion:
        """Check a request and return its answer, for the caller to add to the driver. Arguments as in `batch`."""
        return self._preparer.request(request, **settings)


def _ready_fuser(files: FamilyFiles, n_threads: int) -> Fuser:
    from .fusion.ready import ready_fuser  # loads numba

    return ready_fuser(files.n_vocab, n_threads, files.tokens.lacking)
