"""A transformer whose original modules are several of diffusers' modules stacked: names and row counts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
Rule = tuple[str, tuple[str, ...]]
"""An original path and the diffusers paths that its rows are, in order."""


@dataclass(frozen=True)
class Blocks:
    """One row of blocks: `double_blocks.3.<original>` is `transformer_blocks.3.<diffusers>`."""

    original: str
    diffusers: str
    rules: tuple[Rule, ...]
    read_only: tuple[Rule, ...] = ()
    """Rules for what other programs cut otherwise, which nothing is written as."""


@dataclass(frozen=True)
class Layout:
    """`name`: of the family. `blocks`, `outside`: the modules in blocks and those that are not.

    `swapped`: ends of original paths whose output is (shift, scale) where diffusers has (scale, shift), if that is
    all they put out (2 x in rows).
    """

    name: str
    blocks: tuple[Blocks, ...]
    outside: tuple[Rule, ...]
    swapped: tuple[str, ...]

    @cached_property
    def _rules(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """(row of blocks or "", original inner path) -> diffusers paths, `{}` for the block's number."""
        found = {("", path): parts for path, parts in self.outside}
        for row in self.blocks:
            for path, parts in (*row.read_only, *row.rules):
                found[row.original, path] = tuple(f"{row.diffusers}.{{}}.{p}" for p in parts)
        return found

    @cached_property
    def _back(self) -> dict[str, tuple[str, int]]:
        """diffusers path with `{}` -> (original path with `{}`, position among its parts).

        Of two rules for one part the later one holds, which is never a `read_only` one."""
        return {
            part: (f"{row}.{{}}.{path}" if row else path, i)
            for (row, path), parts in self._rules.items()
            for i, part in enumerate(parts)
        }

    @cached_property
    def _underscored(self) -> dict[str, str]:
        """Paths of either kind, `{}` for the number, by what they are with underscores."""
        originals = [f"{row}.{{}}.{path}" if row else path for row, path in self._rules]
        return {path.replace(".", "_"): path for path in (*self._back, *originals)}

    @cached_property
    def _number(self) -> re.Pattern[str]:
        rows = "|".join(r for b in self.blocks for r in (b.original, b.diffusers))
        return re.compile(rf"((?:{rows})[._])(\d+)([._].+)")

    def _numbered(self, path: str) -> tuple[str, str]:
        match = self._number.fullmatch(path)
        return (f"{match[1]}{{}}{match[3]}", match[2]) if match else (path, "")

    def parts(self, original: str) -> tuple[str, ...]:
        """The diffusers paths that the rows of an original module are; () for a path that is none of this layout."""
        pattern, number = self._numbered(original)
        row, _, inner = pattern.partition(".{}.")
        found = self._rules.get((row, inner) if inner else ("", pattern), ())
        return tuple(p.format(number) for p in found)

    def original(self, diffusers: str) -> tuple[str, int] | None:
        """(original path, position among its parts) of a diffusers path, or None."""
        pattern, number = self._numbered(diffusers)
        found = self._back.get(pattern)
        return None if found is None else (found[0].format(number), found[1])

    def dotted(self, underscored: str) -> str | None:
        """The path, original or diffusers, of a name with underscores, or None."""
        pattern, number = self._numbered(underscored)
        found = self._underscored.get(pattern)
        return None if found is None else found.format(number)

    def swaps(self, original: str, out: int, in_: int) -> bool:
        """Whether the halves of the output change places between the two layouts."""
        return out == 2 * in_ and original.endswith(self.swapped)

    def plain(self, original: str) -> bool:
        """Whether an original module is one diffusers module, row by row."""
        return len(self.parts(original)) == 1 and not original.endswith(self.swapped)

    def rows(self, original: str, out: int, in_: int) -> list[int] | None:
        """How many rows each part of an original module has; None when `out` cannot be cut so.

        Queries, keys and values are as wide as the model; `linear1` of a single block has its MLP below them.
        """
        count = len(self.parts(original))
        if count == 4:
            return [in_, in_, in_, out - 3 * in_] if out > 3 * in_ else None
        return [out // count] * count if count and out % count == 0 else None

    def missing_rows(self, diffusers: str, in_: int) -> int:
        """The rows of a part that an adapter leaves alone: a model's width, four of them for the MLP."""
        return 4 * in_ if diffusers.endswith("proj_mlp") else in_
