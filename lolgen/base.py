"""A text-to-image base model in the hand: its parts, its latents, and a plain sampler over rows of prompts.

`Base` is for work on many LoRAs at once (training a bank, scoring a zoo). What a user's adapter draws is
always drawn by the stock `diffusers.StableDiffusionPipeline`, see `lolgen.preview`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen.errors import LolgenError
from lolgen.quiet import load_stock_pipeline


@dataclass
class Base:
    """The parts of a Stable Diffusion pipeline, frozen, in float32."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    _text: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def load(folder: str | Path) -> Base:
        """Load a pipeline folder (no network); LolgenError if it is not one."""
        if not (Path(folder) / "model_index.json").is_file():
            raise LolgenError(
                f"{folder}: no model_index.json; expected a diffusers StableDiffusionPipeline folder"
            )
        pipe = load_stock_pipeline(str(folder))
        return Base.of(pipe)

    @staticmethod
    def of(pipe: Any) -> Base:
        parts = [pipe.unet, pipe.vae, pipe.text_encoder]
        for part in parts:
            part.eval().requires_grad_(False)
        return Base(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def to(self, device: str | torch.device) -> Base:
        for part in (self.unet, self.vae, self.text_encoder):
            part.to(device)
        self._text.clear()
        return self

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Text states (N, tokens, dim); each distinct prompt is encoded once."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._text]
        if new:
            ids = self.tokenizer(new, padding="max_length", truncation=True, return_tensors="pt").input_ids
            states = self.text_encoder(ids.to(self.device)).last_hidden_state
            self._text.update(zip(new, states, strict=True))
        return torch.stack([self._text[p] for p in prompts])

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 pictures (N, 3, H, W) -> latents (N, c, h, w), the posterior mean times the scaling factor."""
        x = pixels.to(self.device).float() / 127.5 - 1
        chunks = [self.vae.encode(c).latent_dist.mode() for c in x.split(64)]
        return torch.cat(chunks) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents -> pictures in [-1, 1], (N, 3, H, W)."""
        chunks = [self.vae.decode(c / self.vae.config.scaling_factor).sample for c in z.split(64)]
        return torch.cat(chunks).clamp(-1, 1)

    def sample(
        self, states: Tensor, generator: torch.Generator, steps: int = 12, guidance: float = 3.0
    ) -> Tensor:
        """DDIM latents for rows of text states (N, tokens, dim), from noise of `generator`."""
        c, s = self.unet.config.in_channels, self.unet.config.sample_size
        noise = torch.randn(len(states), c, s, s, generator=generator)
        return self.sample_from(noise, states, steps, guidance)

    @torch.no_grad()
    def sample_from(self, noise: Tensor, states: Tensor, steps: int, guidance: float) -> Tensor:
        """DDIM latents from `noise` (N, c, h, w); the empty prompt guides (Ho & Salimans, 2022).

        Rows keep their order in both passes, so an attached bank sees (K, n) rows.
        """
        empty = self.text([""]).expand(len(states), -1, -1)
        self.scheduler.set_timesteps(steps)
        z = noise.to(self.device) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            v = self.unet(z, t, states, return_dict=False)[0]
            if guidance != 1:
                v_empty = self.unet(z, t, empty, return_dict=False)[0]
                v = v_empty + guidance * (v - v_empty)
            z = self.scheduler.step(v, t, z, return_dict=False)[0]
        return z


@torch.no_grad()
def input_moments(base: Base, names: tuple[str, ...], prompts: list[str], seed: int = 0) -> dict[str, Tensor]:
    """S = E[x x^T] of what each module of the UNet really sees, from one calibration pass, (in, in) by name.

    One row of noise at a random time for each prompt; `names` start with `unet.` and are linear layers.
    """
    g = torch.Generator().manual_seed(seed)
    c, s = base.unet.config.in_channels, base.unet.config.sample_size
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...], __: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            total[name] = total.get(name, 0) + x.T @ x
            count[name] = count.get(name, 0) + len(x)

        return hook

    handles = [
        base.unet.get_submodule(n.removeprefix("unet.")).register_forward_hook(watch(n)) for n in names
    ]
    try:
        z = torch.randn(len(prompts), c, s, s, generator=g).to(base.device)
        t = torch.randint(0, 1000, (len(prompts),), generator=g).to(base.device)
        base.unet(z, t, base.text(prompts), return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    return {n: (total[n] / count[n]).cpu() for n in names}
