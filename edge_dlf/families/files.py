"""The files of a family: `check_files` reads each header once, and checks that the files fit together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.ensemble import Roles
from ..errors import FamilyError, InvalidParameterError, require, shown
from ..gguf.header import header_hash
from ..gguf.info import GGUFInfo, check_lora_fits, read_info
from ..params import METHODS, ByName, Number, params_of
from .spec import ExpertSpec, FamilySpec
from .tokens import SharedTokens, share_tokens

_THROUGH = "edge_dlf.trained.through"
"""Key of an adapter's header: what it was trained as, such as "corrector"."""
_LARGE = "edge_dlf.trained.large"
"""Key of an adapter's header: `header_hash` of the large model that it was trained for."""


@dataclass(frozen=True)
class FamilyFiles:
    """A family and the headers of its files, which fit together. Whatever needs a header takes it from here.

    spec: the family. Its defaults name a method where the global one, dynamic, cannot be used.
    infos: file -> its header, LoRA adapters included.
    models: role -> header of its model; a LoRA expert has the base's. Where all experts are correctors there is no role
        "base": its file only holds the weights that their LoRAs go over.
    loras: LoRA expert -> its (file, scale) pairs.
    tokens: those that all models share.
    correctors: experts that are added to the large model as they are, without the base.
    """

    spec: FamilySpec
    infos: Mapping[Path, GGUFInfo]
    models: Mapping[str, GGUFInfo]
    loras: Mapping[str, tuple[tuple[Path, float], ...]]
    tokens: SharedTokens
    correctors: frozenset[str] = frozenset()

    @property
    def n_vocab(self) -> int:
        """Tokens that can be picked."""
        return self.tokens.n_vocab

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the family can be asked for."""
        experts = [expert.name for expert in self.spec.experts]
        impossible = {*self.correctors, "dynamic", "blend"} if self.correctors else set()
        impossible |= {"base"} - set(self.models)
        return tuple(name for name in (*METHODS, *experts) if name not in impossible)

    def roles(self, settings: Mapping[str, Any]) -> Roles:
        """Who takes part under `settings`. Raises InvalidParameterError for what this family cannot do."""
        _, fusion = params_of(settings)
        return Roles.of(fusion, tuple(self.models), self.correctors)

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
        shares: tuple[float, ...] = ()
        with suppress(TypeError, InvalidParameterError):  # what is no number is told below
            shares = tuple(Number(0).read("a share", share) for share in tensor_split or ())
        require(min(numbers, default=0) >= 0, f"main_gpu counts GPUs from 0 on, it cannot be {shown(main_gpu)}")
        if tensor_split is not None:
            if not sum(shares):
                raise InvalidParameterError(
                    f"tensor_split must be shares of each GPU, such as 3,1; not {shown(tensor_split)}"
                )
            require(len(numbers) < len(own), "tensor_split and main_gpu for every member exclude each other")
        if n_gpus and max(numbers, default=0) >= n_gpus:
            raise InvalidParameterError(f"main_gpu is {max(numbers)}, but the GPUs are 0 to {n_gpus - 1}")
        require(not (n_gpus and any(shares[n_gpus:])), f"tensor_split has {len(shares)} shares for {n_gpus} GPUs")
        spread = (*shares, *[0.0] * n_gpus)[:n_gpus]
        split = {
            name: spread if n is None else tuple(float(gpu == n) for gpu in range(n_gpus)) for name, n in own.items()
        }
        return {name: each for name, each in split.items() if any(each)}

    def _each(self, setting: str, value: int | Mapping[str, int] | None) -> dict[str, int | None]:
        """Value of a setting for each role; None if it does not name the role.

        Raises InvalidParameterError for unknown names, and for a LoRA, which has the base's value.
        """
        value = None if value is None else ByName(Number(is_whole=True)).read(setting, value)
        if not isinstance(value, Mapping):
            return dict.fromkeys(self.models, value)
        if shared := sorted(set(value) & set(self.loras)):
            raise InvalidParameterError(f"{setting} names {shown(shared[0])}, a LoRA that has its layers from the base")
        owners = {name: "base" if name in self.loras else name for name in self.models}
        if unknown := sorted(set(value) - set(owners.values())):
            known = ", ".join(dict.fromkeys(owners.values()))
            raise InvalidParameterError(f"{setting} names {shown(unknown[0])}; the models are {known}")
        return {name: value.get(owner) for name, owner in owners.items()}


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
    correctors = set()
    for expert in spec.experts:
        pairs = tuple((source.local_path(), 1.0 if scale is None else scale) for source, scale in expert.files)
        if _is_corrector(expert, [info(path) for path, _ in pairs], large):
            correctors.add(expert.name)
        ((first, _), *_), ((_, scale), *_) = pairs, expert.files
        if scale is None and not info(first).is_adapter:
            models[expert.name] = info(first)
            continue
        for path, _ in pairs:
            check_lora_fits(info(path), base)
        paths = [path.resolve() for path, _ in pairs]
        if twice := next((path for path in paths if paths.count(path) > 1), None):
            raise FamilyError(f"expert {expert.name!r} names {twice} twice; name it once, with the sum of the scales")
        models[expert.name], loras[expert.name] = base, pairs
    tokens = share_tokens(models)
    if len(correctors) == len(spec.experts):
        del models["base"]
    files = FamilyFiles(spec, infos, models, loras, tokens, frozenset(correctors))
    return _with_method(files) if correctors else files


def _is_corrector(expert: ExpertSpec, infos: Sequence[GGUFInfo], large: GGUFInfo) -> bool:
    """Whether an expert of these files corrects the large model without the base.

    Raises FamilyError for a corrector of another large model, and for one that is mixed with other adapters.
    """
    if expert.as_corrector:
        return True
    made = [info for info in infos if info.metadata.get(_THROUGH) == "corrector"]
    if made and len(made) < len(infos):
        (other, *_) = (info for info in infos if info not in made)
        raise FamilyError(f"expert {expert.name!r}: {made[0].path.name} is a corrector, {other.path.name} is not")
    for info in made:
        if info.metadata.get(_LARGE) != header_hash(large.path):
            raise FamilyError(
                f"{info.path}: corrects another large model than {large.path.name}; to use it with this one all the "
                f"same: --as-corrector {expert.name}, or as_corrector = true in family.toml"
            )
    return bool(made)


def _with_method(files: FamilyFiles) -> FamilyFiles:
    """The family with static as its own method, unless it names one. Raises FamilyError for one that it cannot do."""
    spec = dataclasses.replace(files.spec, defaults={"method": "static", **files.spec.defaults})
    files = dataclasses.replace(files, spec=spec)
    for profile in (None, *spec.profiles):
        try:
            files.roles(spec.settings(profile))
        except InvalidParameterError as error:
            what = f"profile {profile}" if profile else "[defaults]"
            raise FamilyError(f"{spec.name}: its {what} cannot be used: {error}") from error
    return files
