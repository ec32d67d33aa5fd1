"""The generator and the predictor on random zoos: symmetry with its twin, determinism, ranks, partial requests."""

from __future__ import annotations

import pytest
import torch

from lolgen import gl, pictures
from lolgen.conditions import IDENTITY, LENGTH, PARTS, complete, conditions
from lolgen.generator import RANK, Generator, beside
from lolgen.lora import Batch, ModuleSpec, Spec
from lolgen.metrics import cosine
from lolgen.nn import (
    Decoder,
    Encoder,
    EncoderConfig,
    Template,
    TemplateConfig,
    VelocityField,
    VelocityFieldConfig,
    word_groups,
)
from lolgen.predictor import Predictor, PredictorConfig
from lolgen.testing import assert_equivariant, assert_invariant, random_lora

SPEC = Spec((ModuleSpec("unet.a", 10, 8), ModuleSpec("unet.b", 12, 8), ModuleSpec("unet.c", 10, 8)))
D = 6


def random_batch(n: int, dtype: torch.dtype = torch.float32) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch.stack([random_lora(SPEC, RANK, generator=g, dtype=dtype) for _ in range(n)], dtype)


def random_conditions(n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    labels = torch.stack([torch.randint(len(v), (n,), generator=g) for v in pictures.ATTRIBUTES.values()], 1)
    parts = torch.stack([torch.randint(k, (n,), generator=g) for k in PARTS.values()], 1)
    return conditions(labels, parts, torch.randint(4, (n,), generator=g), torch.zeros(n))


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    batch, c = random_batch(60), random_conditions(60)
    encoder = Encoder.from_batch(batch, EncoderConfig(d=D))
    template = Template(
        SPEC,
        TemplateConfig(
            d=D, attributes=IDENTITY, groups=word_groups(pictures.SUBJECTS, pictures.RARE_WORDS, IDENTITY)
        ),
    )
    with torch.no_grad():
        template.fit(c, encoder.encode(batch), 1.0)
    field = VelocityField(SPEC, VelocityFieldConfig(2 * D, 2 * D, LENGTH, p=4, rank=2, width=16, depth=1))
    for p in field.parameters():  # it starts at zero, which is equivariant for no good reason
        torch.nn.init.normal_(p, std=0.3)
    settings = {
        "marginals": [[1.0] * len(v) for v in pictures.ATTRIBUTES.values()],
        "strength": 0.4, "noise": 0.7, "residual": 0.5, "gain": 1.0, "steps": 3,
    }  # fmt: skip
    return Generator(encoder.eval(), Decoder.from_encoder(encoder).eval(), template, field.eval(), settings)


def test_the_flow_turns_with_its_template(generator, dtype):
    field = VelocityField(SPEC, generator.field.config).to(dtype)
    field.load_state_dict(generator.field.state_dict())
    field.to(dtype).eval()
    g = torch.Generator().manual_seed(2)
    x, mean = (torch.randn(5, 3, 2 * D, RANK, generator=g).to(dtype) for _ in range(2))
    t, c, ranks = (
        torch.rand(5, generator=g).to(dtype),
        random_conditions(5).to(dtype),
        torch.full((5, 3), RANK),
    )
    Q = torch.linalg.qr(torch.randn(5, 3, RANK, RANK, generator=g).to(dtype))[0]
    skew = torch.randn(5, 3, RANK, RANK, generator=g).to(dtype)
    with torch.no_grad():
        v = beside(field, mean, c, ranks)(x, t)
        turned = beside(field, mean @ Q, c, ranks)(x @ Q, t)
        alone = beside(field, mean, c, ranks)(x @ Q, t)
        off = beside(field, mean @ skew, c, ranks)(x @ skew, t)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert (turned - v @ Q).norm() <= tolerance * v.norm()
    assert (alone - v @ Q).norm() > 1e-2 * v.norm(), "turning the latent alone is not the symmetry"
    assert (off - v @ skew).norm() > 1e-2 * v.norm(), "off the group the equality must fail"


def test_encoder_and_decoder_are_equivariant(generator, dtype):
    batch = random_batch(4, dtype)
    encoder, decoder = Encoder(SPEC, generator.encoder.config), Decoder(SPEC, generator.decoder.config)
    encoder.load_state_dict(generator.encoder.state_dict())
    decoder.load_state_dict(generator.decoder.state_dict())
    encoder, decoder = encoder.to(dtype).eval(), decoder.to(dtype).eval()

    def through(b: Batch) -> Batch:
        return decoder(encoder.encode(b))

    assert_equivariant(through, batch)
    with pytest.raises(AssertionError):
        assert_equivariant(through, batch, off_group=True)


def test_template_is_the_regression(generator):
    """Against least squares written out."""
    batch, c = random_batch(60), random_conditions(60)
    latent = generator.encoder.encode(batch)
    target = (latent.U @ latent.V.mT).flatten(1).double()
    F = generator.template.features(c).double()
    weight = torch.linalg.solve(F.T @ F + torch.eye(F.shape[1], dtype=F.dtype), F.T @ target)
    assert torch.allclose(generator.template.products(c).flatten(1).double(), F @ weight, atol=1e-4)
    full = generator.template(c, D)
    assert torch.allclose(full.U @ full.V.mT, generator.template.products(c), atol=1e-4)
    assert torch.allclose(full.U.mT @ full.U, full.V.mT @ full.V, atol=1e-4), "balanced"


def test_a_lora_is_a_function_of_request_seed_and_rank(generator):
    request = {"glasses": "yes"}
    alone, _ = generator.generate([request], [3])
    among, full = generator.generate([{"beard": "no"}, request, request], [1, 3, 4])
    assert torch.equal(alone[0].factors["unet.a"].B, among[1].factors["unet.a"].B)
    assert not torch.equal(among[1].factors["unet.a"].B, among[2].factors["unet.a"].B)
    assert full[1]["glasses"] == "yes" and set(full[1]) == set(pictures.ATTRIBUTES)


@pytest.mark.parametrize("rank", [1, 2, 4, 7, 64])
def test_any_rank(generator, rank):
    whole, _ = generator.generate([{}], [0])
    lora, _ = generator.generate([{}], [0], rank=rank)
    assert {f.rank for f in lora[0].factors.values()} == {rank}
    if rank >= RANK:
        assert cosine(lora[0], whole[0]) == pytest.approx(1, abs=1e-5)
    else:
        best = gl.resize(whole[0], rank)
        assert cosine(lora[0], best) == pytest.approx(1, abs=1e-5)


def test_completion_keeps_the_request_and_follows_the_marginals():
    marginals = [torch.ones(len(v)) for v in pictures.ATTRIBUTES.values()]
    marginals[0] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    for seed in range(10):
        full = complete({"skin": "dark"}, marginals, torch.Generator().manual_seed(seed))
        assert full["skin"] == "dark" and full["top"] == "hat"


def test_save_and_load(generator, tmp_path):
    generator.save_pretrained(tmp_path / "g")
    again = Generator.from_pretrained(tmp_path / "g")
    one, _ = generator.generate([{"top": "long"}], [5])
    two, _ = again.generate([{"top": "long"}], [5])
    for n in SPEC.names:  # to rounding: where a tensor lies in memory may change the order of a sum
        assert torch.allclose(one[0].factors[n].B, two[0].factors[n].B, atol=1e-4)
    first = {p.name: p.read_bytes() for p in (tmp_path / "g").rglob("*.safetensors")}
    again.save_pretrained(tmp_path / "h")
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "h").rglob("*.safetensors")}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """Trained on LoRAs whose response to word 0 or 1 carries the label."""
    g = torch.Generator().manual_seed(0)
    batch = random_batch(120)
    words = torch.linalg.qr(torch.randn(8, 8, generator=g))[0][:4].view(2, 2, 8)
    y = torch.randint(0, 3, (120, 1), generator=g)
    signal = torch.randn(3, 10, generator=g) * 4
    for i in range(120):
        batch.groups[0].U[i, :, :, 0] += signal[y[i, 0]]
        batch.groups[0].V[i, :, :, 0] = words[i % 2, 0]
        for group in batch.groups:
            group.V[i, :, :, 1:] -= words[1 - i % 2].T @ (words[1 - i % 2] @ group.V[i, :, :, 1:])
    config = PredictorConfig({"a": ("x", "y", "z")}, tokens=2, inputs=8, components=16, members=2, hidden=16)
    return Predictor.train_on(batch[:90], y[:90], batch[90:], y[90:], words, config, epochs=10)


def test_predictor_is_invariant(predictor, dtype):
    model = Predictor(SPEC, predictor.config)
    model.load_state_dict(predictor.state_dict())
    model = model.to(dtype).eval()
    batch = random_batch(6, dtype)
    assert_invariant(model.responses, batch)
    with pytest.raises(AssertionError):
        assert_invariant(model.responses, batch, off_group=True)


def test_predictor_reads_zero_and_rank_one_modules(predictor):
    zero = random_lora(SPEC, 1, zero=("unet.b",), generator=torch.Generator().manual_seed(4))
    nothing = random_lora(SPEC, 2, zero=SPEC.names)
    for row in predictor.read([zero, nothing]):
        assert sum(row["a"]) == pytest.approx(1, abs=1e-4)


def test_predictor_saves_and_loads(predictor, tmp_path):
    predictor.save_pretrained(tmp_path)
    again = Predictor.from_pretrained(tmp_path)
    batch = random_batch(5)
    assert torch.equal(again.probabilities(batch)["a"], predictor.probabilities(batch)["a"])
