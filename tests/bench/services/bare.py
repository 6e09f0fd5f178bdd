"""The ceiling: Flask that reads the request and answers a constant, on the gateway's server."""

from __future__ import annotations

from flask import Flask, Response, request

ANSWER = (
    b'{"model_name":"identity","model_version":"1","outputs":[{"name":"FLOATS_OUT",'
    b'"datatype":"FP32","shape":[1,4],"data":[1.5,2.5,3.5,4.5]}]}'
)

app = Flask("bare", static_folder=None)


@app.post("/infer")
def infer() -> Response:
    request.get_data()
    return Response(ANSWER, content_type="application/json")
