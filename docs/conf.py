# SPDX-License-Identifier: Apache-2.0
"""How Sphinx makes the site: ``sphinx-build -W docs site``. Nothing here is fetched."""

import vtoken

project = "vtoken"
author = "The vtoken authors"
copyright = author
version = release = vtoken.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# pages: links between files work on GitHub and here, headings can be linked to
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page may begin below its title's level, as the changelog does

# notebooks are committed without outputs and run at each build
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_output_stderr = "remove"  # bars of loading weights

# docstrings: single backticks name an object, parameters are documented once
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
html_title = f"vtoken {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_copyright = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
