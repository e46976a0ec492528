"""Tables from records: what shares a row, what each number is, and that the committed ones are up to date."""

import codecs
import csv
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import pytest
import yaml
from matplotlib.text import Text
from rich.console import Console
from scipy import stats

from conftest import ROOT, Issue
from l2bn.errors import UserError
from l2bn.records import ENVIRONMENT, SUMMARY, natural_order
from l2bn.reporting.claims import CLAIMS, claims_markdown, estimate_for_others
from l2bn.reporting.comparison import (
    FULL_EPOCHS,
    arms_of,
    by_cell,
    grid,
    other_norms,
    pooled,
    without_further_folds,
)
from l2bn.reporting.evidence import BN, L2BN, Evidence, read_evidence
from l2bn.reporting.figures import curves, differences
from l2bn.reporting.formatting import Table, csv_text, in_words, interval, latex, markdown, probability
from l2bn.reporting.readme import BEGIN, END, readme_with_block
from l2bn.reporting.reference import Reference, RunSet, read_reference, read_sets
from l2bn.reporting.statistics import MIN_PAIRS, POWER, Estimate, pooled_spread, seeds_needed
from l2bn.reporting.tables import TARGET, documents
from l2bn.reporting.terminal import accuracy_overview
from synthetic_records import write_features, write_folds, write_pairs, write_run

SCRIPT = ROOT / "scripts/report.py"
REFERENCE = ROOT / "results/reference/baselines.yaml"
PUBLISHED = read_reference(REFERENCE)


def rows_of(root: Path, name: str = "grid.csv", reference: Reference = PUBLISHED) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(documents(read_evidence(root), reference)[name])))


def grid_of(root: Path, reference: Reference = PUBLISHED) -> str:
    return documents(read_evidence(root), reference)["grid.md"]


def in_terminal(root: Path) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(accuracy_overview(read_evidence(root)))
    return console.export_text()


def test_numbers_show_their_side_of_0_and_of_the_level() -> None:
    assert interval(Estimate(3, -0.02, 0.01, -0.0408, 0.000026), 4) == "[−0.0408, +0.00003]"
    assert interval(Estimate(3, 0.0, 0.01, -0.001, 0.0), 2) == "[−0.001, 0.00]"
    found = [probability(p, Estimate(3)) for p in (0.04996, 0.05, 0.0504, 0.0494, 0.0002)]
    assert found == ["<0.05", "0.050", "0.050", "0.049", "<0.001"]
    noise = fmean([70.29 - 69.3, 69.3 - 70.29, 70.1 - 70.1 - 3e-14])
    assert noise != 0
    assert csv_text([{"p": 1.2e-6, "d": noise}], ["p", "d"], ".6g") == "p,d\n1.2e-06,0\n"


# ---- What a number is ------------------------------------------------------------------------------------


def test_a_row_holds_the_numbers_of_its_records(tmp_path: Path) -> None:
    write_pairs(tmp_path, [92.0, 92.3, 92.6], [0.1, 0.2, 0.6], baseline="cifar10")
    (row,) = rows_of(tmp_path)
    assert (row["label"], row["backbone"], row["recipe"]) == ("CIFAR-10", "resnet20", "cosine_200")
    assert (row["bn_n"], row["bn_mean"], row["bn_std"]) == ("3", "92.3", "0.3")
    assert (row["l2bn_n"], row["l2bn_mean"]) == ("3", "92.6")
    assert (row["pairs"], row["difference"], row["difference_std"]) == ("3", "0.3", "0.264575")
    # 4.302653 = t(0.975) at 2 degrees of freedom; 0.264575 / sqrt(3) = 0.152753.
    assert (row["low"], row["high"]) == ("-0.357241", "0.957241")
    assert row["p"] == row["p_holm"] == "0.188497"
    assert (row["published_bn"], row["published_kind"], row["distance"]) == ("92.56", "last", "-0.26")
    assert row["paper_bn"] == row["paper_l2bn"] == ""


def test_the_last_epoch_is_the_result_and_the_best_is_shown_apart(tmp_path: Path) -> None:
    for norm in ("bn", "l2bn"):
        write_run(tmp_path, norm=norm, accuracy=90.0, best=99.0)
    (row,) = rows_of(tmp_path)
    assert (row["bn_mean"], row["bn_best_epoch_mean"]) == ("90", "99")
    main, best = grid_of(tmp_path).split("## Best epoch")
    assert "99.00" not in main
    assert "99.00" in best
    assert "chosen on the test set" in best


def test_holms_correction_runs_over_the_table(tmp_path: Path) -> None:
    for backbone, spread in (("resnet20", 0.01), ("resnet32", 0.05), ("resnet44", 1.0)):
        write_pairs(
            tmp_path, [90, 91, 92], [0.3 - spread, 0.3, 0.3 + spread], backbone=backbone, baseline="cifar10"
        )
    rows = rows_of(tmp_path)
    p = [float(row["p"]) for row in rows]
    assert p == sorted(p)
    assert [float(row["p_holm"]) for row in rows] == pytest.approx([3 * p[0], 2 * p[1], p[2]], abs=2e-4)


def test_few_pairs_say_so(tmp_path: Path) -> None:
    write_pairs(tmp_path, [90.0, 91.0], [0.1, 0.2])
    table = grid_of(tmp_path)
    assert "| +0.15 | n too small | – |" in table


def test_pooled_line_and_seeds_line(tmp_path: Path) -> None:
    for backbone, shift in (("resnet20", 0.0), ("resnet32", 0.1), ("resnet44", 0.2)):
        write_pairs(tmp_path, [90, 91, 92], [shift, shift + 0.3, shift + 0.6], backbone=backbone)
    write_pairs(tmp_path, [70, 71, 72], [9.0, 9.1, 9.2], recipe="short", epochs=5)
    table = grid_of(tmp_path)
    # Mean 0.4, standard deviation 0.1 over three cells: 4.3027 * 0.1 / sqrt(3) = 0.2484.
    assert "at least 3 pairs, runs of 30 epochs and more: +0.40 points over 3 data set × backbone cells" in table
    assert "[+0.15, +0.65]" in table
    assert "at least 3 pairs, runs under 30 epochs: +9.10 points over 1 data set × backbone cell, " in table
    assert "Seeds to see 0.3 points with 80 % power: 10 (" in table  # an effect of one standard deviation
    assert "deviation of 0.30 points (0.19 to 0.66; 6 degrees of freedom)" in table


def test_folds_have_a_table_of_their_own_with_means_over_the_seeds_that_all_have(tmp_path: Path) -> None:
    write_folds(tmp_path, {1: (0.5, 1.5, 1.0), 2: (2.0,), 4: (-1.0, 9.0)})
    main, folds = grid_of(tmp_path).partition("## Folds")[::2]
    assert "ESC-50, fold 1" in main
    assert "ESC-50, fold 2" not in main + folds.partition("## Best epoch")[2]
    assert folds.count("| ESC-50 | resnet20 | restarts") == 3
    assert "| L2BN − BN | +0.50 | +2.00 | −1.00 | +0.50 (3) | 0 |" in folds
    assert "| BN | 71.00 | 72.00 | 74.00 | 72.33 (3) | 0 |" in folds
    assert [row["label"] for row in rows_of(tmp_path)] == [f"ESC-50, fold {fold}" for fold in (1, 2, 4)]
    figure = differences(without_further_folds(grid(arms_of(read_evidence(tmp_path)))))
    assert "fold 2" not in " ".join(text.get_text() for text in figure.findobj(Text))


def test_folds_without_a_seed_in_common_stay_rows(tmp_path: Path) -> None:
    write_folds(tmp_path, {1: (0.5, 1.0), 3: (1.0,)})
    shutil.rmtree(tmp_path / "esc50/resnet20/l2bn/restarts_126/seed0")
    assert "Folds" not in grid_of(tmp_path)
    assert grid_of(tmp_path).count("| ESC-50, fold 3 |") == 2


def test_a_correction_that_goes_over_each_fold_apart_says_so(tmp_path: Path) -> None:
    for fold in (1, 2):
        for norm, shift in (("bn", 0.0), ("group_norm", 1.0)):
            for seed in range(3):
                where = {
                    "dataset": f"esc50,fold={fold}",
                    "label": f"ESC-50, fold {fold}",
                    "norm": norm,
                    "seed": seed,
                }
                write_run(tmp_path, **where, accuracy=70 + shift * seed, identity={"dataset": {"fold": fold}})
    assert [row["p_holm"] for row in rows_of(tmp_path, "norms.csv")] == [
        row["p"] for row in rows_of(tmp_path, "norms.csv")
    ]
    assert "over these rows (each fold apart)." in documents(read_evidence(tmp_path), PUBLISHED)["norms.md"]


def test_the_table_of_folds_has_the_notes_of_its_runs(tmp_path: Path) -> None:
    write_folds(tmp_path, {1: (0.5,), 2: (2.0,)})
    assert (
        "Kernels of L2BN (they agree within rounding): plain in 2 rows."
        in grid_of(tmp_path).partition("## Folds")[2]
    )


@pytest.mark.parametrize("before", [{}, {"deltas": False}], ids=["a new key", "another value"])
def test_folds_made_under_unequal_conditions_are_refused(before: dict[str, bool], tmp_path: Path) -> None:
    """As after a line of a recipe or of a data set was edited between fold 1 and the others."""
    for fold, images, own in ((1, 400, before), (2, 399, before), (3, 400, {"deltas": True})):
        assert len(read_evidence(tmp_path).records) == fold - 1  # folds may differ in their images
        where = {"dataset": f"esc50,fold={fold}" if fold > 1 else "esc50", "label": f"ESC-50, fold {fold}"}
        write_run(tmp_path, **where, identity={"dataset": {"fold": fold} | own}, test_images=images)
    with pytest.raises(
        UserError, match=r"of the folds of a data set.*unequal.*\(dataset\.deltas: .*one configuration"
    ):
        read_evidence(tmp_path)


def test_a_fold_of_which_a_run_diverged_is_named_below_the_folds(tmp_path: Path) -> None:
    write_folds(tmp_path, {1: (0.5,), 2: (2.0,)})
    assert "diverged and counts" not in grid_of(tmp_path)
    where = {"dataset": "esc50,fold=3", "label": "ESC-50, fold 3", "epochs": 126}
    for norm, status in (("bn", "finished"), ("l2bn", "diverged")):
        options = where | {"identity": {"dataset": {"fold": 3}}, "recipe": "restarts_126"}
        write_run(tmp_path, norm=norm, status=status, **options)
    assert (
        "diverged and counts in no mean: ESC-50, fold 3, resnet20, restarts\\_126, float32."
        in grid_of(tmp_path).partition("## Folds")[2]
    )


def test_a_users_own_data_set_may_call_something_else_a_fold(tmp_path: Path) -> None:
    write_pairs(tmp_path, [90.0], [1.0], dataset="mine", identity={"dataset": {"fold": [1, 2]}})
    assert rows_of(tmp_path)[0]["difference"] == "1"
    for fold in (1, 2):
        where = {"dataset": f"own,fold={fold}", "label": "Own", "parameters": 100 + fold}
        write_pairs(tmp_path, [90.0], [1.0], **where, identity={"dataset": {"fold": fold}})
    assert len(rows_of(tmp_path)) == 3
    assert "Folds" not in grid_of(tmp_path)


def test_sound_does_not_alter_the_correction_over_images(tmp_path: Path) -> None:
    write_pairs(tmp_path, [70, 71, 72], [0.5, 0.6, 0.4])
    write_pairs(tmp_path, [70, 71, 72], [0.5, 0.9, 0.4], backbone="vgg11")
    before = [row["p_holm"] for row in rows_of(tmp_path)]
    assert "correction over the rows." in grid_of(tmp_path)
    write_folds(tmp_path, {1: (0.5, 0.7, 0.6)})
    *images, sound = rows_of(tmp_path)
    assert [row["p_holm"] for row in images] == before
    assert sound["p_holm"] == sound["p"]
    assert "correction over the rows (images and environmental sound apart)." in grid_of(tmp_path)


def test_sound_is_not_pooled_with_images(tmp_path: Path) -> None:
    for backbone, shift in (("resnet20", 0.1), ("resnet32", 0.3)):
        write_pairs(tmp_path, [90, 91, 92], [shift, shift + 0.1, shift + 0.2], backbone=backbone)
    write_pairs(tmp_path, [60, 61, 62], [9.0, 9.1, 9.2], dataset="esc50,fold=2", label="ESC-50, fold 2")
    evidence = read_evidence(tmp_path)
    table = grid_of(tmp_path)
    assert "| ESC-50, fold 2 | resnet20 |" in table
    assert "+0.30 points over 2 data set × backbone cells" in table
    shown = [text.get_text() for text in differences(grid(arms_of(evidence))).findobj(Text)]
    assert {"+9.10", "+0.30"} <= set(shown)


def test_a_cell_under_two_recipes_is_pooled_once(tmp_path: Path) -> None:
    for recipe, difference in (("cosine_200", 0.2), ("step_200", 0.4)):
        write_pairs(tmp_path, [90.0] * 3, [difference] * 3, recipe=recipe)
    result = pooled(grid(arms_of(read_evidence(tmp_path))))
    assert (result.n, result.mean) == (1, pytest.approx(0.3))


def test_the_pooled_mean_is_one_number_everywhere_and_leaves_out_rows_of_few_pairs(tmp_path: Path) -> None:
    """As where one long run checks the instrument beside a grid of shorter ones."""
    for backbone, shift in (("resnet20", 0.1), ("vgg11", 0.2), ("vgg13", 0.6)):
        write_pairs(tmp_path, [60] * 3, [shift, shift + 0.1, shift + 0.2], backbone=backbone, recipe="cosine_30")
    for seeds in (1, 2):
        write_pairs(tmp_path, [90] * seeds, [8.0] * seeds)
        rows = grid(arms_of(read_evidence(tmp_path)))
        assert "runs of 30 epochs and more: +0.40 points over 3 data set × backbone cells" in grid_of(tmp_path)
        assert "+0.40" in [text.get_text() for text in differences(rows).findobj(Text)]
        assert estimate_for_others(rows).mean == pytest.approx(0.4)


def test_few_pairs_have_no_pooled_mean(tmp_path: Path) -> None:
    write_pairs(tmp_path, [90.0], [0.2])
    assert "at least 3 pairs, runs of 30 epochs and more: there are none. Seeds" in grid_of(tmp_path)
    shown = [text.get_text() for text in differences(grid(arms_of(read_evidence(tmp_path)))).findobj(Text)]
    assert not any("Mean over" in text for text in shown)


def test_a_data_set_in_two_folders_is_pooled_once_and_its_rows_told_apart(tmp_path: Path) -> None:
    """As the official files of CIFAR-100 and its PNG files: equal pixels under one label."""
    for dataset, difference in (("cifar100", 0.2), ("cifar100_png", 0.4)):
        write_pairs(tmp_path, [70.0] * 3, [difference] * 3, dataset=dataset, label="CIFAR-100")
    write_pairs(tmp_path, [90.0] * 3, [0.1] * 3)
    rows = grid(arms_of(read_evidence(tmp_path)))
    assert pooled(rows).n == 2
    result = pooled(rows[1:])
    assert (result.n, result.mean) == (1, pytest.approx(0.3))
    table, shown = grid_of(tmp_path), in_terminal(tmp_path)
    for name in ("CIFAR-10", "CIFAR-100 (cifar100)", "CIFAR-100 (cifar100_png)"):
        assert f"| {name} | resnet20 |" in table
        assert f"{name} · resnet20 · " in shown


def test_the_terminal_shows_names_as_they_are(tmp_path: Path) -> None:
    """Rich would take what stands in brackets for a style."""
    norms = ("mine,axes=[height]", "mine,axes=[:heart:]")
    for norm in norms:
        write_run(tmp_path, norm=norm)
    assert all(norm in in_terminal(tmp_path) for norm in norms)


@pytest.mark.parametrize(
    ("dataset", "label", "shown"),
    [
        ("digits,image_size=16", "Digits", "Digits (image size 16)"),
        ("digits,augmentation=None,augmentation.flip=None", "Digits", "Digits (augmentation None)"),
        ("digits,image_size=16,subset=64,validation=0.1", "Digits, validation 0.1, 64 images", None),
        ("image_folder,label=Mine,_a_copy", "Mine, a copy", "Mine, a copy"),
    ],
)
def test_what_was_overridden_in_a_data_set_is_told_wherever_it_is_named(
    dataset: str, label: str, shown: str | None, tmp_path: Path
) -> None:
    shown = shown or f"{label} (image size 16)"
    write_pairs(tmp_path, [90.0], [1.0], dataset=dataset, label=label)
    write_run(tmp_path, dataset=dataset, label=label, norm="group_norm")
    evidence = read_evidence(tmp_path)
    texts = documents(evidence, PUBLISHED)
    assert f"| {shown} | resnet20 |" in texts["grid.md"]
    assert f"| {shown} | resnet20 |" in texts["norms.md"]
    assert f"\n{shown} & resnet20 &" in texts["grid.tex"]
    assert rows_of(tmp_path)[0]["label"] == shown
    assert f"{shown} · resnet20 · " in in_terminal(tmp_path)
    assert f"{shown}, resnet20, cosine\\_200, float32, 200 epochs: +1.00 points" in claims_markdown(evidence, [SET])
    (row,) = grid(arms_of(evidence))
    titles = [
        " ".join(text.get_text().split())
        for figure in (curves([row], {}), differences([row]))
        for text in figure.findobj(Text)
    ]
    assert any(title.startswith(f"{shown}: cosine_200") for title in titles)
    assert shown in titles


# ---- What may share a row --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": "step_200"},
        {"recipe": "cosine_200,lr=0.2"},
        {"precision": "bf16-mixed"},
        {"dataset": "cifar10,subset=10000"},
        {"backbone": "resnet20,shortcut=identity"},
        {"identity": {"devices": 2}},
    ],
    ids=lambda other: "-".join(map(str, other)),
)
def test_unequal_conditions_never_share_a_row(tmp_path: Path, other: dict[str, object]) -> None:
    write_run(tmp_path, norm="bn", seed=0)
    write_run(tmp_path, norm="l2bn", seed=0, **other)
    rows = rows_of(tmp_path)
    assert len(rows) == 2
    assert all(row["pairs"] == "0" and row["difference"] == "" for row in rows)


@pytest.mark.parametrize(
    ("kernels", "text"),
    [
        (("plain", "plain", "plain"), "plain in 1 row."),
        (("plain", "fused", "plain"), "fused and plain in 1 row (CIFAR-10, resnet20)."),
        (("plain then fused", "fused", "fused"), "fused and plain in 1 row (CIFAR-10, resnet20)."),
        (
            ("fused+compiled", "fused", "fused then fused+compiled"),
            "fused, in part compiled in 1 row (CIFAR-10, resnet20).",
        ),
    ],
    ids=str,
)
def test_kernel_paths_share_an_arm_and_are_a_note(kernels: tuple[str, ...], text: str, tmp_path: Path) -> None:
    for seed, path in enumerate(kernels):
        write_run(tmp_path, norm="bn", seed=seed, accuracy=90.0)
        write_run(tmp_path, norm="l2bn", seed=seed, accuracy=91.0 + seed, kernels=path)
    evidence = read_evidence(tmp_path)
    (row,) = rows_of(tmp_path)
    assert (row["pairs"], row["difference"], row["setting"]) == ("3", "2", "32-true")
    assert text.startswith(f"{row['kernels']} in 1 row")
    dropout = "; a compiled model draws other masks of dropout" if "in part" in text else ""
    for name in ("grid.md", "grid.tex"):
        note = f"(they agree within rounding{dropout}): {text}"
        assert note in documents(evidence, PUBLISHED)[name]
    assert ("l2bn: kernels" in in_terminal(tmp_path)) is (len(set(kernels)) > 1)


def test_a_compiled_arm_is_compared_with_one_that_was_not(tmp_path: Path) -> None:
    write_run(tmp_path, norm="bn", accuracy=90.0, kernels="stock")
    write_run(tmp_path, norm="l2bn", accuracy=91.0, kernels="fused+compiled")
    (row,) = rows_of(tmp_path)
    assert (row["difference"], row["kernels"]) == ("1", "fused, in part compiled")
    assert "l2bn: kernels fused, in part compiled" in in_terminal(tmp_path)


def test_a_changed_default_under_an_old_name_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path, norm="bn", identity={"recipe": {"lr": 0.1, "momentum": 0.9}})
    write_run(tmp_path, norm="l2bn", identity={"recipe": {"lr": 0.2, "momentum": 0.9}})
    with pytest.raises(UserError, match=r"recipe\.lr.*bn/cosine_200/seed0 and .*l2bn/cosine_200/seed0"):
        read_evidence(tmp_path)


def test_a_value_that_the_first_run_does_not_know_is_compared_among_the_others(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, identity={"recipe": {"lr": 0.1}})
    for seed, mixup in ((1, 0.0), (2, 0.5)):
        write_run(tmp_path, seed=seed, identity={"recipe": {"lr": 0.1, "mixup": mixup}})
    with pytest.raises(UserError, match=r"recipe\.mixup: 0\.0 and 0\.5.*seed1 and .*seed2"):
        read_evidence(tmp_path)


def fingerprint(files: str, pixels: str | None = None) -> dict[str, str | None]:
    return {"files": files, "pixels": pixels}


def test_runs_on_other_files_with_equal_pixels_are_compared(tmp_path: Path) -> None:
    """As after a lossless conversion of a folder."""
    for seed, files in enumerate("ab"):
        for norm in ("bn", "l2bn"):
            write_run(tmp_path, seed=seed, norm=norm, images=fingerprint(files, "pixels"))
    assert len(read_evidence(tmp_path).records) == 4


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ({"images": fingerprint("a")}, {"images": fingerprint("b")}, "images.files: a and b"),
        ({"train_images": 50_000}, {"train_images": 49_999}, "train_images: 50000 and 49999"),
        ({"test_images": 10_000}, {"test_images": 9_999}, "test_images: 10000 and 9999"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [{"norm": "l2bn"}, {"seed": 1}], ids=str)
def test_runs_on_other_images_are_refused_by_name(
    one: dict[str, Any], other: dict[str, Any], named: str, place: dict[str, Any], tmp_path: Path
) -> None:
    """Whichever is read first, and though a run without a fingerprint is read before both."""
    if "images" in one:
        write_run(tmp_path, seed=9, norm="a_norm")
    first, second = write_run(tmp_path, **one), write_run(tmp_path, **place, **other)
    with pytest.raises(UserError) as error:
        read_evidence(tmp_path)
    for text in (named, str(first.folder), str(second.folder), "dataset.label"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("bn", "l2bn", "note"),
    [
        (fingerprint("a", "x"), fingerprint("a", "x"), ""),
        (fingerprint("a", "x"), fingerprint("a"), ""),
        (fingerprint("a", "x"), fingerprint("a", "y"), "decoded pixels differ in 1 row (CIFAR-10, resnet20)"),
        (fingerprint("a"), None, "no fingerprint in 1 of 2 runs in 1 row (CIFAR-10, resnet20)"),
        (None, None, "no fingerprint in 1 row"),
    ],
    ids=str,
)
def test_images_that_are_not_proven_equal_are_paired_with_a_note(
    bn: dict[str, str | None] | None, l2bn: dict[str, str | None] | None, note: str, tmp_path: Path
) -> None:
    write_run(tmp_path, norm="bn", accuracy=90.0, images=bn)
    write_run(tmp_path, norm="l2bn", accuracy=91.0, images=l2bn)
    assert rows_of(tmp_path)[0]["difference"] == "1"
    table, shown = grid_of(tmp_path), in_terminal(tmp_path)
    assert ("Images not proven equal" in table) is ("images not proven equal" in shown) is bool(note)
    assert f"fingerprints: {note}." in table or not note


@pytest.mark.parametrize(
    ("bn", "l2bn", "note"),
    [
        (["cpu"], ["cpu"], ""),
        (["NVIDIA H100"], ["NVIDIA A100"], ""),
        (["NVIDIA H100", "cpu"], ["cpu", "NVIDIA A100"], "seed 1 in 1 row (CIFAR-10, resnet20)"),
        (["cpu"], ["NVIDIA H100"], "seed 1 in 1 row (CIFAR-10, resnet20)"),
        (["cpu"], ["NVIDIA H100", "cpu"], "seed 1 in 1 row (CIFAR-10, resnet20)"),
    ],
)
def test_a_pair_made_on_a_cpu_and_on_a_gpu_is_noted(
    bn: list[str], l2bn: list[str], note: str, tmp_path: Path
) -> None:
    """Pairs of one row may be of several kinds of device; a run may have gone on on another."""
    for norm, devices in (("bn", bn), ("l2bn", l2bn)):
        for seed, own in ((0, ["cpu"]), (1, devices)):
            record = write_run(tmp_path, norm=norm, seed=seed)
            starts = [{"device": device} for device in own]
            (record.folder / ENVIRONMENT).write_text(json.dumps({"starts": starts}))
    table, shown = grid_of(tmp_path), in_terminal(tmp_path)
    assert (f"masks of dropout): {note}." in table) is bool(note)
    assert ("l2bn: pairs made in part on a CPU and in part on a GPU: seed 1" in shown) is bool(note)
    write_run(tmp_path, norm="group_norm", seed=1)  # another row's pair
    assert in_terminal(tmp_path).count("on a GPU") == bool(note)


@pytest.mark.parametrize(
    ("bn", "l2bn", "noted"),
    [
        ((None, None), (None, None), False),  # the suite's own parts
        (("a", "a"), ("ab", "a"), False),  # a norm of the user's own
        (("a", "a"), ("ab", "b"), True),
        ((None, None), ("b", None), True),  # seed 0 has another version of the norm
    ],
)
def test_runs_of_several_versions_of_a_users_own_code_are_noted(
    bn: tuple[str | None, str | None], l2bn: tuple[str | None, str | None], noted: bool, tmp_path: Path
) -> None:
    """An identity names a function, not what it does: edited between two arms, two networks would be compared."""
    for norm, own in (("bn", bn), ("l2bn", l2bn)):
        for seed in (0, 1):
            record = write_run(tmp_path, norm=norm, seed=seed)
            whole = "other" if noted and bn == (None, None) and (norm, seed) == ("l2bn", 0) else own[0]
            start = {"own_source": whole, "own_source_beside_norm": own[1]}
            (record.folder / ENVIRONMENT).write_text(json.dumps({"starts": [start]}))
    table, shown = grid_of(tmp_path), in_terminal(tmp_path)
    assert ("Your own code was edited" in table) is ("own code was edited" in shown) is noted


def test_networks_of_other_sizes_are_no_runs_of_one_cell(tmp_path: Path) -> None:
    write_run(tmp_path, norm="bn", seed=0, parameters=706)
    write_run(tmp_path, norm="l2bn", seed=0, parameters=708)  # a norm may have parameters of its own
    assert len(read_evidence(tmp_path).records) == 2
    write_run(tmp_path, norm="bn", seed=1, parameters=2098)
    with pytest.raises(UserError, match=r"unequal conditions \(parameters: 706 and 2098\)"):
        read_evidence(tmp_path)


def test_differences_without_a_spread_give_no_number_of_seeds(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, norm="bn", seed=seed, accuracy=90.0 + seed)
        write_run(tmp_path, norm="l2bn", seed=seed, accuracy=90.5 + seed)
    table = grid_of(tmp_path)
    assert "80 % power: not known, since the measured differences have no spread." in table
    assert rows_of(tmp_path)[0]["seeds_needed"] == ""


def test_seeds_norms_and_new_options_are_no_unequal_conditions(tmp_path: Path) -> None:
    write_run(tmp_path, norm="bn", seed=0, identity={"norm": {"eps": None}, "recipe": {}})
    write_run(tmp_path, norm="l2bn", seed=1, identity={"norm": {"eps": 0.1}, "recipe": {"mixup": 0.0}})
    assert len(read_evidence(tmp_path).records) == 2


@pytest.mark.parametrize("first", ["bn", "l2bn"])
def test_a_value_for_a_key_that_the_other_run_lacks_is_an_unequal_condition(first: str, tmp_path: Path) -> None:
    """As after a line was added to a YAML file of one's own, between two sweeps."""
    second = "l2bn" if first == "bn" else "bn"
    write_run(tmp_path, norm=first, identity={"backbone": {"width": 32}})
    write_run(tmp_path, norm=second, identity={"backbone": {"width": 32, "dropout": 0.5}})
    with pytest.raises(UserError, match=r"unequal conditions \(backbone\.dropout: .*no value"):
        read_evidence(tmp_path)


def test_other_norms_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    write_pairs(tmp_path, [90, 91, 92], [0.1, 0.2, 0.3])
    for norm in ("l2bn_rms", "l2bn,eps=0.001", "bn,momentum=0.01"):
        write_run(tmp_path, norm=norm, accuracy=91.0)
    evidence = read_evidence(tmp_path)
    assert [row["norm"] for row in rows_of(tmp_path)] == ["l2bn"]
    rows = rows_of(tmp_path, "norms.csv")
    assert [row["norm"] for row in rows] == ["bn,momentum=0.01", "l2bn,eps=0.001", "l2bn_rms"]
    assert {row["difference"] for row in rows} == {"1"}
    assert len(other_norms(arms_of(evidence))) == 3


def test_a_value_that_both_norms_have_is_compared(tmp_path: Path) -> None:
    """Where there is no plain BN in the cell, BN with the same value stands for it, and is named."""
    for seed, difference in enumerate((0.1, 0.2, 0.3)):
        for norm, accuracy in (("bn", 90.0), ("l2bn", 90.0 + difference)):
            write_run(tmp_path, norm=f"{norm},momentum=0.01", seed=seed, accuracy=accuracy)
    write_run(tmp_path, norm="l2bn,eps=0.001", accuracy=91.0)
    (eps, row) = rows_of(tmp_path, "norms.csv")
    assert (row["norm"], row["reference"], row["pairs"]) == ("l2bn,momentum=0.01", "bn,momentum=0.01", "3")
    assert float(row["difference"]) == pytest.approx(0.2)
    assert (eps["reference"], eps["pairs"]) == ("bn", "0")
    page = documents(read_evidence(tmp_path), PUBLISHED)["norms.md"]
    assert "| l2bn (momentum 0.01) | bn (momentum 0.01): 90.00 ± 0.00 (3) | 90.20 ± 0.10 (3) |" in page
    assert "No record for this table yet." in grid_of(tmp_path)
    lines = [re.split(r"  +", line.strip()) for line in in_terminal(tmp_path).splitlines()]
    assert ["bn,momentum=0.01", "90.00 ± 0.00", "3"] in lines
    assert ["l2bn,momentum=0.01", "90.20 ± 0.10", "+0.20", "[−0.05, +0.45]", "3"] in lines
    assert ["l2bn,eps=0.001", "91.00", "no BN run", "1; 2 missing"] in lines


# ---- What is not there -----------------------------------------------------------------------------------


def test_missing_arms_and_seeds_and_diverged_runs_are_counted(tmp_path: Path) -> None:
    write_pairs(tmp_path, [90, 91, 92], [0.1, 0.2, 0.3])
    write_run(tmp_path, norm="bn", seed=3, accuracy=91.0)
    write_run(tmp_path, norm="l2bn", seed=4, status="diverged")
    write_run(tmp_path, backbone="vgg16", norm="bn", accuracy=90.0)
    write_run(tmp_path, dataset="cifar100", backbone="vgg16", norm="l2bn", status="diverged")
    table = grid_of(tmp_path).split("## Best")[0]
    assert "| CIFAR-10 | resnet20 | 91.00 ± 0.82 (4; 1 missing) " in table
    assert "| 91.20 ± 1.10 (3; 1 diverged, 1 missing) | +0.20 [−0.05, +0.45] (3 pairs) |" in table
    assert "1 missing (3 " in in_terminal(tmp_path)  # pairs, on the next line
    assert "| CIFAR-10 | vgg16 | 90.00 (1) | missing | – |" in table
    assert "| CIFAR-100 | vgg16 | missing | 1 diverged | – |" in table
    assert "Recipe of all rows: cosine\\_200, float32." in table
    assert "Runs: 8 finished, 2 diverged, 4 missing whose seed the other arm has" in table
    assert len(rows_of(tmp_path)) == 3


def test_no_records_make_tables_that_say_so(tmp_path: Path) -> None:
    texts = documents(read_evidence(tmp_path), PUBLISHED)
    assert set(texts) == {f"{name}.{kind}" for name in ("grid", "norms") for kind in ("md", "csv", "tex")}
    assert all("No record for this table yet." in text for name, text in texts.items() if not name.endswith("csv"))
    assert rows_of(tmp_path) == []
    assert "No ended run here yet" in in_terminal(tmp_path)
    assert texts["grid.csv"].startswith("dataset,label,backbone,")


def test_a_spreadsheet_can_tell_the_encoding_of_a_label(tmp_path: Path) -> None:
    write_run(tmp_path, dataset="sizes", label="Größe")
    write_run(tmp_path, dataset="sizes", label="Größe", norm="l2bn")
    text = documents(read_evidence(tmp_path), PUBLISHED)["grid.csv"]
    assert text.encode().startswith(codecs.BOM_UTF8)
    assert pd.read_csv(io.BytesIO(text.encode()))["label"].tolist() == ["Größe"]


# ---- Beside published numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "published", "kind"),
    [
        ({}, "92.56", "last"),
        (
            {"backbone": "resnet20,shortcut=identity", "recipe": "step_200", "parameters": 269722},
            "91.25",
            "paper",
        ),
        ({"backbone": "resnet56"}, "94.21", "last"),
        ({"baseline": "cifar100"}, "68.48", "last"),
        (
            {"backbone": "imagenet_resnet50", "recipe": "imagenet_90", "baseline": "imagenet"},
            *("76.13", "weights"),
        ),
        ({"dataset": "cifar10,baseline=cifar10,label=Mine,_a_copy"}, "92.56", "last"),
        ({"dataset": "cifar10,image_size=64"}, "", ""),
        ({"dataset": "cifar10,augmentation=None,augmentation.flip=None"}, "", ""),
        ({"dataset": "cifar10,mean=[0.5,_0.5,_0.5]"}, "", ""),
        ({"dataset": "cifar10,0123456789abcdef"}, "", ""),  # overrides too long for a folder's name
        ({"baseline": None}, "", ""),
        ({"baseline": "imagenet"}, "", ""),
        ({"baseline": "source"}, "", ""),  # keys of the file that are no data sets
        ({"baseline": "recipe"}, "", ""),
        ({"recipe": "step_200"}, "", ""),
        ({"recipe": "cosine_200,epochs=100"}, "", ""),
        ({"backbone": "resnet20,shortcut=identity"}, "", ""),
        ({"backbone": "resnet20,width=8"}, "", ""),
        ({"backbone": "resnet110,shortcut=identity", "recipe": "step_200"}, "93.57", "paper"),
        ({"backbone": "resnet110,shortcut=identity"}, "", ""),
        ({"parameters": 269722}, "", ""),
    ],
    ids=str,
)
def test_published_numbers_stand_only_beside_equal_data_net_and_recipe(
    cell: dict[str, Any], published: str, kind: str, tmp_path: Path
) -> None:
    """The paper's own, of which neither recipe nor parameters are known, beside equal data and net."""
    record = write_run(tmp_path, **({"baseline": "cifar10"} | cell))
    paper = Reference(PUBLISHED.bn, {"cifar10": {"resnet20": {"bn": 91.0}}})
    (row,) = rows_of(tmp_path, reference=paper)
    assert (row["published_bn"], row["published_kind"], bool(row["distance"])) == (published, kind, bool(published))
    own = (record.baseline, record.backbone) == ("cifar10", "resnet20") and (published or "dataset" not in cell)
    assert bool(row["paper_bn"]) is bool(own)


def test_every_reference_names_configs_that_exist() -> None:
    """A misspelt or renamed data set, backbone or recipe would silently have no comparison."""
    recipes, backbones = (
        {path.stem for path in (ROOT / "configs" / group).glob("*.yaml")} for group in ("recipe", "backbone")
    )
    datasets = {yaml.safe_load(path.read_text())["baseline"] for path in (ROOT / "configs/dataset").glob("*.yaml")}
    tables = [table for table in PUBLISHED.bn if table["recipe"]]
    assert len(tables) >= 4
    assert {table["recipe"] for table in tables} <= recipes
    for table in (*tables, PUBLISHED.images):
        for dataset in table.keys() - {"source", "recipe"}:
            assert dataset in datasets
            assert {net.partition(",")[0] for net in table[dataset]} <= backbones


def test_the_papers_numbers_fill_their_column_once_entered(tmp_path: Path) -> None:
    write_pairs(tmp_path, [92.0], [0.1], baseline="cifar10")
    write_pairs(tmp_path, [92.0], [0.1], baseline="cifar10", recipe="step_200")
    assert "No number of the L2BN paper's image tables" in grid_of(tmp_path)
    text = REFERENCE.read_text()
    for entry, count in (
        ('{bn: 91.11, l2bn: 92.22, where: "v6, table 2"}', 2),
        ("{bn: 91.11, l2bn: 92.22, where: v6, recipe: step_200}", 1),
    ):
        path = tmp_path / "baselines.yaml"
        path.write_text(
            text.replace("image_classification: {}", f"image_classification: {{cifar10: {{resnet20: {entry}}}}}")
        )
        table = grid_of(tmp_path, read_reference(path))
        assert table.count("| 91.11 / 92.22") == count
        assert "No number of the L2BN paper" not in table
        assert "L2BN paper, v6" in table


NO_PAPER = "l2bn: {image_classification: {}, acoustic_scenes: {}}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bn: []",
        "bn: [{source: x",
        "bn: [{source: x, recipe: y, cifar10: {resnet20: {last: 192.0}}}]\n" + NO_PAPER,
        "bn: [{source: x, recipe: y, cifar10: {resnet20: {lst: 92.0}}}]\n" + NO_PAPER,
        "bn: [{source: x, cifar10: {resnet20: {last: 92.0}}}]\n" + NO_PAPER,
        "bn: []\nl2bn: {image_classification: {cifar10: {resnet20: {ours: 1.0}}}, acoustic_scenes: {}}",
    ],
)
def test_a_reference_file_with_a_mistake_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "baselines.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"baselines\.yaml"):
        read_reference(path)


# ---- Bad records -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["plain", "fused"])
def test_two_results_of_one_cell_and_seed_are_an_error_naming_both(kernels: str, tmp_path: Path) -> None:
    write_run(tmp_path / "here", norm="l2bn", accuracy=92.0)
    write_run(tmp_path / "there", norm="l2bn", accuracy=92.1, kernels=kernels)
    with pytest.raises(UserError, match=r"here/.*seed0 and .*there/.*seed0"):
        read_evidence(tmp_path)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"identity": {"recipe": {"lr": 0.2}}}, r"recipe\.lr: 0\.1 and 0\.2.*give the changed config a name"),
        ({"identity": {"recipe": {"lr": 0.1}}, "test_images": 9}, r"test_images: 10000 and 9.*dataset\.label"),
    ],
    ids=str,
)
def test_why_two_results_of_one_seed_differ_is_said(other: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_run(tmp_path / "here", identity={"recipe": {"lr": 0.1}})
    write_run(tmp_path / "there", accuracy=91.0, **other)
    with pytest.raises(UserError, match=named):
        read_evidence(tmp_path)


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "here", accuracy=92.0)
    record = write_run(tmp_path / "there", accuracy=92.0)
    content = json.loads((record.folder / SUMMARY).read_text())
    content["last"]["seconds"], content["seconds"] = 77.0, 777.0  # what it cost may differ
    (record.folder / SUMMARY).write_text(json.dumps(content))
    assert len(read_evidence(tmp_path).records) == 1


@pytest.mark.parametrize("content", [b'{"schema": 1, "status": "finis', b'{"accuracy": 99}', b"\xff\xfe\x00"])
def test_bad_records_are_named_counted_and_left_out(tmp_path: Path, content: bytes) -> None:
    """Half-written, foreign or binary; test_records.py has the values that make a record bad."""
    write_pairs(tmp_path, [90, 91, 92], [0.1, 0.2, 0.3])
    (tmp_path / "cifar10/resnet20/l2bn/cosine_200/seed1" / SUMMARY).write_bytes(content)
    evidence = read_evidence(tmp_path)
    assert len(evidence.records) == 5
    assert [problem.folder.name for problem in evidence.problems] == ["seed1"]
    assert "1 unreadable record left out" in grid_of(tmp_path, Reference())


def test_strict_is_for_scripts_that_must_not_miss_a_bad_record(tmp_path: Path, issue: Issue) -> None:
    tmp_path = tmp_path / ("runs" * 25)  # more than a line
    write_pairs(tmp_path, [90, 91, 92], [0.1, 0.2, 0.3])
    bad = tmp_path / "cifar10/resnet20/l2bn/cosine_200/seed1"
    (bad / SUMMARY).write_text("{")
    for options, code in (((), 0), (("--strict",), 1)):
        done = issue("report", "tables", "--runs", tmp_path, "--out", tmp_path / "tables", *options)
        assert done.code == code
        assert f"left out: {bad}: " in done.err
        assert "1 unreadable record left out" in done.out
        assert "91.20 ± 1.56 (2; 1 missing)" in (tmp_path / "tables/grid.md").read_text()


@pytest.mark.parametrize(("command", "older"), [("figures", "curves-esc50.png"), ("mechanism", "norms-esc50.svg")])
def test_a_figure_that_was_not_drawn_again_is_named(command: str, older: str, tmp_path: Path, issue: Issue) -> None:
    write_run(tmp_path / "runs")
    kept = tmp_path / ("out" if command == "figures" else "out/figures") / older
    kept.parent.mkdir(parents=True)
    kept.touch()
    (kept.parent / "spectrograms.png").touch()  # of another command
    done = issue("report", command, "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    assert [line for line in done.out.splitlines() if "not drawn now" in line] == [
        f"{kept} was not drawn now: if it is of older records, delete it"
    ]
    assert kept.exists()


@pytest.mark.parametrize("command", ["tables", "figures", "claims", "mechanism"])
def test_files_are_written_though_nobody_reads_what_is_printed(command: str, tmp_path: Path) -> None:
    """As when a pager is left before its end."""
    write_run(tmp_path / "runs")
    out = tmp_path / "out.md"
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, SCRIPT, command, "--runs", tmp_path / "runs", "--out", out]
    with os.fdopen(writing, "w") as closed:
        assert not subprocess.run(arguments, stdout=closed, stderr=subprocess.PIPE, check=False).stderr
    assert (out / "grid.md" if command == "tables" else out).exists()


def test_every_command_shows_an_example_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    parser = runpy.run_path(str(SCRIPT))["parser"]()
    for command in ("tables", "figures", "claims", "mechanism"):
        with pytest.raises(SystemExit):
            parser.parse_args([command, "--help"])
        printed = capsys.readouterr().out
        (example,) = re.findall(rf"^python scripts/report\.py ({command} .*)$", printed, re.MULTILINE)
        assert parser.parse_args(example.split()).command.__name__ == command
        assert {"--runs", "--out", "--strict"} <= set(re.findall(r"--\w+", printed))


# ---- How it is written -----------------------------------------------------------------------------------


def test_the_terminal_table_fits_and_reads(tmp_path: Path) -> None:
    write_pairs(tmp_path, [90, 91, 92], [-0.1, -0.2, -0.3], dataset="digits")
    write_run(tmp_path, dataset="digits", norm="l2bn,eps=0.001,momentum=0.01", accuracy=91.0, seed=7)
    write_run(tmp_path, dataset="digits", norm="l2bn", status="diverged", seed=8)
    text = in_terminal(tmp_path)
    assert max(map(len, text.splitlines())) <= 100
    assert "Digits · resnet20 · cosine_200 · float32" in text
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert ["norm", "accuracy", "difference", "95 % interval", "runs"] in lines
    assert ["bn", "91.00 ± 1.00", "3; 2 missing"] in lines
    assert ["l2bn", "90.80 ± 0.90", "−0.20", "[−0.45, +0.05]", "3; 1 diverged, 1 missing"] in lines


def test_the_order_and_place_of_the_records_change_nothing(tmp_path: Path) -> None:
    for backbone in ("resnet20", "vgg16"):
        write_pairs(tmp_path, [90.1, 91.2, 92.4], [0.1, 0.25, 0.3], backbone=backbone)
    write_run(tmp_path, norm="l2bn_rms", accuracy=91.0)
    evidence = read_evidence(tmp_path)
    expected = documents(evidence, PUBLISHED)
    shuffled = random.Random(0).sample(evidence.records, len(evidence.records))
    assert documents(Evidence(shuffled), PUBLISHED) == expected
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert documents(read_evidence(moved), PUBLISHED) == expected


def test_rows_are_sorted_as_a_reader_would() -> None:
    names = ["resnet110", "resnet20", "vgg16", "resnet56", "mobilenetv2_x0_5"]
    assert sorted(names, key=natural_order) == ["mobilenetv2_x0_5", "resnet20", "resnet56", "resnet110", "vgg16"]
    rates = ["lr=0.1", "lr=1", "lr=0.05", "lr=0.001", "lr=0.01"]
    assert sorted(rates, key=natural_order) == ["lr=0.001", "lr=0.01", "lr=0.05", "lr=0.1", "lr=1"]


def test_cells_of_like_names_stay_apart(tmp_path: Path) -> None:
    """0.01 and 0.001 differ in zeros alone, which a number of digits has not."""
    for rate in ("0.01", "0.001", "0.0010"):
        write_pairs(tmp_path, [90.0, 91.0, 92.0], [0.1, 0.2, 0.3], recipe=f"short,lr={rate}")
    cells = by_cell(arms_of(read_evidence(tmp_path)))
    assert [[arm.norm for arm in arms] for _, arms in cells] == [["bn", "l2bn"]] * 3


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("short", "short"),
        ("short,batch_size=16,epochs=3,lr=0.02", "short (batch size 16, epochs 3, lr 0.02)"),
        ("step_200,schedule.milestones=[60,_120]", "step_200 (schedule.milestones [60, 120])"),
        ("short,0123456789abcdef", "short (0123456789abcdef)"),
    ],
)
def test_names_of_folders_are_told_in_words(folder: str, words: str) -> None:
    assert in_words(folder) == words


def test_recipes_have_letters_however_many_there_are(tmp_path: Path) -> None:
    for epochs in range(1, 30):
        write_run(tmp_path, recipe=f"short,epochs={epochs}", epochs=epochs)
    table = grid_of(tmp_path)
    assert "| CIFAR-10 | resnet20 | AC | 92.00 (1) |" in table
    assert "; Z: short (epochs 26), float32; AA: short (epochs 27), float32;" in table


def test_markup_keeps_special_characters() -> None:
    table = Table(("a_b", "x"), [("50 % & #1 | y", "−0.1 ± <2")], ["See a_b*¹."])
    assert markdown(table) == "| a_b | x |\n| --- | ---: |\n| 50 % & #1 \\| y | −0.1 ± <2 |\n\nSee a\\_b\\*¹."
    text = latex(table)
    assert r"a\_b & x \\" in text
    assert r"50 \% \& \#1 | y & $-$0.1 $\pm$ $<$2 \\" in text
    assert r"a\_b*\textsuperscript{1}." in text
    assert r"\begin{tabular}{lr}" in text


def test_latex_has_one_cell_a_column(tmp_path: Path) -> None:
    write_pairs(tmp_path, [90, 91, 92], [0.1, 0.2, 0.3], baseline="cifar10", label="A & B_{50 %}")
    text = documents(read_evidence(tmp_path), PUBLISHED)["grid.tex"]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 2
    assert all(len(re.findall(r"(?<!\\)&", row)) == len(columns[1]) - 1 for row in rows)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    assert body.isascii()


# ---- The README ------------------------------------------------------------------------------------------

SET = RunSet("Data at 30 epochs", "cifar10", "cosine_30", "32-true", ("net0", "net1", "net2"), (0, 1, 2))


def readme_of(root: Path) -> str:
    return readme_with_block(f"{BEGIN}\n{END}", read_evidence(root), SET)


def test_the_readmes_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path)
    evidence = read_evidence(tmp_path)
    text = readme_with_block(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n", evidence, SET)
    claim = "On average over 3 networks (net0, net1, net2) on Data at 30 epochs, claim 5, that L2BN improves"
    assert text.startswith(f"before\n\n{BEGIN}\n\n- **{claim} accuracy, is open")
    assert text.endswith(f"\n{END}\n\nafter\n")
    assert "old" not in text
    assert readme_with_block(text, evidence, SET) == text
    for bad in ("", BEGIN, END, f"{END}\n{BEGIN}\n", f"{BEGIN}{END}{BEGIN}{END}"):
        with pytest.raises(UserError, match="end of results"):
            readme_with_block(bad, evidence, SET)


def test_the_readme_answers_from_the_first_set_as_its_runs_end(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    text = readme_of(tmp_path / "records")
    assert "is open** until all 18 runs have ended (0 have)." in text
    assert "there is no interval yet: fewer than 3 networks have 3 pairs of 30 epochs or more" in text
    assert "No record for this table yet." in text
    assert "![" not in text
    cell: dict[str, Any] = {"recipe": "cosine_30", "epochs": 30}
    write_pairs(tmp_path / "records", [70.0, 71.0, 72.0], [0.4, 0.5, 0.6], backbone="net0", **cell)
    write_pairs(tmp_path / "records", [70.0], [9.9], backbone="net7", **cell)  # not of the set
    text = readme_of(tmp_path / "records")
    assert "is open** until all 18 runs have ended (6 have)." in text
    assert "| CIFAR-10 | net0 | 71.00 ± 1.00 (3) | 71.50 ± 1.10 (3) | +0.50 [+0.25, +0.75] | 0.013 |" in text
    assert "net7" not in text
    assert "(results/figures/differences-cifar10-cosine_30.png)" in text
    for net, gains in (("net1", [0.3, 0.4, 0.5]), ("net2", [0.5, 0.6, 0.7])):
        write_pairs(tmp_path / "records", [70.0, 71.0, 72.0], gains, backbone=net, **cell)
    text = readme_of(tmp_path / "records")
    # s = 0.1 over 6 degrees of freedom: 2.447 * 0.1 / 3 = 0.08.
    estimate = "L2BN − BN is +0.50 points of test top-1, 95 % interval [+0.42, +0.58]"
    sides = "by the networks' pooled spread, 3 of 3 networks above 0, 3 significantly (net0, net1, net2)"
    pairs = f"{sides}, n = 9 pairs, diverged: 0 of BN, 0 of L2BN"
    assert f"is supported**: {estimate}, {pairs}." in text
    # The means 0.4, 0.5 and 0.6: t(2) * 0.1 / sqrt(3) = 4.303 * 0.0577 = 0.25.
    beyond = "+0.50 points of test top-1, 95 % interval [+0.25, +0.75]; each of 3 cells of data set and network"
    assert f"(one data set tells nothing of others), it is supported: {beyond}, over all its seeds," in text


def test_the_readme_has_the_verdict_of_claim_5_on_other_networks(
    tmp_path: Path,
) -> None:
    for dataset, gain in (("cifar10", 0.5), ("fashion_mnist", -0.5), ("esc50", 9.0)):
        for net in range(3):
            gains = [gain - 0.1, gain + net / 100, gain + 0.1]
            options: dict[str, Any] = {"backbone": f"net{net}", "recipe": "cosine_30", "epochs": 30}
            write_pairs(tmp_path, [60.0, 61.0, 62.0], gains, dataset=dataset, label=dataset, **options)
    arms = arms_of(read_evidence(tmp_path))
    verdict = next(claim.judge(arms).verdict for claim in CLAIMS if claim.number == 5)
    assert verdict == "not decided at this n"
    said = f"For other networks and data sets like those measured, it is {verdict.partition(' at')[0]}: 0.00 points"
    assert said in readme_of(tmp_path)
    assert "each of 6 cells of data set and network" in readme_of(tmp_path)


def test_the_readme_gives_each_interval_with_its_own_mean(tmp_path: Path) -> None:
    """Seeds that came later count for other networks alone, and a cell without a pair is told."""
    cell: dict[str, Any] = {"recipe": "cosine_30", "epochs": 30}
    for net, gain in (("net0", 0.4), ("net1", 0.5), ("net2", 0.6)):
        gains = [gain - 0.1, gain, gain + 0.1, gain + 4.0]
        write_pairs(tmp_path, [70.0, 71.0, 72.0, 73.0], gains, backbone=net, **cell)
    text = readme_of(tmp_path)
    assert "is supported**: L2BN − BN is +0.50 points of test top-1, 95 % interval [+0.42, +0.58], by" in text
    assert "it is supported: +1.50 points of test top-1, 95 % interval [+1.25, +1.75]; each of 3 cells" in text
    for seed in range(3):
        write_run(tmp_path, norm="l2bn", backbone="net2", seed=seed, status="diverged", **cell)
    text = readme_of(tmp_path)
    without = "L2BN − BN is – points of test top-1, no interval: a cell has no pair"
    assert f"not decided**: {without}, significantly above 0: net0, net1, n = 6" in text
    assert "there is no interval yet: fewer than 3 networks have 3 pairs of 30 epochs or more" in text


def test_the_readme_has_the_verdicts_on_features_of_the_set(tmp_path: Path) -> None:
    """The lines are those of claims.md, and wait for the runs as they do."""
    for norm, shift in ((BN, 0.0), (L2BN, -0.02)):
        for (place, net), seed in product(enumerate(SET.backbones), SET.seeds):
            run = write_run(tmp_path, norm=norm, backbone=net, seed=seed, recipe="cosine_30", epochs=30)
            more = (norm == L2BN) * (seed + place - 1) / 1000
            write_features(run, within_share=0.3 + shift + seed / 100 + more)
    text = readme_with_block(f"{BEGIN}\n{END}", read_evidence(tmp_path, features=True), SET)
    claim = "\n  - Claim 2: L2BN makes the features of a class more compact. "
    assert f"{claim}Supported, 9 pairs: −0.0190 [" in text
    networks = "3 of 3 networks below 0, 3 significantly (net0, net1, net2)"
    others = "For other networks it is supported: −0.0190 ["
    assert f"{networks} (within\\_share, L2BN − BN). {others}" in text
    assert "], 3 cells.\n" in text
    without = readme_of(tmp_path)  # as if the features had not been measured
    assert f"{claim}Not decided, 0 of 18 runs; 18 ended without" in without


def test_the_readme_has_what_was_measured_on_sound(tmp_path: Path) -> None:
    write_pairs(tmp_path, [90.0], [1.0])
    assert "Claim 6" not in readme_of(tmp_path)
    write_folds(tmp_path, {1: (0.5, 1.5)})
    claim = (
        "\n- Claim 6, on another task: L2BN improves the accuracy of acoustic scene classification. Not measured."
    )
    assert claim in readme_of(tmp_path)
    assert "126 epochs: resnet20 +1.00 points, no interval: n too small, n = 2.\n" in readme_of(tmp_path)


def test_every_column_is_defined_in_the_results_readme() -> None:
    text = (ROOT / "results/README.md").read_text()
    defined = set(re.findall(r"`([a-z0-9_*]+)`", text))
    files = list((ROOT / "results").glob("*/*.csv"))
    assert {path.name for path in files} == {"grid.csv", "norms.csv", "features.csv", "studies.csv"}
    for path in files:
        for column in path.read_text().split("\n")[0].split(","):
            assert defined & {column, re.sub("^(bn|l2bn|norm)_", "*_", column)}, (path.name, column)


# ---- The committed tables ----------------------------------------------------------------------------------


def test_the_committed_tables_and_the_readme_are_what_the_records_give() -> None:
    """`make tables` brings them up to date."""
    folder = ROOT / "results/records"
    evidence = read_evidence(folder, features=True) if folder.is_dir() else Evidence([])
    assert evidence.problems == []
    expected = documents(evidence, PUBLISHED)
    committed = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "results/tables").iterdir()}
    assert committed == expected
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == readme_with_block(readme, evidence, read_sets(ROOT / "results/reference/sets.yaml")[0])


def test_the_readme_says_what_three_seeds_show_and_how_many_a_small_difference_takes() -> None:
    """In long runs and in short ones, by the spreads of the records."""
    rows = [row for row in grid(arms_of(read_evidence(ROOT / "results/records"))) if row.cell.task == "images"]
    reaches, seeds = [], []
    for full in (True, False):
        spread = pooled_spread([row.differences() for row in rows if row.full_length is full])
        assert spread is not None
        reaches.append(f"±{stats.t.ppf(0.975, MIN_PAIRS - 1) * spread.std / math.sqrt(MIN_PAIRS):.1f}")
        seeds += [str(seeds_needed(std, TARGET)) for std in (spread.std, spread.low, spread.high)]
    stated = " ".join([reaches[0], str(FULL_EPOCHS), reaches[1], str(TARGET), f"{100 * POWER:.0f}", *seeds])
    paragraphs = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")
    assert any(stated in " ".join(re.findall(r"±?\d+(?:\.\d+)?", text)) for text in paragraphs), stated


def test_reporting_never_loads_torch() -> None:
    """So that a table is there at once."""
    modules = [f"l2bn.reporting.{path.stem}" for path in (ROOT / "src/l2bn/reporting").glob("[a-z]*.py")]
    assert len(modules) > 5
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
