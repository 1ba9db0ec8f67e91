"""What a policy did in the last run."""

from dataclasses import dataclass

_SIGNS = {"compute": ".", "skip": "-", "reuse": "=", "compute+scale": "^", "reuse+scale": "~", "": " "}


@dataclass(frozen=True)
class Call:
    """One call of the transformer: the step it was, and what each block did.

    An entry of `blocks` is "compute", "skip" or "reuse", with "+scale" behind it where the text was scaled, or "" for
    a block that was not called (left out by skip-layer guidance). Beside a cache of diffusers' "compute" says that the
    block was called: the cache may have answered for it.
    """

    step: int
    blocks: tuple[str, ...]
    # "cond" or "uncond" where guidance makes a call for each; "cond" also where it makes one call for both halves, at
    # a step without guidance
    branch: str = "both"


@dataclass(frozen=True)
class Report:
    """Block calls of the last run (one pipeline call; without a scheduler, one call of the transformer)."""

    calls: tuple[Call, ...] = ()
    cache_bytes: int = 0  # the most that residuals kept for reuse took at once

    def _count(self, part: str) -> int:
        return sum(part in entry.split("+") for call in self.calls for entry in call.blocks)

    @property
    def computed(self) -> int:
        """Block calls that computed, with or without scaled text."""
        return self._count("compute")

    @property
    def skipped(self) -> int:
        """Block calls that returned their inputs."""
        return self._count("skip")

    @property
    def reused(self) -> int:
        """Block calls that added an earlier residual."""
        return self._count("reuse")

    @property
    def scaled(self) -> int:
        """Block calls whose text was scaled; each is also a computed or reused one."""
        return self._count("scale")

    @property
    def table(self) -> tuple[tuple[str, ...], ...]:
        """Calls x blocks of what each did."""
        return tuple(call.blocks for call in self.calls)

    def __str__(self) -> str:
        """Counts, then one line per block with one sign per call."""
        counts = f"computed {self.computed}, skipped {self.skipped}, reused {self.reused}, scaled {self.scaled}"
        lines = [f"block calls: {counts}"]
        if self.calls:
            steps = f"steps {self.calls[0].step} to {self.calls[-1].step}"
            lines.append(f"{steps}: . compute, - skip, = reuse; ^ compute and ~ reuse with scaled text")
            branches = list(dict.fromkeys(call.branch for call in self.calls))
            if "both" in branches:
                guided = [call.step for call in self.calls if call.branch == "both"]
                if len(branches) > 1:
                    lines.append(f"guidance at steps {guided[0]} to {guided[-1]}")
                branches = [""]
            for branch in branches:
                if branch:
                    lines.append(f"{branch}:")
                rows = (call.blocks for call in self.calls if branch in ("", call.branch))
                for block, entries in enumerate(zip(*rows, strict=True)):
                    lines.append(f"block {block:3d}  " + "".join(_SIGNS[entry] for entry in entries))
        return "\n".join(lines)
