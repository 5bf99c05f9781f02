import pytest
from hypothesis import given, settings, strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

from rsground_nb.boxes import GRID, Codec, iou, parse_completion, smart_resize

side = st.integers(1, 4000)
coordinate = st.floats(-50, 1000, allow_nan=False)


@settings(max_examples=3000)
@given(side, side, st.sampled_from([(28, 3136, 12544), (28, 3136, 1003520), (32, 4096, 50176)]))
def test_smart_resize_is_the_processors_own(height, width, limits):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError): smart_resize(height, width, *limits)
    else: assert smart_resize(height, width, *limits) == reference(height, width, *limits)


@given(st.sampled_from(["pixel", "qwen2_5_vl", *GRID]), st.integers(30, 3000), st.integers(30, 3000), st.data())
def test_a_round_trip_is_off_by_half_a_unit_at_most(name, width, height, data):
    codec = Codec(name)
    box = [data.draw(st.floats(0, limit)) for limit in (width, height, width, height)]
    fw, fh = codec.frame(width, height)
    back = codec.decode(codec.encode(box, width, height), width, height)
    for before, after, unit in zip(box, back, [width / fw, height / fh] * 2): assert abs(before - after) <= unit / 2 + 1e-6


@given(st.tuples(*[coordinate] * 4), st.tuples(*[coordinate] * 4))
def test_iou_is_symmetric_and_between_0_and_1(a, b):
    assert 0 <= iou(a, b) <= 1 + 1e-9
    assert iou(a, b) == pytest.approx(iou(b, a))


@given(st.text() | st.text(alphabet="<>/answerthink[]0123456789,. -"))
def test_parsing_gives_a_box_or_a_reason_and_never_fails(text):
    parsed = parse_completion(text)
    assert (parsed.box is not None) == (parsed.reason == "ok")


def test_parsing_takes_linear_time_on_hostile_text():
    parse_completion("<answer>" * 100_000)
    parse_completion("<answer>" + "[1, " * 200_000 + "</answer>")
    parse_completion("<answer>[" + "9" * 500_000 + "</answer>")
