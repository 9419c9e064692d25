"""Sphinx configuration. Nothing is executed or fetched while building: `tests/test_docs.py` runs the examples."""

import importlib.metadata

project = "actstore"
author = "The actstore developers"
copyright = "The actstore developers"  # noqa: A001  Sphinx's name
release = version = importlib.metadata.version("actstore")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "README.md"]
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "sphinx_book_theme"
html_title = f"actstore {release}"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"show_navbar_depth": 1, "use_download_button": False}
