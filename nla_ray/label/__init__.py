"""Labels: what teachers say of the texts, cleaned to bullets; or labels made elsewhere.

Nouns: a teacher (text -> raw label), a label (two or three bullets), the label drawn for a text.

Read: stage, teacher, cleaner, rows, imports.

It knows no activation.
"""
