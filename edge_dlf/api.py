"""`FusedLlama`: a family of GGUF models that decodes as one. The one place that wires llama.cpp to the rest."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .completion import ChatCompletionShape, CompletionShape, Dict
from .decode import Decoder, Generation
from .ensemble import Ensemble
from .errors import ContextOverflowError, EdgeDLFError, InvalidParameterError
from .family import FamilySpec
from .files import check_files
from .llama import Interrupt, LlamaBackend, Model, default_n_threads
from .params import FusionParams, SamplingParams, check_draft
from .stream import TokenStream
from .template import ChatTemplate, Message
from .text import to_bytes

if TYPE_CHECKING:
    from .fusion import Fuser

logger = logging.getLogger(__name__)

Prompt: TypeAlias = str | Sequence[int]
ExpertFiles: TypeAlias = str | Path | Sequence[tuple[str | Path, float]]

_PATIENCE_S = 4.0
_SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_FUSION = frozenset(field.name for field in dataclasses.fields(FusionParams))


class FusedLlama:
    """A large model, a base and one or more experts in memory, answering together.

    large, base: GGUF files. experts: name -> a GGUF file, a LoRA GGUF over the base, or [(lora, scale), …].
    n_ctx: positions of the context, for every member. n_gpu_layers: layers to offload, -1 for all; one number, or a
    mapping from member to a number (LoRA experts have the base's layers).
    n_threads: None takes the physical cores. type_k, type_v: types of the KV cache, such as "f16" (default) or "q8_0".

    Raises LoadError (ModelFileError, FamilyError, VocabMismatchError) or OutOfMemoryError. One request at a time: a new
    one ends the one before. A context manager.
    """

    def __init__(
        self,
        large: str | Path,
        base: str | Path,
        experts: Mapping[str, ExpertFiles],
        *,
        n_ctx: int = 4096,
        n_gpu_layers: int | Mapping[str, int] = -1,
        n_threads: int | None = None,
        type_k: str | None = None,
        type_v: str | None = None,
    ) -> None:
        spec = FamilySpec.from_files(large, base, experts)
        self._load(spec, n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=n_threads, type_k=type_k, type_v=type_v)

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
        n_ctx: int = 4096,
        n_gpu_layers: int | Mapping[str, int] = -1,
        n_threads: int | None = None,
        type_k: str | None = None,
        type_v: str | None = None,
    ) -> None:
        n_threads = n_threads or default_n_threads()
        files = check_files(spec)
        layers = files.layers(n_gpu_layers)
        self.name = spec.name
        self._defaults = dict(spec.defaults)
        self._interrupt = Interrupt()
        with ExitStack() as stack:
            # Importing numba and loading kernels takes as long as mapping the models: both at once.
            background = ThreadPoolExecutor(1)
            fuser = background.submit(_ready_fuser, files.n_vocab, n_threads)
            background.shutdown(wait=False)
            loaded: dict[Path, Model] = {}
            models: dict[str, Model] = {}
            backends: dict[str, LlamaBackend] = {}
            for name, info in files.models.items():
                if info.path not in loaded:
                    loaded[info.path] = Model(info.path, layers[name])
                    stack.callback(loaded[info.path].close)
                models[name] = loaded[info.path]
                backends[name] = LlamaBackend(
                    models[name],
                    name,
                    n_ctx=n_ctx,
                    n_threads=n_threads,
                    type_k=type_k,
                    type_v=type_v,
                    loras=files.loras.get(name, ()),
                    interrupt=self._interrupt,
                )
                stack.callback(backends[name].close)
            decoder = Decoder(Ensemble(backends, files.n_vocab), fuser.result())
            self._closing = stack.pop_all()
        self._large: Model | None = models["large"]
        self._models = tuple(loaded.values())
        self._ensemble = decoder.ensemble
        self._decoder = decoder
        self._template: ChatTemplate | None = None
        self._request = 0
        self._said_stuck = False
        if n_ctx > self._model.n_ctx_train:
            logger.warning(
                "a context of %d tokens is more than the %d that the large model was trained for",
                n_ctx,
                self._model.n_ctx_train,
            )

    def __enter__(self) -> FusedLlama:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free contexts and weights. Calling it twice is no error."""
        self._request += 1
        self._large = None
        self._closing.close()

    def interrupt(self) -> None:
        """Stop the running request, even amid a long prompt; for other threads. It raises RequestInterruptedError; a
        later one is not affected."""
        self._interrupt.set()

    @property
    def _model(self) -> Model:
        """The large model, whose vocabulary and chat template are the family's."""
        if self._large is None:
            raise EdgeDLFError("this FusedLlama has been closed")
        return self._large

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

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text` as a raw prompt: with BOS where the model expects one, and, if `special`, the names of
        control tokens read as these tokens."""
        tokens = self._model.tokenize(to_bytes(text), special=special)
        if self._model.adds_bos and tokens[:1] != [self._model.bos]:
            tokens.insert(0, self._bos())
        return tokens

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, names of control tokens included."""
        return b"".join(map(self._special_piece, tokens)).decode("utf-8", "replace")

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Prompt tokens for the assistant's answer to `messages`, by the large model's own chat template. No text in a
        message can become a control token."""
        if self._template is None:
            self._template = self._compile_template()
        tokens = self._template.tokens(messages)
        if self._model.adds_bos and tokens[:1] != [self._model.bos]:
            tokens.insert(0, self._bos())
        return tokens

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        top_logprobs: int = 0,
        prompts: Mapping[str, Prompt] | None = None,
        draft: int | Literal["auto", "off"] = "off",
        **settings: Any,
    ) -> TokenStream:
        """Generate from `prompt`: text taken raw, or token ids. Yields `Token`s; `.report` tells what was done.

        max_tokens: None goes on to the end of the context. stop: strings that end the answer. top_logprobs: how many
        likely tokens each token lists. prompts: member -> a prompt of its own. draft: tokens that an expert, or a text
        that repeats itself, runs ahead at each step, which changes the speed and not the tokens (but where two fused
        logits tie within what llama.cpp rounds batches by); "auto" chooses what pays, "off" is 0. settings: fields of
        SamplingParams and FusionParams. Generation ends at any token that ends generation for any member.
        Raises InvalidParameterError, ContextOverflowError (before anything is evaluated), TypeError for unknown names.
        """
        sampling, fusion = self._params("stream", settings)
        _require_count("max_tokens", max_tokens, least=1)
        _require_count("top_logprobs", top_logprobs, least=0)
        roles = self._ensemble.roles(fusion)
        own = prompts or {}
        piece = self._model.piece
        if unknown := sorted(set(own) - set(self._ensemble.members)):
            raise InvalidParameterError(
                f"prompts names {unknown[0]!r}; the members are {', '.join(self._ensemble.members)}"
            )
        shared = self._prompt_tokens(prompt)
        n_draft = self._n_draft(draft)
        generation = Generation(
            seq=0,
            roles=roles,
            fusion=fusion,
            sampling=sampling,
            alphas=self._ensemble.static_alphas(fusion) if fusion.method == "static" else (),
            n_top=min(top_logprobs, self.n_vocab),
            n_draft=n_draft,
        )
        tokens = {name: self._prompt_tokens(own[name]) if name in own else shared for name in generation.members()}
        longest = max(map(len, tokens.values()))
        if longest + (max_tokens or 1) > self.n_ctx:
            raise ContextOverflowError(
                f"the prompt has {longest} tokens and the answer may have {max_tokens or 1}: together "
                f"{longest + (max_tokens or 1)}, more than the context of {self.n_ctx}"
            )
        self._request += 1
        request = self._request
        self._interrupt.clear()
        return TokenStream(
            self._decoder,
            generation,
            tokens,
            max_tokens=max_tokens or self.n_ctx - longest,
            stop=_stop_strings(stop),
            piece=piece,
            ends=lambda token: any(model.is_eog(token) for model in self._models),
            is_current=lambda: self._request == request,
        )

    def create_completion(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        stream: bool = False,
        prompts: Mapping[str, Prompt] | None = None,
        draft: int | Literal["auto", "off"] = "off",
        **settings: Any,
    ) -> Dict | Iterator[Dict]:
        """An OpenAI-shaped completion of `prompt`, or, with `stream`, an iterator of chunks. Arguments as in `stream`;
        logprobs: how many likely tokens to list beside each token's own logprob."""
        self._params("create_completion", settings)
        tokens = self.stream(
            prompt,
            max_tokens=max_tokens,
            stop=stop,
            top_logprobs=logprobs or 0,
            prompts=prompts,
            draft=draft,
            **settings,
        )
        shape = CompletionShape(self.name, logprobs is not None, self._special_piece)
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
        draft: int | Literal["auto", "off"] = "off",
        **settings: Any,
    ) -> Dict | Iterator[Dict]:
        """An OpenAI-shaped answer to `messages`, or, with `stream`, an iterator of chunks. Arguments as in `stream`;
        prompts: member -> messages of its own."""
        self._params("create_chat_completion", settings)
        tokens = self.stream(
            self.apply_chat_template(messages),
            max_tokens=max_tokens,
            stop=stop,
            top_logprobs=top_logprobs if logprobs else 0,
            prompts={name: self.apply_chat_template(own) for name, own in (prompts or {}).items()},
            draft=draft,
            **settings,
        )
        shape = ChatCompletionShape(self.name, logprobs, self._special_piece)
        return shape.chunks(tokens, tokens.report) if stream else shape.result(list(tokens), tokens.report)

    def _params(self, function: str, settings: Mapping[str, Any]) -> tuple[SamplingParams, FusionParams]:
        """`settings` over the family's defaults. Raises TypeError for a name that is neither's."""
        if unknown := sorted(set(settings) - _SAMPLING - _FUSION):
            raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")
        merged = {**self._defaults, **settings}
        if bias := merged.get("logit_bias"):
            merged["logit_bias"] = {self._known_token(int(token)): float(value) for token, value in bias.items()}
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

    def _prompt_tokens(self, prompt: Prompt) -> list[int]:
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else [self._known_token(token) for token in prompt]
        return tokens or [self._bos()]

    def _bos(self) -> int:
        if self._model.bos is None:
            raise InvalidParameterError("the prompt is empty, and this model has no token that begins a text")
        return self._model.bos

    def _known_token(self, token: int) -> int:
        if not 0 <= token < self.n_vocab:
            raise InvalidParameterError(f"there is no token {token}; ids go from 0 to {self.n_vocab - 1}")
        return int(token)

    def _special_piece(self, token: int) -> bytes:
        return self._model.piece(token, special=True)

    def _token_name(self, token: int) -> str:
        return self._special_piece(token).decode("utf-8", "replace")

    def _compile_template(self) -> ChatTemplate:
        source = self._model.chat_template
        if source is None:
            raise InvalidParameterError("the large model has no chat template; give it a raw prompt instead")
        bos, eos = self._model.bos, self._model.eos
        return ChatTemplate(
            source,
            bos="" if bos is None else self._token_name(bos),
            eos="" if eos is None else self._token_name(eos),
            control={self._token_name(token): token for token in self._model.control_tokens()},
            tokenize=lambda text: self._model.tokenize(to_bytes(text), special=False),
        )


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
