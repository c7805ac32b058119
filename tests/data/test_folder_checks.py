"""Image folders as the world leaves them: what is read, what is skipped and said, what is refused."""

import os
import socket

import pytest
from image_samples import write_photo
from PIL import Image

from rfdarts_fast.data import DataError, load
from rfdarts_fast.data.checks import check_photos, unusable


def refused(root, message):
    with pytest.raises(DataError, match=message) as error:
        load("imagefolder", root=root)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_link_back_to_a_folder_above_is_followed_once(photos, capsys):
    ant = photos / "train" / "ant"
    (ant / "itself").symlink_to(ant)
    (ant / "all").symlink_to(photos)
    (ant / "more").mkdir()
    (ant / "more" / "up").symlink_to("..")
    source = load("imagefolder", root=photos)
    assert source.train.labels.tolist() == [0] * 6 + [1] * 6
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{photos}/train: 12 images; skipped 3 links to a folder read before (" in said


def test_a_link_to_a_folder_elsewhere_is_followed(photos, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_photo(elsewhere / "9.png", 20, 20, 0)
    (photos / "train" / "ant" / "one").symlink_to(elsewhere)
    (photos / "train" / "ant" / "two").symlink_to(elsewhere)
    (photos / "train" / "ant" / "x.png").symlink_to(elsewhere / "9.png")
    # the folder once, however many lead to it; the link to the file is a file of its own
    assert load("imagefolder", root=photos).train.labels.tolist() == [0] * 8 + [1] * 6


def test_a_class_that_is_a_link_to_all_classes_is_empty(photos):
    (photos / "train" / "loop").symlink_to(photos / "train")
    refused(photos, r"train/loop: expected image files \(.*\), got none")


def test_what_is_skipped_is_said(photos, capsys):
    for i in range(7):
        (photos / "train" / "ant" / f"notes{i}.txt").write_text("no image")
    load("imagefolder", root=photos)
    said = capsys.readouterr().err
    assert "train: 12 images; skipped 7 files of other suffixes (" in said
    assert said.count("notes") == 5
    assert "and 2 more)" in said


def test_nothing_is_said_of_a_tidy_folder(photos, capsys):
    load("imagefolder", root=photos)
    assert capsys.readouterr() == ("", "")


def fifo(path):
    os.mkfifo(path)


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


SPECIAL = {
    "FIFO": (fifo, "a FIFO"),
    "socket": (bound_socket, "a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "broken link": (lambda path: path.symlink_to("gone.png"), "a broken link"),
    "link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "empty": (lambda path: path.touch(), "got none"),
}


@pytest.mark.parametrize("special", SPECIAL)
def test_files_that_are_none(photos, monkeypatch, special):
    make, there = SPECIAL[special]
    # a socket's path has to be short
    monkeypatch.chdir(photos / "train" / "bee")
    make(photos / "train" / "bee" / "x.png")
    message = refused(
        photos, rf"1 of 13 images cannot be used: .*bee/x\.png: expected a readable image.*{there}"
    )
    assert "ant" not in message


def test_classes_without_images_are_all_named(photos):
    for name in ("cat", "dog"):
        (photos / "train" / name).mkdir()
    refused(photos, r"train/cat, .*train/dog: expected image files")


def test_every_bad_file_is_counted_and_five_are_named(photos):
    good = (photos / "train" / "ant" / "0.png").read_bytes()
    for i in range(9):
        (photos / "train" / "bee" / f"bad{i}.png").write_bytes(good[: 40 + i])
    message = refused(photos, "^9 of 21 images cannot be used: ")
    assert [f"bad{i}.png" in message for i in range(9)] == [True] * 5 + [False] * 4
    assert message.endswith("; and 4 more")


def test_bad_images_to_evaluate_on_are_found_before_the_run_too(photos):
    Image.new("F", (4, 4)).save(photos / "val" / "ant" / "x.tiff")
    refused(photos, r"^1 of 5 images cannot be used: .*val/ant/x\.tiff: .*got mode F \(TIFF\)")


def test_a_name_of_several_lines_makes_one(photos):
    (photos / "train" / "bee" / "x\n\x1b[31m\udc80.png").write_text("no image")
    assert r"x \x1b[31m\udc80.png" in refused(photos, "1 of 13 images cannot be used")


def test_a_folder_that_is_none(photos):
    os.mkfifo(photos / "pipe")
    for root, there in (("pipe", "a FIFO"), ("/dev/null", "a device"), ("x" * 300, "File name too long")):
        refused(photos / root, f"expected a folder that holds train/<class>/\\*, got {there}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(photos):
    (photos / "train" / "bee").chmod(0)
    refused(photos, "train/bee: expected a readable folder, got Permission denied")
    (photos / "train" / "bee").chmod(0o700)


def test_many_files_are_checked_with_a_bar_on_a_terminal(photos, monkeypatch, capsys):
    paths = [photos / "train" / "ant" / "0.png"] * 1000 + [photos / "gone.png"]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    problems = check_photos(paths, decode=False)
    assert list(problems) == [1000]
    assert unusable([*problems.values()], 1001).startswith("1 of 1001 images cannot be used: ")
    assert "gone.png: expected a readable image, got nothing there" in problems[1000]
    said = capsys.readouterr().err
    assert "checking images" in said
    assert "0/1001" in said
