"""The report in a real browser: pictures are drawn, the slider moves, it fits a phone and paper, it reloads."""

import io
import json
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.record.report import write_report
from tests.browser import browser, needs_chromium

pytestmark = [pytest.mark.slow, needs_chromium]

PHONE, DESKTOP = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def window():
    with browser() as opened:
        yield opened


@pytest.fixture
def report(runs_folder):
    """On three runs, one with checkpoints of which one could not be written."""
    run = runs_folder / "maskmatch"
    saves = [{"step": 10, "kind": "checkpoint", "copy_s": 0.1, "wait_s": 0, "write_s": 1.5, "bytes": 2e9}]
    saves += [saves[0] | {"step": 20, "error": "/" + "long-name-of-a-folder/" * 12 + ": no room is left on this disk"}]
    with (run / "metrics.jsonl").open("a") as lines:
        lines.writelines(json.dumps(save) + "\n" for save in saves)
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "checkpoints" / "best").write_text("step-00000010 0.4375\n")
    return write_report([runs_folder / name for name in ("supervised", "fixmatch", "maskmatch")])


def pixel(window, x, y):
    """Colour of the window at a place, in px."""
    shot = window.call("Page.captureScreenshot")
    return np.array(Image.open(io.BytesIO(b64decode(shot["data"]))).convert("RGB"))[int(y), int(x)]


def frame_of(window):
    """Left, top, width, height of the first slider, scrolled into the window."""
    window.do("document.querySelector('.frame').scrollIntoView({block: 'center'})")
    return window.do(
        "(({x, y, width, height}) => [x, y, width, height])(document.querySelector('.frame').getBoundingClientRect())"
    )


@pytest.mark.parametrize(("size", "dark"), [(PHONE, False), (DESKTOP, False), (DESKTOP, True)])
def test_everything_is_drawn_and_nothing_complains(window, report, size, dark):
    window.problems.clear()
    window.open(report, *size, dark=dark)
    window.do("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    window.do("Promise.all([...document.querySelectorAll('img[src]')].map(i => i.decode()))")
    widths = window.do("[...document.querySelectorAll('img[src]')].map(i => i.naturalWidth)")
    # Per sample: two given pictures, three predictions, two of visible units; and three in the slider.
    assert len(widths) == 2 * (7 + 3)
    assert min(widths) > 0
    assert window.do("document.documentElement.scrollWidth") <= size[0]
    assert window.problems == []


def test_a_console_error_and_a_request_would_be_seen(window, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); nowhere();</script>")
    window.problems.clear()
    window.open(page)
    seen = " ".join(window.problems)
    window.problems.clear()
    assert "request: http://127.0.0.1:9/x.png" in seen
    assert '"no"' in seen
    assert "nowhere is not defined" in seen


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_slider_moves(window, report, size):
    """The image is a grey gradient, the prediction red."""
    window.open(report, *size)
    window.do("(s => { s.value = 0; s.dispatchEvent(new Event('change')); })(document.querySelector('.sides select'))")
    x, y, width, height = frame_of(window)
    place = (x + 0.25 * width, y + 0.3 * height)
    red, grey, blue = pixel(window, *place)
    assert red == pytest.approx(int(grey), abs=12) == pytest.approx(int(blue), abs=12)
    assert tuple(pixel(window, x + 0.75 * width, place[1])) == (200, 30, 30)
    window.drag((x + 0.5 * width, y + height / 2), (x + 0.1 * width, y + height / 2))
    assert float(window.do("document.querySelector('.frame input').value")) == pytest.approx(10, abs=4)
    assert tuple(pixel(window, *place)) == (200, 30, 30)
    before = float(window.do("document.querySelector('.frame input').value"))
    window.press("ArrowRight")
    assert float(window.do("document.querySelector('.frame input').value")) > before


def test_sides_offer_every_picture_of_the_sample(window, report):
    window.open(report)
    offered = window.do("[...document.querySelectorAll('.sides select')[1].options].map(o => o.text)")
    assert offered == [
        *("Image", "Label", "supervised", "FixMatch", "MaskMatch"),
        *("MaskMatch: visible units (30%)", "MaskMatch: prediction from these alone"),
    ]
    chosen = window.do("[...document.querySelectorAll('.sides')[0].children].map(s => s.selectedOptions[0].text)")
    assert chosen == ["Label", "MaskMatch: prediction from these alone"] or chosen == ["Label", "MaskMatch"]


def test_a_crop_lies_in_its_place_in_the_image(window, report, runs_folder):
    sample = runs_folder / "maskmatch" / "pictures" / "val" / "0000-bach-bwv66.6"
    Image.new("RGB", (24, 16), (0, 200, 0)).save(sample / "visible.png")
    write_report([runs_folder / "maskmatch"], report)
    window.open(report)
    window.do(
        "(s => { s.value = 3; s.dispatchEvent(new Event('change')); })(document.querySelectorAll('.sides select')[1])"
    )
    place = window.do("document.querySelector('.layer.right img').style.cssText")
    assert place == "left: 25%; top: 25%; width: 50%; height: 50%;"


def test_settings_are_readable_on_a_phone(window, report):
    """A list: each key with its values on lines of their own, and their runs beside them."""
    window.open(report, *PHONE)
    first = window.do("document.querySelector('h2').textContent")
    assert first == "Settings that differ"
    boxes = window.do(
        "[...document.querySelectorAll('#differing td code')].map(c => [c.textContent, c.getClientRects().length])"
    )
    assert ["[0.5, 1.0, 1.5]", 1] in boxes
    assert max(lines for _, lines in boxes) == 1
    labels = window.do(
        "[...document.querySelectorAll('#differing td')].map(c => getComputedStyle(c, '::before').content)"
    )
    assert labels[:3] == ['"supervised"', '"fixmatch"', '"maskmatch"']
    widest = window.do(
        "Math.max(...[...document.querySelectorAll('#headline td')].map(c => c.getBoundingClientRect().right))"
    )
    assert widest <= PHONE[0]


def test_checkpoints_and_failures(window, report):
    window.open(report)
    (cells,) = window.do(
        "[...document.querySelectorAll('#checkpoints tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    assert cells == ["maskmatch", "1", "1", "step 10", "2", "0.1 s", "1.5 s", "step-00000010: 0.438"]
    assert "no room is left" in window.do("document.querySelector('.failed li').textContent")


def test_enlarging_a_picture(window, report):
    window.open(report)
    window.do("document.querySelector('.zoom').click()")
    assert window.do("document.querySelector('dialog').open")
    window.press("ArrowRight")
    assert "label map" in window.do("document.querySelector('dialog div').textContent")
    window.press("Escape")
    assert not window.do("document.querySelector('dialog').open")


def test_on_paper(window, report, tmp_path):
    """All that is folded away is unfolded, nothing is cut off, and no controls are printed."""
    window.open(report, 700, 900)
    window.do("dispatchEvent(new Event('beforeprint'))")
    assert window.do("[...document.querySelectorAll('details')].every(d => d.open)")
    window.call("Emulation.setEmulatedMedia", media="print")
    assert window.do("document.documentElement.scrollWidth") <= 700
    assert window.do("getComputedStyle(document.querySelector('.compare')).display") == "none"
    assert window.do("getComputedStyle(document.querySelector('pre')).whiteSpace") == "pre-wrap"
    window.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_the_page_of_a_live_run_loads_itself_again_as_the_reader_left_it(window, runs_folder):
    run = runs_folder / "maskmatch"
    page = write_report([run], live_s=3)
    window.problems.clear()
    window.open(page, *PHONE)
    assert "step 40 of 40" in window.do("document.querySelector('#live').textContent")
    window.do("(s => { s.value = 0; s.dispatchEvent(new Event('change')); })(document.querySelector('.sides select'))")
    window.do("(s => { s.value = 20; s.dispatchEvent(new Event('input')); })(document.querySelector('.frame input'))")
    window.do("document.querySelectorAll('details')[1].open = true")
    window.do("scrollTo(0, 700)")
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 41, "kind": "train", "loss": 1.0}) + "\n")
    write_report([run], live_s=3)
    window.until(
        "document.readyState === 'complete' && document.querySelector('#live').textContent.includes('step 41 of 40')"
    )
    assert window.do("document.querySelector('.frame input').value") == "20"
    assert window.do("getComputedStyle(document.querySelector('.frame')).getPropertyValue('--at')") == "20%"
    assert window.do("document.querySelector('.sides select').selectedOptions[0].text") == "Image"
    assert window.do("document.querySelectorAll('details')[1].open")
    assert window.do("scrollY") == pytest.approx(700, abs=2)
    write_report([run])  # the run has ended
    window.until("document.readyState === 'complete' && document.querySelector('#live') === null")
    assert window.problems == []


def test_a_browser_that_keeps_nothing_still_loads_the_page_of_a_live_run_again(window, runs_folder):
    forbid = (
        "Object.defineProperty(window, 'sessionStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    )
    script = window.call("Page.addScriptToEvaluateOnNewDocument", source=forbid)["identifier"]
    window.problems.clear()
    run = runs_folder / "maskmatch"
    window.open(write_report([run], live_s=1), *PHONE)
    write_report([run])
    window.until("document.readyState === 'complete' && document.querySelector('#live') === null")
    window.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
    assert window.problems == []
