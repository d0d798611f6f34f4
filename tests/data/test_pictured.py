"""Questions about pictures: files, drawings, and errors that name the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmsurgery.data.drawings import COLOURS, GROUNDS, SHAPES, SIZE, Drawing
from llmsurgery.data.pictured import open_picture, pictures_digest, read_pictured, shows_pictures
from llmsurgery.errors import InputError

ROW: dict[str, object] = {
    "image": {"shape": "circle", "colour": "red", "ground": "dark", "seed": 3},
    "question": "Which colour?",
    "choices": ["red", "blue"],
    "answer": "red",
}


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawing_shows_what_it_says(shape: str, ground: str) -> None:
    for seed in range(20):
        picture = Drawing(shape, "blue", ground, seed).pixels()
        inside = np.nonzero((picture == COLOURS["blue"]).all(-1))
        assert picture.shape == (SIZE, SIZE, 3)
        assert 60 < len(inside[0]) < SIZE * SIZE / 2
        assert abs(float(np.median(picture)) - GROUNDS[ground]) <= 15
    assert np.array_equal(picture, Drawing(shape, "blue", ground, 19).pixels())


def test_paths_are_relative_to_the_file(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    (tmp_path / "pictures").mkdir()
    picture = Drawing("square", "green", "light", 5).pixels()
    Image.fromarray(picture).save(tmp_path / "pictures/one.png")
    path = write_jsonl("mcq.jsonl", [{**ROW, "image": "pictures/one.png", "answer": 1}, ROW])
    found = read_pictured(path)
    assert shows_pictures(path)
    assert found.groups == [("red", "blue")]
    assert [question.answer for question in found.questions] == [1, 0]
    assert np.array_equal(np.asarray(open_picture(found.questions[0])), picture)
    before = pictures_digest(found.questions)
    Image.fromarray(picture[::-1]).save(tmp_path / "pictures/one.png")
    assert pictures_digest(read_pictured(path).questions) != before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "no.png"}, r"mcq.jsonl:2: .*no.png is no picture"),
        ({"image": "mcq.jsonl"}, r"mcq.jsonl:2: .* is no picture"),
        ({"image": None}, "image is no path"),
        ({"image": {"shape": "star", "colour": "red"}}, "describes no drawing"),
        ({"answer": "pink"}, "'pink' is none of the choices"),
        ({"answer": 2}, "none of the choices"),
        ({"choices": ["red", "red"]}, "two or more different"),
        ({"question": " "}, "question is empty"),
    ],
)
def test_bad_records_name_the_line(row: dict[str, object], message: str, write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl("mcq.jsonl", [ROW, {**ROW, **row}])
    with pytest.raises(InputError, match=message) as caught:
        read_pictured(path)
    assert caught.value.exit_code == 3
    assert "mcq.jsonl:2" in str(caught.value)


def test_a_record_without_a_picture_is_named(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl("mcq.jsonl", [{key: value for key, value in ROW.items() if key != "image"}])
    assert not shows_pictures(path)
    with pytest.raises(InputError, match="no question about a picture"):
        read_pictured(path)
