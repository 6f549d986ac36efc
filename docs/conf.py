from importlib.metadata import version as installed_version

project = "sb3_mbpo"
author = "sb3_mbpo developers"
release = installed_version("sb3-mbpo")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_static"]

# Links to the sections of a page, as page.md#section
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"sb3_mbpo {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
