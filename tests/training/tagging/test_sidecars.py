"""Tags beside images, as other programs read them."""

import errno
import json
import os
import shutil
import stat
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from training.data.load import load
from training.data.text import decode_xml
from training.prepare.__main__ import main as prepare
from training.tag import main
from training.tagging.sidecars import check_sidecars, write_text, write_xmp
from training.tagging.sources import FileSource
from training.tagging.xmp import KEYWORDS, RDF

from ..test_tag import checkpoint, draw, read  # noqa: F401  (a fixture)

# As darktable writes it: a rating and a history that must not be lost, and keywords of its own.
DARKTABLE = """<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:darktable="http://darktable.sf.net/"
   xmp:Rating="4"
   darktable:history_end="2">
   <dc:subject>
    <rdf:Seq>
     <rdf:li>holiday</rdf:li>
    </rdf:Seq>
   </dc:subject>
   <darktable:history><rdf:Seq><rdf:li darktable:operation="exposure"/></rdf:Seq></darktable:history>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""


def keywords(path):
    subjects = list(ET.parse(path).iter("{http://purl.org/dc/elements/1.1/}subject"))
    assert len(subjects) == 1
    return [item.text for item in subjects[0].iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li")]


def test_text_files(tmp_path):
    image = tmp_path / "a.b.jpg"
    assert write_text(image, ["dog", "red,  large car"])
    assert (tmp_path / "a.b.txt").read_text() == "dog, red large car\n"
    assert not write_text(image, ["cat"]) and write_text(image, ["cat"], overwrite=True)
    assert (tmp_path / "a.b.txt").read_text() == "cat\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.b.txt"]


def test_new_xmp_files(tmp_path):
    assert write_xmp(tmp_path / "1.jpg", ["dog", "<b> & ünïcode"])
    text = (tmp_path / "1.jpg.xmp").read_text(encoding="utf-8")
    assert keywords(tmp_path / "1.jpg.xmp") == ["dog", "<b> & ünïcode"]
    for prefix in ("x:xmpmeta", "rdf:RDF", "rdf:Bag", "dc:subject"):
        assert f"<{prefix}" in text


def test_xmp_files_that_exist_lose_nothing_but_keywords(tmp_path, caplog):
    path = tmp_path / "1.jpg.xmp"
    path.write_text(DARKTABLE)
    assert not write_xmp(tmp_path / "1.jpg", ["dog"])
    assert path.read_text() == DARKTABLE
    assert write_xmp(tmp_path / "1.jpg", ["dog", "sofa"], overwrite=True)
    assert keywords(path) == ["dog", "sofa"]
    text = path.read_text()
    for kept in ('xmp:Rating="4"', 'darktable:history_end="2"', 'darktable:operation="exposure"', "x:xmptk"):
        assert kept in text
    for broken in ("no xml", "<a/>"):
        path.write_text(broken)
        assert not write_xmp(tmp_path / "1.jpg", ["dog"], overwrite=True)
        assert path.read_text() == broken and "left as it was" in caplog.text
        caplog.clear()


def test_sidecars_of_a_run(checkpoint, tmp_path, capsys):  # noqa: F811
    images, output = tmp_path / "images", tmp_path / "out"
    draw(images, 5)
    (images / "0" / "3.txt").write_text("mine")
    command = [str(checkpoint), str(images), str(output), "--num_workers", "0", "--threshold", "0.5"]
    assert main(command) == 0
    assert not list(images.glob("**/*.xmp"))
    # Wished for later: nothing is tagged again.
    assert main([*command, "--sidecars", "txt", "xmp"]) == 0
    assert "0 of them to be tagged" in capsys.readouterr().out
    found = read(output)
    assert (images / "0" / "3.txt").read_text() == "mine"
    labelled = {name for name, record in found.items() if record["labels"]}
    assert labelled
    for name, record in found.items():
        image = images / name
        assert image.with_name(f"{image.name}.xmp").exists() == (name in labelled)
        if name in labelled:
            assert keywords(image.with_name(f"{image.name}.xmp")) == record["labels"]
            if name != "0/3.png":
                assert image.with_suffix(".txt").read_text() == ", ".join(record["labels"]) + "\n"
    assert main([*command, "--sidecars", "txt", "--overwrite_sidecars"]) == 0
    assert ((images / "0" / "3.txt").read_text() != "mine") == ("0/3.png" in labelled)


def test_what_a_killed_run_had_begun_goes(checkpoint, tmp_path, capsys):  # noqa: F811
    images = tmp_path / "images"
    draw(images, 2)
    long = (images / "0" / "0.png").rename(images / "0" / f"{'x' * 120}.png")
    begun = [f".1.png.xmp.{'0f' * 8}.new", ".1.txt.0123456789abcdef.new", f".{'x' * 100}.{'a' * 16}.new"]
    mine = [".1.txt.new", ".2.txt.0123456789abcdef.new", ".zshrc.0123456789abcdef.new"]
    for name in begun + mine:
        (images / "1" / name).write_text("half")
    (images / "1" / begun[2]).rename(long.with_name(begun[2]))
    command = [str(checkpoint), str(images), str(tmp_path / "out"), "--num_workers", "0", "--threshold", "0"]
    assert main([*command, "--sidecars", "txt", "xmp"]) == 0
    assert {path.name for path in images.rglob(".*")} == set(mine)
    assert len(list(images.rglob("*.txt"))) == 2


def test_a_sidecar_that_cannot_be_written_is_no_success(checkpoint, tmp_path, capsys, monkeypatch):  # noqa: F811
    images = tmp_path / "images"
    draw(images, 2)
    command = [str(checkpoint), str(images), str(tmp_path / "out"), "--num_workers", "0", "--threshold", "0"]
    with monkeypatch.context() as full:
        full.setattr("training.tagging.sidecars.write_file", no_room)
        assert main([*command, "--sidecars", "txt"]) == 1
    said = capsys.readouterr()
    assert "2 sidecars could not be written" in said.err and "No space left" in said.err and "failed: 2" in said.out
    assert main([*command, "--sidecars", "txt"]) == 0 and len(list(images.rglob("*.txt"))) == 2


def no_room(path, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_pair_gets_files_with_its_whole_names(checkpoint, tmp_path, capsys):  # noqa: F811
    images = tmp_path / "images"
    draw(images, 3)
    (images / "0" / "0.jpg").write_bytes((images / "0" / "0.png").read_bytes())
    (images / "1" / "1.txt").write_bytes((images / "1" / "1.png").read_bytes())  # an image, whatever it is called
    command = [str(checkpoint), str(images), str(tmp_path / "out"), "--num_workers", "0", "--threshold", "0"]
    assert main([*command, "--sidecars", "txt"]) == 0
    written = {path.relative_to(images).as_posix() for path in images.rglob("*.txt")} - {"1/1.txt"}
    assert written == {"0/0.jpg.txt", "0/0.png.txt", "1/1.png.txt", "1/1.txt.txt", "2/2.txt"}
    assert "0.txt" in capsys.readouterr().out
    assert (images / "1" / "1.txt").read_bytes() == (images / "1" / "1.png").read_bytes()


def test_tags_that_were_corrected_are_trained_on(checkpoint, tmp_path):  # noqa: F811
    images = tmp_path / "images"
    draw(images, 4)
    command = [str(checkpoint), str(images), str(tmp_path / "out"), "--num_workers", "0", "--threshold", "0.5"]
    assert main([*command, "--sidecars", "txt"]) == 0
    assert len(list(images.rglob("*.txt"))) == 4
    (images / "0" / "0.txt").write_text("dog, sofa\n")
    (images / "1" / "1.txt").write_text("")
    assert prepare(["auto", str(images), str(tmp_path / "data")]) == 0
    loaded = load(tmp_path / "data")
    rows = [loaded.splits["train"].labels.dense(row) for row in range(4)]
    assert [loaded.label_names[label] for label in np.flatnonzero(rows[0])] == ["dog", "sofa"] and not rows[2].any()


def test_data_sets_and_urls_have_no_sidecars(tmp_path):
    with pytest.raises(ValueError, match="have no folder for sidecars"):
        check_sidecars(FileSource(tmp_path, ["https://example.com/a.jpg"]))


# XMP: nothing but keywords changes, in whatever encoding

ELSE = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><!-- ol\u00e9 > 3 --><rdf:RDF xmlns:rdf="{rdf}">
 <rdf:Description rdf:about="" xmlns:p="http://example.com/" p:note='a > "b"'>
  <dc:subject xmlns:dc="http://purl.org/dc/elements/1.1/"><rdf:Bag><rdf:li>old</rdf:li></rdf:Bag></dc:subject>
  <?robot keep?>
  <p:title>ol\u00e9</p:title>
 </rdf:Description>
 <rdf:Description rdf:about=""><digiKam:TagsList xmlns:digiKam="http://www.digikam.org/ns/1.0/"/></rdf:Description>
</rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>""".format(rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#")


@pytest.mark.parametrize("encoding", ["UTF-8", "ISO-8859-1", "UTF-16", "windows-1252"])
def test_all_but_keywords_stays_letter_by_letter(encoding, tmp_path):
    head = f'<?xml version="1.0" encoding="{encoding}"?>\n<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    path = tmp_path / "1.jpg.xmp"
    path.write_bytes((head + ELSE).encode(encoding))
    path.chmod(0o640)
    assert write_xmp(tmp_path / "1.jpg", ["dog", "\u65e5\u672c \u00e9", "a\x01b"], overwrite=True)
    text = path.read_bytes().decode(encoding)
    assert text.startswith(head) and text.endswith('<?xpacket end="w"?>') and stat.S_IMODE(path.stat().st_mode) == 0o640
    for kept in ("<!-- ol\u00e9 > 3 -->", "<?robot keep?>", "p:note='a > \"b\"'", "<p:title>ol\u00e9</p:title>"):
        assert kept in text
    assert "old" not in text
    before = text
    assert write_xmp(tmp_path / "1.jpg", ["dog", "\u65e5\u672c \u00e9", "a\x01b"], overwrite=True)
    assert path.read_bytes().decode(encoding) == before, "writing the same again changes something"
    root = ET.fromstring(decode_xml(path.read_bytes(), path))
    for _, uri, name, _ in KEYWORDS:
        (found,) = root.iter(f"{{{uri}}}{name}")
        assert [item.text for item in found.iter(f"{{{RDF}}}li")] == ["dog", "\u65e5\u672c \u00e9", "ab"]


def test_bytes_that_are_not_what_the_file_declares_are_left_alone(tmp_path, caplog):
    path = tmp_path / "1.jpg.xmp"
    for data in (
        b'<?xml version="1.0"?>' + ELSE.encode("latin-1"),
        b'<?xml version="1.0" encoding="klingon"?>' + ELSE.encode(),
        b"<!DOCTYPE a [<!ENTITY b 'c'>]>" + ELSE.encode(),
    ):
        path.write_bytes(data)
        assert not write_xmp(tmp_path / "1.jpg", ["dog"], overwrite=True)
        assert path.read_bytes() == data and "left as it was" in caplog.text
        caplog.clear()


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is Debian's libimage-exiftool-perl")
@pytest.mark.parametrize("before", [None, DARKTABLE, ELSE])
def test_exiftool_reads_the_same_keywords_in_every_place(before, tmp_path):
    labels = ["dog", "tv monitor", "<b> & \u00fcn\u00efcode"]
    if before is not None:
        (tmp_path / "1.jpg.xmp").write_text(before, encoding="utf-8")
    assert write_xmp(tmp_path / "1.jpg", labels, overwrite=True)
    command = ["exiftool", "-j", "-G1", "-struct", "-charset", "utf8", str(tmp_path / "1.jpg.xmp")]
    (found,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    names = ("XMP-dc:Subject", "XMP-lr:HierarchicalSubject", "XMP-digiKam:TagsList", "XMP-microsoft:LastKeywordXMP")
    assert [found.get(name) for name in names] == [labels] * 4
    assert before is not DARKTABLE or found["XMP-xmp:Rating"] == 4
    # Exiv2, digiKam and Windows spell the namespace of MicrosoftPhoto so; ExifTool reads it and says that it does not.
    assert found.get("ExifTool:Warning", "xmlns:MicrosoftPhoto").endswith("xmlns:MicrosoftPhoto")
