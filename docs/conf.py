"""How Sphinx builds this documentation: from Markdown, with a theme that loads nothing from a network."""

project = "llmsurgery"
copyright = ""
html_show_copyright = False
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {
    "description": "Change a trained language model after the fact, and prove it.",
    "fixed_sidebar": True,
    "page_width": "84rem",
    "body_max_width": "none",
    "show_powered_by": False,
}
html_show_sourcelink = False
highlight_language = "sh"
