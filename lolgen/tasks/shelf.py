"""Fitted readers on disk: one safetensors file with its config inside, half precision where it is enough.

Readers of one zoo have their largest tensors in common: those lie once in `shared` beside the readers' folders,
named by what they hold.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from lolgen.errors import LolgenError
from lolgen.io.atomic import write_file
from lolgen.lora import Spec
from lolgen.nn.glnet import GLNet, GLNetConfig
from lolgen.tasks.ours import Member, Net, Ours, OursReader
from lolgen.tasks.reader import Classes, Layout, Numbers
from lolgen.tasks.traits import Ears, Traits

NAME = "model.safetensors"
SHARED = "shared"
IN_COMMON = ("traits.into", "near.answers", "near.sizes")
"""Tensors that follow from the zoo, not from the task."""


def save(reader: OursReader, spec: Spec, folder: str | Path) -> Path:
    """Write `folder/model.safetensors`; `spec` is that of the LoRAs it reads. Members without a share stay behind."""
    model = reader.model
    assert model is not None
    tensors: dict[str, Tensor] = {
        "shares": model.shares, "temperatures": model.temperatures, "temperature": model.temperature,
        "half": model.half, "bounds": model.bounds, "near.answers": model.neighbours[0].half(),
        "near.sizes": model.neighbours[1].half(), "traits.into": model.traits.into.half(),
        "traits.centre": model.traits.centre, "traits.mean": model.traits.mean, "traits.std": model.traits.std,
    }  # fmt: skip
    for m, P in enumerate(model.traits.ears.P):
        tensors[f"ears.{m}"] = P
    members = []
    kept = [k for k in range(len(model.members)) if bool((model.shares[k] > 0).any())]
    for place, k in enumerate(kept):
        member = model.members[k]
        entry: dict[str, Any] = {
            "kind": member.kind,
            "facts": member.facts,
            "tensors": sorted(member.tensors),
        }
        for name, t in member.tensors.items():
            tensors[f"member.{place}.{name}"] = t.half() if member.kind == "cosine" else t
        if member.net is not None:
            entry["net"] = _describe(member.net)
            for name, t in member.net.state_dict().items():
                tensors[f"member.{place}.net.{name}"] = t.half() if t.numel() > 1000 else t
        members.append(entry)
    tensors["shares"], tensors["temperatures"] = model.shares[kept], model.temperatures[kept]
    layout = model.layout
    meta: dict[str, Any] = {
        "format": 1, "spec": spec.to_json(), "counts": layout.counts, "kind": type(layout).__name__,
        "rank": model.traits.rank, "least": model.traits.least, "tier": model.traits.tier, "config": model.config,
        "members": members,
    }  # fmt: skip
    if isinstance(layout, Numbers):
        tensors |= {"layout.mean": layout.mean, "layout.std": layout.std}
    return write(tensors, meta, folder)


def write(tensors: dict[str, Tensor], meta: dict[str, Any], folder: str | Path) -> Path:
    """The file of a reader, and what it shares with others."""
    path = Path(folder) / NAME
    plain = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
    shared = {}
    for name in IN_COMMON:
        data = serialise({name: plain.pop(name)})
        shared[name] = hashlib.sha256(data).hexdigest()[:16]
        where = path.parent.parent / SHARED / f"{shared[name]}.safetensors"
        if not where.is_file():
            where.parent.mkdir(parents=True, exist_ok=True)
            write_file(where, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, serialise(plain, {"lolgen": json.dumps({**meta, "shared": shared})}))
    return path


def folders(root: str | Path) -> list[Path]:
    """The folders in `root` that hold a reader, by name."""
    return sorted(p.parent for p in Path(root).glob(f"*/{NAME}"))


def load(folder: str | Path) -> OursReader:
    """The reader of a folder that `save` wrote; LolgenError when it holds none."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise LolgenError(f"{folder}: found no {NAME}, wanted the folder of a reader")
    with safe_open(path, framework="pt") as f:
        found = (f.metadata() or {}).get("lolgen")
        if found is None:
            raise LolgenError(f"{path}: found no description of a reader in its header")
        meta = json.loads(found)
        t = {k: f.get_tensor(k).float() for k in f.keys()}  # noqa: SIM118 (no mapping)
    for name, digest in meta.get("shared", {}).items():
        where = path.parent.parent / SHARED / f"{digest}.safetensors"
        if not where.is_file():
            raise LolgenError(f"{path}: needs {where}, which is not there")
        with safe_open(where, framework="pt") as f:
            t[name] = f.get_tensor(name).float()
    counts = {str(n): int(c) for n, c in meta["counts"].items()}
    layout: Layout = (
        Numbers(counts, t["layout.mean"], t["layout.std"]) if meta["kind"] == "Numbers" else Classes(counts)
    )
    spec = Spec.from_json(meta["spec"])
    traits = Traits(
        Ears([t[f"ears.{m}"] for m in range(len(spec))]), int(meta["rank"]), int(meta["least"]), int(meta["tier"]),
        t["traits.into"], t["traits.centre"], t["traits.mean"], t["traits.std"],
    )  # fmt: skip
    members = []
    for k, entry in enumerate(meta["members"]):
        net = None
        if "net" in entry:
            net = _build(entry["net"], spec)
            prefix = f"member.{k}.net."
            net.load_state_dict({n[len(prefix) :]: v for n, v in t.items() if n.startswith(prefix)})
            net.eval().requires_grad_(False)
        tensors = {n: t[f"member.{k}.{n}"] for n in entry["tensors"]}
        members.append(Member(entry["kind"], entry["facts"], tensors, net))
    model = Ours(
        layout, traits, members, t["shares"], t["temperatures"], t["temperature"], t["half"],
        (t["near.answers"], t["near.sizes"]), t["bounds"], meta["config"],
    )  # fmt: skip
    return OursReader(layout, model.scores, model.temperature, meta["config"], model)


def spec_of(folder: str | Path) -> Spec:
    """The modules that the reader of a folder reads."""
    with safe_open(Path(folder) / NAME, framework="pt") as f:
        return Spec.from_json(json.loads(f.metadata()["lolgen"])["spec"])


def _describe(net: nn.Module) -> dict[str, Any]:
    if isinstance(net, Net):
        return {"inputs": net.linear.in_features, "outputs": net.linear.out_features}
    assert isinstance(net, GLNet)
    c = net.config
    return {"glnet": True, "outputs": c.outputs, "d": c.d, "hidden": c.hidden}


def _build(facts: dict[str, Any], spec: Spec) -> nn.Module:
    if facts.get("glnet"):
        return GLNet(spec, GLNetConfig(facts["outputs"], d=facts["d"], hidden=facts["hidden"]))
    return Net(facts["inputs"], facts["outputs"], 0.0)
