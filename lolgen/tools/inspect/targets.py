"""What diffusers, PEFT and ComfyUI would refuse, drop or mis-scale of a file, by the rules of their loaders.

The rules for UNets are complete; for transformers they are those that hold for every pipeline. What a loader does
depends on the model as well: a module that the model does not have is dropped by all three, with a line in a log
at most.
"""

from __future__ import annotations

from lolgen.tools.inspect.finding import Finding, alphas_of
from lolgen.tools.inspect.source import Source
from lolgen.tools.inspect.target_comfyui import for_comfyui
from lolgen.tools.inspect.target_diffusers import for_diffusers
from lolgen.tools.inspect.target_peft import for_peft

TARGETS = ("diffusers", "peft", "comfyui")


def findings(source: Source) -> list[Finding]:
    """What each target would do that a user should know; none for a target that takes the file as it is."""
    alphas = alphas_of(source)
    return [*for_diffusers(source, alphas), *for_peft(source, alphas), *for_comfyui(source, alphas)]
