"""What a benchmark says: lines as they come, and a JSON file of its claims for benchmarks/run.py."""

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def main_options(doc: str, device: bool = False, model: bool = False, results: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has, that of its results, those of a device, and those of a model on it."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to see that it runs; the figures say nothing"
    )
    if results:
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    if device or model:
        parser.add_argument("--device", default="cpu", help="cpu (default), cuda, …")
    if model:
        parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of ours")
        parser.add_argument("--compile", choices=COMPILE_MODES, help="compile ours, in this mode of torch.compile")
    return parser


def model_flags(args: argparse.Namespace) -> list[str]:
    """The options of a model as they were given, for another process."""
    flags = ["--device", args.device, "--precision", args.precision]
    return flags + (["--compile", args.compile] if args.compile else []) + ["--quick"] * args.quick


@dataclass(frozen=True)
class Claim:
    """A measured value, the least (or, with ``at_most``, the most) that it should be, and what it was made from."""

    what: str
    value: float
    unit: str
    goal: float | None = None
    at_most: bool = False
    made_from: str = ""

    @property
    def met(self) -> bool:
        if self.goal is None:
            return True
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def __str__(self) -> str:
        sign = "at most" if self.at_most else "at least"
        goal = "" if self.goal is None else f"  ({sign} {number(self.goal)}{self.unit}: {'yes' if self.met else 'NO'})"
        return f"{self.what:44} {number(self.value) + self.unit:>12}{goal}  {self.made_from}".rstrip()


@dataclass(frozen=True)
class Limit:
    """A rate that was reached, and the rate that the same machine reached with nothing but that in the same run."""

    what: str
    reached: float
    limit: float
    unit: str

    def __str__(self) -> str:
        share = self.reached / self.limit
        return f"{self.what:44} {share:11.0%}   {number(self.reached)} of {number(self.limit)} {self.unit}"


def number(value: float) -> str:
    """Three figures."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass
class Report:
    """Collects the results of one script and prints each when it is there."""

    title: str
    args: argparse.Namespace
    claims: list[Claim] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def claim(self, what: str, value: float, unit: str, **more: float | bool | str | None) -> None:
        self.claims.append(Claim(what, value, unit, **more))
        print(self.claims[-1], flush=True)

    def fact(self, what: str, value: float, unit: str) -> None:
        """A value without a goal."""
        self.claim(what, value, f" {unit}")

    def limit(self, what: str, reached: float, limit: float, unit: str) -> None:
        self.limits.append(Limit(what, reached, limit, unit))
        print(self.limits[-1], flush=True)

    def write(self) -> None:
        if self.args.json:
            content = {
                "title": self.title,
                "quick": self.args.quick,
                "claims": [asdict(claim) for claim in self.claims],
                "limits": [asdict(limit) for limit in self.limits],
                "lines": self.lines,
            }
            self.args.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_report(path: Path) -> tuple[str, list[Claim], list[Limit], list[str]]:
    """Title, claims, limits and lines that ``Report.write`` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    claims = [Claim(**claim) for claim in content["claims"]]
    return content["title"], claims, [Limit(**limit) for limit in content["limits"]], content["lines"]
