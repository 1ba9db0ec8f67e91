"""The trainer, run very small: it makes a pipeline that loads, and goes on where it was stopped."""

import json
import sys
from pathlib import Path

import pytest
import torch
from blocktune.reference.train import main
from diffusers import StableDiffusion3Pipeline


def train(monkeypatch: pytest.MonkeyPatch, folder: Path, steps: int) -> None:
    """Two steps of the autoencoder and `steps` of the transformer."""
    sizes = {"--scenes": 8, "--vae-steps": 2, "--vae-batch": 2, "--batch": 2, "--steps": steps}
    places = {"--work": folder / "work", "--out": folder / "out"}
    options = [str(item) for pair in (sizes | places | {"--device": "cpu"}).items() for item in pair]
    monkeypatch.setattr(sys, "argv", ["train", *options])
    main()


def test_a_stopped_training_goes_on_and_ends_in_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(monkeypatch, tmp_path, steps=2)
    before = torch.load(tmp_path / "work" / "transformer.pt", weights_only=True)
    train(monkeypatch, tmp_path, steps=3)
    after = torch.load(tmp_path / "work" / "transformer.pt", weights_only=True)
    assert (before["done"], after["done"]) == (2, 3)
    assert any(not torch.equal(before["model"][name], after["model"][name]) for name in before["model"])
    # the second call trained no autoencoder, or its Adam would have counted more than two steps
    autoencoder = torch.load(tmp_path / "work" / "autoencoder.pt", weights_only=True)
    assert {int(state["step"]) for state in autoencoder["optimizer"]["state"].values()} == {2}
    pipe = StableDiffusion3Pipeline.from_pretrained(str(tmp_path / "out"), dtype=torch.float32)
    saved, average = pipe.transformer.state_dict(), after["average"]
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, average[f"transformer.{name}"].bfloat16().float())
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == "3"
