"""Figures from records: that they are drawn, the same each time, and show what the records hold."""

from collections.abc import Iterator
from itertools import combinations
from math import nan
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from l2bn.records import METRICS, write_lines
from l2bn.reporting.comparison import arms_of, grid, pooled
from l2bn.reporting.evidence import BN, L2BN, MEAN_NORM, Evidence, read_evidence
from l2bn.reporting.figures import (
    IN_ACCURACY,
    IN_COMPACTNESS,
    SET_FIGURES,
    STYLES,
    curves,
    differences,
    drawing,
    forest_plot,
    lines_of_set,
    read_curves,
    write_figures,
)
from l2bn.reporting.readme import BEGIN, END, readme_with_block
from l2bn.reporting.reference import Control, RunSet
from synthetic_records import write_features, write_pairs, write_run


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    root = tmp_path / "runs"
    write_pairs(root, [90, 91, 92], [0.1, 0.2, 0.6], curve=12, epochs=12)
    write_pairs(root, [93, 93.2, 93.4], [-0.1, -0.2, -0.6], backbone="vgg16", curve=12, epochs=12)
    write_pairs(root, [70], [1.5], dataset="cifar10_jpeg", recipe="short", label="CIFAR-10 (JPEG)", epochs=1)
    write_run(root, norm="l2bn", seed=7, status="diverged", epochs=12)
    write_run(root, norm="l2bn_rms", epochs=12)
    return read_evidence(root)


def draw_curves(evidence: Evidence, dataset: str) -> Figure:
    rows = [row for row in grid(arms_of(evidence)) if row.cell.dataset == dataset]
    with drawing():
        return curves(rows, read_curves(evidence.records)[0])


def texts(figure: Figure) -> Iterator[str]:
    for axes in figure.axes:
        yield from (axes.get_title(loc=place) for place in ("left", "center", "right"))
        yield from (text.get_text() for text in axes.texts)
        yield from (label.get_text() for label in axes.get_yticklabels())
        legend = axes.get_legend()
        yield from (text.get_text() for text in legend.get_texts()) if legend else ()


def test_one_page_a_data_set_as_png_and_svg_whose_bytes_the_records_decide(
    tmp_path: Path, evidence: Evidence
) -> None:
    """Whatever a user has set in matplotlib."""
    first, problems = write_figures(evidence, tmp_path / "first")
    assert problems == []
    names = ("curves-cifar10", "curves-cifar10_jpeg", "differences")
    assert sorted(path.name for path in first) == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    with mpl.rc_context({"text.usetex": True, "lines.linewidth": 5, "axes.facecolor": "red"}):
        second, _ = write_figures(evidence, tmp_path / "second")
    for a, b in zip(first, second, strict=True):
        assert a.stat().st_size > 5_000
        assert a.read_bytes() == b.read_bytes(), a.name
        assert b"202" not in a.read_bytes()[:600] or a.suffix == ".png"  # no date in the head of an SVG


def test_data_sets_whose_names_differ_in_punctuation_alone_have_pages_of_their_own(tmp_path: Path) -> None:
    for dataset in ("mine,label=a b", "mine,label=a,b", "mine"):
        write_run(tmp_path / "runs", dataset=dataset, label=dataset)
    paths, _ = write_figures(read_evidence(tmp_path / "runs"), tmp_path)
    names = {path.stem for path in paths}
    assert len(names) == 3
    assert "curves-mine" in names
    assert len({path.read_bytes() for path in paths}) == 6


def test_a_curve_is_the_mean_of_its_runs_with_a_band(evidence: Evidence) -> None:
    figure = draw_curves(evidence, "cifar10")
    panel = figure.axes[0]
    assert panel.get_title(loc="left") == "resnet20"
    arm = next(
        row for row in grid(arms_of(evidence)) if row.cell.backbone == "resnet20" and row.differences()
    ).reference
    assert arm
    runs = [[row["test/top1"] for row in record.metrics()] for record in arm.records]
    expected = [sum(column) / 3 for column in zip(*runs, strict=True)]
    assert list(panel.lines[0].get_ydata()) == pytest.approx(expected)
    assert list(panel.lines[0].get_xdata()) == list(range(1, 13))
    assert len(panel.collections) == 2  # a band an arm
    vertices = panel.collections[0].get_paths()[0].vertices
    last = [y for x, y in vertices if x == 12]
    assert (min(last), max(last)) == pytest.approx((90, 92))  # 91 ± 1


def test_legends_tell_n_and_what_diverged(evidence: Evidence) -> None:
    shown = list(texts(draw_curves(evidence, "cifar10")))
    assert "BN  91.00 ± 1.00  (n = 3)" in shown
    assert "L2BN  91.30 ± 1.25  (n = 3)" in shown
    assert "diverged: 1 L2BN" in shown


def test_the_last_epochs_are_inside_the_panel(evidence: Evidence) -> None:
    for panel in draw_curves(evidence, "cifar10").axes:
        low, high = panel.get_ylim()
        for line in panel.lines:
            assert low < line.get_ydata()[-1] < high


def test_the_last_epochs_of_long_runs_have_an_inset(tmp_path: Path) -> None:
    write_pairs(tmp_path, [60, 61], [0.5, 0.6], epochs=30, curve=30)
    (panel,) = draw_curves(read_evidence(tmp_path), "cifar10").axes
    (inset,) = panel.child_axes
    for line, whole in zip(inset.lines, panel.lines, strict=True):
        assert list(line.get_xdata()) == list(range(23, 31))
        assert list(line.get_ydata()) == list(whole.get_ydata())[-8:]


@pytest.mark.usefixtures("evidence")
def test_dots_stand_at_the_differences_and_lines_span_the_intervals(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write_pairs(root, [91, 92, 93], [0.3, 0.4, 0.8], backbone="vgg11", epochs=12)
    rows = grid(arms_of(read_evidence(root)))
    axes = differences(rows).axes[0]
    drawn = {
        tuple(round(float(x), 9) for x in line.get_xdata())
        for line in axes.lines
        if line.get_marker() in ("None", None)
    }
    expected = [row.difference() for row in rows if row.difference().low is not None] + [pooled(rows)]
    assert len(expected) == 4
    assert {(round(e.low, 9), round(e.high, 9)) for e in expected} <= drawn
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[pytest.approx(1.5)]]  # the pair with one seed
    shown = list(texts(axes.figure))
    assert "CIFAR-10 (JPEG)" in shown
    assert "short, float32" in shown
    assert "+1.50" in shown


def figure_of_set(root: Path, run_set: RunSet) -> Figure:
    return forest_plot(lines_of_set(arms_of(read_evidence(root)), run_set, SET_FIGURES[IN_ACCURACY]), IN_ACCURACY)


def test_a_set_of_runs_has_a_figure_once_it_has_a_pair_and_both_means_once_complete(tmp_path: Path) -> None:
    run_set = RunSet("A set", "cifar10", "cosine_30", "32-true", ("net0", "net1"), (0, 1, 2))
    root, options = tmp_path / "runs", {"recipe": "cosine_30", "epochs": 30, "curve": 30}
    write_run(root, backbone="net0", **options)
    assert [path.stem for path in write_figures(read_evidence(root), tmp_path, [run_set])[0]] == [
        "curves-cifar10"
    ] * 2

    write_pairs(root, [60, 61, 62], [0.4, 0.5, 0.6], backbone="net0", **options)
    write_pairs(root, [60], [9.0], backbone="net7", **options)
    paths, _ = write_figures(read_evidence(root), tmp_path, [run_set])
    assert paths[-1] == tmp_path / "differences-cifar10-cosine_30.svg"
    shown = list(texts(figure_of_set(root, run_set)))
    assert {"net0", "+0.50"} <= set(shown)
    assert not [text for text in shown if text == "net7" or "networks" in text]

    write_pairs(root, [60, 61, 62], [0.5, 0.6, 0.7], backbone="net1", **options)
    axes = figure_of_set(root, run_set).axes[0]
    assert "mean over these networks, n pairs" in set(texts(axes.figure))
    # s = 0.1 over 4 degrees of freedom: 2.776 * 0.1 * sqrt(2 / 3) / 2 = 0.113 around 0.55, and of a network
    # 2.776 * 0.1 / sqrt(3) = 0.160 around 0.5, thick; by its own 2 degrees of freedom 4.303 / 2.776 times that.
    drawn = {tuple(line.get_xdata()): line.get_linewidth() for line in axes.lines}
    widths = [
        next(width for span, width in drawn.items() if span == pytest.approx(expected, abs=1e-3))
        for expected in ((0.437, 0.663), (0.340, 0.660), (0.252, 0.748))
    ]
    assert widths[0] == widths[1] > widths[2]


def test_a_set_with_measured_features_has_a_figure_of_compactness(tmp_path: Path) -> None:
    """L2BN against BN above L2BN against its control, in the share of the variance within classes."""
    control = Control(MEAN_NORM, ("net0",))
    run_set = RunSet("A set", "cifar10", "cosine_30", "32-true", ("net0",), (0, 1), control=control)
    for norm, share in ((BN, 0.5), (L2BN, 0.4), (MEAN_NORM, 0.37)):
        for seed in run_set.seeds:
            run = write_run(tmp_path, norm=norm, seed=seed, backbone="net0", recipe="cosine_30", epochs=30)
            write_features(run, within_share=share + seed / 100)
    evidence = read_evidence(tmp_path, features=True)
    names = [path.stem for path in write_figures(evidence, tmp_path / "figures", [run_set])[0][::2]]
    assert names == ["curves-cifar10", "differences", *run_set.figures]
    lines = lines_of_set(arms_of(evidence), run_set, SET_FIGURES[IN_COMPACTNESS])
    assert [(line.text, line.result and round(line.result.mean or 0, 9)) for line in lines if line.values] == [
        ("net0", -0.1),
        ("net0", 0.03),
    ]


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("networks", [2, 3])
def test_the_figure_of_a_set_and_the_readme_agree_on_other_networks(
    networks: int, seeds: int, tmp_path: Path
) -> None:
    """One has their mean exactly where the other has it: from 3 networks with 3 pairs each."""
    names = tuple(f"net{net}" for net in range(networks))
    run_set = RunSet("A set", "cifar10", "cosine_30", "32-true", names, (0, 1, 2))
    for net, name in enumerate(names):
        gains = [0.3 + net / 10, 0.4 + net / 10, 0.5 + net / 10][:seeds]
        write_pairs(tmp_path, [60.0] * seeds, gains, backbone=name, recipe="cosine_30", epochs=30)
    has_mean = networks == seeds == 3
    shown = list(texts(figure_of_set(tmp_path, run_set)))
    assert ("the same, for other networks, n networks" in shown) is has_mean
    readme = readme_with_block(f"{BEGIN}\n{END}", read_evidence(tmp_path), run_set)
    assert ("there is no interval yet" in readme) is not has_mean


def test_nothing_of_the_dot_plot_is_cut_off_or_stands_on_another(tmp_path: Path) -> None:
    for backbone in ("resnet20", "a_backbone_with_a_long_name,and=many,options=changed"):
        write_pairs(tmp_path, [90], [-4.7], backbone=backbone, label="A data set of a long name, 12,800 images")
        write_pairs(tmp_path, [90], [0.4], backbone=backbone, recipe="short,batch_size=16,epochs=3,lr=0.02")
    with drawing():
        figure = differences(grid(arms_of(read_evidence(tmp_path))))
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in [*axes.texts, axes.xaxis.label]]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
    assert [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])] == []
    assert not any(box.overlaps(axes.get_window_extent()) for box in boxes)


@pytest.mark.parametrize(("lowest", "insets"), [(60.0, 1), (30.0, 0)])
def test_an_inset_lies_on_no_curve(lowest: float, insets: int, tmp_path: Path) -> None:
    """As it would after a warm restart."""
    write_pairs(tmp_path, [80.0], [1.0], epochs=40)
    (row,) = grid(arms_of(read_evidence(tmp_path)))
    curve = [*[80.0] * 25, lowest, *[80.0] * 14]
    figure = curves([row], {record.folder: curve for record in row.records})
    assert [len(panel.child_axes) for panel in figure.axes if panel.lines] == [insets]


@pytest.mark.parametrize("networks", [1, 2])
def test_a_long_title_stays_within_its_figure(networks: int, tmp_path: Path) -> None:
    label = "ESC-50, fold 1, from .opus files, at 16 kHz, trained without fold 2"
    for number in range(networks):
        write_pairs(tmp_path, [70, 71], [1, 2], backbone=f"net{number}", label=label, recipe="restarts_126")
    figure = draw_curves(read_evidence(tmp_path), "cifar10")
    FigureCanvasAgg(figure).draw()
    (title,) = (text for text in figure.texts if "ESC-50" in text.get_text())
    assert title.get_window_extent().x1 <= figure.bbox.x1


def test_recipes_that_differ_are_told_panel_by_panel(tmp_path: Path) -> None:
    write_pairs(tmp_path, [90], [0.1], epochs=1)
    write_pairs(tmp_path, [90], [0.1], recipe="short,batch_size=16", epochs=1)
    shown = list(texts(draw_curves(read_evidence(tmp_path), "cifar10")))
    assert "cosine_200, float32" in shown
    assert "short (batch size 16), float32" in shown


def test_arms_differ_in_more_than_colour() -> None:
    a, b = STYLES.values()
    assert a["linestyle"] != b["linestyle"]
    assert a["marker"] != b["marker"]
    light, dark = (0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in (to_rgb(s["color"]) for s in (b, a)))
    assert light - dark > 0.2  # in greyscale


def test_a_run_without_readable_epochs_lacks_a_curve_and_counts_as_in_the_tables(
    tmp_path: Path, evidence: Evidence
) -> None:
    """Its result stands in the summary, which is whole."""
    row = next(row for row in grid(arms_of(evidence)) if row.cell.backbone == "vgg16")
    assert row.other
    broken = [record.folder for record in row.other.records]
    (broken[0] / METRICS).write_text('{"epoch": 1')
    with drawing():
        before = list(texts(differences([row])))
        paths, problems = write_figures(evidence, tmp_path / "figures")
        assert [problem.folder for problem in problems] == [broken[0]]
        assert problems[0].part == "curve"
        assert len(paths) == 6
        assert list(texts(differences([row]))) == before
        assert "L2BN  92.90 ± 0.10  (n = 3, curve of 2)" in texts(draw_curves(evidence, "cifar10"))
        for folder in broken[1:]:
            (folder / METRICS).unlink()
        assert "L2BN  92.90 ± 0.10  (n = 3, curve of 0)" in texts(draw_curves(evidence, "cifar10"))


def test_an_epoch_without_an_accuracy_is_a_gap_and_moves_no_other(tmp_path: Path) -> None:
    record = write_run(tmp_path, epochs=5, curve=5)
    rows = record.metrics()
    rows[1]["test/top1"] = None
    write_lines(record.folder / METRICS, rows)
    (line,) = draw_curves(read_evidence(tmp_path), "cifar10").axes[0].lines
    assert list(line.get_ydata()) == pytest.approx([row["test/top1"] or nan for row in rows], nan_ok=True)


def test_nothing_is_drawn_without_records(tmp_path: Path) -> None:
    assert write_figures(Evidence([]), tmp_path / "figures") == ([], [])
    assert not (tmp_path / "figures").exists()
