"""Starts the Serve application of a run, and stops it.

Knows which artifacts are served and with what resources; what a request does is in
`deployments.py`. Protects two rules: importing this module starts nothing, and a Serve that this
process did not start is left alone.
"""

from __future__ import annotations

import logging
import socket
import threading
from typing import TYPE_CHECKING

import httpx

from nla_ray.base.identity import base_info, check_base
from nla_ray.base.load import load_model_config, load_tokenizer
from nla_ray.base.prompts import injection_prompt
from nla_ray.cluster.resources import demand, require_resources, worker_options
from nla_ray.run.artifact import Run
from nla_ray.run.log import get_logger
from nla_ray.run.manifest import Manifest
from nla_ray.run.stages import artifacts_of_kind
from nla_ray.serve.schema import CHOOSER, BaseBody, ModelBody, ModelsResponse
from nla_ray.settings.config import RunConfig, ServeConfig

if TYPE_CHECKING:
    from ray.serve import Application

logger = get_logger(__name__)


APPLICATION_NAME = "nla_ray"
SERVED_VERBALIZERS = artifacts_of_kind("verbalizer")[::-1]
"""Artifacts that can be served as verbalizers. The default comes first: it is trained last."""
SERVED_SCORERS = (CHOOSER, "judge")
"""Scorers that are served; the artifact of each is `{scorer}_scorer`."""
_OPEN_REQUESTS = 10_000
"""Requests that a replica takes in at once, so that no health check and no refusal waits behind
others. What waits for a model is bounded by `serve.max_waiting`."""
_READY_SECONDS = 60.0
_started = threading.Event()
"""Set while the cluster's Serve is one that this process started."""
_LOGGING = {"log_level": "WARNING"}
"""At a lower level Serve writes a line for every request."""


def find_models(run: Run) -> ModelsResponse:
    """What can be served of a run.

    Raises ValueError when an artifact is missing (the message names its job), and when the base
    differs from the one that an artifact was made with.
    """
    verbalizers = {
        name: manifest for name in SERVED_VERBALIZERS if (manifest := run.find(name)) is not None
    }
    if not verbalizers:
        run.require(SERVED_VERBALIZERS[-1])
    scorers = {name: run.require(f"{name}_scorer") for name in SERVED_SCORERS}
    tokenizer = load_tokenizer(run.config.base)
    info = base_info(run.config.base, tokenizer)
    for manifest in (*verbalizers.values(), *scorers.values()):
        check_base(manifest, info)
    prompts = [
        injection_prompt(tokenizer, run.config.base, layer=layer)
        for layer in run.config.base.described_layers
    ]
    context = load_model_config(run.config.base).max_position_embeddings
    base = BaseBody(
        name=info.name,
        digest=info.digest,
        layer=info.layer,
        d_model=info.d_model,
        max_new_tokens=context - max(map(len, prompts)),
        num_layers=info.num_layers,
        max_tokens=run.config.base.max_tokens,
        injection_norm=info.injection_norm,
        injected=list(info.injected),
        further_layers=list(info.further_layers),
    )
    return ModelsResponse(
        base=base,
        verbalizers=[
            ModelBody(
                name=name,
                kind="verbalizer",
                fingerprint=manifest.fingerprint,
                created=manifest.created,
                claim_confidence=find_claim_confidence(run, name) is not None,
                max_new_tokens=decoding_of(run.config, manifest)[0],
            )
            for name, manifest in verbalizers.items()
        ],
        scorers=[
            ModelBody(
                name=name,
                kind="scorer",
                fingerprint=manifest.fingerprint,
                created=manifest.created,
                max_tokens=manifest.config[f"{name}_scorer"]["max_tokens"],
            )
            for name, manifest in scorers.items()
        ],
    )


def decoding_of(config: RunConfig, verbalizer: Manifest) -> tuple[int, float]:
    """Longest description in tokens and temperature, where a request says nothing of them.

    SFT samples nothing while it trains: it is decoded as this configuration's GRPO is.
    """
    settings = verbalizer.config.get("grpo", vars(config.grpo))
    return settings["max_new_tokens"], settings["temperature"]


def find_claim_confidence(run: Run, verbalizer: str) -> Manifest | None:
    """What was learned of the claims of this very verbalizer, where something was."""
    learned, artifact = run.find(run.config.claim_confidence_artifact), run.find(verbalizer)
    if learned is None or artifact is None:
        return None
    return learned if learned.parents.get(verbalizer) == artifact.fingerprint else None


def build_application(config: RunConfig) -> Application:
    """The deployments of a run, bound together behind one HTTP endpoint."""
    from ray import serve

    from nla_ray.serve.deployments import CaptureService, ScorerService, VerbalizerService
    from nla_ray.serve.endpoint import Endpoint

    models = find_models(Run(config))
    options = {
        "ray_actor_options": worker_options(config.compute, "serve"),
        "max_ongoing_requests": _OPEN_REQUESTS,
    }
    verbalizer = serve.deployment(VerbalizerService, name="verbalizer", **options)
    scorer = serve.deployment(ScorerService, name="scorer", **options)
    capture = serve.deployment(CaptureService, name="capture", **options)
    endpoint = serve.deployment(
        serve.ingress()(Endpoint),
        name="endpoint",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_OPEN_REQUESTS,
    )
    return endpoint.bind(
        config.serve,
        models,
        verbalizer.bind(config, [served.name for served in models.verbalizers]),
        scorer.bind(config, [served.name for served in models.scorers]),
        capture.bind(config),
    )


def start(config: RunConfig) -> str:
    """Deploy the application on the connected cluster; returns its address once it answers.

    Raises ValueError for missing artifacts, missing resources, a cluster that serves something
    already, or a port in use.
    """
    from ray import serve

    require_resources(config.compute, [demand(config.compute, "serve", 3)])
    application = build_application(config)
    _require_no_serve(serve.status())
    check_port(config.serve)
    _started.set()
    # Importing Serve has set the level of its logger.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        logging_config=_LOGGING,
        http_options={"host": config.serve.host, "port": config.serve.port},
    )
    serve.run(application, name=APPLICATION_NAME, route_prefix="/", logging_config=_LOGGING)
    host = f"[{config.serve.host}]" if ":" in config.serve.host else config.serve.host
    address = f"http://{host}:{config.serve.port}"
    # It tells the endpoint that all deployments answer.
    with httpx.Client(timeout=_READY_SECONDS, trust_env=False) as client:
        client.get(f"{address}/readyz").raise_for_status()
    return address


def _require_no_serve(status) -> None:
    """Raise ValueError when the cluster serves already: a second start would harm the first."""
    if status.applications or status.proxies:
        raise ValueError(
            "Ray Serve: got one on this cluster that runs"
            f" {', '.join(status.applications) or 'nothing'}, expected none. Take it down with"
            " `serve shutdown`, or use another cluster."
        )


def check_port(settings: ServeConfig) -> None:
    """Raise ValueError when the address cannot be listened on."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ValueError(
                f"address {settings.host}:{settings.port}: got {error.strerror!r}, expected a free"
                " port. Stop what listens there, or choose another with --serve.port."
            ) from None


def serve_run(run: Run) -> None:
    """Serve until the process is interrupted; the job then calls `stop`."""
    address = start(run.config)
    logger.info(
        "serving %s at %s (POST /v1/describe /v1/score /v1/explain, GET /v1/models /healthz"
        " /readyz /docs); stop with Ctrl-C",
        run.config.run_dir,
        address,
    )
    threading.Event().wait()


def stop() -> None:
    """Take down the Serve that this process started, if it started one."""
    from ray import serve

    if _started.is_set():
        serve.shutdown()
        _started.clear()
