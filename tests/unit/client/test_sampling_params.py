import math
from typing import Any

import numpy as np
import pytest

from drumline.engine.errors import InvalidRequest
from drumline.engine.sampling_params import SERVED_FIELDS, NotServed, SamplingParams


def test_defaults_are_the_ones_a_vllm_user_knows() -> None:
    params = SamplingParams()
    shown = {name: getattr(params, name) for name in SERVED_FIELDS}
    assert shown == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("n", True),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 0.5),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("seed", "x"),
        ("seed", 2**63),
        ("stop", [""]),
        ("stop", ""),
        ("stop", [1]),
        ("stop", 7),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 3),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("ignore_eos", 1),
        ("detokenize", None),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_field_and_what_would_be_valid(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert caught.value.info.kind == "invalid_request"
    assert caught.value.valid
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("fields", "blamed"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"stop": "x", "detokenize": False}, "stop"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(fields: dict[str, Any], blamed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**fields)
    assert caught.value.field == blamed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_logprobs", 1),
        ("logit_bias", {3: 1.0}),
        ("bad_words", ["x"]),
        ("allowed_token_ids", [1]),
        ("structured_outputs", object()),
        ("best_of", 3),
        ("spaces_between_special_tokens", False),
    ],
)
def test_a_name_that_is_not_served_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=field):
        SamplingParams(**{field: value})


def test_a_name_that_is_not_served_is_accepted_when_it_asks_for_nothing() -> None:
    off: dict[str, Any] = dict.fromkeys(NotServed.__struct_fields__) | {
        "best_of": 1,
        "bad_words": [],
        "logit_bias": {},
        "spaces_between_special_tokens": True,
    }
    assert SamplingParams(**off) is not None


def test_an_unknown_name_in_a_mapping_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(InvalidRequest, match="temprature") as caught:
        SamplingParams.from_mapping({"temprature": 0.5})
    assert "temperature" in caught.value.valid
    assert "bad_words" not in caught.value.valid


def test_values_are_normalised() -> None:
    of_numpy: dict[str, Any] = {"stop_token_ids": [np.int64(3), 3], "temperature": np.float32(0.5)}
    params = SamplingParams(stop="end", seed=-1, top_k=-1, **of_numpy)
    assert params.stop_strings == ("end",)
    assert params.stop_token_ids == (3,)
    assert type(params.temperature) is float
    assert not params.has_seed
    assert params.to_spec().top_k == 0


def test_greedy_switches_the_filters_off_and_sampling_keeps_them() -> None:
    filters: dict[str, Any] = {"top_p": 0.5, "top_k": 3, "min_p": 0.1}
    greedy = SamplingParams(temperature=0, **filters).to_spec()
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.min_p) == (0.0, 1.0, 0, 0.0)
    sampled = SamplingParams(temperature=0.8, seed=7, **filters).to_spec()
    assert (sampled.temperature, sampled.top_p, sampled.top_k, sampled.min_p, sampled.seed) == (0.8, 0.5, 3, 0.1, 7)


def test_logprobs_zero_asks_for_the_sampled_token_only_and_none_for_nothing() -> None:
    assert SamplingParams(logprobs=0).to_spec().logprobs == 0
    assert SamplingParams().to_spec().logprobs == -1
