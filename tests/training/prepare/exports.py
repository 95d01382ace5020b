"""The images and labels of `formats.py` as tools export them: small files with what those of the tools have."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from .formats import IMAGES, LABELS, NAMES, each, write

ROBOFLOW = {"train": "train", "test": "test"}


def coco_json(split, file_name, *, key=int, categories=None, annotation=None, image=None):
    """One COCO json of a split; `file_name(row)` names an image, `key` makes ids of numbers."""
    categories = categories or [{"id": key(5 + index), "name": name} for index, name in enumerate(NAMES)]
    ids = {entry["name"]: entry["id"] for entry in categories}
    content = {"info": {}, "licenses": [], "categories": categories, "images": [], "annotations": []}
    for row, labels in enumerate(LABELS[split]):
        content["images"].append({"id": key(row), "file_name": file_name(row), "width": 16, **(image or {})})
        for label in labels:
            number = key(len(content["annotations"]))
            entry = {"id": number, "image_id": key(row), "category_id": ids[label], "bbox": [0, 0, 4, 4]}
            content["annotations"].append(entry | (annotation or {}))
    return content


def put_images(root, name):
    for split, row, _, content in each():
        write(root / name(split, row), content)


def write_coco_label_studio(root):
    """One result.json a split in a folder of its own, backslashes, and a label that nobody used."""
    for split in LABELS:
        used = [{"id": index, "name": name} for index, name in enumerate(NAMES)]
        content = coco_json(split, lambda row, split=split: f"images\\{split}-{row}.jpg", categories=used)
        write(root / split / "result.json", json.dumps(content))
    put_images(root, lambda split, row: f"{split}/images/{split}-{row}.jpg")
    return root


def write_coco_cvat(root):
    content = {split: coco_json(split, lambda row, split=split: f"{split}-{row}.jpg", key=float) for split in LABELS}
    for split, annotations in content.items():
        write(root / "annotations" / f"instances_{split}.json", "\ufeff" + json.dumps(annotations))
    put_images(root, lambda split, row: f"images/{split}/{split}-{row}.jpg")
    return root


def write_coco_roboflow(root):
    """The root category, which is above the others and never used, and suffixes that are written in capitals."""
    above = [{"id": 0, "name": "animals", "supercategory": "none"}]
    above += [{"id": 1 + index, "name": name, "supercategory": "animals"} for index, name in enumerate(NAMES)]
    for split in LABELS:
        content = coco_json(split, lambda row: f"{row}_jpg.rf.0a.JPG", categories=above)
        write(root / split / "_annotations.coco.json", json.dumps(content))
    put_images(root, lambda split, row: f"{split}/{row}_jpg.rf.0a.jpg")
    write(root / "README.roboflow.txt", "animals")
    return root


def write_coco_lvis(root):
    """`coco_url` alone, and categories in another order than their ids."""
    for split in LABELS:
        content = coco_json(split, str, image={"neg_category_ids": [], "not_exhaustive_category_ids": []})
        content["categories"].reverse()
        for image in content["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/{split}2017/{image.pop('file_name')}.jpg"
        write(root / f"lvis_v1_{split}.json", json.dumps(content))
    put_images(root, lambda split, row: f"{split}2017/{row}.jpg")
    return root


def write_coco_fiftyone(root):
    """Ids as text, a folder data/, `images/` that is not there, duplicate and empty categories."""
    for split in LABELS:
        categories = [{"id": f"id-{name}", "name": name} for name in NAMES]
        categories += [{"id": "again", "name": "cat"}, {"id": "none", "name": ""}]
        content = coco_json(split, lambda row: f"images/{row}.jpg", key="u-{}".format, categories=categories[:3])
        content["categories"] = categories
        content["annotations"][0]["category_id"] = "again" if split == "train" else "id-tvmonitor"
        write(root / split / "labels.json", json.dumps(content))
    put_images(root, lambda split, row: f"{split}/data/{row}.jpg")
    return root


def write_label_studio(root, form):
    """The train split alone, since the tool knows no others: uploads with a hash, a cancelled and a waiting task."""
    tasks = []
    for row, labels in enumerate(LABELS["train"]):
        write(root / "images" / f"{row}.jpg", IMAGES["train"][row])
        image = f"/data/upload/3/0123abc{row}-{row}.jpg"
        region = {"type": "rectanglelabels", "value": {"x": 1, "y": 2.5, "rotation": 0}}
        if form == "json":
            result = [{**region, "value": {**region["value"], "rectanglelabels": [label]}} for label in labels]
            choices = {"type": "choices", "value": {"choices": labels[:1]}}
            annotations = [
                {"id": row, "was_cancelled": False, "result": [*result, *([choices] if labels else [])]},
                {"id": 50 + row, "was_cancelled": True, "result": []},
            ]
            tasks.append({"id": row, "data": {"image": image}, "annotations": annotations, "predictions": []})
        elif form == "min":
            boxes = [{"x": 1, "rectanglelabels": [label]} for label in labels]
            tasks.append(
                {"id": row, "image": image, "annotator": 1, "annotation_id": row, "lead_time": 1.5, "tag": boxes}
            )
        else:
            cell = {0: "", 1: labels[0] if labels else ""}.get(len(labels), json.dumps({"choices": labels}))
            tasks.append([cell.replace('"', '""'), row, image])
    if form == "csv":
        lines = [f'1,{row},1,"{cell}",2020-01-01T00:00:00Z,{row},{image},3.25' for cell, row, image in tasks]
        head = "annotator,annotation_id,agreement,choice,created_at,id,image,lead_time"
        write(root / "project-1.csv", "\n".join([head, *lines]) + "\n")
    else:
        if form == "json":
            write(root / "images" / "9.jpg", IMAGES["test"][0])
            tasks.append({"id": 9, "data": {"image": "/data/upload/3/9.jpg"}, "annotations": []})
        write(root / "project-1.json", json.dumps(tasks))
    return root


def voc_xml(labels, file_name, extra=""):
    objects = "".join(
        f"<object><name>{label}</name><difficult></difficult><bndbox><xmin>1</xmin></bndbox></object>"
        for label in labels
    )
    return f"<annotation>{extra}<folder></folder><filename>{file_name}</filename>{objects}</annotation>"


def write_voc_roboflow(root):
    for split, row, labels, content in each():
        write(root / split / f"{row}_jpg.rf.0a.jpg", content)
        write(root / split / f"{row}_jpg.rf.0a.xml", voc_xml(labels, f"{row}_jpg.rf.0a.jpg"))
    return root


def write_voc_label_studio(root):
    """Annotations/ beside images/, a name in other letters, and an encoding of its own."""
    for split, row, labels, content in each():
        write(root / split / "images" / f"{row}.JPG", content)
        text = '<?xml version="1.0" encoding="GB2312"?>\n' + voc_xml(
            labels, f"{row}.JPG", "<source>\u4e2d\u6587</source>"
        )
        write(root / split / "Annotations" / f"{row}.xml", text.encode("gb2312"))
    return root


def write_voc_cvat(root):
    for row, labels in enumerate(LABELS["train"]):
        write(root / "JPEGImages" / f"frame_{row}.png", IMAGES["train"][row])
        write(root / "Annotations" / f"frame_{row}.xml", voc_xml(labels, f"frame_{row}.png"))
    write(root / "ImageSets" / "Main" / "default.txt", "frame_0\nframe_1\nframe_2\n")
    write(root / "labelmap.txt", "# label:color_rgb:parts:actions\ncat:::\n")
    return root


def write_roboflow_csv(root):
    for split, row, labels, content in each():
        write(root / split / f"{row}.jpg", content)
        path = root / split / "_classes.csv"
        before = path.read_text() if path.exists() else f"filename, {', '.join(NAMES)}\n"
        write(path, f"{before}{row}.jpg, {', '.join(str(int(name in labels)) for name in NAMES)}\n")
    return root


def write_annotations_csv(root):
    """A row an object; an image without any has one row of blanks, as none can say it otherwise."""
    for split, row, labels, content in each():
        write(root / split / f"{row}.jpg", content)
        path = root / split / "_annotations.csv"
        before = path.read_text() if path.exists() else "filename,width,height,class,xmin,ymin,xmax,ymax\n"
        lines = [f"{row}.jpg,16,12,{label},1,1,5,5\n" for label in [*labels, *labels[:1]]]
        write(path, before + "".join(lines or [f"{row}.jpg,16,12,,,,,\n"]))
    return root


def write_open_images(root):
    codes = {name: f"/m/0{index}" for index, name in enumerate(NAMES)}
    write(root / "oidv7-class-descriptions.csv", "".join(f"{code},{name}\n" for name, code in codes.items()))
    for split in LABELS:
        lines = ["ImageID,Source,LabelName,Confidence"]
        for row, labels in enumerate(LABELS[split]):
            write(root / split / f"{split}{row}.jpg", IMAGES[split][row])
            lines += [f"{split}{row},verification,{codes[name]},{int(name in labels)}" for name in NAMES]
        write(root / f"oidv7-{split}-annotations-human-imagelabels.csv", "\n".join(lines))
    return root


def write_chestxray14(root):
    """Headers with commas inside, a comma too many at the end, images in numbered folders, `No Finding`."""
    head = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,OriginalImage[Width,Height],"
        "OriginalImagePixelSpacing[x,y],"
    )
    lines = [head]
    for split, row, labels, content in each():
        write(root / f"images_00{row + 1}" / "images" / f"0000{split}_{row}.png", content)
        lines.append(f"0000{split}_{row}.png,{'|'.join(labels) or 'No Finding'},0,1,58,2682,2749,0.143,0.143,")
    write(root / "Data_Entry_2017.csv", "\n".join(lines) + "\n")
    for split, file in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        write(root / file, "\n".join(f"0000{split}_{row}.png" for row in range(len(LABELS[split]))))
    return root


def write_chexpert(root):
    """Names that begin with the folder itself, a blank for what is not mentioned, and a column of no label."""
    for split in LABELS:
        lines = [f"Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,{','.join(NAMES)}"]
        for row, labels in enumerate(LABELS[split]):
            name = f"{split}/patient0000{row}/study1/view1_frontal.jpg"
            write(root / name, IMAGES[split][row])
            cells = ["1.0" if label in labels else "0.0" if row else "" for label in NAMES]
            lines.append(f"{root.name}/{name},Female,68,Frontal,AP,{'' if labels else '1.0'},{','.join(cells)}")
        write(root / f"{split}.csv", "\n".join(lines))
    return root


def write_planet(root):
    """Names without suffix and two blanks between tags; the test images have a table of their own."""
    for split in LABELS:
        lines = ["image_name,tags"]
        for row, labels in enumerate(LABELS[split]):
            write(root / f"{split}-jpg" / f"{split}_{row}.jpg", IMAGES[split][row])
            lines.append(f"{split}_{row},{'  '.join(labels)} ")
        write(root / f"{split}_v2.csv", "\n".join(lines))
    return root


def write_isic(root):
    for split in LABELS:
        lines = [f"image,{','.join(NAMES)}"]
        for row, labels in enumerate(LABELS[split]):
            write(root / f"ISIC_{split}_Input" / f"ISIC_{split}{row}.jpg", IMAGES[split][row])
            lines.append(f"ISIC_{split}{row},{','.join(str(float(name in labels)) for name in NAMES)}")
        write(root / f"ISIC_{split}_GroundTruth.csv", "\n".join(lines))
    return root


def write_yolo(root, layout):
    """`ultralytics`: images/SPLIT and names by number; `roboflow`: SPLIT/images and ../; `label_studio`: one part;
    `darknet`: boxes beside the images."""
    for split, row, labels, content in each():
        if layout == "darknet":
            write(root / split / f"{row}.jpg", content)
            lines = [f"{NAMES.index(label)} 0.5 0.5 0.25 0.25" for label in labels]
            write(root / split / f"{row}.txt", "\n".join(lines))
            write(root / split / "_darknet.labels", "\n".join(NAMES))
            continue
        if layout == "label_studio" and split == "test":
            continue
        folder = {"ultralytics": f"%s/{split}", "roboflow": f"{split}/%s", "label_studio": "%s"}[layout]
        write(root / (folder % "images") / f"{row}.jpg", content)
        if labels or layout != "ultralytics":  # an image without a file of labels shows none
            lines = "".join(f"{NAMES.index(label)} 0.5 0.5 0.25 0.25\n" for label in labels)
            write(root / (folder % "labels") / f"{row}.txt", lines)
    if layout == "ultralytics":
        names = "".join(f"  {index}: {name}\n" for index, name in enumerate(NAMES))
        write(root / "data.yaml", f"path: ../datasets/x\ntrain: images/train\nval:\ntest: images/test\nnames:\n{names}")
    elif layout == "darknet":
        pass
    elif layout == "roboflow":
        write(root / "data.yaml", f"train: ../train/images\ntest: ../test/images\nnc: 3\nnames: {NAMES}\n")
    else:
        write(root / "classes.txt", "\n".join(NAMES))
        write(root / "notes.json", "{}")
    return root


def write_tag_files(root, layout):
    """`kohya`: commas in .txt; `caption`; `lines`: one a line in 1.jpg.txt, as booru downloaders write; `meta_lat`: one
    json of all."""
    entries = {}
    for split, row, labels, content in each():
        write(root / split / "10_all" / f"{row}.jpg", content)
        if layout == "meta_lat":
            entry = {"caption": "a photo", "tags": ", ".join(labels), "train_resolution": [64, 64]}
            entries[f"/home/me/set/{split}/10_all/{row}.jpg"] = entry
            write(root / "meta_lat.json", json.dumps(entries))
            continue
        name = {"kohya": f"{row}.txt", "caption": f"{row}.caption", "lines": f"{row}.jpg.txt"}[layout]
        write(root / split / "10_all" / name, ("\n" if layout == "lines" else ", ").join(labels))
    return root


def write_label_folders(root):
    """An image without a label has no place in this layout."""
    for split, row, labels, content in each():
        for place, label in enumerate(labels):
            write(root / split / label / f"{row}-{place}.jpg", content)
    return root


def write_webdataset(root, layout):
    root.mkdir(parents=True)
    for split in LABELS:
        with tarfile.open(root / f"{split}-000000.tar", "w") as shard:
            for row, labels in enumerate(LABELS[split]):
                content = {
                    "json": ("json", json.dumps({"labels": labels, "url": "x"})),
                    "txt": ("txt", ", ".join(labels)),
                    "cls": ("cls", " ".join(str(NAMES.index(label)) for label in labels)),
                }[layout]
                for suffix, data in (("jpg", IMAGES[split][row]), (content[0], content[1].encode())):
                    member = tarfile.TarInfo(f"./{row:05}.{suffix}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    if layout == "cls":
        write(root / "labels.txt", "\n".join(NAMES))
    return root


def write_struct_parquet(root, layout):
    """`objects.category` of a struct of lists, of a list of structs; lists of string_view."""
    root.mkdir(parents=True)
    for split, rows in LABELS.items():
        images = pa.array([{"bytes": content, "path": None} for content in IMAGES[split]])
        if layout == "struct":
            column = {"objects": [{"category": labels, "id": list(range(len(labels)))} for labels in rows]}
        elif layout == "list":
            column = {"objects": [[{"category": label, "id": 1} for label in labels] for labels in rows]}
        else:
            column = {"labels": pa.array(rows, pa.list_(pa.string_view()))}
        pq.write_table(pa.table({"image": images, **column}), root / f"{split}.parquet")
    return root


def write_root_metadata(root, form):
    """One table of all splits in the root."""
    put_images(root, lambda split, row: f"{split}/{row}.jpg")
    if form == "jsonl":
        rows = [json.dumps({"file_name": f"{split}/{row}.jpg", "labels": labels}) for split, row, labels, _ in each()]
        write(root / "metadata.jsonl", "\n".join(rows))
    else:
        rows = [f",file_name,{','.join(NAMES)},"]
        for index, (split, row, labels, _) in enumerate(each()):
            rows.append(f"{index},{split}/{row}.jpg,{','.join(str(int(name in labels)) for name in NAMES)},")
        write(root / "labels.csv", "\n".join(rows))
    return root
