"""Logits processors that make an engine say given tokens first, and go on by itself after them.

An answer that was cut in the middle is repeated this way where its state is more than its tokens: a grammar, penalties,
a seed. Everything that vLLM keeps for such a request comes to stand where it stood. One class for each of vLLM's two
model runners; engine processes import this module by name.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

KEY = "llm_serve_forced_tokens"
"""In SamplingParams.extra_args: a list of token ids, output position by output position."""

_NEVER = float("-inf")


def install(config: Any) -> None:
    """Have the engine of this VllmConfig load the processor, where that is possible and costs nothing.

    Not with the older runner on a GPU: there a processor makes each step wait for the last one's tokens.
    """
    model = config.model_config
    is_v2 = config.use_v2_model_runner
    is_impossible = model.runner_type == "pooling" or model.is_diffusion or model.return_sampling_mask
    if is_impossible or (not is_v2 and (config.speculative_config or config.device_config.device_type != "cpu")):
        return
    name = ForcedV2 if is_v2 else ForcedV1
    model.logits_processors = [*(model.logits_processors or ()), f"{name.__module__}:{name.__qualname__}"]


def is_installed(config: Any) -> bool:
    """True where an engine of this VllmConfig can be made to repeat tokens."""
    return any(f"{__name__}:" in str(each) for each in config.model_config.logits_processors or ())


def _tokens(params: Any) -> list[int]:
    found: list[int] = (params.extra_args or {}).get(KEY, [])
    return found


def _validate(params: Any) -> None:
    """Raise ValueError where a client has sent something else under our name (vllm_xargs)."""
    tokens: object = (params.extra_args or {}).get(KEY, [])
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
        raise ValueError(f"{KEY} is a list of token ids.")


class ForcedV1(LogitsProcessor):  # type: ignore[misc]  # vLLM's types are Any here
    """For the older model runner."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:  # noqa: ARG002, FBT001 - vLLM's signature
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """As `_validate`."""
        _validate(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """No: it decides the token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests through the batch; each brings the list to which its output is appended."""

        def state(params: Any, _prompt: Any, output: list[int]) -> tuple[list[int], list[int]] | None:
            return (tokens, output) if (tokens := _tokens(params)) else None

        process_dict_updates(self._rows, batch_update, state)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave one token to each row whose output has not reached the end of its tokens."""
        for row, (tokens, output) in self._rows.items():
            if len(output) < len(tokens) and (token := tokens[len(output)]) < logits.shape[-1]:
                logits[row] = _NEVER
                logits[row, token] = 0.0
        return logits


class ForcedV2(LogitsProcessorV2):  # type: ignore[misc]  # vLLM's types are Any here
    """For the newer model runner. Never waits for the device."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:  # noqa: ARG002 - vLLM's signature
        self._requests = req_states
        self._slots: dict[int, torch.Tensor] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """As `_validate`."""
        _validate(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Note the tokens of a request that enters the batch; forget those of who had its slot before."""
        self._slots.pop(req_idx, None)
        if tokens := _tokens(sampling_params):
            self._slots[req_idx] = torch.tensor(tokens, dtype=torch.int64).to(self._requests.device, non_blocking=True)
        return bool(tokens)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Leave one token to each row of such a request, drafts included, within the length of its tokens."""
        for slot in ctx.idx_mapping_np:
            if (tokens := self._slots.get(int(slot))) is not None:
                _force(logits, tokens, *self._places(int(slot), ctx))
        return logits

    def _places(self, slot: int, ctx: LogitsContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows are this slot's, and the output position that each row samples."""
        return ctx.expanded_idx_mapping == slot, ctx.pos + 1 - int(self._requests.prompt_len.np[slot])


def _force(logits: torch.Tensor, tokens: torch.Tensor, is_mine: torch.Tensor, position: torch.Tensor) -> None:
    """Set `logits` [rows, vocabulary] so that rows that are mine can only sample the token of their position."""
    chosen = tokens[position.clamp(0, len(tokens) - 1)]
    is_forced = is_mine & (position >= 0) & (position < len(tokens)) & (chosen < logits.shape[-1])
    logits.masked_fill_(is_forced[:, None], _NEVER)
    chosen = chosen.clamp(max=logits.shape[-1] - 1)[:, None]
    logits.scatter_(1, chosen, torch.where(is_forced[:, None], 0.0, logits.gather(1, chosen)))
