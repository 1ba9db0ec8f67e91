"""What a policy costs beside what it saves: python benchmarks/overhead.py [--model NAME …] [--size full|tiny]

Real architectures at real sizes with random weights: time does not depend on the values of weights. Everything is a
ratio of two things timed in turn in one process, so that drift of the device's clock hits both; the median of the
ratios is told with their range. Eager, and with the repeated blocks compiled.

Covered: the transformer of SD3.5-Large, FLUX.1-dev and Qwen-Image at 1024x1024 in bfloat16, guidance as their pipelines
run it. Not covered: text encoders and the decoder, which a policy does not touch. `--size tiny` runs the same road on
small models, to try it where no GPU is; its ratios say nothing.
"""

import argparse
import gc
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from blocktune.evaluators import measure_cost_table, time_runs
from blocktune.policies import BlockPolicy, Plan, Reuse, Rule, ScaleText, Skip, apply_policy
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)

RESULTS = Path(__file__).parent / "results" / "overhead"
STEPS = 28
LIMITS = {  # at most
    "empty policy": 1.005,
    "skip 1 / removed": 1.01,
    "skip a quarter / removed": 1.01,
    "skip half / removed": 1.01,
    "a step that reuses every block": 0.03,
    "scale input": 1.02,
    "scale key": 1.02,
    "scale value": 1.02,
    "scale logit": 1.10,
    "measured / predicted run": 1.03,
    "measured / predicted cache": 1.10,
}


@dataclass(frozen=True)
class Model:
    """A transformer and the arguments of one of its calls, all random."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[Any], dict[str, Any]]


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _sd3(tiny: bool) -> Model:
    side, heads, text = (16, 2, 24) if tiny else (128, 38, 333)  # latents of 1024 pixels; CLIP's 77 and T5's 256 tokens

    def build() -> torch.nn.Module:
        return SD3Transformer2DModel(
            sample_size=side, num_layers=6 if tiny else 38, num_attention_heads=heads, attention_head_dim=64,
            joint_attention_dim=4096, caption_projection_dim=64 * heads, pooled_projection_dim=2048,
            in_channels=16, out_channels=16, pos_embed_max_size=192, qk_norm="rms_norm",
        )  # fmt: skip

    def inputs(model: Any) -> dict[str, Any]:
        return {
            "hidden_states": _noise(2, 16, side, side), "encoder_hidden_states": _noise(2, text, 4096),
            "pooled_projections": _noise(2, 2048), "timestep": torch.full((2,), 500.0),
        }  # fmt: skip

    return Model(build, inputs)


def _flux(tiny: bool) -> Model:
    side, text = (8, 24) if tiny else (64, 512)

    def build() -> torch.nn.Module:
        sizes = {"num_layers": 3, "num_single_layers": 3, "num_attention_heads": 2} if tiny else {}
        return FluxTransformer2DModel(guidance_embeds=True, **sizes)

    def inputs(model: Any) -> dict[str, Any]:
        ids = torch.zeros(side * side, 3)
        ids[:, 1], ids[:, 2] = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        return {
            "hidden_states": _noise(1, side * side, 64), "encoder_hidden_states": _noise(1, text, 4096),
            "pooled_projections": _noise(1, 768), "timestep": torch.full((1,), 0.5), "guidance": torch.full((1,), 3.5),
            "img_ids": ids, "txt_ids": torch.zeros(text, 3),
        }  # fmt: skip

    return Model(build, inputs)


def _qwen(tiny: bool) -> Model:
    side, text = (8, 24) if tiny else (64, 256)

    def build() -> torch.nn.Module:
        sizes = {"num_layers": 6, "num_attention_heads": 2} if tiny else {}
        return QwenImageTransformer2DModel(**sizes)

    def inputs(model: Any) -> dict[str, Any]:
        return {
            "hidden_states": _noise(1, side * side, 64), "encoder_hidden_states": _noise(1, text, 3584),
            "timestep": torch.full((1,), 0.5), "img_shapes": [[(1, side, side)]],
        }  # fmt: skip

    return Model(build, inputs)


MODELS = {"sd3.5-large": _sd3, "flux.1-dev": _flux, "qwen-image": _qwen}


class Bench:
    """One model on one device, and its ratios."""

    def __init__(self, name: str, tiny: bool, device: str, repeats: int):
        torch.manual_seed(0)
        made = MODELS[name](tiny)
        self.device, self.repeats = torch.device(device), repeats
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:  # created where it stays: a copy of 20 B parameters would take minutes
                self.model: Any = made.build().eval().requires_grad_(False)
                self.inputs = made.inputs(self.model)
        finally:
            torch.set_default_dtype(torch.float32)
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        names = ("transformer_blocks", "single_transformer_blocks")
        self.containers = {name: getattr(self.model, name) for name in names if hasattr(self.model, name)}
        self.numbered = [block for blocks in self.containers.values() for block in blocks]
        self.blocks = len(self.numbered)
        self.rows: list[dict[str, Any]] = []

    def policy(self, *rules: Rule) -> BlockPolicy:
        return BlockPolicy.for_model(self.model, "bench", rules)

    def forward(self) -> None:
        self.model(**self.inputs, return_dict=False)

    def denoise(self, steps: int = STEPS) -> np.ndarray:
        """A run of the transformer: what a pipeline does between encoding and decoding, guidance's sum left out."""
        self.scheduler.set_timesteps(steps, device=self.device)
        latents = self.inputs["hidden_states"]
        for t in self.scheduler.timesteps:
            noise = self.model(**self.inputs, return_dict=False)[0]
            latents = self.scheduler.step(noise.reshape(latents.shape), t, latents, return_dict=False)[0]
        return np.zeros((len(latents), 8, 8, 3), np.uint8)

    def add(self, row: str, value: float, low: float, high: float) -> None:
        limit = LIMITS[row]
        held = abs(np.log(value)) <= np.log(limit) if row.startswith("measured") else value <= limit
        self.rows.append({"row": row, "ratio": value, "low": low, "high": high, "limit": limit, "held": bool(held)})
        print(
            f"  {row:<34} {value:8.4f}  [{low:.4f}, {high:.4f}]  limit {limit}  {'ok' if held else 'MISSED'}",
            flush=True,
        )

    def under(self, policy: BlockPolicy, row: str, against: Callable[[], None] | None = None) -> None:
        """Seconds of a forward under the policy over those without, or over `against`."""
        ratios = []
        for repeat in range(self.repeats + 1):
            with apply_policy(self.model, policy):
                obeying = time_runs(self.forward, 2, 1)
            ratio = obeying / time_runs(against or self.forward, 2, 1)
            if repeat:  # in the first round things are still being compiled and allocated
                ratios.append(ratio)
        self.add(row, statistics.median(ratios), min(ratios), max(ratios))

    def skipping(self, row: str, count: int) -> None:
        """Skipping `count` blocks, spread evenly, over a model without them."""
        chosen = sorted({round((i + 0.5) * self.blocks / count - 0.5) for i in range(count)})
        gone = {self.numbered[i] for i in chosen}
        fewer = {c: torch.nn.ModuleList(b for b in blocks if b not in gone) for c, blocks in self.containers.items()}

        def removed() -> None:
            try:
                for name, blocks in fewer.items():
                    setattr(self.model, name, blocks)
                self.forward()
            finally:
                for name, blocks in self.containers.items():
                    setattr(self.model, name, blocks)

        self.under(self.policy(Rule(blocks=chosen, action=Skip())), row, removed)

    def reusing(self) -> None:
        """A step that reuses every block over one that computes all."""
        policy, ratios = self.policy(Rule(blocks=range(self.blocks), action=Reuse())), []
        for repeat in range(self.repeats + 1):
            seconds = []
            with apply_policy(self.model, policy, scheduler=self.scheduler):
                self.scheduler.set_timesteps(3, device=self.device)
                for t in self.scheduler.timesteps:
                    seconds.append(time_runs(self.forward, 1, 0))
                    latents = self.inputs["hidden_states"]
                    self.scheduler.step(latents, t, latents)
            if repeat:
                ratios.append(seconds[2] / time_runs(self.forward, 3, 1))
        self.add("a step that reuses every block", statistics.median(ratios), min(ratios), max(ratios))

    def run(self) -> None:
        """A whole run under a mixed policy over what the cost table says, and the memory of its cache."""
        n = self.blocks
        mixed = self.policy(
            Rule(blocks=range(n // 4, n // 2), window=(0.3, 1.0), action=Reuse(every=3)),
            Rule(blocks=[n // 2, n // 2 + 1], window=(0.5, 1.0), action=Skip()),
            Rule(blocks=range(n // 4), window=(0.0, 0.5), action=ScaleText(operand="value", scale=1.2)),
        )
        table = measure_cost_table(SimpleNamespace(transformer=self.model), self.denoise, repeats=3)
        plan = Plan.compile(mixed, STEPS)
        predicted = table.predict(plan.kinds)
        with apply_policy(self.model, mixed, scheduler=self.scheduler) as applied:
            seconds = [time_runs(self.denoise, 1, 1 if i == 0 else 0) for i in range(3)]
            cached = applied.report.cache_bytes
        ratios = [s / predicted for s in seconds]
        self.add("measured / predicted run", statistics.median(ratios), min(ratios), max(ratios))
        if self.device.type == "cuda":
            self.memory(mixed, cached)

    def memory(self, policy: BlockPolicy, predicted: int) -> None:
        """Memory that the cache takes at its largest, as the allocator saw it, over the bytes that the report tells."""

        def peak() -> int:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.denoise()
            return torch.cuda.max_memory_allocated()

        plain = peak()
        with apply_policy(self.model, policy, scheduler=self.scheduler):
            self.denoise()
            held = peak()
        with apply_policy(self.model, policy, scheduler=self.scheduler, cache_device="cpu"):
            on_cpu = peak()
        value = (held - plain) / predicted
        self.add("measured / predicted cache", value, value, value)
        mib = 2**20
        print(f"  cache {predicted / mib:.0f} MiB; more at the peak {(held - plain) / mib:.0f}, on the CPU "
              f"{(on_cpu - plain) / mib:.0f} MiB", flush=True)  # fmt: skip

    def all(self, compiled: bool) -> list[dict[str, Any]]:
        self.under(self.policy(), "empty policy")
        self.skipping("skip 1 / removed", 1)
        self.skipping("skip a quarter / removed", self.blocks // 4)
        self.skipping("skip half / removed", self.blocks // 2)
        self.reusing()
        for operand in ("input", "key", "value", "logit"):
            rule = Rule(blocks=range(self.blocks), action=ScaleText(operand=operand, scale=1.3))
            self.under(self.policy(rule), f"scale {operand}")
        if not compiled:  # timing hooks would recompile
            self.run()
        return self.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables; nothing is written for tiny")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    measured = {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__, "steps": STEPS}
    path = args.out / "overhead.json"
    results: dict[str, Any] = {}  # a model at a time may be measured: tables of the same circumstances are added to
    if args.size == "full" and path.exists():
        known = json.loads(path.read_text())
        of_others = known.pop("results")
        results = of_others if known == measured else {}
    for model in args.model:
        for compiled in (False, True):
            title = f"{model}, {'blocks compiled' if compiled else 'eager'}"
            print(title, flush=True)
            with torch.inference_mode():
                bench = Bench(model, args.size == "tiny", args.device, args.repeats)
                if compiled:
                    for block in bench.numbered:
                        block.compile(fullgraph=True)
                results[title] = bench.all(compiled)
            del bench
            torch._dynamo.reset()
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            if args.size == "full":
                args.out.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(measured | {"results": results}, indent=2) + "\n")
                (args.out / "overhead.md").write_text(table(measured, results))


def table(measured: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> str:
    """The results as Markdown: a row per ratio, a column per model."""
    told = ", ".join(f"{key} {value}" for key, value in measured.items())
    lines = [f"Ratios of seconds, medians with their range. {told}.", ""]
    lines += ["| | at most | " + " | ".join(results) + " |", "|---" * (len(results) + 2) + "|"]
    for row, limit in LIMITS.items():
        cells = []
        for rows in results.values():
            found = next((r for r in rows if r["row"] == row), None)
            mark = "" if found is None or found["held"] else " (missed)"
            cells.append(f"{found['ratio']:.4f} [{found['low']:.4f}, {found['high']:.4f}]{mark}" if found else "")
        lines.append(f"| {row} | {limit} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
