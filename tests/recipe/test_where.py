"""The grammar of `where`: it means what Python means, what is not there decides nothing, and nothing is evaluated."""

import pickle
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.recipe.where import Where, WhereError

NUMBERS = st.one_of(st.integers(-3, 3), st.sampled_from([-0.5, 0.0, 0.5, 1.0, 1e3]))
TEXTS = st.text("ab'\" \\é", max_size=3)
FIELDS = {
    "width": NUMBERS,
    "similarity": NUMBERS,
    "caption": TEXTS,
    "license": TEXTS,
    "nsfw": st.booleans(),
    "tags": st.lists(TEXTS, max_size=3),
}
SAMPLES = st.fixed_dictionaries(FIELDS)
LIKE = {"<", "<=", ">", ">=", "==", "!="}


@st.composite
def _comparisons(draw):
    of_numbers, of_texts = st.sampled_from(["width", "similarity"]), st.sampled_from(["caption", "license"])
    fields, constants = draw(st.sampled_from([(of_numbers, NUMBERS), (of_texts, TEXTS)]))
    operand = st.one_of(fields, constants.map(repr))
    left = draw(fields)
    kind = draw(st.sampled_from(["chain", "list", "inside", "flag"]))
    if kind == "chain":
        signs = draw(st.lists(st.sampled_from(sorted(LIKE)), min_size=1, max_size=2))
        return " ".join([left, *(f"{sign} {draw(operand)}" for sign in signs)])
    if kind == "list":
        values = draw(st.lists(constants.map(repr), min_size=1, max_size=3))
        return f"{left} {draw(st.sampled_from(['in', 'not in']))} [{', '.join(values)}]"
    if kind == "inside":
        inside = draw(st.sampled_from(["caption", "tags"]))
        return f"{draw(TEXTS)!r} {draw(st.sampled_from(['in', 'not in']))} {inside}"
    return draw(st.sampled_from(["nsfw", "nsfw == True", "nsfw != false"]))


EXPRESSIONS = st.recursive(
    _comparisons(),
    lambda inner: st.one_of(
        inner.map(lambda text: f"not {text}"),
        inner.map(lambda text: f"({text})"),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join),
    ),
    max_leaves=6,
)


def by_python(text, sample):
    return eval(text, {"__builtins__": {}, "true": True, "false": False}, sample)


@given(EXPRESSIONS, SAMPLES)
@settings(max_examples=400, deadline=None)
def test_it_means_what_python_means(text, sample):
    assert Where(text)(sample) is by_python(text, sample)


@given(EXPRESSIONS, SAMPLES, SAMPLES, st.data())
@settings(max_examples=400, deadline=None)
def test_what_is_decided_without_a_field_is_so_whatever_the_field_is(text, sample, other, data):
    lost = data.draw(st.sets(st.sampled_from(sorted(FIELDS))))
    nothing = st.sampled_from([None, {}, {"inner": 1}])
    left = {name: data.draw(nothing) if name in lost else value for name, value in sample.items()}
    decided = Where(text)({name: value for name, value in left.items() if data.draw(st.booleans()) or name not in lost})
    if decided is not None:
        for name in lost:
            left[name] = other[name]
        assert by_python(text, left) is decided


@pytest.mark.parametrize(
    ("text", "sample", "chosen"),
    [
        ("width >= 512 and similarity > 0.3", {"width": 512, "similarity": 0.4}, True),
        ("width >= 512 and similarity > 0.3", {"width": 512}, None),
        ("width >= 512 and similarity > 0.3", {"width": 511}, False),
        ("width >= 512 or height >= 512", {"height": 600, "width": None}, True),
        ("not similarity > 0.3", {}, None),
        ("width >= 512", {"width": "700"}, None),  # a text is no number
        ("width != 512", {"width": "512"}, None),
        ("width == 1", {"width": True}, None),
        ("nsfw", {"nsfw": 1}, None),
        ("not nsfw", {"nsfw": False}, True),
        ("license in ['cc0', 'cc-by']", {"license": "cc0"}, True),
        ("license in ['cc0', 'cc-by']", {"license": 3}, None),
        ("'cat' in caption", {"caption": "a cat."}, True),
        ("'cat' in tags", {"tags": ["cat", 3]}, True),
        ("'cat' not in tags", {"tags": 3}, None),
        ("caption is missing", {"caption": None}, True),
        ("caption is not missing", {"caption": ""}, True),
        ("exif.model == 'X' and exif.iso < 800", {"exif": {"model": "X", "iso": 100}}, True),
        ("exif.model == 'X'", {"exif": "{}"}, None),
        ('field("aesthetic-score") > 5', {"aesthetic-score": 6}, True),
        ('field("class") == 3', {"class": 3}, True),
        ("-1 < width < +1", {"width": 0}, True),
        ("width < height", {"width": 3, "height": 4}, True),
        ("width > 0", {"width": float("nan")}, False),
        ("width >\n 0\n", {"width": 1}, True),
        ("tag == '#1'", {"tag": "#1"}, True),
        ("é == 1 and \u00b5m > 1 and (a . \ufb01 == 3)", {"é": 1, "\u00b5m": 2, "a": {"\ufb01": 3}}, True),
        ("tag == 'a\u2028b'", {"tag": "a\u2028b"}, True),
    ],
)
def test_examples(text, sample, chosen):
    where = Where(text)
    assert where(sample) is chosen
    assert pickle.loads(pickle.dumps(where))(sample) is chosen


def test_what_it_names():
    where = Where("exif.iso < 800 and (width > 3 or width < 1)")
    assert where.fields == (("exif", "iso"), ("width",))
    assert where.canonical == Where("  ((exif.iso<800)) and ((width > 3) or width<1)").canonical
    assert len({Where(text).canonical for text in ("a == 1", "a == 1.0", "a == '1'", "a == true", "b == 1")}) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the filter is empty"),
        ("1 < 2", r"'1 < 2': it names no field of the samples' \.json members"),
        ("width >= 512 adn x > 1", "at character 14: it cannot be read from `adn x > 1` on"),
        ("é == 'ü' and (b + 1) > 2", r"at character 15: `b \+ 1` is not of the grammar"),
        ("x == (1", r"at character 6: .*'\(' was never closed"),
        ("class == 3", r'at character 1: `class` is a word of Python; a field of this name is field\("class"\)'),
        ("a == null", "at character 6: `null` equals nothing; write FIELD is missing"),
        ("a is None", "at character 6: `None` cannot stand after `is`: write FIELD is missing"),
        ("missing > 3", "at character 1: `missing` can stand after `is` alone"),
        ("a and true", "at character 7: `true` is no condition"),
        ("a in 'x'", "at character 6: `'x'` cannot stand after `in`"),
        ("a in []", r"at character 6: `\[\]` needs constants of one kind"),
        ("a in [1, 'b']", r"at character 6: `\[1, 'b'\]` needs constants of one kind"),
        ("a in [b]", r"`\[b\]` needs constants of one kind"),
        ("a = 3", "at character 3: it cannot be read|at character 1: it cannot be read"),
        ("a.b() > 3", r"`a\.b\(\)` is no field"),
        ("__import__('os').system('touch /tmp/x')", "is no field"),
        ("[x for x in a]", "is not of the grammar"),
        ("(lambda: a)()", "is no field"),
        ("a if b else c", "is not of the grammar"),
        ("f'{a}' == 'x'", "is not of the grammar"),
        ("a[0] > 1", "is not of the grammar"),
        ("a > 1j", "is not of the grammar"),
        ("a\0b", "null bytes|cannot be read"),
        ("(" * 300 + "a" + ")" * 300, "nested"),
        ("not " * 60 + "a", "is nested too deeply"),
        ("not " * 2400 + "a", "nested too deeply"),
        ("a" + ".b" * 4000 + " > 1", "nested too deeply"),
        ("a > 1 or " * 2000, "18000 characters|17999 characters"),
        ("a > " + "9" * 5000, "cannot be read"),
        ("a > 1 # or b\nand c > 2", "at character 7: a `#` and what follows it would have no effect"),
        ("a in ['b' 'c']", "at character 11: two texts in a row would be one; write a comma"),
    ],
)
def test_mistakes_are_one_line_that_points_at_them(text, message):
    if "9999" in text and not hasattr(sys, "get_int_max_str_digits"):
        pytest.skip("this Python reads numbers of any length")
    with pytest.raises(WhereError, match=message) as caught:
        Where(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
