"""What JSON cannot hold becomes null, at any depth."""

import json
import math

from allocator.json_values import jsonable


def test_numbers_that_json_does_not_have_become_null() -> None:
    value = {"a": math.nan, 2: [1.5, -math.inf, (math.inf, "x")], "b": {"c": None, "d": True}}
    cleaned = jsonable(value)
    assert cleaned == {"a": None, "2": [1.5, None, [None, "x"]], "b": {"c": None, "d": True}}
    assert json.loads(json.dumps(cleaned, allow_nan=False)) == cleaned
