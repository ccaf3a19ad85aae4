"""Speed, side by side with what one would run instead, in one run.

Nouns: a side (ours, the library's), a timing, the machine's limit.

Read: timing, sides, stage.

No figure of it is asserted in a test.
"""
