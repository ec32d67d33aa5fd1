"""The weights of a base model's folder, one module at a time, straight from its safetensors files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lolgen.errors import FormatError
from lolgen.io import names
from lolgen.io import safetensors_file as stf
from lolgen.io.names import component
from lolgen.lora import ModuleSpec

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")


class BaseFolder:
    """A diffusers pipeline's folder, or a transformers model's: nothing is read before it is asked for.

    FormatError when the folder holds no safetensors file of a model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._place: dict[str, tuple[Path, str]] = {}
        pipeline = (self.folder / "model_index.json").is_file()
        for part in PARTS if pipeline else ("",):
            self._add(self.folder / part, part)
        if not self._place:
            raise FormatError(
                folder, found="no safetensors file of a model", wanted="the folder of a diffusers pipeline or of a "
                "transformers model", remedy="check the path; a model of .bin files must be saved again as safetensors",
            )  # fmt: skip
        self._kohya = names.kohya_table(self._place)

    def _add(self, folder: Path, part: str) -> None:
        # Of a model in two precisions, the one without a variant in its name comes first and stays.
        for file in sorted(folder.glob("*.safetensors"), key=lambda f: ("." in f.stem, f.name)):
            for key in stf.read_keys(file):
                name, _, what = key.rpartition(".")
                if what == "weight" and name:
                    ours = names.with_component(name, part) if part else name
                    self._place.setdefault(ours, (file, key))

    def weight(self, module: ModuleSpec) -> Tensor | None:
        """W0 of a module as (out, in_flat), the shape of its delta W; None when the base has no such module, or one
        of another shape."""
        place = self._place.get(module.name) or self._place.get(self._kohya.get(module.name, ""))
        if place is None and component(module.name) is None:
            place = self._place.get(f"model.{module.name}") or self._place.get(
                module.name.removeprefix("model.")
            )
        if place is None:
            return None
        file, key = place
        W = stf.read_raw(file, [key])[key]
        if not W.is_floating_point():
            return None
        if module.kind == "embedding":
            W = W.mT
        flat = W.reshape(W.shape[0], -1) if W.ndim > 1 else W
        if tuple(flat.shape) == module.shape:
            return flat
        # GPT-2's Conv1D keeps (in, out).
        return flat.mT if tuple(flat.shape) == module.shape[::-1] else None
