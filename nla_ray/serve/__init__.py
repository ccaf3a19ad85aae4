"""The HTTP endpoint of a run, on Ray Serve.

Nouns: a deployment (verbalizer, scorer, capture), the endpoint in front of them, a refusal.

Read: schema, deployments, application.

It never imports training.
"""
