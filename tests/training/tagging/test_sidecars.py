"""Tags beside images, as other programs read them."""

import xml.etree.ElementTree as ET

import pytest

from training.tag import main
from training.tagging.sidecars import check_sidecars, write_text, write_xmp
from training.tagging.sources import FileSource

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


def test_images_that_would_share_a_sidecar_are_named(tmp_path):
    source = FileSource(tmp_path, ["a.jpg", "a.png"])
    check_sidecars(source, ["xmp"])
    with pytest.raises(ValueError, match=r"a.jpg and a.png would share the sidecar a.txt"):
        check_sidecars(source, ["txt"])
