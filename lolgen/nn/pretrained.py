"""`save_pretrained` and `from_pretrained`: a model is one safetensors file with its config in the header."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lolgen.errors import FormatError, SpecError
from lolgen.lora import ModuleSpec, Spec

FILE = "model.safetensors"
CONFIG = "config.json"
KEY = "config"
"""The one metadata entry of the file: a JSON object of class, config and spec."""

_CLASSES: dict[str, type[Pretrained]] = {}


class Pretrained(nn.Module):
    """Base of everything that is saved: `Class(spec, config)` with `config` a dataclass, `Class.Config`.

    `spec`: the modules that it was built for; `require` refuses what is on another one.
    """

    Config: ClassVar[type[Any]]
    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CLASSES[cls.__name__] = cls

    def __init__(self, spec: Spec, config: Any) -> None:
        super().__init__()
        self.spec = spec
        self.config = config

    def require(self, spec: Spec) -> None:
        """SpecError, naming the first difference, unless this is the spec that the model was built for."""
        require_spec(self.spec, spec)

    def header(self) -> str:
        """The config as it stands in the file's header: one line of JSON, the same for equal models."""
        parts = {
            "class": type(self).__name__,
            "config": dataclasses.asdict(self.config),
            "spec": json.loads(self.spec.to_json()),
        }
        return json.dumps(parts, separators=(",", ":"))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `model.safetensors` and, for people to read, `config.json`; gives the model file's path.

        Whoever looks sees the old file or the new one. The same weights always give the same bytes. Raises
        FormatError when it cannot be written.
        """
        place = Path(folder)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        # One metadata entry: the library writes several in random order.
        data = safetensors.torch.save(tensors, {KEY: self.header()})
        readable = json.dumps(json.loads(self.header()), indent=2) + "\n"
        try:
            place.mkdir(parents=True, exist_ok=True)
            _write(place / FILE, data)
            _write(place / CONFIG, readable.encode())
        except OSError as error:
            raise FormatError(
                place, found=error.strerror or str(error), wanted="a folder that can be written to",
                remedy="choose another folder or make room",
            ) from error  # fmt: skip
        return place / FILE

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The model in this folder or file, in eval mode, in the dtypes of the file unless `dtype` is given.

        `Pretrained.from_pretrained` takes any model of this package; a subclass takes its own only. Raises
        FormatError.
        """
        file = Path(path)
        file = file / FILE if file.is_dir() else file
        tensors, header = _read(file)
        made, config, spec = _parse(file, header)
        if not issubclass(made, cls):
            raise FormatError(
                file, key=KEY, found=f"a model of class {made.__name__}", wanted=cls.__name__,
                remedy=f"load it with {made.__name__}.from_pretrained",
            )  # fmt: skip
        try:
            # Its random start is overwritten: no reason to disturb the caller's random numbers.
            with torch.random.fork_rng(devices=[]):
                model = made(spec, made.Config(**config))
        except (TypeError, ValueError, KeyError) as error:
            raise FormatError(
                file, key=KEY, found=f"a config that {made.__name__} does not take ({error})",
                wanted=f"the fields of {made.Config.__name__}",
                remedy="use the version of lolgen that wrote it",
            ) from None  # fmt: skip
        _fill(file, model, tensors)
        return model.to(device=device, dtype=dtype).eval()


def require_spec(wanted: Spec, found: Spec) -> None:
    """SpecError, naming the first module that differs, unless the two are equal."""
    if wanted is found or wanted == found:
        return
    for i, (w, f) in enumerate(zip_longest(wanted, found)):
        if w != f:
            raise SpecError(
                f"the model was built for another spec: module {i}: found {_name(f)}, wanted {_name(w)}; "
                "encode LoRAs of the same base, on the modules that the model knows"
            )
    raise SpecError("the model was built for another spec")


def _name(module: ModuleSpec | None) -> str:
    return "none" if module is None else f"{module.name!r} ({module.kind}, {module.shape})"


def _write(path: Path, data: bytes) -> None:
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


_AGAIN = "the file is damaged or not a lolgen model: download or save it again"


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    if not file.is_file():
        raise FormatError(
            file, found="no such file", wanted=f"a model: a folder with {FILE}, or that file",
            remedy="check the path",
        )  # fmt: skip
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FormatError(file, found=str(error), wanted="a safetensors file", remedy=_AGAIN) from None
    if KEY not in metadata:
        raise FormatError(
            file, key=KEY, found="no such entry in the header", wanted="a model's config", remedy=_AGAIN
        )
    return tensors, metadata[KEY]


def _parse(file: Path, header: str) -> tuple[type[Pretrained], dict[str, Any], Spec]:
    try:
        parts = json.loads(header)
        name, config, spec = parts["class"], parts["config"], Spec.from_json(json.dumps(parts["spec"]))
    except (ValueError, KeyError, TypeError, SpecError) as error:
        raise FormatError(
            file, key=KEY, found=f"{type(error).__name__}: {error}", wanted="JSON of class, config and spec",
            remedy=_AGAIN,
        ) from None  # fmt: skip
    if name not in _CLASSES or not isinstance(config, dict):
        raise FormatError(
            file, key=KEY, found=f"class {name!r}", wanted=f"one of {', '.join(sorted(_CLASSES))}",
            remedy="import the package that defines it, or use the version of lolgen that wrote it",
        )  # fmt: skip
    return _CLASSES[name], config, spec


def _fill(file: Path, model: Pretrained, tensors: dict[str, Tensor]) -> None:
    """Copy the file's tensors into the model, every one of them and no other."""
    own = model.state_dict()
    for key in sorted(own.keys() | tensors.keys()):
        w, f = own.get(key), tensors.get(key)
        if w is None or f is None or w.shape != f.shape:
            raise FormatError(
                file, key=key, found="no tensor" if f is None else f"a tensor {tuple(f.shape)}",
                wanted="no tensor" if w is None else f"a tensor {tuple(w.shape)}",
                remedy="use the version of lolgen that wrote it",
            )  # fmt: skip
        if f.is_floating_point() and not torch.isfinite(f).all():
            raise FormatError(
                file, key=key, found="NaN or Inf", wanted="finite numbers", remedy="use an earlier checkpoint"
            )
    # `assign` keeps the file's dtypes.
    model.load_state_dict(tensors, assign=True)
