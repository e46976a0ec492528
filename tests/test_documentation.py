"""The documents: their links lead somewhere, the commands they name exist, and what they promise is tested."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra._internal.utils import get_args_parser
from hydra.types import RunMode
from PIL import Image

from conftest import ROOT, composed
from l2bn.reporting.tables import BEGIN, END
from l2bn.training.plan import compose_sweep, composing, plan_run, plan_sweep
from synthetic_records import write_pairs, write_run

DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "runs", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)
assert len(DOCUMENTS) >= 3


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(path: Path) -> None:
    """Those with a place in a document, to one of its headings."""
    links = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)", path.read_text())
    missing = []
    for file, place in links:
        target = path.parent / file if file else path
        if "://" not in file and not (target.exists() and (not place or place in places(target))):
            missing.append((file, place))
    assert missing == []


def places(document: Path) -> set[str]:
    """The names by which GitHub links to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_make_alone_prints_every_target_with_a_line() -> None:
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in printed.splitlines()[1:]}
    assert set(phony[1].split()) - {"help"} <= shown.keys()
    assert all(shown.values())


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("cifar-resnet-l2bn", "dataset=cifar10 backbone=resnet20 norm=l2bn"),
        ("cifar10-resnet56-bn", "dataset=cifar10 backbone=resnet56 norm=bn"),
        ("digits-vgg-l2bn_rms", "dataset=digits backbone=vgg16 norm=l2bn_rms"),
    ],
)
def test_a_run_is_named_by_its_parts(target: str, command: str) -> None:
    make = ["make", "--dry-run", target, "ARGS=recipe=step_200 seed=3"]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"python scripts/train.py {command} recipe=step_200 seed=3" in printed


def test_a_target_that_is_none_says_so() -> None:
    done = subprocess.run(["make", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no target 'nonsense'" in done.stdout


# Every command that the documents name: of the scripts that compose a configuration, all runs are composed.

OWN = "Your own images, network and norm"
SOURCES = [*ROOT.glob("*.md"), *ROOT.glob("results/**/*.md"), *ROOT.glob("configs/**/*.yaml")]
SOURCES += [*ROOT.glob("scripts/*.py"), ROOT / "Makefile"]


def documented() -> dict[tuple[str, str], str]:
    """The script and the arguments of each command, and the document that names it."""
    found = {}
    for path in SOURCES:
        text = re.sub(r"\\\n#?\s*", "", path.read_text())
        for script, line in re.findall(r"python scripts/(\w+)\.py([^`\n]*)", text):
            arguments = re.split(r" {3}| #| \(| \||\.?\"|\.$|, |: |\$", line)[0].strip()
            # The folder "mine" and completion (-sc) have tests below; make fills in $(...).
            if not {"mine", "-sc"} & set(arguments.split()) and "$(" not in line:
                found[script, arguments] = path.relative_to(ROOT).as_posix()
    return found


COMMANDS = documented()
assert sum(script == "train" for script, _ in COMMANDS) > 60


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        pytest.param(*command, marks=pytest.mark.slow if "experiment" in command[1] else (), id=" ".join(command))
        for command in COMMANDS
    ],
)
def test_a_documented_command_is_accepted(script: str, arguments: str) -> None:
    source = (ROOT / "scripts" / f"{script}.py").read_text()
    words = shlex.split(arguments)
    options = {word for word in words if word.startswith("--")}
    if script == "train":
        options -= {option for action in get_args_parser()._actions for option in action.option_strings}
    assert all(f'"{option}"' in source or script == "benchmark" for option in options)
    if script not in ("train", "status", "fetch_data"):
        return  # composes no configuration
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    if script == "status" and "--experiment" in words:
        overrides.append(f"experiment={words[words.index('--experiment') + 1]}")
    if script == "fetch_data":
        overrides.append(f"dataset={words[0]}")
    with composing(overrides) as (composer, rest):
        sweep = script == "status" or "-m" in words or composer.get_mode("train", rest) == RunMode.MULTIRUN
        if script == "fetch_data":
            composed(rest)
        elif sweep:
            assert plan_sweep(compose_sweep(rest))
        else:
            plan_run(*composed(rest))


# The blocks of the README that are there to be pasted, each run as it stands.


def paste(block: str, folder: Path) -> str:
    """Run a block in a folder with a link to the scripts, by this environment's Python; return what it prints."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    block = block.replace("PYTHONPATH=mine", "PYTHONPATH=mine:$PYTHONPATH")
    done = subprocess.run(
        ["bash", "-e", "-c", block], cwd=folder, capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_readmes_own_network_and_norm_train_from_outside_the_repository(tmp_path: Path) -> None:
    (block,) = re.findall(r"```sh\n(mkdir -p mine.*?)```", section(OWN), re.DOTALL)
    printed = paste(block, tmp_path)
    assert "sweep: 3 finished" in printed
    assert re.search(r"tiny\W+clipped_bn", printed)


@pytest.mark.slow
def test_the_readmes_own_images_train_a_pair(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 70), ("test", 5)):
        for shade, name in ((60, "dark"), (180, "light")):
            folder = tmp_path / "flowers" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(shade - 50, shade + 50, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (block,) = re.findall(
        r"```sh\n(python scripts/train.py -m dataset=image_folder.*?)```", section(OWN), re.DOTALL
    )
    printed = paste(block.replace("FOLDER", "flowers"), tmp_path)
    assert "sweep: 6 finished" in printed
    assert re.search(r"flowers.*resnet20.*short", printed)
    assert re.search(r"^l2bn +\d+\.\d+ ", printed, re.MULTILINE)


def test_the_readmes_swap_replaces_the_layers_that_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", section("L2BN in your own model"), re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out == "20 layers swapped\n"


def test_names_are_completed_in_bash(tmp_path: Path) -> None:
    """The README's line, and what it offers for the beginning of a command."""
    (line,) = re.findall(r"`(eval .*?)`", section("A sweep, from start to table"))
    command = "python scripts/train.py norm=l2bn_r"
    pressed_tab = f'COMP_LINE="{command}" COMP_POINT={len(command)} COMP_CWORD=2; hydra_bash_completion'
    assert "norm=l2bn_rms" in paste(f'set +e; {line}; {pressed_tab}; echo "${{COMPREPLY[@]}}"', tmp_path)


# Each line of "What happens when..." in results/README.md, and the tests that show it.
PROMISES_ON_IMAGES: dict[str, list[str]] = {
    "a folder of images holds hidden or system folders, links or other files": [
        "test_data_folder.test_what_systems_leave_behind_is_passed_over_at_every_depth",
        "test_data_folder.test_links_that_lead_back_multiply_nothing",
        "test_data_folder.test_what_is_left_out_is_counted_in_one_line",
        "test_data_folder.test_a_folder_that_cannot_be_listed_is_named",
        "test_data_folder.test_a_link_to_a_folder_that_is_not_there_is_named",
        "test_data_imagenet.test_what_systems_leave_in_a_flat_validation_folder_is_passed_over",
    ],
    "files change behind a cache, or nothing can be cached": [
        "test_data_folder.test_files_that_change_places_are_noticed",
        "test_data_folder.test_a_cache_that_cannot_be_written_costs_no_run",
        "test_data_folder.test_a_full_disk_costs_no_run_and_leaves_nothing",
    ],
    "a published data set is incomplete or changed": [
        "test_data_cifar.test_other_files_are_said_in_the_label_and_have_no_baseline",
        "test_data_fashion_mnist.test_other_files_of_these_names_are_said_in_the_label_and_have_no_baseline",
        "test_data_splits.test_a_published_set_that_is_not_whole_says_so_in_its_label_and_has_no_baseline",
    ],
    "shards repeat a key, hold other files, or are in the order of classes": [
        "test_data_imagenet_wds.test_a_shard_that_holds_no_samples_is_named",
        "test_data_imagenet_wds.test_members_that_are_no_samples_are_passed_over",
        "test_data_imagenet_wds.test_batches_of_shards_in_the_order_of_classes_hold_all_classes",
    ],
    "an image has more than 8 bits a channel (PNG, TIFF, PGM), or a transparent colour": [
        "test_data_decode.test_more_than_eight_bits_a_channel_are_refused",
        "test_data_decode.test_a_transparent_colour_shows_white",
    ],
    "training and test folder are one, there is one class, a class is never trained": [
        "test_data_folder.test_a_link_from_test_to_train_is_refused",
        "test_data_imagenet.test_training_images_by_another_name_are_no_test_images",
        "test_data_folder.test_a_single_class_is_refused_with_the_folder_that_may_be_meant",
        "test_data_loader.test_labels_outside_the_classes_and_images_of_another_size_are_refused",
        "test_data_imagenet_wds.test_classes_without_training_images_are_refused",
        "test_data_splits.test_a_class_without_training_images_is_refused",
    ],
    "`subset` or `validation` leaves a class that is tested without training images": [
        "test_data_sets.test_a_data_set_offers_subset_and_validation",
    ],
    "zeros stand for the rest of a download (JPEG, PNG, WebP, AVIF); a shard is cut, damaged or several in one": [
        "test_data_decode.test_a_download_that_was_broken_off_is_named",
        "test_data_imagenet_wds.test_a_truncated_shard_is_named",
        "test_data_imagenet_wds.test_a_damaged_shard_loses_no_samples_in_silence",
    ],
    "a photograph is stored lying, with an EXIF orientation": [
        "test_data_decode.test_a_photograph_is_turned_as_its_camera_says_where_that_is_asked",
    ],
    "a folder of CIFAR-100 has other pixels than the official files (re-encoded, resized)": [
        "test_fingerprint.test_other_pixels_than_the_official_ones_have_no_published_accuracy",
    ],
    "clips of one recording (ESC-50) or place (TAU) are alike": [
        "test_data_sound.test_validation_holds_out_whole_recordings",
        "test_data_sound.test_validation_holds_out_whole_recordings_of_esc50",
        "test_data_sound.test_validation_holds_out_whole_places_of_tau",
    ],
    "test images are copies of training images": [
        "test_data_splits.test_test_images_that_are_training_images_are_counted_in_the_label",
    ],
    "a sound file has another rate, several channels, another length": [
        "test_data_sound.test_another_rate_is_resampled_and_said_in_every_run",
        "test_data_sound.test_channels_are_averaged",
        "test_data_sound.test_a_short_clip_is_padded_and_a_long_one_cropped_and_both_are_said",
    ],
    "a sound file is silent; damaged, cut short, not finite": [
        "test_data_sound.test_a_silent_clip_is_finite",
        "test_data_sound.test_a_damaged_file_is_named_and_nothing_is_kept",
    ],
}
PROMISES: dict[str, list[str]] = {
    "SIGKILL, a power cut, a crash, a clock that jumps": [
        "test_faults.test_a_clock_that_jumps",
        "test_kill.test_many_kills",
        "test_crash.test_a_kill_while_the_journal_is_written",
        "test_crash.test_a_kill_at_every_place",
        "test_checkpoint.test_a_file_is_on_the_disk_before_it_has_its_name",
        "test_training.test_checkpoints_are_written_when_they_are_due",
        "test_journal.test_a_resumed_run_is_drawn_once",
    ],
    "Ctrl-C, SIGTERM or another request to stop": [
        "test_interruption.test_every_signal_that_asks_a_process_to_stop_is_noted",
        "test_interruption.test_a_signal_ends_the_run_in_good_order",
        "test_interruption.test_all_processes_of_a_run_stop_at_one_update",
        "test_interruption.test_a_scheduler_may_tell_all_processes_of_a_run",
        "test_interruption.test_a_handler_that_was_there_before_is_called_after_the_checkpoint",
        "test_interruption.test_a_second_signal_ends_the_run_at_once",
        "test_interruption.test_a_signal_in_an_evaluation_stops_the_run_there",
        "test_interruption.test_a_signal_at_the_end_of_the_last_evaluation_stops_the_sweep_behind_it",
        "test_training.test_a_resumed_run_equals_the_uninterrupted_one",
    ],
    "stdout or stderr cannot be written": [
        "test_faults.test_output_that_cannot_be_written_ends_no_run",
        "test_sweep.test_a_sweep_whose_output_nobody_reads_goes_on",
        "test_interruption.test_ctrl_c_ends_a_command_whose_reader_it_has_ended_too",
    ],
    "a command is started as several copies (torchrun, mpirun, srun)": [
        "test_interruption.test_copies_of_a_command_are_refused_with_one_hint",
        "test_interruption.test_which_commands_are_copies",
    ],
    "one of several runs side by side dies": [
        "test_sweep.test_how_each_process_has_ended_is_told",
        "test_sweep.test_a_run_that_is_killed_takes_no_other_with_it",
        "test_sweep.test_a_cluster_job_that_dies_fails_alone",
    ],
    "a file of the run is damaged": [
        "test_damage.test_a_damaged_newest_checkpoint",
        "test_damage.test_a_checkpoint_that_cannot_be_read",
        "test_checkpoint.test_where_all_are_damaged_they_are_named_and_kept",
        "test_checkpoint.test_after_a_fallback_two_whole_ones_are_kept",
        "test_journal.test_half_a_line_is_made_whole",
        "test_damage.test_a_damaged_list_of_starts_is_begun_anew",
        "test_damage.test_a_damaged_configuration_is_named",
        "test_damage.test_a_damaged_summary_is_named",
    ],
    "a second process starts the same run": [
        "test_interruption.test_a_second_process_leaves_the_run_to_the_first",
        "test_interruption.test_the_lock_dies_with_its_process",
        "test_interruption.test_the_processes_of_a_run_die_with_it",
        "test_interruption.test_what_is_locked_is_a_file",
        "test_interruption.test_a_file_system_without_locks_is_named",
    ],
    "the disk is full, the folder read-only or deleted, memory runs out, a process of the run is killed": [
        "test_faults.test_a_full_disk",
        "test_faults.test_a_full_disk_before_the_run",
        "test_faults.test_a_full_disk_under_the_cache_of_images",
        "test_faults.test_a_folder_made_read_only",
        "test_faults.test_a_disk_that_is_read_only_at_the_next_start",
        "test_faults.test_a_folder_deleted_under_the_run",
        "test_faults.test_a_device_out_of_memory",
        "test_checkpoint.test_a_device_that_is_full_is_no_damage",
        "test_faults.test_every_out_of_memory_error_is_recognized",
        "test_faults.test_a_data_worker_that_is_killed",
        "test_interruption.test_a_process_of_a_run_that_is_killed_ends_the_run",
    ],
    "an image is damaged or gone in the middle of training": [
        "test_faults.test_an_image_that_is_damaged_under_the_run"
    ],
    "the images of a run are other ones than at its start": [
        "test_fingerprint.test_a_run_on_other_images_is_refused_until_its_own_are_back",
        "test_fingerprint.test_a_sweep_over_other_images_is_refused_before_it_starts",
        "test_fingerprint.test_equal_files_that_decode_to_other_pixels_are_warned_of",
        "test_fingerprint.test_runs_on_other_images_are_not_published_beside_one_another",
    ],
    "the code changes between two starts of a run": [
        "test_environment.test_a_run_that_goes_on_with_other_code_is_warned_of",
        "test_own_parts.test_other_code_of_an_ended_run_is_told",
        "test_tables.test_runs_of_several_versions_of_a_users_own_code_are_noted",
        "test_environment.test_changed_files_and_untracked_source_are_dirty",
        "test_environment.test_nothing_is_said_of_a_commit_where_none_is_known",
        "test_environment.test_of_a_start_that_left_nothing_nothing_is_said",
        "test_environment.test_what_is_edited_after_the_import_is_no_code_of_the_process",
        "test_own_parts.test_the_code_of_a_run_is_that_which_was_imported",
    ],
    "loss, weights or running statistics are no longer finite": [
        "test_divergence.test_a_learning_rate_that_is_too_high",
        "test_divergence.test_weights_that_are_not_finite",
        "test_divergence.test_a_running_statistic_that_training_does_not_read",
        "test_divergence.test_a_weight_that_reaches_no_loss",
        "test_divergence.test_the_last_update_of_a_run",
        "test_divergence.test_a_test_loss_that_overflows",
    ],
    "the folder holds a run of another identity or another version": [
        "test_damage.test_another_identity_in_the_same_folder_is_refused",
        "test_damage.test_a_checkpoint_of_another_run_is_refused",
        "test_damage.test_a_checkpoint_of_another_version_is_refused",
    ],
    "a value, a key, a name is wrong, or fits only some runs of a sweep": [
        "test_bad_input.test_a_wrong_configuration_is_named",
        "test_bad_input.test_as_a_command_too_it_leaves_one_message_and_no_folder",
        "test_commands.test_a_mistake_that_hydra_meets_is_one_message_too",
        "test_commands.test_a_wrong_argument_is_named",
        "test_plan.test_a_value_that_does_not_fit_a_job_is_refused_with_the_job",
        "test_plan.test_an_experiment_takes_the_values_of_its_own_choices",
        "test_plan.test_each_job_equals_the_one_of_hydras_own_sweeper",
        "test_plan.test_jobs_that_would_share_a_folder_are_refused",
    ],
    "a network, a norm or a data set of your own does what cannot be trained": [
        "test_own_parts.test_what_cannot_be_trained_is_one_message",
        "test_data_loader.test_samples_that_are_not_what_a_split_gives_are_refused",
        "test_data_loader.test_labels_outside_the_classes_and_images_of_another_size_are_refused",
    ],
    "a YAML file is edited, broken or hidden": [
        "test_plan.test_an_edit_of_a_yaml_file_reaches_no_job_of_a_planned_sweep",
        "test_plan.test_hidden_and_unfinished_files_stop_no_run_that_does_not_use_them",
    ],
    "the number of epochs of a finished run is changed": ["test_plan.test_a_longer_run_says_that_it_starts_again"],
    "somebody's record is replayed or published": [
        "test_replay.test_a_malicious_record_runs_nothing",
        "test_replay.test_a_yaml_that_would_make_objects_makes_none",
        "test_security.test_a_record_cannot_ask_for_the_environment",
        "test_security.test_a_record_cannot_say_where_to_read_and_write",
        "test_security.test_a_record_cannot_say_so_in_a_nested_place",
        "test_security.test_a_record_cannot_lead_out_of_its_data_sets_folder",
        "test_security.test_a_record_cannot_say_where_it_is_published",
        "test_checkpoint.test_a_pickle_that_would_run_code_is_refused",
        "test_data_cifar.test_a_payload_is_refused_and_not_executed",
        "test_data_archive.test_an_archive_that_would_write_outside_its_folder_is_refused",
    ],
}


def section(title: str, document: str = "README.md") -> str:
    return (ROOT / document).read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_readmes_notebook_block_pairs_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / "results").symlink_to(ROOT / "results")
    (block,) = re.findall(r"```python\n(.*?)```", section("A sweep, from start to table"), re.DOTALL)
    assert len(block.splitlines()) <= 25
    exec(block, {})
    assert "cifar10_jpeg" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_readmes_notebook_block_pairs_finished_runs_of_one_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tables do: neither a run that diverged nor one of another setting enters a difference or a curve."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cell: dict[str, Any] = {"dataset": "cifar10_jpeg", "recipe": "short", "epochs": 5}
    root = tmp_path / "results/records"
    write_pairs(root, [60.0, 61.0], [1.0, 2.0], curve=5, **cell)
    write_run(root, norm="bn", seed=2, accuracy=60.0, curve=5, **cell)
    write_run(root, norm="l2bn", seed=2, accuracy=10.0, status="diverged", curve=3, **cell)
    for name, other in (("half", {"precision": "bf16-mixed"}), ("many", {"identity": {"devices": 8}})):
        write_pairs(root / name, [20.0, 20.0], [9.0, 9.0], curve=5, **cell, **other)
    (block,) = re.findall(r"```python\n(.*?)```", section("A sweep, from start to table"), re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)
    differences = found["difference"].groupby("setting").agg(list).to_dict()
    assert differences == {"32-true": [1.0, 2.0], "32-true, 8 devices": [9.0, 9.0], "bf16-mixed": [9.0, 9.0]}
    last = found["curves"].unstack().loc[5]
    assert last.to_dict() == {"bn": pytest.approx(181 / 3), "l2bn": 62.0}


def test_the_readme_is_short() -> None:
    """The order of a reader's questions, in 240 lines beside the answer that is made from records."""
    before, _, rest = (ROOT / "README.md").read_text().partition(BEGIN)
    assert len((before + rest.partition(END)[2]).splitlines()) <= 240


@pytest.mark.parametrize(
    ("text", "promises"),
    [
        (section("What happens when...", "results/README.md"), PROMISES),
        (section("What happens with images when...", "results/README.md"), PROMISES_ON_IMAGES),
    ],
)
def test_what_the_documents_promise_is_tested(text: str, promises: dict[str, list[str]]) -> None:
    rows = re.findall(r"^\| (.*?) \| .* \|$", text, re.MULTILINE)
    assert rows[0] == "when..."
    assert rows[1:] == list(promises)
    for test in chain(*promises.values()):
        module, _, name = test.partition(".")
        assert name.startswith("test_")
        assert callable(getattr(import_module(module), name)), test


# Part to the parts that it may import, and does.
IMPORTS: dict[str, set[str]] = {
    "kernels": set(),
    "backbones": set(),
    "data": set(),
    "norms": {"kernels"},
    "analysis": set(),
    "reporting": set(),
    "training": {"analysis", "backbones", "data", "kernels", "norms"},
}


def imports(part: str, within: Callable[[ast.Module], Iterable[ast.AST]] = ast.walk) -> set[str]:
    """The modules that a part of the package imports, and the names that it takes from them."""
    found: set[str] = set()
    for path in (ROOT / "src" / part).rglob("*.py"):
        for node in within(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_one_way() -> None:
    """As CONTRIBUTING.md says. The tables need no torch, which takes seconds."""
    parts = {path.name for path in (ROOT / "src/l2bn").iterdir() if path.is_dir()}
    for part, others in IMPORTS.items():
        found = {name.split(".")[1] for name in imports(f"l2bn/{part}") if name.startswith("l2bn.")}
        assert found & parts - {part} == others, part
    assert "torch" not in {name.split(".")[0] for name in imports("l2bn/reporting", lambda tree: tree.body)}
    scripts = {"scripts", *(path.stem for path in (ROOT / "scripts").glob("*.py"))}
    assert not scripts & {name.split(".")[0] for name in imports(".")}
