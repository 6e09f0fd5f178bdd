"""The OpenAI batch file format with OIP requests in it. Pure.

Input line   {"custom_id", "method": "POST", "url": "/v2/models/m/infer", "body": {OIP request}}
Output line  {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}
Error line   the same with "response": null and "error": {"code", "message", "line"}, or with the
             status and body the model answered with
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from errors import BadRequest, TidegateError
from inference import oip
from inference.tensors import InferRequest, InferResult
from storage.work import Claim

ENDPOINT = re.compile(r"/v2/models/([A-Za-z0-9._-]+)(?:/versions/([0-9]{1,18}))?/infer")
MAX_CUSTOM_ID = 512


class BadLine(BadRequest):
    """A line that can't be run."""

    code = "invalid_line"

    def __init__(self, reason: str, message: str, custom_id: str | None = None):
        super().__init__(message)
        self.reason = reason
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class Line:
    """A line that can be run."""

    number: int
    custom_id: str
    request: InferRequest


def parse_endpoint(endpoint: str) -> tuple[str, str]:
    """(model, version) of an infer URL; version "" is the latest. Raises `BadRequest`."""
    match = ENDPOINT.fullmatch(endpoint)
    if not match:
        raise BadRequest(
            "endpoint: must read /v2/models/{model}/infer or /v2/models/{model}/versions/{n}/infer",
            param="endpoint",
        )
    return match[1], match[2] or ""


def parse_line(text: bytes, number: int, endpoint: str, max_bytes: int) -> Line:
    """One input line as a request. Raises `BadLine`, with the custom_id where one can be read."""
    if len(text) > max_bytes:
        raise BadLine("line_too_long", f"the line is longer than {max_bytes} bytes")
    document = read_document(text)
    custom_id = read_custom_id(document)
    if document.get("method") != "POST":
        raise BadLine("invalid_method", 'method: must be "POST"', custom_id)
    if document.get("url") != endpoint:
        raise BadLine("invalid_url", f"url: must be the batch's endpoint, {endpoint}", custom_id)
    model, version = parse_endpoint(endpoint)
    try:
        request = oip.request_from_json(document.get("body"), model=model, version=version)
        # The time of a line is the batch's window: at Triton a limit of its own would have the line
        # given back, again and again.
        request, _ = oip.take_timeout(request)
    except TidegateError as error:
        raise BadLine(error.code, error.message, custom_id) from error
    return Line(number, custom_id, request)


def read_document(text: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadLine("invalid_json", f"the line is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadLine("invalid_json", "the line is not a JSON object")
    return document


def read_custom_id(document: dict[str, Any]) -> str:
    custom_id = document.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise BadLine(
            "invalid_custom_id", f"custom_id: must be a string of 1 to {MAX_CUSTOM_ID} characters"
        )
    return custom_id


def peek_custom_id(text: bytes) -> str | None:
    """The line's custom_id, whatever else is wrong with it."""
    try:
        return read_custom_id(read_document(text))
    except BadLine:
        return None


def output_line(request_id: str, custom_id: str, result: InferResult) -> bytes:
    """A line of the output file."""
    return response_line(
        request_id,
        custom_id,
        200,
        orjson.Fragment(oip.render_infer(result, oip.ResponseFormat())[0]),
    )


def failed_line(request_id: str, custom_id: str | None, status: int, error: TidegateError) -> bytes:
    """A line of the error file: the model, or the protocol, said no."""
    return response_line(request_id, custom_id, status, {"error": error.message})


def response_line(request_id: str, custom_id: Any, status: int, body: Any) -> bytes:
    return orjson.dumps(
        {
            "id": request_id,
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": None,
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )


def error_line(
    request_id: str, custom_id: str | None, number: int, code: str, message: str
) -> bytes:
    """A line of the error file: it was never run."""
    return orjson.dumps(
        {
            "id": request_id,
            "custom_id": custom_id,
            "response": None,
            "error": {"code": code, "message": message, "line": number},
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )


def request_id(claim: Claim, number: int) -> str:
    """The same for every attempt: a client may tell by it that two files hold one answer."""
    return f"batch_req_{claim.job_id.hex}_{number}"
