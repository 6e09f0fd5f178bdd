"""The Flask application."""

from __future__ import annotations

from typing import Any

from flask import Flask, Response, g, request
from flask_smorest import Api

import config
from config import Settings
from tasks.bootstrap import Services, build_services
from web import batches, dead_letters, error_handlers, files, health, jobs, oip, webhooks
from web.context import Gateway
from web.express import Express
from web.http import refuse_nul
from web.json import OrjsonProvider
from web.request_id import request_id
from workers import logs
from workers.app import build_app

VERSION = "0.1.0"


def create_app(settings: Settings | None = None, services: Services | None = None) -> Flask:
    """A gateway. Call it after fork: what it makes holds sockets and threads."""
    settings = settings or config.settings()
    logs.configure()
    build_app(settings)
    app = Flask("tidegate", static_folder=None)
    app.json = OrjsonProvider(app)
    app.config.update(
        MAX_CONTENT_LENGTH=settings.max_body_bytes,
        API_TITLE="Tidegate",
        API_VERSION=VERSION,
        OPENAPI_VERSION="3.1.0",
        OPENAPI_URL_PREFIX="/v1",
        OPENAPI_JSON_PATH="openapi.json",
        API_SPEC_OPTIONS={
            "security": [{"key": []}],
            "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        },
    )
    found = app.extensions["tidegate"] = Gateway.build(services or build_services(settings))
    found.metrics.install(app)
    app.before_request(_begin)
    app.before_request(refuse_nul)
    app.after_request(_end)
    app.register_blueprint(health.blueprint)
    app.register_blueprint(oip.blueprint)
    app.register_blueprint(oip.models)
    api = _Api(app)
    for module in (jobs, files, batches, dead_letters, webhooks):
        api.register_blueprint(module.blueprint)
    error_handlers.install(app)
    app.wsgi_app = Express(app)  # type: ignore[assignment,method-assign]
    return app


class _Api(Api):  # type: ignore[misc]
    """flask-smorest, with our own errors."""

    def handle_http_exception(self, error: Any) -> Response:
        return error_handlers.on_http_exception(error)


def _begin() -> None:
    g.request_id = request_id(request.headers.get("X-Request-ID"))


def _end(response: Response) -> Response:
    add = response.headers.add
    add("X-Request-ID", g.get("request_id", ""))
    if "job_id" in g:
        add("Tidegate-Job-Id", str(g.job_id))
    if g.get("replayed"):
        add("Idempotent-Replayed", "true")
    add("X-Content-Type-Options", "nosniff")
    return response
