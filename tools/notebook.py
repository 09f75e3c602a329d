"""Export, execute and check one notebook, or a few, while you work on them.

    python tools/notebook.py 08                     # chapter 08; also 08_generation or its path
    python tools/notebook.py 08 exercises/08
"""
import subprocess
import sys
from pathlib import Path

import check
import readme
from execute import ROOT, execute, notebooks


def find(name: str, root: Path = ROOT) -> Path:
    "The notebook of that number, name or path; exits with a sentence if there is none or more than one."
    wanted = name.removeprefix("nbs/").removesuffix(".ipynb")
    there = {check.name_of(path, root).removesuffix(".ipynb"): path for path in notebooks(root)}
    found = [path for known, path in there.items() if known == wanted or known.startswith(f"{wanted}_")]
    if len(found) != 1:
        listed = ", ".join(there)
        raise SystemExit(f"{name} names {len(found) or 'no'} notebook{'s' * (len(found) != 1)}; there are {listed}.")
    return found[0]


def main() -> int:
    paths = [find(name) for name in sys.argv[1:]]
    if not paths:
        raise SystemExit("Which notebook? For example: python tools/notebook.py 08")
    if subprocess.run([str(Path(sys.executable).parent / "nbdev_export")], cwd=ROOT).returncode:
        return 1
    for path in paths:
        print(f"{check.name_of(path, ROOT)}: executed in {execute(path):.1f} s", flush=True)
    readme.main()
    words = [check.name_of(path, ROOT) for path in paths]
    exported = check.exported_modules(ROOT).items()
    own = [module for module, names in exported if set(names) & set(words)]
    modules = [f"{check.PACKAGE}/{module.replace('.', '/')}.py" for module in own]
    failed = 0
    for one in check.CHECKS:
        problems = one()
        here = [text for text in problems if one is not check.executed and one is not check.linted
                or any(word in text for word in (*(Path(word).name for word in words), *modules))]
        failed += bool(here)
        for problem in here:
            print(f"{one.__name__}: {problem}")
        if len(here) < len(problems):
            print(f"{one.__name__}: {len(problems) - len(here)} more elsewhere (python tools/check.py shows them)")
    print("all checks passed here" if not failed else f"{failed} checks failed here")
    print(check.NOT_COVERED)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
