"""Sphinx: `make site` builds the pages of this folder, with the API from the docstrings, into build/docs."""

import lightning_maml_guard

project = "lightning-maml-guard"
author = "The lightning-maml-guard developers"
copyright = f"2026, {author}"
version = release = lightning_maml_guard.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# The notebook is run by tests/test_tutorial.py and holds its results.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of a dataclass are documented once, in its docstring

highlight_language = "none"  # of blocks that name no language: messages
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
pygments_dark_style = "github-dark"
html_title = "lightning-maml-guard"
html_theme_options = {
    "source_repository": "https://github.com/lightning-maml-guard/lightning-maml-guard",
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
