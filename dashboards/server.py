"""The page over HTTP: only GET, only this run directory, only from this machine unless told otherwise."""

import hashlib
import ipaddress
import socket
import threading
from importlib import import_module
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..search.config import ConfigError
from . import pictures
from .answers import answer
from .block_map import policy_file
from .files import Missing, RunFiles, Unreadable
from .page import static

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked after each time: a run changes
}
STATIC = {
    "": ("index.html", "text/html; charset=utf-8"),
    "style.css": ("style.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}


def create_app(root: Path, hosts: list[str]) -> FastAPI:
    """The page of the run directory `root`, for requests that name one of `hosts` (no other site can point here)."""
    files = RunFiles(root)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.middleware("http")
    async def guard(request: Request, call_next) -> Response:
        if request.method == "GET":
            response = await call_next(request)
        else:
            response = Response("This page answers GET only.", 405, {"Allow": "GET"})
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(Missing)
    @app.exception_handler(Unreadable)
    async def refuse(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 404)

    @app.get("/api/{address:path}")
    def api(request: Request, address: str) -> Response:
        tag = f'"{hashlib.sha256(files.stamp().encode()).hexdigest()[:16]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        return JSONResponse(answer(files, f"api/{address}"), headers={"ETag": tag})

    @app.get("/pictures/{name}/{index}.png")
    def picture(name: str, index: int) -> Response:
        return Response(pictures.png(files, name, index), media_type="image/png")

    @app.get("/policies/{name}.json")
    def policy(name: str) -> Response:
        return Response(policy_file(files, name), media_type="application/json")

    @app.get("/{name}")
    def page(name: str) -> Response:
        if name not in STATIC:
            raise Missing(f"{name} is no part of this page.")
        return Response(static(STATIC[name][0]), media_type=STATIC[name][1])

    app.add_api_route("/", lambda: page(""), response_model=None)
    return app


def serve(root: Path, host: str, port: int) -> None:
    """Serve until interrupted. Raises ConfigError for a path, host or port that cannot be used."""
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder; accepted: the folder that a search wrote or will write.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {told}.") from None
    where = str(address[0])
    local = ipaddress.ip_address(where).is_loopback
    app = create_app(root, ["127.0.0.1", "localhost", "[::1]", host] if local else ["*"])
    # the first map needs torch, seconds to import: while the front is being looked at
    threading.Thread(target=import_module, args=("blocktune.policies",), daemon=True).start()
    shown = f"[{where}]" if ":" in where else where
    print(f"http://{shown}:{listening.getsockname()[1]}/ shows {root}; Ctrl-C ends it", flush=True)
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
    except KeyboardInterrupt:
        return
