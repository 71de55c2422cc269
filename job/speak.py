"""A loaded model answers prompts: what `generate` and `judge` share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from job.config import Prompt
from job.data.read import RowFault
from job.data.render import Hidden, Rendered
from job.data.split import split_thinking
from job.data.tokens import Encoder, read_template
from job.errors import ExitCode, JobError
from job.progress import Progress
from job.stop import Stop

PROMPTS_AT_ONCE = 8


class Said(BaseModel):
    """What the model said to one prompt."""

    model_config = ConfigDict(frozen=True)

    user: str
    reasoning_language: str | None = None
    analysis: str
    answer: str
    whole: bool
    """Whether the model ended by itself, not by `max_new_tokens`."""


def load_adapter(model: Any, folder: Path) -> Any:
    """Put an adapter on its base; every weight in the file must land, and none may be missing.

    Raises:
        JobError: 66 no weights there, 70 it does not fit this base.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    if not (folder / "adapter_model.safetensors").exists():
        do = "name a folder with adapter_model.safetensors; pickled weights are never loaded"
        raise JobError(ExitCode.NOT_FOUND, str(folder), "holds no adapter weights", do)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    try:
        adapted = PeftModel(model, config)
        weights = load_peft_weights(str(folder), device=str(model.device))
        result = set_peft_model_state_dict(adapted, weights)
    except (RuntimeError, ValueError, AttributeError) as error:
        what = f"does not fit this base ({' '.join(str(error).split())[:200]})"
        raise _foreign(folder, what) from error
    missing = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    odd = [*missing, *result.unexpected_keys]
    if odd:
        raise _foreign(folder, f"does not fit this base: {len(odd)} weights differ ({odd[0]})")
    return adapted.eval()


def _foreign(folder: Path, what: str) -> JobError:
    do = "use it with the base that its adapter_config.json names"
    return JobError(ExitCode.NOT_PROVEN, str(folder), what, do)


class Speaker:
    """A loaded model with all that asking it takes.

    Args:
        model: With or without an adapter, in evaluation mode.
        folder: Of the tokenizer and its chat template.
        base: Of the model, whose configs name ends of text too.
        started: Unix seconds: today, for templates that ask for the date.
        stop: Heard between tokens.
        progress: Told of every token.
        thinking: ``data.thinking`` of the job.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        *,
        base: Path,
        started: float,
        stop: Stop,
        progress: Progress,
        thinking: str = "keep",
    ) -> None:
        self.encoder = Encoder(folder)
        self.template = read_template(folder, started=started)
        self.stop_token_ids = self.encoder.stop_token_ids(base, self.template)
        self._model, self._thinking = model, thinking
        self._stop, self._progress = stop, progress

    def ask(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[Said]:
        """Yield what the model says to each prompt, a few prompts at once.

        Raises:
            JobError: 65 for a prompt that the chat template refuses.
        """
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = prompts[start : start + PROMPTS_AT_ONCE]
            answers = self._generate(
                [self.encode(prompt) for prompt in some], max_new_tokens, temperature, seed + start
            )
            for prompt, tokens in zip(some, answers, strict=True):
                yield self._said(prompt, tokens)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's tokens; what looks like a control token in it is plain text."""
        hidden, slots = Hidden(self.encoder.special_tokens), list[str]()
        messages = hidden.messages(messages_of(prompt), slots)
        try:
            text = (
                self.template.render(messages, generation=True)
                if self.template
                else self.encoder.bos + "\n\n".join(message["content"] for message in messages)
            )
        except RowFault as fault:
            where = f"prompt {prompt.user[:40]!r}"
            raise JobError(ExitCode.DATA, where, str(fault), "ask it another way") from fault
        (tokens,) = self.encoder.encode([Rendered([(text, False)], slots)])
        return [int(token) for token in tokens.ids]

    def _generate(
        self, texts: list[list[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """Return the new tokens of each text; B texts are padded at their left to T tokens."""
        import torch
        from transformers import StoppingCriteriaList

        device = self._model.device
        gpus = [device] if device.type == "cuda" else []
        longest = max(map(len, texts))
        pad = self.encoder.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(t)) + t for t in texts], device=device)
        mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts], device=device)
        config = self._config(max_new_tokens, temperature)
        with torch.inference_mode(), torch.random.fork_rng(gpus):
            torch.manual_seed(seed)
            out = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([self._hear]),
            )
        self._stop.check()
        return [self._cut(row) for row in out[:, longest:].tolist()]

    def _config(self, max_new_tokens: int, temperature: float) -> Any:
        """Return how to draw tokens: from the whole distribution, whatever the checkpoint likes."""
        from transformers import GenerationConfig

        draws = {"do_sample": True, "temperature": temperature} if temperature else {}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_token_ids,
            pad_token_id=self.encoder.pad_token_id,
            **{"do_sample": False, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **draws},
        )
        # What is unset in ours, transformers would take from the model's own.
        getattr(self._model, "get_base_model", lambda: self._model)().generation_config = config
        return config

    def _hear(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        """Beat, and end every text where the run is asked to end (a StoppingCriteria)."""
        import torch

        self._progress.update()
        asked = self._stop.requested
        return torch.full((len(input_ids),), asked, dtype=torch.bool, device=input_ids.device)

    def _cut(self, tokens: list[int]) -> list[int]:
        """Return tokens up to the first that ends a turn, that one included."""
        ends = (at + 1 for at, token in enumerate(tokens) if token in self.stop_token_ids)
        return tokens[: next(ends, len(tokens))]

    def _said(self, prompt: Prompt, tokens: list[int]) -> Said:
        text = self.encoder.tokenizer.decode(tokens, skip_special_tokens=False)
        analysis, answer = split_thinking(text, self.encoder.special_tokens, self._thinking)
        return Said(
            user=prompt.user,
            reasoning_language=prompt.reasoning_language,
            analysis=analysis,
            answer=answer,
            whole=bool(tokens) and tokens[-1] in self.stop_token_ids,
        )


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as turns; the language stands in the system text, as in the training data."""
    language = prompt.reasoning_language
    parts = [f"reasoning language: {language}" if language else None, prompt.system]
    system = "\n\n".join(part for part in parts if part)
    turns = [{"role": "system", "content": system}] if system else []
    return [*turns, {"role": "user", "content": prompt.user}]
