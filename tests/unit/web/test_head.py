"""What a path asks for, and which key came along."""

from __future__ import annotations

import pytest

from web.head import api_key, asked_model


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v2/models/m/infer", ("m", "")),
        ("/v2/models/m/versions/1/infer", ("m", "1")),
        ("/v2/models/m/versions/000000000000000001/infer", ("m", "1")),
        ("/v2/models/m/versions/0000000000000000001/infer", None),
        ("/v2/models/m/versions/1000000000000000000/infer", None),
        ("/v2/models/m/versions/0/infer", ("m", "0")),
        ("/v2/models/m/versions/00/infer", ("m", "0")),
        ("/v2/models/m/versions//infer", None),
        ("/v2/models/a/b/infer", None),
        ("/v2/models/m", None),
    ],
)
def test_a_path_names_one_version_of_a_model(path: str, name: tuple[str, str] | None) -> None:
    assert asked_model(path) == name


def test_a_bearer_goes_before_the_other_header() -> None:
    assert api_key("bearer  a ", "b") == "a"
    assert api_key("Basic a", "b") == "b"
    assert api_key("", "") == ""
