"""Package settings come from settings.ini; this file only hands them to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = here / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"] or None,
    url=cfg["git_url"] if cfg["user"] else None,
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    packages=find_packages(include=["transformer_llm", "transformer_llm.*"]),
    package_data={"transformer_llm": ["py.typed", "live/*.js"]},
    # an editable install as a path that type checkers and editors follow too, not as an import hook
    options={"editable_wheel": {"mode": "compat"}},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "bench", "pdf", "kernels", "serve")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
)
