"""The HTTP endpoint of a run, on Ray Serve.

Nouns: a deployment (verbalizer, scorer, capture), the endpoint in front of them, a refusal.

Read: schema (requests, responses and what is refused), routes (HTTP: bodies, errors, clients that
leave), endpoint (checks, limits, who is called), deployments (who answers), together (work of
several requests, done side by side), application (starts the deployments of a run, stops them),
local (the same answers in one process, from Python).

The run is known to application, local and the services, which load its adapters. The room never
imports training, and nothing invalid reaches a model.
"""
