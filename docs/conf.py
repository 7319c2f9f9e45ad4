"""Sphinx configuration; `make docs` builds into site/."""

import sasa_optax

project = "sasa_optax"
author = "The sasa_optax authors"
version = release = sasa_optax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
# Names in single backticks are code: optax's among them have no page here.
default_role = "code"
autodoc_typehints = "none"
napoleon_use_ivar = True
