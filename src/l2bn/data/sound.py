"""Sound as images: log-mel spectrograms, computed once and kept as the uint8 pixels of squares.

soundfile reads the clips (WAV, FLAC, Ogg Vorbis, Opus, MP3). The mel filters are NumPy: torchaudio is in its
maintenance phase, and its last release, 2.11, is older than the torch of this project, 2.15; librosa is well
kept but brings 13 packages, numba and llvmlite (195 MB) among them, for the ten lines of `LogMel.filters`.

Letters: H mel bands and as many frames, the rows and columns of an image; T samples of a clip; N clips.
"""

import csv
import io
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import compress
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.signal import get_window, resample_poly
from torch import Tensor

from l2bn.data.cache import content_of
from l2bn.data.folder import Decoded, FileType, Tree, decode_tree, scan, split_folder
from l2bn.data.splits import LARGEST_IMAGE, PUBLISHED, Common, Splits, digest, make_splits
from l2bn.errors import UserError, expand

log = logging.getLogger(__name__)

SOUND = FileType("sound files", (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"))
LONGEST_WINDOW = 2**16  # samples

Values = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]


# ---- Spectrograms ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogMel:
    """The spectrogram of a clip: power in mel bands, in decibels below the clip's loudest value.

    A clip is cut to `bands` x `hop` samples, or padded with silence, so that it has as many frames as bands. A
    frame is a Hann window of `fft` samples around the middle of its hop. The bands are triangles of height 1 on
    HTK's mel scale, 2595 log10(1 + f / 700), from 0 to half the rate; row 0 is the highest. A pixel is 255 at the
    clip's loudest value and 0 at `decibels` below it; a silent clip is 0 everywhere, and has no slopes.

    rate: in Hz; clips of another rate are resampled. deltas: the second and third channel are the slopes in time
    of the channel before them, by least squares over five frames, where 127.5 is no slope; else all are equal.
    """

    rate: int
    bands: int
    fft: int
    hop: int
    decibels: float
    deltas: bool

    def __post_init__(self) -> None:
        if not 1 <= self.bands <= LARGEST_IMAGE:
            raise ValueError(f"bands={self.bands}: give a number from 1 to {LARGEST_IMAGE}")
        if not 1 <= self.hop <= self.fft <= LONGEST_WINDOW:
            raise ValueError(
                f"hop={self.hop}, fft={self.fft}: give a hop from 1 to the length of the window, so that no sample "
                f"is left out, and a window of at most {LONGEST_WINDOW:,} samples"
            )
        if self.rate < 1 or not 0 < self.decibels < math.inf:
            raise ValueError(f"rate={self.rate}, decibels={self.decibels}: give numbers above 0")
        if not self.filters.any(1).all():
            raise ValueError(f"bands={self.bands}: too many for fft={self.fft}, some hold no frequency; give fewer")

    @property
    def samples(self) -> int:
        """The length of a clip."""
        return self.bands * self.hop

    @cached_property
    def filters(self) -> Values:
        """(H, fft // 2 + 1): the weight of each frequency in each band."""
        top = math.log1p(self.rate / 2 / 700)
        edges = 700 * np.expm1(np.linspace(top, 0, self.bands + 2))[:, None]  # equally far apart in mel
        above, centre, below = edges[:-2], edges[1:-1], edges[2:]
        frequency = np.fft.rfftfreq(self.fft, 1 / self.rate)
        return np.minimum((above - frequency) / (above - centre), (frequency - below) / (centre - below)).clip(0)

    def __call__(self, samples: Values) -> Pixels:
        """(T,) -> (H, H, 3)."""
        clip = samples[: self.samples].astype(np.float64)
        around = self.fft - self.hop
        clip = np.pad(clip, (around // 2, self.samples - len(clip) + around - around // 2))
        frames = sliding_window_view(clip, self.fft)[:: self.hop] * get_window("hann", self.fft)
        power = self.filters @ np.abs(np.fft.rfft(frames).T) ** 2
        floor = power.max() * 10 ** (-self.decibels / 10)
        level = np.log10(np.maximum(power, floor) / floor) * 10 / self.decibels if floor else np.zeros_like(power)
        first = _slope(level) if self.deltas else level
        second = _slope(first) if self.deltas else level
        return np.rint(255 * np.stack([level, first, second], 2)).astype(np.uint8)


def _slope(values: Values) -> Values:
    """The slope in time of (H, H) values in [0, 1], in [0, 1] where 1/2 is none; the values at the ends repeat."""
    five = sliding_window_view(np.pad(values, ((0, 0), (2, 2)), "edge"), 5, axis=1)  # (H, H, 5)
    return 0.5 + five @ np.array([-2, -1, 0, 1, 2]) / 6  # the sum lies in [-3, 3]


# ---- Data sets ------------------------------------------------------------------------------------------------


def esc50(
    root: str,
    spectrogram: LogMel,
    fold: int = 1,
    leave_out: int | None = None,
    esc10: bool = False,
    cache: str | None = None,
    **common: Unpack[Common],
) -> Splits:
    """ESC-50 in its official layout, `root`/meta/esc50.csv and `root`/audio/*.wav; one fold is the test set.

    K. J. Piczak, "ESC: Dataset for Environmental Sound Classification", ACM Multimedia 2015,
    doi:10.1145/2733373.2806390. Files may end otherwise than the table says, as re-coded copies do; the label then
    says how, as in `tau2020`.

    leave_out: a fold that is neither trained nor tested on, so that a recipe can be chosen without it. esc10: only
    the ten classes of ESC-10. cache: folder of the spectrograms; null: `l2bn` in the user's cache folder.
    """
    table = expand(root) / "meta" / "esc50.csv"
    patterns = {"fold": r"\d+", "category": ".+", "esc10": "True|False"}
    rows = _rows(table, patterns, "ESC-50", "github.com/karolpiczak/ESC-50")
    rows = [row for row in rows if row["esc10"] == "True" or not esc10]
    tree = _listed(rows, "category", table)
    folds = torch.tensor([int(row["fold"]) for row in rows])
    found = sorted(set(folds.tolist()))
    if fold not in found or leave_out not in (None, *found) or leave_out == fold:
        raise UserError(
            f"dataset.fold={fold}, dataset.leave_out={leave_out}: {table} has the folds "
            f"{', '.join(map(str, found))}; give one to test on, and another or null to leave out"
        )
    variant = ["ESC-10"] * esc10 + [f"fold {fold}"]
    whole = (10, 320, 80) if esc10 else (50, 1600, 400)
    if leave_out is not None:
        variant.append(f"trained without fold {leave_out}")
        whole = (whole[0], whole[1] - whole[2], whole[2])
    parts = (folds != fold) & (folds != (fold if leave_out is None else leave_out)), folds == fold
    recordings = [Path(name).name.partition("-")[2].partition("-")[0] for name in tree.names]  # behind the fold
    return _make_splits(tree, parts, recordings, spectrogram, cache, variant, whole=whole, **common)


def tau2020(root: str, spectrogram: LogMel, cache: str | None = None, **common: Unpack[Common]) -> Splits:
    """TAU Urban Acoustic Scenes 2020 Mobile, development set, in its official layout and split.

    T. Heittola, A. Mesaros, T. Virtanen, "Acoustic scene classification in DCASE 2020 Challenge", arXiv:2005.14623;
    the set is doi:10.5281/zenodo.3819968. `root` holds audio/ and evaluation_setup/ with fold1_train.csv and
    fold1_evaluate.csv. cache: as in `esc50`.
    """
    tables = [expand(root) / "evaluation_setup" / f"fold1_{part}.csv" for part in ("train", "evaluate")]
    names = {"scene_label": ".+"}, "TAU Urban Acoustic Scenes 2020 Mobile", "doi.org/10.5281/zenodo.3819968"
    train, test = (_rows(table, *names, delimiter="\t") for table in tables)
    tree = _listed([*train, *test], "scene_label", tables[0])
    trained = torch.arange(len(tree.names)) < len(train)
    # The names begin with scene, city and location.
    places = ["-".join(Path(name).name.split("-")[:3]) for name in tree.names]
    whole = PUBLISHED["TAU 2020"]
    return _make_splits(tree, (trained, ~trained), places, spectrogram, cache, whole=whole, **common)


def sound_folder(
    root: str,
    spectrogram: LogMel,
    train: str = "train",
    test: str = "test",
    cache: str | None = None,
    **common: Unpack[Common],
) -> Splits:
    """The sound files below `root`/`train`/<class>/ and `root`/`test`/<class>/; arguments as of `image_folder`."""
    decoded = partial(_read_clips, spectrogram=spectrogram, cache=cache)
    return split_folder(expand(root), train, test, SOUND, decoded, **common)


def _rows(
    table: Path, patterns: Mapping[str, str], name: str, source: str, delimiter: str = ","
) -> list[dict[str, str]]:
    """The rows of a table of clips, with a column `filename` and those of `patterns`, whose values match."""
    if not table.is_file():
        raise UserError(
            f"no {name} in {table.parents[1].absolute()}: {table.parent.name}/{table.name} and audio/ are looked "
            f"for; get it from {source}, and name the folder that holds both by dataset.root=FOLDER"
        )
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter=delimiter))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read ({error}); restore it from {source}") from error
    for number, row in enumerate(rows, start=2):
        for column, pattern in {"filename": ".+", **patterns}.items():
            if not re.fullmatch(pattern, row.get(column) or ""):
                raise UserError(
                    f"{table}, line {number}: {column} cannot be {row.get(column)}; restore the table from {source}"
                )
    return rows


def _listed(rows: Sequence[Mapping[str, str]], column: str, table: Path) -> Tree:
    """The files of a table's rows in audio/, where each may have another suffix; column: of the classes' names."""
    if not rows:
        raise UserError(f"{table} lists no clips; restore the table")
    audio = table.parents[1] / "audio"
    found = list(filter(SOUND.fits, scan(audio)[1]))
    by_name = {Path(name).stem: name for name in found} | {name: name for name in found}
    listed = [Path(row["filename"]).name for row in rows]
    names = [by_name.get(name) or by_name.get(Path(name).stem, "") for name in listed]
    if "" in names:
        raise UserError(
            f"{audio / listed[names.index('')]}, which {table} lists, is missing, as are {names.count('') - 1:,} "
            "others; unpack the data set again, or name its folder by dataset.root=FOLDER"
        )
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(f"{audio / name} is listed {count} times in {table.parent}; restore the tables")
    classes = tuple(sorted({row[column] for row in rows}))
    return Tree(audio, classes, names, torch.tensor([classes.index(row[column]) for row in rows]))


# ---- Clips ----------------------------------------------------------------------------------------------------


def _make_splits(
    tree: Tree,
    parts: tuple[Tensor, Tensor],
    recordings: Sequence[str],
    spectrogram: LogMel,
    cache: str | None,
    variant: Sequence[str] = (),
    **options: Any,
) -> Splits:
    """The training and test clips of a published set: those of the tree where each of `parts`, (N,), is True.

    recordings: of each clip, its recording or place; a validation split holds out whole ones. Published sets come
    as WAV files; of others the label says so.
    """
    images, contents, _ = _read_clips(tree, spectrogram, cache)
    files: list[str | Tensor] = []
    endings: set[str] = set()
    for part in parts:
        names = list(compress(tree.names, part.tolist()))
        files += [*names, *compress(contents, part.tolist()), tree.labels[part]]
        endings |= {Path(name).suffix for name in names} - {".wav"}
    variant = [*variant, *(f"from {ending} files" for ending in sorted(endings))]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(recordings))}
    groups = torch.tensor([numbers[name] for name in recordings])[parts[0]]
    options |= {"files": digest(files), "variant": ", ".join(variant), "groups": groups}
    train, test = (images.select(part.nonzero()[:, 0]) for part in parts)
    return make_splits(train, test, len(tree.classes), spectrogram.bands, tree.classes, **options)


def _read_clips(tree: Tree, spectrogram: LogMel, cache: str | None) -> Decoded:
    """The spectrograms of a tree's files, computed in parallel or read from the cache."""
    read = partial(_read, spectrogram=spectrogram)
    clips = decode_tree(tree, read, cache, [repr(spectrogram), digest(tree.names)])
    _report(tree.folder, spectrogram, clips[2])
    return clips


def _report(folder: Path, spectrogram: LogMel, facts: Values) -> None:
    """Log one line that counts the clips of another rate, length or number of channels, if there are any."""
    length, frame = spectrogram.samples / spectrogram.rate, spectrogram.hop / spectrogram.rate
    counts: Counter[str] = Counter()
    for rate, channels, seconds in facts.tolist():
        changes = {
            f"resampled from {rate:,.0f} to {spectrogram.rate:,} Hz": rate != spectrogram.rate,
            "of several channels, averaged": channels > 1,
            f"shorter than {length:g} s, padded with silence": seconds < length - frame,
            f"longer than {length:g} s, the rest left out": seconds > length + frame,
        }
        counts.update(text for text, is_so in changes.items() if is_so)
    if counts:
        found = "; ".join(f"{count:,} {text}" for text, count in counts.most_common())
        log.info("%s: of %s clips %s", folder, f"{len(facts):,}", found)


def _read(path: Path, spectrogram: LogMel) -> tuple[Pixels, str, float, float, float]:
    """The spectrogram of a file, the digest of its content, its rate, channels and seconds."""
    content = content_of(path)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, length = file.samplerate, file.frames
            longest = spectrogram.samples / spectrogram.rate + 1  # seconds, the last for the resampling filter
            needed = min(length, math.ceil(longest * rate))
            samples = file.read(needed, dtype="float32", always_2d=True)  # (T, channels)
            whole = len(samples) == needed
            if file.format == "MP3":  # whose length may be an estimate
                whole = len(samples) > 0.98 * needed
            elif whole and needed < length:
                file.seek(length - 1)
                whole = len(file.read(1)) == 1
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", "") or "damaged"
        raise UserError(f"{path}: cannot be decoded ({reason}); replace the file") from error
    if not whole or _is_cut(content):
        raise UserError(f"{path}: was cut short; replace the file")
    if not length or not np.isfinite(samples).all():
        found = "values that are not finite" if length else "no samples"
        raise UserError(f"{path}: holds {found}; replace the file")
    clip = samples.mean(1, dtype=np.float64)
    if rate != spectrogram.rate:
        common = math.gcd(rate, spectrogram.rate)
        clip = resample_poly(clip, spectrogram.rate // common, rate // common)
    return spectrogram(clip), digest([content]), rate, samples.shape[1], length / rate


def _is_cut(content: bytes) -> bool:
    """Tell whether a WAV file is shorter than its header says, or an Ogg file lacks the end of its last page."""
    if content[:4] == b"RIFF":
        size = int.from_bytes(content[4:8], "little")
        return size + 8 > len(content) + 1 and size != 2**32 - 1  # as a stream of unknown length has it
    if content[:4] == b"OggS":
        page = content[content.rfind(b"OggS") :]
        segments = page[26] if len(page) > 26 else 0
        return not page[5:6] or not page[5] & 4 or len(page) < 27 + segments + sum(page[27 : 27 + segments])
    return False
