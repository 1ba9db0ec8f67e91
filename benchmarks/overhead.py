"""What a policy costs beside what it saves: python benchmarks/overhead.py [--model NAME …] [--size full|tiny]

Real architectures at real sizes with random weights: time does not depend on the values of weights. A round times the
two variants of each ratio in the order a, b, b, a, so that a drift of the device's clock falls out of it; the median of
the rounds is told with their range. Forwards follow on each other as in a denoising loop: a GPU's clock starts and ends
behind a forward, with the next ones queued. The first forward of each visit is untimed: it sets up, and compiles.
Eager, and with the repeated blocks compiled.

Covered: the transformer of SD3.5-Large, FLUX.1-dev and Qwen-Image at 1024x1024 in bfloat16, guidance as their pipelines
run it. Not covered: text encoders and the decoder, which a policy does not touch. `--size tiny` runs the same road on
small models, to try it where no GPU is; its ratios say nothing. What is known is written after each round; of the same
device and versions, what other runs wrote to the same folder is kept.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import diffusers
import numpy as np
import torch
from blocktune.evaluators import measure_cost_table, peak_memory, time_runs
from blocktune.policies import BlockPolicy, Plan, Reuse, Rule, ScaleText, Skip, apply_policy, predict_cache_bytes
from blocktune.policies.architectures import ARCHITECTURES
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)

RESULTS = Path(__file__).parent / "results" / "overhead"
STEPS = 28  # of the run that is predicted
VISIT = 0.4  # seconds that a variant is timed for at a time, about
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
    "without guidance / half the batch": 1.01,
    "measured / predicted run": 1.03,
    "measured / predicted cache": 1.10,
    "measured / predicted cache, neighbours apart": 1.10,
    "on the device / predicted cache on the CPU": 0.10,
}


Variant: TypeAlias = Callable[[], AbstractContextManager[Any]]  # what is done to the model while it is timed


@dataclass(frozen=True)
class Model:
    """A transformer and the arguments of one of its calls, all random."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[Any], dict[str, Any]]
    tokens: dict[str, int]  # of one picture and its text


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

    return Model(build, inputs, {"image_tokens": (side // 2) ** 2, "text_tokens": text})


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

    return Model(build, inputs, {"image_tokens": side * side, "text_tokens": text})


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

    return Model(build, inputs, {"image_tokens": side * side, "text_tokens": text})


MODELS = {"sd3.5-large": _sd3, "flux.1-dev": _flux, "qwen-image": _qwen}


@dataclass
class Guided:
    """As much of a pipeline as a policy looks at for the halves of guidance."""

    transformer: torch.nn.Module
    scheduler: Any

    @property
    def do_classifier_free_guidance(self) -> bool:
        return True


class Bench:
    """One model on one device, and its ratios."""

    def __init__(self, name: str, tiny: bool, device: str):
        torch.manual_seed(0)
        made = MODELS[name](tiny)
        self.device = torch.device(device)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:  # created where it stays: a copy of 20 B parameters would take minutes
                self.model: Any = made.build().eval().requires_grad_(False)
                self.inputs, self.tokens = made.inputs(self.model), made.tokens
        finally:
            torch.set_default_dtype(torch.float32)
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        names = ("transformer_blocks", "single_transformer_blocks")
        self.containers = {name: getattr(self.model, name) for name in names if hasattr(self.model, name)}
        self.numbered = [block for blocks in self.containers.values() for block in blocks]
        self.blocks = len(self.numbered)
        self.compared: dict[str, tuple[Variant, Variant]] = {"empty policy": (self.under(), nullcontext)}  # by row
        for part, count in (("1", 1), ("a quarter", self.blocks // 4), ("half", self.blocks // 2)):
            chosen = sorted({round((i + 0.5) * self.blocks / count - 0.5) for i in range(count)})  # spread evenly
            skipping = self.under(Rule(blocks=chosen, action=Skip()))
            self.compared[f"skip {part} / removed"] = skipping, lambda chosen=chosen: self.without(chosen)
        for operand in ("input", "key", "value", "logit"):
            scaling = self.under(Rule(blocks=range(self.blocks), action=ScaleText(operand=operand, scale=1.3)))
            self.compared[f"scale {operand}"] = scaling, nullcontext
        if ARCHITECTURES[type(self.model).__name__].guidance == "batched":
            self.compared["without guidance / half the batch"] = self.without_guidance, self.half_the_batch

    def policy(self, *rules: Rule) -> BlockPolicy:
        return BlockPolicy.for_model(self.model, "bench", rules)

    def under(self, *rules: Rule) -> Variant:
        policy = self.policy(*rules)
        return lambda: apply_policy(self.model, policy)

    @contextmanager
    def without(self, chosen: list[int]) -> Iterator[None]:
        gone = {self.numbered[i] for i in chosen}
        try:
            for name, blocks in self.containers.items():
                setattr(self.model, name, torch.nn.ModuleList(block for block in blocks if block not in gone))
            yield
        finally:
            for name, blocks in self.containers.items():
                setattr(self.model, name, blocks)

    @contextmanager
    def without_guidance(self) -> Iterator[None]:
        """Each forward is of the first step of a run, where guidance does not act."""
        pipe = Guided(self.model, self.scheduler)
        self.scheduler.set_timesteps(2, device=self.device)
        with apply_policy(pipe, BlockPolicy.for_model(self.model, "bench", [], guidance_window=(0.5, 1.0))):
            yield

    @contextmanager
    def half_the_batch(self) -> Iterator[None]:
        whole = self.inputs
        self.inputs = {name: rows[len(rows) // 2 :] for name, rows in whole.items()}
        try:
            yield
        finally:
            self.inputs = whole

    def forward(self) -> None:
        self.model(**self.inputs, return_dict=False)

    def timed(self, forwards: int) -> float:
        """Seconds of a forward, of `forwards` that follow on one that is not timed."""
        self.forward()
        if self.device.type != "cuda":
            return time_runs(lambda: [self.forward() for _ in range(forwards)], 1, 0) / forwards
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(forwards):
            self.forward()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / forwards

    def round(self) -> dict[str, float]:
        """Each row's ratio, its two variants timed in turn."""
        plain = self.timed(1)
        forwards = min(4, max(1, round(VISIT / plain)))
        ratios: dict[str, float] = {}
        for row, variants in self.compared.items():
            seconds = [0.0, 0.0]
            for i in (0, 1, 1, 0):
                with variants[i]():
                    seconds[i] += self.timed(forwards) / 2
            ratios[row] = seconds[0] / seconds[1]
            print(f"    {row:<28} {seconds[0]:.5f} s against {seconds[1]:.5f} s", flush=True)
        return ratios | {"a step that reuses every block": self.reusing() / self.timed(forwards)}

    def reusing(self) -> float:
        """Seconds of a step that reuses every block, from its first launch on: of the last three of five.

        The first computes. Nothing is queued before such a step, so the time that the CPU takes counts.
        """
        policy, seconds = self.policy(Rule(blocks=range(self.blocks), action=Reuse())), []
        with apply_policy(self.model, policy, scheduler=self.scheduler):
            self.scheduler.set_timesteps(5, device=self.device)
            for t in self.scheduler.timesteps:
                seconds.append(time_runs(self.forward, 1, 0))
                latents = self.inputs["hidden_states"]
                self.scheduler.step(latents, t, latents)
        return statistics.fmean(seconds[2:])

    def denoise(self, steps: int = STEPS) -> np.ndarray:
        """A run of the transformer: what a pipeline does between encoding and decoding, guidance's sum left out."""
        self.scheduler.set_timesteps(steps, device=self.device)
        latents = self.inputs["hidden_states"]
        for t in self.scheduler.timesteps:
            noise = self.model(**self.inputs, return_dict=False)[0]
            latents = self.scheduler.step(noise.reshape(latents.shape), t, latents, return_dict=False)[0]
        return np.zeros((len(latents), 8, 8, 3), np.uint8)

    def run(self) -> dict[str, list[float]]:
        """A whole run under a mixed policy over what the cost table says, and the memory of its cache."""
        n = self.blocks
        mixed = self.policy(
            Rule(blocks=range(n // 4, n // 2), window=(0.3, 1.0), action=Reuse(every=3)),
            Rule(blocks=[n // 2, n // 2 + 1], window=(0.5, 1.0), action=Skip()),
            Rule(blocks=range(n // 4), window=(0.0, 0.5), action=ScaleText(operand="value", scale=1.2)),
        )
        rows = self.memory(mixed) if self.device.type == "cuda" else {}

        def obeying() -> float:
            with apply_policy(self.model, mixed, scheduler=self.scheduler):
                return time_runs(self.denoise, 1, 0)

        before = obeying()
        table = measure_cost_table(SimpleNamespace(transformer=self.model), self.denoise, repeats=2)
        predicted = table.predict(Plan.compile(mixed, STEPS).work)
        return rows | {"measured / predicted run": [before / predicted, obeying() / predicted]}

    def memory(self, mixed: BlockPolicy) -> dict[str, list[float]]:
        """Memory that a cache takes at its largest, as the allocator saw it, over the bytes that were predicted.

        Of the mixed policy, whose neighbours share a residual, and of one whose every other block keeps its own: on the
        device, and what is left of it there when the cache is on the CPU. (Neighbours hold what their first was given
        until their last returns: as much as their residual, wherever that goes.)
        """
        steps = 4

        def peak() -> int:
            gc.collect()
            torch.cuda.empty_cache()
            return peak_memory(lambda: self.denoise(steps))

        def over_predicted(policy: BlockPolicy, cache_device: Literal["cpu"] | None = None) -> list[float]:
            predicted = predict_cache_bytes(
                self.model, policy, num_steps=steps, pictures=len(self.inputs["hidden_states"]), **self.tokens
            )
            with apply_policy(self.model, policy, scheduler=self.scheduler, cache_device=cache_device):
                more = peak() - plain
            print(f"  cache {predicted / 2**20:.0f} MiB; more at the peak {more / 2**20:.0f}", flush=True)
            return [more / predicted]

        plain = peak()
        apart = self.policy(Rule(blocks=range(0, self.blocks, 2), action=Reuse(every=3)))
        return {
            "measured / predicted cache": over_predicted(mixed),
            "measured / predicted cache, neighbours apart": over_predicted(apart),
            "on the device / predicted cache on the CPU": over_predicted(apart, "cpu"),
        }


def judged(ratios: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The rows of a table, printed: the median over rounds with its range, and whether it is within its limit."""
    rows = []
    for row, values in ratios.items():
        value, low, high, limit = statistics.median(values), min(values), max(values), LIMITS[row]
        held = abs(np.log(value)) <= np.log(limit) if row.startswith("measured") else value <= limit
        rows.append({"row": row, "ratio": value, "low": low, "high": high, "limit": limit, "held": bool(held)})
        print(f"  {row:<34} {value:8.4f}  [{low:.4f}, {high:.4f}]  limit {limit}  {'ok' if held else 'MISSED'}")
    print(flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="in each mode, 2 for 8 minutes of an H100; 0: the run and the memory alone",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables; nothing is written for tiny")
    args = parser.parse_args()
    # a graph for every operand and kind of block is more than torch compiles of one function by default
    torch._dynamo.config.recompile_limit = 64
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    measured = {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__, "steps": STEPS}

    def tell(title: str, ratios: dict[str, list[float]]) -> None:
        print(title)
        rows = judged(ratios)
        if args.size == "full":
            write(args.out, measured, {title: rows})

    for model in args.model:
        began = time.perf_counter()
        with torch.inference_mode():
            bench = Bench(model, args.size == "tiny", args.device)
            for compiled in (False, True):
                title, ratios = f"{model}, {'blocks compiled' if compiled else 'eager'}", defaultdict(list)
                if compiled:
                    for block in bench.numbered:
                        block.compile(fullgraph=True)
                for _ in range(args.rounds):
                    for row, ratio in bench.round().items():
                        ratios[row].append(ratio)
                    tell(title, ratios)
                if not compiled:  # timing hooks would recompile
                    ratios |= bench.run()
                    tell(title, ratios)
        print(f"{model} took {time.perf_counter() - began:.0f} s", flush=True)
        del bench
        torch._dynamo.reset()
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def write(out: Path, measured: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> None:
    """Adds to the tables in `out` of the same circumstances; those of others are replaced."""
    path = out / "overhead.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    before = known.pop("results", {})
    before = before if known == measured else {}
    for title, rows in results.items():  # what only another run measured of a model stays
        named = {row["row"] for row in rows}
        results[title] = [row for row in before.get(title, []) if row["row"] not in named] + rows
    results = before | results
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured | {"results": results}, indent=2) + "\n")
    (out / "overhead.md").write_text(table(measured, results))


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
