"""Speed, side by side with what one would run instead, in one run.

Nouns: a side (ours, the library's), a timing, the machine's limit.

Read: stage, timing, then what is timed (capture, generate, step) and on what (texts, models).
engines: all of them by turns. gpu: what one GPU does with a large base, which card makes up.
families: every stage on a random base of every supported architecture. `results` holds what gpu and
families found.

The run is known to stage and texts. No figure of it is asserted in a test.
"""
