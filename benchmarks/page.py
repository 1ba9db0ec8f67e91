"""How long a person waits for the page of a large search: python benchmarks/page.py [--trials 2000] [--images 256]

A run of that size is written by the search's own writers, with synthetic scores and pictures; `blocktune dashboard` is
started on it as a user does, and a real Chromium opens it. Told: seconds from the command to the first answer, to every
mark drawn, from a click to the policy's map and its pictures, and of a filter; and the server's memory.

Not covered: the first read of a disk's cold cache.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import psutil
from blocktune.evaluators import Prompt, paired_interval
from blocktune.policies import BlockPolicy, Reuse, Rule, ScaleText
from blocktune.policies.policy import ModelIdentity
from blocktune.search.config import Config
from blocktune.search.front import Confirmed, Point, held_out_name
from blocktune.search.run_directory import RunDirectory
from blocktune.search.storage import STUDY, study_url
from optuna.trial import TrialState, create_trial
from playwright.sync_api import sync_playwright

BLOCKS, STEPS, CONFIRMED = 38, 28, 12
START_LIMIT = 3.0  # seconds


def write_run(path: Path, trials: int, images: int) -> None:
    """A finished search of a 38-block model, with its front confirmed."""
    random = np.random.default_rng(0)
    model = ModelIdentity(transformer="SD3Transformer2DModel", num_blocks=BLOCKS, fingerprint="0" * 64)
    config = Config.model_validate(
        {
            "name": "large", "prompts": {"search_images": images, "confirm_images": images},
            "objectives": {"reported": ["shapes_binary", "psnr"]}, "search": {"trials": trials},
            "generation": {"num_inference_steps": STEPS},
        }
    )  # fmt: skip
    run = RunDirectory.open(path, config, resume=False)
    study = optuna.create_study(
        study_name=STUDY, storage=study_url(run, config), directions=["maximize", "maximize", "minimize"]
    )
    prompts = tuple(Prompt(f"a photo of thing {i % 64}", f"kind {i % 6}", i) for i in range(images))
    pictures = random.integers(0, 256, (images, 64, 64, 3), dtype=np.uint8)

    def scores(gain: float) -> dict[str, np.ndarray]:
        return {
            "shapes": 0.5 + gain + 0.1 * random.random(images), "crispness": 0.6 + 0.1 * random.random(images),
            "shapes_binary": random.integers(0, 2, images).astype(float), "psnr": 20 + random.random(images),
            "sane": np.ones(images),
        }  # fmt: skip

    before = scores(0.0)
    run.write_scores("unmodified", prompts, before)
    run.write_scores("confirm-unmodified", prompts, before)
    run.write_images("confirm-unmodified", pictures)
    confirmed = []
    for number in range(trials):
        every = int(random.integers(2, 5))
        blocks = [int(b) for b in np.flatnonzero(random.random(BLOCKS) < 0.5)] or [0]
        louder = Rule(blocks=blocks, action=ScaleText(operand="value", scale=round(1 + float(random.random()), 3)))
        rules = (louder, Rule(blocks=blocks, window=(0.4, 1.0), action=Reuse(every=every))) if number else ()
        policy = BlockPolicy(name=f"trial {number}", model=model, rules=rules)
        one = scores(0.05 * float(random.standard_normal()) if number else 0.0)
        latency = 1.0 - 0.5 * float(random.random()) * bool(number)
        values = [float(one["shapes"].mean()), float(one["crispness"].mean()), latency]
        metrics = {e: float(v.mean()) for e, v in one.items()} | {"latency": latency, "speedup": 1 / latency}
        attributes = {
            "key": f"{number:064d}", "steps": STEPS, "metrics": metrics, "worker": number % 8,
            "policy": policy.model_dump(mode="json", exclude_none=True),
        } | ({} if number else {"anchor": "unmodified"})  # fmt: skip
        study.add_trial(create_trial(state=TrialState.COMPLETE, values=values, user_attrs=attributes))
        run.write_scores(f"trial-{number:04d}", prompts, one)
        if 0 < number <= CONFIRMED:
            name = f"trial {number}"
            stored = held_out_name(Point(name, *values, attributes["key"], STEPS))
            run.write_scores(stored, prompts, one)
            run.write_images(stored, pictures)
            told = {e: paired_interval(one[e], before[e], groups=[p.text for p in prompts]) for e in one}
            reported = {e: told[e] for e in ("shapes_binary", "psnr")}
            confirmed.append(
                Confirmed(
                    name=name, key=attributes["key"], steps=STEPS, anchor=False, rules=2, alignment=told["shapes"],
                    quality=told["crispness"], reported=reported, seconds=latency, speedup=1 / latency,
                    predicted_speedup=1 / latency, picks=["balanced"] if number == 1 else [],
                ).to_dict()
            )  # fmt: skip
            for file in (f"trial-{number}", *(["balanced"] if number == 1 else [])):
                policy.save(run.policies / f"{file}.json")
        if number % 200 == 0:
            print(f"trial {number}/{trials}", flush=True)
    run.write_json(
        run.confirmed, {"level": 0.95, "margin": 0.015, "quality_margin": 0.03, "confirmed": confirmed}
    )  # fmt: skip
    run.release()


def measure(run: Path, trials: int) -> dict[str, float]:
    """Seconds a person waits, and MiB that the server has at the end."""
    began = time.perf_counter()
    # the port is told on the first line
    command = [sys.executable, "-m", "blocktune.search", "dashboard", str(run), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        url = server.stdout.readline().split()[0]
        urllib.request.urlopen(url).read()
        told = {"start": time.perf_counter() - began}
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1400, "height": 900})
            tab.set_default_timeout(60_000)

            def wait(until: str) -> None:
                while not tab.evaluate(until):  # the page's policy forbids the evaluation that wait_for_function does
                    tab.wait_for_timeout(10)

            def timed(name: str, act: Callable[[], object], until: str) -> None:
                began = time.perf_counter()
                act()
                wait(until)
                told[name] = time.perf_counter() - began

            # every trial and confirmed candidate is a mark
            everything = f"document.querySelectorAll('[data-key]').length >= {trials + CONFIRMED}"
            timed("every mark drawn", lambda: tab.goto(url), everything)
            fewer = f"document.querySelectorAll('[data-key]').length < {trials // 2}"
            timed("filter", lambda: tab.get_by_label("front only").check(), fewer)
            tab.get_by_label("front only").uncheck()
            wait(everything)
            tab.wait_for_timeout(3000)  # a person looks at the front first
            mapped = f"document.querySelectorAll('rect.cell[role=img]').length === {BLOCKS * STEPS}"
            timed("map after a click", lambda: tab.locator("[data-key='confirmed/trial-1']").click(), mapped)
            loaded = "[...document.querySelectorAll('.wipe img.after')].some(i => i.complete && i.naturalWidth)"
            timed("pictures", lambda: tab.locator(".wipe").first.scroll_into_view_if_needed(), loaded)
            another = "document.querySelector('.panel h2')?.textContent.startsWith('Trial 2')"
            timed("another policy", lambda: tab.goto(f"{url}#front/trial-2"), another)
            browser.close()
        told["server MiB"] = psutil.Process(server.pid).memory_info().rss / 2**20
        return told
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder) / "run", arguments.trials, arguments.images)
        told = measure(Path(folder) / "run", arguments.trials)
    for name, value in told.items():
        print(f"{name:<20} {value:8.2f}{'' if 'MiB' in name else ' s'}")
    print(f"start within {START_LIMIT:g} s: {'met' if told['start'] <= START_LIMIT else 'missed'}")
    if arguments.out:
        result = {
            "trials": arguments.trials, "images": arguments.images, "seed": 0, "machine": platform.machine(),
            "cpus": psutil.cpu_count(), "load": psutil.getloadavg()[0],
        } | {name: round(value, 3) for name, value in told.items()}  # fmt: skip
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
