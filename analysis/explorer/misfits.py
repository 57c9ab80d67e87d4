"""Requests that do not fit the page: one line and status 400 or 404, in place of a traceback and 500.

Dash gives the values of a request's body to the callbacks as they are, and Dash's own code expects the bodies that its
pages send. So a fault of the body may surface anywhere. The warning in the log names the error and its place.
"""

import logging
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask

log = logging.getLogger(__name__)


def refuse_misfits(server: "Flask") -> None:
    """Answer every request that makes the app raise with one line."""
    from dash.exceptions import DependencyException
    from flask import Response
    from werkzeug.exceptions import HTTPException

    def refuse(error: Exception) -> Any:
        if isinstance(error, HTTPException):
            return error
        if isinstance(error, DependencyException):
            return Response("there is no such file\n", 404, mimetype="text/plain")
        frame = traceback.extract_tb(error.__traceback__)[-1]
        log.warning("a request was refused: %s in %s:%s", type(error).__name__, Path(frame.filename).name, frame.name)
        return Response("this request does not fit the page: load the page again\n", 400, mimetype="text/plain")

    server.register_error_handler(Exception, refuse)
