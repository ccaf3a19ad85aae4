"""The HTTP endpoint of a run, on Ray Serve.

Nouns: a deployment (verbalizer, scorer, capture), the endpoint in front of them, a refusal.

Read: schema (requests, responses and what is refused), deployments (who answers them),
application (starts the deployments of a run, stops them), local (the same answers in one process,
from Python).

The run is known to application, local and the services, which load its adapters. The room never
imports training, and nothing invalid reaches a model.
"""
