"""EnginePlan: a value that is compared, changed by copy, and shown without secrets."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from llm_serve.core.plan import EnginePlan
from llm_serve.core.settings import GpuSettings, Settings

UUID = "0123abcd-0123-0123-0123-0123456789ab"
PLAN = EnginePlan("m", {"max_num_seqs": 8, "hf_overrides": {"a": [1]}}, {"OMP_NUM_THREADS": "4"})


def test_rung_zero_is_what_the_file_asks_for() -> None:
    """The plan made from settings has their model, arguments and environment."""
    settings = Settings(name="a", source="a.toml", model="m", engine={"seed": 1}, engine_env={"A": "1"})

    assert EnginePlan("m", {"seed": 1}, {"A": "1"}) == EnginePlan.from_settings(settings)


def test_the_engine_sees_the_gpus_of_the_file_alone() -> None:
    """Without the variable every instance would use the first GPU."""
    settings = Settings(name="a", source="a.toml", model="m", gpu=GpuSettings(devices=(3, 1)), engine_env={"A": "1"})

    assert {"A": "1", "CUDA_VISIBLE_DEVICES": "3,1"} == dict(EnginePlan.from_settings(settings).env)


@pytest.mark.parametrize(
    ("devices", "visible"),
    [
        ((f"GPU-{UUID}", f"GPU-{UUID[:-1]}c"), f"GPU-{UUID},GPU-{UUID[:-1]}c"),
        ((0, f"GPU-{UUID}"), None),
        (("0000:1b:00.0",), None),
    ],
)
def test_what_cuda_cannot_be_told_is_left_to_the_driver(devices: tuple[int | str, ...], visible: str | None) -> None:
    """It knows UUIDs, but neither PCI addresses nor a mixture."""
    settings = Settings(name="a", source="a.toml", model="m", gpu=GpuSettings(devices=devices))

    assert visible == EnginePlan.from_settings(settings).env.get("CUDA_VISIBLE_DEVICES")


def test_an_argument_is_replaced_in_a_copy() -> None:
    """A smaller plan leaves the plan it was made from as it is."""
    smaller = PLAN.replace_arguments(max_num_seqs=4, max_model_len=512)

    assert (smaller.arguments["max_num_seqs"], smaller.arguments["max_model_len"]) == (4, 512)
    assert PLAN.arguments["max_num_seqs"] == 8
    assert PLAN.env == smaller.env


def test_none_takes_an_argument_away() -> None:
    """An argument replaced by None is back at vLLM's default."""
    assert {"max_num_seqs"} == PLAN.replace_arguments(hf_overrides=None).arguments.keys()


def test_a_plan_cannot_be_changed() -> None:
    """Neither the plan nor what it was made from reaches in."""
    engine = {"hf_overrides": {"a": 1}}
    plan = EnginePlan("m", engine, {})
    engine["hf_overrides"]["a"] = 2

    assert plan.arguments["hf_overrides"] == {"a": 1}
    with pytest.raises(TypeError):
        plan.arguments["x"] = 1  # type: ignore[index]
    with pytest.raises(AttributeError):
        plan.model = "n"  # type: ignore[misc]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_is_equal_and_has_the_same_fingerprint(duplicate: object) -> None:
    """Plans travel between processes and stay the same plan."""
    other = duplicate(PLAN)  # type: ignore[operator]

    assert other == PLAN
    assert hash(other) == hash(PLAN)
    assert other.fingerprint() == PLAN.fingerprint()


def test_the_order_of_arguments_does_not_make_another_plan() -> None:
    """Moving a line in the file keeps what was learned about it."""
    one, other = EnginePlan("m", {"a": 1, "b": 2}, {}), EnginePlan("m", {"b": 2, "a": 1}, {})

    assert one == other
    assert one.fingerprint() == other.fingerprint()


def test_secrets_are_hidden_from_people() -> None:
    """Tokens are in neither the JSON nor the summary, but count in the fingerprint."""
    plan = EnginePlan("m", {"hf_token": "hf_abc"}, {"HF_TOKEN": "hf_def", "AWS_SECRET_ACCESS_KEY": "ghi"})
    shown = json.dumps(plan.to_json()) + plan.summary()

    assert not any(secret in shown for secret in ("hf_abc", "hf_def", "ghi"))
    assert plan.fingerprint() != plan.replace_arguments(hf_token="hf_other").fingerprint()


def test_numbers_of_tokens_are_no_secret() -> None:
    """max_num_batched_tokens is shown although its name speaks of tokens."""
    plan = EnginePlan("m", {"max_num_batched_tokens": 2048}, {"CUDA_VISIBLE_DEVICES": "0"})

    assert plan.summary() == "m max_num_batched_tokens=2048"
    assert plan.to_json()["env"] == {"CUDA_VISIBLE_DEVICES": "0"}
