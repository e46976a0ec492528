"""Published records stay those of today's configurations: identities, hashes and cells."""

from collections import defaultdict
from pathlib import Path

import pytest

from conftest import ROOT
from l2bn.records import SUMMARY, Record
from l2bn.reporting.evidence import overrides
from l2bn.training.plan import composing, hash_identity
from l2bn.training.sweep import compose_sweep, plan_sweep

RECORDS = [Record.read(path.parent) for path in sorted((ROOT / "results").rglob(SUMMARY))]
assert len(RECORDS) > 100

CELLS: dict[Path, list[Record]] = defaultdict(list)
for _record in RECORDS:
    CELLS[_record.folder.parent.relative_to(ROOT / "results")].append(_record)


def command(record: Record) -> list[str]:
    """The overrides that the names of a record's cell stand for, without the seed."""
    given = [f"compute.precision={record.precision}", "++dataset.root=FOLDER"]
    for group in ("dataset", "backbone", "norm", "recipe"):
        name = getattr(record, group)
        given.append(f"{group}={name.partition(',')[0]}")
        given += [f"{group}.{key}={value}" for key, value in overrides(name).items()]
    return given


def test_a_hash_is_that_of_the_records_identity() -> None:
    assert [record.folder for record in RECORDS if hash_identity(record.identity) != record.hash] == []


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_todays_configurations_give_the_published_hashes(cell: Path) -> None:
    records = CELLS[cell]
    seeds = ",".join(str(record.seed) for record in records)
    with composing():
        runs = plan_sweep(compose_sweep([*command(records[0]), f"seed={seeds}"]))
    assert [str(run.cell) for run in runs] == [
        f"{r.dataset}/{r.backbone}/{r.norm}/{r.recipe}/seed{r.seed}" for r in records
    ]
    assert [run.hash for run in runs] == [record.hash for record in records]
