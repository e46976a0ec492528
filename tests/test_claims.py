"""The verdicts: each follows from its numbers by the stated rule, and none stands without them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from l2bn.reporting.claims import CLAIMS, claims_markdown
from l2bn.reporting.comparison import arms_of
from l2bn.reporting.evidence import Evidence, read_evidence
from synthetic_records import write_pairs, write_run

ROOT = Path(__file__).parents[1]
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
    text = claims_markdown(read_evidence(tmp_path))
    rows = re.findall(r"^\| (\d) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == list("123456")
    for number, _, found, evidence in rows:
        assert found in VERDICTS
        assert re.search(r"\d", evidence), f"claim {number} is judged without a number"
    for claim in CLAIMS:
        assert f"\n{claim.number}. {claim.rule}\n".replace("_", r"\_") in text


def test_the_tests_that_are_named_as_evidence_are_there() -> None:
    named = [test.split("::") for claim in CLAIMS for test in claim.tests]
    assert named
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text()


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
    assert "3 of 4 rows" in evidence
    assert "+0.30 points, 95 % interval [+0.05, +0.55]" in evidence
    (claim,) = (claim for claim in CLAIMS if claim.number == 5)
    details = claim.judge(arms_of(read_evidence(tmp_path))).details
    assert details == ("Not counted: CIFAR-10 (JPEG), resnet20, short: +2.00 points, 1 pair of 5 epochs",)
    assert f"- {details[0]}\n" in claims_markdown(read_evidence(tmp_path))


def test_many_data_sets_are_not_various_models(tmp_path: Path) -> None:
    for dataset, shift in (("a", 0.2), ("b", 0.3), ("c", 0.4)):
        write_pairs(tmp_path, [90.0] * 3, [shift, shift + 0.1, shift - 0.1], dataset=dataset)
    assert verdict(tmp_path, 5)[0] == "not decided at this n"


def test_models_lost_to_divergence_forbid_support(tmp_path: Path) -> None:
    write_grid(tmp_path, [0.2, 0.3, 0.4])
    write_run(tmp_path, backbone="net9", norm="l2bn", status="diverged")
    found, evidence = verdict(tmp_path, 5)
    assert found == "not decided at this n"
    assert "0 of BN, 1 of L2BN" in evidence


def test_the_committed_claims_are_what_the_records_give() -> None:
    """`make claims` brings them up to date."""
    folder = ROOT / "results/records"
    evidence = read_evidence(folder, features=True) if folder.is_dir() else Evidence([])
    assert (ROOT / "results/claims.md").read_text(encoding="utf-8") == claims_markdown(evidence)


def test_the_script_prints_and_writes(tmp_path: Path) -> None:
    write_grid(tmp_path / "runs", [0.2, 0.3, 0.4])
    out = tmp_path / "claims.md"
    command = [sys.executable, ROOT / "scripts/report.py", "claims", "--runs", tmp_path / "runs", "--out", out]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.read_text() in result.stdout
    assert "| supported |" in result.stdout
