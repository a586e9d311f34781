"""`fasttrain doctor --gpu` without a GPU: its files, processes and advice. test_gpu.py tests the decoders."""

import json
import sys
from dataclasses import asdict

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fasttrain.cli.main import main
from fasttrain.doctor import decoders as decoder_check
from fasttrain.doctor.decoders import Trial
from fasttrain.pipelines import decoders


def test_synthetic_files_have_the_kinds_in_their_names(tmp_path):
    decoder_check.write_images(tmp_path, photos=3)
    assert len(list(tmp_path.glob("photos*/*.jpg"))) == 3
    rare = {path.name: Image.open(path) for path in (tmp_path / "rare").iterdir()}
    assert rare["grey.jpg"].mode == "L" and rare["cmyk.jpg"].mode == "CMYK"
    assert rare["progressive.jpg"].info["progressive"] and rare["exif-rotated.jpg"].getexif()[0x0112] == 6
    assert rare["16-bit.png"].mode.startswith("I;16") and rare["picture.webp"].format == "WEBP"
    layers = {name: rare[name].layer[0][1:3] for name in ("not-subsampled.jpg", "progressive.jpg")}  # type: ignore[attr-defined]
    assert layers == {"not-subsampled.jpg": (1, 1), "progressive.jpg": (2, 2)}


def test_a_decoder_is_measured_in_its_own_process(tmp_path, monkeypatch):
    """On a CPU, where `cpu` is the only decoder."""
    decoder_check.write_images(tmp_path / "drawn", photos=12)
    monkeypatch.setattr(decoder_check, "TIMED_BATCHES", 2)
    settings = {"kind": "cpu", "data": None, "drawn": str(tmp_path / "drawn"), "device": "cpu"}
    trial = decoder_check._run_process(settings, tmp_path, 120)
    assert trial.status == 0 and trial.good and trial.images_per_s > 0
    assert (trial.mean, trial.most) == (0, 0)


def test_pixels_that_differ_are_found(tmp_path, monkeypatch):
    """With a decoder whose pixels are one level brighter in every stream."""
    decoder_check.write_images(tmp_path, photos=8)
    photos, rare = decoder_check.load_images(None, str(tmp_path))
    monkeypatch.setattr(decoder_check, "HASHED_BATCHES", 2)
    monkeypatch.setattr(decoder_check, "TIMED_BATCHES", 1)
    stream, kinds = decoder_check.stream, []

    def brighter(index, decoder, *rest):
        kinds.append(decoder.kind)
        shift = len(kinds) if decoder.kind != "cpu" else 0
        for batch in stream(index, decoders.Decoder("cpu"), *rest):
            yield batch._replace(pixels=torch.clamp(batch.pixels.int() + shift, max=255).to(torch.uint8))

    monkeypatch.setattr(decoder_check, "stream", brighter)
    result = decoder_check.measure("gpu", photos, rare, torch.device("cpu"), 1)
    # The first six streams are hashed. The seventh is compared for the photos, the ninth for the rare kinds.
    assert not result["same"] and 6 < result["mean"] <= result["most"] == 9
    assert result["worst"] in {*photos.ids, *rare.ids} and result["worst_mean"] >= result["mean"]
    assert not Trial("gpu", 0, **result).good


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        ("kill -SEGV $$", -11, "ended by signal 11"),
        ("echo first >&2; echo 'nvImageCodec failure: #8' >&2; exit 1", 1, "exit status 1: nvImageCodec failure: #8"),
        ("sleep 30", 124, "exit status 124: not finished after 1 s"),
    ],
)
def test_a_crash_of_a_decoder_is_reported(tmp_path, monkeypatch, script, status, message):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    trial = decoder_check._run_process({"kind": "gpu"}, tmp_path, 1)
    assert trial.status == status and not trial.good and message in decoder_check.line(trial)


BROKEN = "auto is gpu, which does not work here: --set machine.decoder=cpu"


def trials_with(**rates: float) -> list[Trial]:
    """Good trials by kind, with their images per second; 0: the decoder crashes."""
    kinds = {name.replace("_", "-"): rate for name, rate in rates.items()}
    return [Trial(kind, 0 if rate else -11, rate, same=bool(rate), mean=0.3) for kind, rate in kinds.items()]


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        (
            trials_with(cpu=100, gpu=200, gpu_hardware=400, gpu_region=300),
            "auto is gpu here, the fastest safe decoder: nothing to set",
        ),
        (
            trials_with(cpu=300, gpu=200, gpu_hardware=400),
            "auto is gpu here; faster and safe: --set machine.decoder=cpu",
        ),
        (trials_with(cpu=100, gpu=0), BROKEN),
        (trials_with(cpu=0, gpu=0, gpu_hardware=300), "no safe decoder works here"),
        ([*trials_with(cpu=100), Trial("gpu", 0, 200, same=False)], BROKEN),
        ([*trials_with(cpu=100), Trial("gpu", 0, 200, same=True, mean=2.0)], BROKEN),
        ([*trials_with(cpu=100), Trial("gpu", 0, 200, same=True, mean=0.3, worst="cmyk.jpg", worst_mean=80.0)], BROKEN),
    ],
)
def test_advice(monkeypatch, trials, message):
    monkeypatch.setattr(decoders, "nvimagecodec", lambda: "0.9.0")
    assert message in decoder_check.advice(trials)


def test_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "found.json"
    result = CliRunner().invoke(main, ["doctor", "--gpu", "--json", str(path)])
    assert result.exit_code == 0 and result.output.startswith("no GPU that torch can use")
    assert json.loads(path.read_text())["rows"] == []


def test_all_trials_are_printed_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(decoder_check, "run", lambda data: iter(trials_with(cpu=100, gpu=200)))
    path = tmp_path / "found.json"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        lines = [line for line, _ in decoder_check.report(None)]
    assert len(lines) == 4 and lines[0].startswith("A GPU, DALI ") and "200 img/s" in lines[2]
    monkeypatch.setattr(decoder_check, "report", lambda data: iter([("a line", trials_with(cpu=100))]))
    result = CliRunner().invoke(main, ["doctor", "--gpu", "--json", str(path)])
    assert result.output == "a line\n"
    assert json.loads(path.read_text())["rows"] == [asdict(trial) for trial in trials_with(cpu=100)]


@pytest.mark.parametrize(("rate", "status"), [(200, 0), (0, 1)])
def test_exit_status_of_a_default_that_does_not_work(monkeypatch, rate, status):
    monkeypatch.setattr(decoders, "nvimagecodec", lambda: "0.9.0")
    monkeypatch.setattr(decoder_check, "report", lambda data: iter([("a line", trials_with(cpu=100, gpu=rate))]))
    assert CliRunner().invoke(main, ["doctor", "--gpu"]).exit_code == status


def test_options_need_gpu():
    result = CliRunner().invoke(main, ["doctor", "--data", "."])
    assert result.exit_code == 2 and "together with --gpu only" in result.stderr


def test_a_missing_folder_is_not_a_decoder_error(tmp_path):
    result = CliRunner().invoke(main, ["doctor", "--gpu", "--data", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "no such folder" in result.stderr and "decoder" not in result.output
