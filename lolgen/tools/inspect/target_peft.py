"""The rules of PEFT: `PeftModel.from_pretrained` of a folder, read from the sources of 0.21."""

from __future__ import annotations

from collections.abc import Iterable

from lolgen.io import peft
from lolgen.tools.inspect.finding import DROPS, REFUSES, SCALES, Finding, how_many, keys_of
from lolgen.tools.inspect.source import Source


def for_peft(source: Source, alphas: dict[str, float]) -> list[Finding]:
    """Findings for `PeftModel.from_pretrained`."""

    def found(effect: str, text: str, modules: Iterable[str] = ()) -> Finding:
        return Finding("peft", effect, text, tuple(modules))

    if not source.config:
        return [found(REFUSES, f"there is no {peft.CONFIG} beside it, which PEFT needs")]
    if source.file.name != peft.WEIGHTS:
        return [found(REFUSES, f"PEFT looks for {peft.WEIGHTS}, and the file is called {source.file.name}")]
    results = []
    lost = [p for p, m in source.modules.items() if not next(iter(keys_of(m))).startswith("base_model.")]
    if lost:
        results.append(
            found(DROPS, f"{how_many(lost, source)} without base_model.model. before the path: nothing of them "
                  "is applied, at most with a warning of missing keys", lost)
        )  # fmt: skip
    if alphas:
        results.append(
            found(SCALES, f"the .alpha tensors of {len(alphas)} modules are not read: lora_alpha and alpha_pattern "
                  "of the config alone give the scale", alphas)
        )  # fmt: skip
    mids = [p for p, m in source.modules.items() if "mid" in m.parts]
    if mids:
        results.append(
            found(DROPS, f"the Tucker cores (lora_mid) of {len(mids)} modules are not known", mids)
        )
    return results
