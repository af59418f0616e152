"""The files of a family: `check_files` reads each header once, and checks that the files fit together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FamilyError, InvalidParameterError, VocabMismatchError
from ..gguf.header import show
from ..gguf.info import GGUFInfo, check_lora_fits, read_info
from .spec import FamilySpec

_UNUSED = 5  # GGUF's type of a token that never occurs
_PADDING = re.compile(
    rb"[\[<]\|?([a-z]+_)*pad(ding)?(_?token|_id)?_?\d*\|?[\]>]|<\|?(unused|extra|reserved|dummy)[\w-]*\|?>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FamilyFiles:
    """A family and the headers of its files, which fit together. Whatever needs a header takes it from here.

    spec: the family.
    infos: file -> its header, LoRA adapters included.
    models: role -> header of its model; a LoRA expert has the base's.
    loras: LoRA expert -> its (file, scale) pairs.
    n_vocab: tokens that all models share; longer lists only add padding.
    """

    spec: FamilySpec
    infos: Mapping[Path, GGUFInfo]
    models: Mapping[str, GGUFInfo]
    loras: Mapping[str, tuple[tuple[Path, float], ...]]
    n_vocab: int

    def layers(self, n_gpu_layers: int | Mapping[str, int]) -> dict[str, int]:
        """Layers to offload for each role; members that a mapping leaves out are offloaded whole.

        Raises InvalidParameterError for a name that has no layers of its own.
        """
        return {name: -1 if n is None else n for name, n in self._each("n_gpu_layers", n_gpu_layers).items()}

    def splits(
        self, main_gpu: int | Mapping[str, int] | None, tensor_split: Sequence[float] | None, n_gpus: int
    ) -> dict[str, tuple[float, ...]]:
        """Shares of n_gpus GPUs that were asked for, by role. A member named in `main_gpu` is on that GPU alone, the
        others are divided by `tensor_split`. Empty without a GPU.

        Raises InvalidParameterError for GPUs that do not exist, impossible shares, and both settings for all members.
        """
        own = self._each("main_gpu", main_gpu)
        numbers = [n for n in own.values() if n is not None]
        shares = tuple(float(share) for share in tensor_split or ())
        if min(numbers, default=0) < 0:
            raise InvalidParameterError(f"main_gpu counts GPUs from 0 on, it cannot be {main_gpu!r}")
        if tensor_split is not None:
            if not all(0 <= share < math.inf for share in shares) or not sum(shares):
                raise InvalidParameterError(f"tensor_split must be shares of each GPU, such as 3,1; not {[*shares]}")
            if len(numbers) == len(own):
                raise InvalidParameterError("tensor_split and main_gpu for every member exclude each other")
        if n_gpus and max(numbers, default=0) >= n_gpus:
            raise InvalidParameterError(f"main_gpu is {max(numbers)}, but the GPUs are 0 to {n_gpus - 1}")
        if n_gpus and any(shares[n_gpus:]):
            raise InvalidParameterError(f"tensor_split has {len(shares)} shares for {n_gpus} GPUs")
        spread = (*shares, *[0.0] * n_gpus)[:n_gpus]
        split = {
            name: spread if n is None else tuple(float(gpu == n) for gpu in range(n_gpus)) for name, n in own.items()
        }
        return {name: each for name, each in split.items() if any(each)}

    def _each(self, setting: str, value: int | Mapping[str, int] | None) -> dict[str, int | None]:
        """Value of a setting for each role; None if it does not name the role.

        Raises InvalidParameterError for unknown names, and for a LoRA, which has the base's value.
        """
        if not isinstance(value, Mapping):
            return dict.fromkeys(self.models, value)
        if unknown := sorted(set(value) - set(self.models)):
            raise InvalidParameterError(f"{setting} names {unknown[0]!r}; the members are {', '.join(self.models)}")
        if shared := sorted(set(value) & set(self.loras)):
            raise InvalidParameterError(f"{setting} names {shared[0]!r}, a LoRA that has its layers from the base")
        return {name: value.get(name) for name in self.models}


def check_files(family: FamilySpec | str | Path) -> FamilyFiles:
    """Read the header of every file of a family, given as `FamilySpec.load` takes it or loaded already.

    Raises ModelFileError, FamilyError or VocabMismatchError.
    """
    spec = family if isinstance(family, FamilySpec) else FamilySpec.load(family)
    spec.check_is_here()
    infos: dict[Path, GGUFInfo] = {}

    def info(path: Path) -> GGUFInfo:
        if path not in infos:
            infos[path] = read_info(path, next(iter(infos.values()), None))
        return infos[path]

    large, base = info(spec.large.local_path()), info(spec.base.local_path())
    for role, model in (("large", large), ("base", base)):
        if model.is_adapter:
            raise FamilyError(f"{model.path}: is a LoRA adapter; {role} must be a whole model")
    models = {"large": large, "base": base}
    loras: dict[str, tuple[tuple[Path, float], ...]] = {}
    for expert in spec.experts:
        ((source, scale), *_) = expert.files
        if scale is None and not info(source.local_path()).is_adapter:
            models[expert.name] = info(source.local_path())
            continue
        pairs = tuple((source.local_path(), 1.0 if scale is None else scale) for source, scale in expert.files)
        for path, _ in pairs:
            check_lora_fits(info(path), base)
        paths = [path.resolve() for path, _ in pairs]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise FamilyError(f"expert {expert.name!r} names {twice} twice; name it once, with the sum of the scales")
        models[expert.name], loras[expert.name] = base, pairs
    for model in {id(model): model for model in models.values() if model is not large}.values():
        _check_one_tokenizer(large, model)
    return FamilyFiles(spec, infos, models, loras, min(map(_n_vocab, models.values())))


def _check_one_tokenizer(a: GGUFInfo, b: GGUFInfo) -> None:
    """The same kind, and the same text at every id that both have; beyond that only padding."""
    both = f"{a.path} and {b.path} do not share one tokenizer"
    kinds = [model.metadata.get("tokenizer.ggml.model") for model in (a, b)]
    if kinds[0] != kinds[1]:
        raise VocabMismatchError(f"{both}: the first is of type {kinds[0]!r}, the second of type {kinds[1]!r}")
    short, long = sorted((a, b), key=_n_vocab)
    if not long.vocabulary.tokens.data.startswith(short.vocabulary.tokens.data):
        pairs = enumerate(zip(a.vocabulary.tokens.since(0), b.vocabulary.tokens.since(0), strict=False))
        token, (ours, theirs) = next((token, texts) for token, texts in pairs if texts[0] != texts[1])
        raise VocabMismatchError(f"{both}: token {token} is {show(ours)} in the first and {show(theirs)} in the second")
    if _n_vocab(short) == _n_vocab(long):
        return
    for token, text in enumerate(long.vocabulary.tokens.since(_n_vocab(short)), _n_vocab(short)):
        is_padding = long.vocabulary.types[token] == _UNUSED or _PADDING.fullmatch(text)
        if not is_padding:
            raise VocabMismatchError(
                f"{both}: {long.path.name} has token {token}, {show(text)}, where the other has ended"
            )


def _n_vocab(model: GGUFInfo) -> int:
    assert model.n_vocab is not None, "a model has a vocabulary"
    return model.n_vocab
