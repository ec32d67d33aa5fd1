"""Published sizes of base models, by which `lolgen.io.family` tells them apart: facts of their config files."""

from __future__ import annotations

from dataclasses import dataclass

LABELS: dict[str, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux.1",
    "qwen-image": "Qwen-Image",
    "hunyuan-video": "HunyuanVideo",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen": "Qwen",
    "gemma": "Gemma",
    "gpt2": "GPT-2",
    "tiny-sd": "tiny-sd, the embedded Stable Diffusion",
    "tiny-lm": "tiny-lm, the embedded Llama",
    "unknown": "unknown",
}
"""Family -> what to call it."""

EMBEDDED: dict[int, str] = {96: "tiny-sd"}
"""Width of the text that a UNet's cross-attention reads -> embedded base."""


@dataclass(frozen=True)
class Mmdit:
    """A diffusion transformer with joint attention: its width, its numbers of double and of single blocks;
    `marks`, a pattern that only its paths match."""

    family: str
    width: int
    double: int
    single: int
    marks: str = ""


MMDIT: tuple[Mmdit, ...] = (
    Mmdit("sd3", 1536, 24, 0),
    Mmdit("sd3", 2432, 38, 0),
    Mmdit("flux", 3072, 19, 38, r"_(?:img|txt)_mlp_[02]$|_mod_lin$|_modulation_lin$"),
    Mmdit("hunyuan-video", 3072, 20, 40, r"_(?:img|txt)_mlp_fc[12]$|_mod_linear$|_modulation_linear$"),
    Mmdit("qwen-image", 3072, 60, 0, r"_img_mlp_net_|_txt_mlp_net_|_(?:img|txt)_mod_1$"),
)


@dataclass(frozen=True)
class Language:
    """A decoder-only language model: sizes of its config; `query` = heads x head size, `kv` the same of the
    key and value heads; `normed`: with norms of queries and keys; `experts`: a sparse mixture of experts."""

    family: str
    model: str
    hidden: int
    query: int
    kv: int
    mlp: int
    layers: int
    vocab: int
    normed: bool = False
    experts: bool = False


LANGUAGE: tuple[Language, ...] = (
    Language("llama", "Llama 2 7B", 4096, 4096, 4096, 11008, 32, 32000),
    Language("llama", "Llama 2 13B", 5120, 5120, 5120, 13824, 40, 32000),
    Language("llama", "Llama 30B", 6656, 6656, 6656, 17920, 60, 32000),
    Language("llama", "Llama 65B", 8192, 8192, 8192, 22016, 80, 32000),
    Language("llama", "Llama 2 70B", 8192, 8192, 1024, 28672, 80, 32000),
    Language("llama", "Llama 3 8B", 4096, 4096, 1024, 14336, 32, 128256),
    Language("llama", "Llama 3 70B", 8192, 8192, 1024, 28672, 80, 128256),
    Language("llama", "Llama 3.1 405B", 16384, 16384, 1024, 53248, 126, 128256),
    Language("llama", "Llama 3.2 1B", 2048, 2048, 512, 8192, 16, 128256),
    Language("llama", "Llama 3.2 3B", 3072, 3072, 1024, 8192, 28, 128256),
    Language("llama", "TinyLlama 1.1B", 2048, 2048, 256, 5632, 22, 32000),
    Language("llama", "SmolLM2 135M", 576, 576, 192, 1536, 30, 49152),
    Language("llama", "SmolLM2 360M", 960, 960, 320, 2560, 32, 49152),
    Language("llama", "SmolLM2 1.7B", 2048, 2048, 2048, 8192, 24, 49152),
    Language("mistral", "Mistral 7B", 4096, 4096, 1024, 14336, 32, 32000),
    Language("mistral", "Mistral 7B v0.3", 4096, 4096, 1024, 14336, 32, 32768),
    Language("mistral", "Mixtral 8x7B", 4096, 4096, 1024, 14336, 32, 32000, experts=True),
    Language("mistral", "Mixtral 8x22B", 6144, 6144, 1024, 16384, 56, 32768, experts=True),
    Language("mistral", "Ministral 8B", 4096, 4096, 1024, 12288, 36, 131072),
    Language("mistral", "Mistral Nemo 12B", 5120, 4096, 1024, 14336, 40, 131072),
    Language("mistral", "Mistral Small 22B", 6144, 6144, 1024, 16384, 56, 32768),
    Language("mistral", "Mistral Small 24B", 5120, 4096, 1024, 32768, 40, 131072),
    Language("mistral", "Mistral Large 123B", 12288, 12288, 1024, 28672, 88, 32768),
    Language("qwen", "Qwen1.5 0.5B", 1024, 1024, 1024, 2816, 24, 151936),
    Language("qwen", "Qwen1.5 1.8B", 2048, 2048, 2048, 5504, 24, 151936),
    Language("qwen", "Qwen1.5 4B", 2560, 2560, 2560, 6912, 40, 151936),
    Language("qwen", "Qwen1.5 7B", 4096, 4096, 4096, 11008, 32, 151936),
    Language("qwen", "Qwen2 0.5B", 896, 896, 128, 4864, 24, 151936),
    Language("qwen", "Qwen2 1.5B", 1536, 1536, 256, 8960, 28, 151936),
    Language("qwen", "Qwen2.5 3B", 2048, 2048, 256, 11008, 36, 151936),
    Language("qwen", "Qwen2 7B", 3584, 3584, 512, 18944, 28, 152064),
    Language("qwen", "Qwen2.5 14B", 5120, 5120, 1024, 13824, 48, 152064),
    Language("qwen", "Qwen2.5 32B", 5120, 5120, 1024, 27648, 64, 152064),
    Language("qwen", "Qwen2 72B", 8192, 8192, 1024, 29568, 80, 152064),
    Language("qwen", "Qwen3 0.6B", 1024, 2048, 1024, 3072, 28, 151936, normed=True),
    Language("qwen", "Qwen3 1.7B", 2048, 2048, 1024, 6144, 28, 151936, normed=True),
    Language("qwen", "Qwen3 4B", 2560, 4096, 1024, 9728, 36, 151936, normed=True),
    Language("qwen", "Qwen3 8B", 4096, 4096, 1024, 12288, 36, 151936, normed=True),
    Language("qwen", "Qwen3 14B", 5120, 5120, 1024, 17408, 40, 151936, normed=True),
    Language("qwen", "Qwen3 32B", 5120, 8192, 1024, 25600, 64, 151936, normed=True),
    Language("gemma", "Gemma 2B", 2048, 2048, 256, 16384, 18, 256000),
    Language("gemma", "Gemma 7B", 3072, 4096, 4096, 24576, 28, 256000),
    Language("gemma", "Gemma 2 2B", 2304, 2048, 1024, 9216, 26, 256000),
    Language("gemma", "Gemma 2 9B", 3584, 4096, 2048, 14336, 42, 256000),
    Language("gemma", "Gemma 2 27B", 4608, 4096, 2048, 36864, 46, 256000),
    Language("gemma", "Gemma 3 270M", 640, 1024, 256, 2048, 18, 262144, normed=True),
    Language("gemma", "Gemma 3 1B", 1152, 1024, 256, 6912, 26, 262144, normed=True),
    Language("gemma", "Gemma 3 4B", 2560, 2048, 1024, 10240, 34, 262208, normed=True),
    Language("gemma", "Gemma 3 12B", 3840, 4096, 2048, 15360, 48, 262208, normed=True),
    Language("gemma", "Gemma 3 27B", 5376, 4096, 2048, 21504, 62, 262208, normed=True),
)
