"""Labels: what teachers say of the texts, cleaned to bullets; or labels made elsewhere.

Nouns: a teacher (text -> raw label), a label (two or three bullets), the drawn one of a text.

Read: teacher, cleaner, imports, schema, stage.

It knows no activation.
"""
