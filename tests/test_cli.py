"""Does the command line answer like its manual, and a wrong call with what to do?"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from terminal import calipers
from torch import nn
from typer.testing import CliRunner

from calipers import __version__
from calipers.cli import app

pytestmark = pytest.mark.one_in(1)

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()

def training():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))

def probabilities():
    return nn.Sequential(build(), nn.Softmax(1)).eval()

def uncapturable():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build()
        def forward(self, x):
            return self.inner(x) if float(x.detach().sum()) > 0 else self.inner(-x)
    return Branching().eval()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model file, and 20 points of shape (1, 3, 4) in [0, 1] with labels."""
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "points.py").write_text("def build(:")
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "points.npz",
        x=rng.random((20, 1, 3, 4), dtype=np.float32),
        y=rng.integers(0, 3, 20),
    )
    return tmp_path


def process(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, in the folder: a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "calipers.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_names_every_command_and_imports_nothing_heavy(folder: Path) -> None:
    """With torch, scipy or pandas it would take seconds, where a moment will do."""
    asked = [sys.executable, "-X", "importtime", "-m", "calipers.cli", "--help"]
    shown = subprocess.run(
        asked, cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    assert all(
        word in shown.stdout
        for word in ("measure", "distance", "attack", "certify", "check", "report")
    )
    imported = {
        line.rsplit("|", 1)[-1].strip().split(".")[0]
        for line in shown.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "typer" in imported and not imported & {
        "torch",
        "scipy",
        "pandas",
        "numpy",
        "onnx",
        "matplotlib",
        "onnxruntime",
    }, sorted(imported)


def test_measure_check_and_report_on_a_model_of_ones_own(folder: Path) -> None:
    done = process(
        folder,
        "measure",
        "-m",
        "net.py:build",
        "-d",
        "points.npz",
        "-e",
        "8/255",
        "--plan",
        "quick",
    )
    assert done.returncode == 0, done.stderr
    assert "robust accuracy, linf eps = 0.03137 (8/255), 20 points" in done.stdout
    assert (folder / "report.html").exists() and (folder / "run.calipers").exists()
    checked = calipers(folder, "check", "-m", "net.py:build")
    assert checked.returncode == 0 and "0 failed" in checked.stdout, checked.stderr + checked.stdout
    shown = calipers(folder, "report", "-o", "again.html")
    assert "robust accuracy" in shown.stdout and (folder / "again.html").exists()


def test_distance_prints_a_line_a_point(folder: Path) -> None:
    done = calipers(
        folder,
        "distance",
        "-m",
        "net.py:build",
        "-d",
        "points.npz",
        "--norm",
        "l2",
        "-n",
        "5",
        "--record",
        "none",
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split("certified above")[1].strip().splitlines()) == 6


@pytest.mark.parametrize(
    "command",
    [
        ("attack", "-t", "PGD(steps=5)"),
        ("certify", "-t", "IBP"),
        ("attack", "-t", "FGSM(targets=2)"),
        ("certify", "-t", "CertifiedRadius(CROWN(), rounds=3)"),
    ],
)
def test_one_tool_alone(folder: Path, command: tuple[str, ...]) -> None:
    done = calipers(folder, *command, "-m", "net.py:build", "-d", "points.npz")
    assert done.returncode == 0 and "at most" in done.stdout, done.stderr


def test_exported_programs_and_weights_files(folder: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    program = torch.export.export(
        module, (torch.rand(3, 1, 3, 4),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    torch.export.save(program, folder / "net.pt2")
    torch.save(module.state_dict(), folder / "weights.pt")
    answers = set()
    for words in (("-m", "net.pt2"), ("-m", "weights.pt", "--builder", "net.py:build")):
        done = calipers(
            folder,
            "measure",
            *words,
            "-d",
            "points.npz",
            "-e",
            "0.05",
            "--plan",
            "quick",
            "--record",
            "none",
            "--report",
            "none",
        )
        assert done.returncode == 0, done.stderr
        assert "no certificates" not in done.stdout
        answers.add("\n".join(line for line in done.stdout.splitlines() if "cost" not in line))
    assert len(answers) == 1


def test_images_in_class_folders(folder: Path) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for k in range(3):
        (folder / "images" / f"class{k}").mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(10 * k + i).integers(0, 256, (3, 4), dtype=np.uint8)
            pillow.fromarray(pixels).save(folder / "images" / f"class{k}" / f"{i}.png")
    done = calipers(
        folder, "attack", "-m", "net.py:build", "-d", "images", "-e", "2/255", "-t", "FGSM"
    )
    assert done.returncode == 0 and "6 points" in done.stdout, done.stderr


BAD = {
    "a typo in the command": (("mesure",), "No such command"),
    "a typo in an option": (("measure", "--epsilonn", "1"), "No such option"),
    "an unknown plan": (("measure", "--plan", "huge"), "choose one of quick, standard, brackets, thorough, complete, autoattack, distance"),
    "an unknown norm": (("measure", "--norm", "l7"), "unknown norm 'l7'; a Ball takes 'linf', 'l2' or 'l1'"),
    "a negative radius": (("measure", "-e", "-0.1"), "radius must be a finite number >= 0"),
    "no number": (("measure", "-e", "eight"), "'eight' is no number for a radius; write 0.1, 8/255"),
    "wrong units": (("measure", "-e", "8"), "radius and box are in different units"),
    "a missing model file": (("measure", "-m", "nit.py:build"), "there is no file nit.py"),
    "a missing function": (("measure", "-m", "net.py:bild", "-d", "points.npz"), "defines no function 'bild'; it defines build, training"),
    "a missing data file": (("measure", "-m", "net.py:build", "-d", "nothing.npz"), "there is no file nothing.npz"),
    "data without a model": (("measure", "-d", "points.npz"), "name the model to measure on this data"),
    "the wrong shape": (("measure", "-m", "net.py:build"), "could not be called on inputs of shape (1, 28, 28)"),
    "a typo in a tool": (("attack", "-t", "PGDD"), "there is no tool 'PGDD'; did you mean PGD?"),
    "a typo in a setting": (("attack", "-t", "PGD(step_count=3)"), "PGD has no setting 'step_count'; its settings are steps, restarts"),
    "no record": (("check", "nowhere.calipers"), "no record at nowhere.calipers"),
    "another file as record": (("report", "net.py"), "cannot be used as a record"),
    "a certifier as an attack": (("attack", "-t", "CROWN"), "CROWN is no tool for attack: write calipers certify --tool CROWN"),
    "an attack as a certifier": (("certify", "-t", "PGD"), "PGD is no tool for certify: write calipers attack --tool PGD"),
    "a percentage": (("measure", "--confidence", "95"), "the confidence is a share between 0 and 1, such as 0.95; got 95"),
    "no time": (("measure", "--seconds", "-1"), "the number of seconds must be above 0, got -1"),
    "code that fails": (("measure", "-m", "points.py:build", "-d", "points.npz"), "cannot be loaded: its code raises SyntaxError"),
    "weights without a builder": (("measure", "-m", "weights.pt"), "there is no file weights.pt"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_a_wrong_call_is_told_what_to_do(folder: Path, case: str) -> None:
    words, expected = BAD[case]
    done = calipers(
        folder,
        *words,
        *(
            ()
            if words[0] in ("check", "report", "mesure")
            else ("--record", "none", "--report", "none")
        ),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_cannot_be_captured_says_so_and_goes_on(folder: Path) -> None:
    done = calipers(
        folder,
        "measure",
        "-m",
        "net.py:uncapturable",
        "-d",
        "points.npz",
        "--plan",
        "quick",
        "--record",
        "none",
        "--report",
        "none",
    )
    assert (
        done.returncode == 0
        and "no certificates: the model cannot be exported as a graph" in done.stdout
    ), done.stderr


def test_data_in_grey_levels_is_refused_with_the_remedy(folder: Path) -> None:
    np.savez(
        folder / "grey.npz",
        x=np.random.default_rng(0).random((4, 1, 3, 4), dtype=np.float32) * 255,
        y=np.zeros(4, dtype=np.int64),
    )
    done = calipers(folder, "measure", "-m", "net.py:build", "-d", "grey.npz", "--record", "none")
    assert done.returncode == 2 and "divide by 255" in done.stderr


def test_a_report_nowhere_is_refused_before_the_work(folder: Path) -> None:
    done = calipers(
        folder, "measure", "-m", "net.py:build", "-d", "points.npz", "-o", "nowhere/report.html"
    )
    assert (
        done.returncode == 2
        and "there is no folder nowhere to write the report to" in done.stderr
        and not (folder / "run.calipers").exists()
    )


@pytest.mark.parametrize(
    ("command", "tool"), [("attack", "SubstitutionSearch"), ("certify", "CROWN")]
)
def test_symbols_have_tools_of_their_own(folder: Path, command: str, tool: str) -> None:
    """Four symbols of three kinds; a single tool without a name is one that fits them."""
    symbols = np.eye(3, dtype=np.float32)[np.random.default_rng(0).integers(0, 3, (20, 4))].reshape(
        20, 1, 3, 4
    )
    np.savez(folder / "letters.npz", x=symbols, y=np.random.default_rng(1).integers(0, 3, 20))
    done = calipers(
        folder,
        command,
        "-m",
        "net.py:build",
        "-d",
        "letters.npz",
        "--one-hot",
        "4,3",
        "-e",
        "1",
        "--record",
        "mine",
    )
    assert done.returncode == 0 and "at most 1 substitution" in done.stdout, done.stderr
    shown = calipers(folder, "report", "mine", "-o", "none")
    assert tool in shown.stdout, shown.stdout
    assert tool in calipers(folder, command, "--help").stdout


def test_the_version_is_that_of_the_package(folder: Path) -> None:
    assert process(folder, "--version").stdout == f"{__version__}\n"


def test_models_that_are_named_in_turn_are_measured_in_turn(folder: Path) -> None:
    """Each once, and none dropped in silence."""
    words = (
        "-d",
        "points.npz",
        "-e",
        "0.05",
        "--plan",
        "quick",
        "--record",
        "none",
        "--report",
        "none",
    )
    done = calipers(
        folder,
        "measure",
        "-m",
        "net.py:build",
        "-m",
        "net.py:uncapturable",
        "-m",
        "net.py:build",
        *words,
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("net.py")] == [
        "net.py:build",
        "net.py:uncapturable",
    ], done.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["measure", "--letters", "6,3"], "--letters is called --one-hot now"),
        (["attack", "--points=3"], "--points is called --limit now"),
        (["measure", "--resume", "run.calipers"], "--resume is called --record now"),
        (["verify", "a.onnx", "b.vnnlib", "--timeout", "3"], "--timeout is called --seconds now"),
        (["verify", "a.onnx", "b.vnnlib", "--proof", "p"], "--proof is called --proofs now"),
        (["geometry", "--letters", "6,3"], "No such option"),
    ],
)
def test_an_old_name_is_told_the_new_one(command: list[str], said: str) -> None:
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 2 and said in told.output


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("geometry", "--record"),
        ("geometry", "--proofs"),
        ("geometry", "--confidence"),
        ("geometry", "--guarantee"),
        ("geometry", "--one-hot"),
        ("attack", "--proofs"),
        ("attack", "--guarantee"),
    ],
)
def test_options_that_mean_nothing_to_a_command_are_not_offered(command: str, option: str) -> None:
    value = [] if option == "--proofs" else ["0.5"]
    told = CliRunner().invoke(app, [command, option, *value])
    assert told.exit_code == 2 and "No such option" in told.output
    assert option not in CliRunner().invoke(app, [command, "--help"]).output
