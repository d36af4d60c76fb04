"""Quantization that is killed, stopped or disturbed, and continued: the same bytes, or a refusal."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import resume_support as children
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitsmoe_plugin import BitsMoEConfig, QuantizationError
from bitsmoe_plugin.base.interruption import Interrupted, deferred_interrupt
from bitsmoe_plugin.base.work_directory import WorkDirectory, locked
from bitsmoe_plugin.integrations.transformers import quantize_to_directory
from bitsmoe_plugin.pipeline import quantize_model

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration token", "ignore:no tokenizer saved")
KILLS = int(os.environ.get("BITSMOE_TEST_KILLS", "10"))
LAYERS = 3


@pytest.fixture(scope="module")
def dense(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first decoder layer is dense, the experts of the others in separate tensors."""
    directory = tmp_path_factory.mktemp("dense")
    tiny_model("deepseek_v3", num_hidden_layers=LAYERS).bfloat16().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert children.finish(dense, out) == 0, children.stderr(out)
    return out


def assert_same_files(out: Path, wanted: Path) -> None:
    """Bitwise the same checkpoint, and nothing else left."""
    names = sorted(path.name for path in wanted.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names:
        assert (out / name).read_bytes() == (wanted / name).read_bytes(), name
    assert not Path(f"{out}.work").exists()


@pytest.fixture(scope="module")
def killed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run was killed in its second pass: ``out`` is absent, ``out.work`` holds finished layers."""
    out = tmp_path_factory.mktemp("killed") / "out"
    assert children.finish(dense, out, dies_at=16) == -signal.SIGKILL
    assert not out.exists()
    return out


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(f"{killed}.work", tmp_path / "out.work")
    return tmp_path / "out"


def journal(out: Path) -> dict[str, Any]:
    """State in the work directory of a run."""
    return json.loads((Path(f"{out}.work") / "journal.json").read_text())["content"]["state"]


def test_work_directory_changes_nothing(dense: Path, whole: Path) -> None:
    """Guards plans and layers that go through files against those that stay in memory, the other source of
    weights included."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    blocks = torch.tensor(children.TOKENS).view(-1, 32)
    config = quantize_model(model, blocks, BitsMoEConfig(**children.OPTIONS))
    tensors = load_file(whole / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if ".bitsmoe_" in name:
            assert torch.equal(tensors.pop(name), tensor), name
    assert not any(".bitsmoe_" in name for name in tensors)
    stored = json.loads((whole / "config.json").read_text())["quantization_config"]
    assert stored["layers"] == json.loads(json.dumps(config.layers))
    assert stored["calibration"] == config.calibration


def test_killed_at_random_and_continued(dense: Path, whole: Path, tmp_path: Path) -> None:
    """Guards every moment, by chance: SIGKILL at random times of random attempts (more of them with the
    environment variable BITSMOE_TEST_KILLS), each continued until the next."""
    timed = time.monotonic()
    assert children.finish(dense, tmp_path / "timed") == 0
    timed = time.monotonic() - timed
    kills, run, rng = 0, 0, random.Random(0)
    while kills < KILLS:
        run += 1
        out = tmp_path / f"run{run}"
        while True:
            child = children.start(dense, out)
            child.join(rng.uniform(0, timed))
            if child.exitcode is not None or kills == KILLS:
                break
            child.kill()
            child.join()
            kills += 1
            if out.exists():  # killed between the last rename and the removal of the work directory
                assert not any(out.name in path.name for path in out.parent.glob("*.partial"))
        child.join()
        if out.exists() and Path(f"{out}.work").exists():
            shutil.rmtree(f"{out}.work")
        assert out.exists(), children.stderr(out)
        assert_same_files(out, whole)


def test_killed_around_every_kind_of_rename(dense: Path, whole: Path, tmp_path: Path) -> None:
    """Guards the order of writes: what is not yet in the journal must not count, what is must be there."""
    out = tmp_path / "out"
    for number in range(2, 12):
        if children.finish(dense, out, dies_at=number) == 0:
            break
    else:
        assert children.finish(dense, out) == 0, children.stderr(out)
    assert_same_files(out, whole)


def test_killed_before_any_change_of_a_file(dense: Path, whole: Path, tmp_path: Path) -> None:
    """Guards every state that the disk can be in between two calls of the system: a run that is killed there
    is continued to the same bytes. With BITSMOE_TEST_KILLS=1000 all of them, else a tenth of that many."""
    counted = tmp_path / "counted"
    assert children.finish(dense, counted, changes=0) == 0
    total = int(children.stderr(counted).rpartition(" changes of files")[0].split()[-1])
    assert total > 40
    for number in range(1, total + 1, max(1, 10 * total // KILLS)):
        out = tmp_path / f"run{number}"
        assert children.finish(dense, out, changes=number) == -signal.SIGKILL
        if not out.exists():
            assert children.finish(dense, out) == 0, children.stderr(out)
        elif Path(f"{out}.work").exists():  # finished but for the removal of what it no longer needs
            shutil.rmtree(f"{out}.work")
        assert_same_files(out, whole)
        shutil.rmtree(out)


@pytest.fixture(scope="module")
def extreme(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts have biases, one of them the output of a super expert."""
    directory = tmp_path_factory.mktemp("extreme")
    model = tiny_model("gpt_oss", num_hidden_layers=LAYERS, layer_types=["full_attention"] * LAYERS)
    for name, parameter in model.named_parameters():
        if "experts" in name and name.endswith("_bias"):
            parameter.data.normal_()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data[2, :, 5] += 1e6 * torch.randn(len(experts.down_proj[2]))
    model.bfloat16().save_pretrained(directory)
    return directory


def test_biases_and_kept_experts_survive_kills(extreme: Path, tmp_path: Path) -> None:
    """Guards what is found out in the first pass and chosen with the widths: a run that is killed in the
    first pass, between the two and in the second keeps the same experts and writes the same bytes."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert children.finish(extreme, whole, bits=12, super_experts="keep") == 0, children.stderr(whole)
    for number, planned, rounded in ((6, 1, 0), (9, LAYERS, 0), (6, LAYERS, 2)):
        assert children.finish(extreme, out, dies_at=number, bits=12, super_experts="keep") == -signal.SIGKILL
        state = journal(out)
        assert (state["planned"], state["rounded"]) == (planned, rounded)
    assert state["kept"] == {"0": [2], "1": [], "2": []}
    assert children.finish(extreme, out, bits=12, super_experts="keep") == 0, children.stderr(out)
    assert_same_files(out, whole)
    layers = json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    assert [entry.get("kept_experts") for entry in layers.values()] == [[2], None, None]
    assert all(entry["has_bias"] for entry in layers.values())


def test_finished_layers_are_not_done_again(dense: Path, whole: Path, interrupted: Path) -> None:
    """Guards the purpose: what the journal calls finished is neither read nor computed."""
    state = journal(interrupted)
    assert state["planned"] == LAYERS
    assert 0 < state["rounded"] < LAYERS
    assert children.finish(dense, interrupted) == 0
    printed = children.stderr(interrupted)
    assert "Calibrating" not in printed
    assert f"| {state['rounded']}/{LAYERS}" in printed
    assert_same_files(interrupted, whole)


def _alter_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def test_other_options_and_data_are_refused(dense: Path, interrupted: Path) -> None:
    """Guards against half of each; the message names what differs, and the directory stays usable."""
    with pytest.raises(QuantizationError, match=r"config bits was 8, is 7.*rm -r .*out\.work"):
        quantize_to_directory(str(dense), interrupted, children.config(bits=7))
    with pytest.raises(QuantizationError, match="calibration tokens was"):
        quantize_to_directory(str(dense), interrupted, children.config(dataset=[children.TOKENS[::-1]]))
    for option, value in (("super_experts", {}), ("all_experts", True)):
        with pytest.raises(QuantizationError, match=f"config {option} was .*, is {value}"):
            quantize_to_directory(str(dense), interrupted, children.config(**{option: value}))
    assert journal(interrupted)["planned"] == LAYERS


def test_other_code_and_threads_are_refused(
    dense: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against layers of two versions, and against sums in another order."""
    from bitsmoe_plugin.pipeline import run_identity

    with monkeypatch.context() as patch:
        patch.setattr(run_identity, "_sources", lambda: "others")
        with pytest.raises(QuantizationError, match=r"code sources was .*, is others"):
            quantize_to_directory(str(dense), interrupted, children.config())
    with monkeypatch.context() as patch:
        patch.setattr(run_identity.native, "select", lambda _: "abacus")
        with pytest.raises(QuantizationError, match=r"machine compiled code for was .*, is abacus"):
            quantize_to_directory(str(dense), interrupted, children.config())
    torch.set_num_threads(2)
    try:
        with pytest.raises(QuantizationError, match="machine threads was 1, is 2"):
            quantize_to_directory(str(dense), interrupted, children.config())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.2.mlp.experts.1.up_proj.weight", r"layers\.2\.mlp\.experts: .* not those that"),
        ("model.norm.weight", "weights outside the experts was"),
    ],
)
def test_altered_model_is_refused(
    name: str, message: str, dense: Path, interrupted: Path, tmp_path: Path
) -> None:
    """Guards against another model under the same name, with the same sizes: experts are noticed when
    their turn comes."""
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=message):
        quantize_to_directory(str(model), interrupted, children.config())


def test_model_with_other_files_is_refused(dense: Path, interrupted: Path, tmp_path: Path) -> None:
    """Guards the cheap check before any expert is read: sizes and headers."""
    model = Path(shutil.copytree(dense, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt", "other": "header"})
    with pytest.raises(QuantizationError, match=r"model file model\.safetensors was .* bytes"):
        quantize_to_directory(str(model), interrupted, children.config())


@pytest.mark.parametrize("name", ["journal.json", "widths.safetensors", "packed-1.safetensors", "rounded-1"])
def test_altered_state_is_refused(name: str, dense: Path, interrupted: Path) -> None:
    """Guards against a disk that lies, and against edits."""
    path = next(Path(f"{interrupted}.work").glob(f"{name}*"))
    _alter_byte(path, path.stat().st_size // 2)
    with pytest.raises(QuantizationError, match=rf"{path.name}.*rm -r .*out\.work"):
        quantize_to_directory(str(dense), interrupted, children.config())


@pytest.mark.parametrize("name", ["journal.json", "widths.safetensors"])
def test_truncated_or_missing_state_is_refused(name: str, dense: Path, interrupted: Path) -> None:
    path = Path(f"{interrupted}.work") / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(QuantizationError, match=name):
        quantize_to_directory(str(dense), interrupted, children.config())
    if name != "journal.json":
        path.unlink()
        with pytest.raises(QuantizationError, match=f"{name} cannot be read"):
            quantize_to_directory(str(dense), interrupted, children.config())


def test_ctrl_c_stops_after_the_layer(dense: Path, whole: Path, tmp_path: Path) -> None:
    """Guards that no layer is lost, and that the user is told how to go on."""
    out = tmp_path / "out"
    child = children.start(dense, out)
    children.wait_until(lambda: any(Path(f"{out}.work").glob("plan-*.safetensors")), child)
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    assert child.exitcode == 1
    assert "Ctrl-C again stops at once" in children.stderr(out)
    assert "Interrupted: " in children.stderr(out)
    assert f"{out}.work holds what is finished. Start the same again" in children.stderr(out)
    assert journal(out)["planned"] > 0
    assert children.finish(dense, out) == 0
    assert_same_files(out, whole)


class Cramped:
    """A hook of a layer that runs out of memory with more than two blocks; it can stop the run after it."""

    def __init__(self, stop: bool) -> None:
        self.stop, self.most = stop, 0

    def __call__(self, _layer: Any, args: tuple[torch.Tensor, ...], _output: Any) -> None:
        self.most = max(self.most, len(args[0]))
        if len(args[0]) > 2:
            if self.stop:
                self.stop = False
                os.kill(os.getpid(), signal.SIGINT)
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.filterwarnings("ignore:out of memory in decoder layer 1")
def test_fewer_blocks_after_running_out_of_memory_are_remembered(tiny_model: Any, tmp_path: Path) -> None:
    """Guards the bytes: products of other sizes may be rounded otherwise. Without it, a run that goes on
    would try all blocks again."""

    def quantize(work: Path | None, cramped: Cramped) -> dict[str, torch.Tensor]:
        model = tiny_model("qwen3_moe", num_hidden_layers=LAYERS)
        model.model.layers[1].register_forward_hook(cramped)
        blocks = torch.tensor(children.TOKENS).view(-1, 32)
        quantize_model(model, blocks, BitsMoEConfig(**children.OPTIONS, work_dir=work))
        return model.state_dict()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    whole = quantize(None, Cramped(stop=False))
    with pytest.raises(Interrupted):
        quantize(tmp_path / "work", Cramped(stop=True))
    rest = Cramped(stop=False)
    found = quantize(tmp_path / "work", rest)
    assert rest.most == 2
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_second_ctrl_c_stops_at_once() -> None:
    """Guards against a program that cannot be stopped; and the usual handling must come back."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with deferred_interrupt() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert issubclass(Interrupted, KeyboardInterrupt)


def test_second_run_into_one_directory_is_refused(dense: Path, whole: Path, tmp_path: Path) -> None:
    """Guards against two processes that write each other's files."""
    out = tmp_path / "out"
    child = children.start(dense, out)
    children.wait_until(lambda: Path(f"{out}.work/journal.json").exists(), child)
    os.kill(child.pid, signal.SIGSTOP)
    try:
        with pytest.raises(QuantizationError, match=r"out\.work is in use by another run"):
            quantize_to_directory(str(dense), out, children.config())
    finally:
        os.kill(child.pid, signal.SIGCONT)
    child.join(60)
    assert_same_files(out, whole)


def test_lock_is_of_one_thread(tmp_path: Path) -> None:
    """Guards a nested use, which must not lock itself out or unlock too early, and other threads."""
    failures: list[Exception] = []

    def intrude() -> None:
        try:
            with locked(tmp_path / "work"):
                pass
        except QuantizationError as error:
            failures.append(error)

    def try_from_another_thread() -> int:
        failures.clear()
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        return len(failures)

    with locked(tmp_path / "work"):
        with locked(tmp_path / "work"):
            assert try_from_another_thread() == 1
        assert try_from_another_thread() == 1
    assert try_from_another_thread() == 0


def test_foreign_directory_is_refused_and_untouched(dense: Path, tmp_path: Path) -> None:
    """Guards a user's files against being taken for debris."""
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(QuantizationError, match=r"thesis\.tex"):
        quantize_to_directory(str(dense), tmp_path / "out", children.config(work_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_directory_under_the_name_of_a_file_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "written-9.safetensors").mkdir()
    with (
        pytest.raises(QuantizationError, match=r"holds written-9\.safetensors, so it is not a work"),
        locked(tmp_path),
    ):
        pass
    assert (tmp_path / "written-9.safetensors").is_dir()


def test_library_call_continues_and_keeps_the_directory(dense: Path, whole: Path, tmp_path: Path) -> None:
    """Guards from_pretrained with work_dir: a second call is served from the files of the first."""
    work = tmp_path / "work"
    for _ in range(2):
        config = children.config(work_dir=work)
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
        model.save_pretrained(tmp_path / "out")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
        with locked(work):
            state = WorkDirectory(work).state
        assert (state["planned"], state["rounded"]) == (LAYERS, LAYERS)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.999])
def test_full_disk_loses_nothing(dense: Path, whole: Path, tmp_path: Path, share: float) -> None:
    """Guards plans, layers and the checkpoint itself: a file that does not fit is named, none is left half
    written, and with more room the same call goes on."""
    out, longest = tmp_path / "out", (whole / "model.safetensors").stat().st_size
    assert children.finish(dense, out, file_bytes=int(share * longest)) == 1
    assert "cannot be written" in children.stderr(out)
    assert "make room" in children.stderr(out)
    assert not out.exists()
    assert not any(".tmp" in path.name or path.is_dir() for path in Path(f"{out}.work").glob("*"))
    assert children.finish(dense, out) == 0, children.stderr(out)
    assert_same_files(out, whole)


def test_place_that_cannot_be_written_is_named(dense: Path, tmp_path: Path) -> None:
    """Guards against hours of work before the first write: a file where a directory is needed, and a
    directory without permission to write (root has that everywhere but in sysfs)."""
    (tmp_path / "file").touch()
    closed = Path("/sys") if os.geteuid() == 0 else tmp_path / "closed"
    if os.geteuid():
        closed.mkdir(mode=0o555)
    for place in (tmp_path / "file", closed):
        with pytest.raises(QuantizationError, match=rf"{place}/out\.work cannot be written"):
            quantize_to_directory(str(dense), place / "out", children.config())


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system")
def test_work_directory_on_another_file_system(dense: Path, whole: Path, tmp_path: Path) -> None:
    """Guards the last rename, which cannot cross file systems; progress elsewhere is not touched."""
    out, other = tmp_path / "out", Path(tempfile.mkdtemp(dir="/dev/shm"))
    assert other.stat().st_dev != tmp_path.stat().st_dev
    try:
        assert children.finish(dense, out, dies_at=16, work_dir=other / "work") == -signal.SIGKILL
        assert children.finish(dense, out, work_dir=other / "work") == 0, children.stderr(out)
        assert list(other.iterdir()) == []
    finally:
        shutil.rmtree(other)
    assert_same_files(out, whole)


def test_two_work_directories_for_one_output_are_refused(dense: Path, whole: Path, tmp_path: Path) -> None:
    """Guards against two runs that both think they are alone."""
    out = tmp_path / "out"
    child = children.start(dense, out, work_dir=tmp_path / "first")
    children.wait_until(lambda: (tmp_path / "first" / "journal.json").exists(), child)
    os.kill(child.pid, signal.SIGSTOP)
    try:
        with pytest.raises(QuantizationError, match=r"out\.work is in use by another run"):
            quantize_to_directory(str(dense), out, children.config(work_dir=tmp_path / "second"))
    finally:
        os.kill(child.pid, signal.SIGCONT)
    child.join(60)
    assert_same_files(out, whole)


@pytest.mark.parametrize("clock", [0, 4102444800])
def test_times_of_files_mean_nothing(dense: Path, whole: Path, interrupted: Path, clock: int) -> None:
    """Guards against a clock that was set between two runs: 1970, 2100."""
    for path in Path(f"{interrupted}.work").iterdir():
        os.utime(path, (clock, clock))
    assert children.finish(dense, interrupted) == 0, children.stderr(interrupted)
    assert_same_files(interrupted, whole)


def test_names_beyond_ascii_in_the_c_locale(dense: Path, whole: Path, tmp_path: Path) -> None:
    """Guards files and messages whose names the terminal's character set does not have."""
    model, out = tmp_path / "Modell_ß", tmp_path / "Ergebnis_ü"
    shutil.copytree(dense, model)
    program = "import sys, resume_support as r; r.torch.set_num_threads(1); r.quantize_to_directory("
    program += "sys.argv[1], r.Path(sys.argv[2]), r.config())\n"
    program += "from bitsmoe_plugin.cli import main; sys.exit(main(['inspect', sys.argv[2]]))"
    paths = [str(Path(children.__file__).parent), *sys.path]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-c", program, str(model), str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode(errors="replace")
    for path in whole.iterdir():
        if path.name != "README.md":  # which says what was quantized
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
