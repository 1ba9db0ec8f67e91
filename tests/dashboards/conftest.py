"""A small finished run, written by the search's own writers without a model, and its page on a real port."""

import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import uvicorn
from blocktune.dashboards.server import create_app
from blocktune.evaluators import Prompt, get, paired_interval, scale_of
from blocktune.policies import BlockPolicy, Reuse, Rule, ScaleText, Skip
from blocktune.policies.policy import ModelIdentity
from blocktune.search.config import Config
from blocktune.search.front import Confirmed, Point, held_out_name
from blocktune.search.run_directory import RunDirectory
from blocktune.search.storage import STUDY, study_url
from playwright.sync_api import Browser, sync_playwright
from playwright.sync_api import Page as Tab

HOSTILE = "a photo of <script>document.title = 'taken'</script> & a \"ring\""
RULES = {
    "unmodified": (),
    "trial 1": (
        Rule(blocks=[1, 3], window=(0.25, 1.0), action=Reuse(every=2)),
        Rule(blocks=[0, 1], window=(0.0, 0.5), action=ScaleText(operand="value", scale=1.3)),
    ),
    "trial 2": (Rule(blocks=[4], window=(0.5, 1.0), action=Skip()),),
}
STEPS = 4


def _prompts(count: int, first_seed: int) -> tuple[Prompt, ...]:
    texts = ((HOSTILE, "single"), ("a red ring", "colors"), ("two crosses", "counting"), ("a blue square", "colors"))
    return tuple(Prompt(*texts[i % 4], seed=first_seed + i) for i in range(count))


def _measured(
    generator: np.random.Generator, prompts: tuple[Prompt, ...], gain: float, alignment: str
) -> dict[str, np.ndarray]:
    n = len(prompts)
    filled = 0.5 + gain + 0.1 * generator.random(n)  # in shares of what counts as 100 points
    scores = {alignment: scale_of(get(alignment)) * filled, "crispness": 0.6 + 0.1 * generator.random(n)}
    return scores | {"psnr": 20 + generator.random(n), "sane": np.ones(n)}


def write_run(path: Path, alignment: str = "shapes") -> RunDirectory:
    """Three trials and one that failed of a model with two double-stream and three single-stream blocks.

    `trial 1` was confirmed and is the pick `balanced`; `trial 2` is on the front with scores alone. In points, all
    differences of alignment are the same, whichever evaluator it is by.
    """
    generator = np.random.default_rng(0)
    transformer = path.parent / "model" / "transformer"
    transformer.mkdir(parents=True)
    (transformer / "config.json").write_text(json.dumps({"num_layers": 2, "num_single_layers": 3}))
    model = ModelIdentity(transformer="FluxTransformer2DModel", num_blocks=5, fingerprint="0" * 64)
    config = Config.model_validate(
        {
            "name": "tiny", "model": {"path": str(transformer.parent)}, "generation": {"num_inference_steps": STEPS},
            "prompts": {"search_images": 4, "confirm_images": 8}, "search": {"trials": 4},
            "objectives": {"alignment": alignment, "reported": ["psnr"]},
        }
    )  # fmt: skip
    run = RunDirectory.open(path, config, resume=False)
    study = optuna.create_study(
        study_name=STUDY, storage=study_url(run, config), directions=["maximize", "maximize", "minimize"]
    )
    scales = {name: scale_of(get(name)) for name in (alignment, "crispness", "psnr")}
    study.set_user_attr("description", {"device": "a CPU", "dtype": "float32", "scales": scales})
    prompts, held_out = _prompts(4, 0), _prompts(8, 100)
    confirmed: list[Confirmed] = []
    before: dict[str, np.ndarray] = {}
    for number, (name, rules) in enumerate(RULES.items()):
        policy = BlockPolicy(name=name, model=model, rules=rules)
        latency, gain = 1.0 - 0.2 * number, 0.03 * number
        trial = study.ask()
        scores = _measured(generator, prompts, gain, alignment)
        key = f"{number}" * 64
        values = [float(scores[alignment].mean()), float(scores["crispness"].mean()), latency]
        metrics = {e: float(v.mean()) for e, v in scores.items()} | {"latency": latency, "speedup": 1 / latency}
        stored = {
            "worker": number % 2,
            "key": key,
            "steps": STEPS,
            "metrics": metrics,
            "policy": policy.model_dump(mode="json"),
        }
        for attribute, value in (stored | ({} if rules else {"anchor": "unmodified"})).items():
            trial.set_user_attr(attribute, value)
        trial.set_constraint("insane_pictures", 0.0)
        study.tell(trial, values)
        run.write_scores(f"trial-{number:04d}", prompts, scores)
        if not rules:
            run.write_scores("unmodified", prompts, scores)
        if number == 2:
            continue
        member = Point(name, *values, key, STEPS)
        scores = _measured(generator, held_out, gain, alignment)
        before = before or scores
        held_out_file = held_out_name(member) if rules else "confirm-unmodified"
        run.write_scores(held_out_file, held_out, scores)
        run.write_images(held_out_file, generator.integers(0, 256, (8, 32, 48, 3), dtype=np.uint8))
        if rules:
            groups = [p.text for p in held_out]
            told = {e: paired_interval(scores[e], before[e], groups=groups, scale=s) for e, s in scales.items()}
            confirmed.append(
                Confirmed(
                    name=name, key=key, steps=STEPS, anchor=False, rules=len(rules), alignment=told[alignment],
                    quality=told["crispness"], reported={"psnr": told["psnr"]}, seconds=latency, speedup=1 / latency,
                    predicted_speedup=1.2, picks=["balanced"],
                    best_of=[
                        {"by": "lamp:Brightness", "count": 2, "speedup": 1.36, alignment: "+3.5 [+1.8, +5.1]",
                         "crispness": "-0.5 [-1.0, +0.1]"}
                    ],
                )
            )  # fmt: skip
            for file in ("balanced", "trial-1"):
                policy.model_copy(update={"name": file, "tuned_for": {"height": 32, "width": 48}}).save(
                    run.policies / f"{file}.json"
                )
    failed = study.ask()
    failed.set_user_attr("reason", "the lamp went out")
    study.tell(failed, state=optuna.trial.TrialState.FAIL)
    probed = [
        (block, effect, "0 to 1", kind, 0.01 * (block - 2), 0.01 * (block - 2) - 0.015, 0.01 * (block - 2) + 0.015,
         2 if block == 4 else 8)
        for kind in ("all", "colors") for effect in ("remove", "enhance value") for block in range(5)
    ]  # fmt: skip
    columns = ["block", "effect", "window", "kind", "delta", "low", "high", "n"]
    pd.DataFrame(probed, columns=columns).to_parquet(path / "probe.parquet")
    run.write_json(run.confirmed, {"level": 0.95, "margin": 0.1, "confirmed": [c.to_dict() for c in confirmed]})
    return run


@dataclass(frozen=True)
class Page:
    """A page that is being served, and requests to it exactly as spelled: no client tidies the path."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, path: str, method: str = "GET", headers: dict[str, str] | None = None):
        """Status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def json(self, path: str):
        status, _, body = self.ask(path)
        assert status == 200, body
        return json.loads(body)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return write_run(tmp_path_factory.mktemp("dashboard") / "run")


@contextmanager
def served(root: Path) -> Iterator[Page]:
    """The page of the run directory `root`."""
    config = uvicorn.Config(create_app(root, ["127.0.0.1"]), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended before it listened"
        time.sleep(0.01)
    yield Page(server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="session")
def page(run: RunDirectory) -> Iterator[Page]:
    with served(run.path) as page:
        yield page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    """A tab that fails its test for any error the browser tells: of a script, a refused source, a missing file."""
    context, errors = browser.new_context(viewport={"width": 1300, "height": 900}), []
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    tab.set_default_timeout(10_000)
    tab.on("console", lambda message: message.type in ("error", "warning") and errors.append(message.text))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    # a request that ends because the tab goes on to another page is no error
    tab.on("requestfailed", lambda r: r.failure != "net::ERR_ABORTED" and errors.append(f"{r.url} {r.failure}"))
    yield tab
    context.close()
    assert errors == []
