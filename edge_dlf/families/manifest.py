"""The manifest of an output: family, parameters and input that it was made from, in a small file beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import repeat
from pathlib import Path
from typing import Any

from ..errors import InvalidParameterError
from ..gguf.info import GGUFInfo
from ..system.durable import file_error, replacing
from ..system.jsonl import parse_object
from .files import FamilyFiles

_FORMAT = 1
_SAMPLE_BYTES = 1 << 16
_N_SAMPLES = 64
_MAX_HEADER_BYTES = 1 << 26


@dataclass(frozen=True)
class Manifest:
    """What answers depend on.

    family: role -> its files, each with name, size and digest.
    parameters: settings by name.
    input: size and digest; None if the input is a stream.
    """

    family: Mapping[str, Sequence[Mapping[str, Any]]]
    parameters: Mapping[str, Any]
    input: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, files: FamilyFiles, parameters: Mapping[str, Any]) -> Manifest:
        """Describe checked files, by samples of their contents, and parameters."""
        return cls(_family(files), {name: _plain(value) for name, value in parameters.items()})

    @classmethod
    def load(cls, path: Path) -> Manifest | None:
        """Read the manifest; None if there is no such file. Raises InvalidParameterError if it cannot be read."""
        try:
            is_endless = path.exists() and not path.is_file()  # a pipe, or a device such as /dev/full
            saved = {} if is_endless else parse_object(path.read_bytes())
            is_family = all(isinstance(own, list) and all(map(_is_entry, own)) for own in saved["family"].values())
            is_input = (input := saved.get("input")) is None or isinstance(input["bytes"], int)
            if saved["format"] == _FORMAT and is_family and is_input and isinstance(saved["parameters"], dict):
                return cls(saved["family"], saved["parameters"], input)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise file_error(path, error) from error
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise InvalidParameterError(f"{path}: is no manifest that this version of edge-dlf can read")

    def save(self, path: Path) -> None:
        """Write it, all at once. Raises EdgeDLFError."""
        with replacing(path) as file:
            text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
            file.write(text.encode("utf-8", "backslashreplace") + b"\n")  # JSON has the same escape for half a pair

    def contents(self) -> dict[str, list[dict[str, Any]]]:
        """The family without the names of its files, which may be moved."""
        return {
            role: [{k: v for k, v in file.items() if k != "file"} for file in own] for role, own in self.family.items()
        }

    def differences(self, now: Manifest) -> list[str]:
        """List what has changed in family and parameters."""
        if list(self.family) != list(now.family):
            found = [f"the members were {', '.join(self.family)}, now {', '.join(now.family)}"]
        else:
            found = [
                f"{role} was {_names(files)}, now {_names(now.family[role])}"
                for role, files in self.family.items()
                if list(map(_identity, files)) != list(map(_identity, now.family[role]))
            ]
        for name in dict.fromkeys([*self.parameters, *now.parameters]):
            before, after = self.parameters.get(name), now.parameters.get(name)
            if before != after:
                found.append(f"{name} was {_show(before)}, now {_show(after)}")
        return found


def _family(files: FamilyFiles) -> dict[str, list[dict[str, Any]]]:
    entries = {file: list(map(_entry, info.shards, repeat(info))) for file, info in files.infos.items()}
    family = {
        role: [{**entry, "scale": scale} for path, scale in files.loras[role] for entry in entries[path]]
        if role in files.loras
        else entries[info.path]
        for role, info in files.models.items()
    }
    for name in files.correctors:
        family[name] = [{**entry, "corrector": True} for entry in family[name]]
    return family


def _entry(path: Path, info: GGUFInfo) -> dict[str, Any]:
    digest = sampled_digest(path, info)
    return {"file": path.name, "bytes": path.stat().st_size, "digest": digest}


def _is_entry(saved: Any) -> bool:
    """Tell whether a part of a manifest that was read describes a file."""
    match saved:
        case {"file": str(), "bytes": int(n_bytes), "digest": str()}:
            return n_bytes >= 0 and isinstance(saved.get("scale", 1), int | float)
    return False


def sampled_digest(path: Path, info: GGUFInfo) -> str:
    """Digest a file's header and 64 blocks spread over the rest, the last one included: quick at any size.

    info: of the model that `path` is a file of.
    """
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        n_bytes = file.seek(0, 2)
        start = min(info.file_bytes - info.tensor_bytes, n_bytes, _MAX_HEADER_BYTES)
        file.seek(0)
        digest.update(file.read(start))
        room = max(n_bytes - _SAMPLE_BYTES - start, 0)
        for sample in range(_N_SAMPLES):
            file.seek(start + room * sample // (_N_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _identity(entry: Mapping[str, Any]) -> list[Any]:
    """What makes two files the same: not the name, for a file may have been moved."""
    return [entry.get(key) for key in ("bytes", "digest", "scale", "corrector")]


def _names(files: Sequence[Mapping[str, Any]]) -> str:
    return " + ".join(
        f"{file.get('file')} ({file.get('bytes'):,} bytes, {str(file.get('digest'))[:8]}"
        + (f", scale {file['scale']:g}" if "scale" in file else "")
        + (", a corrector)" if file.get("corrector") else ")")
        for file in files
    )


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if value is not None else "not given"
    return text if len(text) <= 80 else f"{text[:77]}…"
