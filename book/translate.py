"""From a notebook that was written for JupyterLab to one that a site can show: plain markdown and raw HTML, which
Quarto and
our own renderer show alike. Nothing is executed; outputs are those that the notebook holds."""
import ast
import base64
import html
import io
import json
import re
import struct
from pathlib import Path

import api
from PIL import Image

from transformer_llm.live import live_source

EQUATION = re.compile(
    r"^([ \t]*)\$\$((?:(?!\$\$).)*?)\\tag\{([\w.]+)\}((?:(?!\$\$).)*?)\$\$[ \t]*([.,;]?)[ \t]*$", re.S | re.M
)
EXERCISE = re.compile(
    r"^> \*\*Exercise (\d+\.\d+)(?: \(([^)]*)\))?\.\*\*([^\n]*(?:\n>[^\n]*)*)((?:\s*<details>.*?</details>)*)",
    re.M | re.S,
)
FOLDED = re.compile(r"\A# (.+)\n#\| code-fold: true$", re.M)  # what a closed cell shows in JupyterLab is its first line
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", re.M)
IMAGES = {"image/png": "png", "image/jpeg": "jpg"}


def source(cell: dict) -> str:
    return "".join(cell["source"])


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def directives(text: str) -> dict[str, str]:
    "The `#| key: value` lines of a cell."
    return {key: value.strip().strip('"') for key, value in DIRECTIVE.findall(text)}


def without_directives(text: str, *names: str) -> str:
    "A cell's text without the directives of these names, or without any."
    return "\n".join(
        line
        for line in text.split("\n")
        if not ((found := DIRECTIVE.match(line)) and (not names or found.group(1) in names))
    ).strip("\n")


def outside_code(text: str, change) -> str:
    "Apply `change` to what stands outside of fenced code."
    parts = re.split(r"(^```.*?^```)", text, flags=re.S | re.M)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def equations(text: str) -> str:
    r"Give each equation with a \tag an anchor, and set its number beside it."
    def box(found: re.Match) -> str:
        indent, before, number, after, stop = found.groups()
        lines = ["", f'<div class="equation" id="equation-{number}">', "", f"$${(before + after).strip()}{stop}$$", "",
                 f'<div class="number">({number})</div>', "", "</div>", ""]
        return "\n".join(indent + line for line in "\n".join(lines).split("\n"))
    return outside_code(text, lambda part: EQUATION.sub(box, part))


def exercises(text: str) -> tuple[str, str]:
    """Turn exercises in block quotes into boxes.

    Also returns the number of one that the cell ends with, whose box stays open.
    """
    matches = list(EXERCISE.finditer(text))
    last = matches[-1] if matches and not text[matches[-1].end():].strip() else None

    def box(found: re.Match) -> str:
        number, kind, quote, hints = found.groups()
        body = re.sub(r"^> ?", "", quote.strip(), flags=re.M)
        label = f' <span class="kind">{html.escape(kind)}</span>' if kind else ""
        end = "" if last and found.start() == last.start() else "\n\n</div>"
        head = f'<div class="exercise" id="exercise-{number}">\n<p class="title">Exercise {number}{label}</p>'
        return f"\n{head}\n\n{body}\n\n{hints.strip()}{end}\n\n"

    return EXERCISE.sub(box, text), last.group(1) if last else ""


def size_of_png(data: bytes) -> str:
    "A picture's width and height as attributes, so that nothing moves when it arrives."
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return ""
    width, height = struct.unpack(">II", data[16:24])
    return f' width="{width}" height="{height}"'


def lighter(data: bytes, kind: str) -> bytes:
    "A picture with a palette of 256 colours, where that makes it smaller: plots have few colours and their edges."
    if kind != "image/png":
        return data
    made = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    except OSError:  # what can't be read as a picture is shown as it is
        return data
    return min(data, made.getvalue(), key=len)


def figures(cell: dict, page: str, folder: Path, count: int) -> list[dict]:
    """A cell's pictures as files in `folder`, and the cell (without them) followed by a figure with its caption and
    alternative text.
    """
    said = directives(source(cell))
    images, rest = [], []
    for output in cell.get("outputs", []):
        kind = next((k for k in IMAGES if k in output.get("data", {})), None)
        images.append((kind, output)) if kind else rest.append(output)
    if not images:
        return [cell]
    up = "../" * page.count("/")
    tags = []
    for number, (kind, output) in enumerate(images):
        data = lighter(base64.b64decode("".join(output["data"][kind])), kind)
        letter = "abcdefghij"[number] if len(images) > 1 else ""
        name = f"{page.removesuffix('.html').replace('/', '-')}-{count}{letter}.{IMAGES[kind]}"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        tags.append(
            f'<img src="{up}{folder.name}/{name}" '
            f'alt="{html.escape(said.get("fig-alt", ""))}"{size_of_png(data)} loading="lazy">'
        )
    caption = said.get("fig-cap", "")
    numbered = re.match(r"Figure (\d+\.\d+)\.\s*(.*)", caption)
    name = f' id="figure-{numbered.group(1)}"' if numbered else ""
    text = f"**Figure {numbered.group(1)}.** {numbered.group(2)}" if numbered else caption
    figure = (
        f"<figure{name}>\n"
        + "\n".join(tags)
        + (f"\n<figcaption>\n\n{text}\n\n</figcaption>" if text else "")
        + "\n</figure>"
    )
    shown = {**cell, "outputs": rest, "source": without_directives(source(cell), "fig-alt", "fig-cap")}
    return [shown, markdown(figure)]


def shown_name(cell: dict) -> str:
    "The name in `show_doc(name)`, where nbdev has put such a cell."
    found = re.search(r"^show_doc\(([\w.]+)", source(cell), re.M) if cell["cell_type"] == "code" else None
    return found.group(1) if found else ""


def is_exported(cell: dict) -> bool:
    return cell["cell_type"] == "code" and 'code-summary: "Exported source"' in source(cell)


def defined_names(text: str) -> list[str]:
    return [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def reference(cells: list[dict], entries: dict[str, api.Entry], page: str) -> list[dict]:
    """The source first, open, and behind it a card for each name that it defines (nbdev puts cards before and after, in
    no order).
    """
    result, run = [], []

    def card(name: str) -> dict:
        return markdown(api.card(entries[name], "../" * page.count("/") + "source/"))

    def flush() -> None:
        waiting = [shown_name(c) for c in run if shown_name(c) in entries]
        for cell in run:
            if is_exported(cell):
                text = without_directives(source(cell))
                result.append({**cell, "source": text})
                names = [n for n in defined_names(text) if n in waiting]
                result.extend(card(n) for n in names)
                waiting[:] = [n for n in waiting if n not in names]
        result.extend(card(n) for n in waiting)
        run.clear()

    for cell in cells:
        if shown_name(cell) or is_exported(cell):
            run.append(cell)
        else:
            flush()
            result.append(cell)
    flush()
    return result


FRAMES = "application/vnd.transformer-llm.frames+json"  # pictures that `explore` drew in advance
LIVE = re.compile(r"^<!-- live: ([\w-]+) -->\n?", re.M)  # a place for a living figure, or what the next control becomes
IN_LAB = re.compile(r"In JupyterLab, run the next cell(?:\.| and| and,|,)\s+(\w)")


def in_an_attribute(value: object) -> str:
    "A value as JSON that can stand in an HTML attribute between apostrophes."
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "&<>'":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def frames_of(cell: dict) -> dict:
    "The pictures in advance that a cell holds, or nothing."
    return next((o["data"][FRAMES] for o in cell.get("outputs", []) if FRAMES in o.get("data", {})), {})


def explored(cell: dict, page: str, folder: Path, live: str = "") -> dict:
    """The figure of a control: its picture at the start, which is there without a script, and what `live.js` needs to
    move it. The pictures are files beside the page, and none but the first is loaded before a control moves.
    """
    held = frames_of(cell)
    up = "../" * page.count("/")
    stem = f"{page.removesuffix('.html').replace('/', '-')}-move-{cell['id']}" if held["pictures"] else ""
    folder.mkdir(exist_ok=True)
    for number, data in enumerate(held["pictures"]):
        (folder / f"{stem}-{number}.png").write_bytes(base64.b64decode(data))
    start = ".".join(str(control["start"]) for control in held["controls"])
    picture, text, _ = held["shown"][start]
    if picture < 0:
        still = f'<pre class="output">{html.escape(text, quote=False)}</pre>'
    else:
        data = base64.b64decode(held["pictures"][picture])
        still = (f'<img src="{up}{folder.name}/{stem}-{picture}.png" alt="{html.escape(text)}"{size_of_png(data)} '
                 'loading="lazy">')
    told = {"controls": held["controls"], "shown": held["shown"], "stem": f"{up}{folder.name}/{stem}-"}
    kind = f' data-live="{live}"' if live else ""
    still = re.sub(r"\n(?=\n)", "\n ", still)  # an empty line would end the HTML
    return markdown(
        f"<figure class=\"explore\"{kind} data-explore='{in_an_attribute(told)}'>\n"
        f'<div class="stage">{still}</div>\n'
        '<noscript><p class="kernel">To move this picture, allow scripts, or <a href="#open">open the notebook</a>.</p>'
        f"</noscript>\n</figure>\n"
    )


HERE = Path(__file__).parent
LOADED = {"counting": ["counting.js"], "rates": ["counting.js"], "poet": ["poet.js"], "growth": []}  # beside the engine


def computed(found: re.Match) -> str:
    "A place that a script fills; if it loads the engine, the bytes that this takes are noted for the reader."
    name = found.group(1)
    size = ""
    if name in LOADED:
        parts = [len(live_source().encode()), *((HERE / file).stat().st_size for file in LOADED[name])]
        size = f' data-bytes="{sum(parts)}"'
    note = ('<noscript><p class="kernel">This figure computes in the page: allow scripts, or '
            '<a href="#open">open the notebook</a>.</p></noscript>')
    return f'\n<figure class="live" data-live="{name}"{size}>{note}</figure>\n\n'


def code_cell(cell: dict, page: str, folder: Path, count: int, live: str = "") -> list[dict]:
    "A code cell with its pictures, fold and what moves."
    if re.search(r"^explore\(", source(cell), re.M):
        if frames_of(cell):
            kept = {**cell, "outputs": [o for o in cell["outputs"] if o["output_type"] == "stream"]}
            figure = explored(cell, page, folder, live)
            return [*as_it_is(kept, page, folder, count), figure]
        note = '<p class="kernel">This control needs a kernel: <a href="#open">open the notebook</a> to move it.</p>'
        return [
            {**cell, "outputs": [o for o in cell.get("outputs", []) if o["output_type"] == "stream"]},
            markdown(note),
        ]
    return as_it_is(cell, page, folder, count)


def as_it_is(cell: dict, page: str, folder: Path, count: int) -> list[dict]:
    "A code cell with its pictures, in a fold if it says so."
    text = source(cell)
    said = directives(text)
    folded = FOLDED.match(text)
    open_text = without_directives(FOLDED.sub("", text), "code-fold", "code-summary")
    shown, *pictures = figures({**cell, "source": open_text}, page, folder, count)
    if not folded and said.get("code-fold") != "true":
        return [shown, *pictures]
    summary = html.escape(folded.group(1) if folded else said.get("code-summary") or "Code", quote=False)
    if summary.startswith("Solution"):  # what it prints says that it is right: that stays in the fold
        return [
            markdown(f'<details class="solution"><summary>{summary}</summary>\n'),
            shown,
            *pictures,
            markdown("\n</details>"),
        ]
    given = [{**shown, "source": "#| echo: false\n" + shown["source"]}] if shown.get("outputs") else []
    return [
        markdown(f'<details class="fold"><summary>{summary}</summary>\n'),
        {**shown, "outputs": []},
        markdown("\n</details>"),
        *given,
        *pictures,
    ]


CHECKED = re.compile(r"^## Exercise (\d+\.\d+): .*$", re.M)


def end_of_exercise(cells: list[dict], start: int, number: str) -> int:
    """Where the box ends that the exercise before cell `start` opens: after its solution, or else after the cell that
    checks it.
    """
    end = start
    for i in range(start, len(cells)):
        if cells[i]["cell_type"] != "code":
            break
        if (folded := FOLDED.match(source(cells[i]))) and folded.group(1) == f"Solution {number}":
            return i + 1
        if re.search(rf'\bcheck\(\s*"{re.escape(number)}"', source(cells[i])):
            end = i + 1
    return end


def translate(cells: list[dict], page: str, entries: dict[str, api.Entry], folder: Path) -> list[dict]:
    "All cells of a notebook, as the site shows them at the address `page`; its pictures go to `folder`."
    result, count, end, live, moves = [], 0, -1, "", False
    cells = reference(cells, entries, page)
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            text, exercise = exercises(equations(source(cell)))
            following = next((c for c in cells[i + 1 :] if c["cell_type"] == "code"), {})
            if frames_of(following):
                text = IN_LAB.sub(lambda found: found.group(1).upper(), text)
                live = "".join(LIVE.findall(text))
                text = LIVE.sub("", text)
            moves = moves or bool(LIVE.search(text))
            text = LIVE.sub(computed, text)
            if page.startswith("exercises/"):
                text = CHECKED.sub(r"\g<0>\n\nThe exercise stands in its chapter: Exercise \1.", text)
            result.append(markdown(text))
            end = end_of_exercise(cells, i + 1, exercise) if exercise else end
        elif cell["cell_type"] == "code":
            count += any(k in o.get("data", {}) for k in IMAGES for o in cell.get("outputs", []))
            result.extend(code_cell(cell, page, folder, count, live))
            moves, live = moves or bool(frames_of(cell)), ""
        else:
            result.append(cell)
        if i + 1 == end:
            result.append(markdown("</div>"))
            end = -1
    if moves:
        result.append(markdown(f'<script src="{"../" * page.count("/")}live.js" defer></script>\n'))
    return result
