"""Derive README.md from nbs/index.ipynb: its text, what its cells print, its pictures as files beside the notebooks."""
import base64
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def text_of(value: str | list[str]) -> str:
    return "".join(value)


def derive(root: Path = ROOT) -> dict[Path, bytes]:
    "What each derived file must hold, by path."
    files, parts = {}, []
    index = root / "nbs" / "index.ipynb"
    for cell in json.loads(index.read_text(encoding="utf-8"))["cells"]:
        text = re.sub(r"^<!-- live: .*\n", "", text_of(cell["source"]).strip(), flags=re.M)  # the site's alone
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?![a-z]+:|#)(?:\.\./)?([^)]+)\)", link, text))
        elif cell["cell_type"] == "code" and "#| hide" not in text:
            alt = re.search(r'#\| fig-alt: "(.*)"', text)
            code = "\n".join(line for line in text.splitlines() if not line.startswith("#|")).strip()
            if code and "#| echo: false" not in text:
                parts.append(f"```python\n{code}\n```")
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "image/png" in data:
                    path = root / "nbs" / "images" / f"index_{len(files) + 1}.png"
                    files[path] = base64.b64decode(text_of(data["image/png"]))
                    parts.append(f"![{alt.group(1) if alt else ''}](nbs/images/{path.name})")
                elif "text/markdown" in data:
                    parts.append(
                        re.sub(r"\]\((?![a-z]+:|#)(?:\.\./)?([^)]+)\)", link, text_of(data["text/markdown"]).strip())
                    )
                elif output.get("text") or "text/plain" in data:
                    parts.append(f"```text\n{text_of(output.get('text') or data['text/plain']).rstrip()}\n```")
    files[root / "README.md"] = ("\n\n".join(parts) + "\n").encode("utf-8")
    return files


def link(match: re.Match) -> str:
    "A link from the notebooks' folder, seen from the top of the project."
    target = match.group(1)
    return f"]({target if (ROOT / target).exists() and not (ROOT / 'nbs' / target).exists() else 'nbs/' + target})"


def main() -> None:
    for path, content in derive().items():
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print("wrote", path.relative_to(ROOT).as_posix())


if __name__ == "__main__":
    main()
