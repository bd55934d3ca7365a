"""carafepp-validate: its list of problems by image, annotation and rule, and its exit status."""

import json

import pytest
from carafepp.scripts.validate import find_files, find_problems
from coco_files import content, write
from commands import call, run_command
from omegaconf import OmegaConf
from PIL import Image


def test_problems_are_listed_and_counted(tmp_path):
    made = content()
    made["annotations"][0]["category_id"] = 5
    made["annotations"][3]["bbox"] = [200, 10, 5, 5]
    folder = write(tmp_path / "root", made)
    (folder / "val2017" / "000000000632.jpg").unlink()
    done = run_command("validate", f"data={folder}")
    assert done.returncode == 1
    assert done.stdout.count("image 139, annotation 7001: unknown category (category_id 5)") == 2
    assert done.stdout.count("image 285, annotation 813: box outside the image") == 2
    assert f"image 632, annotation None: image file missing ({folder}/val2017/000000000632.jpg)" in done.stdout
    assert "2 x unknown category: annotation is not trained on" in done.stdout
    assert "1 x image file missing: training does not begin" in done.stdout
    assert done.stderr.strip() == ""


def settings(**given):
    return OmegaConf.create({"data": None, "annotations": None, "images": None} | given)


def test_one_file_without_problems(tmp_path, capsys):
    folder = write(tmp_path / "root")
    annotations, images = folder / "annotations" / "instances_val2017.json", folder / "val2017"
    (pair,) = find_files(settings(annotations=str(annotations), images=str(images)))
    assert find_problems(*pair, decode=True) == []
    assert capsys.readouterr().out == f"{annotations}: 4 images, 6 annotations, 0 problems\n"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "give data=FOLDER in COCO's layout, or annotations=FILE and images=FOLDER"),
        ({"annotations": "a.json"}, ValueError, "give data=FOLDER"),
        ({"data": "nowhere"}, FileNotFoundError, "data=nowhere has neither"),
    ],
)
def test_what_is_missing_is_said(given, error, message):
    with pytest.raises(error, match=message):
        find_files(settings(**given))


@pytest.mark.parametrize("name", ["../secret.jpg", "inside/../../secret.jpg", "{folder}/secret.jpg"])
def test_files_outside_the_folder_are_not_opened(tmp_path, capsys, monkeypatch, name):
    made = content()
    folder = tmp_path / "root"
    made["images"][0]["file_name"] = name.format(folder=folder)
    write(folder, made)
    (folder / "val2017" / "000000000139.jpg").rename(folder / "secret.jpg")
    (folder / "val2017" / "inside").mkdir()
    opened = []
    decode = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *options: (opened.append(str(path)), decode(path, *options))[1])
    options = [f"annotations={folder}/annotations/instances_val2017.json", f"images={folder}/val2017"]
    with pytest.raises(SystemExit):
        call("validate", *options)
    assert "1 x file_name leaves the image folder: training does not begin" in capsys.readouterr().out
    assert len(opened) == 3
    assert not any("secret" in path for path in opened)
    call("validate", *options, "allow_outside=true")
    assert any("secret" in path for path in opened)


def test_file_that_is_cut_off_is_named(tmp_path):
    (tmp_path / "cut.json").write_text(json.dumps(content())[:-40])
    with pytest.raises(ValueError, match="is not valid JSON"):
        find_problems(tmp_path / "cut.json", tmp_path, decode=False)
