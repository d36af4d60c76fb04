"""The HTML report of a packed checkpoint: what it says, that it needs nothing else, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from bitsmoe_plugin import ConfigError
from bitsmoe_plugin.checkpoint.energy_summary import BINS, spectrum
from bitsmoe_plugin.cli import main
from bitsmoe_plugin.commands.inspect import inspect_checkpoint
from bitsmoe_plugin.commands.report import check_report_extra, write_report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from bitsmoe_plugin.commands.report.checkpoint_data import CheckpointData, gather, with_routing
from bitsmoe_plugin.commands.report.evaluation_data import read_evaluation
from bitsmoe_plugin.commands.report.figures import PLOTS, png_files
from bitsmoe_plugin.commands.report.page import render
from bitsmoe_plugin.commands.report.plots_curve import curve_files, draw, read_curves
from bitsmoe_plugin.commands.report.style import LIGHT, Look, applied

EVALUATION = {
    "perplexity": 55.268,
    "tokens": 364343,
    "per_domain": {"essays": 51.084, "fiction": 53.236},
    "kl_divergence": 0.01415,
    "top1_agreement": 0.904,
    "kl_median": 0.00512,
    "kl_99": 0.1234,
    "kl_999": 0.4567,
    "probability_change": 0.0345,
    "routing_change": 0.2345,
    "routing_change_by_layer": {f"model.layers.{i}.mlp.experts": 0.0678 * i for i in range(4)},
    "tasks": {"arc_easy": {"acc,none": 0.4567, "acc_stderr,none": 0.0123, "samples": 100}},
}


class Page(HTMLParser):
    """Elements with their attributes, cells of the tables by row, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self._cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] for _, attrs in self.elements if attribute in attrs]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "evaluation.json"
    path.write_text(json.dumps(EVALUATION))
    return path


@pytest.fixture(scope="module")
def written(packed_moe_tiny: Path, evaluation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    arguments = ["report", str(packed_moe_tiny), "--out", str(out), "--evaluation", str(evaluation)]
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def html(written: Path) -> str:
    return (written / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def data(packed_moe_tiny: Path) -> CheckpointData:
    return with_routing(gather(packed_moe_tiny), EVALUATION["routing_change_by_layer"])


@pytest.fixture
def copy(packed_moe_tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint whose config.json a test may change."""
    target = tmp_path / "copy"
    shutil.copytree(packed_moe_tiny, target)
    return target


def change_config(directory: Path, change: Any) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds; tests of the text do without."""
    monkeypatch.setattr("bitsmoe_plugin.commands.report.page.pictures", lambda data: {})


def test_page_loads_nothing(html: str, page: Page) -> None:
    """A report is sent around and opened offline; and it must not tell anyone that it was opened."""
    fetched = [*page.values("src"), *page.values("srcset"), *page.values("data"), *page.values("poster")]
    assert len(fetched) == 4 * len(PLOTS)
    assert all(value.startswith("data:image/svg+xml;base64,") for value in fetched)
    assert all(value.startswith("#") for value in page.values("href"))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert "url(" not in html
    assert "@import" not in html
    policy = next(attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_pictures_are_whole_and_load_nothing_either(page: Page) -> None:
    for value in page.values("src"):
        root = ElementTree.fromstring(b64decode(value.partition(",")[2]))
        assert root.tag.endswith("svg")
        for element in root.iter():
            links = [v for name, v in element.attrib.items() if name.endswith("href")]
            assert all(link.startswith(("#", "data:")) for link in links)


def test_every_picture_comes_light_and_dark_wide_and_narrow(page: Page) -> None:
    media = {attrs["media"] for tag, attrs in page.elements if tag == "source"}
    narrow, dark = "(max-width: 720px)", "(prefers-color-scheme: dark)"
    assert media == {f"{narrow} and {dark}", narrow, dark}
    assert len(set(page.values("srcset") + page.values("src"))) == 4 * len(PLOTS)
    assert all(page.values("alt"))


def test_page_has_the_numbers_of_inspect(page: Page, packed_moe_tiny: Path) -> None:
    report = inspect_checkpoint(packed_moe_tiny)
    assert f"{report['expert_weights']:,} expert weights" in page.text
    assert f"{report['calibration']['tokens']:,}" in page.text
    for bits in report["parts"].values():
        assert not bits or any(f"{bits:.4f}" in row for row in page.rows)
    total = ["all experts", f"{report['bits_per_weight']:.4f}", f"{report['expert_bytes']:,}", "100.0 %"]
    assert total in page.rows
    for number, layer in enumerate(report["layers"].values()):
        means = [
            sum(int(width) * rows for width, rows in histogram.items()) / sum(histogram.values())
            for histogram in layer["widths"].values()
        ]
        bits = [f"{mean:.2f}" for mean in means]
        assert [str(number), *bits, f"{layer['bits_per_weight']:.3f}", "0"] in page.rows
        keys = ("estimated_error", "calibration_error", "unseen_error")
        shares = [layer[key] / layer["output_energy"] if layer[key] is not None else None for key in keys]
        assert any(row[:1] == [str(number)] and row[1:4] == [*map(percent, shares)] for row in page.rows)
        tokens = layer["tokens_per_expert"]
        assert any(row[:2] == [str(number), f"{min(tokens):,}"] for row in page.rows)


def percent(share: float | None) -> str:
    if share is None:
        return "\N{EN DASH}"
    return f"{100 * share:.2f} %" if share < 0.1 else f"{100 * share:.1f} %"


def test_page_has_every_section(page: Page) -> None:
    sections = {attrs["id"] for tag, attrs in page.elements if tag == "section"}
    wanted = {"bits", "spectrum", "errors", "tokens", "super-experts", "size", "perplexity", "made"}
    assert sections == wanted
    assert {value.removeprefix("#") for value in page.values("href")} <= wanted


def test_page_has_what_evaluate_measured(page: Page) -> None:
    row = ["this checkpoint", "55.27", "0.0141", "90.4 %", "51.08", "53.24"]
    assert row in page.rows
    distance = ["0.0141", "0.0051", "0.1234", "0.4567", "90.4 %", "3.45 %", "23.4 %"]
    assert ["this checkpoint", *distance] in page.rows
    rows = [row for row in page.rows if len(row) == 2]
    assert rows[rows.index(["layer", "tokens with other experts"]) :][1:3] == [
        ["0", "0.00 %"],
        ["1", "6.78 %"],
    ]
    assert ["arc_easy", "acc,none", "0.4567", "0.0123"] in page.rows
    assert "364,343 tokens were scored" in page.text
    assert "not measured" not in page.text


def test_without_evaluation_it_says_how_to_get_one(
    data: CheckpointData, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    text = Page(render(data, None)).text
    assert "not measured" in text
    assert "bitsmoe evaluate DIR --dataset TEXT --reference MODEL --json > evaluation.json" in text
    assert "bitsmoe report DIR --evaluation evaluation.json" in text


def test_comparison_is_only_taken_for_this_checkpoint_if_its_size_is(
    data: CheckpointData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``compare`` quantizes the model again, perhaps with other options."""
    without_pictures(monkeypatch)
    rows = [{"method": "bitsmoe", "perplexity": 53.5, "bits_per_weight": bits} for bits in (data.bits, 3.0)]
    for row, shown in zip(rows, (True, False), strict=True):
        (tmp_path / "compare.json").write_text(json.dumps({"results": [row]}))
        page = Page(render(data, read_evaluation(tmp_path / "compare.json")))
        assert ["bitsmoe", f"{row['bits_per_weight']:.3f}", "53.50"] in page.rows
        assert ("not measured" in page.text) is not shown


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"perplexity": "low"}', '{"results": [1]}'])
def test_other_files_are_no_evaluation(content: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ConfigError, match=r"evaluation .*other\.json"):
        read_evaluation(tmp_path / "other.json")


def test_files_are_there_and_nothing_else(written: Path) -> None:
    pngs = [written / f"{plot.name}{dark}.png" for plot in PLOTS for dark in ("", "-dark")]
    assert sorted(written.iterdir()) == sorted([*pngs, written / "report.html"])
    assert all(png.read_bytes().startswith(b"\x89PNG") for png in pngs)


def test_quality_by_size_is_drawn_where_it_was_measured(
    data: CheckpointData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a curve that swaps its axes, or rows without numbers that end it."""
    without_pictures(monkeypatch)
    rows = [
        {"method": "size", "total_bytes": size, "kl_divergence": kl, "perplexity": 50}
        for size, kl in ((3000, 0.01), (2000, 0.02), (2500, None))
    ]
    rows += [{"method": "full", "total_bytes": 9000, "kl_divergence": 0.0, "perplexity": 49}, 7]
    path = tmp_path / "curve.json"
    path.write_text(json.dumps({"results": rows}))
    curves = read_curves(path)
    assert {name: points.tolist() for name, points in curves.items()} == {
        "size": [[2000, 0.02], [3000, 0.01]]
    }
    with applied(Look(LIGHT)):
        axes = draw(curves, Look(LIGHT)).axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_lines()[0].get_xdata().tolist() == [2000, 3000]
    pictures = Page(render(data, read_evaluation(path), curves)).values("srcset")
    assert len(set(pictures)) == len(set(Page(render(data, read_evaluation(path))).values("srcset"))) + 3
    path.write_text(json.dumps({"results": rows[:1]}))
    assert read_curves(path) == {}
    assert not list(curve_files({}))


def test_an_interrupted_report_leaves_the_old_one(
    packed_moe_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are replaced when they are complete, the page last, and other files are left alone."""
    without_pictures(monkeypatch)
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")

    def fail(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:1])
        raise OSError("disk full")

    monkeypatch.setattr(
        "bitsmoe_plugin.commands.report.figures.png_files", lambda data: iter([("size.png", b"png")])
    )
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(packed_moe_tiny, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "report.html"]
    assert (tmp_path / "report.html").read_text() == "old"
    write_report(packed_moe_tiny, tmp_path)
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_names_are_escaped(data: CheckpointData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint and an evaluation come from others; what they are called must not run in a browser."""
    without_pictures(monkeypatch)
    evil = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"'"
    layers = tuple(dataclasses.replace(layer, name=evil, label=evil) for layer in data.layers)
    values = {**EVALUATION, "per_domain": {evil: 1.0, "b": 2.0}, "tasks": {evil: {evil: 0.5}}}
    (tmp_path / "evaluation.json").write_text(json.dumps(values))
    hostile = dataclasses.replace(data, title=evil, architecture=evil, method=evil, layers=layers)
    page = Page(render(hostile, read_evaluation(tmp_path / "evaluation.json")))
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert page.text.count(evil) > 5
    assert evil in page.values("title")


def test_the_model_is_named_by_its_directory_and_config(copy: Path) -> None:
    evil = copy.rename(copy.with_name("<b>name"))
    change_config(evil, lambda values: values.update(architectures=["<i>"]))
    assert (gather(evil).title, gather(evil).architecture) == ("<b>name", "<i>")


def test_a_converted_checkpoint_says_what_it_lacks(copy: Path) -> None:
    """Imported checkpoints have no measurements; one that was tampered with may hold anything."""

    def strip(values: dict[str, Any]) -> None:
        reports = [layer["report"] for layer in values["quantization_config"]["layers"].values()]
        for report in reports:
            report.clear()
        reports[0].update(tokens_per_expert=["many"], spectrum=[[1e400]], output_peaks={"a": 1})
        reports[1].update(output_energy=True, unseen_error=[], super_experts=[10**9])
        reports[2].update(bits_per_weight="none")
        list(values["quantization_config"]["layers"].values())[3]["report"] = [1]
        values["quantization_config"]["calibration"] = {"tokens": "lots"}

    change_config(copy, strip)
    data = gather(copy)
    assert all(1 < layer.bits < 3 for layer in data.layers)
    names = {plot.name for plot in PLOTS if plot.has(data)}
    assert names == {"bits-by-layer", "widths-along-spectrum", "bits-by-expert", "size"}
    text = Page(render(data, None)).text
    for said in (
        "does not hold the spectrum",
        "holds no errors",
        "does not tell how many tokens",
        "does not tell whether super experts were looked for",
        "not known",
    ):
        assert said in text


def test_kept_and_super_experts(data: CheckpointData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table tells those that keep their weights from those that had to be quantized."""
    first = data.layers[0]
    changed = dataclasses.replace(first, kept=(3,), found=(3, 7))
    without_pictures(monkeypatch)
    rows = Page(render(dataclasses.replace(data, layers=(changed, *data.layers[1:])), None)).rows
    assert first.peaks is not None
    for expert, stored in ((3, "original"), (7, f"rows of {first.expert_bits[7]:.2f} bits")):
        assert ["0", str(expert), f"{first.peaks[expert]:,.1f}", "yes", stored] in rows


def test_all_plots_of_many_layers(data: CheckpointData) -> None:
    """More layers than are named one by one, a kept expert, experts without tokens, a layer without any."""
    layers = [dataclasses.replace(data.layers[i % 4], label=str(i)) for i in range(30)]
    layers[1] = dataclasses.replace(layers[1], kept=(0,), tokens=np.zeros(48))
    nothing = {"predicted": None, "calibration": None, "unseen": None}
    layers[2] = dataclasses.replace(
        layers[2], errors=nothing, energy=None, spectrum=None, tokens=None, peaks=None
    )
    assert len(list(png_files(dataclasses.replace(data, layers=tuple(layers))))) == 2 * len(PLOTS)


def test_widths_along_the_spectrum_are_those_of_the_rows(data: CheckpointData) -> None:
    for layer in data.layers:
        assert layer.width_shares.shape == (3, len(data.widths), BINS)
        np.testing.assert_allclose(layer.width_shares.sum(1), 1)
        # 128 ranks in 32 bins of four: the mean over bins is that over ranks.
        means = (layer.width_shares * np.array(data.widths)[:, None]).sum(1).mean(1)
        np.testing.assert_allclose(means, layer.projection_bits)
        assert layer.projection_bits.mean() == pytest.approx(layer.expert_bits.mean())


def test_spectrum_keeps_the_energy_of_experts_that_have_rows() -> None:
    energies = torch.rand(3, 5, 70)
    others = torch.tensor([True, True, False, True, True])
    bins = spectrum(energies, others)
    assert [len(factor) for factor in bins] == [BINS] * 3
    # Four significant digits of each bin.
    wanted = energies[:, others].sum((1, 2)).tolist()
    assert [sum(factor) for factor in bins] == pytest.approx(wanted, rel=1e-4)
    assert bins[0][0] == pytest.approx(float(energies[0, others, :3].sum()), rel=1e-3)


def test_missing_packages_are_named_before_anything_is_quantized(
    moe_tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r'jinja2 cannot .*pip install "bitsmoe-plugin\[report\]"'):
        check_report_extra()
    text = str(moe_tiny_path.parent / "data" / "calibration.jsonl")
    out = tmp_path / "out"
    assert main(["quantize", str(moe_tiny_path), str(out), "--dataset", text, "--report"]) == 2
    assert '"bitsmoe-plugin[report]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_quantize_writes_a_report_into_the_checkpoint(
    packed_moe_tiny: Path, moe_tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantizing is tested elsewhere; here a finished checkpoint stands in for it."""

    def quantize(model: str, out: Path, config: Any, device: str) -> None:
        shutil.copytree(packed_moe_tiny, out)

    monkeypatch.setattr("bitsmoe_plugin.commands.quantize.quantize_to_directory", quantize)
    without_pictures(monkeypatch)
    out = tmp_path / "out"
    assert main(["quantize", str(moe_tiny_path), str(out), "--dataset", "text.txt", "--report"]) == 0
    assert (out / "report" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_not_a_packed_checkpoint(moe_tiny_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(moe_tiny_path)]) == 2
    assert "not a packed BitsMoE checkpoint" in capsys.readouterr().err


def test_the_wheel_has_the_page(installed_wheel: Path) -> None:
    """Templates are no Python files: they are only packaged if that is asked for."""
    templates = installed_wheel / "bitsmoe_plugin" / "commands" / "report" / "templates"
    assert {path.name for path in templates.iterdir()} == {"report.html", "report.css"}
    assert re.search(r"prefers-color-scheme: dark", (templates / "report.css").read_text())
