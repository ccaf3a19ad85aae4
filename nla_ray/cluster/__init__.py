"""The rim to Ray: connecting, room for processes, actors, and a job from start to stop.

Nouns: a job (command line -> plan, or lock -> log -> Ray -> body), a demand (processes that must
run at the same time), an actor pool.

Read: job, connect, session_folder, resources, actors, environment, errors, processes.

It knows no stage and no model. Nothing happens when it is imported.
"""
