"""EnginePlan: the engine settings that one start is made with.

The file asks, the ladder may lower, and what results is a plan: a value that nothing changes, so that a log
line, the state file and the engine can never mean different things by it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from types import MappingProxyType

from llm_serve.core.devices import visible_devices
from llm_serve.core.settings import Settings

SECRET_NAME = re.compile(r"TOKEN$|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
HIDDEN = "(hidden)"


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """A model, vLLM's arguments by their own names, and the environment of the engine's processes.

    Two plans are equal when their engines would be. The mappings are copies and read-only.
    """

    model: str
    arguments: Mapping[str, object]
    env: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", MappingProxyType(deepcopy(dict(self.arguments))))
        object.__setattr__(self, "env", MappingProxyType(dict(self.env)))

    @classmethod
    def from_settings(cls, settings: Settings) -> EnginePlan:
        """Return rung 0: what the file asks for. The first of a list of attention backends is asked for too.

        The engine's processes see the GPUs of the file and no others; what CUDA cannot be told before the driver is
        asked is added by its answer (host/placement.py).
        """
        arguments, env = dict(settings.engine), dict(settings.engine_env)
        if (backends := settings.recovery.attention_backends) != "auto":
            arguments.setdefault("attention_backend", backends[0])
        if (visible := visible_devices(settings.gpu.devices)) is not None:
            env["CUDA_VISIBLE_DEVICES"] = visible
        return cls(model=settings.model, arguments=arguments, env=env)

    def replace_arguments(self, **changes: object) -> EnginePlan:
        """Return the plan with these arguments changed; None takes one away, back to vLLM's default."""
        arguments = {**self.arguments, **changes}
        return replace(self, arguments={key: value for key, value in arguments.items() if value is not None})

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON-able values for people to see: what looks like a secret is hidden."""
        return {
            "model": self.model,
            "arguments": {key: _shown(key, value) for key, value in self.arguments.items()},
            "env": {key: _shown(key, value) for key, value in self.env.items()},
        }

    def summary(self) -> str:
        """Return the plan on one line of a log."""
        shown = [f"{key}={_text(_shown(key, value))}" for key, value in self.arguments.items()]
        return " ".join([self.model, *shown])

    def fingerprint(self) -> str:
        """Return a short name that equal plans share, in every process and on every day."""
        # Hidden values count: a changed token is a changed plan. The hash does not give them away.
        whole = [self.model, dict(self.arguments), dict(self.env)]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __reduce__(self) -> tuple[type[EnginePlan], tuple[str, dict[str, object], dict[str, str]]]:
        # A mapping proxy cannot be pickled, and plans travel to the processes that build engines.
        return EnginePlan, (self.model, dict(self.arguments), dict(self.env))


def _shown(name: str, value: object) -> object:
    return HIDDEN if SECRET_NAME.search(name) and isinstance(value, str) else deepcopy(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
