"""The table of settings: every place takes the same values, and refuses the others with the setting's name."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from typing import Any

import jsonschema
import pytest

from edge_dlf import FusionParams, InvalidParameterError, SamplingParams
from edge_dlf.cli import main
from edge_dlf.cli.screen import show
from edge_dlf.errors import shown
from edge_dlf.params import DEFAULTS, FUSION, SAMPLING, SETTINGS, check_settings, settable
from edge_dlf.server import openapi
from edge_dlf.server.calls import MAX_CHOICES, MAX_TOP_LOGPROBS

VALUES = (-2, -1, 0, 0.5, 1, 8, 9, 40, 1.5, 2**64, "", "grid", "auto", "off", "x", True, [], ["x"], [""], [1], {})
OBJECTS = ({"math": 0.5}, {"math": "x"}, {"5": -1.5}, {"5": True}, {"-5": 1}, {"math": True})


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("value", [*VALUES, *OBJECTS], ids=repr)
def test_the_schema_of_a_setting_takes_what_its_check_takes(name: str, value: Any) -> None:
    setting = SETTINGS[name]
    is_valid = jsonschema.Draft202012Validator(setting.schema()).is_valid(value)
    if is_valid:
        setting.read(value)
    else:
        with pytest.raises(InvalidParameterError, match=name):
            setting.read(value)


@pytest.mark.parametrize(("name", "default"), [(name, value) for name, value in DEFAULTS.items() if value is not None])
def test_a_default_reads_as_itself_typed_or_not(name: str, default: Any) -> None:
    assert SETTINGS[name].read(default) == default
    assert SETTINGS[name].parse(show(default)) == default


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("alpha", "math=0.5, code = -1", {"math": 0.5, "code": -1.0}),
        ("alpha", "2", 2.0),
        ("weights", "large=0.54,base=-0.37, math = 0.8", {"large": 0.54, "base": -0.37, "math": 0.8}),
        ("draft", "off", "off"),
        ("draft", "3", 3),
        ("seed", "18446744073709551615", 2**64 - 1),
        ("stop", "the end", ("the end",)),
    ],
)
def test_what_a_user_types(name: str, text: str, value: Any) -> None:
    assert SETTINGS[name].parse(text) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": math.inf}, "alpha must be a finite number"),
        ({"alpha": {"math": math.nan}}, "alpha of math must be a finite number"),
        ({"weights": 0.5}, "weights must be NAME=NUMBER,…, not 0.5"),
        ({"weights": "large"}, "weights must be NAME=NUMBER,…, not 'large'"),
        ({"weights": {"math": math.inf}}, "weights of math must be a finite number"),
        ({"weights": {"large": 0, "math": 0}}, "weights must give a member a number other than 0"),
        ({"weights": {}}, "weights must give a member a number other than 0"),
        ({"method": "weighted"}, "method weighted needs weights of members, such as large=0.5,math=0.8"),
        ({"alpha_max": 0}, r"alpha_max must be in \(0, 100\], not 0"),
        ({"alpha_step": 3.0}, r"alpha_step must be in \(0, alpha_max\]"),
        ({"alpha_max": 100.0, "alpha_step": 0.01}, "must not exceed 1000"),
        ({"search": "best"}, "search must be one of grid, exact, not 'best'"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_p": -0.1}, r"top_p must be in \[0, 1\]"),
        ({"repeat_penalty": 0.0}, "repeat_penalty must be above 0"),
        ({"repeat_last_n": -2}, "repeat_last_n must be -1 or more"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {5: math.inf}}, "logit_bias of 5 must be a finite number"),
        ({"seed": 2**64}, "seed must be 0 to 18446744073709551615"),
    ],
)
def test_params_refuse_what_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    params: Any = FusionParams if settings.keys() <= FUSION else SamplingParams
    with pytest.raises(InvalidParameterError, match=message):
        params(**settings)


def test_params_keep_what_they_are_given() -> None:
    sampling = SamplingParams(logit_bias={5: -math.inf, 6: 1}, seed=None)
    assert sampling.logit_bias == {5: -math.inf, 6: 1}
    assert dataclasses.asdict(SamplingParams()) == {name: DEFAULTS[name] for name in DEFAULTS if name in SAMPLING}


def test_settings_must_fit_the_family() -> None:
    check_settings({"method": "math", "alpha": {"math": 1.0}, "temperature": 0.5}, ["math"])
    with pytest.raises(
        InvalidParameterError, match="method must be one of dynamic, static, blend, weighted, large, base, math"
    ):
        check_settings({"method": "code"}, ["math"])
    with pytest.raises(InvalidParameterError, match="alpha names 'code'; the experts are math"):
        check_settings({"alpha": {"code": 1.0}}, ["math"])
    check_settings({"method": "weighted", "weights": {"large": 0.5, "base": 0.0, "math": -1}}, ["math"])
    check_settings({"method": "large", "weights": {"math": 1}}, ["math"])
    with pytest.raises(InvalidParameterError, match="weights names 'code'; the members are large, base, math"):
        check_settings({"method": "large", "weights": {"code": 1.0}}, ["math"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_setting_of_a_request_is_in_the_server_s_document(path: str) -> None:
    body = openapi.document(["tiny"])["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    properties = body["properties"]
    assert settable("body").keys() <= properties.keys()
    fusion = {"search": "exact", "plausibility": 0.1, "alpha": {"math": 0.5}, "trace": True, "method": None}
    fusion["weights"] = {"large": 0.5, "math": 0.8}
    jsonschema.Draft202012Validator(properties["edge_dlf"]).validate(fusion)
    (own, _) = properties["edge_dlf"]["anyOf"]
    assert own["properties"].keys() == settable("edge_dlf").keys() | {"trace"}
    assert properties["n"]["anyOf"][0]["maximum"] == MAX_CHOICES
    assert properties.get("top_logprobs", properties["logprobs"])["anyOf"][0]["maximum"] == MAX_TOP_LOGPROBS


def test_every_setting_of_the_command_line_is_an_option() -> None:
    options = {parameter.name for parameter in main.commands["generate"].params}
    assert settable("command line").keys() <= options


class _Unwritable:
    def __repr__(self) -> str:
        raise RuntimeError("cannot be written")


class TestShown:
    """An error shows the beginning of a value, which may be a body of megabytes."""

    def test_short_values_are_as_python_writes_them(self) -> None:
        for value in (5, "a\nb", [1, 2], {"a": [1.5, None]}):
            assert shown(value) == repr(value)

    @pytest.mark.parametrize("value", [_Unwritable(), [_Unwritable()], -(10**5000)], ids=["own", "in a list", "digits"])
    def test_what_cannot_be_written_is_an_error_of_this_library(self, value: object) -> None:
        for name in SETTINGS:
            with pytest.raises(InvalidParameterError):
                SETTINGS[name].read(value)

    @pytest.mark.parametrize(
        "value",
        ["x" * 10**6, ["x" * 10**6] * 9, {str(n): n for n in range(10**5)}, [{str(n): n for n in range(10**5)}]],
        ids=lambda value: type(value).__name__,
    )
    def test_no_more_of_a_large_value_is_looked_at(self, value: object) -> None:
        tracemalloc.start()
        try:
            assert len(shown(value)) <= 80
            assert tracemalloc.get_traced_memory()[1] < 20_000
        finally:
            tracemalloc.stop()
