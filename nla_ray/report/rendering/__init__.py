"""The report for readers: one definition of what is shown, and a thin renderer for each medium.

Nouns: a section, a block of it (a table, a group of charts, a list, examples), a renderer.

Read: content (what a section can hold), vocabulary (titles and definitions), sections with curves
and domains (what is shown; rows helps all three), then the renderers: terminal, markdown, card with
picture, and page with elements. The page's scripts are charts, tables, gallery and page.mjs; their
tests are tests/report/*.test.mjs.

A section, table or chart is added in sections, curves or domains, and nowhere else. No renderer
chooses figures, and none computes one.
"""
