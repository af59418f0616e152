"""The tokens that the models of a family share. Ordinary tokens agree at every id; control tokens may differ.

The family's ids are the large model's. A control token that stands elsewhere in another model is matched by its text,
or else by its role, such as the end of a text. What a model lacks it has no logit for, and reads as a line break.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..engine.token_map import Ids, TokenMap
from ..errors import VocabMismatchError
from ..gguf.header import show
from ..gguf.info import GGUFInfo
from ..gguf.template_source import TemplateSource

_CONTROL, _UNUSED = 3, 5
_NO_TEXT = 2, _CONTROL, 4, _UNUSED
"""GGUF's types of tokens that no text is cut into: unknown, control, named by a user, and unused ones."""
_PADDING = re.compile(
    rb"[\[<]\|?([a-z]+_)*pad(ding)?(_?token|_id)?_?\d*\|?[\]>]|<\|?(unused|extra|reserved|dummy)[\w-]*\|?>",
    re.IGNORECASE,
)
_ENDS = "eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"
"""Roles of tokens that end an answer, in a GGUF's keys."""
_ROLES: Mapping[str, Sequence[str]] = {
    "eos": ("eos",),
    "eot": ("eot", "eos"),
    "eom": ("eom", "eot", "eos"),
    **{role: (role,) for role in ("bos", "unknown", "padding", "fim_pre", "fim_suf", "fim_mid", *_ENDS[3:])},
}
"""Role of a token of the large model -> roles of another model's tokens that may stand for it, the best one first."""
_LINE_BREAKS = "Ċ".encode(), b"<0x0A>", b"\n"
"""The line break in a vocabulary: as GPT-2 writes bytes, as SentencePiece does, and as it is."""


@dataclass(frozen=True)
class Match:
    """How the control tokens of one model are matched with the large model's. Padding is in none of the lists.

    model: name of its file.
    renamed: the large model's and the model's own text of tokens of one role. moved: texts that stand at another id.
    lacking: texts of the large model's tokens that it has no logit for. extra: its own, which are never picked.
    n_control: control tokens of the large model. end: what ends the large model's texts, where it is lacking.
    """

    model: str
    renamed: Sequence[tuple[bytes, bytes]]
    moved: Sequence[bytes]
    lacking: Sequence[bytes]
    extra: Sequence[bytes]
    n_control: int
    end: bytes | None

    def told(self) -> str:
        """Say in one line what was matched."""
        parts = []
        if self.renamed:
            pairs = ", ".join(f"{show(own)} stands for {show(ours)}" for ours, own in self.renamed)
            parts.append(f"by role {pairs}")
        if self.moved:
            parts.append(f"at other ids {_some(self.moved)}")
        if self.lacking:
            parts.append(f"it lacks {_some(self.lacking)}")
        if self.extra:
            parts.append(f"never picked are its {_some(self.extra)}")
        return f"{self.model}: control tokens matched with the large model's: {'; '.join(parts) or 'all but padding'}"

    def warning(self) -> str | None:
        """Say what is lost, where it is much."""
        if self.end is not None:
            return f"{self.model} has nothing for {show(self.end)}: it has no say in where an answer ends"
        if 2 * len(self.lacking) > self.n_control:
            return f"{self.model} lacks {len(self.lacking)} of the large model's {self.n_control} control tokens"
        return None


@dataclass(frozen=True)
class SharedTokens:
    """The ids of a family, and what they are in models whose control tokens differ from the large model's.

    n_vocab: tokens that can be picked. ends: those that end an answer by the header of any model.
    maps: role -> ids of its model; roles whose ids are the large model's are missing.
    templates: those of the roles in `maps` that have a chat template of their own.
    matches: file -> how its control tokens were matched.
    """

    n_vocab: int
    ends: frozenset[int] = frozenset()
    maps: Mapping[str, TokenMap] = field(default_factory=dict)
    templates: Mapping[str, TemplateSource] = field(default_factory=dict)
    matches: Mapping[Path, Match] = field(default_factory=dict)

    @property
    def lacking(self) -> dict[str, Ids]:
        """Ids that members have no logit for, by role."""
        return {role: each.lacking for role, each in self.maps.items() if len(each.lacking)}


def share_tokens(models: Mapping[str, GGUFInfo]) -> SharedTokens:
    """Match the tokens of all models, by role, with those of the large one.

    Raises VocabMismatchError where ordinary tokens differ.
    """
    large = models["large"]
    others = {model.path: model for model in models.values() if model is not large}
    differing = {path: _differing(large, model) for path, model in others.items()}
    n_shortest = min(map(_n_vocab, models.values()))
    n_vocab = max([n_shortest, *(token + 1 for token in _beyond(large, n_shortest))])
    found = {path: _Matching(large, others[path], ids, n_vocab) for path, ids in differing.items() if ids}
    extras = list(dict.fromkeys(text for each in found.values() for text in each.extra))
    ids = {text: n_vocab + n for n, text in enumerate(extras)}
    ends = set(_of_roles(large, _ENDS).values())
    for path, model in others.items():
        own = _of_roles(model, _ENDS).values()
        ends |= {token for end in own if (token := found[path].in_family(end)) is not None} if path in found else {*own}
    mapped = {role: found[model.path] for role, model in models.items() if model.path in found}
    return SharedTokens(
        n_vocab,
        frozenset(ends),
        {role: each.token_map(extras) for role, each in mapped.items()},
        {role: template for role, each in mapped.items() if (template := each.template(ids))},
        {path: each.match() for path, each in found.items()},
    )


class _Matching:
    """The tokens of one model beside the large model's.

    ids: those where the two differ.
    extra: its control tokens that the large model has no token for -> their ids.
    """

    def __init__(self, large: GGUFInfo, model: GGUFInfo, ids: Sequence[int], n_vocab: int) -> None:
        self._large, self._model, self._n_vocab, self._ids = large, model, n_vocab, set(ids)
        self._ours, self._own = list(large.vocabulary.tokens.since(0)), list(model.vocabulary.tokens.since(0))
        self._moved: list[int] = []
        self._renamed: list[int] = []
        self._lacking: list[int] = []
        self._reads = np.arange(n_vocab)
        self._line_break = self._find_line_break()
        free = {self._own[token]: token for token in ids if token < len(self._own)}
        self._match([token for token in ids if token < n_vocab], free)
        self.extra = {text: token for text, token in free.items() if not _is_padding(model, token, text)}
        matched = [*self._moved, *self._renamed]
        self._owners: dict[int, int] = dict(zip(self._reads[matched].tolist(), matched, strict=True))

    def _match(self, left: list[int], free: dict[bytes, int]) -> None:
        """Match the large model's tokens in `left` with those in `free`, from which what is matched is taken out."""
        for token in left:
            if (own := free.pop(self._ours[token], None)) is not None:
                self._reads[token] = own
                self._moved.append(token)
        ours, theirs = _of_roles(self._large, _ROLES), _of_roles(self._model, _ROLES)
        read = set(self._moved)
        for role, token in ours.items():
            own = next((theirs[each] for each in _ROLES[role] if each in theirs), None)
            if own is None or token in read or token not in left:
                continue
            read.add(token)
            self._reads[token] = own
            if free.get(self._own[own]) == own:
                del free[self._own[own]]
                self._renamed.append(token)
        for token in left:
            if token not in read:
                self._reads[token] = self._line_break
        matched = {*self._moved, *self._renamed}
        self._lacking = [token for token in left if token not in matched]

    def _find_line_break(self) -> int:
        """Return the token that is read in place of one that the model lacks. Raises VocabMismatchError."""
        known = set(self._ours)
        text = next((text for text in _LINE_BREAKS if text in known), None)
        token = -1 if text is None else self._ours.index(text)
        if text is None or token in self._ids:
            raise VocabMismatchError(
                f"{self._large.path} and {self._model.path} do not share one tokenizer: their control tokens differ, "
                "and they have no line break in common, to be read in place of those that one of them lacks"
            )
        return token

    def in_family(self, own: int) -> int | None:
        """Return the family's id of one of the model's tokens, None for one that cannot be picked."""
        if own in self._owners:
            return self._owners[own]
        return own if own < self._n_vocab and own not in self._ids else None

    def token_map(self, extras: Sequence[bytes]) -> TokenMap:
        """Return the ids; `extras` are the texts of the tokens that cannot be picked."""
        known = {text: token for token, text in enumerate(self._own) if token in self._ids}
        beyond = [known.get(text, self._line_break) for text in extras]
        return TokenMap(self._n_vocab, np.array([*self._reads, *beyond]), np.array(self._lacking, np.int64))

    def template(self, extras: Mapping[bytes, int]) -> TemplateSource | None:
        """Return the model's chat template, unless it has none or the large model's.

        extras: family's ids of the tokens that cannot be picked.
        """
        source, shared = (info.metadata.get("tokenizer.chat_template") for info in (self._model, self._large))
        if not isinstance(source, str) or source == shared:
            return None
        types, metadata = self._model.vocabulary.types, self._model.metadata
        control = {}
        for own in {*np.flatnonzero(types == _CONTROL).tolist(), *self.extra.values()}:
            text = self._own[own]
            if (token := self.in_family(own)) is not None or (token := extras.get(text)) is not None:
                control[text.decode("utf-8", "replace")] = token
        roles = _of_roles(self._model, ("bos", "eos"))
        bos, eos = (
            self._own[roles[role]].decode("utf-8", "replace") if role in roles else "" for role in ("bos", "eos")
        )
        adds_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
        return TemplateSource(source, bos, eos, control, control.get(bos) if adds_bos else None)

    def match(self) -> Match:
        """Return what was matched, in words of the files."""
        eos, ours = _of_roles(self._large, ("eos",)).get("eos"), self._ours
        types = self._large.vocabulary.types
        control = [token for token in np.flatnonzero(np.isin(types, _NO_TEXT)).tolist() if not self._pads(token)]
        return Match(
            self._model.path.name,
            [(ours[token], self._own[self._reads[token]]) for token in self._renamed],
            [ours[token] for token in self._moved],
            [ours[token] for token in self._lacking if not self._pads(token)],
            list(self.extra),
            len(control),
            ours[eos] if eos in self._lacking else None,
        )

    def _pads(self, token: int) -> bool:
        return _is_padding(self._large, token, self._ours[token])


def _differing(large: GGUFInfo, model: GGUFInfo) -> list[int]:
    """Ids at which two models have other tokens; padding that only lengthens one of them is left out.

    Raises VocabMismatchError where one of these tokens is an ordinary one.
    """
    both = f"{large.path} and {model.path} do not share one tokenizer"
    kinds = [info.metadata.get("tokenizer.ggml.model") for info in (large, model)]
    if kinds[0] != kinds[1]:
        raise VocabMismatchError(f"{both}: the first is of type {kinds[0]!r}, the second of type {kinds[1]!r}")
    short, long = sorted((large, model), key=_n_vocab)
    differing = []
    if not long.vocabulary.tokens.data.startswith(short.vocabulary.tokens.data):
        pairs = zip(large.vocabulary.tokens.since(0), model.vocabulary.tokens.since(0), strict=False)
        for token, (ours, theirs) in enumerate(pairs):
            if ours == theirs:
                continue
            if not (_has_no_text(large, token, ours) and _has_no_text(model, token, theirs)):
                raise VocabMismatchError(
                    f"{both}: token {token} is {show(ours)} in the first and {show(theirs)} in the second"
                )
            differing.append(token)
    for token, text in _beyond(long, _n_vocab(short)).items():
        if not _has_no_text(long, token, text):
            raise VocabMismatchError(
                f"{both}: {long.path.name} has token {token}, {show(text)}, where the other has ended"
            )
        differing.append(token)
    return differing


def _beyond(model: GGUFInfo, n: int) -> dict[int, bytes]:
    """Tokens of a model from id `n` on that are more than padding."""
    texts = enumerate(model.vocabulary.tokens.since(n), n)
    return {token: text for token, text in texts if not _is_padding(model, token, text)}


def _is_padding(model: GGUFInfo, token: int, text: bytes) -> bool:
    return bool(model.vocabulary.types[token] == _UNUSED or _PADDING.fullmatch(text))


def _has_no_text(model: GGUFInfo, token: int, text: bytes) -> bool:
    """Whether a token is none of those that texts are cut into."""
    return model.vocabulary.types[token] in _NO_TEXT or bool(_PADDING.fullmatch(text))


def _of_roles(model: GGUFInfo, roles: Iterable[str]) -> dict[str, int]:
    """The tokens that a model's header names for these roles."""
    found = {role: model.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in roles}
    return {role: token for role, token in found.items() if type(token) is int and 0 <= token < _n_vocab(model)}


def _some(texts: Sequence[bytes]) -> str:
    """A few of the texts, and how many more there are."""
    rest = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return ", ".join(map(show, texts[:4])) + rest


def _n_vocab(model: GGUFInfo) -> int:
    assert model.n_vocab is not None, "a model has a vocabulary"
    return model.n_vocab
