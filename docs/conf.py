"""The site: Markdown pages, and the reference pages that are made from the package itself at every build.

Run:   pip install -e '.[docs]' && sphinx-build -W -b html docs build/docs
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a clone that is not installed

import cpt_jax  # noqa: E402

project = "cpt_jax"
author = "the cpt_jax authors"
copyright = "the cpt_jax authors; Apache-2.0"
version = release = cpt_jax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "reference/_generated/*.md", "**/.ipynb_checkpoints"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are executed by a test
autodoc_typehints = "description"
autodoc_member_order = "bysource"
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "sphinx_book_theme"
html_title = "cpt_jax"
html_static_path = []
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "use_fullscreen_button": False}


def write_reference(_app=None) -> None:
  """Writes docs/reference/_generated: config keys, commands and exit codes as the code has them, and the notebook."""
  from cpt_jax import config, exits
  from cpt_jax.cli import app as cli

  folder = HERE / "reference" / "_generated"
  folder.mkdir(exist_ok=True)
  _, _, keys = config.reference().partition("\n\n")  # its title is that of the page
  _write(folder / "keys.md", keys)
  _write(folder / "commands.md", "\n".join(map(_command, cli.COMMANDS)))
  codes = [f"| {code} | {meaning} |" for code, meaning in exits.MEANINGS.items()]
  _write(folder / "exit_codes.md", "\n".join(["| code | meaning |", "|---|---|", *codes, ""]))
  _write(folder / "first_run.ipynb", (HERE.parent / "examples" / "first_run.ipynb").read_text(encoding="utf-8"))


def _command(command) -> str:
  page, _, _ = command.parser().format_help().partition("\nKEYS\n")  # keys have a page of their own
  return f"## cpt {command.name}\n\n```text\n{page.rstrip()}\n```\n"


def _write(path: pathlib.Path, text: str) -> None:
  if not path.is_file() or path.read_text(encoding="utf-8") != text:  # what did not change is not read again
    path.write_text(text, encoding="utf-8")


def setup(app):
  """Called by Sphinx before it reads the pages."""
  app.connect("builder-inited", write_reference)
