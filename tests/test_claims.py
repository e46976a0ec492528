"""The verdicts: each follows from its numbers by the stated rule, and none stands without them."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT, Issue
from l2bn.errors import UserError
from l2bn.records import ENVIRONMENT, read_features
from l2bn.reporting.claims import (
    ACCURATE,
    CLAIMS,
    COMPACT,
    EQUAL_NORMS,
    THESE_NETWORKS,
    SetFinding,
    claims_markdown,
    judge_set,
)
from l2bn.reporting.comparison import Comparison, arms_of
from l2bn.reporting.evidence import (
    ANGLE_MEAN,
    BN,
    L2BN,
    MEAN_NORM,
    TOP1,
    WITHIN_SHARE,
    Evidence,
    read_evidence,
    seeds_on_unlike_devices,
)
from l2bn.reporting.readme import BEGIN, END, readme_with_block
from l2bn.reporting.reference import RunSet, read_sets
from l2bn.reporting.statistics import fixed_estimate
from synthetic_records import write_features, write_folds, write_pairs, write_run

SETS = read_sets(ROOT / "results/reference/sets.yaml")
VERDICTS = {"supported", "contradicted", "not decided at this n", "not measured"}


def verdict(root: Path, number: int) -> tuple[str, str]:
    """Verdict and evidence of a claim for the records under a folder."""
    (claim,) = (claim for claim in CLAIMS if claim.number == number)
    finding = claim.judge(arms_of(read_evidence(root, features=True)))
    return finding.verdict, finding.evidence


def write_grid(root: Path, shifts: list[float], *, seeds: int = 3, epochs: int = 200) -> None:
    """A backbone for each shift, L2BN better than BN by about that much."""
    for backbone, shift in enumerate(shifts):
        differences = [shift + 0.1 * (seed - (seeds - 1) / 2) for seed in range(seeds)]
        write_pairs(root, [90.0] * seeds, differences, backbone=f"net{backbone}", epochs=epochs)


def test_all_six_claims_are_judged_and_their_rules_stated(tmp_path: Path) -> None:
    write_grid(tmp_path, [0.2, 0.3, 0.4])
    text = claims_markdown(read_evidence(tmp_path), SETS)
    rows = re.findall(r"^\| (\d) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == list("123456")
    for number, _, found, these, evidence in rows:
        assert found in VERDICTS
        assert (these == "–") is (number in "46")
        assert re.search(r"\d", evidence), f"claim {number} is judged without a number"
    for claim in CLAIMS:
        assert f"\n{claim.number}. {claim.rule}\n".replace("_", r"\_") in text
    assert f"\n{THESE_NETWORKS}\n" in text


@pytest.mark.parametrize("number", range(1, 7))
def test_without_records_nothing_is_measured(tmp_path: Path, number: int) -> None:
    found, evidence = verdict(tmp_path, number)
    assert found == "not measured"
    assert "0" in evidence


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_accuracies_do_not_speak_about_features_or_sound(tmp_path: Path, number: int) -> None:
    write_grid(tmp_path, [0.2, 0.3, 0.4])
    assert verdict(tmp_path, number)[0] == "not measured"


def test_equal_parameter_counts_support_claim_4(tmp_path: Path) -> None:
    write_grid(tmp_path, [0.2, 0.3])
    found, evidence = verdict(tmp_path, 4)
    assert found == "supported"
    assert "2 of 2 cells (2 backbones)" in evidence
    write_run(tmp_path, backbone="net2", norm="bn", parameters=100)
    write_run(tmp_path, backbone="net2", norm="l2bn", parameters=101)
    found, evidence = verdict(tmp_path, 4)
    assert found == "contradicted"
    assert "2 of 3 cells" in evidence
    assert "net2" in evidence


@pytest.mark.parametrize(
    ("shifts", "options", "expected"),
    [
        ([0.2, 0.3, 0.4], {}, "supported"),
        ([-0.2, -0.3, -0.4], {}, "contradicted"),
        ([-0.2, 0.1, 0.4], {}, "not decided at this n"),
        ([0.2, 0.3], {}, "not decided at this n"),
        ([0.2, 0.3, 0.4], {"seeds": 2}, "not decided at this n"),
        ([0.2, 0.3, 0.4], {"epochs": 5}, "not decided at this n"),
    ],
    ids=str,
)
def test_the_pooled_interval_decides_claim_5(
    tmp_path: Path, shifts: list[float], options: dict[str, int], expected: str
) -> None:
    write_grid(tmp_path, shifts, **options)
    assert verdict(tmp_path, 5)[0] == expected


def test_evidence_of_claim_5_holds_its_numbers(tmp_path: Path) -> None:
    write_grid(tmp_path, [0.2, 0.3, 0.4])
    write_pairs(tmp_path, [70.0], [2.0], recipe="short", epochs=5, label="CIFAR-10 (JPEG)")
    _, evidence = verdict(tmp_path, 5)
    assert "3 of 4 cells" in evidence
    assert "+0.30 points, 95 % interval [+0.05, +0.55]" in evidence
    (claim,) = (claim for claim in CLAIMS if claim.number == 5)
    details = claim.judge(arms_of(read_evidence(tmp_path))).details
    assert len(details) == 4
    assert sum("not counted" in line for line in details) == 1
    last = "CIFAR-10 (JPEG), resnet20, short, float32, 5 epochs: +2.00 points, n too small, n = 1; not counted"
    assert details[-1] == last
    assert f"- {last}\n" in claims_markdown(read_evidence(tmp_path), SETS)


def test_many_data_sets_are_not_various_models(tmp_path: Path) -> None:
    for dataset, shift in (("a", 0.2), ("b", 0.3), ("c", 0.4)):
        write_pairs(tmp_path, [90.0] * 3, [shift, shift + 0.1, shift - 0.1], dataset=dataset)
    assert verdict(tmp_path, 5)[0] == "not decided at this n"


def test_options_of_a_network_make_no_other_network(tmp_path: Path) -> None:
    for number, shift in enumerate((0.2, 0.3, 0.4)):
        backbone = f"resnet20,dropout=0.{number}"
        write_pairs(tmp_path, [90.0] * 3, [shift, shift + 0.1, shift - 0.1], backbone=backbone)
    found, evidence = verdict(tmp_path, 5)
    assert found == "not decided at this n"
    assert "(1 combination of data set and backbone, 1 backbone of at least 3, all on CIFAR-10). Pooled" in evidence
    assert "points, no interval: " in evidence


TUNED = "CIFAR-10, validation 0.1, 2 of 10 classes untested, 1,000 of 5,000 test images known from training"


def test_runs_to_tune_by_are_no_further_data_sets(tmp_path: Path) -> None:
    """Images held out for validation, or another augmentation, are those of the same data set."""
    write_grid(tmp_path, [-0.2, -0.5, -0.9])
    assert verdict(tmp_path, 5)[0] == "not decided at this n"
    for backbone, shift in enumerate((-0.2, -0.5, -0.9)):
        for change, label in (("validation=0.1", TUNED), ("augmentation=null", "CIFAR-10")):
            options = {"dataset": f"cifar10,{change}", "label": label, "backbone": f"net{backbone}"}
            write_pairs(tmp_path, [90.0] * 3, [shift, shift + 0.1, shift - 0.1], **options)
    found, evidence = verdict(tmp_path, 5)
    assert found == "not decided at this n"
    assert "9 of 9 cells count for other networks (3 combinations of data set and backbone" in evidence


def test_where_every_run_of_l2bn_diverged_that_is_said(tmp_path: Path) -> None:
    for backbone, seed in product(("a", "b", "c"), range(3)):
        write_run(tmp_path, backbone=backbone, norm="bn", seed=seed)
        write_run(tmp_path, backbone=backbone, norm="l2bn", seed=seed, status="diverged")
    found, evidence = verdict(tmp_path, 5)
    assert found == "not decided at this n"
    assert "0 of BN, 9 of L2BN" in evidence


def test_models_lost_to_divergence_forbid_support(tmp_path: Path) -> None:
    write_grid(tmp_path, [0.2, 0.3, 0.4])
    write_run(tmp_path, backbone="net9", norm="l2bn", status="diverged")
    found, evidence = verdict(tmp_path, 5)
    assert found == "supported", "a run of one norm alone is no comparison"
    assert "0 of BN, 0 of L2BN" in evidence
    write_run(tmp_path, backbone="net9", norm="bn")
    found, evidence = verdict(tmp_path, 5)
    assert found == "not decided at this n"
    assert "0 of BN, 1 of L2BN" in evidence


def write_claims(
    root: Path, change: float, *, seeds: int = 3, epochs: int = 200, nets: int = 3, measure: str = "share"
) -> None:
    """BN and the control at 0.2 and 60°, L2BN differing by about `change` in one of the two."""
    for net in range(nets):
        cell: dict[str, Any] = {"backbone": f"net{net}", "epochs": epochs}
        steps = [change * (1 + 0.1 * net + 0.05 * seed) for seed in range(seeds)]
        shares = [0.2 + step if measure == "share" else 0.2 for step in steps]
        angles = [60.0 + step if measure == "angle" else 60.0 for step in steps]
        for seed, (share, angle) in enumerate(zip(shares, angles, strict=True)):
            write_features(write_run(root, norm="l2bn", seed=seed, **cell), within_share=share, angle=angle)
            for norm in ("bn", "l2bn_mean_norm"):
                write_features(write_run(root, norm=norm, seed=seed, **cell))


@pytest.mark.parametrize(
    ("number", "measure", "change", "options", "expected"),
    [
        (1, "share", -0.02, {}, "supported"),
        (1, "share", 0.02, {}, "contradicted"),
        (2, "share", -0.02, {}, "supported"),
        (2, "share", 0.02, {}, "contradicted"),
        (3, "angle", 2.0, {}, "supported"),
        (3, "angle", -2.0, {}, "contradicted"),
        (2, "share", -0.02, {"nets": 2}, "not decided at this n"),
        (2, "share", -0.02, {"seeds": 2}, "not decided at this n"),
        (2, "share", -0.02, {"epochs": 5}, "not decided at this n"),
        (3, "share", -0.02, {}, "not decided at this n"),
    ],
    ids=str,
)
def test_the_pooled_interval_of_the_primary_measure_decides(
    number: int, measure: str, change: float, options: dict[str, int], expected: str, tmp_path: Path
) -> None:
    write_claims(tmp_path, change, measure=measure, **options)
    found, evidence = verdict(tmp_path, number)
    assert found == expected
    assert ("L2BN − l2bn_mean_norm" if number == 1 else "L2BN − BN") in evidence
    assert f"of {options.get('nets', 3)} cells count" in evidence


def test_without_the_control_the_cause_is_not_measured(tmp_path: Path) -> None:
    for (norm, share), seed in product((("bn", 0.2), ("l2bn", 0.1)), range(2)):
        write_features(write_run(tmp_path, norm=norm, seed=seed), within_share=share)
    assert verdict(tmp_path, 1)[0] == "not measured"
    assert verdict(tmp_path, 2)[0] == "not decided at this n"
    assert "−0.1000, n too small, n = 2" in claims_markdown(read_evidence(tmp_path, features=True), SETS)


# ---- The rule for these networks ---------------------------------------------------------------------------

SET = RunSet(
    "a set",
    *("cifar10", "cosine_30", "32-true", ("net0", "net1", "net2"), (0, 1, 2)),
    more_seeds=(3, 4),
    control=("l2bn_mean_norm", ("net0", "net1")),
)
RUNS = {"recipe": "cosine_30", "epochs": 30}
SMALL = (0.5, 0.6, 0.4)


def write_set(root: Path, *differences: tuple[float, ...]) -> None:
    """A backbone of the set for each tuple, with these paired differences at seeds 0, 1, ..."""
    for net, values in enumerate(differences):
        write_pairs(root, [70.0 + seed for seed in range(len(values))], values, backbone=f"net{net}", **RUNS)


def of_accuracy(root: Path) -> SetFinding:
    return judge_set(ACCURATE, SET, arms_of(read_evidence(root)))


def test_a_set_may_have_a_backbone_in_a_setting_of_its_own(tmp_path: Path) -> None:
    write_set(tmp_path, SMALL, SMALL)
    write_pairs(tmp_path, [70.0] * 3, SMALL, backbone="net2", precision="tf32-mixed", **RUNS)
    mixed = replace(SET, settings={"net2": "tf32-mixed"})
    found = judge_set(ACCURATE, mixed, arms_of(read_evidence(tmp_path)))
    assert (found.ended, found.verdict) == (18, "supported")
    told = "12 of 18 runs; net2 has runs in tf32-mixed, not in 32-true"
    assert of_accuracy(tmp_path).text == f"not decided, {told}"
    other_seeds = judge_set(ACCURATE, replace(mixed, seeds=(3, 4), more_seeds=()), arms_of(read_evidence(tmp_path)))
    assert other_seeds.text == "not decided, 0 of 12 runs"


def minus(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(-value for value in values)


def write_sound(root: Path, dataset: str, *differences: tuple[float, ...]) -> None:
    """Pairs of BN and L2BN on a data set of sound, a backbone for each tuple of differences."""
    for net, values in enumerate(differences):
        options = {"dataset": dataset, "label": dataset.upper(), "recipe": "restarts_126", "epochs": 126}
        write_pairs(root, [70.0] * len(values), values, backbone=f"net{net}", **options)


def test_acoustic_scenes_decide_claim_6_by_the_rule_of_claim_5(tmp_path: Path) -> None:
    write_sound(tmp_path, "tau2020", SMALL, SMALL)
    assert verdict(tmp_path, 6)[0] == "not decided at this n"
    write_sound(tmp_path, "tau2020", SMALL, SMALL, (0.6, 0.7, 0.5))
    found, evidence = verdict(tmp_path, 6)
    assert found == "supported"
    assert "3 of 3 cells" in evidence
    assert verdict(tmp_path, 5)[0] == "not measured"


def test_environmental_sound_is_shown_beside_claim_6_and_decides_nothing(tmp_path: Path) -> None:
    write_sound(tmp_path, "esc50", SMALL, SMALL, SMALL, SMALL)
    write_sound(tmp_path, "sound_folder", SMALL, SMALL, SMALL, SMALL)
    found, evidence = verdict(tmp_path, 6)
    assert found == "not measured"
    assert "0 cells of acoustic scenes" in evidence
    beside = "ESC50, restarts_126, float32, 126 epochs: net0 +0.50 points, 95 % interval [+0.25, +0.75], n = 3"
    assert f"Environmental sound, which is no evidence on scenes, L2BN − BN: {beside}" in evidence
    assert "SOUND_FOLDER" not in evidence
    assert verdict(tmp_path, 5)[0] == "not measured"


def test_environmental_sound_beside_claim_6_says_why_it_has_no_interval(tmp_path: Path) -> None:
    write_sound(tmp_path, "esc50", (0.5,))
    evidence = verdict(tmp_path, 6)[1]
    assert "126 epochs: net0 +0.50 points, no interval: n too small, n = 1." in evidence


def test_folds_stand_beside_claim_6_by_their_mean(tmp_path: Path) -> None:
    write_folds(tmp_path, {1: SMALL, 2: (1.5,), 3: (-0.5,)})
    evidence = verdict(tmp_path, 6)[1]
    mean = (SMALL[0] + 1.5 - 0.5) / 3
    assert evidence.endswith(
        "; ESC-50, restarts_126, float32, 126 epochs, mean over folds 1, 2, 3 (seed 0, no interval): "
        f"resnet20 +{mean:.2f} points."
    )
    assert evidence.count("ESC-50, fold") == 1
    assert "in 1 of 1 cell " in verdict(tmp_path, 4)[1]


def test_networks_with_the_same_folds_share_a_line_beside_claim_6(tmp_path: Path) -> None:
    write_folds(tmp_path, {1: (2.0,), 2: (1.0,)}, backbone="net0")
    write_folds(tmp_path, {1: (-1.0,), 2: (0.5,)}, backbone="net1")
    write_folds(tmp_path, {1: (0.5,), 2: (0.5,), 3: (0.5,)}, backbone="net2")
    evidence = verdict(tmp_path, 6)[1]
    assert "mean over folds 1, 2 (seed 0, no interval): net0 +1.50 points; net1 −0.25 points" in evidence
    assert "mean over folds 1, 2, 3 (seed 0, no interval): net2 +0.50 points" in evidence
    assert evidence.count("mean over folds") == 2


def test_runs_of_environmental_sound_that_diverged_are_counted_beside_claim_6(tmp_path: Path) -> None:
    write_sound(tmp_path, "esc50", SMALL)
    assert "diverged" not in verdict(tmp_path, 6)[1]
    write_run(tmp_path, dataset="esc50", norm="bn", backbone="net1", recipe="restarts_126")
    write_run(tmp_path, dataset="esc50", norm="l2bn", backbone="net1", recipe="restarts_126", status="diverged")
    assert verdict(tmp_path, 6)[1].endswith("whose seed both have: 0 of BN, 1 of L2BN.")


def test_sound_is_not_pooled_with_images(tmp_path: Path) -> None:
    write_grid(tmp_path, [0.2, 0.3, 0.4])
    before = verdict(tmp_path, 5)
    write_sound(tmp_path, "esc50", minus(SMALL), minus(SMALL))
    write_sound(tmp_path, "tau2020", minus(SMALL))
    assert verdict(tmp_path, 5) == before


def test_sound_by_a_file_of_the_users_own_is_no_image(tmp_path: Path) -> None:
    identity = {"dataset": {"_target_": "l2bn.data.sound.sound_folder"}}
    for net in range(3):
        write_pairs(tmp_path, [70.0] * 3, SMALL, dataset="urban8k", backbone=f"net{net}", identity=identity)
    assert verdict(tmp_path, 5)[0] == "not measured"


def test_a_set_of_sound_by_a_file_of_the_users_own_has_no_verdict_on_images(tmp_path: Path) -> None:
    identity = {"dataset": {"_target_": "l2bn.data.sound.sound_folder"}}
    for net in range(3):
        write_pairs(tmp_path, [70.0] * 3, SMALL, dataset="urban8k", backbone=f"net{net}", identity=identity, **RUNS)
    found = judge_set(ACCURATE, replace(SET, dataset="urban8k"), arms_of(read_evidence(tmp_path)))
    assert found.text == "not decided, 0 of 18 runs"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_features_of_sound_are_not_pooled_with_those_of_images(number: int, tmp_path: Path) -> None:
    def write(dataset: str, net: int, better: float) -> None:
        for norm, seed in product(("bn", "l2bn", "l2bn_mean_norm"), range(3)):
            record = write_run(tmp_path, dataset=dataset, backbone=f"net{net}", norm=norm, seed=seed)
            step = better * (1 + 0.1 * seed + 0.1 * net) if norm == "l2bn" else 0.0
            write_features(record, within_share=0.3 - step, angle=60 + step)

    write("esc50", 0, -0.1)
    assert verdict(tmp_path, number)[0] == "not measured"
    for net in range(3):
        write("cifar10", net, 0.01)
    found = verdict(tmp_path, number)
    assert found[0] == "supported"
    assert (
        "3 of 3 cells count for other networks (3 combinations of data set and backbone, 3 backbones, all on"
        in found[1]
    )
    for net in range(3):
        write("tau2020", net, -0.1)
    assert verdict(tmp_path, number) == found


@pytest.mark.parametrize(
    ("differences", "expected", "text"),
    [
        (
            (SMALL, SMALL, SMALL),
            "supported",
            "+0.50 [+0.42, +0.58], 3 of 3 networks above 0, 3 significantly (net0, net1, net2)",
        ),
        (
            (minus(SMALL), minus(SMALL), minus(SMALL)),
            *("contradicted", "−0.50 [−0.58, −0.42], 3 of 3 networks below 0, 3 significantly (net0, net1, net2)"),
        ),
        (((0.5, -0.6, 0.1), SMALL, minus(SMALL)), "not decided", "0.00 [−0.27, +0.27]"),
        (
            ((9.0, 9.1, 8.9), SMALL, minus(SMALL)),
            "not decided",
            "+3.00 [+2.92, +3.08], 2 of 3 networks above 0, 2 significantly (net0, net1) "
            "(significant on the other side: net2)",
        ),
        (
            (minus((9.0, 9.1, 8.9)), SMALL, SMALL),
            "not decided",
            "−2.67 [−2.75, −2.59], 1 of 3 networks below 0, 1 significantly (net0) "
            "(significant on the other side: net1, net2)",
        ),
        (  # a cell that is not significant may lie there
            ((9.0, 9.1, 8.9), SMALL, (-0.01, 0.1, -0.1)),
            *("supported", "+3.17 [+3.08, +3.25], 2 of 3 networks above 0, 2 significantly (net0, net1)"),
        ),
        (((0.5, 0.5, 0.5),) * 3, "not decided", "+0.50 no spread"),
    ],
    ids=str,
)
def test_the_interval_and_every_cell_of_the_set_decide(
    differences: tuple[tuple[float, ...], ...], expected: str, text: str, tmp_path: Path
) -> None:
    write_set(tmp_path, *differences)
    finding = of_accuracy(tmp_path)
    assert (finding.verdict, finding.text) == (expected, f"{expected}, 9 pairs: {text}")


@pytest.mark.parametrize("gain", [1, -1])
@pytest.mark.parametrize("diverged", ["bn", "l2bn"])
def test_divergence_counts_for_accuracy_and_is_not_replaced(gain: int, diverged: str, tmp_path: Path) -> None:
    """A lost run of L2BN forbids support, one of BN forbids contradiction; a fourth seed changes neither."""
    write_set(tmp_path, *[SMALL if gain > 0 else minus(SMALL)] * 3)
    write_run(tmp_path, norm=diverged, backbone="net0", seed=2, status="diverged", **RUNS)
    for norm in ("bn", "l2bn"):
        write_run(tmp_path, norm=norm, backbone="net0", seed=5, **RUNS)
    finding = of_accuracy(tmp_path)
    assert (finding.ended, [one.n for one in finding.estimates]) == (18, [2, 3, 3])
    assert finding.diverged == ((1, 0) if diverged == "bn" else (0, 1))
    side = "supported" if gain > 0 else "contradicted"
    lost = (gain > 0) is (diverged == "l2bn")
    assert finding.verdict == ("not decided" if lost else side)
    assert (
        finding.text.endswith(f"diverged: {int(diverged == 'l2bn')} of L2BN, {int(diverged == 'bn')} of BN)")
        is lost
    )


def test_a_cell_without_any_pair_leaves_the_set_undecided(tmp_path: Path) -> None:
    write_set(tmp_path, SMALL, SMALL, SMALL)
    for seed in range(3):
        write_run(tmp_path, backbone="net2", seed=seed, status="diverged", **RUNS)
    assert (
        of_accuracy(tmp_path).text
        == "not decided, 6 pairs: – a cell has no pair, significantly above 0: net0, net1"
    )
    assert of_accuracy(tmp_path).estimates[2].n == 0
    text = claims_markdown(read_evidence(tmp_path), [SET])
    assert "| net2 | – | – | – | – | 0 |" in text
    assert "| all, each weighing alike | – | a cell has no pair | a cell has no pair | – | 6 |" in text


@pytest.mark.parametrize(
    "missing",
    [
        {"backbone": "net9"},
        {"recipe": "cosine_200"},
        {"precision": "bf16-mixed"},
        {"dataset": "digits"},
        {"seed": 9},
    ],
    ids=str,
)
def test_a_set_waits_for_each_of_its_runs_and_takes_no_other(missing: dict[str, Any], tmp_path: Path) -> None:
    assert of_accuracy(tmp_path).text == "not decided, 0 of 18 runs"
    write_set(tmp_path, SMALL, SMALL, SMALL[:2])
    write_run(tmp_path, norm="bn", backbone="net2", seed=2, **RUNS)
    write_run(tmp_path, **{"norm": "l2bn", "backbone": "net2", "seed": 2, **RUNS, **missing})
    assert of_accuracy(tmp_path).text == "not decided, 17 of 18 runs"
    assert "### Claim" not in claims_markdown(read_evidence(tmp_path), [SET])


def test_later_seeds_give_a_second_estimate_beside_the_first(tmp_path: Path) -> None:
    write_set(tmp_path, SMALL, SMALL, SMALL)
    first = of_accuracy(tmp_path)
    assert "Second estimate" not in claims_markdown(read_evidence(tmp_path), [SET])
    write_set(tmp_path, *[(*SMALL, -3.0, -3.1)] * 2)
    text = claims_markdown(read_evidence(tmp_path), [SET])
    assert "With seeds 3, 4: 26 of 30 runs, no second estimate yet." in text
    write_set(tmp_path, *[(*SMALL, -3.0, -3.1)] * 3)
    text = claims_markdown(read_evidence(tmp_path), [SET])
    assert of_accuracy(tmp_path).overall == first.overall
    assert "| 5 | L2BN improves the accuracy of various models on image classification. | not decided" in text
    networks = "3 of 3 networks above 0, 3 significantly (net0, net1, net2)"
    assert f"| a set: supported, 9 pairs: +0.50 [+0.42, +0.58], {networks} |" in text
    _, overall = fixed_estimate([[*SMALL, -3.0, -3.1]] * 3)
    shown = f"{overall.mean:+.2f} [{overall.low:+.2f}, {overall.high:+.2f}], 15 pairs".replace("-", "−")
    assert f"Second estimate, with seeds 3, 4, which does not replace the first: {shown}." in text


def test_claims_about_features_wait_for_features_and_claim_1_for_its_control(tmp_path: Path) -> None:
    write_set(tmp_path, SMALL, SMALL, SMALL)
    arms = arms_of(read_evidence(tmp_path, features=True))
    unmeasured = "18 ended without measured features (scripts/analyze.py)"
    assert judge_set(COMPACT, SET, arms).text == f"not decided, 0 of 18 runs; {unmeasured}"
    for record in read_evidence(tmp_path).records:
        better = 0.02 + 0.001 * record.seed if record.norm == "l2bn" else 0.0
        write_features(record, within_share=0.3 - better)
    arms = arms_of(read_evidence(tmp_path, features=True))
    assert judge_set(COMPACT, SET, arms).text.startswith("supported, 9 pairs: −0.0210 [")
    assert judge_set(EQUAL_NORMS, SET, arms).text == "not decided, 18 of 24 runs"
    for net, seed in product(range(2), range(3)):
        record = write_run(tmp_path, norm="l2bn_mean_norm", backbone=f"net{net}", seed=seed, **RUNS)
        write_features(record, within_share=0.1)
    finding = judge_set(EQUAL_NORMS, SET, arms_of(read_evidence(tmp_path, features=True)))
    assert finding.text.startswith("contradicted, 6 pairs: +0.1")
    assert [cell.backbone for cell in finding.cells] == ["net0", "net1"]


def test_a_network_whose_pairs_all_compare_a_cpu_with_a_gpu_is_named(tmp_path: Path) -> None:
    """There the device is not told from the norm."""

    def made_on(device: str, norm: str, net: str, *seeds: int) -> None:
        for seed in seeds:
            record = write_run(tmp_path, norm=norm, backbone=net, seed=seed, **RUNS)
            (record.folder / ENVIRONMENT).write_text(json.dumps({"starts": [{"device": device}]}))

    for net in SET.backbones:
        made_on("cpu", "bn", net, 0, 1, 2)
        made_on("NVIDIA H100", "l2bn", net, 0, 1, 2)
    made_on("cpu", "l2bn", "net2", 1)
    named = "8 of 9 pairs mix CPU and GPU, all of net0, net1"
    assert of_accuracy(tmp_path).text.endswith(named)
    text = readme_with_block(f"{BEGIN}\n{END}", read_evidence(tmp_path), SET)
    assert f"{named}, n = 9 pairs" in text
    made_on("cpu", "l2bn", "net0", 1)
    made_on("cpu", "l2bn", "net1", 1)
    assert of_accuracy(tmp_path).text.endswith("6 of 9 pairs mix CPU and GPU")
    for net in ("net0", "net1"):
        made_on("cpu", "l2bn", net, 0, 2)
    write_run(tmp_path, norm="bn", backbone="net2", seed=1, status="diverged", **RUNS)
    assert of_accuracy(tmp_path).text.endswith("2 of 8 pairs mix CPU and GPU, all of net2")
    made_on("cpu", "l2bn", "net2", 0, 2)
    assert "GPU" not in of_accuracy(tmp_path).text


def test_a_run_that_lies_there_twice_has_the_features_of_either(tmp_path: Path) -> None:
    """They may have been measured in a copy alone; the records are met in the order of their folders."""
    for name in ("a", "b"):
        for root, measured in (("first", name == "a"), ("second", name == "b")):
            for norm in ("bn", "l2bn"):
                record = write_run(tmp_path / name / root, norm=norm, backbone="net0", seed=0, **RUNS)
                if measured:
                    write_features(record, within_share=0.3)
        evidence = read_evidence(tmp_path / name, features=True)
        assert len(evidence.records) == len(evidence.features) == 2


cells = st.lists(
    st.lists(st.floats(-3, 3).map(lambda x: round(x, 2)), min_size=2, max_size=4), min_size=3, max_size=3
)


@given(cells, st.integers(0, 2), st.integers(0, 2))
def test_the_rule_is_its_own_mirror_image(values: list[list[float]], bn: int, l2bn: int) -> None:
    def judged(sign: int, diverged: tuple[int, int]) -> str:
        estimates, overall = fixed_estimate([[sign * value for value in cell] for cell in values])
        return SetFinding(ACCURATE, SET, 18, 18, estimates, overall, diverged).verdict

    mirror = {"supported": "contradicted", "contradicted": "supported", "not decided": "not decided"}
    assert judged(-1, (l2bn, bn)) == mirror[judged(1, (bn, l2bn))]


def test_the_table_of_a_set_shows_each_cells_own_deviation(tmp_path: Path) -> None:
    write_set(tmp_path, (0.0, 1.0, 2.0), (0.4, 0.5, 0.6), (1.0, 1.5, 2.0))
    text = claims_markdown(read_evidence(tmp_path), [SET])
    section = text.partition("### Claim 5 on a set")[2].partition("##")[0]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "net" in line]
    assert [row[4] for row in shown] == ["1.00", "0.10", "0.50"]
    # s = sqrt((1 + 0.01 + 0.25) / 3) = 0.648, t(6) = 2.447: in a cell 2.447 * 0.648 / sqrt(3), over all / sqrt(9).
    assert [row[2] for row in shown] == ["[+0.08, +1.92]", "[−0.42, +1.42]", "[+0.58, +2.42]"]
    assert "| all, each weighing alike | +1.00 | [+0.47, +1.53] | 0.004 | 0.65 | 9 |" in section
    assert "Diverged: 0 of BN, 0 of L2BN. Data: CIFAR-10." in section


def test_the_first_set_is_that_of_the_cpu_grid() -> None:
    """24 runs decide claims 2, 3 and 5, and the 9 of the control more claim 1."""
    params = yaml.safe_load((ROOT / "configs/experiment/cpu_grid.yaml").read_text())["hydra"]["sweeper"]["params"]
    first = SETS[0]
    assert (first.dataset, first.recipe) == (params["dataset"], params["recipe"])
    assert list(first.backbones) == params["backbone"].split(",")
    assert list(first.seeds) == [int(seed) for seed in params["seed"].split(",")]
    assert params["norm"] == "bn,l2bn"
    assert len({one.figures[0] for one in SETS}) == len(SETS)
    assert [judge_set(question, first, []).wanted for question in (ACCURATE, COMPACT, EQUAL_NORMS)] == [24, 24, 33]
    assert [judge_set(ACCURATE, one, []).wanted for one in SETS] == [24, 18, 24]
    for one in SETS:
        for group, names in (("dataset", [one.dataset]), ("recipe", [one.recipe]), ("backbone", one.backbones)):
            assert all((ROOT / f"configs/{group}/{name}.yaml").exists() for name in names)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sets: 1",
        "sets: []",
        "sets: [{label: x}]",
        "sets: [{label: x, dataset: d, recipe: r, seeds: [0], setting: 32-true, backbones: []}]",
        "sets: [{label: x, dataset: d, recipe: r, seeds: [0], setting: float32, backbones: [a]}]",
        "sets: [{label: x, dataset: esc50, recipe: r, seeds: [0], setting: 32-true, backbones: [a]}]",
        "sets: [{label: x, dataset: d, recipe: r, seeds: [0, 0], setting: 32-true, backbones: [a]}]",
        "sets:\n" + 2 * "- {label: x, dataset: d, recipe: r, seeds: [0], setting: 32-true, backbones: [a]}\n",
        *(
            f"sets: [{{label: x, dataset: d, recipe: r, seeds: [0], backbones: [a], setting: 32-true, {own}}}]"
            for own in (
                "settings: {z: 32-true}",
                "settings: {a: fp32}",
                "settings: [a]",
                "settings: {a: 32}",
                "more_seeds: [1, 1]",
                "more_seeds: [0, 1]",
                "control: {norm: l2bn_mean_norm, backbones: [z]}",
                "control: {norm: l2bn_detached, backbones: [a]}",
                "control: {norm: l2bn_mean_norm, backbones: a}",
                "more_seeds: '12'",
            )
        ),
    ],
)
def test_a_file_of_sets_with_a_mistake_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text(text)
    with pytest.raises(UserError, match=r"sets\.yaml cannot be used"):
        read_sets(tmp_path / "sets.yaml")


def test_the_committed_claims_are_what_the_records_give() -> None:
    """`make claims` brings them up to date."""
    folder = ROOT / "results/records"
    evidence = read_evidence(folder, features=True) if folder.is_dir() else Evidence([])
    assert (ROOT / "results/claims.md").read_text(encoding="utf-8") == claims_markdown(evidence, SETS)


def test_what_was_computed_afterwards_follows_from_the_records() -> None:
    """The table in results/README.md of estimates by the rule for these networks, which decide nothing."""
    text = (ROOT / "results/README.md").read_text(encoding="utf-8").replace("−", "-")
    rows = re.findall(
        r"^  \| ([a-z ]+) \| (\S+) - (\S+) \| ([^|]+) \| (\S+) \[(\S+), (\S+)\] \|$", text, re.MULTILINE
    )
    assert len(rows) >= 9
    evidence = read_evidence(ROOT / "results/records", features=True)
    cells = {SETS[0].cells(BN)[place]: name for place, name in enumerate(SETS[0].backbones)}
    known = {(cells[arm.cell], arm.norm): arm for arm in arms_of(evidence) if arm.cell in cells}
    quantities = {"within share": WITHIN_SHARE, "mean angle": ANGLE_MEAN, "accuracy": TOP1}
    norms = {"BN": BN, "L2BN": L2BN, "`l2bn_mean_norm`": MEAN_NORM}
    for quantity, norm, reference, networks, *numbers in rows:
        left_out = {"without VGG-11": {"vgg11"}, "without ShuffleNetV2": {"shufflenetv2_x0_5"}}.get(networks, set())
        pairs = [
            Comparison(known[name, norms[reference]], known[name, norms[norm]])
            for name in SETS[0].backbones
            if name not in left_out and (name, norms[norm]) in known and (name, norms[reference]) in known
        ]
        if networks == "pairs on one kind of device":
            mixed = [set(seeds_on_unlike_devices(pair.records)) for pair in pairs]
            pairs = [
                Comparison(*(arm.only(arm.seeds - seeds) for arm in pair.arms))
                for pair, seeds in zip(pairs, mixed, strict=True)
            ]
        _, found = fixed_estimate([pair.differences(quantities[quantity]) for pair in pairs])
        digits = len(numbers[0].partition(".")[2])
        assert numbers == [f"{value:+.{digits}f}" for value in (found.mean, found.low, found.high)]


def test_the_repeated_run_stands_beside_the_first_and_the_control() -> None:
    """The small table in results/README.md; the repeat has the configuration of the run that it repeats."""
    text, place = (ROOT / "results/README.md").read_text(), "shufflenetv2_x0_5/{}/cosine_30/seed0"
    rows = re.findall(r"^  \| (L2BN|`l2bn_mean_norm`), (?:H200|CPU) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    found = []
    for folder, norm in (("records", L2BN), ("studies/repeats", L2BN), ("records", MEAN_NORM)):
        (record,) = read_evidence(ROOT / "results" / folder / "cifar100_png" / place.format(norm)).records
        share = read_features(record.folder)[-1]["penultimate"]["within_share"]
        found.append((record.hash, f"{share:.4f}", f"{record.last['test/top1']:.2f}"))
    assert [row[1:] for row in rows] == [row[1:] for row in found]
    assert found[0][0] == found[1][0] != found[2][0]
    across, alike = (float(found[place][1]) - float(found[2][1]) for place in (0, 1))
    assert f"(by {alike:.4f}; across devices by {across:.4f})" in text


def test_a_set_of_ones_own_is_judged_by_the_same_rule(tmp_path: Path, issue: Issue) -> None:
    write_pairs(tmp_path / "runs", [50.0, 51.0, 52.0], [1.0, 1.1, 0.9], backbone="mine", recipe="short")
    names = "label: My | set, dataset: cifar10, recipe: short, setting: 32-true"
    (tmp_path / "sets.yaml").write_text(f"sets: [{{{names}, backbones: [mine], seeds: [0, 1, 2]}}]")
    printed = issue("report", "claims", "--runs", tmp_path / "runs", "--sets", tmp_path / "sets.yaml").out
    found = "supported, 3 pairs: +1.00 [+0.75, +1.25], 1 of 1 network above 0, 1 significantly (mine)"
    assert rf"| My \| set: {found} |" in printed
    entry = f"{names}, backbones: [mine], seeds: [0, 1, 2]"
    other = entry.replace("My | set", "Half").replace("32-true", "bf16-mixed")
    (tmp_path / "sets.yaml").write_text(f"sets: [{{{entry}}}, {{{other}}}]")
    printed = issue("report", "claims", "--runs", tmp_path / "runs", "--sets", tmp_path / "sets.yaml").out
    assert "| Half | – | not decided, 0 of 6 runs; mine has runs in 32-true, not in bf16-mixed | " in printed
