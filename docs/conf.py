from importlib.metadata import version as installed_version

project = "sb3_mbpo"
author = "sb3_mbpo developers"
release = installed_version("sb3-mbpo")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode"]
autodoc_typehints = "description"
html_theme = "sphinx_rtd_theme"
exclude_patterns = ["_build"]
