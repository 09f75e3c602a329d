"""Appendix 76 in a real browser, from a file, without a network: a reader's model writes, wrong files are named."""
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from browser import browser, needs_browser, watch
from test_live import FAMILIES, some_weights

from transformer_llm.checkpoints import save_checkpoint
from transformer_llm.generation import generate_text
from transformer_llm.live.your_model import your_model_html
from transformer_llm.tokenizer import BPETokenizer

pytestmark = needs_browser
CONFIG = FAMILIES["llama"].replace(vocab_size=270)
DARK = '<style>@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } }</style>'


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "The page, a run of two checkpoints, and files that can't be used."
    folder = tmp_path_factory.mktemp("your-model")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Your model</title>{DARK}<main><h1>Model</h1>'
    (folder / "page.html").write_text(f"{head}{your_model_html()}</main>", encoding="utf-8")
    tokenizer = BPETokenizer.train("to be or not to be, that is the question " * 3, 270)
    for step in (5, 10):
        save_checkpoint(folder / "run", step, some_weights(CONFIG, step), tokenizer=tokenizer)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "config.json").write_text(json.dumps({"n_heads": 3, "d_model": 16}))
    (folder / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
    return folder


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture
def page(chromium, home):
    "The page as a phone shows it; afterwards, that it asked for nothing and complained about nothing."
    page = chromium.new_page(viewport={"width": 375, "height": 700})
    notes = watch(page, home)
    page.goto((home / "page.html").as_uri())
    yield page
    assert not notes.problems(), notes.problems()
    page.close()


def part(page, name: str):
    return page.locator(f'[data-part="{name}"]')


def open_run(page, home: Path) -> None:
    part(page, "folder").set_input_files(home / "run")
    part(page, "work").wait_for()


def test_the_newest_checkpoint_writes_the_packages_text(page, home):
    "By keyboard, at temperature 0, past the context length, token by token."
    open_run(page, home)
    assert "step-0000010" in part(page, "status").text_content()
    part(page, "prompt").fill("to be")
    part(page, "temperature").fill("0")
    part(page, "count").fill("60")
    part(page, "write").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('[data-part=status]').textContent.includes('per second')")
    tokenizer = BPETokenizer.load(home / "run" / "step-0000010")
    model = some_weights(CONFIG, 10)
    [wanted] = generate_text(model, tokenizer, "to be", 60, temperature=0.0)
    assert part(page, "text").text_content() == wanted
    assert len(wanted) > 20


def test_attention_and_next_tokens_are_the_packages(page, home):
    open_run(page, home)
    part(page, "prompt").fill("to be or not")
    part(page, "layer").select_option("1")
    part(page, "head").select_option("2")
    part(page, "look").click()
    tokenizer = BPETokenizer.load(home / "run" / "step-0000010")
    model, ids = some_weights(CONFIG, 10), torch.tensor([tokenizer.encode("to be or not")])
    row = model.attention_maps(ids)[1][0, 2, -1]
    shares = [button.get_attribute("title") for button in part(page, "tokens").locator("button").all()]
    for share, weight in zip(shares, row.tolist(), strict=True):
        assert abs(int(share.split()[0]) - 100 * weight) <= 0.501
    with torch.no_grad():
        best = model(ids)[0, -1].softmax(0).topk(10).values.tolist()
    found = [float(cell.split()[0]) for cell in part(page, "next").locator("td:nth-of-type(1)").all_text_contents()]
    assert found == pytest.approx([100 * p for p in best], abs=0.051)
    part(page, "tokens").locator("button").first.press("Enter")
    assert "(100 %)" in part(page, "most").text_content()  # the first token can only look at itself


def test_a_folder_can_be_dropped(page, home):
    "A real folder of two checkpoints, dragged from outside of the browser onto the page."
    part(page, "drop").scroll_into_view_if_needed()
    box = part(page, "drop").bounding_box()
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(home / "run")], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "data": data, **at})
    page.wait_for_function("document.querySelector('[data-part=status]').textContent.includes('step-0000010')")
    assert part(page, "work").is_visible()


def test_wrong_files_get_a_sentence(page, home):
    part(page, "files").set_input_files([home / "damaged" / "model.safetensors"])
    page.wait_for_function("document.querySelector('.wrong')?.textContent.includes('config.json')")
    part(page, "folder").set_input_files(home / "damaged")
    page.wait_for_function("document.querySelector('.wrong')?.textContent.includes('n_heads')")
    assert part(page, "work").is_hidden()
    open_run(page, home)
    part(page, "top_k").fill("0")
    part(page, "write").click()
    page.wait_for_function("document.querySelector('.wrong')?.textContent.includes('top_k')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_a_phone_is_wide_enough(page, home, scheme):
    page.emulate_media(color_scheme=scheme)
    open_run(page, home)
    axe = next(Path(find_spec("axe_playwright_python").origin).parent.rglob("axe.min.js"))
    page.evaluate(axe.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document).then(r => r.violations.map(v => v.id + ': ' + v.nodes[0].html))")
    assert not found
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_without_a_script_nothing_dead_is_shown(chromium, home):
    page = chromium.new_context(java_script_enabled=False).new_page()
    page.goto((home / "page.html").as_uri())
    assert not page.locator("button:visible, input:visible").count()
