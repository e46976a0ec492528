"""Features and studies as tables, figures and verdicts: the numbers are those of the records, or there are none."""

import csv
import io
import json
import re
from collections.abc import Sequence
from decimal import ROUND_HALF_DOWN, ROUND_HALF_UP, Decimal
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT, Issue
from l2bn.errors import UserError
from l2bn.records import FEATURES, SAMPLE, STATISTICS, Sample, read_sample, read_statistics, write_lines
from l2bn.reporting.comparison import Arm, Comparison, arms_of
from l2bn.reporting.evidence import (
    BN,
    DETACHED,
    INPUT,
    L2BN,
    MEAN_NORM,
    PENULTIMATE,
    RMS,
    SHRINK,
    WITHIN_SHARE,
    Evidence,
    Grouping,
    read_evidence,
)
from l2bn.reporting.figures import (
    accuracy_over_eps,
    accuracy_over_rates,
    accuracy_over_updates,
    drawing,
    feature_map,
    norms_by_depth,
    principal_plane,
    through_training,
    write_mechanism_figures,
)
from l2bn.reporting.formatting import left_out
from l2bn.reporting.mechanism import (
    CONTROL_QUANTITIES,
    features_csv,
    measured_pairs,
    mechanism_documents,
    pair_table,
    quantity_table,
    read_mechanism,
    steps_table,
)
from l2bn.reporting.statistics import estimate, paired_differences
from l2bn.reporting.studies import (
    BY_EPS,
    BY_RATE,
    EPS,
    RATES,
    TRAP,
    Studies,
    eps_table,
    overall,
    parts_table,
    rate_note,
    rate_table,
    studies_csv,
    studies_of,
    trap_table,
)
from synthetic_records import write_features, write_run


def write_measured(
    root: Path, norm: str, shares: Sequence[float], *, angles: Sequence[float] = (60.0,) * 9, **cell: object
) -> None:
    """A run a seed with these within shares."""
    for seed, (share, angle) in enumerate(zip(shares, angles, strict=False)):
        record = write_run(root, norm=norm, seed=seed, accuracy=90.0 + seed, **cell)  # type: ignore[arg-type]
        cv = 0.2 if norm == BN else 0.1
        write_features(record, within_share=share, angle=angle, norm_cv=cv, epochs=(10, 100), sample=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """BN and L2BN with a difference of -0.03 ± 0.01 in within_share, and two controls."""
    root = tmp_path / "records"
    write_measured(root, BN, (0.20, 0.22, 0.24), angles=(60, 61, 62))
    write_measured(root, L2BN, (0.18, 0.19, 0.20), angles=(60, 63, 66))
    write_measured(root, MEAN_NORM, (0.21, 0.22, 0.23))
    write_run(root, norm="group_norm", accuracy=70.0)
    write_run(root, norm=L2BN, seed=7, status="diverged")
    return root


@pytest.fixture
def evidence(root: Path) -> Evidence:
    return read_evidence(root, features=True)


def measured(evidence: Evidence) -> list[Arm]:
    return [arm for arm in arms_of(evidence) if arm.features]


def pair_of(evidence: Evidence) -> Comparison:
    (pair,) = measured_pairs(arms_of(evidence))
    return pair


# ---- Reading ------------------------------------------------------------------------------------------------


def test_arms_hold_the_runs_that_were_measured_to_their_end(root: Path) -> None:
    (unfinished,) = (r for r in read_evidence(root).records if r.norm == "group_norm")
    write_features(unfinished)
    (unfinished.folder / FEATURES).write_text((unfinished.folder / FEATURES).read_text().replace("200", "100", 1))
    evidence = read_evidence(root, features=True)
    assert evidence.problems == []
    arms = measured(evidence)
    assert [arm.norm for arm in arms] == [BN, L2BN, MEAN_NORM]
    assert arms[1].of(WITHIN_SHARE) == {0: 0.18, 1: 0.19, 2: 0.20}
    assert arms[1].of(f"{INPUT}/norm_cv") == pytest.approx(dict.fromkeys(range(3), 0.2))  # of 0.1, 0.2, 0.3
    assert arms[1].of(SHRINK) == pytest.approx(dict.fromkeys(range(3), 0.95))
    assert pair_of(evidence).measured_epochs == [10, 100, 200]


def test_a_layer_without_a_value_has_no_mean(tmp_path: Path) -> None:
    write_features(write_run(tmp_path, norm="group_norm"), shrink=None)
    (arm,) = measured(read_evidence(tmp_path, features=True))
    assert arm.of(SHRINK) == {}


def test_unreadable_features_are_named_and_left_out(root: Path) -> None:
    folder = read_evidence(root).records[0].folder
    (folder / FEATURES).write_text("{")
    evidence = read_evidence(root, features=True)
    assert [problem.folder for problem in evidence.problems] == [folder]
    assert folder not in evidence.features
    assert left_out(evidence.problems) == ", measurements of 1 record left out"


# ---- Tables -------------------------------------------------------------------------------------------------


def test_the_table_of_a_pair_holds_means_and_paired_differences(evidence: Evidence) -> None:
    pair = pair_of(evidence)
    rows = {row[0]: row[1:] for row in pair_table(pair).rows}
    assert rows["within share, penultimate"] == (
        *("0.2200 ± 0.0200 (3)", "0.1900 ± 0.0100 (3; 1 diverged)", "−0.0300", "[−0.0548, −0.0052]", "3"),
    )
    assert rows["mean angle, penultimate (°)"][2] == "+2.00"
    assert rows["shrink factor of the norm layers"][:2] == (
        "0.9500 ± 0.0000 (3)",
        "0.9500 ± 0.0000 (3; 1 diverged)",
    )


def test_the_table_of_norms_sets_each_against_bn_and_l2bn_against_each(evidence: Evidence) -> None:
    arms = measured(evidence)
    accuracy, share = (quantity_table(arms, quantity) for quantity in CONTROL_QUANTITIES[:2])
    assert [row[0] for row in share.rows] == [BN, L2BN, MEAN_NORM]
    control = share.rows[2]
    assert control[1:3] == ("0.2200 ± 0.0100 (3)", "0.0000")
    assert control[4:] == ("−0.0300", "no spread")
    assert share.rows[0][2:4] == ("–", "–")
    assert accuracy.rows[1][1] == "91.00 ± 1.00 (3; 1 diverged)"


def test_a_row_gives_the_n_of_each_quantity_where_they_differ(root: Path) -> None:
    write_measured(root, DETACHED, (0.19, 0.20, 0.21))
    arms = measured(read_evidence(root, features=True))
    assert [row[-1] for row in steps_table(arms).rows] == ["3", "3", "3"]
    (record,) = (run for run in read_evidence(root).records if (run.norm, run.seed) == (DETACHED, 1))
    (record.folder / FEATURES).unlink()
    arms = measured(read_evidence(root, features=True))
    assert [row[-1] for row in steps_table(arms).rows] == ["3, 2, 2, 2", "3, 2, 2, 2", "3"]


def test_the_csv_has_every_measure_of_every_norm(evidence: Evidence) -> None:
    rows = list(csv.DictReader(io.StringIO(features_csv(measured(evidence)))))
    assert len(rows) == 3 * (1 + 3 * 14)
    (row,) = (
        row for row in rows if (row["norm"], row["place"], row["measure"]) == (L2BN, PENULTIMATE, "within_share")
    )
    assert (row["bn_mean"], row["norm_mean"], row["pairs"], row["difference"]) == ("0.22", "0.19", "3", "-0.03")


# ---- Figures ------------------------------------------------------------------------------------------------


def test_figures_show_what_the_records_hold(evidence: Evidence) -> None:
    pair = pair_of(evidence)
    with drawing():
        depth = norms_by_depth(pair).axes[0]
        assert list(depth.lines[0].get_ydata()) == pytest.approx([0.2, 0.4, 0.6])  # BN, input
        assert list(depth.lines[1].get_ydata()) == pytest.approx([0.1, 0.2, 0.3])
        curves = through_training(pair).axes[0]
        assert list(curves.lines[0].get_xdata()) == [10, 100, 200]
        assert list(curves.lines[0].get_ydata()) == pytest.approx([0.44, 0.33, 0.22])


def test_no_panel_of_a_shared_axis_is_cut_off(evidence: Evidence) -> None:
    with drawing():
        panels = norms_by_depth(pair_of(evidence)).axes
    for panel in panels:  # the norms at the output, 1.0, are above all at the input
        bottom, top = panel.get_ylim()
        assert all(bottom <= value < top for line in panel.lines for value in np.asarray(line.get_ydata()))


def test_the_plane_is_that_of_both_networks_and_turns_no_way_by_chance() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 6)) * [5, 3, 1, 1, 1, 1] + 7
    mean, plane, shares = principal_plane(features)
    assert np.abs(plane[0, 0]) > 0.95
    assert np.abs(plane[1, 1]) > 0.9
    assert plane[0, 0] > 0
    variances = ((features - mean) @ plane.T).var(0)
    assert shares == pytest.approx(variances / features.var(0).sum())
    assert principal_plane(features[::-1])[1] == pytest.approx(plane)


def test_the_map_shows_the_same_images_of_both_arms(evidence: Evidence) -> None:
    pair = pair_of(evidence)
    assert pair.sampled is not None
    seed, *folders = pair.sampled
    assert seed == 0
    bn, l2bn = (read_sample(folder) for folder in folders)
    assert bn
    assert l2bn
    with drawing():
        left, right = feature_map(pair, seed, bn, l2bn).axes
    assert len(left.collections) == len(right.collections) == 3
    unit = [one.features / np.sqrt(one.features.var(0).sum()) for one in (bn, l2bn)]
    for panel, sample, features in ((left, bn, unit[0]), (right, l2bn, unit[1])):
        drawn = np.concatenate([np.asarray(points.get_offsets()) for points in panel.collections])
        both = np.concatenate(unit).astype(float)
        centred, order = both - both.mean(0), np.argsort(sample.labels, kind="stable")
        axes = np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]  # of the covariance of both
        expected = (features[order] - both.mean(0)) @ axes
        assert np.abs(drawn) == pytest.approx(np.abs(expected), abs=1e-3)
    (pair.reference.records[0].folder / SAMPLE).unlink()
    assert pair.sampled[0] == 1


def test_a_map_is_of_the_classes_that_it_shows(evidence: Evidence) -> None:
    """Ten, as many as there are colours, where a sample has more: plane, shares and count are of these."""
    labels = np.repeat(np.arange(12), 2)
    features = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
    features[labels >= 10] *= 100  # would turn the plane
    sample, ten = Sample(features, labels), Sample(features[:20], labels[:20])
    with drawing():
        whole, part = (feature_map(pair_of(evidence), 0, one, one) for one in (sample, ten))
    for figure in (whole, part):
        (text,) = figure.axes[0].texts
        assert text.get_text().startswith("seed 0, 20 test images of 10 classes; ")
    assert whole.axes[0].get_xlabel() == part.axes[0].get_xlabel()


@pytest.mark.parametrize("arm", ["bn", "l2bn"])
def test_a_damaged_sample_is_named_and_no_map_is_drawn(arm: str, root: Path, tmp_path: Path) -> None:
    """The run, not its cell; the other figures are drawn."""
    pair = pair_of(read_evidence(root, features=True))
    assert pair.sampled is not None
    damaged = pair.sampled[1 if arm == "bn" else 2]
    (damaged / SAMPLE).write_bytes(b"no sample")
    paths, problems = write_mechanism_figures(read_mechanism(root, tmp_path), tmp_path / "figures")
    assert [problem.folder for problem in problems] == [damaged]
    assert any(path.name.startswith("norms-") for path in paths)
    assert not any(path.name.startswith("map-") for path in paths)


# ---- Studies ------------------------------------------------------------------------------------------------

STUDIED = {"batch_size": 32, "lr": 0.1}
ACCURACY = {BN: 90.0, L2BN: 91.0, RMS: 90.4}


def write_eps_study(root: Path, seeds: int = 3) -> None:
    """At the usual eps, norm 1 is 1.0 better than BN, of which 0.4 come of equal norms; at 1e-12 0.5."""
    for eps, lost in ((1e-12, 0.5), (1e-5, 0.0)):
        for norm, accuracy in ACCURACY.items():
            for seed in range(seeds):
                better = accuracy + seed - (lost if norm == L2BN else 0) + (0.1 * seed if norm == L2BN else 0)
                identity = {"norm": {"eps": eps}, "recipe": STUDIED}
                record = write_run(
                    root, norm=f"{norm},eps={eps:g}", seed=seed, accuracy=better, identity=identity, epochs=5
                )
                write_features(record, shrink=0.9 if norm == L2BN and eps == 1e-5 else 1.0)
    write_run(root, norm="bn,eps=0.001", status="diverged", identity=identity | {"norm": {"eps": 1e-3}}, epochs=5)


def test_the_eps_tables_split_the_difference_into_norms_and_eps(tmp_path: Path) -> None:
    write_eps_study(tmp_path)
    (study,) = studies_of(read_evidence(tmp_path, features=True, grouping=BY_EPS))
    assert study.values == [(1e-12,), (1e-5,), (1e-3,)]
    rows = {row[0]: row for row in eps_table(study).rows}
    assert rows["1e-05"][1:4] == ("91.00 ± 1.00 (3)", "92.10 ± 1.10 (3)", "91.40 ± 1.00 (3)")
    assert rows["1e-05"][4] == "+1.10"
    assert rows["1e-05"][8:] == ("1.000 (1.000)", "0.900 (0.900)", "1.000 (1.000)")
    assert rows["1e-03"][1] == "1 diverged"
    parts = {row[0]: row for row in parts_table(study).rows}
    whole, norms, eps = list(parts.values())[:3]
    assert (whole[1], norms[1], eps[1]) == ("+1.10", "+0.40", "+0.70")
    assert norms[4] == "no spread"
    assert eps[4] != "–"
    assert whole[4] == "–"
    with drawing():
        left, right = accuracy_over_eps(study).axes
    assert len(right.lines) == 2  # norm 1 at two values of eps
    assert len(left.get_legend().get_texts()) == 3


def test_two_results_at_one_value_of_a_study_are_an_error_naming_both(tmp_path: Path) -> None:
    for norm, accuracy in (("l2bn", 90.0), ("l2bn,eps=1e-05", 91.0)):
        write_run(tmp_path, norm=norm, accuracy=accuracy, identity={"norm": {"eps": 1e-5}, "recipe": STUDIED})
    assert len(arms_of(read_evidence(tmp_path))) == 2
    with pytest.raises(UserError, match=r"l2bn/.*seed0 and .*l2bn,eps=1e-05/.*seed0"):
        read_evidence(tmp_path, grouping=BY_EPS)


def test_another_override_of_a_norm_does_not_join_its_mean_over_eps(tmp_path: Path) -> None:
    write_eps_study(tmp_path)
    identity = {"norm": {"eps": 1e-5, "momentum": 0.5}, "recipe": STUDIED}
    for name in ("l2bn,eps=1e-05,momentum=0.5", "l2bn,momentum=0.5,eps=1e-05"):
        write_run(tmp_path, norm=name, seed=7, accuracy=10.0, identity=identity, epochs=5)
    (study,) = studies_of(read_evidence(tmp_path, grouping=BY_EPS))
    arms = {arm.norm: arm.of() for arm in study.arms if arm.cell.value == (1e-5,)}
    assert arms["l2bn"] == pytest.approx({0: 91.0, 1: 92.1, 2: 93.2})
    assert arms["l2bn,momentum=0.5"] == {7: 10.0}


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"identity": {"recipe": {**STUDIED, "weight_decay": 0.1}}}, "recipe.weight_decay"),
        ({"identity": {"recipe": {**STUDIED, "lr": 0.3, "weight_decay": 0.1}}}, "recipe.weight_decay"),
        ({"identity": {"recipe": {**STUDIED, "epochs": 7}}}, "recipe.epochs"),
        ({"identity": {"recipe": STUDIED, "devices": 8}}, "setting"),
        ({"identity": {"recipe": STUDIED}, "precision": "bf16-mixed"}, "setting"),
    ],
    ids=str,
)
def test_other_conditions_never_join_a_study_of_rates(other: dict[str, Any], name: str, tmp_path: Path) -> None:
    usual = {"recipe": {**STUDIED, "weight_decay": 5e-4, "epochs": 5}}
    first = write_run(tmp_path, recipe="short", identity=usual)
    second = write_run(tmp_path, recipe="another", seed=1, **other)
    assert len(read_evidence(tmp_path).records) == 2  # of two cells, by their names
    with pytest.raises(UserError, match=rf"unequal conditions \({name}: ") as error:
        read_evidence(tmp_path, grouping=BY_RATE)
    assert str(first.folder) in str(error.value)
    assert str(second.folder) in str(error.value)


def test_a_norm_that_differs_in_more_than_eps_is_refused_in_a_study_of_eps(tmp_path: Path) -> None:
    for eps, scale in ((1e-12, "unit"), (1e-5, "rms")):
        identity = {"norm": {"eps": eps, "scale": scale}, "recipe": STUDIED}
        write_run(tmp_path, norm=f"l2bn,eps={eps:g}", identity=identity)
    with pytest.raises(UserError, match=r"norm\.scale: rms and unit.*nothing but norm\.eps"):
        read_evidence(tmp_path, grouping=BY_EPS)


@pytest.mark.parametrize("grouping", [BY_EPS, BY_RATE], ids=["eps", "rate"])
@pytest.mark.parametrize("recipe", [{}, {"batch_size": 32}, {"batch_size": 32, "lr": "high"}, "short"], ids=str)
def test_a_record_without_the_numbers_of_a_study_is_named_and_left_out(
    grouping: Grouping, recipe: object, tmp_path: Path
) -> None:
    """A record of no study, and one with the network's own eps, which may be any."""
    norm = {"norm": {"eps": 1e-5}}
    bad = [write_run(tmp_path, seed=1, identity={"recipe": recipe, **norm}).folder]
    if grouping is BY_EPS:
        bad += [write_run(tmp_path, seed=2, identity={"recipe": STUDIED}).folder]
        for seed, eps in ((3, "small"), (4, None)):
            bad += [write_run(tmp_path, seed=seed, identity={"recipe": STUDIED, "norm": {"eps": eps}}).folder]
    good = write_run(tmp_path, identity={"recipe": STUDIED, **norm})
    evidence = read_evidence(tmp_path, grouping=grouping)
    assert evidence.records == [good]
    assert [problem.folder for problem in evidence.problems] == bad
    assert all("summary.json: identity." in problem.reason for problem in evidence.problems)
    studies = studies_of(evidence)
    studies_csv(Studies(eps=studies) if grouping is BY_EPS else Studies(rates=studies))


def write_rate_study(root: Path) -> None:
    for batch, rate, gains in ((8, 0.1, (1.0, 2.0, 3.0)), (256, 0.1, (0.0, 0.0, 0.0)), (256, 1.0, (5.0,))):
        identity = {"recipe": {"batch_size": batch, "lr": rate}}
        recipe = f"short,batch_size={batch},lr={rate:g}"
        for seed, gain in enumerate(gains):
            for norm in (BN, L2BN):
                accuracy = 80.0 + seed + (gain if norm == L2BN else 0)
                write_run(root, norm=norm, recipe=recipe, seed=seed, accuracy=accuracy, identity=identity)
        if len(gains) == 1:
            write_run(root, norm=BN, recipe=recipe, seed=1, status="diverged", identity=identity)


def test_the_rate_table_has_a_row_a_setting_and_its_note_counts(tmp_path: Path) -> None:
    write_rate_study(tmp_path)
    (study,) = studies_of(read_evidence(tmp_path, grouping=BY_RATE))
    rows = rate_table(study).rows
    assert [row[:2] for row in rows] == [("8", "0.1"), ("256", "0.1"), ("256", "1")]
    assert rows[0][5:7] == ("+2.00", "[−0.48, +4.48]")
    assert rows[2][3] == "80.00 (1; 1 diverged)"
    note = rate_note(study)
    assert "Of 3 settings" in note
    # 0.5, 1, 1.5: the whole settings
    assert "Mean over the 2 settings in which all runs of seeds 0, 1, 2 finished" in note
    assert "+1.00 points, 95 % interval [−0.24, +2.24], n = 3; the settings' median +1.00." in note
    assert "Diverged: 1 of BN, 0 of L2BN" in note
    with drawing():
        assert len(accuracy_over_rates(study).axes) == 2


@pytest.mark.parametrize(
    ("seeds", "settings", "taken"),
    [
        ([{0, 1, 2}, {0, 1, 2}, {0, 1, 2}], 3, [0, 1, 2]),
        ([{0, 1, 2}, {0, 1, 2, 3}, {0, 1, 2}], 3, [0, 1, 2]),  # one more seed in one setting
        ([{0, 1, 2}, {0, 1}, {0, 1, 2}], 2, [0, 1, 2]),  # one less
        ([{0}, {1}, {2}], 0, []),
        ([{0, 1, 2}, set(), set()], 0, []),
    ],
    ids=str,
)
def test_the_mean_over_settings_takes_whole_settings_of_the_studys_seeds(
    seeds: list[set[int]], settings: int, taken: list[int], tmp_path: Path
) -> None:
    for own, rate in zip(seeds, (0.1, 0.3, 1.0), strict=True):
        recipe, identity = f"short,lr={rate:g}", {"recipe": {"batch_size": 32, "lr": rate}}
        write_run(tmp_path, recipe=recipe, seed=9, norm="group_norm", identity=identity)
        for seed in own:
            write_run(tmp_path, recipe=recipe, seed=seed, accuracy=80.0, identity=identity)
            write_run(tmp_path, recipe=recipe, seed=seed, accuracy=81.0 + seed, norm=L2BN, identity=identity)
    (study,) = studies_of(read_evidence(tmp_path, grouping=BY_RATE))
    found = overall(study)
    assert (found.settings, found.seeds, found.result.n) == (settings, taken, len(taken))
    assert found.result.mean == (2.0 if taken else None)


def test_the_median_shows_a_mean_that_one_setting_makes(tmp_path: Path) -> None:
    for rate, gain in ((0.1, 0.0), (0.3, 0.1), (1.0, 9.0)):
        run = {"recipe": f"short,lr={rate:g}", "identity": {"recipe": {"batch_size": 32, "lr": rate}}}
        for seed, norm in product(range(3), (BN, L2BN)):
            write_run(tmp_path, norm=norm, seed=seed, accuracy=80.0 + gain * (norm == L2BN), **run)
    (study,) = studies_of(read_evidence(tmp_path, grouping=BY_RATE))
    assert overall(study).result.mean == pytest.approx(9.1 / 3)
    assert overall(study).median == pytest.approx(0.1)


def test_two_values_of_eps_are_told_apart(tmp_path: Path) -> None:
    for eps in (1e-5, 1.2e-5, 2.5e-5):
        for norm in (BN, L2BN):
            identity = {"norm": {"eps": eps}, "recipe": STUDIED}
            write_run(tmp_path, norm=f"{norm},eps={eps:g}", identity=identity, epochs=5)
    (study,) = studies_of(read_evidence(tmp_path, features=True, grouping=BY_EPS))
    assert [row[0] for row in eps_table(study).rows] == ["1e-05", "1.2e-05", "2.5e-05"]


def write_trap(root: Path, norm: str, lags: Sequence[int]) -> None:
    for seed, lag in enumerate(lags):
        record = write_run(root, norm=norm, seed=seed)
        batch = {"batch/loss": 1.0, "batch/top1": 90.5}
        rows = [
            {"step": step, "running/loss": None, "running/top1": 10.0 if step < lag else 90.0, **batch}
            for step in range(10, 310, 10)
        ]
        write_lines(record.folder / STATISTICS, rows)


def test_the_trap_table_says_when_running_statistics_have_caught_up(tmp_path: Path) -> None:
    write_trap(tmp_path, BN, (10, 10, 10))
    write_trap(tmp_path, L2BN, (120, 140, 1000))
    (study,) = studies_of(read_evidence(tmp_path, statistics=True))
    rows = trap_table(study).rows
    assert [row[:2] for row in rows] == [
        *(("bn", "running"), ("bn", "batch"), ("l2bn", "running"), ("l2bn", "batch")),
    ]
    assert rows[0][-2:] == ("10", "3")
    record = write_run(tmp_path, norm=BN, seed=3, status="diverged")
    write_lines(record.folder / STATISTICS, read_statistics(write_run(tmp_path, norm=BN, seed=0).folder)[:3])
    (study,) = studies_of(read_evidence(tmp_path, statistics=True))
    assert trap_table(study).rows[0] == (*rows[0][:-1], "3; 1 diverged")
    assert rows[2][-2:] == ("120 to 140, 1 never", "3")
    assert rows[2][2:8] == ("10.00", "10.00", "10.00", "63.33", "63.33", "63.33")
    write_run(tmp_path, norm=RMS, status="diverged")
    (study,) = studies_of(read_evidence(tmp_path, statistics=True))
    lost = trap_table(study).rows[4:]
    assert lost == [(RMS, kind, *["–"] * 6, "", "0; 1 diverged") for kind in ("running", "batch")]
    with drawing():
        assert len(accuracy_over_updates(study).axes) == 2


def test_a_trap_study_of_another_norm_has_its_figure(tmp_path: Path) -> None:
    write_trap(tmp_path, DETACHED, (10, 20))
    (study,) = studies_of(read_evidence(tmp_path, statistics=True))
    with drawing():
        (panel,) = accuracy_over_updates(study).axes
    assert panel.get_title(loc="left") == DETACHED


def test_the_legend_of_the_rates_names_both_norms_though_one_has_diverged_in_the_first_panel(
    tmp_path: Path,
) -> None:
    for batch, status in ((8, "diverged"), (256, "finished")):
        identity = {"recipe": {"batch_size": batch, "lr": 0.1}}
        recipe = f"short,batch_size={batch}"
        write_run(tmp_path, recipe=recipe, norm=BN, status=status, identity=identity)
        write_run(tmp_path, recipe=recipe, norm=L2BN, identity=identity)
    (study,) = studies_of(read_evidence(tmp_path, grouping=BY_RATE))
    first, second = accuracy_over_rates(study).axes
    assert first.get_legend() is None
    assert [text.get_text() for text in second.get_legend().get_texts()] == [
        "BN  (n = 0 to 1)",
        "L2BN  (n = 1)",
    ]


# ---- The document -------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, root: Path) -> tuple[Path, Path]:
    studies = tmp_path / "studies"
    write_eps_study(studies / EPS)
    write_rate_study(studies / RATES)
    write_trap(studies / TRAP, L2BN, (120, 140))
    return root, studies


def test_the_document_has_all_sections_and_its_figures_exist(folders: tuple[Path, Path], tmp_path: Path) -> None:
    mechanism = read_mechanism(*folders)
    text = mechanism_documents(mechanism, "")["mechanism.md"]
    for title in ("Features of BN and L2BN", "Controls", "How much is eps?", "The running-variance trap"):
        assert f"\n## {title}\n" in text
    paths, problems = write_mechanism_figures(mechanism, tmp_path / "figures")
    assert problems == []
    names = {path.name for path in paths}
    linked = {part.split(")")[0] for part in text.split("](figures/")[1:]}
    assert linked == {name for name in names if name.endswith(".png")}
    assert len(linked) == 6


def test_the_reading_is_labelled_with_the_records_it_was_written_from(folders: tuple[Path, Path]) -> None:
    mechanism = read_mechanism(*folders)
    own = f"<!-- written from the records of digest {mechanism.digest} -->\n\nIt is so.\n"
    assert "which are these" in mechanism_documents(mechanism, own)["mechanism.md"]
    write_run(folders[1] / RATES, seed=9, identity={"recipe": {"batch_size": 8, "lr": 1.0}})
    later = read_mechanism(*folders)
    assert later.digest != mechanism.digest
    text = mechanism_documents(later, own)["mechanism.md"]
    assert f"**not these** (`{later.digest}`)" in text
    assert "It is so." in text
    assert "## Reading" not in mechanism_documents(later, "")["mechanism.md"]


def test_the_overview_has_a_row_for_each_cell(folders: tuple[Path, Path]) -> None:
    text = mechanism_documents(read_mechanism(*folders), "")["mechanism.md"].partition("## Overview")[2]
    row = "| 0.400 ± 0.000 (3) | 0.200 ± 0.000 (3; 1 diverged) | −0.0300 | [−0.0548, −0.0052] | +2.00 |"
    assert f"{row} [−2.97, +6.97] | 3 |" in text.partition("##")[0]


def test_runs_without_features_have_their_accuracy_beside_those_with(root: Path) -> None:
    for seed in range(3):
        write_run(root, norm="l2bn_rms", seed=seed, accuracy=91.0 + seed)
    text = mechanism_documents(read_mechanism(root, None), "")["mechanism.md"]
    assert "| l2bn_rms | 92.00 ± 1.00 (3) | +1.00 |" in text
    assert "| l2bn_rms | – | – |" in text


def test_without_records_there_is_a_document_and_no_section(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    mechanism = read_mechanism(tmp_path / "records", tmp_path / "studies")
    assert "##" not in mechanism_documents(mechanism, "")["mechanism.md"]
    assert write_mechanism_figures(mechanism, tmp_path / "figures") == ([], [])


def test_the_committed_documents_are_what_the_records_give() -> None:
    """`make tables` brings them up to date."""
    reading = ROOT / "results/reference/mechanism.md"
    mechanism = read_mechanism(ROOT / "results/records", ROOT / "results/studies")
    text = reading.read_text(encoding="utf-8") if reading.exists() else ""
    for name, content in mechanism_documents(mechanism, text).items():
        assert (ROOT / "results" / name).read_text(encoding="utf-8") == content, name


def rounds_to(found: str, written: str) -> bool:
    """Of a tie, which an earlier rounding may have made, either neighbour will do."""
    modes = (ROUND_HALF_UP, ROUND_HALF_DOWN)
    return Decimal(written) in {Decimal(found).quantize(Decimal(written), rounding=mode) for mode in modes}


def test_each_interval_of_the_reading_is_one_of_the_results() -> None:
    results = ROOT / "results"
    bounds = re.compile(r"\[([+-][\d.]+),\s([+-][\d.]+)\]")
    reading, claims, mechanism = (
        (results / name).read_text(encoding="utf-8").replace("−", "-")
        for name in ("reference/mechanism.md", "claims.md", "mechanism.md")
    )
    found = bounds.findall(claims + mechanism.partition("## Overview")[2])
    for path in [*results.glob("mechanism/*.csv"), *results.glob("tables/*.csv")]:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        found += [(row["low"], row["high"]) for row in rows if row.get("low")]
    trained = [
        json.loads((results / f"benchmarks/amx/accuracy_{norm}.json").read_text())["runs"] for norm in (BN, L2BN)
    ]
    values = [{run["seed"]: run["accuracy"] for run in runs if run["path"] in ("ours", L2BN)} for runs in trained]
    of_benchmark = estimate(paired_differences(*values))
    found.append((str(of_benchmark.low), str(of_benchmark.high)))
    written = bounds.findall(reading)
    assert len(written) > 40
    for low, high in written:
        same = any(rounds_to(a, low) and rounds_to(b, high) for a, b in found)
        assert same, f"[{low}, {high}] is no interval of the results"


def test_long_names_are_cut_and_stay_apart(tmp_path: Path) -> None:
    """A name of a folder may have 200 bytes, the cell of a figure has three of them."""
    for end in "ab":
        backbone, recipe = f"resnet20,{'é' * 80}", f"short,{'x' * 180}{end}"
        for norm in (BN, L2BN):
            write_features(write_run(tmp_path / "runs", norm=norm, backbone=backbone, recipe=recipe))
    mechanism = read_mechanism(tmp_path / "runs", None)
    paths, _ = write_mechanism_figures(mechanism, tmp_path / "figures")
    assert len(set(paths)) == 4
    text = mechanism_documents(mechanism, "")["mechanism.md"]
    assert all(f"(figures/{path.name})" in text for path in paths if path.suffix == ".png")


def test_the_script_writes_all_of_it(folders: tuple[Path, Path], tmp_path: Path, issue: Issue) -> None:
    out = tmp_path / "out"
    printed = issue("report", "mechanism", "--runs", folders[0], "--studies", folders[1], "--out", out).out
    for name in ("mechanism.md", "mechanism/features.csv", "mechanism/studies.csv"):
        assert str(out / name) in printed
        assert (out / name).exists()
    assert len(list((out / "figures").glob("*.svg"))) == 6


def test_a_document_of_own_runs_holds_none_of_the_published_studies(tmp_path: Path, issue: Issue) -> None:
    write_run(tmp_path / "runs")  # without measured features, which the document is about
    command = ("report", "mechanism", "tables", "--runs", tmp_path / "runs")
    assert issue(*command).code == 0
    text = (tmp_path / "runs/mechanism/mechanism.md").read_text()
    assert "From 0 records " in text
    assert "##" not in text
    done = issue(*command, "--studies", tmp_path)
    assert done.code == 1
    assert f"{tmp_path} holds no records of studies, in eps_study, lr_study, variance_trap" in done.err
