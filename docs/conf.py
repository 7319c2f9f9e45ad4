"""Sphinx configuration; `make docs` builds into site/."""

import hashlib
import importlib.metadata
import logging
import os
import pathlib
import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import sasa_optax

_DOCS = pathlib.Path(__file__).parent
_CACHE = _DOCS.parent / ".docs_cache"

project = "sasa_optax"
author = copyright = "The sasa_optax authors"
version = release = sasa_optax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["tests", "_*"]
html_theme = "furo"
html_title = "sasa_optax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
# Names in single backticks are code; `_link_names` makes links of those that it knows.
default_role = "code"
autodoc_typehints = "none"
napoleon_use_ivar = True
python_maximum_signature_line_length = 72
copybutton_exclude = ".linenos, .gp, .go"

# One file, which has its fonts in it, so a page needs no network.
_MATHJAX = "sphinx-mathjax-offline/static/mathjax/tex-svg.js"
html_static_path.append(
    str(importlib.metadata.distribution("sphinx-mathjax-offline").locate_file(_MATHJAX))
)
mathjax_path = "tex-svg.js"
myst_enable_extensions = ["dollarmath", "substitution"]
myst_heading_anchors = 3

# Lists of the names that our pages use, in the plain form of an inventory.
intersphinx_mapping = {
    "jax": ("https://docs.jax.dev/en/latest/", "inventories/jax.inv"),
    "optax": ("https://optax.readthedocs.io/en/latest/", "inventories/optax.inv"),
}


def _sources() -> str:
    """A name for the present state of the package, on which all results depend."""
    files = sorted(pathlib.Path(sasa_optax.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# A notebook runs again if its code or the package has changed.
nb_execution_mode = "cache"
nb_execution_cache_path = str(_CACHE / _sources()[:16])
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True
# Such as progress bars, and compilers that find a machine slow.
nb_output_stderr = "remove"

# Nor does each kernel say that it starts, and that it is not encrypted. With a profile
# of their own, kernels do not depend on how IPython is set up on this machine either.
logging.getLogger("traitlets").setLevel(logging.WARNING)
_PROFILE = _CACHE / "ipython" / "profile_default"
_PROFILE.mkdir(parents=True, exist_ok=True)
(_PROFILE / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n")
os.environ["IPYTHONDIR"] = str(_PROFILE.parent)

# `make docs` puts it there, so the site installs the package that it describes.
_WHEEL = f"sasa_optax-{release}-py3-none-any.whl"
myst_substitutions = {"wheel": _WHEEL, "download": f"{{download}}`_wheel/{_WHEEL}`"}


def _target(text: str) -> str | None:
    """The full name of what `text` names or calls; None if it is no such name."""
    found = re.fullmatch(r"([\w.]+)(\(.*\))?", text, re.DOTALL)
    if found is None:
        return None
    name = found[1].removeprefix("sasa_optax.")
    if not name.startswith("_") and name.split(".")[0] in vars(sasa_optax):
        return f"sasa_optax.{name}"
    return name if name.startswith(("jax.", "optax.")) else None


def _link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Makes links to the reference, to optax's and to JAX's of names in code font."""
    for literal in list(doctree.findall(nodes.literal)):
        target = _target(literal.astext())
        within = nodes.title, nodes.reference, addnodes.pending_xref
        if target is None or isinstance(literal.parent, within):
            continue
        options = {"refdomain": "py", "reftype": "obj", "reftarget": target}
        link = addnodes.pending_xref("", refdoc=app.env.docname, **options)
        literal.replace_self(link)
        link += literal


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", _link_names)
