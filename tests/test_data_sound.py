"""Sound: spectrograms by their formulas, official layouts, files of every kind, one message for what is wrong."""

import csv
import math
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from l2bn.data.sound import LogMel, _slope, esc50, sound_folder, tau2020
from l2bn.data.splits import Images, Splits, make_splits
from l2bn.errors import UserError
from official_formats import esc50 as write_esc50
from official_formats import sound_folder as write_folder
from official_formats import tau2020 as write_tau2020
from test_data_sets import build

SMALL = LogMel(rate=8000, bands=16, fft=512, hop=250, decibels=60.0, deltas=False)  # 0.5 s
RATE, LENGTH = SMALL.rate, SMALL.samples
PARTS = {"train": "train", "test": "test"}


def tone(hertz: float, amplitude: float = 0.5, seconds: float = LENGTH / RATE, rate: int = RATE) -> Any:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def noise(seed: int = 0, length: int = LENGTH) -> Any:
    return np.random.default_rng(seed).normal(0, 0.1, length)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_validation_holds_out_whole_recordings(share: float) -> None:
    """Clips of one recording are alike. 40 recordings of 4 clips, 4 classes."""
    recordings = torch.arange(160) // 4
    labels = recordings % 4
    images = torch.arange(160, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    split = Images(images, labels)
    common: Any = {"label": "Clips", "mean": [0.0] * 3, "std": [1.0] * 3, "validation": share}
    made = make_splits(split, split, 4, 2, groups=recordings, **common)
    trained, held = (set((part.images[:, 0, 0, 0] // 4).tolist()) for part in (made.train, made.test))
    assert not trained & held
    assert len(trained | held) == 40
    assert torch.bincount(made.test.labels).tolist() == [40 * share] * 4


# ---- Spectrograms ---------------------------------------------------------------------------------------------


def mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def hertz(mel: float) -> float:
    return 700 * (10 ** (mel / 2595) - 1)


def triangle(frequency: float, band: int, bands: int, rate: int) -> float:
    """The weight of a frequency in a band, counted from the lowest, by the definition of HTK."""
    low, centre, high = (hertz(mel(rate / 2) * (band + i) / (bands + 1)) for i in range(3))
    if frequency <= centre:
        return max(0.0, (frequency - low) / (centre - low))
    return max(0.0, (high - frequency) / (high - centre))


@pytest.mark.parametrize("spectrogram", [SMALL, LogMel(16000, 128, 2048, 625, 80.0, False)], ids=["small", "esc50"])
def test_filters_are_triangles_on_the_mel_scale(spectrogram: LogMel) -> None:
    bins = range(spectrogram.fft // 2 + 1)
    expected = [
        [triangle(k * spectrogram.rate / spectrogram.fft, band, spectrogram.bands, spectrogram.rate) for k in bins]
        for band in reversed(range(spectrogram.bands))
    ]
    np.testing.assert_allclose(spectrogram.filters, expected, atol=1e-9)


def test_neighbouring_filters_share_each_frequency_out() -> None:
    inside = (SMALL.filters.argmax(1).min(), SMALL.filters.argmax(1).max())  # between the outermost centres
    np.testing.assert_allclose(SMALL.filters.sum(0)[inside[0] + 1 : inside[1]], 1, atol=1e-9)


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 700, LENGTH + 700])
def test_a_pixel_is_the_power_of_its_band_and_frame_in_decibels(length: int) -> None:
    """By the discrete Fourier transform as a matrix."""
    clip = noise(length=length)
    padded = np.zeros(3 * LENGTH)
    padded[LENGTH : LENGTH + min(length, LENGTH)] = clip[:LENGTH]
    n = np.arange(SMALL.fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / SMALL.fft)
    transform = np.exp(-2j * np.pi * np.outer(np.arange(SMALL.fft // 2 + 1), n) / SMALL.fft)
    weights = [
        [triangle(k * RATE / SMALL.fft, band, SMALL.bands, RATE) for k in range(len(transform))]
        for band in reversed(range(SMALL.bands))
    ]
    starts = [LENGTH + frame * SMALL.hop - (SMALL.fft - SMALL.hop) // 2 for frame in range(SMALL.bands)]
    frames = np.stack([window * padded[start : start + SMALL.fft] for start in starts], 1)
    power = np.array(weights) @ np.abs(transform @ frames) ** 2
    with np.errstate(divide="ignore"):
        decibels = 10 * np.log10(power / power.max())
    expected = 255 * np.clip(1 + decibels / SMALL.decibels, 0, 1)
    np.testing.assert_allclose(SMALL(clip)[..., 0], expected, atol=0.5 + 1e-6)


def test_higher_tones_stand_in_higher_rows() -> None:
    rows = [int(SMALL(tone(frequency))[..., 0].mean(1).argmax()) for frequency in (300, 900, 1800, 3500)]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) == 4


@pytest.mark.parametrize("frame", [0, 5, 15])
def test_a_click_is_loudest_in_its_frame(frame: int) -> None:
    clip = np.zeros(LENGTH)
    clip[frame * SMALL.hop + SMALL.hop // 2] = 1
    assert int(SMALL(clip)[..., 0].astype(int).sum(0).argmax()) == frame


def test_a_tone_of_a_hundredth_of_the_amplitude_lies_40_decibels_lower() -> None:
    half = LENGTH // 2
    clip = np.concatenate([tone(1000)[:half], 0.01 * tone(1000)[half:]])
    level = SMALL(clip)[..., 0].max(0)
    assert int(level[3]) == 255
    assert abs(int(level[-4]) - 255 * (1 - 40 / 60)) <= 1


@given(st.sampled_from([2.0**-20, 2.0**-3, 0.37, 5.0]))
def test_the_volume_of_a_clip_changes_nothing(factor: float) -> None:
    pixels = SMALL(noise()).astype(int)
    assert np.abs(SMALL(factor * noise()).astype(int) - pixels).max() <= 1


@pytest.mark.parametrize(
    "clip", [np.zeros(LENGTH), np.zeros(1), np.full(LENGTH, 1e-300)], ids=["long", "short", "tiny"]
)
def test_a_silent_clip_is_finite(clip: Any) -> None:
    assert not SMALL(clip).any()
    channels = LogMel(RATE, 16, 512, 250, 60.0, deltas=True)(clip)
    assert (channels[..., 0] == 0).all()
    assert (channels[..., 1:] == 128).all()


def test_without_deltas_all_channels_are_equal_and_with_them_each_is_the_slope_of_the_one_before() -> None:
    gray = SMALL(noise())
    assert (gray == gray[..., :1]).all()
    channels = LogMel(RATE, 16, 512, 250, 60.0, deltas=True)(noise())
    assert (channels[..., 0] == gray[..., 0]).all()
    for before, after in ((0, 1), (1, 2)):
        expected = 255 * _slope(channels[..., before] / 255)
        np.testing.assert_allclose(channels[..., after], expected, atol=0.5 + 0.5 + 1e-6)  # both are rounded


@given(arrays(np.float64, (3, 12), elements=st.floats(0, 1)))
def test_a_slope_is_that_of_a_least_squares_line_through_five_frames(values: Any) -> None:
    found = _slope(values)
    padded = np.pad(values, ((0, 0), (2, 2)), "edge")
    for row in range(3):
        for frame in range(12):
            line = np.polyfit(np.arange(5), padded[row, frame : frame + 5], 1)[0]
            assert found[row, frame] == pytest.approx(0.5 + line / 0.6, abs=1e-9)
    assert 0 <= found.min() <= found.max() <= 1


def test_a_slope_uses_its_whole_range() -> None:
    up = np.array([[0.0, 0.0, 0.5, 1.0, 1.0]])
    assert _slope(up)[0, 2] == pytest.approx(1)
    assert _slope(1 - up)[0, 2] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hop": 0}, r"hop=0, fft=512: give a hop from 1"),
        ({"hop": 513}, r"hop=513, fft=512: .* no sample is left out"),
        ({"fft": 2**20}, r"fft=1048576: .*at most 65,536"),
        ({"rate": 0}, r"rate=0, .*above 0"),
        ({"decibels": 0.0}, r"decibels=0\.0: .*above 0"),
        ({"decibels": math.inf}, r"decibels=inf: .*above 0"),
        ({"bands": 200}, r"bands=200: too many for fft=512"),
        ({"bands": 0}, r"bands=0: give a number from 1 to 4096"),
    ],
    ids=str,
)
def test_values_that_make_no_spectrogram_are_named(change: dict[str, Any], words: str) -> None:
    values = {"rate": 8000, "bands": 16, "fft": 512, "hop": 250, "decibels": 60.0, "deltas": False}
    with pytest.raises(ValueError, match=words):
        LogMel(**{**values, **change})


# ---- ESC-50 ---------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """ESC-50's layout with 20 clips in folds 2 to 5 and 6 in fold 1, of two classes, one of them of ESC-10."""
    root = tmp_path / "ESC-50, äöü"
    write_esc50(root, {}, 20, 6)
    return root


def read(root: Path, function: Callable[..., Splits] = esc50, **options: Any) -> Any:
    named = {"cache": str(root.parent / "cache"), "label": "sound", **options}
    return function(str(root), **{"spectrogram": SMALL, **named})


def table(root: Path) -> list[dict[str, str]]:
    with (root / "meta" / "esc50.csv").open() as stream:
        return list(csv.DictReader(stream))


def rewrite(root: Path, change: Callable[[list[dict[str, str]]], None]) -> None:
    rows = table(root)
    change(rows)
    with (root / "meta" / "esc50.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("fold", range(1, 6))
def test_one_fold_is_tested_on_and_the_others_are_trained_on(environment: Path, fold: int) -> None:
    splits = read(environment, fold=fold)
    for split, chosen in ((splits.train, False), (splits.test, True)):
        rows = [row for row in table(environment) if (int(row["fold"]) == fold) is chosen]
        assert [splits.classes[label] for label in split.labels.tolist()] == [row["category"] for row in rows]
        for row, image in zip(rows, split.images, strict=True):
            clip, _ = soundfile.read(environment / "audio" / row["filename"])
            assert torch.equal(image, torch.from_numpy(SMALL(clip.astype(np.float32))).permute(2, 0, 1))
    assert (splits.num_classes, splits.image_size) == (2, SMALL.bands)
    assert re.fullmatch(rf"sound, \d+ and \d+ images, fold {fold}", splits.label)


def check_held_out(root: Path, function: Callable[..., Splits], recordings: list[str]) -> None:
    """Validation separates whole recordings, which are given of each training clip."""
    clips = read(root, function).train.images
    owner = {clip.numpy().tobytes(): name for clip, name in zip(clips, recordings, strict=True)}
    splits = read(root, function, validation=0.5)
    trained, held = (
        {owner[clip.numpy().tobytes()] for clip in part.images} for part in (splits.train, splits.test)
    )
    assert trained
    assert held == set(recordings) - trained


def test_validation_holds_out_whole_recordings_of_esc50(environment: Path) -> None:
    def record_in_pairs(rows: list[dict[str, str]]) -> None:
        for number, row in enumerate(rows):
            name = f"{row['fold']}-{number // 4 * 2 + number % 2}-{'AB'[number // 2 % 2]}-{number % 2}.wav"
            (environment / "audio" / row["filename"]).rename(environment / "audio" / name)
            row["filename"] = name

    rewrite(environment, record_in_pairs)
    names = [row["filename"] for row in table(environment) if row["fold"] != "1"]
    check_held_out(environment, esc50, [name.split("-")[1] for name in names])


def test_a_fold_can_be_left_out_of_both_parts(environment: Path) -> None:
    splits = read(environment, fold=2, leave_out=1)
    assert (len(splits.train), len(splits.test)) == (14, 6)
    assert splits.label.endswith("fold 2, trained without fold 1")
    assert len(read(environment, fold=2).train) == 20


def test_clips_are_decoded_once_for_all_folds(environment: Path, decodings: list[int]) -> None:
    first = read(environment, fold=1)
    second = read(environment, fold=2)
    again = read(environment, fold=1)
    assert decodings == [26]
    assert first.fingerprint == again.fingerprint != second.fingerprint
    assert torch.equal(first.train.images, again.train.images)
    read(environment, spectrogram=LogMel(RATE, 16, 512, 250, 40.0, False))
    assert decodings == [26, 26]


def test_a_changed_clip_is_decoded_again_and_changes_the_fingerprint(environment: Path) -> None:
    before = read(environment)
    (file, *_) = sorted((environment / "audio").iterdir())
    soundfile.write(file, tone(440), RATE)
    after = read(environment)
    assert before.fingerprint["files"] != after.fingerprint["files"]
    assert before.fingerprint["pixels"] != after.fingerprint["pixels"]


def test_esc10_is_the_part_that_the_table_marks(environment: Path) -> None:
    rewrite(environment, lambda rows: [row.update(esc10="True") for row in rows])
    rewrite(
        environment, lambda rows: rows.append({**rows[0], "filename": "9.wav", "category": "x", "esc10": "False"})
    )
    splits = read(environment, esc10=True)
    assert splits.classes == ("dog", "rain")
    assert "ESC-10, fold 1" in splits.label


@pytest.mark.parametrize(("function", "write"), [(esc50, write_esc50), (tau2020, write_tau2020)])
def test_recoded_copies_are_found_and_the_label_says_so(tmp_path: Path, function: Any, write: Any) -> None:
    root = tmp_path / "data"
    write(root, {}, 20, 6)
    before = read(root, function)
    for file in list((root / "audio").iterdir()):
        clip, rate = soundfile.read(file)
        soundfile.write(file.with_suffix(".flac"), clip, rate)
        file.unlink()
    after = read(root, function)
    assert torch.equal(before.train.images, after.train.images)
    assert after.label == f"{before.label}, from .flac files"


def test_without_clips_of_esc10_the_table_is_named(environment: Path) -> None:
    rewrite(environment, lambda rows: [row.update(esc10="False") for row in rows])
    with pytest.raises(UserError, match=r"esc50\.csv lists no clips"):
        read(environment, esc10=True)


def test_values_of_the_command_line_are_named_by_their_keys(environment: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.spectrogram: hop=0, fft=2048: give a hop"):
        build("esc50", [f"dataset.root='{environment}'", "dataset.spectrogram.hop=0"])
    with pytest.raises(UserError, match=r"dataset\.augmentation: time=-1: give a number"):
        build("esc50", [f"dataset.root='{environment}'", "dataset.augmentation.time=-1"])


def one_class_in_the_test_fold(root: Path) -> None:
    rewrite(root, lambda rows: [row.update(category="owl") for row in rows if row["fold"] == "1"])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (shutil.rmtree, r"no ESC-50 in .*meta/esc50\.csv and audio/ are looked for.*dataset\.root=FOLDER"),
    "no table": (lambda root: (root / "meta/esc50.csv").unlink(), r"no ESC-50 in .*github\.com/karolpiczak/ESC-50"),
    "no audio": (lambda root: shutil.rmtree(root / "audio"), r"audio cannot be read: No such file"),
    "empty audio": (
        lambda root: [file.unlink() for file in (root / "audio").iterdir()],
        r"audio/.*\.wav, which .*esc50\.csv lists, is missing, as are 25 others",
    ),
    "empty table": (lambda root: (root / "meta/esc50.csv").write_text(""), r"esc50\.csv lists no clips"),
    "binary table": (
        lambda root: (root / "meta/esc50.csv").write_bytes(b"\xff\xfe\x00"),
        r"esc50\.csv cannot be read .*restore it",
    ),
    "another table": (
        lambda root: (root / "meta/esc50.csv").write_text("a,b\n1,2\n"),
        r"line 2: filename cannot be None",
    ),
    "bad fold": (lambda root: rewrite(root, lambda rows: rows[3].update(fold="x")), r"line 5: fold cannot be x"),
    "twice": (
        lambda root: rewrite(root, lambda rows: rows.append({**rows[0], "fold": "3"})),
        r"audio/.*\.wav is listed 2 times",
    ),
    "classes": (
        one_class_in_the_test_fold,
        r"classes differ: the class owl has test images and no training images",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_copy_is_one_message(environment: Path, name: str) -> None:
    damage, words = BROKEN[name]
    damage(environment)
    with pytest.raises(UserError, match=words):
        read(environment)


@pytest.mark.parametrize(
    "folds", [{"fold": 7}, {"fold": 0}, {"leave_out": 6}, {"fold": 2, "leave_out": 2}], ids=str
)
def test_a_fold_that_there_is_not_is_named_with_those_there_are(environment: Path, folds: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"dataset\.fold=.*esc50\.csv has the folds 1, 2, 3, 4, 5; give one"):
        read(environment, **folds)


# ---- TAU and folders ------------------------------------------------------------------------------------------


def test_the_official_split_of_tau(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "TAU"
    write_tau2020(root, {}, 9, 6)
    splits = read(root, tau2020)
    assert "has 13,962 training and 2,968 test images in 10 classes" in caplog.text
    assert splits.classes == ("airport", "bus", "metro")
    assert splits.train.labels.tolist() == [0, 1, 2] * 3
    assert splits.test.labels.tolist() == [0, 1, 2] * 2
    for part, split in (("train", splits.train), ("evaluate", splits.test)):
        lines = (root / "evaluation_setup" / f"fold1_{part}.csv").read_text().splitlines()
        clip, _ = soundfile.read(root / lines[1].split("\t")[0])
        assert torch.equal(split.images[0], torch.from_numpy(SMALL(clip.astype(np.float32))).permute(2, 0, 1))


def test_validation_holds_out_whole_places_of_tau(tmp_path: Path) -> None:
    root = tmp_path / "TAU"
    write_tau2020(root, {}, 24, 6)
    names = (root / "evaluation_setup" / "fold1_train.csv").read_text().splitlines()[1:]
    check_held_out(root, tau2020, [name.rpartition("-")[0].rpartition("-")[0] for name in names])


def test_a_broken_tau_is_one_message(tmp_path: Path) -> None:
    root = tmp_path / "TAU"
    write_tau2020(root, {}, 9, 6)
    setup = root / "evaluation_setup"
    train, evaluate = (setup / f"fold1_{part}.csv" for part in ("train", "evaluate"))
    content = evaluate.read_text()
    evaluate.write_text(train.read_text())
    with pytest.raises(UserError, match=r"is listed 2 times in .*evaluation_setup"):
        read(root, tau2020)
    evaluate.write_text(content.replace("\tbus", "\ttram"))
    with pytest.raises(UserError, match=r"classes differ: the class tram"):
        read(root, tau2020)
    evaluate.write_text(content.replace("\t", ","))
    with pytest.raises(UserError, match=r"fold1_evaluate\.csv, line 2: filename cannot be None"):
        read(root, tau2020)
    evaluate.unlink()
    with pytest.raises(UserError, match=r"no TAU .* in .*evaluation_setup/fold1_evaluate\.csv and audio/"):
        read(root, tau2020)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "my sounds, äöü"
    write_folder(root, PARTS, 8, 4)
    return root


def test_a_folder_of_sounds_is_read_by_class(tree: Path) -> None:
    splits = read(tree, sound_folder, label=None)
    assert splits.classes == ("cat", "dog")
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 4
    assert splits.label == tree.name
    held_out = read(tree, sound_folder, test="train", validation=0.5)
    assert (len(held_out.train), len(held_out.test)) == (4, 4)


def test_sounds_of_all_kinds_are_found_and_the_rest_is_counted(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tree / "train" / "cat"
    for suffix in (".flac", ".ogg", ".opus", ".mp3", ".WAV"):
        write_kind(place / f"new{suffix}", noise(length=8000))
    (place / "notes.txt").write_text("")
    assert len(read(tree, sound_folder).train) == 13
    assert "left out: 1 .txt" in caplog.text


def test_a_folder_without_sounds_is_named(tree: Path) -> None:
    (tree / "train" / "cow").mkdir()
    with pytest.raises(UserError, match=r"no sound files in .*/train/cow: files ending in \.wav, \.flac"):
        read(tree, sound_folder)
    (tree / "train" / "cow").rmdir()
    shutil.rmtree(tree / "test" / "cat")
    with pytest.raises(UserError, match=r"classes differ: cat in .*/train but not in .*/test"):
        read(tree, sound_folder)


# ---- Files ----------------------------------------------------------------------------------------------------


def write_kind(path: Path, clip: Any, rate: int = RATE) -> None:
    kinds = {".ogg": ("OGG", "VORBIS"), ".opus": ("OGG", "OPUS"), ".mp3": ("MP3", None)}
    kind, coding = kinds.get(path.suffix.lower(), (path.suffix[1:].upper(), None))
    soundfile.write(path, clip, rate, format=kind, subtype=coding)


def only(root: Path, clip: Any, name: str = "clip.wav", rate: int = RATE, **options: Any) -> torch.Tensor:
    """Write a clip as the only training file of a class and return its spectrogram."""
    for file in (root / "train" / "cat").iterdir():
        file.unlink()
    if options:
        soundfile.write(root / "train" / "cat" / name, clip, rate, **options)
    else:
        write_kind(root / "train" / "cat" / name, clip, rate)
    return read(root, sound_folder).train.images[0, 0].float()


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.opus", "a.mp3"])
def test_every_kind_of_file_gives_the_same_spectrogram(tree: Path, name: str) -> None:
    clip = tone(440) + tone(1500, 0.25)
    difference = only(tree, clip, name) - only(tree, clip)
    loud = only(tree, clip) > 200
    assert loud.any()
    assert difference[loud].abs().mean() < (0.01 if name == "a.flac" else 4)  # the others code with loss


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_depth_of_samples_gives_the_same_spectrogram(tree: Path, subtype: str) -> None:
    difference = only(tree, noise(), subtype=subtype) - only(tree, noise())
    assert difference.abs().mean() < 4


def test_channels_are_averaged(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    left, right = noise(1), noise(2)
    both = only(tree, np.stack([left, right], 1), subtype="FLOAT")
    assert "1 of several channels, averaged" in caplog.text
    assert torch.equal(both, only(tree, (left.astype(np.float32) + right.astype(np.float32)) / 2, subtype="FLOAT"))


@pytest.mark.parametrize("rate", [4000, 11025, 16000, 44100, 48000])
def test_another_rate_is_resampled_and_said_in_every_run(
    tree: Path, rate: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = only(tree, tone(700, rate=rate) + tone(1200, 0.3, rate=rate), rate=rate, subtype="FLOAT")
    line = f"1 resampled from {rate:,} to 8,000 Hz"
    assert line in caplog.text
    caplog.clear()
    read(tree, sound_folder)
    assert line in caplog.text
    expected = only(tree, tone(700) + tone(1200, 0.3), subtype="FLOAT")
    loud = expected > 150
    assert (found - expected)[loud].abs().mean() < 3


def test_a_short_clip_is_padded_and_a_long_one_cropped_and_both_are_said(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    short = only(tree, noise()[: LENGTH // 2])
    assert "1 shorter than 0.5 s, padded with silence" in caplog.text
    assert short[:, : SMALL.bands // 2 - 1].mean() > 100
    assert not short[:, SMALL.bands // 2 + 1 :].any()
    long = only(tree, noise(length=3 * LENGTH), subtype="FLOAT")
    assert "1 longer than 0.5 s, the rest left out" in caplog.text
    assert torch.equal(long, only(tree, noise(length=3 * LENGTH)[:LENGTH], subtype="FLOAT"))


def test_clips_as_they_should_be_are_not_mentioned(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for seed, file in enumerate(tree.rglob("*.wav")):
        soundfile.write(file, noise(seed), RATE)
    read(tree, sound_folder)
    assert not caplog.records


def cut(file: Path, share: int = 2) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // share])


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut": ("x.wav", cut, "was cut short"),
    "cut flac": ("x.flac", cut, "(was cut short|cannot be decoded)"),
    "cut ogg": ("x.ogg", cut, "was cut short"),
    "cut opus": ("x.opus", cut, "(was cut short|cannot be decoded)"),
    "cut mp3": ("x.mp3", lambda file: cut(file, 6), "was cut short"),
    "text": ("x.wav", lambda file: file.write_text("no sound"), "cannot be decoded"),
    "empty": ("x.flac", lambda file: file.write_bytes(b""), "cannot be decoded"),
    "no samples": ("x.wav", lambda file: soundfile.write(file, np.zeros(0), RATE), "holds no samples"),
    "not finite": (
        "x.wav",
        lambda file: soundfile.write(file, np.full(LENGTH, np.nan), RATE, subtype="FLOAT"),
        "holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_and_nothing_is_kept(tree: Path, name: str) -> None:
    file_name, damage, words = DAMAGE[name]
    file = tree / "train" / "dog" / file_name
    write_kind(file, noise(length=5 * RATE))
    damage(file)
    with pytest.raises(UserError, match=words) as caught:
        read(tree, sound_folder)
    assert str(file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tree.parent.glob("cache/*"))


@pytest.mark.slow
def test_the_real_esc50_is_whole(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "esc50-16k.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    spectrogram = LogMel(16000, 32, 4096, 2500, 80.0, False)
    splits = read(tmp_path / "esc50", spectrogram=spectrogram, label="ESC-50")
    assert (len(splits.train), len(splits.test), splits.num_classes) == (1600, 400, 50)
    assert splits.label == "ESC-50, fold 1, from .opus files"
    assert {len(set(split.labels.tolist())) for split in (splits.train, splits.test)} == {50}
