"""Reports for people: one file as a page, many as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lolgen.tools.inspect.summary import one_line

Report = dict[str, Any]
_NAMES = {"diffusers": "diffusers", "peft": "PEFT", "comfyui": "ComfyUI"}


def page(report: Report, evidence: int = 4) -> list[str]:
    """The lines of one report."""
    lines = [report["path"], f"  {_headline(report)}"]
    lines += [f"    {one_line(s)}" for s in report["family"]["evidence"][:evidence]]
    if not report["loads"]:
        lines.append(f"  does not load: {one_line(report['reason'] or 'no LoRA')}")
    lines += [f"  {one_line(v)}" for v in report["variants"]]
    if "norm" in report:
        lines += _numbers(report)
    lines += _health(report)
    for target, found in report["targets"].items():
        for finding in found["findings"]:
            lines.append(f"  {_NAMES[target]} {finding['effect']}: {finding['text']}")
        if not found["findings"] and report["kind"] == "adapter":
            lines.append(f"  {_NAMES[target]}: takes it as it is")
    lines += _intruders(report.get("intruders"))
    lines += [f"  {label}: {value}" for label, value in report["metadata"]["summary"].items()]
    rest = report["metadata"]["other_entries"]
    if rest:
        lines.append(f"  and {len(rest)} more entries of metadata: {one_line(', '.join(sorted(rest)))}")
    lines += _rows(report.get("module_rows", []))
    return lines


def _headline(report: Report) -> str:
    family, modules = report["family"], report["modules"]
    sure = "" if family["certain"] or family["name"] == "unknown" else " (not certain)"
    ranks = list(modules["ranks"])
    rank = f", rank {', '.join(ranks[:4])}{' ...' if len(ranks) > 4 else ''}" if ranks else ""
    what = report["method"] if report["kind"] == "adapter" else report["kind"]
    form = f", {report['format']} format" if report["format"] else ""
    dtypes = ", ".join(report["dtypes"])
    size = report["size_bytes"]
    shown = f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
    count = f"{modules['count']} module{'s' * (modules['count'] != 1)}"
    return f"{what} for {family['label']}{sure}{form}: {count}{rank}, {shown}, {dtypes}"


def _numbers(report: Report) -> list[str]:
    scale, alpha, energy = report["scale"], report["alpha"], report["energy"]
    lines = [
        f"  scale {_span(scale)} (alpha {_span(alpha)}), norm of delta W {report['norm']:.4g}",
    ]
    if energy:
        ranks = [
            f"{float(s) * 100:g} % of the energy in rank {_span(r)}"
            for s, r in report["effective_rank"].items()
        ]
        tops = ", ".join(f"{k.removeprefix('top_')}: {v * 100:.3g} %" for k, v in energy.items())
        lines += [f"  {'; '.join(ranks)}", f"  energy in the largest singular values: {tops}"]
    return lines


def _span(r: Report) -> str:
    """`0.5`, or `0.5 (0.25 to 1)`, median first."""
    middle, low, high = (f"{r[k]:.4g}" for k in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _health(report: Report) -> list[str]:
    lines = []
    health = report["health"]
    for row in health["not_finite"]["first"][:3]:
        lines.append(f"  NaN or Inf: {one_line(row['key'])} holds {row['nan']} NaN and {row['inf']} Inf")
    more = health["not_finite"]["count"] - 3
    lines += [f"  NaN or Inf in {more} more tensors"] if more > 0 else []
    huge = health.get("too_large", {"count": 0, "first": []})
    if huge["count"]:
        lines.append(
            f"  too large for norms: {huge['count']} modules have numbers whose squares overflow, "
            f"e.g. {one_line(huge['first'][0])}"
        )
    zero = health.get("zero_modules", {"count": 0})
    if zero["count"]:
        lines.append(
            f"  {zero['count']} modules do nothing (delta W is zero), e.g. {one_line(zero['first'][0])}"
        )
    off = health.get("outliers", {"count": 0, "first": []})
    for o in off["first"][:3]:
        lines.append(
            f"  outlier: {one_line(o['name'])} has {o['times_median']:.3g} times the median norm of its shape"
        )
    more = off["count"] - 3
    lines += [f"  and {more} more outliers"] if more > 0 else []
    return lines


def _intruders(found: Report | None) -> list[str]:
    if found is None:
        return []
    lines = [
        f"  intruder dimensions (top {found['k']}, cosine below {found['threshold']:g}): {found['count']} in "
        f"{found['modules_with_any']} of {found['modules']} modules"
    ]
    lines += [f"    {one_line(w['name'])}: {w['count']}" for w in found["worst"][:3]]
    missing = found["not_compared"]["count"]
    lines += [f"    {missing} modules are not in the base, or have other shapes there"] if missing else []
    return lines


def _rows(rows: Sequence[Report]) -> list[str]:
    if not rows:
        return []
    head = ["module", "rank", "alpha", "scale", "norm", "largest", "90 %", "99 %"]
    body = [
        [r["name"], str(r["rank"]), f"{r['alpha']:g}", f"{r['scale']:.4g}", f"{r['norm']:.4g}",
         f"{r['largest_singular_value']:.4g}", str(r["effective_rank_0.9"]), str(r["effective_rank_0.99"])]
        for r in rows
    ]  # fmt: skip
    return ["", *_aligned([head, *body])]


def table(reports: Sequence[Report]) -> list[str]:
    """A line a file; files that could not be read have their error."""
    head = ["file", "what", "base", "format", "modules", "rank", "norm", "notes"]
    body = []
    wrong = []
    for r in reports:
        if "error" in r:
            wrong.append(one_line(r["error"]))
            continue
        ranks = list(r["modules"]["ranks"])
        notes = sum(len(t["findings"]) for t in r["targets"].values())
        body.append([
            r["path"], r["method"].split(" (")[0] if r["kind"] == "adapter" else r["kind"],
            _base(r["family"]), r["format"] or "-",
            str(r["modules"]["count"]), ",".join(ranks[:3]) or "-",
            f"{r['norm']:.4g}" if "norm" in r else "-",
            str(notes) if r["loads"] else f"does not load: {one_line(r['reason'] or '')}",
        ])  # fmt: skip
    return [*(_aligned([head, *body]) if body else []), *wrong]


def _base(family: Report) -> str:
    name: str = family["name"]
    return name if family["certain"] or name == "unknown" else f"{name}?"


def related(relatives: Report) -> list[str]:
    """Duplicates and near pairs."""
    lines = []
    for group in relatives["duplicates"]:
        lines.append(f"the same delta W: {', '.join(group)}")
    near = [
        p for p in relatives["pairs"] if not any(p["a"] in g and p["b"] in g for g in relatives["duplicates"])
    ]
    lines += [f"near: {p['a']} and {p['b']}, cosine {p['cosine']:.4f}" for p in near[:20]]
    more = len(near) - 20 + relatives["candidates_left_out"]
    return [*lines, *([f"and {more} more pairs"] if more > 0 else [])]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
