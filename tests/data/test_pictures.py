import os
import threading

import numpy as np
import pytest

from effnet_hf.data import pictures
from effnet_hf.data.pictures import BadPicture, Box, Picture, read_file

from .torture import bad_files, encode, exif_jpeg, odd_files, photo


@pytest.mark.parametrize("name", sorted(bad_files()))
def test_bad_files_are_bad_whichever_way_they_are_decoded(name, monkeypatch):
    data = bad_files()[name]
    for decoder in (pictures.simplejpeg, None):
        monkeypatch.setattr(pictures, "simplejpeg", decoder)
        with pytest.raises(BadPicture, match=r"^(is|cannot)"):
            Picture(data).rgb().load()
        with pytest.raises(BadPicture):
            Picture(data).crop(Box(0, 0, 1, 1))


@pytest.mark.parametrize("name", sorted(odd_files()))
def test_crops_are_the_same_with_and_without_the_fast_decoder(name, monkeypatch):
    picture = Picture(odd_files()[name])
    whole = Box(0, 0, picture.width, picture.height)
    fast = picture.crop(whole).permute(1, 2, 0).numpy()
    assert np.array_equal(fast, np.asarray(picture.rgb()))
    monkeypatch.setattr(pictures, "simplejpeg", None)
    assert np.array_equal(fast, Picture(odd_files()[name]).crop(whole).permute(1, 2, 0).numpy())


def test_crop_is_the_rectangle_asked_for():
    picture = Picture(encode(photo(1), "PNG"))
    box = Box(5, 7, 20, 30)
    assert np.array_equal(picture.crop(box).permute(1, 2, 0).numpy(), np.asarray(photo(1))[7:37, 5:25])


def test_sizes_are_upright():
    assert (Picture(exif_jpeg(6)).width, Picture(exif_jpeg(6)).height) == (72, 96)
    assert (Picture(exif_jpeg(1)).width, Picture(exif_jpeg(1)).height) == (96, 72)
    assert Picture(exif_jpeg(1)).plain_jpeg and not Picture(exif_jpeg(6)).plain_jpeg


def test_preloaded_pixels_serve_their_own_rectangle_only():
    picture = Picture(encode(photo(1), "JPEG"))
    box = Box(1, 2, 8, 8)
    marked = picture.crop(box) * 0 + 9
    picture.preload(box, marked)
    assert picture.crop(box).unique().tolist() == [9]
    assert len(picture.crop(Box(0, 0, 8, 8)).unique()) > 1
    assert len(np.unique(np.asarray(picture.rgb()))) > 1


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(BadPicture, match="has vanished"):
        read_file(str(tmp_path / "nothing.jpg"))
    with pytest.raises(BadPicture, match="cannot be read: Is a directory"):
        read_file(str(tmp_path))
    if os.geteuid() != 0:
        (tmp_path / "locked.jpg").touch(mode=0)
        with pytest.raises(BadPicture, match="permission denied"):
            read_file(str(tmp_path / "locked.jpg"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    result = []

    def read():
        with pytest.raises(BadPicture, match="is not a file but a pipe"):
            read_file(str(tmp_path / "pipe.jpg"))
        result.append("done")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert result == ["done"]
