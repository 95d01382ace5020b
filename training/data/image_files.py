"""The image files below a folder, and its videos: all of them, by name, with what was left out and why."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from modeling_hsvlt.load_video import is_video

IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS) - {".mpg", ".mpeg"} | {".avif", ".heic", ".heif", ".hif"}
# Where programs keep small copies: desktops, Synology, Windows, and what macOS leaves in archives.
_THUMBNAILS = frozenset((".thumbnails", "@eadir", "__macosx", "thumbnails", ".thumbs", "thumbs"))
# Folders whose name says only that images are in them.
STORAGE = frozenset(("images", "image", "imgs", "img", "data", "photos", "jpegimages"))
_HEADERS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"8BPS", b"\0\0\0\x0cjP  ")
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"hevc")


class ImageTree(NamedTuple):
    """What `find_images` found: names relative to the folder, sorted, and how many files were left out for a reason."""

    names: list[str]
    left_out: Counter
    videos: list[str]  # where they were asked for


def find_images(folder: Path, *, sniff: bool = False, videos: bool = False) -> ImageTree:
    """All images in a folder and the folders in it, links followed, no folder twice.

    Args:
        sniff: Look into files that are not called like an image, and take those that begin like one.
        videos: Take the videos as well.
    """
    names, moving, left_out, seen = [], [], Counter(), set()
    for root, folders, files in os.walk(folder, followlinks=True):
        try:
            at = os.stat(root)
        except OSError:  # gone meanwhile
            continue
        if (at.st_dev, at.st_ino) in seen:  # a link back
            folders.clear()
            left_out["reached a second time by a link"] += sum(map(_called_like_an_image, files))
            continue
        seen.add((at.st_dev, at.st_ino))
        folders.sort()
        for name in list(folders):
            if name.startswith(".") or name.casefold() in _THUMBNAILS:
                folders.remove(name)
                count = sum(_called_like_an_image(file) for _, _, files in os.walk(Path(root, name)) for file in files)
                left_out["in hidden or thumbnail folders"] += count
        relative = os.path.relpath(root, folder)
        for name in files:
            image = _called_like_an_image(name)
            if name.startswith("."):
                left_out["hidden files"] += image
                continue
            below = name if relative == "." else os.path.join(relative, name).replace(os.sep, "/")
            if image or (sniff and _begins_like_an_image(Path(root, name))):
                names.append(below)
            elif videos and is_video(Path(root, name)):
                moving.append(below)
            else:
                left_out["no images"] += 1
    return ImageTree(sorted(names), +left_out, sorted(moving))


def is_image(path: Path) -> bool:
    """Whether a file is called like an image or begins like one."""
    return _called_like_an_image(path.name) or _begins_like_an_image(path)


def _called_like_an_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _begins_like_an_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            begin = file.read(16)
    except OSError:
        return False
    riff = begin[:4] == b"RIFF" and begin[8:12] == b"WEBP"
    return begin.startswith(_HEADERS) or riff or (begin[4:8] == b"ftyp" and begin[8:12] in _BRANDS)


class ImageFiles:
    """The images below a folder: is one there, and which does no row name?

    Args:
        folder: Where names start.
        within: The folder that a name must not lead out of, by default `folder`.
    """

    def __init__(self, folder: Path, within: Path | None = None):
        self._folder, self._within = folder, os.path.normpath(within or folder)
        names = find_images(folder).names
        self._unlisted = set(names)
        self._by_stem: dict[str, list[str]] = {}
        self._by_form: dict[str, list[str]] = {}
        for name in names:
            self._by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
            self._by_form.setdefault(unicodedata.normalize("NFC", name), []).append(name)

    def holds(self, name: str) -> bool:
        """Whether an image that a row names is there; from then on it is listed."""
        if name in self._unlisted:
            self._unlisted.discard(name)
            return True
        path = Path(os.path.normpath(self._folder / name))
        if not (path.is_relative_to(self._within) and path.is_file()):
            return False
        self._unlisted.discard(Path(os.path.relpath(path, self._folder)).as_posix())
        return True

    def meant(self, name: str) -> str:
        """The image that a name means without its suffix, or with its accents written otherwise, as macOS does, where
        just one is there; else the name as it is."""
        found = self._by_form.get(unicodedata.normalize("NFC", name), ())
        if not found and not _called_like_an_image(name):
            found = self._by_stem.get(name, ())
        return found[0] if len(found) == 1 else name

    def unlisted(self) -> list[str]:
        """Names of the images that no row has named so far."""
        return sorted(self._unlisted)


class ImageFinder:
    """The image that a name in an export means, where that is certain.

    Args:
        folder: With all images somewhere below it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        names = find_images(folder).names if folder.is_dir() else []
        # Accents are compared in one form, but where two files differ in that alone.
        forms = Counter(unicodedata.normalize("NFC", name) for name in names)
        self._names = {form if forms[form := unicodedata.normalize("NFC", name)] == 1 else name: name for name in names}
        self._by_file: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        self._found: set[str] = set()
        for name in self._names:
            file = name.rpartition("/")[2].lower()
            self._by_file.setdefault(file, []).append(name)
            self._by_stem.setdefault(os.path.splitext(file)[0], []).append(name)

    def find(self, name: str, *below: str) -> Path | None:
        """The image of a name as tools write it: `images\\\\x.jpg`, `./x.jpg`, with folders too many or too few,
        without its suffix, or with it in other letters.

        Args:
            below: Folders in `folder` that are looked through first, one after the other.

        Raises:
            ValueError: several images are meant alike.
        """
        if name not in self._names:
            name = unicodedata.normalize("NFC", name)
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            return None
        candidates = self._by_file.get(parts[-1].lower(), ())
        if not candidates and not _called_like_an_image(parts[-1]):
            candidates = self._by_stem.get(parts[-1].lower(), ())
        wanted = "/".join(parts)
        below = tuple(filter(None, below))
        for words in (*(f"{folder}/{wanted}" for folder in below), wanted):
            if words in candidates:
                return self._take(words)
        for folder in (*below, ""):
            fits = [one for one in candidates if not folder or one.startswith(f"{folder}/")]
            depth = folder.count("/") + 1 if folder else 0
            fits = [one for one in fits if _same_end(one.split("/"), parts, depth)]
            fits = [one for one in fits if one.rpartition("/")[2] == parts[-1]] or fits
            if len(fits) > 1:
                raise ValueError(
                    f"{name!r} may be {fits[0]} or {fits[1]} in {self.folder}; write which, or take one away"
                )
            if fits:
                return self._take(fits[0])
        return self.find("/".join(parts[1:]), *below) if parts[0].lower() in STORAGE and len(parts) > 1 else None

    def _take(self, name: str) -> Path:
        self._found.add(name)
        return self.folder / self._names[name]

    def unlisted(self) -> list[str]:
        """Names of the images that were not found so far."""
        return [there for name, there in self._names.items() if name not in self._found]


def _same_end(there: list[str], wanted: list[str], below: int) -> bool:
    """Whether one of two paths ends with the other, but for case and suffix of the file; the first `below` folders of
    `there` are those that were looked for."""
    there, wanted = there[:-1], wanted[:-1]
    short = min(len(there), len(wanted))
    if there[len(there) - short :] == wanted[len(wanted) - short :]:
        return True
    inner = there[below:]
    return bool(below) and wanted[len(wanted) - len(inner) :] == inner if len(inner) <= len(wanted) else False
